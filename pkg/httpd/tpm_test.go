package httpd_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/device"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// The challenge over HTTPS, octet by octet as device SDKs meet it (device API, sections 5.5 and 10.5): DPS-D 48, 51, 53, 54.
func TestTPMChallenge(t *testing.T) { tpmChallenge(t, newDoor(t)) }

// A turning connection is one to each of several doors; each request, on whichever of them, goes to another door than the last.
type turning struct {
	conns []*conn
	turn  *int
}

func (c turning) next() *conn {
	*c.turn++
	return c.conns[*c.turn%len(c.conns)]
}

// tpmChallenge is the test at one door, or at several of one service.
func tpmChallenge(t *testing.T, doors ...*service) {
	d, turn := doors[0], new(int)
	dial := func(t testing.TB, device registrationtest.Device) (c turning) {
		t.Helper()
		c.turn = turn
		for _, d := range doors {
			c.conns = append(c.conns, d.dial(t, device))
		}
		return c
	}
	soft, err := device.NewSoftTPM(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	other, err := device.NewSoftTPM(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	body := func(ek, srk *device.SoftTPM) string {
		e, _, _ := ek.Keys(t.Context())
		_, s, _ := srk.Keys(t.Context())
		return fmt.Sprintf(`{"registrationId":"tpm-1","tpm":{"endorsementKey":"%s","storageRootKey":"%s"}}`, base64.StdEncoding.EncodeToString(e), base64.StdEncoding.EncodeToString(s))
	}
	ek, _, _ := soft.Keys(t.Context())
	d.Put(t, registration.Individual, "tpm-1", dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationTPM, TPM: &dps.TPMAttestation{EndorsementKey: base64.StdEncoding.EncodeToString(ek)}}})
	nobody := registrationtest.Device{Scope: registrationtest.Scope, ID: "tpm-1", APIVersion: "2019-03-31"}
	c := dial(t, nobody)

	challenge := func(method, path, body string) []byte {
		t.Helper()
		at := c.next()
		res, b := at.do(t, method, at.path(path), body)
		var doc map[string]any
		if err := json.Unmarshal(b, &doc); err != nil {
			t.Fatal(err)
		}
		key, _ := doc["authenticationKey"].(string)
		blob, err := base64.StdEncoding.DecodeString(key)
		if res.StatusCode != http.StatusUnauthorized || res.Header.Get("Retry-After") != "" || doc["keyName"] != "registration" || len(doc) != 2 || err != nil || len(blob) < 814 || bytes.ContainsRune(b, '\\') {
			t.Fatalf("%d %s", res.StatusCode, b)
		}
		return blob
	}
	good := body(soft, soft)
	first := challenge("PUT", "/register", good)
	if !strings.Contains(good, "/") {
		t.Fatal("no slash to escape")
	}
	second := challenge("PUT", "/register", strings.ReplaceAll(good, "/", `\/`)) // as the SDK for C does
	third := challenge("POST", "", good)
	if bytes.Equal(first, second) || bytes.Equal(second, third) {
		t.Error("the same challenge again")
	}
	challenge("PUT", "/register", body(soft, other)) // another storage root key
	for why, text := range map[string]string{"another endorsement key": body(other, soft), "no keys": `{"registrationId":"tpm-1"}`, "not base64": `{"tpm":{"endorsementKey":"!"}}`} {
		at := c.next()
		if res, b := at.do(t, "PUT", at.path("/register"), text); res.StatusCode != http.StatusUnauthorized || bytes.Contains(b, []byte("authenticationKey")) || !bytes.Contains(b, []byte("401002")) {
			t.Errorf("%s: %d %s", why, res.StatusCode, b)
		}
	}

	if err := soft.Activate(t.Context(), challenge("PUT", "/register", good)); err != nil {
		t.Fatal(err)
	}
	sr, se := url.QueryEscape(registrationtest.Scope+"/registrations/tpm-1"), fmt.Sprint(d.Now().Add(time.Hour).Unix())
	sum, err := soft.MAC(t.Context(), nil, []byte(sr+"\n"+se))
	if err != nil {
		t.Fatal(err)
	}
	proved := nobody
	proved.Token = "SharedAccessSignature sr=" + sr + "&sig=" + url.QueryEscape(base64.StdEncoding.EncodeToString(sum)) + "&se=" + se + "&skn=registration"
	for _, text := range []string{`{"registrationId":"tpm-1"}`, "", good} { // the first without the TPM's keys, on another connection
		again := dial(t, proved)
		a := again.next().Register(t, text)
		var op struct {
			OperationID string `json:"operationId"`
		}
		if err := json.Unmarshal(a.Body, &op); err != nil || a.Status != http.StatusAccepted {
			t.Fatalf("%d %s", a.Status, a.Body)
		}
		one, two := again.next().Status(t, op.OperationID, "{}"), dial(t, proved).next().Status(t, op.OperationID, "{}")
		if one.Status != http.StatusOK || !bytes.Equal(one.Body, two.Body) || !bytes.Contains(one.Body, []byte(`"tpm":{"authenticationKey":"`)) {
			t.Errorf("%d %s\n%s", one.Status, one.Body, two.Body)
		}
	}
	proved.Token = strings.Replace(proved.Token, "sig=", "sig=AAAA", 1)
	c = dial(t, proved)
	challenge("PUT", "/register", good) // a token that is no good, with the TPM's keys
	if a := c.next().Register(t, ""); a.Status != http.StatusUnauthorized || bytes.Contains(a.Body, []byte("authenticationKey")) {
		t.Errorf("without them: %d %s", a.Status, a.Body)
	}
}
