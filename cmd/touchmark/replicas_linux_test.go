package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/device"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/operator"
	"github.com/touchmark/touchmark/pkg/sqlstore/sqlstoretest"
)

// A replica is a `touchmark serve` beside others on one database.
type replica struct {
	name    string
	cmd     *exec.Cmd
	ready   map[string]any
	log     *syncBuffer
	service *service
	devices *http.Client
}

// launch starts a replica whose data directory is its own, and waits until it is ready.
func launch(t *testing.T, dir, name string, env []string, args ...string) (*replica, error) {
	r := &replica{name: name, log: &syncBuffer{}}
	r.cmd = exec.Command(program(t), append([]string{"serve", "--data", name, "--https", "127.0.0.1:0", "--mqtt", "off", "--amqp", "off", "--no-limits",
		"--hub", "hub-a.example.net", "--hub", "hub-b.example.net", "--json"}, args...)...)
	r.cmd.Dir, r.cmd.Stderr, r.cmd.Env = dir, r.log, append(os.Environ(), env...)
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := r.cmd.Start(); err != nil {
		return nil, err
	}
	t.Cleanup(func() {
		if r.cmd.ProcessState == nil {
			_ = r.cmd.Process.Signal(os.Interrupt)
			_ = r.cmd.Wait()
		}
		if t.Failed() {
			t.Log(name, r.log.String())
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err == nil {
		err = json.Unmarshal([]byte(line), &r.ready)
	}
	if err != nil {
		return nil, errors.Join(err, r.cmd.Wait(), errors.New(r.log.String()))
	}
	a := &app{stdio: stdio{out: io.Discard, err: io.Discard}}
	if r.service, err = a.openService(filepath.Join(dir, name, connectionFile), filepath.Join(dir, name, caFile)); err != nil {
		return nil, err
	}
	r.devices = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: r.service.cfg.Roots}}}
	return r, nil
}

// device makes a request of a device.
func (r *replica) device(method, path, token string, body any) (status int, answer map[string]any, err error) {
	b, err := json.Marshal(body)
	if err != nil {
		return 0, nil, err
	}
	req, err := http.NewRequest(method, "https://"+r.ready["https"].(string)+"/"+r.ready["idScope"].(string)+"/registrations/"+path+"?api-version=2021-06-01", bytes.NewReader(b))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Authorization", token)
	req.Header.Set("Content-Type", "application/json")
	res, err := r.devices.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer res.Body.Close()
	err = json.NewDecoder(res.Body).Decode(&answer)
	return res.StatusCode, answer, err
}

func code(err error) dps.Code {
	var e *operator.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return 0
}

