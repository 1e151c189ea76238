package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/hub"
	"github.com/touchmark/touchmark/pkg/hub/hubtest"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/sqlstore"
)

// Issue 6: the service is killed again and again while devices register and hubs come, go and change their weights, and hubs fail now
// and then. At rest every device that was told its assignment is at the one hub that its record names, with its whole twin; no device
// is at two hubs, but for those that are listed as orphans because a hub was unlinked; and nothing is left to tell. What an operator was
// told is made is there.
//
// TOUCHMARK_TEST_KILLS is how often it is killed: 100 for a release.
func TestHubKill(t *testing.T) {
	t.Parallel()
	kills, _ := strconv.Atoi(os.Getenv("TOUCHMARK_TEST_KILLS"))
	if kills == 0 {
		kills = 5
	}
	const devices, callers, idScope = 60, 8, "0ne0A1B2C3D"
	dir := t.TempDir()
	svc := filepath.Join(dir, "svc")
	stubs := map[string]*hubtest.Stub{}
	for _, name := range []string{"hub-a.example.net", "hub-b.example.net", "hub-c.example.net"} {
		stubs[name] = hubtest.StartStub(t)
	}
	names := []string{"hub-a.example.net", "hub-b.example.net", "hub-c.example.net"}
	groupKey := bytes.Repeat([]byte("g"), 64)
	flags := []string{"--https", "127.0.0.1:0", "--mqtt", "off", "--amqp", "off", "--no-limits", "--quiet", "--id-scope", idScope}
	first, _, _ := startServe(t, dir, flags...)
	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = first.Wait()

	dataKey, err := os.ReadFile(filepath.Join(svc, dataKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	inStore := func(f func(*sqlstore.Store) error) {
		t.Helper()
		store, err := sqlstore.Open(t.Context(), sqlstore.Config{Path: filepath.Join(svc, storeFile), DataKey: dataKey})
		if err == nil {
			err = f(store)
			if cerr := store.Close(); err == nil {
				err = cerr
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	by := registration.Actor{Name: "test"}
	link := func(edit func(i int, h *registration.LinkedHub) bool) {
		inStore(func(store *sqlstore.Store) error {
			_, _, err := registration.EditScope(t.Context(), store, idScope, by, "link", time.Now(), func(sc *registration.Scope) (*registration.Scope, error) {
				sc.Hubs = nil
				for i, name := range names {
					if h := stubs[name].Linked(name); edit(i, &h) {
						sc.Hubs = append(sc.Hubs, h)
					}
				}
				return sc, nil
			})
			return err
		})
	}
	link(func(int, *registration.LinkedHub) bool { return true })
	inStore(func(store *sqlstore.Store) error {
		key := base64.StdEncoding.EncodeToString(groupKey)
		group, err := json.Marshal(dps.EnrollmentGroup{EnrollmentGroupID: "line", Enrollment: dps.Enrollment{
			Attestation:       &dps.Attestation{Type: dps.AttestationSymmetricKey, SymmetricKey: &dps.SymmetricKeyAttestation{PrimaryKey: key, SecondaryKey: key}},
			InitialTwin:       &dps.InitialTwin{Tags: json.RawMessage(`{"site":"A7"}`)},
			ReprovisionPolicy: &dps.ReprovisionPolicy{UpdateHubAssignment: true, MigrateDeviceData: true}}})
		if err == nil {
			_, err = registration.New(registration.Config{Store: store, Scope: idScope}).PutEnrollment(t.Context(), registration.Actor{}, registration.Group, "line", group, "")
		}
		return err
	})
	for _, s := range stubs {
		s.Fail(func(*http.Request) hubtest.Fault {
			switch rand.IntN(20) {
			case 0:
				return hubtest.Fault{Status: 503}
			case 1:
				return hubtest.Fault{Status: 503, After: true}
			}
			return hubtest.Fault{}
		})
	}

	var mu sync.Mutex
	told := map[string]int{} // devices that were told an assignment, and how often
	var made []string        // enrollments that the service said it had made
	for range kills {
		cmd, ready, _ := startServe(t, dir, flags...)
		ctx, cancel := context.WithCancel(t.Context())
		var load sync.WaitGroup
		for range callers {
			client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, Timeout: 20 * time.Second} //nolint:gosec // a test's own service
			load.Go(func() {
				defer client.CloseIdleConnections()
				for ctx.Err() == nil {
					id := fmt.Sprintf("dev-%d", rand.IntN(devices))
					if comeIn(ctx, client, ready["https"].(string), idScope, id, attest.DeriveKey(groupKey, id)) {
						mu.Lock()
						told[id]++
						mu.Unlock()
					}
				}
			})
		}
		operator, err := (&app{}).openService(filepath.Join(svc, connectionFile), "")
		if err != nil {
			t.Fatal(err)
		}
		load.Go(func() {
			for round, i := len(made), 0; ctx.Err() == nil; i++ {
				id := fmt.Sprintf("made-%d-%d", round, i)
				if operator.call(ctx, http.MethodPut, "/enrollments/"+id, nil, nil, strings.NewReader(`{"registrationId":"`+id+`","attestation":{"type":"symmetricKey"}}`), nil) == nil {
					made = append(made, id)
				}
			}
		})
		timer := time.AfterFunc(time.Duration(200+rand.IntN(700))*time.Millisecond, func() {
			_ = cmd.Process.Kill()
			cancel()
		})
		load.Wait()
		timer.Stop()
		_ = cmd.Wait()
		gone := 1 + rand.IntN(6) // the first one is named at each start
		link(func(i int, h *registration.LinkedHub) bool {
			h.Weight, h.Reserved = 1+rand.IntN(1000), rand.IntN(4) == 0
			return i != gone
		})
	}
	if len(told) == 0 || len(made) == 0 {
		t.Fatalf("%d devices were told something, %d enrollments made", len(told), len(made))
	}

	for _, s := range stubs {
		s.Fail(nil)
	}
	pool := hub.NewPool(hub.PoolConfig{})
	defer pool.Close()
	inStore(func(store *sqlstore.Store) error {
		later := time.Now()
		scopes := registration.NewScopes(registration.ScopesConfig{Config: registration.Config{Store: store, OpenHub: pool.Hub, GiveUp: time.Hour, Now: func() time.Time { return later }}})
		for range 5 { // leases end, and pauses
			later = later.Add(time.Minute)
			if _, err := scopes.ProvisionDue(t.Context()); err != nil {
				return err
			}
		}
		s, err := scopes.Service(t.Context(), idScope)
		if err != nil {
			return err
		}
		if left, _, err := s.Tasks(t.Context(), "", 10); err != nil || len(left) > 0 {
			t.Errorf("left to tell: %+v, %v", left, err)
		}
		orphans, err := s.Orphans(t.Context(), registration.Orphan{}, 10000)
		if err != nil {
			return err
		}
		for _, id := range made {
			if err := store.View(t.Context(), func(tx registration.Tx) error {
				_, err := tx.Record(strings.ToLower(idScope), registration.Individual, id)
				return err
			}); err != nil {
				t.Errorf("%s was made: %v", id, err)
			}
		}
		known, total := map[string][]string{}, 0
		for name, stub := range stubs {
			for _, id := range stub.Devices() {
				if !slices.ContainsFunc(orphans, func(o *registration.Orphan) bool { return o.Hub == name && o.DeviceID == id }) {
					known[id] = append(known[id], name)
				}
			}
		}
		for i := range devices {
			id := fmt.Sprintf("dev-%d", i)
			total += told[id]
			var r *registration.Registration
			_ = store.View(t.Context(), func(tx registration.Tx) (err error) {
				r, err = tx.Registration(strings.ToLower(idScope), id)
				return err
			})
			switch {
			case r == nil || r.Hub == "":
				if told[id] > 0 || len(known[id]) > 0 {
					t.Errorf("%s was told %d assignments, has no record, and is at %v", id, told[id], known[id])
				}
				continue
			case !slices.Equal(known[id], []string{r.Hub}):
				t.Errorf("%s is at %v, its record says %s", id, known[id], r.Hub)
				continue
			case told[id] > 0 && r.State.Status != dps.Assigned && r.State.Status != dps.Failed:
				t.Errorf("%s is %s for ever", id, r.State.Status)
			}
			linked := stubs[r.Hub].Linked(r.Hub)
			h, err := pool.Hub(idScope, linked)
			if err != nil {
				return err
			}
			if twin, err := h.Twin(t.Context(), id); err != nil || !bytes.Contains(twin.Tags, []byte(`"A7"`)) {
				t.Errorf("%s at %s: twin %+v, %v", id, r.Hub, twin, err)
			}
		}
		t.Logf("%d kills, %d assignments told to %d devices, %d orphans of unlinked hubs, %d enrollments made", kills, total, len(told), len(orphans), len(made))
		return nil
	})
}

// comeIn registers a device and asks what became of it, and reports whether it was told its hub. Who is not told at once goes away; the
// device comes again.
func comeIn(ctx context.Context, c *http.Client, address, scope, id string, key []byte) bool {
	do := func(method, path, body string) *dps.OperationStatus {
		req, err := http.NewRequestWithContext(ctx, method, "https://"+address+"/"+scope+"/registrations/"+id+path+"?api-version=2021-06-01", strings.NewReader(body))
		if err != nil {
			return nil
		}
		req.Header.Set("Authorization", attesttest.Token(key, scope, id, time.Now().Add(time.Hour)))
		req.Header.Set("Content-Type", "application/json")
		res, err := c.Do(req)
		if err != nil {
			return nil
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		var op dps.OperationStatus
		if err != nil || res.StatusCode > 299 || json.Unmarshal(b, &op) != nil {
			return nil
		}
		return &op
	}
	op := do(http.MethodPut, "/register", `{"registrationId":"`+id+`"}`)
	for range 2 {
		if op == nil || op.Status.Terminal() {
			break
		}
		op = do(http.MethodGet, "/operations/"+op.OperationID, "")
	}
	return op != nil && op.Status == dps.Assigned && op.RegistrationState != nil && op.RegistrationState.AssignedHub != ""
}
