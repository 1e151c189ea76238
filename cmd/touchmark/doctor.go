package main

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/pkcs11"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
)

// A finding is one line of a doctor's report.
type finding struct {
	Check  string `json:"check"`
	Status string `json:"status"` // ok, warn, fail
	Detail string `json:"detail"`
	Action string `json:"action,omitempty"` // the one thing to do next
}

const (
	statusOK   = "ok"
	statusWarn = "warn"
	statusFail = "fail"
)

// doctor collects findings.
type doctor struct{ findings []finding }

func (d *doctor) ok(check, format string, args ...any) {
	d.findings = append(d.findings, finding{check, statusOK, fmt.Sprintf(format, args...), ""})
}

func (d *doctor) warn(check, action, format string, args ...any) {
	d.findings = append(d.findings, finding{check, statusWarn, fmt.Sprintf(format, args...), action})
}

func (d *doctor) fail(check, action string, err error) {
	var h hintError
	if errors.As(err, &h) {
		action = h.hint
	}
	d.findings = append(d.findings, finding{check, statusFail, err.Error(), action})
}

// report prints the findings, and returns an error when one of them failed.
func (a *app) reportFindings(what string, d *doctor) error {
	failed := 0
	for _, f := range d.findings {
		if f.Status == statusFail {
			failed++
		}
	}
	if a.json {
		if err := a.printJSON(map[string]any{"subject": what, "ok": failed == 0, "checks": d.findings}); err != nil {
			return err
		}
	} else {
		var rows [][]string
		for _, f := range d.findings {
			label := map[string]string{statusOK: a.paint(a.out, "32", " ok "), statusWarn: a.paint(a.out, "33", "warn"), statusFail: a.paint(a.out, "31", "FAIL")}[f.Status]
			rows = append(rows, []string{label, f.Check, f.Detail})
			if f.Action != "" {
				rows = append(rows, []string{"", "", "→ " + f.Action})
			}
		}
		if err := a.table(nil, rows); err != nil {
			return err
		}
	}
	if failed > 0 {
		return fmt.Errorf("%s: %d of %d checks failed", what, failed, len(d.findings))
	}
	return nil
}

const (
	fewSessions = 4
	manyObjects = 20_000
	lowMemory   = 64 << 10
)

func (a *app) runTokenDoctor(ctx context.Context, o *tokenOptions) (err error) {
	uri, base, l, err := a.tokenURI(o)
	if err != nil {
		return err
	}
	d := &doctor{}
	subject := "token " + uri.WithObject("").String()
	a.examineClock(ctx, d, l)
	m, t, can, err := pkcs11.Examine(ctx, uri)
	if m == nil {
		d.fail("module", "name the module's library with module-path in the key URI; is its package installed?", err)
		return a.reportFindings(subject, d)
	}
	d.ok("module", "%s, %s %s (PKCS#11 %s)", m.Path, m.Description, m.Version, m.Cryptoki)
	if t == nil {
		d.fail("token", "plug it in, or mend the key URI", err)
		return a.reportFindings(subject, d)
	}
	d.ok("token", "%q, serial %s, %s %s, firmware %s", t.Label, t.Serial, t.Manufacturer, t.Model, t.Firmware)
	if !examinePINs(d, t) {
		return a.reportFindings(subject, d)
	}
	examineRoom(d, t)
	a.examineMechanisms(d, l, can, err)
	start := time.Now()
	opened, err := a.openStore(ctx, o.store, base)
	if err != nil {
		d.fail("login", "look at the PIN's file or variable (touchmark help environment); it was tried once and is not tried again", err)
		return a.reportFindings(subject, d)
	}
	defer func() { err = errors.Join(err, opened.Close()) }()
	took := time.Since(start)
	d.ok("login", "the PIN is right")
	store := opened.(*pkcs11.Store)
	if n, err := store.Objects(ctx); err != nil {
		d.fail("objects", "the token's own tool may tell why", err)
	} else if n.Total() > manyObjects {
		d.warn("objects", "delete what is not used: each start reads every key's name", "%d objects; opening the token took %v", n.Total(), took.Round(time.Millisecond))
	} else {
		d.ok("objects", "%d (%d private keys, %d certificates); opening the token took %v", n.Total(), n.PrivateKeys, n.Certificates, took.Round(time.Millisecond))
	}
	examineKey(ctx, d, store)
	if l != nil {
		a.examineLine(ctx, d, l, store)
	}
	return a.reportFindings(subject, d)
}

