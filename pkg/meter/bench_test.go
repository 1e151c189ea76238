package meter_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/meter"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// What watching costs: registrations that are counted, timed and kept in the log of attempts, against the same without. The ratio is
// the rate that is left, with everything written.
func BenchmarkWatched(b *testing.B) {
	run := func(watched bool, n int) time.Duration {
		f := registrationtest.NewFixture(b)
		cfg := registration.Config{Store: f.Store, Scope: registrationtest.Scope, Settings: registration.Settings{Hubs: registration.Records("hub-a.example")}, Now: f.Now}
		m := meter.New(meter.Config{Store: f.Store, Now: f.Now})
		log := registration.NewAttempts(registration.AttemptsConfig{Store: f.Store, Now: f.Now})
		if watched {
			cfg.Store, cfg.Attempt = m.Store(f.Store), func(scope string, a *registration.Attempt) { m.Attempt(scope, a); log.Add(scope, a) }
		}
		var r registration.Registrar = registration.New(cfg)
		if watched {
			r = m.Registrar(r)
		}
		reqs := make([]*registration.Request, n)
		for i := range reqs {
			d := f.Derived(fmt.Sprint("dev-", i))
			reqs[i] = &registration.Request{IDScope: d.Scope, RegistrationID: d.ID, APIVersion: d.APIVersion, Proof: attest.Proof{Token: d.Token}, Protocol: "mqtt", Remote: "192.0.2.1:1"}
		}
		next := make(chan *registration.Request)
		done := make(chan error)
		begun := time.Now()
		for range 64 { // callers
			go func() {
				var err error
				for req := range next {
					if _, e := r.Register(b.Context(), req); e != nil {
						err = e
					}
				}
				done <- err
			}()
		}
		for i, req := range reqs {
			next <- req
			if watched && i%4000 == 3999 {
				if err := log.Flush(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
		}
		close(next)
		for range 64 {
			if err := <-done; err != nil {
				b.Fatal(err)
			}
		}
		if err := log.Flush(b.Context()); err != nil {
			b.Fatal(err)
		}
		return time.Since(begun)
	}
	var bare, watched time.Duration
	for b.Loop() {
		const n = 8000
		bare += run(false, n)
		watched += run(true, n)
	}
	b.ReportMetric(float64(bare)/float64(watched), "left/op")
}
