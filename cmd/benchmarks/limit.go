package main

import (
	"bufio"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/url"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/limit"
	"github.com/touchmark/touchmark/pkg/mqtt"
	"github.com/touchmark/touchmark/pkg/mqttd"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/sqlstore"
)

var benchKey = []byte(strings.Repeat("k", 64))

// deviceToken is a SAS token of a device, signed by its own key or, wrongly, by the group's.
func deviceToken(scope, id string, right bool) string {
	key := benchKey
	if right {
		key = attest.DeriveKey(benchKey, id)
	}
	resource := url.QueryEscape(scope + "/registrations/" + id)
	expiry := fmt.Sprint(time.Now().Add(time.Hour).Unix())
	h := hmac.New(sha256.New, key)
	_, _ = io.WriteString(h, resource+"\n"+expiry)
	return "SharedAccessSignature sr=" + resource + "&sig=" + url.QueryEscape(base64.StdEncoding.EncodeToString(h.Sum(nil))) + "&se=" + expiry
}

func limitRequest(scope, id string, right bool) *registration.Request {
	return &registration.Request{IDScope: scope, RegistrationID: id, APIVersion: "2019-03-31", Proof: attest.Proof{Token: deviceToken(scope, id, right)},
		Protocol: "https", Remote: "192.0.2.1:1", Body: []byte(`{"registrationId":"` + id + `"}`)}
}

// putKeyGroup makes a symmetric-key group of benchKey.
func putKeyGroup(svc *registration.Service) {
	text := base64.StdEncoding.EncodeToString(benchKey)
	group := dps.EnrollmentGroup{EnrollmentGroupID: "group", Enrollment: dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationSymmetricKey,
		SymmetricKey: &dps.SymmetricKeyAttestation{PrimaryKey: text, SecondaryKey: text}}}}
	must(svc.PutEnrollment(context.Background(), registration.Actor{}, registration.Group, "group", must(json.Marshal(group)), ""))
}

// limits has room for a benchmark, which comes from one address and asks as fast as it can.
func limits(svc registration.Registrar) *limit.Limiter {
	return limit.New(limit.Config{Registrar: svc, Scopes: func(s string) bool { return true }, PerDevice: 1e9, PerAddress: 1e9, PerScope: 1e9})
}

// limit-overhead: registrations behind the limiter against the same without it, in the process; and what it adds to a
// request in time and memory. limit-refusal: the refusal of a proof that was refused before, against judging it.
func (b *bench) limitOverhead() {
	store, svc := newService(tempDir())
	defer store.Close()
	putKeyGroup(svc)
	n := 2000 * b.scale
	ids := make([]*registration.Request, n)
	for i := range ids {
		ids[i] = limitRequest(benchScope, fmt.Sprintf("dev-%07d", i), true)
	}
	ctx := context.Background()
	run := func(r registration.Registrar) float64 {
		var next atomic.Int64
		return rate(n, func() {
			req := ids[next.Add(1)-1]
			st := must(r.Register(ctx, req))
			if st = must(r.Status(ctx, req, st.OperationID)); st.Status != dps.Assigned {
				check(fmt.Errorf("%s is %s", req.RegistrationID, st.Status))
			}
		})
	}
	limited := limits(svc)
	b.compare("limit-overhead", "devices/s", func() float64 { return run(limited) }, func() float64 { return run(svc) })

	const m = 200_000
	cost := func(r registration.Registrar) (ns, allocs float64) {
		var before, after runtime.MemStats
		for range 2 { // the second time every device is known
			runtime.ReadMemStats(&before)
			start := time.Now()
			for i := range m {
				must(r.Register(ctx, ids[i%n]))
			}
			ns = float64(time.Since(start).Nanoseconds()) / m
			runtime.ReadMemStats(&after)
		}
		return ns, float64(after.Mallocs-before.Mallocs) / m
	}
	ns, allocs := cost(limits(nothing{}))
	bareNs, bareAllocs := cost(nothing{})
	b.report(result{"limit-overhead-time", ns - bareNs, 0, 0, "ns/request"})
	b.report(result{"limit-overhead-allocs", allocs - bareAllocs, 0, 0, "allocs/request"})

	wrong := limitRequest(benchScope, "dev-0000001", false)
	refuse := func(r registration.Registrar) float64 {
		return rate(n, func() {
			if _, err := r.Register(ctx, wrong); err == nil {
				check(fmt.Errorf("a wrong key was taken"))
			}
		})
	}
	b.compare("limit-refusal", "refusals/s", func() float64 { return refuse(limits(svc)) }, func() float64 { return refuse(svc) })
}

