package screen

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/charmbracelet/x/ansi"

	"github.com/touchmark/touchmark/pkg/station"
	"github.com/touchmark/touchmark/pkg/station/texts"
)

var update = flag.Bool("update", false, "rewrite the golden screens")

var noon = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)

func text(t testing.TB, lang string) *texts.Text {
	t.Helper()
	x, err := texts.Load(lang)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func passed(n int) *station.Verdict {
	return &station.Verdict{Pass: true, Serial: fmt.Sprintf("TM26-%06d", n), RegistrationID: fmt.Sprintf("tm26-%06d", n), Head: 1, Attempt: 1,
		At: noon.Add(time.Duration(n-400) * time.Minute), Seconds: 38.4}
}

func failed(n int, c station.Code, fields map[string]string) *station.Verdict {
	v := passed(n)
	v.Pass, v.Code, v.Fields, v.Step, v.Seconds = false, c, fields, station.StepFlash, 12.2
	return v
}

// work is a shift in which 412 units passed; heads are its heads.
func work(heads ...station.Head) station.View {
	v := station.View{Now: noon, Station: "line-3", Product: "sensor-x1", Order: "PO-1234", Operator: "Mai Nguyễn", Phase: station.PhaseWork,
		Ask: station.AskSerial, Heads: heads,
		Counts: station.Counts{Passed: 412, Failed: 3, Reworked: 2, Scrapped: 1, Reprinted: 4, FirstPass: 405, FirstTried: 415, PerHour: 67.6, Left: 4588}}
	for i := range 10 {
		l := passed(399 - i)
		if i == 3 {
			l = failed(396, station.CodeProbe, nil)
		}
		v.Last = append(v.Last, *l)
	}
	for i := range v.Heads {
		v.Heads[i].Number = i + 1
	}
	return v
}

var (
	idle    = station.Head{State: station.HeadIdle}
	working = station.Head{State: station.HeadWorking, Serial: "TM26-000401", Step: station.StepFlash, Index: 4, Of: 7, Started: noon.Add(-21 * time.Second), Stepped: noon.Add(-8 * time.Second)}
	asking  = station.Head{State: station.HeadAsking, Serial: "TM26-000402", Step: station.StepScan, Index: 6, Of: 7, Started: noon.Add(-31 * time.Second), Stepped: noon.Add(-2 * time.Second)}
	waiting = station.Head{State: station.HeadWaiting, Serial: "TM26-000403", Step: station.StepMint, Index: 2, Of: 7, Started: noon.Add(-90 * time.Second), Waiting: station.CodeToken}
	good    = station.Head{State: station.HeadPassed, Serial: "TM26-000404", Verdict: passed(404)}
	bad     = station.Head{State: station.HeadFailed, Serial: "TM26-000405", Verdict: failed(405, station.CodeFlash, nil)}
	worse   = station.Head{State: station.HeadFailed, Serial: "TM26-000406", Verdict: failed(406, station.CodeTwice, map[string]string{"serial": "TM26-000017"})}
)

// scenes are what a shift can look like.
func scenes() map[string]station.View {
	with := func(v station.View, f func(*station.View)) station.View { f(&v); return v }
	before := func(ask station.Ask, phase station.Phase) station.View {
		return station.View{Now: noon, Station: "line-3", Product: "sensor-x1", Order: "PO-1234", Phase: phase, Ask: ask, Heads: []station.Head{{Number: 1, State: station.HeadIdle}}, Counts: station.Counts{Left: 5000}}
	}
	checks := []station.Check{{Name: "clock", State: station.CheckOK}, {Name: "disk", State: station.CheckOK}, {Name: "ledger", State: station.CheckOK},
		{Name: "token", State: station.CheckFailed, Code: station.CodeToken, Detail: "opening token \"line-3\": CKR_DEVICE_REMOVED"}, {Name: "order", State: station.CheckOK},
		{Name: "printer", State: station.CheckFailed, Code: station.CodePrinter, Detail: "dialling 10.0.0.7:9100: no route to host"},
		{Name: "golden", State: station.CheckRunning}, {Name: "fixture", State: station.CheckWaiting}, {Name: "oven", State: station.CheckWaiting}}
	six := []station.Head{working, good, bad, waiting, asking, idle}
	eight := append(slices.Clone(six), worse, good)
	all := map[string]station.View{
		"badge": before(station.AskBadge, station.PhaseBadge),
		"badge-unknown": with(before(station.AskBadge, station.PhaseBadge), func(v *station.View) {
			v.Notice = station.CodeBadge
		}),
		"pin":    before(station.AskPIN, station.PhaseBadge),
		"checks": with(before(station.AskRetry, station.PhaseChecks), func(v *station.View) { v.Operator, v.Checks = "Mai Nguyễn", checks }),
		"ended":  with(work(idle), func(v *station.View) { v.Phase, v.Ask = station.PhaseEnded, station.AskNothing }),
		"idle":   work(idle), "working": work(working), "asking": with(work(asking), func(v *station.View) { v.Ask, v.AskHead = station.AskLabel, 1 }),
		"waiting": with(work(waiting), func(v *station.View) { v.Ask = station.AskNothing }), "pass": work(good), "fail": work(bad), "fail-long": work(worse),
		"fail-dry": with(work(bad), func(v *station.View) {
			d := *v.Heads[0].Verdict
			d.DryRun, v.DryRun, v.Heads[0].Verdict = true, true, &d
		}),
		"pass-retry": with(work(good), func(v *station.View) {
			d := *v.Heads[0].Verdict
			d.Attempt, v.Heads[0].Verdict = 2, &d
		}),
		"help": with(work(bad), func(v *station.View) {
			v.Help, v.Lamps = true, []station.Code{station.LampHooks}
			v.LampFields = map[station.Code]map[string]string{station.LampHooks: {"depth": "12"}}
		}),
		"notice": with(work(good), func(v *station.View) {
			v.Notice, v.Fields = station.CodeMade, map[string]string{"serial": "TM26-000311", "when": "2026-11-20 09:12", "operator": "Mai Nguyễn", "station": "line-2"}
		}),
		"rework-serial": with(work(good), func(v *station.View) { v.Function = station.Rework }),
		"rework-reason": with(work(good), func(v *station.View) {
			v.Function, v.Subject, v.Ask, v.Reasons, v.Notice, v.Fields = station.Rework, "TM26-000311", station.AskReason, station.ReworkReasons, station.CodeNotSerial, map[string]string{"scan": "9"}
		}),
		"scrap-confirm": with(work(good), func(v *station.View) { v.Function, v.Subject, v.Ask = station.Scrap, "TM26-000311", station.AskConfirm }),
		"reprint-confirm": with(work(good), func(v *station.View) {
			v.Function, v.Subject, v.Ask = station.Reprint, "TM26-000311", station.AskConfirm
		}),
		"end-confirm": with(work(good), func(v *station.View) { v.Function, v.Ask = station.End, station.AskConfirm }),
		"lamps": with(work(working), func(v *station.View) {
			v.Lamps = []station.Code{station.LampHooks, station.LampQuota, station.LampAnchor}
			v.LampFields = map[station.Code]map[string]string{station.LampHooks: {"depth": "12"}, station.LampQuota: {"left": "50"}}
		}),
	}
	for n := 2; n <= 8; n++ {
		all[fmt.Sprintf("heads-%d", n)] = work(slices.Clone(eight[:n])...)
		all[fmt.Sprintf("heads-%d-fail", n)] = work(slices.Repeat([]station.Head{bad, worse}, 4)[:n]...)
	}
	return all
}

// plain is what a terminal without colours shows.
func plain(lines []string) string {
	out := make([]string, len(lines))
	for i, l := range lines {
		out[i] = strings.TrimRight(ansi.Strip(l), " ")
	}
	return strings.Join(out, "\n") + "\n"
}

// exact fails unless d fills the terminal to the column.
func exact(t *testing.T, d *drawing) []string {
	t.Helper()
	lines := d.lines()
	if len(lines) != d.h {
		t.Errorf("%d lines, want %d", len(lines), d.h)
	}
	for i, l := range lines {
		if w := ansi.StringWidth(l); w != d.w {
			t.Errorf("line %d is %d columns, want %d: %q", i+1, w, d.w, ansi.Strip(l))
		}
		if strings.ContainsAny(ansi.Strip(l), "\t\r\n\x1b\a") {
			t.Errorf("line %d: %q", i+1, l)
		}
	}
	return lines
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".txt")
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o666); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; -update rewrites it:\n%s", path, got)
	}
}