// examinePINs looks at what the token tells of its PINs before anybody tries one.
func examinePINs(d *doctor, t *pkcs11.Token) (mayLogin bool) {
	if t.SOPIN == pkcs11.PINLocked {
		d.warn("SO PIN", "nobody can unlock the user PIN any more: plan to replace the token", "locked")
	}
	if !t.Login {
		d.ok("user PIN", "the token wants none")
		return true
	}
	switch t.UserPIN {
	case pkcs11.PINLocked:
		d.fail("user PIN", "the security officer can set a new one with the token's own tool", errors.New("locked"))
	case pkcs11.PINFinalTry:
		d.fail("user PIN", "log in once with the token's own tool and the right PIN, which resets the count", errors.New("one more wrong try locks it, so none is made"))
	case pkcs11.PINUnset:
		d.fail("user PIN", "touchmark token init sets it", errors.New("the token has none yet"))
	case pkcs11.PINCountLow:
		d.warn("user PIN", "find out who has a wrong PIN before it locks", "a wrong one was tried since the last right one")
		return true
	case pkcs11.PINToChange:
		d.warn("user PIN", "change it with the token's own tool", "the token wants it changed")
		return true
	default:
		d.ok("user PIN", "no wrong tries")
		return true
	}
	return false
}

// need is an operation that a line or a profile cannot do without.
type need struct {
	operation string
	algorithm hsm.Algorithm
}

// examineMechanisms holds what the token announces against what the line and its profiles need; without a line, against what
// a line needs.
func (a *app) examineMechanisms(d *doctor, l *line, can []pkcs11.Capability, err error) {
	const check = "mechanisms"
	if err != nil {
		d.fail(check, "the module's own log may tell why", err)
		return
	}
	needs := map[need]string{{"make", hsm.ECP256}: "the line's keys", {"sign", hsm.ECP256}: "the line's keys", {"agree", hsm.ECP256}: "the line's recipient key"}
	if l != nil {
		for _, name := range l.profileNames() {
			p, _, err := l.profile(name)
			switch {
			case err != nil: // reported with the profile
			case p.Key.In == "token" && p.Key.Store == "":
				alg := hsm.Algorithm(p.Key.Algorithm)
				needs[need{"make", alg}], needs[need{"sign", alg}] = "profile "+name, "profile "+name
			case p.Attestation == mint.AttestationSymmetricKey && p.Enrollment == "group":
				needs[need{"mac", hsm.HMACSHA256}] = "profile " + name
			}
		}
	}
	good := 0
	for _, c := range can {
		who, needed := needs[need{c.Operation, c.Algorithm}]
		switch {
		case !needed:
		case !c.Can:
			d.fail(check, "use a token that has it, or keys of another algorithm (touchmark token show lists what it can do)",
				fmt.Errorf("to %s %s keys, for %s, takes %s, which the token does not offer", c.Operation, c.Algorithm, who, strings.Join(c.Mechanisms, " and ")))
		case c.Fallback != "":
			good++
			d.ok(check, "%s %s is worked around: %s", c.Operation, c.Algorithm, c.Fallback)
		default:
			good++
		}
	}
	if good == len(needs) {
		d.ok(check, "all %d that are needed are there", good)
	}
}

func examineRoom(d *doctor, t *pkcs11.Token) {
	switch {
	case t.ReadOnly:
		d.warn("room", "make keys in memory, or unlock the token", "the token is write-protected")
	case t.FreeMemory == nil:
		d.ok("room", "the token does not say how much it has")
	case *t.FreeMemory < lowMemory:
		d.warn("room", "delete what is not used", "%d octets are free", *t.FreeMemory)
	default:
		d.ok("room", "%d octets are free", *t.FreeMemory)
	}
	if t.MaxSessions != nil && *t.MaxSessions != 0 && *t.MaxSessions < fewSessions {
		d.warn("sessions", "close other programs that use the token; work goes on, one operation at a time", "at most %d", *t.MaxSessions)
	} else {
		d.ok("sessions", "%s", sessionsText(t))
	}
}

// examineKey makes a key, uses it, reads it back under its name, and destroys it.
func examineKey(ctx context.Context, d *doctor, store *pkcs11.Store) {
	const check = "a key made and used"
	random := make([]byte, 6)
	if _, err := rand.Read(random); err != nil {
		d.fail(check, "", err)
		return
	}
	name := "doctor:" + hex.EncodeToString(random)
	try := func() (attr hsm.Attributes, err error) {
		if _, err := store.Generate(ctx, hsm.Spec{Name: name, Algorithm: hsm.ECP256}); err != nil {
			return attr, err
		}
		defer func() { err = errors.Join(err, store.Delete(context.WithoutCancel(ctx), name)) }()
		k, err := store.Open(ctx, name)
		if err != nil {
			return attr, fmt.Errorf("reading it back: %w", err)
		}
		signer, err := hsm.SigningKeyOf(k)
		if err != nil {
			return attr, err
		}
		sum := sha256.Sum256([]byte(name))
		sig, err := signer.Sign(rand.Reader, sum[:], crypto.SHA256)
		if err != nil {
			return attr, err
		}
		if err := verifySignature(signer.Public(), sum[:], sig, crypto.SHA256, false); err != nil {
			return attr, err
		}
		return k.Attributes(ctx)
	}
	start := time.Now()
	attr, err := try()
	switch {
	case errors.Is(err, hsm.ErrFull):
		d.fail(check, "delete keys that are not used, or make device keys in memory", err)
	case err != nil:
		d.fail(check, "the module's own log may tell why", err)
	case attr.Extractable || !attr.Sensitive:
		d.fail(check, "do not make keys on this token: it does not keep them", fmt.Errorf("the token made a key that can leave it: %+v", attr))
	case !attr.Local || !attr.NeverExtractable || !attr.AlwaysSensitive:
		d.warn(check, "bundles of this token carry no proof of where a key was made", "made, used and destroyed; the token does not vouch that it was made there")
	default:
		d.ok(check, "made, signed with, read back and destroyed in %v; it never leaves the token", time.Since(start).Round(time.Millisecond))
	}
}

