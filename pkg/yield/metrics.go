package yield

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/touchmark/touchmark/internal/durable"
)

// A Format is a text form of metrics.
type Format string

// The formats, by their content types.
const (
	// OpenMetrics is what Prometheus and others ask for over HTTP.
	OpenMetrics Format = "application/openmetrics-text; version=1.0.0; charset=utf-8"
	// Text is what everybody takes, and the only one that node_exporter reads from files.
	Text Format = "text/plain; version=0.0.4; charset=utf-8"
)

// WriteMetrics writes the report as metrics:
//
//	touchmark_yield_info{station,order,product}         1
//	touchmark_yield_start_timestamp_seconds             when counting began
//	touchmark_yield_units{standing}                     gauge: passed, failed, scrapped
//	touchmark_yield_verdicts_total{verdict}             pass, fail
//	touchmark_yield_reworks_total
//	touchmark_yield_first_tries_total                   units that were tried
//	touchmark_yield_first_passes_total                  and passed at once
//	touchmark_yield_failures_total{code}
//	touchmark_yield_passes_per_hour                     gauge
//	touchmark_yield_order_left                          gauge; not there where no order limits the units
//	touchmark_yield_step_seconds{step,quantile}         summary: 0.5, 0.95
func (r *Report) WriteMetrics(w io.Writer, f Format) error {
	var b bytes.Buffer
	family := func(name, kind, help string) {
		if kind == "counter" && f == Text {
			name += "_total" // OpenMetrics has it in the sample's name only
		}
		fmt.Fprintf(&b, "# TYPE touchmark_yield_%s %s\n# HELP touchmark_yield_%[1]s %[3]s\n", name, kind, help)
	}
	sample := func(name string, value float64, labels ...string) {
		b.WriteString("touchmark_yield_" + name)
		for i := 0; i < len(labels); i += 2 {
			b.WriteByte("{,"[min(i, 1)])
			b.WriteString(labels[i] + `="` + labelEscapes.Replace(strings.ToValidUTF8(labels[i+1], "\uFFFD")) + `"`)
		}
		if len(labels) > 0 {
			b.WriteByte('}')
		}
		b.WriteString(" " + strconv.FormatFloat(value, 'g', -1, 64) + "\n")
	}
	family("info", "gauge", "What is counted.")
	sample("info", 1, "station", r.Station, "order", r.Order, "product", r.Product)
	family("start_timestamp_seconds", "gauge", "When counting began.")
	sample("start_timestamp_seconds", float64(r.Start.UnixMilli())/1000)
	family("units", "gauge", "Units by how they stand.")
	sample("units", float64(r.Passed), "standing", "passed")
	sample("units", float64(r.Failed), "standing", "failed")
	sample("units", float64(r.Scrapped), "standing", "scrapped")
	family("verdicts", "counter", "Verdicts on units.")
	sample("verdicts_total", float64(r.Passes), "verdict", "pass")
	sample("verdicts_total", float64(r.Fails), "verdict", "fail")
	family("reworks", "counter", "Units that were worked on again.")
	sample("reworks_total", float64(r.Reworked))
	family("first_tries", "counter", "Units that were tried.")
	sample("first_tries_total", float64(r.FirstTries))
	family("first_passes", "counter", "Units that passed at their first try.")
	sample("first_passes_total", float64(r.FirstPasses))
	family("failures", "counter", "Verdicts FAIL by code.")
	for _, c := range r.Codes {
		sample("failures_total", float64(c.Count), "code", c.Code)
	}
	family("passes_per_hour", "gauge", "Verdicts PASS over the last hour.")
	sample("passes_per_hour", r.PerHour)
	if r.Left >= 0 {
		family("order_left", "gauge", "Units that the order still allows.")
		sample("order_left", float64(r.Left))
	}
	family("step_seconds", "summary", "How long steps take.")
	for _, s := range r.Steps {
		sample("step_seconds", s.P50.Seconds(), "step", s.Name, "quantile", "0.5")
		sample("step_seconds", s.P95.Seconds(), "step", s.Name, "quantile", "0.95")
		sample("step_seconds_sum", s.Total.Seconds(), "step", s.Name)
		sample("step_seconds_count", float64(s.Count), "step", s.Name)
	}
	if f == OpenMetrics {
		b.WriteString("# EOF\n")
	}
	_, err := w.Write(b.Bytes())
	return err
}

var labelEscapes = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// WriteFile puts the metrics into a file in the format Text, whole or not at all: for node_exporter's textfile collector, in its
// directory and with a name that ends in ".prom".
func (t *Tally) WriteFile(path string) error {
	var b bytes.Buffer
	if err := t.Report().WriteMetrics(&b, Text); err != nil {
		return err
	}
	if err := durable.Replace(path, b.Bytes(), 0o644); err != nil {
		return fmt.Errorf("writing metrics: %w", err)
	}
	return nil
}

// Handler serves the metrics, in the format that is asked for. Who may see them is for the caller to say.
func (t *Tally) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "only GET", http.StatusMethodNotAllowed)
			return
		}
		f := Text
		if strings.Contains(r.Header.Get("Accept"), "application/openmetrics-text") {
			f = OpenMetrics
		}
		w.Header().Set("Content-Type", string(f))
		w.Header().Set("Cache-Control", "no-store")
		_ = t.Report().WriteMetrics(w, f) // the other side went away
	})
}