// Three replicas that start at once on one database are one service: they have one ID scope, one CA, one recipient and one data
// key, and every call may go to another one than the last. One of them is killed on the way. Devices come by every protocol.
func TestReplicas(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	dsn := sqlstoretest.Start(t).Database(t)
	key := make([]byte, 32)
	_, _ = rand.Read(key)
	for name, b := range map[string][]byte{"shared.key": key, "address": []byte(dsn + "\n")} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	program(t)
	replicas := make([]*replica, 3)
	var eg errgroup.Group
	for i, way := range []struct{ env, args []string }{
		{nil, []string{"--store", dsn}}, {nil, []string{"--store-file", "address"}}, {[]string{"TOUCHMARK_STORE=" + dsn}, nil},
	} {
		eg.Go(func() (err error) {
			replicas[i], err = launch(t, dir, fmt.Sprint("replica-", i), way.env, append(way.args, "--data-key-file", "shared.key", "--mqtt", "127.0.0.1:0", "--amqp", "127.0.0.1:0")...)
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		t.Fatal(err)
	}
	var cas [3]string
	for i, r := range replicas {
		b, err := os.ReadFile(filepath.Join(dir, r.name, caFile))
		if err != nil {
			t.Fatal(err)
		}
		if cas[i] = string(b); cas[i] != cas[0] || r.ready["idScope"] != replicas[0].ready["idScope"] || r.ready["recipient"] != replicas[0].ready["recipient"] {
			t.Fatalf("replica %d is another service", i)
		}
		for _, secret := range []string{identityFile, caKeyFile, dataKeyFile} {
			if exists(filepath.Join(dir, r.name, secret)) {
				t.Errorf("%s has %s, which is the store's alone", r.name, secret)
			}
		}
	}
	ctx := t.Context()
	scope := replicas[0].ready["idScope"].(string)
	var turn atomic.Int64
	living := replicas
	var mu sync.Mutex
	next := func() *replica { // another one each time
		mu.Lock()
		defer mu.Unlock()
		return living[int(turn.Add(1))%len(living)]
	}
	groupKey := bytes.Repeat([]byte("g"), 64)
	text := base64.StdEncoding.EncodeToString
	group := map[string]any{"enrollmentGroupId": "line", "attestation": map[string]any{"type": "symmetricKey", "symmetricKey": map[string]any{"primaryKey": text(groupKey), "secondaryKey": text(groupKey)}}}
	if err := next().service.callJSON(ctx, http.MethodPut, "/enrollmentGroups/line", group, nil); err != nil {
		t.Fatal(err)
	}
	token := func(id string) string {
		return attesttest.Token(attest.DeriveKey(groupKey, id), scope, id, time.Now().Add(time.Hour))
	}
	// kept looks whether the service knows of the hub that a device was told.
	kept := func(id, hub string) error {
		var st dps.RegistrationState
		if err := next().service.call(ctx, http.MethodGet, "/registrations/"+id, nil, nil, nil, &st); err != nil || st.Status != dps.Assigned {
			return fmt.Errorf("%s: the service says %+v, %w", id, st, err)
		}
		if st.AssignedHub != hub {
			return fmt.Errorf("%s is at two hubs: %s and %s", id, hub, st.AssignedHub)
		}
		return nil
	}
	register := func(id string) error {
		tok := token(id)
		status, answer, err := next().device(http.MethodPut, id+"/register", tok, map[string]string{"registrationId": id})
		if err != nil || status != http.StatusAccepted {
			return fmt.Errorf("%s registers: %d %v %w", id, status, answer, err)
		}
		for answer["status"] == "assigning" {
			if status, answer, err = next().device(http.MethodGet, id+"/operations/"+answer["operationId"].(string), tok, nil); err != nil || status > http.StatusAccepted {
				return fmt.Errorf("%s polls: %d %v %w", id, status, answer, err)
			}
		}
		if answer["status"] != "assigned" {
			return fmt.Errorf("%s: %v", id, answer)
		}
		return kept(id, answer["registrationState"].(map[string]any)["assignedHub"].(string))
	}
	crowd := func(name string, n int) {
		t.Helper()
		var eg errgroup.Group
		for i := range n {
			eg.Go(func() error { return register(fmt.Sprintf("%s-%03d", name, i)) })
		}
		if err := eg.Wait(); err != nil {
			t.Error(err)
		}
	}
	crowd("dev", 60)
	crowd("dev", 60) // they come again

	t.Run("one creates, one replaces", func(t *testing.T) {
		body := func(status string) map[string]any {
			return map[string]any{"registrationId": "one", "provisioningStatus": status, "attestation": map[string]any{"type": "symmetricKey"}}
		}
		for round := range 6 {
			var created, exist atomic.Int64
			var eg errgroup.Group
			for range 9 {
				eg.Go(func() error {
					err := next().service.callJSON(ctx, http.MethodPut, "/enrollments/one", body("enabled"), nil)
					switch {
					case err == nil:
						created.Add(1)
					case code(err) == dps.CodeEnrollmentExists:
						exist.Add(1)
					default:
						return err
					}
					return nil
				})
			}
			if err := eg.Wait(); err != nil || created.Load() != 1 || exist.Load() != 8 {
				t.Fatalf("round %d: %d created it, to %d it was there; %v", round, created.Load(), exist.Load(), err)
			}
			var was struct{ ETag string }
			if err := next().service.call(ctx, http.MethodGet, "/enrollments/one", nil, nil, nil, &was); err != nil {
				t.Fatal(err)
			}
			var won, late atomic.Int64
			eg = errgroup.Group{}
			for range 9 {
				eg.Go(func() error {
					b, err := json.Marshal(body("disabled"))
					if err != nil {
						return err
					}
					header := http.Header{"If-Match": {was.ETag}, "Content-Type": {"application/json"}}
					err = next().service.call(ctx, http.MethodPut, "/enrollments/one", nil, header, bytes.NewReader(b), nil)
					switch {
					case err == nil:
						won.Add(1)
					case code(err) == dps.CodeETagMismatch:
						late.Add(1)
					default:
						return err
					}
					return nil
				})
			}
			if err := eg.Wait(); err != nil || won.Load() != 1 || late.Load() != 8 {
				t.Fatalf("round %d: %d replaced it, %d were late; %v", round, won.Load(), late.Load(), err)
			}
			if err := next().service.call(ctx, http.MethodDelete, "/enrollments/one", nil, nil, nil, nil); err != nil {
				t.Fatal(err)
			}
		}
	})
	t.Run("TLS sessions", func(t *testing.T) {
		cfg := &tls.Config{RootCAs: replicas[0].service.cfg.Roots, ServerName: "127.0.0.1", ClientSessionCache: tls.NewLRUClientSessionCache(1)}
		for i := range 4 {
			c, err := tls.Dial("tcp", replicas[i%3].ready["https"].(string), cfg)
			if err != nil {
				t.Fatal(err)
			}
			// A ticket comes with the first answer.
			if _, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, c)
			if resumed := c.ConnectionState().DidResume; resumed != (i > 0) {
				t.Errorf("connection %d, at replica %d: resumed %v", i, i%3, resumed)
			}
			_ = c.Close()
		}
	})
	t.Run("another data key", func(t *testing.T) {
		if code, text := attempt(t, dir, "serve", "--data", "stranger", "--https", "127.0.0.1:0", "--store", dsn); code == 0 || !strings.Contains(text, "wrapped under another key") || !strings.Contains(text, "data-key-file") {
			t.Errorf("%d: %s", code, text)
		}
		if exists(filepath.Join(dir, "stranger", dataKeyFile)) {
			t.Error("a data key was left that opens nothing")
		}
	})
	t.Run("password in the arguments", func(t *testing.T) {
		if code, text := attempt(t, dir, "serve", "--data", "stranger", "--store", "postgres://u:hunter2@127.0.0.1/db"); code != exitUsage || strings.Contains(text, "hunter2") {
			t.Errorf("%d: %s", code, text)
		}
	})
	t.Run("backup", func(t *testing.T) {
		if code, text := attempt(t, dir, "backup", "--data", "replica-0", "--store", dsn, "--out", "b"); code != exitUsage || !strings.Contains(text, "pg_dump") {
			t.Errorf("%d: %s", code, text)
		}
	})
	// The data key is changed beside them: they go on, and read what is under the new one.
	if code, text := attempt(t, dir, "store", "rotate-key", "--data", "replica-0", "--store-file", "address", "--data-key-file", "shared.key", "--json"); code != 0 || !strings.Contains(text, `"id":2`) {
		t.Errorf("rotate-key: %d, %s", code, text)
	}
	for _, r := range replicas {
		var a dps.Attestation
		if err := r.service.call(ctx, http.MethodPost, "/enrollmentGroups/line/attestationmechanism", nil, nil, nil, &a); err != nil || a.SymmetricKey == nil || a.SymmetricKey.PrimaryKey != text(groupKey) {
			t.Errorf("%s: %+v, %v", r.name, a, err)
		}
	}

	// One is killed while devices are connected to it by every protocol, some of which were just told their operation: they connect
	// again, as devices do, and meet another one. Who met another one before notices nothing.
	const callers = 60
	answered, killed := make(chan struct{}, callers), make(chan struct{})
	var cut atomic.Int64
	comeIn := func(id, protocol string) error {
		door := protocol
		if strings.HasSuffix(protocol, "-ws") {
			door = "https"
		}
		var once sync.Once
		st, err := device.Register(ctx, device.Config{
			Stamp:    device.Stamp{IDScope: scope, RegistrationID: id, Symmetric: true, SymmetricKey: attest.DeriveKey(groupKey, id)},
			Protocol: protocol, Endpoint: replicas[0].ready["https"].(string), RootCAs: replicas[0].service.cfg.Roots,
			Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, next().ready[door].(string))
			},
			Observe: func(s device.Step) {
				if s.Err != nil {
					cut.Add(1)
				} else if s.Name == "register" {
					once.Do(func() {
						answered <- struct{}{}
						<-killed
					})
				}
			},
		})
		if err != nil || st.Status != dps.Assigned {
			return fmt.Errorf("by %s: %+v, %w", protocol, st, err)
		}
		return kept(id, st.AssignedHub)
	}
	eg = errgroup.Group{}
	for i := range callers {
		eg.Go(func() error { return comeIn(fmt.Sprintf("any-%03d", i), device.Protocols()[i%len(device.Protocols())]) })
	}
	for range callers / 2 {
		select {
		case <-answered:
		case <-time.After(time.Minute):
			t.Fatal("devices get no answers")
		}
	}
	if err := replicas[2].cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = replicas[2].cmd.Wait()
	mu.Lock()
	living = replicas[:2]
	mu.Unlock()
	close(killed)
	if err := eg.Wait(); err != nil || cut.Load() == 0 {
		t.Errorf("%d were cut off: %v", cut.Load(), err)
	}
	crowd("dev", 60)
	crowd("late", 30)

	// What one deletes is gone for the others at once; a device may hear of the operation that it began for ten seconds more.
	if err := replicas[0].service.call(ctx, http.MethodDelete, "/registrations/dev-001", nil, nil, nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := replicas[1].service.call(ctx, http.MethodGet, "/registrations/dev-001", nil, nil, nil, nil); code(err) != dps.CodeNoGroup {
		t.Errorf("deleted at another replica: %v", err)
	}
	if err := replicas[1].service.call(ctx, http.MethodDelete, "/enrollmentGroups/line", nil, nil, nil, nil); err != nil {
		t.Fatal(err)
	}
	for _, r := range living {
		if status, answer, err := r.device(http.MethodPut, "dev-002/register", token("dev-002"), map[string]string{"registrationId": "dev-002"}); err != nil || status != http.StatusUnauthorized {
			t.Errorf("%s, after its group was deleted: %d %v %v", r.name, status, answer, err)
		}
	}
	for _, r := range replicas {
		if strings.Contains(r.log.String(), "level=ERROR") {
			t.Errorf("%s logged errors", r.name)
		}
	}
}
