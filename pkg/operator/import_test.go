package operator_test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/operator"
	"github.com/touchmark/touchmark/pkg/operator/azuretest"
)

func rowsOf(text string, cfg operator.RowsConfig) *operator.Rows {
	return operator.NewRows(strings.NewReader(text), cfg)
}

func symmetric(id string, more ...string) string {
	return `{"registrationId":"` + id + `","attestation":{"type":"symmetricKey"}` + strings.Join(more, "") + "}\n"
}

// What becomes of rows: new ones, the same, others, bad ones, with and without --update; over bulk calls and without them.
func TestImport(t *testing.T) {
	for _, noBulk := range []bool{false, true} {
		s := azuretest.Start(t, azuretest.Config{NoBulk: noBulk})
		c, ctx := client(t, s), t.Context()
		var text strings.Builder
		for i := range 35 {
			text.WriteString(symmetric(fmt.Sprintf("dev-%d", i)))
		}
		text.WriteString(symmetric("dev-1", `,"deviceId":"again"`)) // row 36: the ID is there already
		text.WriteString(symmetric("bad.", ""))                     // not an ID
		text.WriteString(symmetric("hubs", `,"iotHubs":["a"]`))     // the service refuses it, and all that it came with must not fall with it
		text.WriteString(symmetric("last"))
		run := func(cfg operator.ImportConfig) (operator.Counts, []operator.Verdict) {
			t.Helper()
			var all []operator.Verdict
			if noBulk {
				cfg.Parallel = 1
			}
			cfg.Report = func(v operator.Verdict) error {
				all = append(all, v)
				return nil
			}
			counts, err := c.Import(ctx, rowsOf(text.String(), operator.RowsConfig{Kind: operator.Individual}), cfg)
			if err != nil || counts.Rows != len(all) {
				t.Fatalf("%+v, %v, %d verdicts", counts, err, len(all))
			}
			if !slices.IsSortedFunc(all, func(a, b operator.Verdict) int { return a.Line - b.Line }) {
				t.Error("verdicts are not in the order of the rows")
			}
			return counts, all
		}
		if counts, _ := run(operator.ImportConfig{DryRun: true}); counts.New != 38 || counts.Invalid != 1 || s.Len() != 0 {
			t.Errorf("dry run: %+v, and %d are there", counts, s.Len())
		}
		want := operator.Counts{Rows: 39, New: 36, Conflicting: 1, Invalid: 1, Failed: 1}
		counts, all := run(operator.ImportConfig{})
		if counts != want {
			t.Errorf("%+v, not %+v", counts, want)
		}
		if v := all[35]; v.Outcome != operator.OutcomeConflicting || len(v.Changes) != 1 || v.Changes[0].Member != "deviceId" {
			t.Errorf("%+v", v)
		}
		if v := all[37]; v.Outcome != operator.OutcomeFailed || v.Code != dps.CodeInvalidArgument || !strings.Contains(v.Reason, "allocationPolicy must be specified") {
			t.Errorf("%+v", v)
		}
		p, _ := s.Keys("", "dev-0")
		want.New, want.Unchanged = 0, 36
		if counts, _ := run(operator.ImportConfig{}); counts != want {
			t.Errorf("again: %+v, not %+v", counts, want)
		}
		if counts, _ := run(operator.ImportConfig{SkipExisting: true}); counts.Skipped != 37 {
			t.Errorf("skipping: %+v", counts)
		}
		if counts, _ := run(operator.ImportConfig{Update: true, DryRun: true}); counts.Updated != 1 {
			t.Errorf("what an update would do: %+v", counts)
		}
		if counts, _ := run(operator.ImportConfig{Update: true}); counts.Updated != 1 || counts.Unchanged != 36 {
			t.Errorf("update: %+v", counts)
		}
		if q, _ := s.Keys("", "dev-0"); p != q {
			t.Error("importing what is there made another key")
		}
		if counts, all := run(operator.ImportConfig{StopOnError: true, SkipExisting: true}); counts.Invalid != 1 || len(all) != 39 && len(all) < 37 {
			t.Errorf("stop: %+v", counts)
		}
		calls, _ := s.Calls()
		if noBulk && calls["POST enrollments"] != 5 {
			t.Errorf("in five imports a service without bulk calls was asked for them again and again: %v", calls)
		}
	}
}

