package arm_test

import (
	"crypto/sha1"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/to"
	dpsarm "github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/deviceprovisioningservices/armdeviceprovisioningservices"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
)

// now makes certificates valid at this moment, and not at the fixtures' time.
func now(c *x509.Certificate) {
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
}

func asPEM(h *attesttest.Holder) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.Certificate.Raw})
}

var verificationCode = regexp.MustCompile(`^[0-9A-F]{48}$`)

// DPS-S 74 to 79, with Azure's client for Go.
func TestCertificates(t *testing.T) {
	b := newBench(t)
	ctx, c := t.Context(), b.certificates()
	b.put("plant", description())
	ca, other := attesttest.CA(t, nil, "Plant CA", now), attesttest.CA(t, nil, "Plant CA", now)
	put := func(name string, content []byte, tag *string, verified *bool) (dpsarm.CertificateResponse, error) {
		r, err := c.CreateOrUpdate(ctx, group, "plant", name, dpsarm.CertificateResponse{Properties: &dpsarm.CertificateProperties{Certificate: content, IsVerified: verified}},
			&dpsarm.DpsCertificateClientCreateOrUpdateOptions{IfMatch: tag})
		return r.CertificateResponse, err
	}
	made, err := put("ca", asPEM(ca), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if p := made.Properties; *p.Subject != "Plant CA" || *p.IsVerified || *p.Thumbprint != fmt.Sprintf("%X", sha1.Sum(ca.Certificate.Raw)) ||
		!p.Expiry.Equal(ca.Certificate.NotAfter) || time.Since(*p.Created) > time.Minute || *made.ID != base+"/plant/certificates/ca" || *made.Type != "Microsoft.Devices/ProvisioningServices/Certificates" {
		t.Errorf("%+v, %+v", made, p)
	}
	raw := b.call("GET", base+"/plant/certificates/CA", "")
	if p := raw.body["properties"].(map[string]any); p["certificate"] != nil || !strings.HasSuffix(p["created"].(string), " GMT") || !strings.Contains(raw.text, `"certificate":null`) {
		t.Errorf("%s", raw.text)
	}
	if _, err := put("ca", ca.Certificate.Raw, nil, nil); code(err) != "412 412001" {
		t.Errorf("over another without its etag: %v", err)
	}
	if _, err := put("new", ca.Certificate.Raw, to.Ptr("x"), nil); code(err) != "404 404203" {
		t.Errorf("an update of nothing: %v", err)
	}

	// The proof of possession.
	if _, err := c.GenerateVerificationCode(ctx, "ca", "", group, "plant", nil); code(err) != "412 412001" {
		t.Errorf("a code without If-Match: %v", err)
	}
	if _, err := c.GenerateVerificationCode(ctx, "ca", "stale", group, "plant", nil); code(err) != "412 412001" {
		t.Errorf("a code with a stale tag: %v", err)
	}
	first, err := c.GenerateVerificationCode(ctx, "ca", *made.Etag, group, "plant", nil)
	if err != nil || !verificationCode.MatchString(*first.Properties.VerificationCode) || *first.Etag == *made.Etag || string(first.Properties.Certificate) != string(ca.Certificate.Raw) {
		t.Fatalf("%+v, %v", first, err)
	}
	second, err := c.GenerateVerificationCode(ctx, "ca", *first.Etag, group, "plant", nil)
	if err != nil || *second.Properties.VerificationCode == *first.Properties.VerificationCode {
		t.Fatalf("%+v, %v", second, err)
	}
	tag, proofOf := *second.Etag, *second.Properties.VerificationCode
	verify := func(proof *attesttest.Holder) (dpsarm.DpsCertificateClientVerifyCertificateResponse, error) {
		return c.VerifyCertificate(ctx, "ca", tag, group, "plant", dpsarm.VerificationCodeRequest{Certificate: to.Ptr(base64.StdEncoding.EncodeToString(asPEM(proof)))}, nil)
	}
	for name, proof := range map[string]*attesttest.Holder{
		"the code before":     attesttest.Leaf(t, ca, *first.Properties.VerificationCode, now),
		"in lower case":       attesttest.Leaf(t, ca, strings.ToLower(proofOf), now),
		"another CA's":        attesttest.Leaf(t, other, proofOf, now),
		"self-signed":         attesttest.Leaf(t, nil, proofOf, now),
		"expired":             attesttest.Leaf(t, ca, proofOf, func(c *x509.Certificate) { now(c); c.NotAfter = time.Now().Add(-time.Minute) }),
		"not yet valid":       attesttest.Leaf(t, ca, proofOf, func(c *x509.Certificate) { now(c); c.NotBefore = time.Now().Add(time.Hour) }),
		"the CA itself":       ca,
		"through another one": attesttest.Leaf(t, attesttest.CA(t, ca, "sub", now), proofOf, now),
	} {
		if _, err := verify(proof); code(err) != "400 400004" {
			t.Errorf("%s: %v", name, err)
		}
	}
	good := attesttest.Leaf(t, ca, proofOf, now)
	if got, err := c.Get(ctx, "ca", group, "plant", nil); err != nil || *got.Properties.IsVerified || *got.Etag != tag {
		t.Errorf("after wrong proofs: %+v, %v", got, err)
	}
	was := tag
	tag = *first.Etag
	if _, err := verify(good); code(err) != "412 412001" {
		t.Errorf("with a stale tag: %v", err)
	}
	tag = was
	done, err := verify(good)
	if err != nil || !*done.Properties.IsVerified || *done.Etag == tag {
		t.Fatalf("%+v, %v", done, err)
	}
	if tag = *done.Etag; true {
		if _, err := verify(good); code(err) != "400 400004" {
			t.Errorf("the code again: %v", err)
		}
	}

	// The same content stays verified, another does not, and whoever says so vouches for one.
	if r, err := put("ca", ca.Certificate.Raw, &tag, nil); err != nil || !*r.Properties.IsVerified {
		t.Errorf("the same: %+v, %v", r.Properties, err)
	} else {
		tag = *r.Etag
	}
	if r, err := put("ca", other.Certificate.Raw, &tag, nil); err != nil || *r.Properties.IsVerified {
		t.Errorf("another: %+v, %v", r.Properties, err)
	}
	if r, err := put("vouched", asPEM(ca), nil, to.Ptr(true)); err != nil || !*r.Properties.IsVerified {
		t.Errorf("vouched for: %+v, %v", r.Properties, err)
	} else if r, err := put("vouched", asPEM(ca), r.Etag, to.Ptr(false)); err != nil || *r.Properties.IsVerified {
		t.Errorf("not any more: %+v, %v", r.Properties, err)
	}
	if all, err := c.List(ctx, group, "plant", nil); err != nil || len(all.Value) != 2 || *all.Value[0].Name != "ca" {
		t.Errorf("%+v, %v", all, err)
	}
	if strings.Contains(b.call("GET", base+"/plant/certificates", "").text, "nextLink") {
		t.Error("the list has a nextLink")
	}
	// Every form of the body, of the content, and versions before 2022.
	text, _ := json.Marshal(string(asPEM(ca)))
	for i, content := range []string{string(text), `"` + ca.Base64() + `"`, `"` + base64.StdEncoding.EncodeToString(asPEM(ca)) + `"`} {
		for j, form := range []string{`{"certificate":%s,"isVerified":true}`, `{"properties":{"certificate":%s,"isVerified":true}}`} {
			path := fmt.Sprintf("%s/plant/certificates/form-%d-%d?api-version=2021-10-15", base, i, j)
			if r := b.call("PUT", path, fmt.Sprintf(form, content)); r.status != 200 || r.body["properties"].(map[string]any)["isVerified"] != true {
				t.Errorf("%d, %d: %s", i, j, r.text)
			}
		}
	}
	leaf := attesttest.Leaf(t, ca, "leaf", now, func(c *x509.Certificate) { c.BasicConstraintsValid = true })
	old := attesttest.CA(t, nil, "old", func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-48*time.Hour), time.Now().Add(-time.Hour)
	})
	for name, content := range map[string]string{
		"a leaf": leaf.Base64(), "expired": old.Base64(), "a chain": string(asPEM(ca)) + string(asPEM(other)), "a key": "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----",
		"nothing": "", "noise": "AAAA", "a lot": strings.Repeat("A", 100<<10),
	} {
		text, _ := json.Marshal(map[string]string{"certificate": content})
		if r := b.call("PUT", base+"/plant/certificates/bad", string(text)); r.status != 400 {
			t.Errorf("%s: %d %s", name, r.status, r.text)
		}
	}

	if _, err := c.Delete(ctx, group, "", "plant", "ca", nil); code(err) != "412 412001" {
		t.Errorf("deleted without If-Match: %v", err)
	}
	got, err := c.Get(ctx, "ca", group, "plant", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Delete(ctx, group, *got.Etag, "plant", "ca", nil); err != nil {
		t.Error(err)
	}
	if _, err := c.Get(ctx, "ca", group, "plant", nil); code(err) != "404 404203" {
		t.Errorf("after its deletion: %v", err)
	}
	actions := strings.Join(b.actions(b.scope("plant")), "\n")
	for _, want := range []string{"put certificate/ca", "new verification code certificate/ca", "verify certificate/ca", "delete certificate/ca"} {
		if !strings.Contains(actions, want) {
			t.Errorf("the audit record has no %q:\n%s", want, actions)
		}
	}
}

