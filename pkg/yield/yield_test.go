package yield_test

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/yield"
)

// hostile is what nobody should name anything, and somebody will.
const hostile = "=1+1\"\\\n<script>alert(1)</script>&amp;'}ü\u202e"

type clock struct{ now time.Time }

func (c *clock) Now() time.Time { return c.now }

func newTally() (*yield.Tally, *clock) {
	c := &clock{time.Date(2026, 3, 1, 6, 0, 0, 0, time.UTC)}
	return yield.New(yield.Config{Station: "line-3", Order: "PO-1234", Product: hostile, Now: c.Now}), c
}

// shift is a morning: 100 units every 30 s; every tenth fails at first, of these one in two passes when tried again, and the
// others go to rework, where the last is scrapped. One that passed is reworked, and fails.
func shift() (*yield.Tally, *clock) {
	t, c := newTally()
	t.SetLeft(500)
	for i := range 100 {
		c.now = c.now.Add(30 * time.Second)
		steps := []yield.Step{{"probe", 800 * time.Millisecond}, {"flash", time.Duration(10+i%10) * time.Second}}
		if i%10 != 9 {
			t.Try(yield.Try{Pass: true, Steps: steps})
			continue
		}
		t.Try(yield.Try{Code: []string{"E-411", "E-421", "E-411"}[i/10%3], Steps: steps})
		if i/10%2 == 0 {
			t.Try(yield.Try{Was: yield.Failed, Pass: true, Steps: steps})
		} else {
			t.Rework()
		}
	}
	t.Scrap(yield.Failed)
	t.Rework()
	t.Try(yield.Try{Was: yield.Passed, Code: "E-601"})
	return t, c
}

func TestCounts(t *testing.T) {
	tally, c := shift()
	got := *tally.Report()
	codes, steps := got.Codes, got.Steps
	got.Codes, got.Steps = nil, nil
	want := yield.Report{Station: "line-3", Order: "PO-1234", Product: hostile, Start: c.now.Add(-50 * time.Minute), At: c.now,
		Passed: 94, Failed: 5, Scrapped: 1, Reworked: 6, Passes: 95, Fails: 11, FirstPasses: 90, FirstTries: 100, PerHour: 95 / (50.0 / 60), Left: 500}
	if math.Abs(got.PerHour-want.PerHour) > 1e-9 {
		t.Errorf("%v an hour, want %v", got.PerHour, want.PerHour)
	}
	got.PerHour = want.PerHour
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got.FirstPassYield() != 0.9 {
		t.Errorf("first-pass yield is %v", got.FirstPassYield())
	}
	if want := []yield.Code{{"E-411", 7}, {"E-421", 3}, {"E-601", 1}}; !slices.Equal(codes, want) {
		t.Errorf("codes are %v, want %v", codes, want)
	}
	if len(steps) != 2 || steps[0].Name != "probe" || steps[1].Name != "flash" || steps[1].Count != 105 || steps[0].Total != 84*time.Second {
		t.Errorf("steps are %+v", steps)
	}
	empty, _ := newTally()
	if r := empty.Report(); !math.IsNaN(r.FirstPassYield()) || r.PerHour != 0 || r.Left != -1 {
		t.Errorf("before the first: %+v", r)
	}
	// What was counted in another shift is not taken out of this one.
	empty.Scrap(yield.Passed)
	empty.Try(yield.Try{Was: yield.Failed, Pass: true})
	if r := empty.Report(); r.Passed != 1 || r.Failed != 0 || r.Scrapped != 1 || r.FirstTries != 0 {
		t.Errorf("of another shift: %+v", r)
	}
}

// The rate looks back an hour and no further, and a clock that is set does it no lasting harm.
func TestRate(t *testing.T) {
	tally, c := newTally()
	rate := func(want float64) {
		t.Helper()
		if got := tally.Report().PerHour; math.Abs(got-want) > want*0.02+1e-9 {
			t.Errorf("at %v: %v an hour, want %v", c.now, got, want)
		}
	}
	tally.Try(yield.Try{Pass: true})
	rate(60) // at least a minute
	for range 4 * 60 {
		c.now = c.now.Add(time.Minute)
		tally.Try(yield.Try{Pass: true})
		tally.Try(yield.Try{Pass: true})
		tally.Try(yield.Try{Code: "E-411"})
	}
	c.now = c.now.Add(59 * time.Second)
	rate(120)
	c.now = c.now.Add(30 * time.Minute)
	rate(60)
	c.now = c.now.Add(30 * time.Minute)
	rate(0)
	c.now = time.Unix(-1000, 0)
	tally.Try(yield.Try{Pass: true})
	if r := tally.Report(); r.PerHour != 60 {
		t.Errorf("with a clock before 1970: %v", r.PerHour)
	}
}

