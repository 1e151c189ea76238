package operator_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/operator"
	"github.com/touchmark/touchmark/pkg/operator/azuretest"
)

func client(t testing.TB, s *azuretest.Server, edit ...func(*operator.Config)) *operator.Client {
	t.Helper()
	c, err := operator.ParseConnection(s.Connection)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(s.CA)
	cfg := operator.Config{Connection: c, Roots: roots, Patience: 20 * time.Second}
	for _, f := range edit {
		f(&cfg)
	}
	return operator.New(cfg)
}

func doc(t testing.TB, text string) *operator.Document {
	t.Helper()
	d, err := operator.ParseDocument([]byte(text))
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return d
}

// authority makes a CA's certificate and what signs with it.
func authority(t testing.TB, name string) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	return sign(t, name, nil, nil)
}

func sign(t testing.TB, name string, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, IsCA: parent == nil, KeyUsage: x509.KeyUsageCertSign}
	if parent == nil {
		parent, parentKey = tmpl, key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c, key
}

func wire(c *x509.Certificate) *dps.X509Certificate {
	return &dps.X509Certificate{Certificate: base64.StdEncoding.EncodeToString(c.Raw)}
}

func asPEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

func groupOf(t testing.TB, id string, primary, secondary *x509.Certificate) *operator.Document {
	t.Helper()
	certs := &dps.X509Certificates{Primary: wire(primary)}
	if secondary != nil {
		certs.Secondary = wire(secondary)
	}
	d, err := operator.NewDocument(&dps.EnrollmentGroup{EnrollmentGroupID: id, Enrollment: dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{SigningCertificates: certs}}}})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

const key16 = "MDEyMzQ1Njc4OWFiY2RlZg=="

// The vector of service API, section 2.2.
func TestConnection(t *testing.T) {
	c, err := operator.ParseConnection("SharedAccessKey=MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=;hostname=example-dps.azure-devices-provisioning.net;SharedAccessKeyName=owner\n")
	if err != nil {
		t.Fatal(err)
	}
	token := c.Authorization(time.Unix(1893456000-3600, 0))
	if want := "sig=" + url.QueryEscape("a18q+skypd0IL1KwltuFVhaJ7Y5X4DvSzCU5kxi17iM=") + "&se=1893456000"; !strings.Contains(token, want) {
		t.Errorf("%s has no %s", token, want)
	}
	b, _ := json.Marshal(c)
	for _, text := range []string{fmt.Sprint(c), fmt.Sprintf("%+v", c), fmt.Sprintf("%#v", c), string(b)} {
		if strings.Contains(text, "MDEyMz") || strings.Contains(text, "0123456789") {
			t.Errorf("the key is in %s", text)
		}
	}
	c, err = operator.ParseConnection("HostName=h:8443;SharedAccessSignature=SharedAccessSignature sr=h&sig=x&se=1&skn=p")
	if err != nil || c.Authorization(time.Now()) != "SharedAccessSignature sr=h&sig=x&se=1&skn=p" {
		t.Errorf("a ready token: %v, %v", c, err)
	}
	for _, bad := range []string{"", "HostName=h", "HostName=h;SharedAccessKeyName=p;SharedAccessKey=!", "HostName=https://h/;SharedAccessKeyName=p;SharedAccessKey=" + key16,
		"HostName=h;HostName=g;SharedAccessKeyName=p;SharedAccessKey=" + key16, "HostName=h;SharedAccessKeyName=p\r\nX: y;SharedAccessKey=" + key16,
		"HostName=h:0;SharedAccessKeyName=p;SharedAccessKey=" + key16, "HostName=h@evil;SharedAccessKeyName=p;SharedAccessKey=" + key16, strings.Repeat("x", 9000)} {
		if _, err := operator.ParseConnection(bad); err == nil {
			t.Errorf("%.60q is a connection string", bad)
		} else if strings.Contains(err.Error(), key16) {
			t.Errorf("the key is in %v", err)
		}
	}
}

