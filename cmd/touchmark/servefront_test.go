package main

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// startServe runs a service on dir/svc until the test ends, or until it is interrupted before.
func startServe(t *testing.T, dir string, args ...string) (cmd *exec.Cmd, ready map[string]any, log *syncBuffer) {
	t.Helper()
	cmd = exec.Command(program(t), append([]string{"serve", "--data", "svc", "--hub", "hub-a.example.net", "--id-scope", "0ne00112233", "--json"}, args...)...)
	cmd.Dir = dir
	log = &syncBuffer{}
	cmd.Stderr = log
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			stopServe(t, cmd)
		}
		if t.Failed() {
			t.Log(log.String())
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err == nil {
		err = json.Unmarshal([]byte(line), &ready)
	}
	if err != nil || ready["ready"] != true {
		t.Fatalf("serve did not start: %v\n%s", err, log.String())
	}
	return cmd, ready, log
}

func stopServe(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	_ = cmd.Process.Signal(os.Interrupt)
	if err := cmd.Wait(); err != nil {
		t.Errorf("serve: %v", err)
	}
}

// In FIPS 140-3 mode the program does its whole work: a line, every profile, an import, and devices of every attestation
// at both doors.
func TestFIPS(t *testing.T) {
	t.Setenv("GODEBUG", "fips140=on")
	t.Setenv("TOUCHMARK_PASSPHRASE", "words for a test")
	dir := t.TempDir()
	ready, _ := startService(t, dir, "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0")
	// The mode is on: a key exchange that it does not know is refused.
	pool := x509.NewCertPool()
	caPEM, err := os.ReadFile(filepath.Join(dir, "svc", "ca.pem"))
	if err != nil || !pool.AppendCertsFromPEM(caPEM) {
		t.Fatal(err)
	}
	for curve, ok := range map[tls.CurveID]bool{tls.X25519: false, tls.CurveP256: true, tls.X25519MLKEM768: true} {
		c, err := tls.Dial("tcp", ready["https"].(string), &tls.Config{RootCAs: pool, CurvePreferences: []tls.CurveID{curve}})
		if (err == nil) != ok {
			t.Errorf("%v: %v", curve, err)
		}
		if err == nil {
			_ = c.Close()
		}
	}
	mintAll(t, dir)
	for _, profile := range []string{"x509-group", "x509-individual", "symmetric-group", "symmetric-individual"} {
		for i, protocol := range []string{"https", "mqtt"} {
			stamp := filepath.Join(dir, "stamps", profile+"00000"+string(rune('0'+i)))
			if code, text := attempt(t, dir, "register", "--stamp", stamp, "--protocol", protocol, "--endpoint", ready[protocol].(string), "--ca", "svc/ca.pem"); code != 0 {
				t.Errorf("%s over %s: exit code %d\n%s", profile, protocol, code, text)
			}
		}
	}
}

// writePair writes a self-signed certificate for localhost and its key.
func writePair(t *testing.T, dir, name string, serial int64, public, private any) (flags []string, c *x509.Certificate) {
	t.Helper()
	c = &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, public, private)
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{name + ".pem": {Type: "CERTIFICATE", Bytes: der}, name + ".key": {Type: "PRIVATE KEY", Bytes: key}} {
		if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return []string{"--tls-cert", name + ".pem", "--tls-key", name + ".key"}, c
}

// Certificates of two kinds stand side by side, are changed at SIGHUP without dropping anybody, and a session survives its
// replica: the next one on the same store resumes it.
func TestServeTLS(t *testing.T) {
	dir := t.TempDir()
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	args, rsaCert := writePair(t, dir, "rsa", 1, rsaKey.Public(), rsaKey)
	more, ecCert := writePair(t, dir, "ec", 2, ecKey.Public(), ecKey)
	args = append(append(args, more...), "--https", "127.0.0.1:0", "--mqtt", "127.0.0.1:0", "--amqp", "127.0.0.1:0")
	cmd, ready, log := startServe(t, dir, args...)
	pool := x509.NewCertPool()
	pool.AddCert(rsaCert)
	pool.AddCert(ecCert)
	cache := tls.NewLRUClientSessionCache(4)
	// A request is made, so that the session's ticket has come.
	request := func(c net.Conn) {
		t.Helper()
		if _, err := c.Write([]byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 4096)); err != nil {
			t.Fatal(err)
		}
	}
	dial := func(edit func(*tls.Config)) *tls.Conn {
		t.Helper()
		cfg := &tls.Config{RootCAs: pool, ServerName: "localhost"}
		if edit != nil {
			edit(cfg)
		}
		c, err := tls.Dial("tcp", ready["https"].(string), cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	serial := func(c *tls.Conn) int64 { return c.ConnectionState().PeerCertificates[0].SerialNumber.Int64() }
	onlyRSA := func(c *tls.Config) {
		c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256}
	}
	before := dial(nil)
	if a, b := serial(before), serial(dial(onlyRSA)); a != 2 || b != 1 {
		t.Errorf("certificates %d and %d", a, b)
	}
	_, ecCert = writePair(t, dir, "ec", 3, ecKey.Public(), ecKey)
	pool.AddCert(ecCert)
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	for !strings.Contains(log.String(), "read anew") {
		time.Sleep(10 * time.Millisecond)
	}
	if n := serial(dial(nil)); n != 3 {
		t.Errorf("after SIGHUP: %d", n)
	}
	request(before)

	resume := func(c *tls.Config) { c.ClientSessionCache = cache }
	request(dial(resume))
	stopServe(t, cmd)
	_, ready, _ = startServe(t, dir, args...)
	if c := dial(resume); !c.ConnectionState().DidResume {
		t.Error("the session did not survive its replica")
	}
}

// Options that would be unsafe, or cannot be meant, are refused before anything is opened.
func TestServeFrontOptions(t *testing.T) {
	dir := t.TempDir()
	base := []string{"serve", "--data", "svc", "--https", "127.0.0.1:0", "--mqtt", "off"}
	for _, args := range [][]string{
		{"--trust-forwarded-client-cert"},
		{"--trust-forwarded-client-cert=envoy"},
		{"--trust-forwarded-client-cert", "--trusted-proxy", "127.0.0.1"},
		{"--trust-forwarded-client-cert=yes", "--tls-proxy", "127.0.0.1"},
		{"--tls-proxy", "localhost"},
		{"--tls-proxy", "0.0.0.0/0"},
		{"--trusted-proxy", "localhost"},
		{"--trusted-proxy", "0.0.0.0/0"},
		{"--trusted-proxy", "::/0"},
		{"--trusted-proxy", "10.0.0.1/8"},
		{"--trusted-proxy", "::ffff:10.0.0.0/104"},
		{"--trusted-proxy", "fe80::1%eth0"},
		{"--tls-cert", "a.pem"},
		{"--tls-key", "a.key"},
		{"--tls-cert", "a.pem", "--tls-key", "a.key"},
		{"--tls-ocsp", "a.ocsp"},
		{"--max-connections", "0"},
		{"--max-connections-per-address", "-1"},
	} {
		if code, text := attempt(t, dir, slices.Concat(base, args)...); code != 2 {
			t.Errorf("%v: exit code %d\n%s", args, code, text)
		}
	}
}