// Under quotas "azure" a service has 25 certificates, and not one more (service API, section 4.11).
func TestCertificateQuota(t *testing.T) {
	b := newBench(t)
	ca := attesttest.CA(t, nil, "ca", now)
	whole := `{"location":"westeurope","sku":{"name":"S1"},"properties":{"touchmark":{"quotas":"azure","strictRoots":true}}}`
	if r := b.call("PUT", base+"/plant", whole); r.status != 201 {
		t.Fatal(r.text)
	}
	b.put("plant", b.get("plant"))
	if sc := b.scope("plant"); sc.Quotas != "azure" || !sc.StrictRoots {
		t.Error("what Azure's client does not know is lost")
	}
	for i := range 26 {
		r := b.call("PUT", fmt.Sprintf("%s/plant/certificates/ca-%d", base, i), `{"certificate":"`+ca.Base64()+`"}`)
		if want := 200; i < 25 && r.status != want || i == 25 && r.status != 400 {
			t.Errorf("certificate %d: %d %s", i, r.status, r.text)
		}
	}
}

// A CA that OpenSSL made, verified by a certificate that OpenSSL made.
func TestOpenSSL(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		hsmtest.Require(t, "openssl (apt-get install openssl)")
	}
	b := newBench(t)
	b.put("plant", description())
	dir := t.TempDir()
	openssl := func(args ...string) {
		t.Helper()
		c := exec.Command("openssl", args...)
		c.Dir = dir
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("openssl %v: %v\n%s", args, err, out)
		}
	}
	read := func(name string) string {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return base64.StdEncoding.EncodeToString(text)
	}
	for name, key := range map[string][]string{"rsa": {"-newkey", "rsa:2048"}, "ec": {"-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"}} {
		openssl(append([]string{"req", "-x509", "-nodes", "-keyout", name + ".key", "-out", name + ".pem", "-days", "10", "-subj", "/O=Plant/CN=Plant " + name}, key...)...)
		path := base + "/plant/certificates/" + name
		r := b.call("PUT", path, `{"properties":{"certificate":"`+read(name+".pem")+`"}}`)
		if r.status != 200 || r.body["properties"].(map[string]any)["subject"] != "Plant "+name {
			t.Fatal(r.text)
		}
		r = b.call("POST", path+"/generateVerificationCode", "", "If-Match", r.body["etag"].(string))
		proof, _ := r.body["properties"].(map[string]any)["verificationCode"].(string)
		openssl(append([]string{"req", "-new", "-nodes", "-keyout", "proof.key", "-out", "proof.csr", "-subj", "/CN=" + proof}, key...)...)
		openssl("x509", "-req", "-in", "proof.csr", "-CA", name+".pem", "-CAkey", name+".key", "-CAcreateserial", "-out", "proof.pem", "-days", "1")
		r = b.call("POST", path+"/verify", `{"certificate":"`+read("proof.pem")+`"}`, "If-Match", `"`+r.body["etag"].(string)+`"`)
		if r.status != 200 || r.body["properties"].(map[string]any)["isVerified"] != true {
			t.Error(r.text)
		}
	}
}

