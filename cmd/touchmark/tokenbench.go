package main

import (
	"context"
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/pkcs11"
)

// measurement is one line of token bench.
type measurement struct {
	Operation string  `json:"operation"`
	Sessions  int     `json:"sessions"`
	PerSecond float64 `json:"perSecond"`
	P50       float64 `json:"p50Milliseconds"`
	P99       float64 `json:"p99Milliseconds"`
	Error     string  `json:"error,omitempty"`
}

func (a *app) runTokenBench(ctx context.Context, o *tokenOptions) error {
	if o.seconds <= 0 || o.seconds > 60 {
		return usageError{fmt.Errorf("--seconds %v: want more than 0, and at most 60", o.seconds)}
	}
	for _, n := range o.sessions {
		if n < 1 || n > 64 {
			return usageError{fmt.Errorf("--sessions %d: want 1 to 64", n)}
		}
	}
	uri, base, _, err := a.tokenURI(o)
	if err != nil {
		return err
	}
	pin, err := uri.ResolvePIN(ctx, hsm.PINConfig{Base: base, Env: a.env, Prompt: func(ctx context.Context, what string) (hsm.Secret, error) { return a.askSecret(ctx, what) }})
	if err != nil {
		return err
	}
	defer pin.Wipe()
	var rows [][]string
	for _, n := range o.sessions {
		err := a.benchSessions(ctx, uri, pin, n, time.Duration(o.seconds*float64(time.Second)), func(m measurement) error {
			if a.json {
				return a.printJSON(m)
			}
			if m.Error != "" {
				rows = append(rows, []string{m.Operation, fmt.Sprint(m.Sessions), "-", "", "", m.Error})
			} else {
				rows = append(rows, []string{m.Operation, fmt.Sprint(m.Sessions), fmt.Sprintf("%.0f", m.PerSecond), fmt.Sprintf("%.2f ms", m.P50), fmt.Sprintf("%.2f ms", m.P99)})
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if a.json {
		return nil
	}
	return a.table([]string{"OPERATION", "SESSIONS", "PER SECOND", "MEDIAN", "P99"}, rows)
}

// benchSessions measures every operation with a number of sessions at work at once.
func (a *app) benchSessions(ctx context.Context, uri hsm.URI, pin hsm.Secret, sessions int, d time.Duration, report func(measurement) error) (err error) {
	store, err := pkcs11.Open(ctx, pkcs11.Config{URI: uri, Sessions: sessions, PIN: func(context.Context) (hsm.Secret, error) { return slices.Clone(pin), nil }})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	sign := func(alg hsm.Algorithm) func() (func() error, error) {
		return func() (func() error, error) {
			k, err := store.Generate(ctx, hsm.Spec{Name: "bench", Algorithm: alg, Ephemeral: true})
			if err != nil {
				return nil, err
			}
			signer, err := hsm.SigningKeyOf(k)
			digest := make([]byte, 32)
			return func() error {
				_, err := signer.Sign(rand.Reader, digest, crypto.SHA256)
				return err
			}, err
		}
	}
	for _, x := range []struct {
		name    string
		prepare func() (func() error, error)
	}{
		{"sign EC-P256", sign(hsm.ECP256)},
		{"sign RSA-2048", sign(hsm.RSA2048)},
		{"HMAC-SHA256", func() (func() error, error) {
			k, err := store.Generate(ctx, hsm.Spec{Name: "bench", Algorithm: hsm.HMACSHA256, Ephemeral: true})
			if err != nil {
				return nil, err
			}
			mac, err := hsm.MACKeyOf(k)
			return func() error {
				_, err := mac.MAC(ctx, nil, []byte("pump-0001"))
				return err
			}, err
		}},
		{"key pair EC-P256", func() (func() error, error) {
			return func() error {
				k, err := store.Generate(ctx, hsm.Spec{Name: "bench", Algorithm: hsm.ECP256, Ephemeral: true})
				if c, ok := k.(io.Closer); ok && err == nil {
					err = c.Close()
				}
				return err
			}, nil
		}},
	} {
		m := measurement{Operation: x.name, Sessions: sessions}
		op, err := x.prepare()
		if err == nil {
			err = m.measure(ctx, op, d)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			m.Error = err.Error()
		}
		if err := report(m); err != nil {
			return err
		}
	}
	return nil
}

// measure runs an operation from as many goroutines as there are sessions.
func (m *measurement) measure(ctx context.Context, op func() error, d time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	var wg sync.WaitGroup
	var failed atomic.Pointer[error]
	took := make([][]time.Duration, m.Sessions)
	start := time.Now()
	for i := range took {
		wg.Go(func() {
			for ctx.Err() == nil {
				t := time.Now()
				if err := op(); err != nil {
					failed.CompareAndSwap(nil, &err)
					cancel()
					return
				}
				took[i] = append(took[i], time.Since(t))
			}
		})
	}
	wg.Wait()
	elapsed := time.Since(start)
	if err := failed.Load(); err != nil {
		return *err
	}
	all := slices.Concat(took...)
	slices.Sort(all)
	m.PerSecond = float64(len(all)) / elapsed.Seconds()
	m.P50, m.P99 = ms(all[len(all)/2]), ms(all[len(all)*99/100])
	return nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
