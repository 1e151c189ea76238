package mint_test

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/keyfile"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
	"github.com/touchmark/touchmark/templates"
)

// line is a factory line in memory and a temporary directory.
type line struct {
	dir     string
	store   hsm.Store
	station hsm.SigningKey
	issuer  *ca.Issuer
	now     func() time.Time
}

func newLine(t *testing.T) *line {
	t.Helper()
	keyfile.TestWorkFactor(10)
	l := &line{dir: t.TempDir(), now: time.Now}
	keys := filepath.Join(l.dir, "keys")
	if err := keyfile.Create(keys, hsm.Secret("words")); err != nil {
		t.Fatal(err)
	}
	var err error
	l.store, err = keyfile.Open(t.Context(), keyfile.Config{Dir: keys, Passphrase: func(context.Context) (hsm.Secret, error) { return hsm.Secret("words"), nil }})
	if err != nil {
		t.Fatal(err)
	}
	key := func(name string) hsm.SigningKey {
		k, err := l.store.Generate(t.Context(), hsm.Spec{Name: name, Algorithm: hsm.ECP256})
		if err != nil {
			t.Fatal(err)
		}
		s, err := hsm.SigningKeyOf(k)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	l.station = key("station")
	caKey := key("ca")
	root, err := ca.NewRoot(ca.AuthorityConfig{Subject: pkix.Name{CommonName: "CA"}, Signer: caKey, Now: time.Now(), Validity: 30 * 365 * 24 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	if l.issuer, err = ca.NewIssuer(ca.Config{Signer: caKey, Certificate: root, Chain: []*x509.Certificate{}}); err != nil {
		t.Fatal(err)
	}
	if err := ledger.Create(t.Context(), l.ledgerConfig()); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *line) ledgerConfig() ledger.Config {
	return ledger.Config{Path: filepath.Join(l.dir, "ledger.db"), Origin: "test", Signer: l.station, Now: func() time.Time { return l.now() }}
}

func (l *line) out() string { return filepath.Join(l.dir, "stamps") }

// mint runs a list through a profile, as a process of its own would.
func (l *line) mint(t *testing.T, profile, csv string, store hsm.Store) (sum mint.Summary, err error) {
	t.Helper()
	err = l.run(t, profile, csv, store, "", func(r *mint.Run) error {
		var err error
		sum, err = r.Mint(t.Context(), func(*bundle.Entry) error { return nil })
		return err
	})
	return sum, err
}

// run calls f with a run of a list, or with a shift of that name.
func (l *line) run(t *testing.T, profile, csv string, store hsm.Store, shift string, f func(*mint.Run) error) error {
	t.Helper()
	p, err := mint.LoadProfile("test", strings.NewReader(profile))
	if err != nil {
		t.Fatal(err)
	}
	list := mint.ShiftList(p)
	if shift == "" {
		if list, err = mint.ReadList("list", strings.NewReader(csv), p); err != nil {
			t.Fatal(err)
		}
	}
	led, err := ledger.Open(t.Context(), l.ledgerConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer led.Close()
	cfg := mint.Config{Ledger: led, Profile: p, List: list, Store: store, IDScope: "0ne1", GlobalEndpoint: "h.example", Out: l.out(), Shift: shift}
	for _, f := range p.Stamp.File {
		parsed, err := templates.Parse(f.Template, nil)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Templates = append(cfg.Templates, parsed)
	}
	if p.Attestation == mint.AttestationX509 {
		text, err := templates.Certificate("device", nil)
		if err != nil {
			t.Fatal(err)
		}
		if cfg.Issuer, err = l.issuer.Prepare(p.CertificateProfile(text, list.Columns)); err != nil {
			t.Fatal(err)
		}
	}
	run, err := mint.Begin(t.Context(), cfg)
	if err != nil {
		return err
	}
	defer run.Close()
	return f(run)
}

// Invariant 1: a station died between putting stamps in place and writing down that it had read them back, and somebody has
// taken one away. It may be in a device by now: the serial does not get a second identity.
func TestStampTakenAway(t *testing.T) {
	for name, profile := range map[string]string{"x509": templates.Profiles()["x509-group"], "symmetric": templates.Profiles()["symmetric-individual"]} {
		t.Run(name, func(t *testing.T) {
			l := newLine(t)
			stamp := filepath.Join(l.out(), "sn1")
			// The clock jumps back as soon as the stamp is there, so the next step is not written down.
			l.now = func() time.Time {
				if _, err := os.Stat(stamp); err == nil {
					return time.Now().Add(-time.Hour)
				}
				return time.Now()
			}
			const list = "serial\nSN1\nSN2\n"
			if _, err := l.mint(t, profile, list, l.store); !errors.Is(err, ledger.ErrClock) {
				t.Fatalf("the run that dies: %v", err)
			}
			l.now = time.Now
			taken := filepath.Join(l.dir, "taken")
			if err := os.Rename(stamp, taken); err != nil {
				t.Fatal(err)
			}
			if sum, err := l.mint(t, profile, list, l.store); !errors.Is(err, mint.ErrUnproven) || sum.Voided != 0 || !strings.Contains(err.Error(), "SN1") {
				t.Fatalf("with its stamp gone: %+v, %v", sum, err)
			}
			if err := os.Rename(taken, stamp); err != nil {
				t.Fatal(err)
			}
			if sum, err := l.mint(t, profile, list, l.store); err != nil || sum.Before != 2 || sum.Voided != 0 {
				t.Errorf("with its stamp back: %+v, %v", sum, err)
			}
		})
	}
}

// liar is a store whose token does not do what it is asked to.
type liar struct{ hsm.Store }

type leakyKey struct{ hsm.SigningKey }

func (l liar) Generate(ctx context.Context, s hsm.Spec) (hsm.Key, error) {
	k, err := l.Store.Generate(ctx, s)
	if err != nil {
		return nil, err
	}
	signing, err := hsm.SigningKeyOf(k)
	return leakyKey{signing}, err
}

func (leakyKey) Attributes(context.Context) (hsm.Attributes, error) {
	return hsm.Attributes{Sensitive: true, Extractable: true}, nil
}

// Invariant 6: attributes are read back, and a key that could leave its token is not a device's.
func TestAttributesReadBack(t *testing.T) {
	l := newLine(t)
	profile := strings.Replace(templates.Profiles()["x509-group"], `in = "memory"`, `in = "token"`, 1)
	if _, err := l.mint(t, profile, "serial\nSN1\n", liar{l.store}); err == nil || !strings.Contains(err.Error(), "can leave its token") {
		t.Fatalf("a token that lies: %v", err)
	}
	if _, err := l.store.Open(t.Context(), "device:sn1"); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("its key is still there: %v", err)
	}
	if sum, err := l.mint(t, profile, "serial\nSN1\n", l.store); err != nil || sum.Before != 1 {
		t.Errorf("an honest one: %+v, %v", sum, err)
	}
}

// Invariant 5: a rendered file that would show the device's key, in whatever form, is secret or is not written.
func TestRenderedSecrets(t *testing.T) {
	for _, c := range []struct{ profile, template string }{
		{"x509-group", "device.h"}, {"x509-group", "zephyr-settings.txt"}, {"symmetric-individual", "device.h"}, {"symmetric-individual", "zephyr-settings.txt"}, {"symmetric-individual", "node.env"},
	} {
		profile := templates.Profiles()[c.profile] + "\n[[stamp.file]]\nname = \"rendered\"\ntemplate = \"" + c.template + "\"\n"
		l := newLine(t)
		if _, err := l.mint(t, profile, "serial\nSN1\n", l.store); err == nil || !strings.Contains(err.Error(), "rendered would show the device's key") {
			t.Errorf("%s with %s: %v", c.profile, c.template, err)
		}
		if _, err := os.Stat(filepath.Join(l.out(), "sn1")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s with %s: a stamp is there: %v", c.profile, c.template, err)
		}
		if _, err := l.mint(t, profile+"secret = true\n", "serial\nSN1\n", l.store); err != nil {
			t.Errorf("%s with %s, secret: %v", c.profile, c.template, err)
		}
		if st, err := os.Stat(filepath.Join(l.out(), "sn1", "rendered")); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s with %s, secret: %v, %v", c.profile, c.template, st, err)
		}
	}
	// What a firmware is built with is what stands in the stamp's own files.
	l := newLine(t)
	profile := templates.Profiles()["x509-group"] + "\n[[stamp.file]]\nname = \"device.h\"\ntemplate = \"device.h\"\nsecret = true\n[[stamp.file]]\nname = \"node.env\"\ntemplate = \"node.env\"\n"
	if _, err := l.mint(t, profile, "serial\nSN1\n", l.store); err != nil {
		t.Fatal(err)
	}
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(l.out(), "sn1", name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	header := read("device.h")
	for _, name := range []string{"device-key.pem", "device-chain.pem"} {
		for line := range strings.Lines(read(name)) {
			if !strings.Contains(header, `"`+strings.TrimSuffix(line, "\n")+`\n"`) {
				t.Errorf("device.h does not have %s whole", name)
			}
		}
	}
}
