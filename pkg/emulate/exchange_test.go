package emulate_test

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/emulate"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// syncBuffer is written to by one goroutine and read by another.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// exchanges has a service's exchanges written down while do works with it, and returns them.
func exchanges(t testing.TB, b *bench, do func()) (string, []emulate.Exchange) {
	t.Helper()
	var out syncBuffer
	x := emulate.NewExchanges(&out, slog.New(slog.DiscardHandler))
	b.Registrar = emulate.New(emulate.Config{Registrar: b.Service, Faults: b.faults, Exchanges: x})
	do()
	x.Close(10 * time.Second)
	var all []emulate.Exchange
	d := json.NewDecoder(strings.NewReader(out.String()))
	d.DisallowUnknownFields()
	for {
		var e emulate.Exchange
		err := d.Decode(&e)
		if errors.Is(err, io.EOF) {
			return out.String(), all
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, out.String())
		}
		all = append(all, e)
	}
}

func TestExchanges(t *testing.T) {
	b := newBench(t, nil, "op=status,nth=1,code=429,retry-after=9", "op=lookup,drop")
	_, all := exchanges(t, b, func() {
		req := b.request("dev-1", "https")
		req.Body, req.Remote, req.ClientVersion = []byte(`{"registrationId":"dev-1","payload":{"model":"x"}}`), "192.0.2.1:5", "sdk/1.2"
		st, err := b.Register(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			_, _ = b.Status(t.Context(), req, st.OperationID)
		}
		_, _ = b.Lookup(t.Context(), req)
		_, _ = b.Challenge(t.Context(), &registration.Request{IDScope: registrationtest.Scope, RegistrationID: "t", Protocol: "amqp", Proof: attest.Proof{TPM: &attest.TPMKeys{EK: []byte("e"), SRK: []byte("s")}}})
	})
	if len(all) != 5 {
		t.Fatalf("%d exchanges", len(all))
	}
	first := all[0]
	if first.Operation != "register" || first.Protocol != "https" || first.Remote != "192.0.2.1:5" || first.ClientVersion != "sdk/1.2" || first.APIVersion == "" || first.IDScope != registrationtest.Scope ||
		first.RegistrationID != "dev-1" || string(first.Body) != `{"payload":{"model":"x"},"registrationId":"dev-1"}` || first.BodyOctets == 0 || first.Answer.Status != 202 || first.Answer.RetryAfter != "3" ||
		first.Proof.Token == nil || first.Proof.Token.Resource == "" || first.Proof.Token.Expires.IsZero() || first.Microseconds <= 0 || first.Time.IsZero() || first.Faults != nil {
		t.Errorf("%+v", first)
	}
	if x := all[1]; x.Operation != "status" || x.OperationID == "" || x.Answer.Status != 429 || x.Answer.RetryAfter != "9" || len(x.Faults) != 1 || x.Faults[0] != "op=status,nth=1,code=429,retry-after=9" {
		t.Errorf("%+v", x)
	}
	if x := all[2]; x.Answer.Status != 200 || x.Answer.RetryAfter != "" || !bytes.Contains(x.Answer.Body, []byte(`"assignedHub":"`+hub+`"`)) || !bytes.Contains(x.Answer.Body, []byte(`"enrollmentGroupId":"keys"`)) {
		t.Errorf("%s", x.Answer.Body)
	}
	if x := all[3]; x.Operation != "lookup" || !x.Answer.HungUp || x.Answer.Status != 0 || len(x.Faults) != 1 {
		t.Errorf("%+v", x)
	}
	if x := all[4]; x.Operation != "challenge" || x.Proof.TPM == nil || len(x.Proof.TPM.EK) != 64 || x.Answer.Status != 401 || x.Answer.Body == nil {
		t.Errorf("%+v", x)
	}
}