// Rows of one ID keep their order, however many calls are under way.
func TestImportKeepsOrder(t *testing.T) {
	s := azuretest.Start(t, azuretest.Config{})
	c := client(t, s)
	var text strings.Builder
	for i := range 400 {
		text.WriteString(symmetric(fmt.Sprintf("D-%d", i%7), fmt.Sprintf(`,"initialTwin":{"tags":{"n":%d}}`, i)))
	}
	counts, err := c.Import(t.Context(), rowsOf(text.String(), operator.RowsConfig{}), operator.ImportConfig{Update: true, Parallel: 8})
	if err != nil || counts.New != 7 || counts.Updated != 393 {
		t.Fatalf("%+v, %v", counts, err)
	}
	for i := 393; i < 400; i++ {
		d, err := c.Get(t.Context(), operator.Individual, fmt.Sprintf("d-%d", i%7))
		if err != nil {
			t.Fatal(err)
		}
		if e, _ := d.Enrollment(); string(e.InitialTwin.Tags) != fmt.Sprintf(`{"n":%d}`, i) {
			t.Errorf("%s ends with %s, not %d", d, e.InitialTwin.Tags, i)
		}
	}
}

// An import that is cut off goes on where it stopped; one of a file that has changed begins again.
func TestJournal(t *testing.T) {
	s := azuretest.Start(t, azuretest.Config{})
	c := client(t, s)
	path := filepath.Join(t.TempDir(), "j")
	var text strings.Builder
	for i := range 500 {
		text.WriteString(symmetric(fmt.Sprintf("dev-%d", i)))
	}
	open := func() *operator.Journal {
		j, err := operator.OpenJournal(path, c.Host(), "mode")
		if err != nil {
			t.Fatal(err)
		}
		return j
	}
	ctx, cancel := context.WithCancel(t.Context())
	j := open()
	n := 0
	counts, err := c.Import(ctx, rowsOf(text.String(), operator.RowsConfig{}), operator.ImportConfig{Journal: j, Report: func(operator.Verdict) error {
		if n++; n == 100 {
			cancel()
		}
		return nil
	}})
	if !errors.Is(err, context.Canceled) || counts.Rows < 100 || counts.Rows > 400 || j.Flush() != nil {
		t.Fatalf("%+v, %v", counts, err)
	}
	before, _ := s.Calls()
	if _, err := c.Import(t.Context(), rowsOf(strings.Replace(text.String(), "dev-3", "other", 1), operator.RowsConfig{}), operator.ImportConfig{Journal: open()}); !errors.Is(err, operator.ErrOtherFile) {
		t.Errorf("the file has changed: %v", err)
	}
	if _, err := c.Import(t.Context(), rowsOf(symmetric("dev-0"), operator.RowsConfig{}), operator.ImportConfig{Journal: open()}); !errors.Is(err, operator.ErrOtherFile) {
		t.Errorf("the file is shorter: %v", err)
	}
	again, err := c.Import(t.Context(), rowsOf(text.String(), operator.RowsConfig{}), operator.ImportConfig{Journal: open()})
	if err != nil || again.Rows != 500 || s.Len() != 500 {
		t.Errorf("%+v, %v, %d are there", again, err, s.Len())
	}
	after, _ := s.Calls()
	const late = 4 // calls that were under way when it was cut off, and counted later
	if made := after["POST enrollments"] - before["POST enrollments"]; made > (500-counts.Rows)/10+1+late {
		t.Errorf("after %d rows of 500 the rest took %d calls", counts.Rows, made)
	}
	if other, err := operator.OpenJournal(path, "elsewhere", "mode"); err != nil || other.Counts.Rows != 0 {
		t.Errorf("another service: %+v, %v", other, err)
	}
}

