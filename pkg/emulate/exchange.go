package emulate

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"regexp"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// An Exchange is one request of a device and its answer: one line of JSON. Nothing in it is good for proving to be the device.
type Exchange struct {
	Time          time.Time `json:"time"`
	Protocol      string    `json:"protocol"`
	Remote        string    `json:"remote"`
	ClientVersion string    `json:"clientVersion,omitempty"`
	APIVersion    string    `json:"apiVersion,omitempty"`
	// Operation is "register", "status", "lookup" or "challenge".
	Operation      string `json:"operation"`
	IDScope        string `json:"idScope"`
	RegistrationID string `json:"registrationId"`
	OperationID    string `json:"operationId,omitempty"` // that a status request asks for
	Repeat         bool   `json:"repeat,omitempty"`      // the transport marked it as sent again
	Proof          Proof  `json:"proof"`
	// Body is what the device sent, with secrets redacted. BodyOctets is its length on the wire; with one and no Body it was
	// not JSON, or too long.
	Body       json.RawMessage `json:"body,omitempty"`
	BodyOctets int             `json:"bodyOctets,omitempty"`
	Answer     Answer          `json:"answer"`
	// Microseconds is what it took, delays included.
	Microseconds int64 `json:"microseconds"`
	// Faults are the texts of those that happened to it.
	Faults []string `json:"faults,omitempty"`
}

// A Proof says what a device proved itself with, or tried to.
type Proof struct {
	// Certificate is the leaf's; Intermediates counts what came with it.
	Certificate   *CertificateProof `json:"certificate,omitempty"`
	Intermediates int               `json:"intermediates,omitempty"`
	Token         *TokenProof       `json:"token,omitempty"`
	TPM           *TPMProof         `json:"tpm,omitempty"`
}

// A CertificateProof names a certificate. Its thumbprints are hex SHA-256.
type CertificateProof struct {
	Thumbprint string    `json:"thumbprint"`
	Subject    string    `json:"subject"`
	Issuer     string    `json:"issuer"`
	NotAfter   time.Time `json:"notAfter"`
}

// A TokenProof is a SAS token less its signature.
type TokenProof struct {
	Resource string    `json:"resource"`
	Expires  time.Time `json:"expires"`
	KeyName  string    `json:"keyName,omitempty"`
	// Malformed says why it could not be read, and then there is nothing else.
	Malformed string `json:"malformed,omitempty"`
}

// A TPMProof names a TPM's public keys by their hex SHA-256.
type TPMProof struct {
	EK  string `json:"ek"`
	SRK string `json:"srk"`
}

// An Answer is what the device was told.
type Answer struct {
	// Status is as in HTTP; 0 where the connection ended without an answer.
	Status     int    `json:"status"`
	RetryAfter string `json:"retryAfter,omitempty"`
	// Body is the document, with secrets redacted; absent where it is too long, and for a challenge.
	Body      json.RawMessage `json:"body,omitempty"`
	Challenge bool            `json:"challenge,omitempty"`
	HungUp    bool            `json:"hungUp,omitempty"`
}

// Bounds of a line: what a device may write into one, in octets.
const (
	maxWord = 256
	maxBody = 4 << 10
)

// waiting is how many lines wait for a slow writer; more are left out and counted.
const waiting = 4096

// Exchanges writes exchanges down, one line of JSON each, beside the service's work: a writer that is slow, full or gone
// costs lines and not answers. Where lines are missing, the next one says how many: {"lost":N}. Nil writes nothing.
type Exchanges struct {
	w     io.Writer
	log   *slog.Logger
	lines chan Exchange
	done  chan struct{}

	mu     sync.Mutex
	lost   int
	closed bool
	told   sync.Once
}

// NewExchanges returns where exchanges are written to w. Of the first line that is lost it tells the log, once.
func NewExchanges(w io.Writer, log *slog.Logger) *Exchanges {
	e := &Exchanges{w: w, log: log, lines: make(chan Exchange, waiting), done: make(chan struct{})}
	go e.run()
	return e
}

// Close writes what waits, for as long as the patience is, and returns. The writer is the caller's.
func (e *Exchanges) Close(patience time.Duration) {
	e.mu.Lock()
	if !e.closed {
		e.closed = true
		close(e.lines)
	}
	e.mu.Unlock()
	select {
	case <-e.done:
	case <-time.After(patience):
		e.lose("the writer takes nothing")
	}
}

func (e *Exchanges) run() {
	defer close(e.done)
	var line bytes.Buffer
	broken := false // the last line was cut off
	for x := range e.lines {
		line.Reset()
		if broken {
			line.WriteByte('\n')
		}
		e.mu.Lock()
		lost := e.lost
		e.mu.Unlock()
		enc := json.NewEncoder(&line)
		enc.SetEscapeHTML(false)
		if lost > 0 {
			_ = enc.Encode(struct {
				Lost int `json:"lost"`
			}{lost})
		}
		if err := enc.Encode(x); err != nil {
			e.lose(err.Error())
			continue
		}
		n, err := e.w.Write(line.Bytes())
		if err != nil {
			broken = broken && n == 0 || n > 0 && line.Bytes()[n-1] != '\n'
			e.lose(err.Error())
			continue
		}
		broken = false
		e.mu.Lock()
		e.lost -= lost
		e.mu.Unlock()
	}
}