// No secret of the fixture's, of a device's or of the service's is ever in a line: keys, tokens' signatures, what devices send
// where they should not; raw, in base64, in hex.
func TestExchangesHoldNoSecrets(t *testing.T) {
	b := newBench(t, nil)
	var secrets [][]byte
	secret := func(s []byte) { secrets = append(secrets, s) }
	secret(b.GroupKey)
	secret(b.OwnKey)
	secret(b.OtherKey)
	loose := []byte("a secret that a device gives away")
	secret(loose)
	text, all := exchanges(t, b, func() {
		for _, id := range []string{"dev-1", "dev-2"} {
			secret(attest.DeriveKey(b.GroupKey, id))
			req := b.request(id, "mqtt")
			token := req.Proof.Token
			_, sig, _ := strings.Cut(token, "sig=")
			sig, _, _ = strings.Cut(sig, "&")
			secret([]byte(sig))
			enc := base64.StdEncoding.EncodeToString(loose)
			for _, body := range []string{
				`{"payload":{"primaryKey":"` + enc + `","nested":[{"sas_token":"` + enc + `","password":["` + enc + `"],"apiKey":{"value":"` + enc + `"},"secret":{"keyName":"` + enc + `","endorsementKey":"` + enc + `"}}]}}`,
				`{"payload":"` + token + `"}`,
				`{"payload":"HostName=h;SharedAccessKeyName=n;SharedAccessKey=` + enc + `"}`,
				`{"payload":"-----BEGIN PRIVATE KEY-----` + enc + `"}`,
				`{"payload":{"` + token + `":1,"pin":` + "123456" + `}}`,
				`{"payload":"` + enc, // no JSON
				`{"tpm":{"endorsementKey":"AAAA","storageRootKey":"BBBB","authenticationKey":"` + enc + `"}}`,
			} {
				req.Body = []byte(body)
				_, _ = b.Register(t.Context(), req)
			}
			// Fields that a device fills with what belongs elsewhere.
			for _, edit := range []func(*registration.Request){
				func(r *registration.Request) { r.RegistrationID = token },
				func(r *registration.Request) { r.IDScope = token },
				func(r *registration.Request) { r.ClientVersion = "x " + token },
				func(r *registration.Request) { r.APIVersion = token },
				func(r *registration.Request) { r.Proof.Token = "garbage " + token },
				func(r *registration.Request) { r.Proof.Token = enc },
			} {
				r := *b.request(id, "https")
				edit(&r)
				st, err := b.Register(t.Context(), &r)
				if err == nil {
					_, _ = b.Status(t.Context(), &r, st.OperationID)
				}
				_, _ = b.Status(t.Context(), &r, token)
				_, _ = b.Lookup(t.Context(), &r)
			}
		}
	})
	if len(all) < 50 {
		t.Errorf("%d exchanges", len(all))
	}
	for _, s := range secrets {
		for _, spelling := range []string{string(s), base64.StdEncoding.EncodeToString(s), base64.RawStdEncoding.EncodeToString(s), base64.URLEncoding.EncodeToString(s), hex.EncodeToString(s)} {
			if i := strings.Index(text, spelling); i >= 0 {
				t.Errorf("%q is in %s", s, text[strings.LastIndexByte(text[:i], '\n')+1:i+len(spelling)])
			}
		}
	}
	if strings.Contains(text, "123456") || !strings.Contains(text, `"endorsementKey":"AAAA"`) {
		t.Error("a PIN is in it, or a public key is not")
	}
}

// Lines are bounded whatever a device sends.
func TestExchangesAreBounded(t *testing.T) {
	b := newBench(t, nil)
	long := strings.Repeat("ä<", 200_000)
	text, all := exchanges(t, b, func() {
		_, _ = b.Register(t.Context(), &registration.Request{IDScope: long, RegistrationID: long, APIVersion: long, ClientVersion: long, Proof: attest.Proof{Token: long}, Body: []byte(`{"payload":"` + long + `"}`)})
		_, _ = b.Status(t.Context(), &registration.Request{IDScope: "\x00\xff\"\\", Body: bytes.Repeat([]byte("["), 60_000)}, long)
	})
	if len(all) != 2 {
		t.Fatalf("%d exchanges", len(all))
	}
	for line := range strings.Lines(text) {
		if len(line) > 16<<10 {
			t.Errorf("a line of %d octets", len(line))
		}
	}
	if all[0].BodyOctets < 400_000 || all[0].Body != nil {
		t.Errorf("%+v", all[0])
	}
}

// brittle fails, stalls or works as it is told.
type brittle struct {
	syncBuffer
	mu    sync.Mutex
	err   error
	short int // how much is written before the error
	stall chan struct{}
}

func (w *brittle) Write(p []byte) (int, error) {
	w.mu.Lock()
	err, short, stall := w.err, w.short, w.stall
	w.mu.Unlock()
	if stall != nil {
		<-stall
	}
	if err != nil {
		n, _ := w.syncBuffer.Write(p[:min(short, len(p))])
		return n, err
	}
	return w.syncBuffer.Write(p)
}

func (w *brittle) set(err error, short int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err, w.short = err, short
}