// A service that throttles is waited for, whoever watches is told so, and all rows arrive.
func TestImportThrottled(t *testing.T) {
	s := azuretest.Start(t, azuretest.Config{Limit: 8, Window: 250 * time.Millisecond, RetryAfter: 1})
	var told atomic.Int64
	c := client(t, s, func(cfg *operator.Config) {
		cfg.Waiting = func(host string, d time.Duration) {
			if told.Add(1); host == "" || d != time.Second {
				t.Errorf("%s, %v", host, d)
			}
		}
	})
	var text strings.Builder
	for i := range 300 {
		text.WriteString(symmetric(fmt.Sprintf("dev-%d", i)))
	}
	counts, err := c.Import(t.Context(), rowsOf(text.String(), operator.RowsConfig{}), operator.ImportConfig{})
	calls, throttled := s.Calls()
	if err != nil || counts.New != 300 || throttled == 0 || throttled > 20 || told.Load() != int64(throttled) || c.Limiter().Rate() == 0 {
		t.Errorf("%+v, %v, calls %v, throttled %d, %.1f/s", counts, err, calls, throttled, c.Limiter().Rate())
	}
}

// A wrong key ends an import at once.
func TestImportUnauthorized(t *testing.T) {
	s := azuretest.Start(t, azuretest.Config{})
	s.Connection = s.Connection[:strings.Index(s.Connection, "SharedAccessKey=")] + "SharedAccessKey=" + key16
	counts, err := client(t, s).Import(t.Context(), rowsOf(symmetric("a"), operator.RowsConfig{}), operator.ImportConfig{})
	if !errors.Is(err, operator.ErrUnauthorized) || counts.Rows != 0 {
		t.Errorf("%+v, %v", counts, err)
	}
}

