package device

import (
	"os"
	"path/filepath"
	"testing"
)

// A stamp is somebody else's files.
func FuzzLoadStamp(f *testing.F) {
	f.Add([]byte(`{"idScope":"0ne00000001","globalEndpoint":"h","registrationId":"dev-1","attestation":"symmetricKey","symmetricKey":"AAAA"}`), []byte(""), []byte(""))
	f.Add([]byte(`{"idScope":"0ne00000001","globalEndpoint":"h","registrationId":"dev-1","attestation":"x509","certificateChain":"chain.pem","privateKey":"key.pem"}`),
		[]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, stamp, chain, key []byte) {
		for name, b := range map[string][]byte{stampFile: stamp, "chain.pem": chain, "key.pem": key} {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		s, err := LoadStamp(dir)
		if err == nil && len(s.SymmetricKey) == 0 && len(s.Certificates) == 0 && (!s.Symmetric || s.KeyURI == "") {
			t.Fatalf("%q is a stamp without a credential", stamp)
		}
	})
}

// So are the service's answers.
func FuzzAnswer(f *testing.F) {
	f.Add(200, []byte(`{"operationId":"o","status":"assigned","registrationState":{"assignedHub":"h","deviceId":"d"}}`), "3")
	f.Add(401, []byte(`{"errorCode":401002,"trackingId":"t","message":"Unauthorized"}`), "")
	f.Add(503, []byte(`<html>`), "-1")
	f.Fuzz(func(t *testing.T, status int, body []byte, after string) {
		st, wait, err := answer(status, body, hint(after))
		if (st == nil) == (err == nil) || wait < 0 || wait > hint("300") {
			t.Fatalf("%d %q: %+v, %v, %v", status, body, st, wait, err)
		}
		if err != nil {
			_ = err.Error()
		}
	})
}
