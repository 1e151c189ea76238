package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/station"
)

// Invariant 2: nothing is made that the owner did not order, in whatever way somebody tries, and the report of the order names the
// attempt where the line can know of it.
func TestOverProduction(t *testing.T) {
	r := newRig(t, "x509-group", "--counter", "line-3")
	touchmark(t, r.dir, "init", "line4", "--id-scope", "0ne00112233", "--key-uri", r.uri.String(), "--key-prefix", "l4-", "--owner", "owner.pem")
	copyDir := func(from, to string) {
		t.Helper()
		if err := os.CopyFS(r.path(to), os.DirFS(r.path(from))); err != nil {
			t.Fatal(err)
		}
	}
	edit := func(name, out, old, with string) {
		t.Helper()
		b, err := os.ReadFile(r.path(name))
		if err != nil || !bytes.Contains(b, []byte(old)) {
			t.Fatalf("%s has no %q: %v", name, old, err)
		}
		r.write(out, strings.Replace(string(b), old, with, 1))
	}
	make1 := func(line, order string, serials ...string) (int, string) {
		t.Helper()
		_ = r.mend()
		var in bytes.Buffer
		for _, s := range serials {
			fmt.Fprintf(&in, "{\"op\":\"make\",\"serial\":%q}\n{\"op\":\"wait\"}\n", s)
		}
		s := r.talk(&in, 0, r.station(line, order)...)
		text := s.stderr
		for _, serial := range serials {
			if v := s.verdicts[serial]; v != nil {
				text += fmt.Sprintf("%s pass=%v %s\n", serial, v.Pass, v.Code)
			}
		}
		return s.code, text
	}
	cli := func(args ...string) (int, string) { return attempt(t, r.dir, args...) }
	refused := func(c station.Code) string { return "pass=false " + string(c) }

	// What is allowed: two of two, one of which is scrapped; an order with a lease; one that is closed.
	r.order("PO-2", 2, "--serial-from", "SN200000", "--serial-to", "SN200009")
	if code, text := make1("line", "PO-2.order", "SN200000", "SN200001"); code != 0 || strings.Count(text, "pass=true") != 2 {
		t.Fatalf("exit code %d\n%s", code, text)
	}
	touchmark(t, r.dir, "unit", "scrap", "SN200001", "--line", "line", "--reason", "damaged", "--yes")
	r.order("PO-3", 3, "--serial-from", "SN300000", "--serial-to", "SN300009", "--station", "line4/station.pem")
	touchmark(t, r.dir, "order", "take", "PO-3.order", "--line", "line")
	touchmark(t, r.dir, "order", "lease", "PO-3", "--line", "line", "--station", "line4/station.pem", "--quantity", "1", "--name", "a", "--out", "a.lease")
	r.order("PO-4", 1, "--serial-pattern", "SN4#####")
	touchmark(t, r.dir, "order", "take", "PO-4.order", "--line", "line")
	_, _ = cli("order", "close", "PO-4", "--line", "line", "--out", "PO-4.report")
	r.order("PO-5", 1, "--serial-pattern", "SN5#####", "--from", "2098-01-01")
	r.order("PO-6", 1, "--serial-pattern", "SN6#####", "--from", "2001-01-01", "--until", "2001-02-01")
	r.order("PO-7", 1, "--serial-pattern", "SN7#####", "--holder", "line4/station.pem")
	r.order("PO-8", 1, "--serial-pattern", "SN8#####", "--id-scope", "0ne00999999")
	r.order("PO-9", 1, "--serial-pattern", "SN9#####", "--issuer", "line4/issuing.pem")
	touchmark(t, r.dir, "key", "new", "--store", r.office, "--name", "thief", "--algorithm", "EC-P256")
	touchmark(t, r.dir, "order", "permit", "PO-2", "SN200000", "--reason", "seen", "--store", r.office, "--key", "owner", "--out", "permit")
	touchmark(t, r.dir, "order", "permit", "PO-2", "SN200001", "--reason", "seen", "--store", r.office, "--key", "thief", "--out", "forged")
	r.write("two.csv", "serial\nSN100000\nSN300001\n")
	keep := func(name string) func() {
		b, err := os.ReadFile(r.path(name))
		if err != nil {
			t.Fatal(err)
		}
		return func() { r.write(name, string(b)) }
	}

	known := r.reported()
	for _, x := range []struct {
		name string
		do   func() (int, string)
		code int
		want string
		kind string // in a report; empty where the line cannot know, or it is not about an order
	}{
		{"more than the quantity", func() (int, string) { return make1("line", "PO-2", "SN200002") }, 0, refused(station.CodeOrderSpent), "spent"},
		{"a race for the last of an order", func() (int, string) {
			r.order("PO-10", 1, "--serial-pattern", "SN10####")
			s := r.talk(bytes.NewBufferString(`{"op":"make","serial":"SN100001"}`+"\n"+`{"op":"make","serial":"SN100002"}`+"\n"), 0, r.station("line", "PO-10.order")...)
			return s.code, fmt.Sprintf("%v %v%v", s.verdicts["SN100001"].Pass != s.verdicts["SN100002"].Pass, s.verdicts["SN100001"].Code, s.verdicts["SN100002"].Code)
		}, 0, "true E-203", "spent"},
		{"more by minting a list", func() (int, string) {
			r.order("PO-11", 1)
			return cli("mint", "--line", "line", "--profile", "x509-group", "--serials", "two.csv", "--out", "stamps", "--order", "PO-11.order")
		}, exitRefused, "PO-11 is spent", "spent"},
		{"room by voiding what is finished", func() (int, string) {
			r.order("PO-12", 1)
			make1("line", "PO-12.order", "SN120000")
			_, _ = cli("unit", "void", "SN120000", "--line", "line", "--reason", "mistake", "--yes")
			return make1("line", "PO-12", "SN120001")
		}, 0, refused(station.CodeOrderSpent), "spent"},
		{"two of a unit by rework", func() (int, string) {
			r.order("PO-13", 1)
			make1("line", "PO-13.order", "SN130000")
			touchmark(t, r.dir, "unit", "rework", "SN130000", "--line", "line", "--reason", "board", "--yes")
			r.write("again.csv", "serial\nSN130000\n")
			touchmark(t, r.dir, "mint", "--line", "line", "--profile", "x509-group", "--serials", "again.csv", "--out", "stamps", "--order", "PO-13")
			touchmark(t, r.dir, "unit", "rework", "SN130000", "--line", "line", "--reason", "board", "--yes")
			return make1("line", "PO-13", "SN130000", "SN130001")
		}, 0, "SN130000 pass=true \nSN130001 " + refused(station.CodeOrderSpent), "spent"},
		{"a serial beyond the range", func() (int, string) { return make1("line", "PO-3", "SN300010") }, 0, refused(station.CodeNotInOrder), "serial"},
		{"a serial that is leased to another", func() (int, string) { return make1("line", "PO-3", "SN300000") }, 0, refused(station.CodeNotInOrder), "serial"},
		{"a lease beyond what is left", func() (int, string) {
			return cli("order", "lease", "PO-3", "--line", "line", "--station", "line4/station.pem", "--quantity", "3", "--out", "b.lease")
		}, exitRefused, "PO-3 is spent", "spent"},
		{"a lease for oneself, cut for another", func() (int, string) { return make1("line", "a.lease", "SN300000") }, exitRefused, "for other stations", "station"},
		{"an order that is closed", func() (int, string) { return make1("line", "PO-4", "SN400000") }, exitRefused, "is closed", "closed"},
		{"an order of next year", func() (int, string) { return make1("line", "PO-5.order", "SN500000") }, exitRefused, "not valid yet", "early"},
		{"an order that has expired", func() (int, string) { return make1("line", "PO-6.order", "SN600000") }, exitRefused, "has expired", "expired"},
		{"another station's order", func() (int, string) { return make1("line", "PO-7.order", "SN700000") }, exitRefused, "for other stations", "station"},
		{"an order for another ID scope", func() (int, string) { return make1("line", "PO-8.order", "SN800000") }, exitRefused, "for something else", "product"},
		{"an order for another issuing CA", func() (int, string) { return make1("line", "PO-9.order", "SN900000") }, exitRefused, "for something else", "product"},
		{"another product's board", func() (int, string) {
			r.write("faults/probe.before", "echo product=valve; exit 0\n")
			return make1("line", "PO-3", "SN300002")
		}, 0, refused(station.CodeProduct), "product"},
		{"another profile", func() (int, string) {
			defer keep("line/station.toml")()
			edit("line/station.toml", "line/station.toml", `profile = "x509-group"`, `profile = "x509-individual"`)
			return make1("line", "PO-3", "SN300002")
		}, exitRefused, "it names profile x509-group", "product"},
		{"a profile that was changed", func() (int, string) {
			defer keep("line/profiles/x509-group.toml")()
			edit("line/profiles/x509-group.toml", "line/profiles/x509-group.toml", "days = 3650", "days = 3651")
			return make1("line", "PO-3", "SN300002")
		}, exitRefused, "content", "product"},
		{"an order that was edited", func() (int, string) {
			b, err := os.ReadFile(r.path("PO-3.order"))
			if err != nil {
				t.Fatal(err)
			}
			b[len(b)/2] ^= 1
			r.write("edited.order", string(b))
			return make1("line", "edited.order", "SN300002")
		}, exitUnverified, "", "edited"},
		{"an order of somebody else's", func() (int, string) {
			touchmark(t, r.dir, "order", "sign", "PO-3.toml", "--store", r.office, "--key", "thief", "--out", "stolen.order")
			return make1("line", "stolen.order", "SN300002")
		}, exitUnverified, "", "untrusted"},
		{"an order again, with more", func() (int, string) {
			edit("PO-2.toml", "more.toml", "quantity = 2", "quantity = 9")
			r.sign("more.toml", "more.order")
			return make1("line", "more.order", "SN200002")
		}, exitRefused, "another content", "replayed"},
		{"no order", func() (int, string) {
			return cli("mint", "--line", "line", "--profile", "x509-group", "--serials", "two.csv", "--out", "stamps")
		}, exitUsage, "without a production order", "no-order"},
		{"a unit twice", func() (int, string) { return make1("line", "PO-1", "SN200000") }, 0, refused(station.CodeMade), "duplicate"},
		{"a scrapped unit again", func() (int, string) { return make1("line", "PO-1", "SN200001") }, 0, refused(station.CodeScrapped), "scrapped"},
		{"a return that another permits", func() (int, string) {
			return cli("unit", "return", "SN200001", "--line", "line", "--permit", "forged")
		}, exitUnverified, "", ""},
		{"a return of another unit than was permitted", func() (int, string) {
			return cli("unit", "return", "SN200001", "--line", "line", "--permit", "permit")
		}, exitRefused, "the permit is not for SN200001", ""},
		{"a copy of the line, behind it", func() (int, string) {
			copyDir("line", "copy")
			if code, text := make1("line", "PO-1", "SN000100"); code != 0 || !strings.Contains(text, "pass=true") {
				t.Errorf("the line itself: exit code %d\n%s", code, text)
			}
			code, text := make1("copy", "PO-1", "SN000101")
			b, err := os.ReadFile(r.path("copy/" + refusalsFile)) // the copy writes it down; the line never sees it
			if err != nil || !bytes.Contains(b, []byte(`"rolled-back"`)) {
				t.Errorf("%v: %s", err, b)
			}
			return code, text
		}, exitUnverified, "it is a copy, or was restored from a backup", ""},
		{"yesterday's ledger", func() (int, string) {
			yesterday := keep("line/ledger.db")
			if code, text := make1("line", "PO-1", "SN000102"); code != 0 || !strings.Contains(text, "pass=true") {
				t.Errorf("today: exit code %d\n%s", code, text)
			}
			defer keep("line/ledger.db")()
			yesterday()
			return make1("line", "PO-1", "SN000103")
		}, exitUnverified, "it is a copy, or was restored from a backup", "rolled-back"},
		{"a line that forgot its counter", func() (int, string) {
			defer keep("line/touchmark.toml")()
			edit("line/touchmark.toml", "line/touchmark.toml", "counter = 'line-3'\n", "")
			return make1("line", "PO-1", "SN000103")
		}, exitFailed, "names none", "anchor"},
		{"a line with another counter", func() (int, string) {
			defer keep("line/touchmark.toml")()
			touchmark(t, r.dir, "token", "counter", "create", "--store", r.uri.String(), "--name", "other")
			edit("line/touchmark.toml", "line/touchmark.toml", "counter = 'line-3'", "counter = 'other'")
			return make1("line", "PO-1", "SN000103")
		}, exitFailed, "another ledger's", "anchor"},
	} {
		code, text := x.do()
		if code != x.code || !strings.Contains(text, x.want) {
			t.Errorf("%s: exit code %d, want %d and %q\n%s", x.name, code, x.code, x.want, text)
		}
		if x.kind == "" {
			continue
		}
		now := r.reported()
		if now[x.kind] <= known[x.kind] {
			t.Errorf("%s: no report names it as %q", x.name, x.kind)
		}
		known = now
	}
	// The sum of it: what lives, or is scrapped or voided, was ordered.
	touchmark(t, r.dir, "ledger", "verify", "--line", "line")
	for line := range strings.Lines(touchmark(t, r.dir, "order", "list", "--line", "line", "--json")) {
		var g struct {
			ID                      string
			Quantity, Spent, Leased int
		}
		if err := json.Unmarshal([]byte(line), &g); err != nil || g.Spent+g.Leased > g.Quantity {
			t.Errorf("%s: %v", line, err)
		}
	}
}

// reported counts the attempts that the reports of all orders name, by kind.
func (r *rig) reported() map[string]int {
	r.t.Helper()
	kinds := map[string]int{}
	for line := range strings.Lines(touchmark(r.t, r.dir, "order", "list", "--line", "line", "--json")) {
		var g struct{ ID string }
		if err := json.Unmarshal([]byte(line), &g); err != nil {
			r.t.Fatal(err)
		}
		var report struct{ Refused []struct{ Kind, Why string } }
		text := touchmark(r.t, r.dir, "order", "close", g.ID, "--keep-open", "--line", "line", "--out", "so-far.report", "--json")
		if err := json.Unmarshal([]byte(text), &report); err != nil {
			r.t.Fatal(err)
		}
		for _, x := range report.Refused {
			kinds[x.Kind]++
		}
	}
	return kinds
}