func TestCSV(t *testing.T) {
	ca, _ := authority(t, "CA")
	files := fstest.MapFS{"certs/ca.pem": {Data: asPEM(ca)}, "certs/ca.der": {Data: ca.Raw}, "secret": {Data: []byte("root:x:0:0")}}
	read := func(k operator.Kind, text string) (rows []operator.Row, err error) {
		for row, e := range rowsOf(text, operator.RowsConfig{Kind: k, Files: files, Hubs: map[string]string{"old": "new"}}).All() {
			if err = e; e == nil {
				rows = append(rows, row)
			}
		}
		return rows, err
	}
	rows, err := read(operator.Individual, "\ufeffREGISTRATIONID,deviceId,attestation,endorsementKey,certificate,primaryKey,secondaryKey,status,iotHubs,allocationPolicy,reprovision,edge,parent,tags,desired\r\n"+
		"a,A,,,,"+key16+",,Disabled,old x,HASHED,never,true,gate-7,\"{\"\"n\"\":1}\",\"{\"\"d\"\":[1]}\"\r\n"+
		"b,,x509,,certs/ca.pem,,,,,,,,,,\n"+
		"c,,,AAAA,,,,,,,,,,,\n"+
		"d,,symmetricKey,,,,,,,,,,,,\n")
	if err != nil || len(rows) != 4 {
		t.Fatalf("%d rows, %v", len(rows), err)
	}
	b, _ := json.Marshal(rows[0].Document)
	want := `{"registrationId":"a","deviceId":"A","attestation":{"type":"symmetricKey","symmetricKey":{"primaryKey":"` + key16 + `"}},"capabilities":{"iotEdge":true},` +
		`"initialTwin":{"tags":{"n":1},"properties":{"desired":{"d":[1]}}},"provisioningStatus":"disabled","reprovisionPolicy":{"updateHubAssignment":false,"migrateDeviceData":false},"allocationPolicy":"hashed","iotHubs":["new","x"],"parent":"gate-7"}`
	if string(b) != want || rows[0].Line != 2 || rows[3].Line != 5 {
		t.Errorf("line %d: %s\nnot %s", rows[0].Line, b, want)
	}
	if e, err := rows[1].Document.Enrollment(); err != nil || e.Attestation.X509.ClientCertificates.Primary.Certificate != wire(ca).Certificate {
		t.Errorf("%v", err)
	}
	for name, bad := range map[string]string{
		"escaping path":     "registrationId,certificate\na,../secret\n",
		"absolute path":     "registrationId,certificate\na,/etc/passwd\n",
		"Windows path":      "registrationId,certificate\na,..\\secret\n",
		"folder":            "registrationId,certificate\na,certs\n",
		"no certificate":    "registrationId,certificate\na,secret\n",
		"device":            "registrationId,certificate\na,/dev/zero\n",
		"two attestations":  "registrationId,certificate,primaryKey\na,certs/ca.der," + key16 + "\n",
		"named otherwise":   "registrationId,attestation,primaryKey\na,tpm," + key16 + "\n",
		"short key":         "registrationId,primaryKey\na,QUFB\n",
		"no base64":         "registrationId,primaryKey\na,secret-key!\n",
		"no attestation":    "registrationId\na\n",
		"tags no object":    "registrationId,attestation,tags\na,symmetricKey,[1]\n",
		"tags cut off":      "registrationId,attestation,tags\na,symmetricKey,\"{\"\"a\"\":\"\n",
		"edge":              "registrationId,attestation,edge\na,symmetricKey,perhaps\n",
		"policy":            "registrationId,attestation,reprovision\na,symmetricKey,always\n",
		"status":            "registrationId,attestation,status\na,symmetricKey,on\n",
		"ID":                "registrationId,attestation\n=cmd|calc,symmetricKey\n",
		"too few columns":   "registrationId,attestation\na\n",
		"too many columns":  "registrationId,attestation\na,symmetricKey,x\n",
		"control character": "registrationId,attestation\n\"a\x1b[2J\",symmetricKey\n",
	} {
		rows, err := read(operator.Individual, bad)
		if err != nil || len(rows) != 1 || rows[0].Err == nil || rows[0].Line != 2 {
			t.Errorf("%s: %+v, %v", name, rows, err)
			continue
		}
		if text := rows[0].Err.Error(); strings.Contains(text, "root:x") || strings.Contains(text, "secret-key") || strings.Contains(text, "QUFB") {
			t.Errorf("%s: %s", name, text)
		}
	}
	for name, bad := range map[string]string{
		"unknown column": "registrationId,attestation,colour\n", "a column twice": "registrationId,attestation,Attestation\n", "no ID": "attestation\n", "group's": "enrollmentGroupId,attestation\n",
		"open quote": "registrationId,attestation\n\"a,symmetricKey\n", "long row": "registrationId,attestation\n" + strings.Repeat("a", operator.MaxRow+10_000) + ",symmetricKey\n",
		"long header": strings.Repeat("a,", operator.MaxRow), "endless quote": "registrationId\n\"" + strings.Repeat("a\n", operator.MaxRow),
	} {
		if rows, err := read(operator.Individual, bad); err == nil || len(err.Error()) > 1000 {
			t.Errorf("%s: %d rows, %v", name, len(rows), err)
		}
	}
	rows, err = read(operator.Group, "enrollmentGroupId,caName\ng,root\n")
	if e, err2 := rows[0].Document.Enrollment(); err != nil || err2 != nil || e.Attestation.X509.CAReferences.Primary != "root" {
		t.Errorf("%v %v", err, err2)
	}
}

