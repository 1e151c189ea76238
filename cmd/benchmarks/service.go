package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/touchmark/touchmark/pkg/amqpd"
	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/mqtt"
	"github.com/touchmark/touchmark/pkg/mqttd"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/sqlstore"
)

const benchScope = "0ne00112233"

// authority signs certificates for the benchmark's devices and its server.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority() *authority {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench CA"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	return &authority{key, must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, t, t, key.Public(), key))))}
}

func (a *authority) issue(cn string, usage x509.ExtKeyUsage) tls.Certificate {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	t := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: cn}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage}, DNSNames: []string{"localhost"}}
	der := must(x509.CreateCertificate(rand.Reader, t, a.cert, key.Public(), a.key))
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func newService(dir string) (*sqlstore.Store, *registration.Service) {
	store := must(sqlstore.Open(context.Background(), sqlstore.Config{Path: filepath.Join(dir, "service.db"), DataKey: make([]byte, 32)}))
	return store, registration.New(registration.Config{Store: store, Scope: benchScope, Settings: registration.Settings{Hubs: registration.Records("hub-a.example.net")}})
}

// register: devices of an X.509 group, each on a connection of its own: mutual TLS, register, one status; against mutual
// TLS and as many echoes of as many octets, by the same clients.
//
// By key: devices of a symmetric-key group, with tokens that are made beforehand; the limit is TLS that shows a certificate on
// the server's side alone.
func (b *bench) register(protocol string, byKey bool) {
	dir := tempDir()
	a := newAuthority()
	store, svc := newService(dir)
	defer store.Close()
	group := dps.EnrollmentGroup{EnrollmentGroupID: "group", Enrollment: dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{
		SigningCertificates: &dps.X509Certificates{Primary: &dps.X509Certificate{Certificate: base64.StdEncoding.EncodeToString(a.cert.Raw)}}}}}}
	groupKey := bytes.Repeat([]byte("k"), 64)
	name := "register-" + protocol
	if byKey {
		name += "-key"
		group.Attestation = &dps.Attestation{Type: dps.AttestationSymmetricKey, SymmetricKey: &dps.SymmetricKeyAttestation{
			PrimaryKey: base64.StdEncoding.EncodeToString(groupKey), SecondaryKey: base64.StdEncoding.EncodeToString(groupKey[1:])}}
	}
	must(svc.PutEnrollment(context.Background(), registration.Actor{}, registration.Group, "group", must(json.Marshal(group)), ""))
	server := a.issue("localhost", x509.ExtKeyUsageServerAuth)
	certificate := func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &server, nil }
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var doors sync.WaitGroup
	defer doors.Wait()
	defer stop()
	ours, echo := must(net.Listen("tcp", "127.0.0.1:0")), must(net.Listen("tcp", "127.0.0.1:0"))
	// All devices have this machine's address.
	dc := door.Config{TLS: door.TLSConfig(certificate), MaxPerAddress: 1 << 20}
	exchange, limit, echoes := httpsExchange, 560, 2
	switch protocol {
	case "https":
		dc.TLS.NextProtos = []string{"http/1.1"}
		front := httpd.New(httpd.Config{Registrar: svc, Door: door.New(dc)})
		doors.Go(func() { check(front.Serve(ctx, ours)) })
	case "amqp":
		exchange, limit, echoes = amqpExchange, 420, 3
		handle := amqpd.New(amqpd.Config{Registrar: svc, ResponseDelay: -1}).Handle
		doors.Go(func() { check(door.New(dc).Serve(ctx, ours, handle)) })
	default:
		exchange, limit = mqttExchange, 420
		// Without the pause before each response, which one SDK needs: it is time and not work.
		handle := mqttd.New(mqttd.Config{Registrar: svc, ResponseDelay: -1}).Handle
		doors.Go(func() { check(door.New(dc).Serve(ctx, ours, handle)) })
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	// Mutual TLS as anybody else would have it: the handshake verifies the chain, which the service does behind it.
	mutual := door.TLSConfig(certificate)
	mutual.ClientAuth, mutual.ClientCAs = tls.RequireAndVerifyClientCert, roots
	if byKey {
		mutual.ClientAuth = tls.NoClientCert
	}
	doors.Go(func() { serveEcho(ctx, tls.NewListener(echo, mutual), limit) })

	n := 400 * b.scale
	devices := make([]tls.Certificate, n)
	var made atomic.Int64
	rate(n, func() {
		i := made.Add(1) - 1
		devices[i] = a.issue(fmt.Sprintf("dev-%07d", i), x509.ExtKeyUsageClientAuth)
	})
	dial := func(address string, i int) *tls.Conn {
		cfg := &tls.Config{RootCAs: roots, ServerName: "localhost"}
		if !byKey {
			cfg.Certificates = devices[i : i+1]
		}
		return must(tls.Dial("tcp", address, cfg))
	}
	tokens := make([]string, n)
	if byKey {
		for i := range tokens {
			id := fmt.Sprintf("dev-%07d", i)
			tokens[i] = attesttest.Token(attest.DeriveKey(groupKey, id), benchScope, id, time.Now().Add(time.Hour))
			if protocol == "https" {
				tokens[i] = "Authorization: " + tokens[i] + "\r\n"
			}
		}
	}
	token := func(i int) string { return tokens[i] }
	b.compare(name, "devices/s", func() float64 {
		return clients(n, func(i int) {
			c := dial(ours.Addr().String(), i)
			exchange(c, fmt.Sprintf("dev-%07d", i), token(i))
			_ = c.Close()
		})
	}, func() float64 {
		message := bytes.Repeat([]byte("x"), limit)
		return clients(n, func(i int) {
			c := dial(echo.Addr().String(), i)
			for range echoes {
				must(c.Write(message))
				must(io.ReadFull(c, message))
			}
			_ = c.Close()
		})
	})
}