// What is no certificate, or none of a CA's, is refused with 400 and changes nothing.
func FuzzCertificate(f *testing.F) {
	b := newBench(f)
	if r := b.call("PUT", base+"/plant", `{"location":"x","sku":{"name":"S1"},"properties":{}}`); r.status != 201 {
		f.Fatal(r.text)
	}
	ca := attesttest.CA(f, nil, "ca", now)
	for _, seed := range []string{ca.Base64(), string(asPEM(ca)), base64.StdEncoding.EncodeToString(asPEM(ca)), "", "-----BEGIN CERTIFICATE-----", "AAAA", ca.Base64()[:200]} {
		f.Add(seed, "ca")
	}
	f.Add(ca.Base64(), "..")
	f.Add(ca.Base64(), strings.Repeat("n", 257))
	svc, err := b.scopes.Service(f.Context(), b.scope("plant").ID)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text, name string) {
		c, err := svc.PutCACertificate(t.Context(), registrationActor, name, text, nil, "")
		if err != nil {
			return
		}
		parsed, err := x509.ParseCertificate(c.DER)
		if err != nil || parsed.BasicConstraintsValid && !parsed.IsCA || c.Verified || name == "" || strings.ContainsAny(name, "/\\%?#\x00 ") {
			t.Errorf("%q: %+v, %v", name, c, err)
		}
		if _, err := svc.VerifyCACertificate(t.Context(), registrationActor, name, text, "*"); err == nil {
			t.Error("it verifies itself")
		}
		if err := svc.DeleteCACertificate(t.Context(), registrationActor, name, c.ETag); err != nil {
			t.Error(err)
		}
	})
}