// Quantiles are within 5 % of the exact ones, whatever the times are.
func TestQuantiles(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for name, draw := range map[string]func() time.Duration{
		"even":   func() time.Duration { return time.Millisecond + time.Duration(r.Int64N(int64(time.Minute))) },
		"normal": func() time.Duration { return time.Duration(float64(time.Second) * (40 + 3*r.NormFloat64())) },
		"spread": func() time.Duration { return time.Duration(float64(time.Millisecond) * math.Exp(18*r.Float64())) },
		"two":    func() time.Duration { return []time.Duration{2 * time.Second, time.Hour}[r.IntN(2)] },
		"edges": func() time.Duration {
			return time.Duration(float64(time.Millisecond) * math.Pow(1.1, float64(r.IntN(190))))
		},
		"same": func() time.Duration { return 1234567 * time.Microsecond },
	} {
		for _, n := range []int{1, 2, 19, 20, 21, 10000} {
			tally, _ := newTally()
			all := make([]time.Duration, n)
			for i := range all {
				all[i] = draw()
				tally.Try(yield.Try{Pass: true, Steps: []yield.Step{{"s", all[i]}}})
			}
			slices.Sort(all)
			got := tally.Report().Steps[0]
			for q, v := range map[float64]time.Duration{0.5: got.P50, 0.95: got.P95} {
				exact := all[int(math.Ceil(q*float64(n)))-1]
				if off := math.Abs(float64(v-exact)) / float64(exact); off > 0.05 {
					t.Errorf("%s, %d times: the %v quantile is %v, exactly %v: %.1f %% off", name, n, q, v, exact, 100*off)
				}
			}
		}
	}
	for d, want := range map[time.Duration]time.Duration{0: time.Millisecond, -time.Hour: time.Millisecond, math.MaxInt64: 24 * time.Hour, 24 * time.Hour: 24 * time.Hour} {
		tally, _ := newTally()
		tally.Try(yield.Try{Steps: []yield.Step{{"s", d}}})
		if got := tally.Report().Steps[0].P50; float64(got) < 0.95*float64(want) || got > want {
			t.Errorf("%v is taken for %v", d, got)
		}
	}
}

// A unit costs no memory, and names from outside are bounded.
func TestUnitsCostNothing(t *testing.T) {
	tally, _ := shift()
	v := yield.Try{Code: "E-411", Steps: []yield.Step{{"probe", time.Second}, {"flash", time.Minute}}}
	if n := testing.AllocsPerRun(1000, func() { tally.Try(v) }); n != 0 {
		t.Errorf("a unit costs %v allocations", n)
	}
	for i := range 5000 {
		name := "x" + strconv.Itoa(i)
		tally.Try(yield.Try{Code: name, Steps: []yield.Step{{name, time.Second}}})
	}
	for _, bad := range []string{"", hostile, "a b", strings.Repeat("x", 33)} {
		tally.Try(yield.Try{Code: bad, Steps: []yield.Step{{bad, time.Second}}})
	}
	r := tally.Report()
	if len(r.Codes) != 256 || len(r.Steps) != 64 || r.Codes[0].Code != "other" {
		t.Errorf("%d codes, %d steps, most frequent is %v", len(r.Codes), len(r.Steps), r.Codes[0])
	}
	sum := int64(0)
	for _, c := range r.Codes {
		sum += c.Count
	}
	if sum != r.Fails {
		t.Errorf("the codes make %d, and there were %d failures", sum, r.Fails)
	}
}

func TestManyAtOnce(t *testing.T) {
	tally, _ := newTally()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 1000 {
				tally.Try(yield.Try{Pass: true, Steps: []yield.Step{{"s", time.Second}}})
				_ = tally.Report().FirstPassYield()
			}
		})
	}
	wg.Wait()
	if r := tally.Report(); r.Passed != 8000 || r.Steps[0].Count != 8000 {
		t.Errorf("%+v", r)
	}
}