// clients runs f for n devices, sixteen at a time per core.
func clients(n int, f func(int)) float64 {
	var next atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	for range 16 * runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				f(int(i))
			}
		})
	}
	wg.Wait()
	return float64(n) / time.Since(start).Seconds()
}

func serveEcho(ctx context.Context, l net.Listener, size int) {
	context.AfterFunc(ctx, func() { _ = l.Close() })
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			buf := make([]byte, size)
			for {
				if _, err := io.ReadFull(c, buf); err != nil {
					return
				}
				if _, err := c.Write(buf); err != nil {
					return
				}
			}
		}()
	}
}

// httpsExchange registers and asks once, in hand-written HTTP, so that it is the server that is measured.
func httpsExchange(c *tls.Conn, id, token string) {
	r := bufio.NewReader(c)
	body := `{"registrationId":"` + id + `"}`
	must(fmt.Fprintf(c, "PUT /%s/registrations/%s/register?api-version=2019-03-31 HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%sContent-Length: %d\r\n\r\n%s", benchScope, id, token, len(body), body))
	var st dps.OperationStatus
	check(json.Unmarshal(readHTTP(r, "202"), &st))
	must(fmt.Fprintf(c, "GET /%s/registrations/%s/operations/%s?api-version=2019-03-31 HTTP/1.1\r\nHost: localhost\r\n%s\r\n", benchScope, id, st.OperationID, token))
	check(json.Unmarshal(readHTTP(r, "200"), &st))
	if st.Status != dps.Assigned {
		check(fmt.Errorf("%s is %s", id, st.Status))
	}
}

func readHTTP(r *bufio.Reader, status string) []byte {
	line := must(r.ReadString('\n'))
	if len(line) < 12 || line[9:12] != status {
		check(fmt.Errorf("answer %q", line))
	}
	size := 0
	for {
		line = must(r.ReadString('\n'))
		if line == "\r\n" {
			break
		}
		if len(line) > 16 && line[:16] == "Content-Length: " {
			size = must(strconv.Atoi(line[16 : len(line)-2]))
		}
	}
	b := make([]byte, size)
	must(io.ReadFull(r, b))
	return b
}

