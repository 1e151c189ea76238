package yield

import (
	_ "embed"
	"encoding/csv"
	"fmt"
	"html/template"
	"io"
	"math"
	"strconv"
	"strings"
	"time"
)

// WriteCSV writes the report as CSV (RFC 4180), one number or text per line: measure, name, value. Times are RFC 3339, in UTC;
// durations are seconds. Texts that a spreadsheet would take for a formula get a "'" in front.
func (r *Report) WriteCSV(w io.Writer) error {
	out := csv.NewWriter(w)
	line := func(measure, name, value string) { _ = out.Write([]string{measure, name, value}) } // the error stays for Flush
	text := func(s string) string {
		if s != "" && strings.Contains("=+-@\t\r", s[:1]) {
			s = "'" + s
		}
		return s
	}
	number := func(f float64) string { return strconv.FormatFloat(f, 'f', -1, 64) }
	seconds := func(d time.Duration) string { return number(float64(d.Round(time.Microsecond)) / 1e9) }
	line("measure", "name", "value")
	line("about", "station", text(r.Station))
	line("about", "order", text(r.Order))
	line("about", "product", text(r.Product))
	line("about", "start", r.Start.UTC().Format(time.RFC3339))
	line("about", "end", r.At.UTC().Format(time.RFC3339))
	for _, n := range []struct {
		measure, name string
		count         int64
	}{
		{"units", "passed", r.Passed}, {"units", "failed", r.Failed}, {"units", "scrapped", r.Scrapped}, {"units", "reworked", r.Reworked},
		{"verdicts", "pass", r.Passes}, {"verdicts", "fail", r.Fails}, {"first", "passes", r.FirstPasses}, {"first", "tries", r.FirstTries},
	} {
		line(n.measure, n.name, strconv.FormatInt(n.count, 10))
	}
	if y := r.FirstPassYield(); !math.IsNaN(y) {
		line("first", "yield", strconv.FormatFloat(y, 'f', 4, 64))
	}
	line("rate", "passes-per-hour", strconv.FormatFloat(r.PerHour, 'f', 1, 64))
	if r.Left >= 0 {
		line("order", "left", strconv.FormatInt(r.Left, 10))
	}
	for _, c := range r.Codes {
		line("failures", c.Code, strconv.FormatInt(c.Count, 10))
	}
	for _, s := range r.Steps {
		line("step-count", s.Name, strconv.FormatInt(s.Count, 10))
		line("step-p50", s.Name, seconds(s.P50))
		line("step-p95", s.Name, seconds(s.P95))
	}
	out.Flush()
	return out.Error()
}

//go:embed report.html
var page string

// WriteHTML writes the report as one page that needs nothing else: no script, no font, no picture from elsewhere. It is XHTML.
func (r *Report) WriteHTML(w io.Writer) error {
	t, err := template.New("report").Funcs(template.FuncMap{
		"time":  func(t time.Time) string { return t.Format("2006-01-02 15:04 MST") },
		"share": func(part, whole int64) string { return percent(float64(part) / float64(whole)) },
		"yield": func() string { return percent(r.FirstPassYield()) },
		"span": func(d time.Duration) string {
			if d < time.Minute {
				return fmt.Sprintf("%.2f s", d.Seconds())
			}
			return d.Round(time.Second).String()
		},
		// bar returns the length of a bar of at most 400.
		"bar": func(part, whole any) string {
			return strconv.FormatFloat(min(400, 400*amount(part)/max(1, amount(whole))), 'f', 1, 64)
		},
		"slowest": func() (most time.Duration) {
			for _, s := range r.Steps {
				most = max(most, s.P95)
			}
			return most
		},
	}).Parse(page)
	if err != nil {
		return err
	}
	return t.Execute(w, r)
}

func amount(v any) float64 {
	switch v := v.(type) {
	case int64:
		return float64(v)
	case time.Duration:
		return float64(v)
	}
	panic(fmt.Sprintf("a bar of %T", v))
}

func percent(f float64) string {
	if math.IsNaN(f) {
		return "–"
	}
	return fmt.Sprintf("%.1f %%", 100*f)
}
