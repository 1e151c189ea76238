package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/hub"
	"github.com/touchmark/touchmark/pkg/registration"
)

const (
	hubAnswers = 20 * time.Millisecond // as a cloud's do, or later
	hubCallers = 8                     // what one hub is told at once
)

// hub-backlog: devices that registered while their hub was away, told to it when it is back; against as many callers that do nothing
// but call it as often. The hub takes 20 ms for an answer.
func (b *bench) hubBacklog() {
	n := 100 * b.scale
	var away atomic.Bool
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body := must(io.ReadAll(r.Body))
		if away.Load() {
			http.Error(w, "", http.StatusServiceUnavailable)
			return
		}
		time.Sleep(hubAnswers)
		if bytes.Contains(body, []byte(`"operation":"device"`)) {
			w.WriteHeader(http.StatusNotFound)
			_, _ = io.WriteString(w, `{"version":1,"error":{"code":"DeviceNotFound","message":"It is new"}}`)
			return
		}
		_, _ = io.WriteString(w, `{"version":1,"created":true}`)
	}))
	defer backend.Close()
	b.compare("hub-backlog", "devices/s", func() float64 {
		store, svc := newService(tempDir())
		defer store.Close()
		key := bytes.Repeat([]byte("k"), 64)
		text := base64.StdEncoding.EncodeToString(key)
		must(svc.PutEnrollment(context.Background(), registration.Actor{}, registration.Group, "group", must(json.Marshal(dps.EnrollmentGroup{EnrollmentGroupID: "group", Enrollment: dps.Enrollment{
			Attestation: &dps.Attestation{Type: dps.AttestationSymmetricKey, SymmetricKey: &dps.SymmetricKeyAttestation{PrimaryKey: text, SecondaryKey: text}}}})), ""))
		_, _, err := registration.EditScope(context.Background(), store, benchScope, registration.Actor{Name: "bench"}, "put", time.Now(), func(*registration.Scope) (*registration.Scope, error) {
			return &registration.Scope{ID: benchScope, Name: "bench", Settings: registration.Settings{Hubs: []registration.LinkedHub{{Name: "hub-a.example.net", Kind: registration.HubWebhook,
				ConnectionString: "URL=" + backend.URL + "/;Secret=" + text + ";Plain=true"}}}}, nil
		})
		check(err)
		var later, told atomic.Int64
		done := make(chan struct{})
		open := func() (*registration.Scopes, *hub.Pool) {
			pool := hub.NewPool(hub.PoolConfig{})
			return registration.NewScopes(registration.ScopesConfig{Config: registration.Config{Store: store, OpenHub: pool.Hub, GiveUp: time.Hour,
				Now: func() time.Time { return time.Now().Add(time.Duration(later.Load())) },
				OnProvision: func(p registration.Provisioning) {
					if p.Outcome == "assigned" && told.Add(1) == int64(n) {
						close(done)
					}
				}}}), pool
		}
		away.Store(true)
		scopes, pool := open()
		for i := range n {
			id := fmt.Sprintf("pump-%06d", i)
			must(scopes.Register(context.Background(), crowdRequest(id, attest.Proof{Token: attesttest.Token(attest.DeriveKey(key, id), benchScope, id, time.Now().Add(time.Hour))})))
		}
		pool.Close()
		away.Store(false)
		later.Store(int64(10 * time.Minute)) // every pause is over
		scopes, pool = open()
		defer pool.Close()
		ctx, stop := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		defer wg.Wait()
		defer stop()
		start := time.Now()
		wg.Go(func() { scopes.Provision(ctx) })
		<-done
		return float64(n) / time.Since(start).Seconds()
	}, func() float64 {
		client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: hubCallers}}
		defer client.CloseIdleConnections()
		body := bytes.Repeat([]byte("x"), 500)
		var next atomic.Int64
		var wg sync.WaitGroup
		start := time.Now()
		for range hubCallers {
			wg.Go(func() {
				for next.Add(1) <= int64(2*n) { // whether it has the device, and to have it
					res := must(client.Post(backend.URL, "application/json", bytes.NewReader(body)))
					_, _ = io.Copy(io.Discard, res.Body)
					res.Body.Close()
				}
			})
		}
		wg.Wait()
		return float64(n) / time.Since(start).Seconds()
	})
}