func FuzzConnection(f *testing.F) {
	f.Add("HostName=dps.example.net:8443;SharedAccessKeyName=owner;SharedAccessKey=AAAA\n")
	f.Add("hostname=[::1]:443;sharedaccesskeyname=o;sharedaccesskey=AAAA;x")
	f.Add("HostName=h;SharedAccessSignature=sr=h")
	f.Add(`{"Endpoint":"https://h","Token":"t","Subscription":"s","ResourceGroup":"g"}`)
	f.Add("Endpoint=https://h:1;Token=a=b;Subscription=s;ResourceGroup=g")
	f.Fuzz(func(t *testing.T, text string) {
		if c, err := operator.ParseConnection(text); err == nil {
			token := c.Authorization(time.Unix(1, 0))
			u, err := url.Parse("https://" + c.Host + "/")
			if strings.ContainsAny(token, "\r\n") || err != nil || u.Host != c.Host || u.User != nil {
				t.Fatalf("%q gives %q, %q", text, c.Host, token)
			}
		}
		if c, err := operator.ParseManagement(text); err == nil && (c.Host == "" || c.Subscription == "" || strings.Contains(c.Subscription, "/")) {
			t.Fatalf("%q gives %v", text, c)
		}
	})
}

func TestManagementConnection(t *testing.T) {
	for _, text := range []string{"Endpoint=https://h:8443/;Token=a.b.c==;Subscription=s;ResourceGroup=g;Scope=plant", `{"endpoint":"https://h:8443","token":"a.b.c==","subscription":"s","resourceGroup":"g","scope":"plant"}`} {
		c, err := operator.ParseManagement(text)
		if err != nil || c.Host != "h:8443" || c.Scope != "plant" || strings.Contains(fmt.Sprintf("%v %+v %#v", c, c, c), "a.b.c") {
			t.Errorf("%s: %v, %v", text, c, err)
		}
	}
	for _, bad := range []string{"", "{", "Endpoint=http://h;Token=t;Subscription=s;ResourceGroup=g", "Endpoint=https://h/x;Token=t;Subscription=s;ResourceGroup=g",
		"Endpoint=https://h;Token=;Subscription=s;ResourceGroup=g", "Endpoint=https://h;Token=t;Subscription=a/b;ResourceGroup=g", "Endpoint=https://h;Token=t u;Subscription=s;ResourceGroup=g"} {
		if _, err := operator.ParseManagement(bad); err == nil {
			t.Errorf("%q is a management connection", bad)
		}
	}
}

// Calls go as they come until one is throttled; then all wait, go on at half the rate, and faster by and by.
func TestLimiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l operator.Limiter
		begun := time.Now()
		for range 100 {
			_ = l.Wait(t.Context())
			time.Sleep(10 * time.Millisecond)
		}
		if d := time.Since(begun); d != time.Second {
			t.Errorf("100 calls that nobody throttled waited: %v", d)
		}
		l.Throttled(4 * time.Second)
		l.Throttled(4 * time.Second) // of another call at the same time
		if r := l.Rate(); r < 40 || r > 60 {
			t.Errorf("after 100 calls/s were too many: %.1f/s", r)
		}
		begun = time.Now()
		_ = l.Wait(t.Context())
		if d := time.Since(begun); d < 4*time.Second || d > 5*time.Second {
			t.Errorf("asked to wait for 4 s: %v", d)
		}
		begun = time.Now()
		n := 0
		for ; time.Since(begun) < 10*time.Second; n++ {
			_ = l.Wait(t.Context())
		}
		if n < 400 || n > 1300 || l.Rate() < 90 {
			t.Errorf("%d calls in the next 10 s, then %.1f/s", n, l.Rate())
		}
		l.Throttled(time.Hour)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := l.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a caller that gives up: %v", err)
		}
	})
}