// TestScreens draws every phase, ask and number of heads at two sizes, and compares what would be read.
func TestScreens(t *testing.T) {
	for name, v := range scenes() {
		for _, size := range [][2]int{{80, 24}, {132, 43}} {
			t.Run(fmt.Sprintf("%s/%dx%d", name, size[0], size[1]), func(t *testing.T) {
				d := &drawing{View: v, text: text(t, "en"), w: size[0], h: size[1]}
				if v.Ask == station.AskPIN {
					d.input, d.dots = "2468", true
				}
				golden(t, fmt.Sprintf("%dx%d/%s", size[0], size[1], name), plain(exact(t, d)))
			})
		}
	}
}

// TestASCII: the same without a character that a plain terminal does not have.
func TestASCII(t *testing.T) {
	for name, v := range scenes() {
		for _, lang := range []string{"en", "de", "es", "vi"} {
			d := &drawing{View: v, text: text(t, lang), w: 80, h: 24, ascii: true}
			got := plain(exact(t, d))
			if i := strings.IndexFunc(got, func(r rune) bool { return r > '~' || r < ' ' && r != '\n' }); i >= 0 {
				t.Errorf("%s, %s: %q", name, lang, got[i:min(len(got), i+20)])
			}
			if lang == "en" || name == "fail" {
				golden(t, "ascii/"+lang+"-"+name, got)
			}
		}
	}
}