// examineClock holds the clock against what this line knows of the time.
func (a *app) examineClock(ctx context.Context, d *doctor, l *line) {
	now := time.Now()
	if l == nil {
		if now.Year() < 2025 {
			d.fail("clock", "set the clock", fmt.Errorf("it shows %s", now.UTC().Format(time.RFC3339)))
		} else {
			d.ok("clock", "%s", now.UTC().Format(time.RFC3339))
		}
		return
	}
	chain, err := readCertificates(l.path(issuingFile))
	if err != nil {
		d.fail("clock", "", err)
		return
	}
	if now.Before(chain[0].NotBefore) || now.After(chain[0].NotAfter) {
		d.fail("clock", "set the clock", fmt.Errorf("it shows %s, and the issuing CA is valid from %s to %s", now.UTC().Format(time.RFC3339),
			chain[0].NotBefore.Format(time.RFC3339), chain[0].NotAfter.Format(time.RFC3339)))
		return
	}
	led, err := ledger.View(ctx, l.path(ledgerFile))
	if err != nil {
		d.fail("ledger", "touchmark ledger verify tells more", err)
		return
	}
	if err := errors.Join(led.CheckClock(), led.Close()); err != nil {
		d.fail("clock", "set the clock", err)
		return
	}
	d.ok("clock", "%s, not before the CA or the ledger's last entry", now.UTC().Format(time.RFC3339))
}

// examineLine looks for what a line and its profiles need.
func (a *app) examineLine(ctx context.Context, d *doctor, l *line, store *pkcs11.Store) {
	station, err := l.stationPublic()
	if err != nil {
		d.fail("line's keys", "", err)
		return
	}
	chain, err := readCertificates(l.path(issuingFile))
	if err != nil {
		d.fail("line's keys", "", err)
		return
	}
	want := map[string]crypto.PublicKey{l.Keys.Station: station, l.Keys.Issuing: chain[0].PublicKey}
	if len(chain) > 1 {
		want[l.Keys.Root] = chain[len(chain)-1].PublicKey
	}
	good := true
	for _, name := range []string{l.Keys.Station, l.Keys.Issuing, l.Keys.Root} {
		if name == "" {
			continue // the line shares another's CA
		}
		key, err := openSigner(ctx, store, name)
		if err == nil && want[name] != nil && !key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(want[name]) {
			err = fmt.Errorf("key %q on the token is another one than the line's files say", name)
		}
		if name == l.Keys.Root && errors.Is(err, hsm.ErrNotFound) {
			continue // a root that is kept elsewhere is good practice
		}
		if err != nil {
			good = false
			d.fail("line's keys", "is this the line's own token?", err)
		}
	}
	if l.Keys.Recipient == "" {
		d.warn("line's keys", "make a line for symmetric keys on a token that has CKM_ECDH1_DERIVE", "no recipient key: group keys cannot be brought in")
	} else if _, err := store.Open(ctx, l.Keys.Recipient); err != nil {
		good = false
		d.fail("line's keys", "group keys cannot be brought in without it", err)
	}
	if good {
		d.ok("line's keys", "%s and %s are the line's own", l.Keys.Station, l.Keys.Issuing)
	}
	for _, name := range l.profileNames() {
		check := "profile " + name
		p, _, err := l.profile(name)
		if err != nil {
			d.fail(check, "mend the profile", errors.New(strings.ReplaceAll(err.Error(), "\n", "; ")))
			continue
		}
		if p.Attestation != mint.AttestationSymmetricKey || p.Enrollment != "group" {
			d.ok(check, "%s, %s", p.Attestation, p.Enrollment)
			continue
		}
		if _, err := store.Open(ctx, p.Key.GroupKey); err != nil {
			d.warn(check, "touchmark group key makes it in the service, touchmark key import brings it here", "its group key %q is not on the token", p.Key.GroupKey)
			continue
		}
		d.ok(check, "its group key %q is there", p.Key.GroupKey)
	}
}