func (e *Exchanges) lose(why string) {
	e.mu.Lock()
	e.lost++
	e.mu.Unlock()
	e.told.Do(func() {
		e.log.Warn("exchanges are being lost; the service goes on", "cause", why)
	})
}

// add writes an exchange down. It does not wait for the writer.
func (e *Exchanges) add(op string, req *registration.Request, operationID string, answer any, err error, begin time.Time, faults []string) {
	if e == nil {
		return
	}
	x := Exchange{
		Time: begin.UTC(), Protocol: req.Protocol, Remote: req.Remote, ClientVersion: word(req.ClientVersion), APIVersion: word(req.APIVersion),
		Operation: op, IDScope: word(req.IDScope), RegistrationID: word(req.RegistrationID), OperationID: word(operationID), Repeat: req.Repeat,
		Proof: proofOf(&req.Proof), Body: redact(req.Body), BodyOctets: len(req.Body), Microseconds: time.Since(begin).Microseconds(), Faults: faults,
	}
	var challenge *registration.Challenge
	switch {
	case errors.Is(err, registration.ErrHangUp):
		x.Answer.HungUp = true
	case errors.As(err, &challenge):
		x.Answer.Status, x.Answer.Challenge = 401, true
	case err == nil && op == opChallenge:
		x.Answer.Status, x.Answer.Challenge = 200, true
	default:
		p := dps.NewReply(answer, err)
		x.Answer = Answer{Status: p.Status, RetryAfter: p.RetryAfter, Body: redact(p.Body)}
	}
	if !e.queue(x) {
		e.lose("the writer is too slow")
	}
}

// queue hands a line to the writer, and reports whether there was room.
func (e *Exchanges) queue(x Exchange) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return true // the service has stopped
	}
	select {
	case e.lines <- x:
		return true
	default:
		return false
	}
}

func proofOf(p *attest.Proof) (out Proof) {
	if len(p.Certificates) > 0 {
		c := p.Certificates[0]
		sum := sha256.Sum256(c.Raw)
		out.Certificate = &CertificateProof{hex.EncodeToString(sum[:]), word(c.Subject.String()), word(c.Issuer.String()), c.NotAfter}
		out.Intermediates = len(p.Certificates) - 1
	}
	if p.Token != "" {
		if t, err := attest.ParseToken(p.Token); err != nil {
			out.Token = &TokenProof{Malformed: err.Error()}
		} else {
			out.Token = &TokenProof{Resource: word(t.Resource), Expires: t.Expiry.UTC(), KeyName: word(t.Policy)}
		}
	}
	if p.TPM != nil {
		ek, srk := sha256.Sum256(p.TPM.EK), sha256.Sum256(p.TPM.SRK)
		out.TPM = &TPMProof{hex.EncodeToString(ek[:]), hex.EncodeToString(srk[:])}
	}
	return out
}

const redacted = "[redacted]"

var (
	// secretText is what gives text away that holds a secret: SAS tokens, connection strings, private keys.
	secretText = regexp.MustCompile(`(?i)sharedaccess|private key|\bsig(nature)?=|AGE-SECRET-KEY`)
	// secretName is what the names of members that hold a secret are like.
	secretName = regexp.MustCompile(`(?i)key|secret|passw|passphrase|token|credential|signature|pin$|psk`)
	// publicNames look like those and hold none.
	publicNames = map[string]bool{"endorsementKey": true, "storageRootKey": true, "keyName": true}
)

// groupName is the one public member below a name that secrets have: symmetricKey.
const groupName = "enrollmentGroupId"

// word bounds text that comes from a device, and hides what looks like a secret in it.
func word(s string) string {
	if secretText.MatchString(s) {
		return redacted
	}
	if len(s) <= maxWord {
		return s
	}
	n := maxWord
	for !utf8.RuneStart(s[n]) && n > maxWord-utf8.UTFMax {
		n--
	}
	return s[:n] + "…"
}

// redact hides the secrets in a JSON document. What is no JSON, or too long, is left out.
func redact(b []byte) json.RawMessage {
	if len(b) == 0 || len(b) > registration.MaxBody {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var v any
	if d.Decode(&v) != nil || d.More() {
		return nil
	}
	out, err := dps.Marshal(hide(v, false))
	if err != nil || len(out) > maxBody {
		return nil
	}
	return out
}

// hide redacts a value; secret says that it stands under a name that secrets have.
func hide(v any, secret bool) any {
	switch v := v.(type) {
	case map[string]any:
		out := make(map[string]any, len(v))
		for name, member := range v {
			out[word(name)] = hide(member, name != groupName && (secret || secretName.MatchString(name) && !publicNames[name]))
		}
		return out
	case []any:
		for i := range v {
			v[i] = hide(v[i], secret)
		}
	case string:
		if secret || secretText.MatchString(v) {
			return redacted
		}
	case json.Number:
		if secret {
			return redacted
		}
	}
	return v
}