func TestJSONRows(t *testing.T) {
	count := func(text string, k operator.Kind) (good, bad int, err error) {
		for row, e := range rowsOf(text, operator.RowsConfig{Kind: k}).All() {
			switch {
			case e != nil:
				err = e
			case row.Err != nil:
				bad++
			default:
				good++
			}
		}
		return good, bad, err
	}
	one := strings.TrimSpace(symmetric("a", `,"etag":"x","initialTwin":{"tags":{"t":"}{\"\\"}}`))
	group := `{"enrollmentGroupId":"g","attestation":{"type":"symmetricKey"}}`
	for name, x := range map[string]struct {
		text      string
		good, bad int
		broken    bool
	}{
		"nothing": {"", 0, 0, false}, "lines": {one + "\n\n" + one + "\r\n", 2, 0, false}, "an array": {" [\n" + one + " ,\n" + one + "]\n", 2, 0, false}, "an empty array": {"[ ]", 0, 0, false},
		"pretty":           {strings.ReplaceAll(one, ",", ",\n  "), 1, 0, false},
		"a group":          {one + group, 1, 1, false},
		"both IDs":         {`{"registrationId":"a","enrollmentGroupId":"a"}`, 0, 1, false},
		"wrong types":      {`{"registrationId":7}{"registrationId":"a","attestation":"x"}`, 0, 2, false},
		"bad JSON inside":  {`{"registrationId":}` + one, 1, 1, false},
		"cut off":          {one + `{"registrationId":"b`, 1, 0, true},
		"open array":       {"[" + one, 1, 0, true},
		"no comma":         {"[" + one + one + "]", 1, 0, true},
		"behind the array": {"[" + one + "]" + one, 1, 0, true},
		"a comma too many": {"[" + one + ",]", 1, 0, true},
		"text":             {one + "\nhello", 1, 0, true},
		"too long":         {`{"registrationId":"` + strings.Repeat("a", operator.MaxRow) + `"}`, 0, 0, true},
		"deep":             {strings.Repeat(`{"a":`, operator.MaxRow), 0, 0, true},
		"deep enough":      {`{"registrationId":"a","x":` + strings.Repeat("[", 100_000) + `}`, 0, 1, false},
	} {
		good, bad, err := count(x.text, operator.Individual)
		if good != x.good || bad != x.bad || (err != nil) != x.broken {
			t.Errorf("%s: %d good, %d bad, %v", name, good, bad, err)
		}
	}
	if good, bad, err := count(one+group, ""); good != 2 || bad != 0 || err != nil {
		t.Errorf("both kinds: %d, %d, %v", good, bad, err)
	}
	if _, _, err := count("a,b\n", ""); err == nil {
		t.Error("a CSV file of no kind")
	}
}

// Whatever a file holds: rows are one thing or the other, what is read is written the same again, and nothing comes from outside of the
// folder.
func FuzzRows(f *testing.F) {
	f.Add([]byte("registrationId,deviceId,attestation,certificate,primaryKey,status,iotHubs,tags\na,b,symmetricKey,,,enabled,x y,\"{\"\"a\"\":1}\"\n"), false)
	f.Add([]byte("enrollmentGroupId,certificate\ng,c.pem\n"), true)
	f.Add([]byte("enrollmentGroupId,caName\ng,root\n"), true)
	f.Add([]byte(symmetric("a", `,"provisioningStatus":null,"initialTwin":{"tags":{"version":[1.0,"x"]}}`)), false)
	f.Add([]byte(`[{"registrationId":"a","attestation":{"type":"x509","x509":{"clientCertificates":{"primary":{"info":{"sha256Thumbprint":"00"}}}}}}]`), false)
	f.Fuzz(func(t *testing.T, b []byte, group bool) {
		k := operator.Individual
		if group {
			k = operator.Group
		}
		rows := operator.NewRows(strings.NewReader(string(b)), operator.RowsConfig{Kind: k, Files: fstest.MapFS{}})
		line := 0
		for row, err := range rows.All() {
			if err != nil {
				return
			}
			if row.Line < line || (row.Document == nil) == (row.Err == nil) {
				t.Fatalf("after line %d: %+v", line, row)
			}
			if line = row.Line; row.Err != nil {
				continue
			}
			text, err := json.Marshal(row.Document)
			if err != nil {
				t.Fatal(err)
			}
			again, err := operator.ParseDocument(text)
			if err != nil || again.ID != row.Document.ID || again.Kind != k || again.Check() != nil {
				t.Fatalf("%s: %v", text, err)
			}
			e, _ := again.Enrollment()
			changes, err := operator.Compare(again, row.Document, e.Attestation.SymmetricKey)
			if err == nil && len(changes) > 0 {
				t.Fatalf("%s is not itself: %v", text, changes)
			}
		}
	})
}