// parseMetrics reads metrics with the parsers of Prometheus' client for Python: its strict one for OpenMetrics.
func parseMetrics(t *testing.T, parser, text string) map[string]float64 {
	t.Helper()
	const program = `import json, sys
from prometheus_client.%s import text_string_to_metric_families as parse
out = {}
for family in parse(sys.stdin.read()):
    for s in family.samples:
        key = json.dumps([family.type, s.name, sorted(s.labels.items())], ensure_ascii=False)
        assert key not in out, key
        out[key] = s.value
json.dump(out, sys.stdout)
`
	cmd := exec.Command("/usr/bin/python3", "-c", fmt.Sprintf(program, parser))
	cmd.Stdin = strings.NewReader(text)
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && !bytes.Contains(exit.Stderr, []byte("ModuleNotFoundError")) {
			t.Fatalf("%s\n%s", exit.Stderr, text)
		}
		hsmtest.Require(t, "python3-prometheus-client")
	}
	var samples map[string]float64
	if err := json.Unmarshal(out, &samples); err != nil {
		t.Fatal(err)
	}
	return samples
}

func TestMetrics(t *testing.T) {
	tally, c := shift()
	key := func(kind, name string, labels ...[2]string) string {
		var b bytes.Buffer
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(false)
		if labels == nil {
			labels = [][2]string{}
		}
		if err := e.Encode([]any{kind, "touchmark_yield_" + name, labels}); err != nil {
			t.Fatal(err)
		}
		return strings.ReplaceAll(strings.TrimSpace(b.String()), ",", ", ")
	}
	report := tally.Report()
	want := map[string]float64{
		key("gauge", "info", [2]string{"order", "PO-1234"}, [2]string{"product", hostile}, [2]string{"station", "line-3"}): 1,
		key("gauge", "start_timestamp_seconds"):                                                   float64(c.now.Add(-50 * time.Minute).Unix()),
		key("gauge", "units", [2]string{"standing", "passed"}):                                    94,
		key("gauge", "units", [2]string{"standing", "failed"}):                                    5,
		key("gauge", "units", [2]string{"standing", "scrapped"}):                                  1,
		key("counter", "verdicts_total", [2]string{"verdict", "pass"}):                            95,
		key("counter", "verdicts_total", [2]string{"verdict", "fail"}):                            11,
		key("counter", "reworks_total"):                                                           6,
		key("counter", "first_tries_total"):                                                       100,
		key("counter", "first_passes_total"):                                                      90,
		key("counter", "failures_total", [2]string{"code", "E-411"}):                              7,
		key("counter", "failures_total", [2]string{"code", "E-421"}):                              3,
		key("counter", "failures_total", [2]string{"code", "E-601"}):                              1,
		key("gauge", "passes_per_hour"):                                                           report.PerHour,
		key("gauge", "order_left"):                                                                500,
		key("summary", "step_seconds", [2]string{"quantile", "0.5"}, [2]string{"step", "probe"}):  report.Steps[0].P50.Seconds(),
		key("summary", "step_seconds", [2]string{"quantile", "0.95"}, [2]string{"step", "probe"}): report.Steps[0].P95.Seconds(),
		key("summary", "step_seconds_sum", [2]string{"step", "probe"}):                            84,
		key("summary", "step_seconds_count", [2]string{"step", "probe"}):                          105,
		key("summary", "step_seconds", [2]string{"quantile", "0.5"}, [2]string{"step", "flash"}):  report.Steps[1].P50.Seconds(),
		key("summary", "step_seconds", [2]string{"quantile", "0.95"}, [2]string{"step", "flash"}): report.Steps[1].P95.Seconds(),
		key("summary", "step_seconds_sum", [2]string{"step", "flash"}):                            report.Steps[1].Total.Seconds(),
		key("summary", "step_seconds_count", [2]string{"step", "flash"}):                          105,
	}
	server := httptest.NewServer(tally.Handler())
	defer server.Close()
	get := func(accept string) (contentType, body string) {
		req, err := http.NewRequestWithContext(t.Context(), "GET", server.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Accept", accept)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.Header.Get("Content-Type"), string(b)
	}
	path := filepath.Join(t.TempDir(), "touchmark.prom")
	for range 2 { // over the last one
		if err := tally.WriteFile(path); err != nil {
			t.Fatal(err)
		}
	}
	file, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o644 {
		t.Errorf("%v, %v: others cannot read it", info.Mode(), err)
	}
	kind, plain := get("text/plain")
	if kind != string(yield.Text) || plain != string(file) {
		t.Errorf("%s: %s", kind, plain)
	}
	kind, open := get("application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1")
	if kind != string(yield.OpenMetrics) {
		t.Error(kind)
	}
	for parser, text := range map[string]string{"openmetrics.parser": open, "parser": plain} {
		got := parseMetrics(t, parser, text)
		for k, v := range want {
			if g, ok := got[k]; !ok || math.Abs(g-v) > 1e-9*math.Abs(v) {
				t.Errorf("%s: %s is %v, want %v", parser, k, g, v)
			}
		}
		if len(got) != len(want) {
			t.Errorf("%s: %d samples, want %d: %v", parser, len(got), len(want), got)
		}
	}
	res, err := http.Post(server.URL, "text/plain", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _ = res.Body.Close(); res.StatusCode != 405 {
		t.Error(res.Status)
	}
	empty, _ := newTally()
	for f, parser := range map[yield.Format]string{yield.OpenMetrics: "openmetrics.parser", yield.Text: "parser"} {
		var b strings.Builder
		if err := empty.Report().WriteMetrics(&b, f); err != nil {
			t.Fatal(err)
		}
		if got := parseMetrics(t, parser, b.String()); len(got) != 11 {
			t.Errorf("before the first unit: %v", got)
		}
	}
}

func TestCSV(t *testing.T) {
	tally, _ := shift()
	var b bytes.Buffer
	if err := tally.Report().WriteCSV(&b); err != nil {
		t.Fatal(err)
	}
	rows, err := csv.NewReader(&b).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, r := range rows {
		got[r[0]+" "+r[1]] = r[2]
	}
	for k, v := range map[string]string{
		"measure name": "value", "about station": "line-3", "about product": "'" + hostile, "about start": "2026-03-01T06:00:00Z", "about end": "2026-03-01T06:50:00Z",
		"units passed": "94", "units failed": "5", "units scrapped": "1", "units reworked": "6", "verdicts pass": "95", "verdicts fail": "11",
		"first yield": "0.9000", "rate passes-per-hour": "114.0", "order left": "500", "failures E-411": "7", "step-count flash": "105",
	} {
		if got[k] != v {
			t.Errorf("%s is %q, want %q", k, got[k], v)
		}
	}
	if p50, err := strconv.ParseFloat(got["step-p50 flash"], 64); err != nil || p50 < 13 || p50 > 16 {
		t.Errorf("the median of flash is %v, %v", p50, err)
	}
	if err := tally.Report().WriteCSV(broken{}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("to a broken pipe: %v", err)
	}
}

type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, os.ErrClosed }

// The page is well-formed, needs nothing from elsewhere, runs nothing, and shows what it was given as text.
func TestHTML(t *testing.T) {
	tally, _ := shift()
	var b bytes.Buffer
	if err := tally.Report().WriteHTML(&b); err != nil {
		t.Fatal(err)
	}
	d := xml.NewDecoder(bytes.NewReader(b.Bytes()))
	var text strings.Builder
	bars := map[string][]float64{}
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		switch token := token.(type) {
		case xml.CharData:
			text.Write(token)
		case xml.StartElement:
			if slices.Contains([]string{"script", "link", "img", "iframe", "object", "image", "use", "a", "form", "base"}, token.Name.Local) {
				t.Errorf("the page has a <%s>", token.Name.Local)
			}
			attr := map[string]string{}
			for _, a := range token.Attr {
				attr[a.Name.Local] = a.Value
				if strings.HasPrefix(a.Name.Local, "on") || a.Name.Local == "style" || a.Name.Local == "src" || a.Name.Local == "href" {
					t.Errorf("<%s %s=%q>", token.Name.Local, a.Name.Local, a.Value)
				}
			}
			if token.Name.Local == "rect" {
				w, err := strconv.ParseFloat(attr["width"], 64)
				if err != nil {
					t.Error(err)
				}
				bars[attr["class"]] = append(bars[attr["class"]], w)
			}
		}
	}
	if s := b.String(); strings.Contains(s, "url(") || strings.Contains(s, "@import") || strings.Contains(strings.ReplaceAll(s, "http://www.w3.org/1999/xhtml", ""), "//") {
		t.Error("the page points elsewhere")
	}
	for _, want := range []string{hostile, "line-3", "PO-1234", "90.0 %", "E-411", "63.6 %", "2026-03-01 06:00 UTC", "500"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("the page does not show %q", want)
		}
	}
	if want := []float64{400, 171.4, 57.1}; !slices.Equal(bars["fail"], want) {
		t.Errorf("bars of failures are %v, want %v", bars["fail"], want)
	}
	if half, most := bars["half"], bars["most"]; len(half) != 2 || len(most) != 2 || most[1] != 400 || half[1] > most[1] || half[0] > most[0] || most[0] > 50 {
		t.Errorf("bars of steps are %v and %v", half, most)
	}
	empty, _ := newTally()
	b.Reset()
	if err := empty.Report().WriteHTML(&b); err != nil || strings.Contains(b.String(), "NaN") || strings.Contains(b.String(), "Left in") {
		t.Errorf("before the first unit: %v, %s", err, b.String())
	}
}