// nothing is a service that does nothing.
type nothing struct{ registration.Registrar }

var assigning = &dps.OperationStatus{OperationID: "5.x", Status: dps.Assigning}

func (nothing) Register(context.Context, *registration.Request) (*dps.OperationStatus, error) {
	return assigning, nil
}

// scopes is a service of several ID scopes on one store.
type scopes struct {
	registration.Registrar
	by map[string]*registration.Service
}

func (s scopes) Register(ctx context.Context, req *registration.Request) (*dps.OperationStatus, error) {
	return s.by[req.IDScope].Register(ctx, req)
}

// limit-fairness: how long registrations in scope B take, 400 a second, alone ("limit") and while scope A sends fifty
// times as many; and the same without a limiter, which may end in time-outs. There is no bare limit to it: a ratio of 1 would be a machine for each.
func (b *bench) limitFairness() {
	store := must(sqlstore.Open(context.Background(), sqlstore.Config{Path: filepath.Join(tempDir(), "service.db"), DataKey: make([]byte, 32)}))
	defer store.Close()
	all := scopes{by: make(map[string]*registration.Service)}
	for _, name := range []string{"a", "b"} {
		svc := registration.New(registration.Config{Store: store, Scope: name, Settings: registration.Settings{Hubs: registration.Records("hub-a.example.net")}})
		putKeyGroup(svc)
		all.by[name] = svc
	}
	seconds := max(1, b.scale/2)
	const perSecond, flood = 400, 50
	requests := func(scope string, n int) []*registration.Request {
		out := make([]*registration.Request, n)
		for i := range out {
			out[i] = limitRequest(scope, fmt.Sprintf("dev-%07d", i), true)
			out[i].Remote = fmt.Sprintf("198.51.%d.%d:1", i>>8&0xff, i&0xff)
		}
		return out
	}
	as, bs := requests("a", flood*perSecond*seconds), requests("b", perSecond*seconds)
	// send sends evenly, whatever becomes of what was sent before.
	send := func(r registration.Registrar, reqs []*registration.Request, took []time.Duration) {
		var wg sync.WaitGroup
		start, every := time.Now(), time.Duration(seconds)*time.Second/time.Duration(len(reqs))
		for i, req := range reqs {
			due := start.Add(time.Duration(i) * every)
			time.Sleep(time.Until(due))
			wg.Go(func() {
				st, err := r.Register(context.Background(), req)
				if took == nil {
					return
				}
				took[i] = time.Since(due)
				if _, limited := r.(*limit.Limiter); limited && (err != nil || strings.HasPrefix(st.OperationID, "4.")) {
					check(fmt.Errorf("scope B was put off or refused: %v", err))
				}
			})
		}
		wg.Wait()
	}
	measure := func(r registration.Registrar, flooded bool) (p50, p99 float64) {
		var wg sync.WaitGroup
		if flooded {
			wg.Go(func() { send(r, as, nil) })
		}
		took := make([]time.Duration, len(bs))
		send(r, bs, took)
		wg.Wait()
		slices.Sort(took)
		us := func(i int) float64 { return float64(took[i].Microseconds()) }
		return us(len(took) / 2), us(len(took) * 99 / 100)
	}
	newLimiter := func() registration.Registrar {
		return limit.New(limit.Config{Registrar: all, Scopes: func(string) bool { return true }})
	}
	alone50, alone99 := measure(newLimiter(), false)
	limited50, limited99 := measure(newLimiter(), true)
	b.report(result{"limit-fairness-p50", limited50, alone50, limited50 / alone50, "us"})
	b.report(result{"limit-fairness-p99", limited99, alone99, limited99 / alone99, "us"})
	bare50, bare99 := measure(all, true)
	b.report(result{"limit-fairness-p50-off", bare50, alone50, bare50 / alone50, "us"})
	b.report(result{"limit-fairness-p99-off", bare99, alone99, bare99 / alone99, "us"})
}