// A writer that fails costs lines and is told of once; the lines that follow are whole, and the next says how many are missing.
func TestExchangesSurviveTheirWriter(t *testing.T) {
	b := newBench(t, nil)
	var log syncBuffer
	w := &brittle{}
	x := emulate.NewExchanges(w, slog.New(slog.NewTextHandler(&log, nil)))
	r := emulate.New(emulate.Config{Registrar: b.Service, Exchanges: x})
	wait := func(what string, ok func() bool) {
		t.Helper()
		for begin := time.Now(); !ok(); time.Sleep(time.Millisecond) {
			if time.Since(begin) > 10*time.Second {
				t.Fatalf("%s\n%s\n%s", what, w.String(), log.String())
			}
		}
	}
	register := func(id string) {
		if _, err := r.Register(t.Context(), b.request(id, "https")); err != nil {
			t.Fatal(err)
		}
	}
	register("dev-1")
	wait("the first line", func() bool { return strings.Contains(w.String(), "dev-1") })
	w.set(errors.New("no space left on device"), 40)
	register("dev-2")
	wait("the warning", func() bool { return strings.Contains(log.String(), "no space left") })
	w.set(errors.New("no space left on device"), 0)
	register("dev-3")
	register("dev-4")
	wait("nothing", func() bool { return strings.Count(log.String(), "no space left") == 1 })
	x.Close(0) // what waits is written still: the goroutine ends by itself
	w.set(nil, 0)

	// Once more, with a writer that comes to itself.
	w, log = &brittle{}, syncBuffer{}
	x = emulate.NewExchanges(w, slog.New(slog.NewTextHandler(&log, nil)))
	r = emulate.New(emulate.Config{Registrar: b.Service, Exchanges: x})
	w.set(io.ErrShortWrite, 7)
	register("dev-5")
	wait("the warning", func() bool { return strings.Contains(log.String(), "short write") })
	w.set(nil, 0)
	register("dev-6")
	x.Close(10 * time.Second)
	var lines []string
	for s := bufio.NewScanner(strings.NewReader(w.String())); s.Scan(); {
		lines = append(lines, s.Text())
	}
	if len(lines) != 3 || len(lines[0]) != 7 || lines[1] != `{"lost":1}` || !json.Valid([]byte(lines[2])) || !strings.Contains(lines[2], "dev-6") {
		t.Errorf("%q", lines)
	}
}

// A writer that takes nothing holds nobody up, and closing does not wait for it.
func TestExchangesDoNotWait(t *testing.T) {
	b := newBench(t, nil)
	var log syncBuffer
	w := &brittle{stall: make(chan struct{})}
	x := emulate.NewExchanges(w, slog.New(slog.NewTextHandler(&log, nil)))
	r := emulate.New(emulate.Config{Registrar: b.Service, Exchanges: x})
	for i := range 5000 { // more than wait
		_, _ = r.Challenge(t.Context(), &registration.Request{RegistrationID: fmt.Sprint("dev-", i)})
	}
	if n := strings.Count(log.String(), "exchanges are being lost"); n != 1 {
		t.Errorf("told %d times: %s", n, log.String())
	}
	x.Close(time.Millisecond)
	_, _ = r.Challenge(t.Context(), &registration.Request{RegistrationID: "late"})
	close(w.stall)
}

// The disk that is always full.
func TestExchangesOnAFullDisk(t *testing.T) {
	f, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := newBench(t, nil)
	var log syncBuffer
	x := emulate.NewExchanges(f, slog.New(slog.NewTextHandler(&log, nil)))
	r := emulate.New(emulate.Config{Registrar: b.Service, Exchanges: x})
	for range 20 {
		if _, err := r.Register(t.Context(), b.request("dev-1", "https")); err != nil {
			t.Fatal(err)
		}
	}
	x.Close(10 * time.Second)
	if n := strings.Count(log.String(), "no space left on device"); n != 1 {
		t.Errorf("told %d times: %s", n, log.String())
	}
}

// Whatever a device sends makes one line of JSON, bounded, without its token.
func FuzzExchange(f *testing.F) {
	b := newBench(f, nil)
	f.Add("dev-1", "SharedAccessSignature sr=x&sig=AAAA&se=1", []byte(`{"payload":{"key":"v"}}`))
	f.Add("\xff\u2028", "", []byte(`{"a":{"a":[1e999,null,"\ud800"]}}`))
	f.Fuzz(func(t *testing.T, id, token string, body []byte) {
		text, all := exchanges(t, b, func() {
			_, _ = b.Register(t.Context(), &registration.Request{IDScope: registrationtest.Scope, RegistrationID: id, ClientVersion: id, APIVersion: id, Proof: attest.Proof{Token: token}, Body: body})
		})
		if len(all) != 1 || strings.Count(text, "\n") != 1 || len(text) > 32<<10 {
			t.Fatalf("%q", text)
		}
	})
}