// Two editors do not lose each other's change, and keys stay what they are although services do not show them.
func TestEdit(t *testing.T) {
	s := azuretest.Start(t, azuretest.Config{})
	c, ctx := client(t, s), t.Context()
	made, err := c.Create(ctx, doc(t, `{"registrationId":"Pump-1","attestation":{"type":"symmetricKey"},"initialTwin":{"tags":{"version":1,"n":null}},"futureMember":{"a":[1]}}`))
	if err != nil {
		t.Fatal(err)
	}
	e, _ := made.Enrollment()
	keys := *e.Attestation.SymmetricKey
	if _, err := c.Create(ctx, made); !errors.Is(err, operator.ErrExists) {
		t.Errorf("made twice: %v", err)
	}
	first := true
	before, after, err := c.Edit(ctx, operator.Individual, "pump-1", "", func(d *operator.Document) error {
		if first { // somebody is faster
			first = false
			if _, _, err := c.Edit(ctx, operator.Individual, "PUMP-1", "", func(d *operator.Document) error { return d.Set("deviceId", "other") }); err != nil {
				t.Error(err)
			}
		}
		return d.Set("provisioningStatus", "disabled")
	})
	if err != nil {
		t.Fatal(err)
	}
	got, _ := after.Individual()
	if got.DeviceID != "other" || got.ProvisioningStatus != "disabled" || string(got.InitialTwin.Tags) != `{"n":null,"version":1}` || !after.Has("futureMember") {
		t.Errorf("a change is lost: %+v", got)
	}
	if p, q := s.Keys("", "pump-1"); p != keys.PrimaryKey || q != keys.SecondaryKey {
		t.Error("an edit made other keys")
	}
	_, _, err = c.Edit(ctx, operator.Individual, "pump-1", before.ETag(), func(d *operator.Document) error { return d.Set("deviceId", "late") })
	if !errors.Is(err, operator.ErrChanged) {
		t.Errorf("an old etag: %v", err)
	}
	if err := c.Delete(ctx, operator.Individual, "pump-1", `"`+after.ETag()+`"`); err != nil {
		t.Error(err)
	}
	var e404 *operator.Error
	if _, err := c.Get(ctx, operator.Individual, "pump-1"); !errors.As(err, &e404) || e404.Code != dps.CodeNoEnrollment || len(e404.TrackingID) != 36 {
		t.Errorf("%v", err)
	}
}

// An answer that got lost is not asked for in a way that does harm, and what was done counts as done.
func TestLostAnswers(t *testing.T) {
	var lose atomic.Int32
	s := azuretest.Start(t, azuretest.Config{Lose: func(r *http.Request) bool { return r.Method != http.MethodGet && lose.Add(-1) >= 0 }})
	c, ctx := client(t, s), t.Context()
	lose.Store(1)
	d := doc(t, `{"registrationId":"a","attestation":{"type":"symmetricKey","symmetricKey":{"primaryKey":"`+key16+`"}}}`)
	if _, err := c.Create(ctx, d); err != nil {
		t.Errorf("create: %v", err)
	}
	lose.Store(1)
	if _, err := c.Create(ctx, doc(t, `{"registrationId":"a","deviceId":"b","attestation":{"type":"symmetricKey"}}`)); !errors.Is(err, operator.ErrExists) {
		t.Errorf("creating another one over it: %v", err)
	}
	lose.Store(2)
	if _, after, err := c.Edit(ctx, operator.Individual, "a", "", func(d *operator.Document) error { return d.Set("deviceId", "c") }); err != nil || !after.Has("deviceId") {
		t.Errorf("edit: %v", err)
	}
	lose.Store(1)
	counts, err := c.Import(ctx, operator.NewRows(strings.NewReader(`{"registrationId":"x","attestation":{"type":"symmetricKey"}}{"registrationId":"A","deviceId":"z","attestation":{"type":"symmetricKey"}}`), operator.RowsConfig{}), operator.ImportConfig{})
	if err != nil || counts.New != 1 || counts.Conflicting != 1 {
		t.Errorf("import: %+v, %v", counts, err)
	}
	lose.Store(1)
	if err := c.Delete(ctx, operator.Individual, "a", ""); err != nil {
		t.Errorf("delete: %v", err)
	}
	if err := c.Delete(ctx, operator.Individual, "a", ""); !errors.Is(err, operator.ErrNotFound) {
		t.Errorf("deleting what is not there: %v", err)
	}
}