// refusal: devices with a wrong key, each attempt on a connection of its own, against devices that register. Whoever is
// refused must be the cheaper one.
func (b *bench) refusal(protocol string) {
	a := newAuthority()
	store, svc := newService(tempDir())
	defer store.Close()
	putKeyGroup(svc)
	server := a.issue("localhost", x509.ExtKeyUsageServerAuth)
	certificate := func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &server, nil }
	ctx, stop := context.WithCancel(context.Background())
	var doors sync.WaitGroup
	defer doors.Wait()
	defer stop()
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	exchange := httpsByKey
	if protocol == "https" {
		front := httpd.New(httpd.Config{Registrar: limits(svc), Door: door.New(door.Config{TLS: door.TLSConfig(certificate, "http/1.1")})})
		doors.Go(func() { check(front.Serve(ctx, l)) })
	} else {
		exchange = mqttByKey
		handle := mqttd.New(mqttd.Config{Registrar: limits(svc), ResponseDelay: -1}).Handle
		doors.Go(func() { check(door.New(door.Config{TLS: door.TLSConfig(certificate)}).Serve(ctx, l, handle)) })
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	run := func(right bool) func() float64 {
		return func() float64 {
			return clients(400*b.scale, func(i int) {
				c := must(tls.Dial("tcp", l.Addr().String(), &tls.Config{RootCAs: roots, ServerName: "localhost"}))
				exchange(c, fmt.Sprintf("dev-%07d", i), right)
				_ = c.Close()
			})
		}
	}
	b.compare("refusal-"+protocol, "attempts/s", run(false), run(true))
}

func httpsByKey(c *tls.Conn, id string, right bool) {
	r := bufio.NewReader(c)
	token, body, want := deviceToken(benchScope, id, right), `{"registrationId":"`+id+`"}`, "401"
	if right {
		want = "202"
	}
	must(fmt.Fprintf(c, "PUT /%s/registrations/%s/register?api-version=2019-03-31 HTTP/1.1\r\nHost: localhost\r\nAuthorization: %s\r\nContent-Length: %d\r\n\r\n%s", benchScope, id, token, len(body), body))
	answer := readHTTP(r, want)
	if !right {
		return
	}
	var st dps.OperationStatus
	check(json.Unmarshal(answer, &st))
	must(fmt.Fprintf(c, "GET /%s/registrations/%s/operations/%s?api-version=2019-03-31 HTTP/1.1\r\nHost: localhost\r\nAuthorization: %s\r\n\r\n", benchScope, id, st.OperationID, token))
	readHTTP(r, "200")
}

func mqttByKey(c *tls.Conn, id string, right bool) {
	r := bufio.NewReader(c)
	out := mqtt.AppendConnect(nil, id, benchScope+"/registrations/"+id+"/api-version=2019-03-31", []byte(deviceToken(benchScope, id, right)), 0)
	out = mqtt.AppendSubscribe(out, 1, "$dps/registrations/res/#", 1)
	out = mqtt.AppendPublish(out, "$dps/registrations/PUT/iotdps-register/?$rid=1", 1, 2, []byte(`{"registrationId":"`+id+`"}`))
	must(c.Write(out))
	read := func(want string) *mqtt.Packet {
		for {
			if p := must(mqtt.Read(r, 1<<16)); p.Type == mqtt.Publish {
				if !strings.HasPrefix(p.Topic, "$dps/registrations/res/"+want) {
					check(fmt.Errorf("answer %s", p.Topic))
				}
				return p
			}
		}
	}
	if !right {
		read("401")
		return
	}
	var st dps.OperationStatus
	p := read("202")
	check(json.Unmarshal(p.Payload, &st))
	must(c.Write(mqtt.AppendPublish(mqtt.AppendPuback(nil, p.ID), "$dps/registrations/GET/iotdps-get-operationstatus/?$rid=2&operationId="+st.OperationID, 1, 3, []byte(" "))))
	read("200")
}