// The rate of an import beside the rate of the bare bulk calls.
func BenchmarkImport(b *testing.B) {
	const n = 2000
	var text strings.Builder
	var docs []*operator.Document
	for i := range n {
		row := symmetric(fmt.Sprintf("dev-%d", i), `,"initialTwin":{"tags":{"site":"A7"}}`)
		text.WriteString(row)
		docs = append(docs, doc(b, row))
	}
	var whole, bare time.Duration
	for b.Loop() {
		c, d := client(b, azuretest.Start(b, azuretest.Config{})), client(b, azuretest.Start(b, azuretest.Config{}))
		begun := time.Now()
		if counts, err := c.Import(b.Context(), rowsOf(text.String(), operator.RowsConfig{}), operator.ImportConfig{Parallel: 1}); err != nil || counts.New != n {
			b.Fatal(counts, err)
		}
		whole += time.Since(begun)
		begun = time.Now()
		for i := 0; i < n; i += operator.MaxBulk {
			if refused, _, err := d.Bulk(b.Context(), operator.BulkCreate, docs[i:i+operator.MaxBulk]); err != nil || len(refused) > 0 {
				b.Fatal(refused, err)
			}
		}
		bare += time.Since(begun)
	}
	b.ReportMetric(float64(whole)/float64(bare), "of-bare-calls")
	b.ReportMetric(n*float64(b.N)/whole.Seconds(), "rows/s")
}

// What a service shows of a certificate makes no enrollment: a dry run says so as the import does. Where the enrollment is, it is unchanged.
func TestDescribedCertificate(t *testing.T) {
	s := azuretest.Start(t, azuretest.Config{})
	c, ctx := client(t, s), t.Context()
	leaf := attesttest.Leaf(t, nil, "pump-1")
	row := func(certificate string) string {
		return `{"registrationId":"pump-1","attestation":{"type":"x509","x509":{"clientCertificates":{"primary":{` + certificate +
			`"info":{"sha256Thumbprint":"` + fmt.Sprintf("%X", sha256.Sum256(leaf.Certificate.Raw)) + `"}}}}}}`
	}
	run := func(row string, dry bool) (verdict operator.Verdict) {
		t.Helper()
		if _, err := c.Import(ctx, rowsOf(row, operator.RowsConfig{Kind: operator.Individual}), operator.ImportConfig{DryRun: dry, Report: func(v operator.Verdict) error {
			verdict = v
			return nil
		}}); err != nil {
			t.Fatal(err)
		}
		return verdict
	}
	for _, dry := range []bool{true, false} {
		if v := run(row(""), dry); v.Outcome != operator.OutcomeFailed || v.Reason == "" {
			t.Errorf("dry %t: %+v", dry, v)
		}
	}
	if v := run(row(`"certificate":"`+leaf.Base64()+`",`), false); v.Outcome != operator.OutcomeNew {
		t.Errorf("with its certificate: %+v", v)
	}
	for _, dry := range []bool{true, false} {
		if v := run(row(""), dry); v.Outcome != operator.OutcomeUnchanged {
			t.Errorf("once it is there, dry %t: %+v", dry, v)
		}
	}
}