// Whatever stands there instead of a service, the client ends.
func TestHostileService(t *testing.T) {
	for name, h := range map[string]http.HandlerFunc{
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://127.0.0.1:1/", http.StatusFound)
		},
		"html": func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "<html>") },
		"endless": func(w http.ResponseWriter, r *http.Request) {
			b := []byte(strings.Repeat(" ", 1<<20))
			for range 70 {
				_, _ = w.Write(b)
			}
		},
		"long message": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprintf(w, `{"errorCode":"400004","message":%q}`, strings.Repeat("x", 1<<20))
		},
		"null":       func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "null") },
		"other type": func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, `{"registrationId":7}`) },
	} {
		srv := httptest.NewTLSServer(h)
		roots := x509.NewCertPool()
		roots.AddCert(srv.Certificate())
		cn, err := operator.ParseConnection("HostName=" + strings.TrimPrefix(srv.URL, "https://") + ";SharedAccessKeyName=p;SharedAccessKey=" + key16)
		if err != nil {
			t.Fatal(err)
		}
		c := operator.New(operator.Config{Connection: cn, Roots: roots})
		if _, err := c.Get(t.Context(), operator.Individual, "a"); err == nil || len(err.Error()) > 1000 || strings.Contains(err.Error(), key16) {
			t.Errorf("%s: %.200v", name, err)
		}
		srv.Close()
	}
	// A list that goes round ends too.
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Ms-Continuation", "again")
		fmt.Fprint(w, `[{"registrationId":"a","attestation":{"type":"tpm","tpm":{"endorsementKey":"AAAA"}}}]`)
	}))
	defer srv.Close()
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())
	cn, _ := operator.ParseConnection("HostName=" + strings.TrimPrefix(srv.URL, "https://") + ";SharedAccessKeyName=p;SharedAccessKey=" + key16)
	n := 0
	for _, err := range operator.New(operator.Config{Connection: cn, Roots: roots}).All(t.Context(), operator.Individual) {
		if n++; err != nil || n > 10 {
			t.Fatal(n, err)
		}
	}
}

