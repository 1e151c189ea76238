package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
	"github.com/touchmark/touchmark/pkg/station"
	"github.com/touchmark/touchmark/templates"
)

// beginShift opens a ledger and begins a shift on it, as the command does.
func (f *factory) beginShift(ctx context.Context, lc ledger.Config, out, shift string) (*mint.Run, *ledger.Ledger, error) {
	p, err := mint.LoadProfile("x509-group", strings.NewReader(templates.Profiles()["x509-group"]))
	if err != nil {
		return nil, nil, err
	}
	led, err := ledger.Open(ctx, lc)
	if err != nil {
		return nil, nil, err
	}
	list := mint.ShiftList(p)
	issuer, err := ca.NewIssuer(ca.Config{Signer: f.caKey, Certificate: f.issuing, Chain: []*x509.Certificate{f.root}})
	if err != nil {
		return nil, nil, err
	}
	prepared, err := issuer.Prepare(p.CertificateProfile(must(templates.Certificate("device", nil)), list.Columns))
	if err != nil {
		return nil, nil, err
	}
	run, err := mint.Begin(ctx, mint.Config{Ledger: led, Profile: p, List: list, Store: f.store, Issuer: prepared, Out: out, Shift: shift,
		IDScope: "0ne00112233", GlobalEndpoint: "global.azure-devices-provisioning.net"})
	return run, led, err
}

func (f *factory) newStation(lc ledger.Config, out string) *station.Station {
	cfg := must(station.ReadConfig("bench", strings.NewReader("profile = \"x509-group\"\ndisk-free = 1\n")))
	return station.New(cfg, station.Setup{Name: "bench", Out: out, Open: func(ctx context.Context, shift, _ string) (*station.Work, error) {
		run, led, err := f.beginShift(ctx, lc, out, shift)
		if err != nil {
			return nil, err
		}
		return &station.Work{Run: run, Ledger: led, Refuse: func(context.Context, string, error) {}, Close: func() error { check(run.Close()); return led.Close() }}, nil
	}})
}

func (f *factory) stationDir() (ledger.Config, string) {
	dir := must(os.MkdirTemp(f.dir, "station-*"))
	out := filepath.Join(dir, "units")
	check(os.MkdirAll(out, 0o755))
	lc := ledger.Config{Path: filepath.Join(dir, "ledger.db"), Origin: "bench", Signer: f.station}
	check(ledger.Create(context.Background(), lc))
	return lc, out
}

// station-unit: units per second through the station, one after the other on one head with no fixture, against minting and sealing
// them one by one. What is between the two is the station's own: some microseconds a unit.
func (b *bench) stationUnit() {
	ctx := context.Background()
	f := newFactory(newKeyFiles(), temp)
	defer f.close()
	n := 300 * b.scale
	var ours, bare []float64
	b.compare("station-unit", "units/s", func() float64 {
		lc, out := f.stationDir()
		st := f.newStation(lc, out)
		check(st.Ready(ctx, "bench"))
		start := time.Now()
		for i := range n {
			if v := st.Make(ctx, 0, fmt.Sprintf("SN%08d", i), nil); !v.Pass {
				check(fmt.Errorf("%+v", v))
			}
		}
		r := float64(n) / time.Since(start).Seconds()
		check(st.Close())
		ours = append(ours, 1e6/r)
		return r
	}, func() float64 {
		lc, out := f.stationDir()
		run, led, err := f.beginShift(ctx, lc, out, "bare")
		check(err)
		start := time.Now()
		for i := range n {
			u := must(run.Unit(ctx, must(run.Row(fmt.Sprintf("SN%08d", i), nil))))
			check(u.Verified(ctx))
			check(u.Sealed(ctx))
			check(u.Forget(false))
		}
		r := float64(n) / time.Since(start).Seconds()
		check(run.Close())
		check(led.Close())
		bare = append(bare, 1e6/r)
		return r
	})
	b.report(result{"station-overhead", median(ours) - median(bare), 0, 0, "us/unit"})
}

// resumeStation opens a station on a ledger that is there, and returns how long it took to its first PASS. The factory around it is
// the benchmark's own.
func resumeStation(cfg ledger.Config) time.Duration {
	ctx := context.Background()
	f := newFactory(newKeyFiles(), filepath.Dir(cfg.Path))
	defer f.close()
	out := filepath.Join(f.dir, "units")
	check(os.MkdirAll(out, 0o755))
	start := time.Now()
	st := f.newStation(cfg, out)
	check(st.Ready(ctx, "bench"))
	if v := st.Make(ctx, 0, "RESUMED-1", nil); !v.Pass {
		check(fmt.Errorf("%+v", v))
	}
	d := time.Since(start)
	check(st.Close())
	return d
}