// TestLanguages: FAIL and the busiest pages in every language; every page fits in every language.
func TestLanguages(t *testing.T) {
	for _, lang := range texts.Languages() {
		busy := work(idle)
		busy.Counts = station.Counts{Passed: 99999, Failed: 9999, FirstPass: 9, FirstTried: 9, PerHour: 9999, Left: 99999}
		d := &drawing{View: busy, text: text(t, lang), w: 80, h: 24}
		if lines := d.lines(); strings.Contains(plain([]string{lines[17], lines[23]}), "…") {
			t.Errorf("%s: counts or keys are cut:\n%s", lang, plain(lines))
		}
		for name, v := range scenes() {
			d := &drawing{View: v, text: text(t, lang), w: 80, h: 24}
			got := plain(exact(t, d))
			if slices.Contains([]string{"fail", "checks", "help", "heads-4", "rework-reason"}, name) {
				golden(t, "lang/"+lang+"-"+name, got)
			}
			if d.w = 132; strings.Contains(plain(exact(t, d)), "function.") {
				t.Errorf("%s, %s: a key instead of its word", lang, name)
			}
		}
	}
}

// TestSmall: whatever is left of a terminal shows the verdict and its code.
func TestSmall(t *testing.T) {
	for name, v := range scenes() {
		for _, size := range [][2]int{{79, 24}, {80, 23}, {40, 12}, {20, 10}, {10, 3}, {1, 1}} {
			exact(t, &drawing{View: v, text: text(t, "de"), w: size[0], h: size[1]})
		}
		golden(t, "40x12/"+name, plain((&drawing{View: v, text: text(t, "en"), w: 40, h: 12}).lines()))
	}
	got := plain((&drawing{View: scenes()["heads-8-fail"], text: text(t, "vi"), w: 40, h: 12}).lines())
	for _, want := range []string{"40x12", "1 FAIL E-411", "8 FAIL E-604"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
}

// TestManyHeads: more than there is room for are no reason to fall over.
func TestManyHeads(t *testing.T) {
	for n := range 50 {
		v := work(slices.Repeat([]station.Head{working, good, bad, waiting, asking}, 10)[:n]...)
		for _, ascii := range []bool{false, true} {
			exact(t, &drawing{View: v, text: text(t, "en"), w: 80, h: 24, ascii: ascii})
		}
	}
}

// TestEveryCode: for every code in every language, sentence and action are whole on the screen, both as a verdict on one head and as a
// notice.
func TestEveryCode(t *testing.T) {
	fields := map[string]string{"serial": "TM26-000311-B7", "scan": "(21)TM26-000311(10)K77", "when": "2026-11-20 09:12", "operator": "Mai Nguyễn", "station": "line-2", "head": "2",
		"tries": "3", "order": "PO-2026-1234", "want": "sensor-x1", "found": "sensor-x1-pro", "from": "2026-11-20 09:12", "until": "2026-11-20 09:12", "quantity": "5000",
		"where": "/var/lib/touchmark", "owner": "touchmark mint, 4711", "depth": "12", "left": "50"}
	squeeze := func(s string) string { return strings.NewReplacer(" ", "", "\n", "").Replace(s) }
	for _, lang := range texts.Languages() {
		x := text(t, lang)
		for _, c := range station.Codes() {
			bad := bad
			bad.Verdict = failed(405, c, fields)
			as := map[string]station.View{"verdict": work(bad), "notice": work(good)}
			n := as["notice"]
			n.Notice, n.Fields = c, fields
			as["notice"] = n
			for how, v := range as {
				for _, ascii := range []bool{false, lang != "zh"} {
					d := &drawing{View: v, text: x, w: 80, h: 24, ascii: ascii}
					lines := exact(t, d)
					var b strings.Builder
					for _, l := range lines {
						if how == "verdict" {
							l = strings.Split(ansi.Strip(l), d.bar())[0]
						}
						b.WriteString(ansi.Strip(l) + "\n")
					}
					got := squeeze(b.String())
					for _, want := range []string{d.sentence(c, fields), d.fold(x.Action(c))} {
						if !strings.Contains(got, squeeze(want)) {
							t.Errorf("%s, %s, %s, ascii %v: %q is not whole on\n%s", lang, c, how, ascii, want, plain(lines))
						}
					}
				}
			}
		}
	}
}

// TestHostile: nothing from outside reaches the terminal but characters that are seen, in their place.
func TestHostile(t *testing.T) {
	evil := "\x1b]0;owned\a\x1b[2J\x1b[31m\u009b31mA\u202eB\u200b\u0301\u0301\u0301\r\n\t\x00\x7f" + "שלום" + strings.Repeat("界", 2000) + "\xff\xfe"
	fields := map[string]string{}
	for _, k := range []string{"serial", "scan", "when", "operator", "station", "head", "tries", "order", "want", "found", "from", "until", "quantity", "where", "owner", "depth", "left"} {
		fields[k] = evil
	}
	code := station.Code(evil)
	for name, v := range scenes() {
		for _, c := range []station.Code{code, station.CodeMade} {
			v := v
			v.Station, v.Product, v.Order, v.Operator, v.Subject, v.Notice, v.Fields = evil, evil, evil, evil, evil, c, fields
			v.Heads, v.Last, v.Checks = slices.Clone(v.Heads), slices.Clone(v.Last), slices.Clone(v.Checks)
			v.Lamps, v.LampFields, v.Reasons = []station.Code{c}, map[station.Code]map[string]string{c: fields}, []string{evil}
			v.Function = station.Function(evil)
			for i := range v.Heads {
				h := &v.Heads[i]
				h.Serial, h.Step, h.Waiting = evil, station.Step(evil), c
				if h.Verdict != nil {
					w := *h.Verdict
					w.Serial, w.Code, w.Fields, w.Detail, w.RegistrationID, h.Verdict = evil, c, fields, evil, evil, &w
				}
			}
			for i := range v.Last {
				v.Last[i].Serial, v.Last[i].Code = evil, c
			}
			for i := range v.Checks {
				k := &v.Checks[i]
				k.Name, k.Code, k.Detail, k.Fields = evil, c, evil, fields
			}
			for _, size := range [][2]int{{80, 24}, {132, 43}, {30, 8}} {
				for _, ascii := range []bool{false, true} {
					d := &drawing{View: v, text: text(t, "en"), w: size[0], h: size[1], input: evil, ascii: ascii}
					for i, l := range exact(t, d) {
						s := sgr.ReplaceAllString(l, "")
						for _, r := range s {
							if r < ' ' || r >= 0x7f && r < 0xa0 || r >= 0x300 && r < 0x370 || r >= 0x590 && r < 0x700 || r >= 0x200b && r < 0x2010 || r >= 0x202a && r < 0x202f || ascii && r > '~' {
								t.Fatalf("%s, %dx%d: %q in line %d: %q", name, d.w, d.h, r, i+1, l)
							}
						}
					}
				}
			}
		}
	}
}

// TestBig: every letter is drawn in every size as wide and high as it says.
func TestBig(t *testing.T) {
	for _, ascii := range []bool{false, true} {
		for _, at := range map[bool][]scale{false: scales, true: scalesASCII}[ascii] {
			for r := range glyphs {
				lines := big(string(r), at, ascii)
				if len(lines) != at.rows() {
					t.Errorf("%c at %v: %d rows", r, at, len(lines))
				}
				for _, l := range lines {
					if w := ansi.StringWidth(l); w != at.x*len(glyphs[r][0]) {
						t.Errorf("%c at %v: %d columns", r, at, w)
					}
				}
			}
		}
	}
	if big("pass", scales[0], false) != nil {
		t.Error("there are no small letters")
	}
	for _, c := range station.Codes() {
		if big(string(c), scales[0], true) == nil {
			t.Errorf("%s has no letters", c)
		}
	}
	var all []string
	for _, r := range slices.Sorted(maps.Keys(glyphs)) {
		all = append(all, big(string(r), scale{2, 2}, true)...)
		all = append(all, "")
		all = append(all, big(string(r), scale{1, 1}, false)...)
		all = append(all, "")
	}
	golden(t, "letters", plain(all))
}