func TestCompare(t *testing.T) {
	ca, _ := authority(t, "CA")
	other, _ := authority(t, "Other")
	b64 := base64.StdEncoding.EncodeToString(ca.Raw)
	info := func(c *x509.Certificate) string {
		p, _ := operator.Thumbprint(wire(c))
		return `{"info":{"subjectName":"x","sha256Thumbprint":"` + strings.ToLower(p) + `"}}`
	}
	const sym = `"attestation":{"type":"symmetricKey"}`
	for name, x := range map[string]struct{ have, want, differs string }{
		"what a service makes":       {`{"registrationId":"A","etag":"x","createdDateTimeUtc":"2026-01-01T00:00:00Z","registrationState":{"registrationId":"a","status":"assigned"},` + sym + `}`, `{"registrationId":"a",` + sym + `}`, ""},
		"null and absent":            {`{"registrationId":"a",` + sym + `,"provisioningStatus":null,"iotHubs":[],"capabilities":{"iotEdge":false}}`, `{"registrationId":"a",` + sym + `,"provisioningStatus":"Enabled"}`, ""},
		"the default device ID":      {`{"registrationId":"a",` + sym + `,"deviceId":"a"}`, `{"registrationId":"a",` + sym + `}`, ""},
		"hubs in another order":      {`{"registrationId":"a",` + sym + `,"iotHubs":["x","Y"]}`, `{"registrationId":"a",` + sym + `,"iotHubs":["y","x"]}`, ""},
		"a device ID in other case":  {`{"registrationId":"a",` + sym + `,"deviceId":"A"}`, `{"registrationId":"a",` + sym + `}`, "deviceId"},
		"status":                     {`{"registrationId":"a",` + sym + `}`, `{"registrationId":"a",` + sym + `,"provisioningStatus":"DISABLED"}`, "provisioningStatus"},
		"a tag":                      {`{"registrationId":"a",` + sym + `,"initialTwin":{"tags":{"a":{"b":1},"c":[]}}}`, `{"registrationId":"a",` + sym + `,"initialTwin":{"tags":{"a":{"b":2},"c":[]}}}`, "initialTwin.tags.a.b"},
		"numbers of one value":       {`{"registrationId":"a",` + sym + `,"initialTwin":{"tags":{"a":1.0}}}`, `{"registrationId":"a",` + sym + `,"initialTwin":{"tags":{"a":1e0}}}`, ""},
		"large numbers":              {`{"registrationId":"a",` + sym + `,"initialTwin":{"tags":{"a":9007199254740993}}}`, `{"registrationId":"a",` + sym + `,"initialTwin":{"tags":{"a":9007199254740992}}}`, "initialTwin.tags.a"},
		"an empty tag is one":        {`{"registrationId":"a",` + sym + `,"initialTwin":{"tags":{"a":{}}}}`, `{"registrationId":"a",` + sym + `}`, "initialTwin"},
		"a member that nobody knows": {`{"registrationId":"a",` + sym + `,"new":1}`, `{"registrationId":"a",` + sym + `,"new":2}`, "new"},
		"a certificate by its print": {`{"registrationId":"a","attestation":{"type":"x509","x509":{"clientCertificates":{"primary":` + info(ca) + `,"secondary":` + info(ca) + `}}}}`, `{"registrationId":"a","attestation":{"type":"x509","x509":{"clientCertificates":{"primary":{"certificate":"` + b64 + `"}}}}}`, ""},
		"another certificate":        {`{"registrationId":"a","attestation":{"type":"x509","x509":{"clientCertificates":{"primary":` + info(other) + `}}}}`, `{"registrationId":"a","attestation":{"type":"x509","x509":{"clientCertificates":{"primary":{"certificate":"` + b64 + `"}}}}}`, "attestation.x509.clientCertificates.primary"},
		"another type":               {`{"registrationId":"a",` + sym + `}`, `{"registrationId":"a","attestation":{"type":"tpm","tpm":{"endorsementKey":"AAAA"}}}`, "attestation.tpm"},
	} {
		changes, err := operator.Compare(doc(t, x.have), doc(t, x.want), nil)
		if err != nil || (x.differs == "") != (len(changes) == 0) || len(changes) > 0 && changes[0].Member != x.differs {
			t.Errorf("%s: %v, %v", name, changes, err)
		}
	}
	want := doc(t, `{"registrationId":"a","attestation":{"type":"symmetricKey","symmetricKey":{"primaryKey":"`+key16+`"}}}`)
	have := doc(t, `{"registrationId":"a",`+sym+`}`)
	if changes, err := operator.Compare(have, want, &dps.SymmetricKeyAttestation{PrimaryKey: key16, SecondaryKey: "AAAA"}); err != nil || len(changes) > 0 {
		t.Errorf("the same key: %v, %v", changes, err)
	}
	changes, err := operator.Compare(have, want, &dps.SymmetricKeyAttestation{PrimaryKey: "QUFBQUFBQUFBQUFBQUFBQQ=="})
	if err != nil || len(changes) != 1 || strings.Contains(fmt.Sprint(changes), "MDEy") || strings.Contains(fmt.Sprint(changes), "QUFB") {
		t.Errorf("another key: %v, %v", changes, err)
	}
}