// mqttExchange is the conversation of device API, section 11.6, its packets sent as early as a device may.
func mqttExchange(c *tls.Conn, id, token string) {
	r := bufio.NewReader(c)
	out := mqtt.AppendConnect(nil, id, benchScope+"/registrations/"+id+"/api-version=2019-03-31", []byte(token), 0)
	out = mqtt.AppendSubscribe(out, 1, "$dps/registrations/res/#", 1)
	out = mqtt.AppendPublish(out, "$dps/registrations/PUT/iotdps-register/?$rid=1", 1, 2, []byte(`{"registrationId":"`+id+`"}`))
	must(c.Write(out))
	read := func() *mqtt.Packet {
		for {
			p := must(mqtt.Read(r, 1<<16))
			if p.Type == mqtt.Publish {
				return p
			}
		}
	}
	var st dps.OperationStatus
	p := read()
	check(json.Unmarshal(p.Payload, &st))
	must(c.Write(mqtt.AppendPublish(mqtt.AppendPuback(nil, p.ID), "$dps/registrations/GET/iotdps-get-operationstatus/?$rid=2&operationId="+st.OperationID, 1, 3, []byte(" "))))
	check(json.Unmarshal(read().Payload, &st))
	if st.Status != dps.Assigned {
		check(fmt.Errorf("%s is %s", id, st.Status))
	}
}

const importChild = "import-child"

// import: a bundle of individual X.509 entries into a fresh service, in a process of its own, whose peak memory is
// reported. There is no bare limit to it: "limit" is what it may take.
func (b *bench) importBundle() {
	dir := tempDir()
	a := newAuthority()
	n := 10000 * b.scale
	w := must(bundle.NewWriter(bundle.WriterConfig{Path: filepath.Join(dir, "b.tmb"), IDScope: benchScope, Created: time.Now(), Signer: a.key}))
	var mu sync.Mutex
	i := 0
	rate(n, func() {
		mu.Lock()
		id := fmt.Sprintf("dev-%07d", i)
		i++
		mu.Unlock()
		cert := a.issue(id, x509.ExtKeyUsageClientAuth)
		e := &bundle.Entry{Serial: id, Individual: &dps.IndividualEnrollment{RegistrationID: id, Enrollment: dps.Enrollment{
			Attestation: &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{ClientCertificates: &dps.X509Certificates{
				Primary: &dps.X509Certificate{Certificate: base64.StdEncoding.EncodeToString(cert.Certificate[0])}}}}}}}
		mu.Lock()
		defer mu.Unlock()
		check(w.Add(e))
	})
	must(w.Close())
	pub := must(x509.MarshalPKIXPublicKey(a.key.Public()))
	check(os.WriteFile(filepath.Join(dir, "station.der"), pub, 0o600))
	cmd := exec.Command(must(os.Executable()), importChild, dir)
	cmd.Stderr = os.Stderr
	out := must(cmd.Output())
	var r struct{ Seconds, MiB float64 }
	check(json.Unmarshal(out, &r))
	b.report(result{"import", float64(n) / r.Seconds, 0, 0, "rows/s"})
	b.report(result{"import-memory", r.MiB, 200, r.MiB / 200, "MiB peak"})
}

func runImportChild(dir string) error {
	store, svc := newService(dir)
	defer store.Close()
	pub := must(x509.ParsePKIXPublicKey(must(os.ReadFile(filepath.Join(dir, "station.der")))))
	start := time.Now()
	for pass := range 2 { // as the service does: verified to the end, then taken
		f := must(os.Open(filepath.Join(dir, "b.tmb")))
		cfg := bundle.OpenConfig{Trusted: []crypto.PublicKey{pub}}
		if pass == 0 {
			must(bundle.Verify(f, cfg))
		} else {
			r := must(bundle.Open(f, cfg))
			res := must(svc.Import(context.Background(), r.Entries(), registration.ImportConfig{Station: r.KeyID()}))
			if res.Conflicting != 0 || res.New == 0 {
				return fmt.Errorf("%+v", res)
			}
			r.Close()
		}
		check(f.Close())
	}
	seconds := time.Since(start).Seconds()
	return json.NewEncoder(os.Stdout).Encode(map[string]float64{"seconds": seconds, "mib": peakMiB()})
}

// peakMiB returns the most memory that this process ever had. getrusage would count what its parent had when it started
// it, too.
func peakMiB() float64 {
	for line := range strings.Lines(string(must(os.ReadFile("/proc/self/status")))) {
		if kib, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			return float64(must(strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(kib), "kB"))))) / 1024
		}
	}
	panic("no VmHWM in /proc/self/status")
}
