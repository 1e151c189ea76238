package station_test

import (
	"context"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/keyfile"
	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/filelock"
	"github.com/touchmark/touchmark/pkg/label"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
	"github.com/touchmark/touchmark/pkg/order"
	"github.com/touchmark/touchmark/pkg/station"
	"github.com/touchmark/touchmark/pkg/station/texts"
	"github.com/touchmark/touchmark/templates"
)

// floor is a line in a directory: key files, a ledger tied to a counter, an order, devices that are shell scripts.
type floor struct {
	t       *testing.T
	dir     string
	store   hsm.Store
	key     hsm.SigningKey
	issuer  *ca.Issuer
	grant   *order.Grant
	profile *mint.Profile
	counter plug
	back    atomic.Int64 // how far the clock was set back
	cfg     *station.Config
}

// plug is a counter that can be pulled.
type plug struct {
	mu    sync.Mutex
	value uint64
	away  bool
}

func (p *plug) pull(away bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.away = away
}

func (p *plug) Value(context.Context) (uint64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.away {
		return 0, hsm.ErrLost
	}
	return p.value, nil
}

func (p *plug) Increment(ctx context.Context, from uint64) (uint64, error) {
	if at, err := p.Value(ctx); err != nil || at != from {
		return at, errors.Join(err, hsm.ErrLost)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.value++
	return p.value, nil
}

const config = `
profile = "x509-group"
heads = 2
disk-free = 1
tries = 2
warn-left = 3
operators = "operators.toml"
leads-only = ["scrap"]
[probe]
command = ["DIR/probe", "{serial}"]
expect = { product = "{product}" }
[[flash]]
command = ["DIR/flash", "{serial}", "{dir}"]
timeout = "20s"
[[readback]]
command = ["cat", "DIR/device-{serial}/provisioning.json"]
compare = "provisioning.json"
[challenge]
command = ["DIR/sign", "{serial}"]
[label]
template = "unit-50x25"
printer = "command:DIR/print {name}"
`

var tools = map[string]string{
	"probe": `case $1 in SN*8) echo product=other;; SN*9) exit 1;; *) echo product=pump;; esac`,
	// A serial that ends with 7 is not flashed, one with 6 not before there is a file "go".
	"flash": `case $1 in SN*7) exit 1;; SN*6) touch DIR/begun-$1; while [ ! -e DIR/go ]; do sleep 0.02; done;; esac
mkdir -p DIR/device-$1 && cp $2/* DIR/device-$1`,
	"sign":  `openssl dgst -sha256 -sign DIR/device-$1/device-key.pem | base64 -w0`,
	"print": `[ ! -e DIR/off ] && cat > DIR/label-$1`,
}

func newFloor(t *testing.T, quantity int64, more string) *floor {
	t.Helper()
	keyfile.TestWorkFactor(10)
	f := &floor{t: t, dir: t.TempDir()}
	f.counter.value = 7
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range tools {
		must(os.WriteFile(f.path(name), []byte("#!/bin/sh\n"+strings.ReplaceAll(text, "DIR", f.dir)+"\n"), 0o755))
	}
	must(keyfile.Create(f.path("keys"), hsm.Secret("words")))
	var err error
	f.store, err = keyfile.Open(t.Context(), keyfile.Config{Dir: f.path("keys"), Passphrase: func(context.Context) (hsm.Secret, error) { return hsm.Secret("words"), nil }})
	must(err)
	key := func(name string) hsm.SigningKey {
		k, err := f.store.Generate(t.Context(), hsm.Spec{Name: name, Algorithm: hsm.ECP256})
		must(err)
		s, err := hsm.SigningKeyOf(k)
		must(err)
		return s
	}
	f.key = key("station")
	authority := key("ca")
	root, err := ca.NewRoot(ca.AuthorityConfig{Subject: pkix.Name{CommonName: "CA"}, Signer: authority, Now: time.Now(), Validity: 30 * 365 * 24 * time.Hour})
	must(err)
	f.issuer, err = ca.NewIssuer(ca.Config{Signer: authority, Certificate: root, Chain: []*x509.Certificate{}})
	must(err)
	f.profile, err = mint.LoadProfile("x509-group", strings.NewReader(templates.Profiles()["x509-group"]))
	must(err)

	holder, err := signed.KeyID(f.key.Public())
	must(err)
	issuer, err := signed.KeyID(authority.Public())
	must(err)
	owner := key("owner")
	now := time.Now().UTC().Truncate(time.Second)
	document, err := (&order.Order{Version: 1, ID: "PO-1", Product: "pump", Quantity: quantity, Profile: "x509-group", ProfileSHA256: strings.Repeat("0", 64), IDScope: "0ne1",
		GlobalEndpoint: "h.example", Issuer: issuer, Holder: holder, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(48 * time.Hour), Serials: order.Serials{Pattern: "SN##"}}).Sign(owner)
	must(err)
	f.grant, err = order.Open(document, []crypto.PublicKey{owner.Public()}, nil)
	must(err)

	lc := f.ledgerConfig()
	lc.Anchor = nil
	must(ledger.Create(t.Context(), lc))
	led, err := ledger.Open(t.Context(), lc)
	must(err)
	must(led.Anchor(t.Context(), &f.counter))
	must(led.Close())
	f.cfg, err = station.ReadConfig("station.toml", strings.NewReader(strings.ReplaceAll(strings.Replace(config, "[probe]", more+"\n[probe]", 1), "DIR", f.dir)))
	must(err)
	return f
}

func (f *floor) path(name string) string { return filepath.Join(f.dir, name) }

func (f *floor) write(name string) {
	f.t.Helper()
	if err := os.WriteFile(f.path(name), nil, 0o644); err != nil {
		f.t.Fatal(err)
	}
}

func (f *floor) now() time.Time { return time.Now().Add(-time.Duration(f.back.Load())) }

func (f *floor) ledgerConfig() ledger.Config {
	return ledger.Config{Path: f.path("ledger.db"), Origin: "test", Signer: f.key, Now: f.now, Anchor: &f.counter}
}

func (f *floor) open(ctx context.Context, shift, operator string) (*station.Work, error) {
	led, err := ledger.Open(ctx, f.ledgerConfig())
	if err != nil {
		return nil, err
	}
	from, until := f.grant.Window()
	if _, err := led.TakeGrant(ctx, ledger.Grant{ID: f.grant.ID(), Document: f.grant.Document, Quantity: f.grant.Quantity(), Opens: from, Ends: until}); err != nil {
		return nil, errors.Join(err, led.Close())
	}
	cfg := mint.Config{Ledger: led, Profile: f.profile, List: mint.ShiftList(f.profile), IDScope: "0ne1", GlobalEndpoint: "h.example",
		Out: f.path("units"), Shift: shift, Operator: operator, Grant: f.grant}
	for _, file := range f.profile.Stamp.File {
		parsed, err := templates.Parse(file.Template, nil)
		if err != nil {
			return nil, err
		}
		cfg.Templates = append(cfg.Templates, parsed)
	}
	text, err := templates.Certificate("device", nil)
	if err != nil {
		return nil, err
	}
	if cfg.Issuer, err = f.issuer.Prepare(f.profile.CertificateProfile(text, cfg.List.Columns)); err != nil {
		return nil, err
	}
	run, err := mint.Begin(ctx, cfg)
	if err != nil {
		return nil, errors.Join(err, led.Close())
	}
	return &station.Work{Run: run, Ledger: led, Grant: f.grant.ID(), Refuse: func(context.Context, string, error) {},
		Retire: func(ctx context.Context, serial string, state ledger.State, why ledger.Ending) error {
			_, _, err := mint.Retire(ctx, led, serial, state, why)
			return err
		},
		Close: func() error { return errors.Join(run.Close(), led.Close()) }}, nil
}

// station is a process of its own, as far as the line can tell.
func (f *floor) station() *station.Station {
	f.t.Helper()
	text, err := templates.Label("unit-50x25", nil)
	if err != nil {
		f.t.Fatal(err)
	}
	tmpl, err := label.Parse("unit-50x25", strings.NewReader(text))
	if err != nil {
		f.t.Fatal(err)
	}
	if err := os.MkdirAll(f.path("units"), 0o755); err != nil {
		f.t.Fatal(err)
	}
	return station.New(f.cfg, station.Setup{Name: "line-3", Product: "pump", Order: "PO-1", Open: f.open, Out: f.path("units"), Label: tmpl,
		Retry: 20 * time.Millisecond, Now: f.now})
}

// begun is a station with its shift begun.
func (f *floor) begun() *station.Station {
	f.t.Helper()
	s := f.station()
	if err := s.Ready(f.t.Context(), "mai"); err != nil {
		f.t.Fatal(err)
	}
	return s
}

// filled holds a sentence against its fields.
func filled(t *testing.T, c station.Code, fields map[string]string) {
	t.Helper()
	x, err := texts.Load("en")
	if err != nil {
		t.Fatal(err)
	}
	if s := x.Sentence(c, fields); strings.Contains(s, "?") {
		t.Errorf("%s %s", c, s)
	}
}

func (f *floor) made(s *station.Station, serial string, want station.Code) station.Verdict {
	f.t.Helper()
	v := s.Make(f.t.Context(), 0, serial, nil)
	if v.Code != want || v.Pass != (want == "") {
		f.t.Fatalf("%s: %s %s, want %q", serial, v.Code, v.Detail, want)
	}
	filled(f.t, v.Code, v.Fields)
	return v
}

// until waits for a station to be so.
func until(t *testing.T, what string, so func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for !so() {
		select {
		case <-time.After(2 * time.Millisecond):
		case <-deadline:
			t.Fatalf("never %s", what)
		}
	}
}

func (f *floor) exists(name string) bool {
	_, err := os.Stat(f.path(name))
	return err == nil
}

// TestMake: what a unit comes to, what is counted, and that tries are bounded whoever restarts the station.
func TestMake(t *testing.T) {
	f := newFloor(t, 10, "")
	s := f.begun()
	f.made(s, "SN01", "")
	f.made(s, "SN01", station.CodeMade)
	f.made(s, "XX01", station.CodeNotInOrder)
	f.made(s, "SN08", station.CodeProduct)
	f.made(s, "SN09", station.CodeProbe)
	if v := f.made(s, "SN07", station.CodeFlash); v.Attempt != 1 || v.Head == 0 || v.Step != station.StepFlash {
		t.Errorf("%+v", v)
	}
	if c := s.Counts(); c.Passed != 1 || c.Failed != 3 || c.FirstPass != 1 || c.FirstTried != 4 || c.Left != 8 {
		t.Errorf("%+v", c)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = f.begun()
	if v := f.made(s, "SN07", station.CodeFlash); v.Attempt != 1 {
		t.Errorf("%+v", v)
	}
	f.made(s, "SN07", station.CodeTries)
	if err := s.Retire(t.Context(), "SN07", ledger.Scrapped, "damaged", "mai"); err != nil {
		t.Fatal(err)
	}
	f.made(s, "SN07", station.CodeScrapped)
	if n, err := s.Reprint(t.Context(), "SN01"); err != nil || n != 1 || !f.exists("label-SN01.R1.zpl") {
		t.Errorf("%d, %v", n, err)
	}
	if _, err := s.Reprint(t.Context(), "SN02"); err == nil {
		t.Error("a label of a unit that was never made")
	}
	if c := s.Counts(); c.Passed != 0 || c.Failed != 0 || c.Scrapped != 1 || c.Reprinted != 1 || c.Left != 8 {
		t.Errorf("%+v", c)
	}
	f.back.Store(int64(time.Hour))
	f.made(s, "SN02", station.CodeClock)
	f.back.Store(0)
	f.made(s, "SN02", "")
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// TestSpent: an order that is used up begins a shift, for what is to be finished, reworked or printed again; a reworked unit has its place.
func TestSpent(t *testing.T) {
	f := newFloor(t, 2, "")
	s := f.begun()
	f.made(s, "SN01", "")
	f.made(s, "SN02", "")
	f.made(s, "SN03", station.CodeOrderSpent)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = f.begun()
	defer s.Close()
	if err := s.Retire(t.Context(), "SN01", ledger.Reworked, "board", "mai"); err != nil {
		t.Fatal(err)
	}
	f.made(s, "SN03", station.CodeOrderSpent)
	if v := f.made(s, "SN01", ""); v.Revision != 1 {
		t.Errorf("%+v", v)
	}
}

// TestHeadsDoNotWait: while one head's flash hangs, the other makes unit after unit.
func TestHeadsDoNotWait(t *testing.T) {
	f := newFloor(t, 10, "")
	s := f.begun()
	defer s.Close()
	hung := make(chan station.Verdict)
	go func() { hung <- s.Make(t.Context(), 1, "SN06", nil) }()
	until(t, "flashed", func() bool { return f.exists("begun-SN06") })
	for _, serial := range []string{"SN01", "SN02", "SN03"} {
		if v := f.made(s, serial, ""); v.Head != 2 {
			t.Errorf("%+v", v)
		}
	}
	if v := f.made(s, "SN06", station.CodeInWork); v.Head != 1 {
		t.Errorf("%+v", v)
	}
	if v := s.Make(t.Context(), 1, "SN04", nil); v.Code != station.CodeBusy {
		t.Errorf("%+v", v)
	}
	if err := s.Retire(t.Context(), "SN06", ledger.Scrapped, "damaged", "mai"); err == nil {
		t.Error("scrapped while it was on a head")
	}
	f.write("go")
	if v := <-hung; !v.Pass {
		t.Errorf("%+v", v)
	}
}

// TestSameHead: a unit that failed is taken up where its board is, and not shown twice.
func TestSameHead(t *testing.T) {
	f := newFloor(t, 10, "")
	s := f.begun()
	defer s.Close()
	s.Make(t.Context(), 2, "SN07", nil)
	if v := f.made(s, "SN07", station.CodeFlash); v.Head != 2 || v.Attempt != 2 {
		t.Errorf("%+v", v)
	}
	s.Make(t.Context(), 1, "SN07", nil)
	if h := s.Heads(); h[0].State != station.HeadFailed || h[1].State != station.HeadIdle {
		t.Errorf("%+v", h)
	}
}

// person is somebody at a desk.
type person struct {
	*floor
	*station.Desk
}

func (f *floor) person(s *station.Station, o *station.Operators) *person {
	p := &person{f, station.NewDesk(f.t.Context(), s, o, nil)}
	return p
}

// sees waits for the view to be so.
func (p *person) sees(what string, so func(v station.View) bool) station.View {
	p.t.Helper()
	var v station.View
	until(p.t, "saw "+what, func() bool { v = p.View(); return so(v) })
	if v.Notice != "" {
		filled(p.t, v.Notice, v.Fields)
	}
	for _, l := range v.Lamps {
		filled(p.t, l, v.LampFields[l])
	}
	for _, c := range v.Checks {
		if c.State == station.CheckFailed {
			filled(p.t, c.Code, c.Fields)
		}
	}
	return v
}

func (p *person) asked(ask station.Ask) {
	p.t.Helper()
	p.sees("ask "+string(ask), func(v station.View) bool { return v.Ask == ask })
}

func (p *person) noticed(c station.Code) {
	p.t.Helper()
	p.sees("notice "+string(c), func(v station.View) bool { return v.Notice == c })
}

func (p *person) head(n int, state station.HeadState) {
	p.t.Helper()
	p.sees(fmt.Sprintf("head %d %s", n, state), func(v station.View) bool { return v.Heads[n-1].State == state })
}

func (p *person) begins() *person {
	p.t.Helper()
	p.Input("badge")
	p.asked(station.AskSerial)
	return p
}

// ends ends the shift, and waits for it.
func (p *person) ends() {
	p.t.Helper()
	p.Function(station.End)
	p.Input("")
	p.asked(station.AskClose)
	p.Input("")
	for range p.Changed() {
	}
}

// code is what the printed label of a serial says.
func (p *person) code(serial string) string {
	p.t.Helper()
	b, err := os.ReadFile(p.path("label-" + serial + ".zpl"))
	if err != nil {
		p.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "^FDMA,")
	code, _, _ := strings.Cut(rest, "^FS")
	return code
}

// TestPrinterAway: units wait for their printer and go on by themselves; or are given up, which is not held against them.
func TestPrinterAway(t *testing.T) {
	f := newFloor(t, 10, "")
	p := f.person(f.station(), nil).begins()
	f.write("off")
	p.Input("SN01")
	p.Input("SN02")
	p.head(1, station.HeadWaiting)
	p.head(2, station.HeadWaiting)
	p.Input("SN03")
	p.noticed(station.CodeBusy)
	p.Function(station.Cancel)
	if v := p.View(); v.Function != station.Cancel || v.Subject != "SN01" || v.Ask != station.AskConfirm {
		t.Errorf("%+v", v)
	}
	p.Function(station.Cancel)
	if v := p.View(); v.Function != station.Cancel || v.Subject != "SN02" {
		t.Errorf("%+v", v)
	}
	p.Input("SN04") // no answer
	p.Input("")
	v := p.sees("given up", func(v station.View) bool { return v.Heads[1].State == station.HeadFailed })
	if v.Counts.Failed != 0 || v.Heads[1].Verdict.Code != station.CodePrinter {
		t.Errorf("%+v", v)
	}
	if err := os.Remove(f.path("off")); err != nil {
		t.Fatal(err)
	}
	p.head(1, station.HeadPassed)
	p.Input("SN02")
	p.head(2, station.HeadPassed)
	p.ends()
	if v := p.View(); v.Counts.Passed != 2 || v.Counts.Failed != 0 {
		t.Errorf("%+v", v.Counts)
	}
}

// TestLabels: labels go to the heads that ask for them, and nothing else does.
func TestLabels(t *testing.T) {
	f := newFloor(t, 10, "")
	f.cfg.Label.ScanBack = true
	p := f.person(f.station(), nil).begins()
	p.Input("SN01")
	p.head(1, station.HeadAsking)
	p.Input("SN06") // the next unit, as a head is free
	until(t, "flashed", func() bool { return f.exists("begun-SN06") })
	p.Input("SN06")
	p.noticed(station.CodeInWork)
	f.write("go")
	p.head(2, station.HeadAsking)
	if v := p.View(); v.Ask != station.AskLabel || v.AskHead != 1 {
		t.Errorf("%+v", v)
	}
	p.Input(p.code("SN06")) // not in their order
	p.head(2, station.HeadPassed)
	p.head(1, station.HeadAsking)
	p.Input(p.code("SN06"))
	v := p.sees("failed", func(v station.View) bool { return v.Heads[0].State == station.HeadFailed })
	filled(t, v.Heads[0].Verdict.Code, v.Heads[0].Verdict.Fields)
	if v.Heads[0].Verdict.Code != station.CodeOtherLabel {
		t.Errorf("%+v", v.Heads[0].Verdict)
	}
	p.Input(p.code("SN01")) // a unit's own label tells its serial as well
	p.head(1, station.HeadAsking)

	// The shift ends with a label asked for: it is waited for, and named.
	p.Function(station.End)
	p.Input("SN02")
	if v := p.View(); v.Function != station.End || v.Ask != station.AskConfirm {
		t.Errorf("a serial answered: %+v", v)
	}
	p.Input("")
	if v := p.View(); v.Phase != station.PhaseWork || v.Ask != station.AskLabel || v.AskHead != 1 {
		t.Errorf("%+v", v)
	}
	p.Input("SN02")
	p.Function(station.Rework)
	p.Input(p.code("SN01"))
	p.asked(station.AskClose)
	if v := p.View(); v.Phase != station.PhaseEnded || v.Counts.Passed != 2 || v.Heads[0].State != station.HeadPassed {
		t.Errorf("%+v", v)
	}
	p.Function(station.End)
	for range p.Changed() {
	}
}

func TestLabelNotScanned(t *testing.T) {
	f := newFloor(t, 10, "")
	f.cfg.Label.ScanBack, f.cfg.Label.ScanSeconds = true, 1
	s := f.begun()
	defer s.Close()
	f.made(s, "SN01", station.CodeNoScan)
}

// TestTokenAway: a token that is pulled stops nobody for good. Units wait, can be given up, and go on; functions say so; a shift ends.
func TestTokenAway(t *testing.T) {
	f := newFloor(t, 10, "")
	p := f.person(f.station(), nil).begins()
	p.Input("SN01")
	p.head(1, station.HeadPassed)
	f.counter.pull(true)
	p.Input("SN02")
	p.Input("SN03")
	v := p.sees("waiting", func(v station.View) bool {
		return v.Heads[0].State == station.HeadWaiting && v.Heads[1].State == station.HeadWaiting
	})
	if v.Heads[0].Waiting != station.CodeToken {
		t.Errorf("%+v", v.Heads[0])
	}
	p.Function(station.Rework)
	p.Input("SN01")
	p.asked(station.AskReason)
	p.Input("1")
	p.Input("")
	p.noticed(station.CodeToken)
	p.Function(station.Cancel)
	p.Input("")
	p.head(1, station.HeadFailed)
	f.counter.pull(false)
	p.head(2, station.HeadPassed)
	p.Input("SN02")
	p.head(1, station.HeadPassed)
	if c := p.View().Counts; c.Passed != 3 || c.Failed != 0 || c.Left != 7 {
		t.Errorf("%+v", c)
	}
	f.counter.pull(true)
	p.Input("SN04")
	p.sees("waiting", func(v station.View) bool {
		return v.Heads[0].State == station.HeadWaiting || v.Heads[1].State == station.HeadWaiting
	})
	if err := p.Finish(); err != nil {
		t.Error(err)
	}
}

// TestStopped: a unit that is stopped with its shift has not failed, and is taken up.
func TestStopped(t *testing.T) {
	f := newFloor(t, 10, "")
	s := f.station()
	p := f.person(s, nil).begins()
	for range 3 { // more often than it may fail
		p.Input("SN06")
		until(t, "flashed", func() bool { return f.exists("begun-SN06") })
		if err := p.Finish(); err != nil {
			t.Error(err)
		}
		if c := s.Counts(); c.Failed != 0 || c.Passed != 0 || s.Busy() {
			t.Errorf("%+v", c)
		}
		if err := os.Remove(f.path("begun-SN06")); err != nil {
			t.Fatal(err)
		}
		s = f.station()
		p = f.person(s, nil).begins()
	}
	f.write("go")
	p.Input("SN06")
	p.head(1, station.HeadPassed)
	p.ends()
}

// TestDesk: badges, PINs, checks, a lead's functions, lamps.
func TestDesk(t *testing.T) {
	f := newFloor(t, 4, "")
	o := &station.Operators{}
	for _, err := range []error{o.Add("Mai", "BADGE-1", "2468", false), o.Add("Jo", "BADGE-2", "1357", true)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	p := f.person(f.station(), o)
	p.Input("BADGE-9")
	p.noticed(station.CodeBadge)
	p.Input("BADGE-1")
	p.asked(station.AskPIN)
	for range 2 {
		p.Input("1111")
		p.noticed(station.CodePIN)
	}
	p.Input("1111")
	p.noticed(station.CodePINLocked)
	p.asked(station.AskBadge)
	p.Input("BADGE-1")
	p.noticed(station.CodePINLocked)
	f.back.Store(-int64(3 * time.Minute))
	p.Input("BADGE-1")
	p.asked(station.AskPIN)

	// Another program has the ledger; then the token is away; then all is well.
	lock, err := filelock.Lock(f.path("ledger.db.lock"))
	if err != nil {
		t.Fatal(err)
	}
	p.Input("2468")
	check := func(name string, code station.Code) {
		t.Helper()
		p.asked(station.AskRetry)
		v := p.View()
		i := slices.IndexFunc(v.Checks, func(c station.Check) bool { return c.Code != "" })
		if i < 0 || v.Checks[i].Name != name || v.Checks[i].Code != code {
			t.Errorf("%+v, want %s %s", v.Checks, name, code)
		}
		for _, c := range v.Checks {
			if c.State == station.CheckRunning {
				t.Errorf("%+v", c)
			}
		}
	}
	check("ledger", station.CodeLocked)
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	f.counter.pull(true)
	p.Input("")
	p.sees("token", func(v station.View) bool {
		return v.Ask == station.AskRetry && slices.ContainsFunc(v.Checks, func(c station.Check) bool { return c.Code == station.CodeToken })
	})
	check("token", station.CodeToken)
	f.counter.pull(false)
	p.Input("")
	p.asked(station.AskSerial)

	p.Input("SN01")
	p.head(1, station.HeadPassed)
	p.Input("SN02")
	v := p.sees("lamp", func(v station.View) bool { return slices.Contains(v.Lamps, station.LampQuota) })
	if got := v.LampFields[station.LampQuota]["left"]; got != "2" {
		t.Errorf("%s left", got)
	}
	p.head(1, station.HeadPassed)
	p.Function(station.Scrap)
	p.noticed(station.CodeLead)
	p.Input("BADGE-1")
	p.asked(station.AskPIN)
	p.Input("2468")
	p.noticed(station.CodeLead)
	p.Input("BADGE-2")
	p.asked(station.AskPIN)
	p.Input("1357")
	p.asked(station.AskSerial)
	p.Input("SN01")
	p.Input("9")
	p.Input("TM!YES") // nothing is asked that it would answer
	p.Input("damaged")
	p.asked(station.AskConfirm)
	p.Input("TM!YES") // who has a scanner only
	if v := p.sees("scrapped", func(v station.View) bool { return v.Counts.Scrapped == 1 }); v.Operator != "Mai" || v.Counts.Passed != 1 || v.Counts.Left != 2 {
		t.Errorf("%+v", v)
	}
	p.Input("TM!rework") // not for leads only
	p.asked(station.AskSerial)
	p.Input("SN77")
	p.Input("2")
	p.Input("")
	p.noticed(station.CodeNotMade)
	p.Input("TM!reprint")
	p.Input("SN02")
	p.sees("reprinted", func(v station.View) bool { return v.Counts.Reprinted == 1 })
	p.Input("TM!help")
	if !p.View().Help {
		t.Error("no help")
	}
	p.Input("TM!cancel")
	p.Input("TM!end")
	p.Input("TM!cancel")
	p.asked(station.AskSerial)
	p.ends()
}

// TestNoShift: who leaves before a shift has begun is not shown counts.
func TestNoShift(t *testing.T) {
	f := newFloor(t, 1, "")
	p := f.person(f.station(), nil)
	p.Function(station.End)
	for range p.Changed() {
	}
}

// answers reads what a station answers, until want says that it has all.
func answers(t *testing.T, r io.Reader, want func(station.Answer) bool) {
	t.Helper()
	dec := json.NewDecoder(r)
	for {
		var a station.Answer
		if err := dec.Decode(&a); err != nil {
			t.Fatal(err)
		}
		if want(a) {
			return
		}
	}
}

// TestServe: a machine's conversation.
func TestServe(t *testing.T) {
	f := newFloor(t, 10, "")
	f.cfg.Label.ScanBack = true
	s := f.begun()
	defer s.Close()
	in, requests := io.Pipe()
	read, out := io.Pipe()
	served := make(chan error, 1)
	go func() { served <- s.Serve(t.Context(), in, out) }()
	ask := func(r string) {
		t.Helper()
		if _, err := io.WriteString(requests, r+"\n"); err != nil {
			t.Fatal(err)
		}
	}
	ask(`{"id":"1","op":"make","serial":"SN01"}`)
	answers(t, read, func(a station.Answer) bool { return a.Event == "step" && a.State == station.HeadAsking })
	ask(`{"id":"2","op":"scan","text":"SN01"}`)
	answers(t, read, func(a station.Answer) bool { return a.ID == "1" && a.Verdict.Pass })
	ask(`{"id":"3","op":"scan","text":"SN01"}`)
	answers(t, read, func(a station.Answer) bool { return a.ID == "3" && a.Error != "" })
	ask(`{"id":"4","op":"cancel","head":1}`)
	answers(t, read, func(a station.Answer) bool { return a.ID == "4" && a.Error != "" })
	ask(`{"id":"5","op":"make","serial":"SN02"}`)
	answers(t, read, func(a station.Answer) bool { return a.Event == "step" && a.State == station.HeadAsking })
	ask(`{"id":"6","op":"cancel","head":1}`)
	answers(t, read, func(a station.Answer) bool {
		return a.ID == "5" && a.Verdict != nil && a.Verdict.Code == station.CodeNoScan
	})
	ask(`{"id":"7","op":"status"}`)
	answers(t, read, func(a station.Answer) bool {
		return a.ID == "7" && a.Counts.Passed == 1 && a.Counts.Failed == 1 && a.Counts.Left == 8
	})

	// Whoever reads goes away, then whoever asks: the units come to their end.
	f.cfg.Label.ScanBack = false
	ask(`{"op":"make","serial":"SN03"}`)
	ask(`{"op":"make","serial":"SN06"}`)
	ask(`{"op":"make","serial":"SN04"}`)
	until(t, "flashed", func() bool { return f.exists("begun-SN06") })
	read.Close()
	requests.Close()
	f.write("go")
	if err := <-served; err != nil {
		t.Error(err)
	}
	if c := s.Counts(); c.Passed != 4 || s.Busy() {
		t.Errorf("%+v", c)
	}
}

// TestServeStopped: what is stopped is told as no verdict.
func TestServeStopped(t *testing.T) {
	f := newFloor(t, 10, "")
	s := f.begun()
	defer s.Close()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	in, requests := io.Pipe()
	read, out := io.Pipe()
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, in, out) }()
	if _, err := io.WriteString(requests, `{"id":"1","op":"make","serial":"SN06"}`+"\n"); err != nil {
		t.Fatal(err)
	}
	answers(t, read, func(a station.Answer) bool { return a.Step == station.StepFlash })
	stop()
	answers(t, read, func(a station.Answer) bool { return a.ID == "1" && a.Event == "error" && a.Verdict == nil })
	if err := <-served; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if c := s.Counts(); c.Failed != 0 {
		t.Errorf("%+v", c)
	}
}
