package main

import (
	"fmt"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/limit"
	"github.com/touchmark/touchmark/pkg/registration"
)

// limitOptions are what devices may ask of the service. The flags' defaults are package limit's.
type limitOptions struct {
	off                             bool
	perDevice, perAddress, perScope float64
}

func (o *limitOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.Float64Var(&o.perDevice, "rate-per-device", 1, "requests per second of one device; who exceeds a rate is asked to come later, and refused who goes on; 0 for no limit")
	f.Float64Var(&o.perAddress, "rate-per-address", 500, "requests per second from one address, behind which there may be a factory; 0 for no limit")
	f.Float64Var(&o.perScope, "rate-per-scope", 2000, "requests per second in the ID scope; 0 for no limit")
	f.BoolVar(&o.off, "no-limits", false, "let every request through at once, whoever sends it")
}

func (o *limitOptions) check() error {
	for _, r := range []struct {
		name string
		rate float64
	}{{"device", o.perDevice}, {"address", o.perAddress}, {"scope", o.perScope}} {
		if !(r.rate >= 0) {
			return usageError{fmt.Errorf("--rate-per-%s %v: want requests per second, or 0 for no limit", r.name, r.rate)}
		}
	}
	return nil
}

func (o *limitOptions) wrap(next registration.Registrar, known func(string) bool, throttled func(string), log *slog.Logger) *limit.Limiter {
	none := func(r float64) float64 {
		if r == 0 {
			return -1
		}
		return r
	}
	return limit.New(limit.Config{Registrar: next, Scopes: known, Off: o.off, Throttled: throttled, Log: log,
		PerDevice: none(o.perDevice), PerAddress: none(o.perAddress), PerScope: none(o.perScope)})
}