// DPS-S 102, and what is missing where keys are not asked for or certificates not at hand.
func TestExport(t *testing.T) {
	from, to := azuretest.Start(t, azuretest.Config{}), azuretest.Start(t, azuretest.Config{})
	c, d, ctx := client(t, from), client(t, to), t.Context()
	ca, _ := authority(t, "CA")
	leaf, _ := authority(t, "leaf")
	dir := t.TempDir()
	certs := make(map[string]*dps.X509Certificate)
	for _, x := range []*x509.Certificate{ca, leaf} {
		p, _ := operator.Thumbprint(wire(x))
		certs[p] = wire(x)
		if err := os.WriteFile(filepath.Join(dir, p+".pem"), asPEM(x), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	all := []*operator.Document{
		groupOf(t, "pumps", ca, nil),
		doc(t, `{"enrollmentGroupId":"keys","attestation":{"type":"symmetricKey"},"allocationPolicy":"static","iotHubs":["a"],"reprovisionPolicy":{"updateHubAssignment":true,"migrateDeviceData":false}}`),
		doc(t, `{"registrationId":"s","deviceId":"S","attestation":{"type":"symmetricKey"},"initialTwin":{"tags":{"version":1,"t":"a,\"b\"\n"},"properties":{"desired":{"x":[1,{}]}}},"provisioningStatus":"disabled"}`),
		doc(t, `{"registrationId":"t","attestation":{"type":"tpm","tpm":{"endorsementKey":"AAAA"}},"provisioningStatus":null,"capabilities":{"iotEdge":true},"allocationPolicy":"custom","customAllocationDefinition":{"webhookUrl":"https://w/x?code=1","apiVersion":"2021-10-01"}}`),
		doc(t, `{"registrationId":"x","attestation":{"type":"x509","x509":{"clientCertificates":{"primary":{"certificate":"`+wire(leaf).Certificate+`"}}}}}`),
	}
	for _, e := range all {
		if _, err := c.Create(ctx, e); err != nil {
			t.Fatal(e, err)
		}
	}
	for _, format := range []string{"json", "csv"} {
		for _, k := range []operator.Kind{operator.Group, operator.Individual} {
			var text strings.Builder
			w := operator.NewJSONWriter(&text)
			if format == "csv" {
				w = operator.NewCSVWriter(&text, k)
			}
			err := c.Export(ctx, k, operator.ExportConfig{Keys: true, Certificates: certs}, func(x *operator.Exported) error {
				if err := w.Write(x); err != nil || len(x.Missing) > 0 {
					t.Errorf("%s as %s: %v, %v", x.Document, format, x.Missing, err)
				}
				return nil
			})
			if err != nil || w.Flush() != nil {
				t.Fatal(err)
			}
			for _, word := range []string{"etag", "createdDateTimeUtc", "registrationState"} {
				if strings.Contains(text.String(), word) {
					t.Errorf("%s is in the export", word)
				}
			}
			counts, err := d.Import(ctx, operator.NewRows(strings.NewReader(text.String()), operator.RowsConfig{Kind: k}), operator.ImportConfig{Report: func(v operator.Verdict) error {
				if v.Bad() {
					t.Errorf("%s: %+v", format, v)
				}
				return nil
			}})
			if err != nil || format == "json" && counts.New == 0 || format == "csv" && counts.Unchanged != counts.Rows {
				t.Errorf("%s: %+v, %v\n%s", format, counts, err, text.String())
			}
		}
	}
	for _, e := range all {
		if _, err := d.Get(ctx, e.Kind, e.ID); err != nil {
			t.Error(err)
		}
		p, q := from.Keys("", e.ID)
		if r, s := to.Keys("", e.ID); p != r || q != s {
			t.Errorf("%s has other keys", e)
		}
	}
	lacks := 0
	err := c.Export(ctx, operator.Individual, operator.ExportConfig{}, func(x *operator.Exported) error {
		lacks += len(x.Missing)
		return nil
	})
	if err != nil || lacks != 2 {
		t.Errorf("without keys and certificates %d are lacking, %v", lacks, err)
	}
}

// A group's key and its CA roll over in steps that can be taken again, and nobody's change is lost.
func TestRoll(t *testing.T) {
	s := azuretest.Start(t, azuretest.Config{})
	c, ctx := client(t, s), t.Context()
	if _, err := c.Create(ctx, doc(t, `{"enrollmentGroupId":"g","attestation":{"type":"symmetricKey"},"initialTwin":{"tags":{"a":1}}}`)); err != nil {
		t.Fatal(err)
	}
	old, _ := s.Keys("g", "g")
	key := base64.StdEncoding.EncodeToString(make([]byte, 32))
	for i, want := range []operator.RollState{operator.RollFresh, operator.RollWaiting, operator.RollDone, operator.RollDone} {
		r, err := c.RollKey(ctx, "G", key)
		if err != nil || r.State != want {
			t.Fatalf("step %d: %v, %v", i, r, err)
		}
		if i == 1 {
			if p, q := s.Keys("g", "g"); p != old || q != key {
				t.Error("the first step shuts somebody out")
			}
			s.Register("g", "d1", "assigned", map[string]any{"assignedHub": "h", "deviceId": "d1"})
			var uses []operator.Use
			if told, err := r.Uses(ctx, func(u operator.Use) error { uses = append(uses, u); return nil }); err != nil || told || len(uses) != 1 || uses[0].Slot != "unknown" {
				t.Errorf("%v, %v", uses, err)
			}
			if _, _, err := c.Edit(ctx, operator.Group, "g", "", func(d *operator.Document) error { return d.Set("provisioningStatus", "disabled") }); err != nil {
				t.Fatal(err)
			}
			if err := r.Next(ctx); !errors.Is(err, operator.ErrChanged) {
				t.Errorf("the group was changed meanwhile: %v", err)
			}
			if r, err = c.RollKey(ctx, "g", key); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.Next(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if p, q := s.Keys("g", "g"); p != key || q != key {
		t.Error("the old key is still there")
	}
	first, _ := authority(t, "One")
	second, _ := authority(t, "Two")
	third, thirdKey := authority(t, "Three")
	leaf, _ := sign(t, "leaf", third, thirdKey)
	if _, err := c.Create(ctx, groupOf(t, "x", first, nil)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.RollCA(ctx, "x", wire(leaf)); err == nil {
		t.Error("a leaf as the new CA")
	}
	if _, err := c.RollCA(ctx, "g", wire(second)); err == nil {
		t.Error("a CA for a group with keys")
	}
	for i, want := range []operator.RollState{operator.RollFresh, operator.RollWaiting, operator.RollDone} {
		r, err := c.RollCA(ctx, "x", wire(second))
		if err != nil || r.State != want {
			t.Fatalf("step %d: %v, %v", i, r, err)
		}
		if err := r.Next(ctx); err != nil {
			t.Fatal(err)
		}
		p, q := s.Certificates("x")
		if (string(p) == string(first.Raw)) != (i == 0) || string(q) != string(second.Raw) {
			t.Errorf("after step %d the group has other certificates", i)
		}
	}
}

func TestManagement(t *testing.T) {
	s := azuretest.Start(t, azuretest.Config{})
	dir := t.TempDir()
	b, err := os.ReadFile(s.Management(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	cn, err := operator.ParseManagement(string(b))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(s.CA)
	m, ctx := operator.NewManagement(operator.Config{Roots: roots}, cn), t.Context()
	if _, err := m.Scope(ctx, "plant-a"); !errors.Is(err, operator.ErrNotFound) {
		t.Errorf("%v", err)
	}
	sc := operator.NewScope("plant-a", "westeurope")
	for _, h := range []string{"a", "b"} {
		weight := 2
		if err := sc.SetHub(operator.Hub{Name: h, Location: "westeurope", ConnectionString: "HostName=" + h + ";SharedAccessKeyName=o;SharedAccessKey=secret-" + h, Weight: &weight}); err != nil {
			t.Fatal(err)
		}
	}
	if sc, err = m.PutScope(ctx, sc); err != nil || sc.Props.State != "Active" || len(sc.Props.IDScope) != 11 || len(sc.Props.Hubs) != 2 {
		t.Fatalf("%+v, %v", sc, err)
	}
	// DPS-S 66: what was masked stays, as it is changed beside it.
	off := false
	if sc, err = m.EditScope(ctx, "", func(s *operator.Scope) error { return s.SetHub(operator.Hub{Name: "B", Apply: &off}) }); err != nil {
		t.Fatal(err)
	}
	if h := sc.Props.Hubs[1]; *h.Apply || *h.Weight != 2 || strings.Contains(h.ConnectionString, "secret") || s.HubKey("plant-a", "a") != "HostName=a;SharedAccessKeyName=o;SharedAccessKey=secret-a" {
		t.Errorf("%+v, %s", h, s.HubKey("plant-a", "a"))
	}
	if doc, err := sc.Document(); err != nil || strings.Contains(string(doc), "secret") {
		t.Errorf("%s, %v", doc, err)
	}
	before, err := m.Policies(ctx, "plant-a")
	if err != nil || len(before) != 1 || !before[0].Has("EnrollmentWrite") || before[0].Primary == "" || strings.Contains(fmt.Sprintf("%v%+v%#v", before, before, before), before[0].Primary) {
		t.Fatalf("%d policies, %v", len(before), err)
	}
	err = m.EditPolicies(ctx, "plant-a", func(p []operator.Policy) ([]operator.Policy, error) {
		return append(p, operator.Policy{Name: "line", Rights: "EnrollmentRead"}), nil
	})
	after, err2 := m.Policies(ctx, "plant-a")
	if err != nil || err2 != nil || len(after) != 2 || after[0] != before[0] || after[1].Primary == "" || s.HubKey("plant-a", "b") == "" {
		t.Errorf("%v, %v, %v", after, err, err2)
	}
	if _, err := m.EditScope(ctx, "plant-a", func(s *operator.Scope) error { return s.DropHub("c") }); !errors.Is(err, operator.ErrNotFound) {
		t.Errorf("%v", err)
	}
	root, key := authority(t, "Plant Root")
	c, err := m.PutCertificate(ctx, "plant-a", "root", root, false, "")
	if err != nil || c.Props.IsVerified || c.Props.Subject != "Plant Root" {
		t.Fatalf("%+v, %v", c, err)
	}
	if _, err := m.VerificationCode(ctx, "plant-a", "root", "stale"); !errors.Is(err, operator.ErrChanged) {
		t.Errorf("%v", err)
	}
	if c, err = m.VerificationCode(ctx, "plant-a", "root", c.ETag); err != nil || len(c.Props.VerificationCode) != 48 {
		t.Fatalf("%+v, %v", c, err)
	}
	wrong, _ := sign(t, "something", root, key)
	if _, err := m.VerifyCertificate(ctx, "plant-a", "root", wrong, c.ETag); err == nil {
		t.Error("another common name proves it")
	}
	proof, _ := sign(t, c.Props.VerificationCode, root, key)
	if c, err = m.Certificate(ctx, "plant-a", "root"); err != nil {
		t.Fatal(err)
	}
	if c, err = m.VerifyCertificate(ctx, "plant-a", "root", proof, c.ETag); err != nil || !c.Props.IsVerified {
		t.Errorf("%+v, %v", c, err)
	}
	if err := m.DeleteCertificate(ctx, "plant-a", "root", c.ETag); err != nil {
		t.Error(err)
	}
	if err := m.DeleteScope(ctx, "plant-a"); err != nil {
		t.Error(err)
	}
	bad := operator.NewManagement(operator.Config{Roots: roots}, func() operator.ManagementConnection {
		c, _ := operator.ParseManagement(strings.Replace(string(b), "Token=", "Token=x", 1))
		return c
	}())
	if _, err := bad.Scopes(ctx); !errors.Is(err, operator.ErrUnauthorized) {
		t.Errorf("%v", err)
	}
}
