package hubtest

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/registration"
)

// A Backend is a system behind a webhook, as "touchmark help hubs" has it, written without package hub.
type Backend struct {
	server
	key     []byte
	devices map[string]map[string]any // under mu
	twins   map[string]map[string]any // under mu
}

// StartBackend starts one, without devices.
func StartBackend(t testing.TB) *Backend {
	b := &Backend{key: []byte("0123456789abcdef"), devices: map[string]map[string]any{}, twins: map[string]map[string]any{}}
	b.start(t, b.serve)
	return b
}

// Linked is the backend as a linked hub.
func (b *Backend) Linked(name string) registration.LinkedHub {
	return registration.LinkedHub{Name: name, Kind: registration.HubWebhook, ConnectionString: fmt.Sprintf("Url=%s/touchmark?code=hush;Secret=%s;CA=%s",
		b.URL, base64.StdEncoding.EncodeToString(b.key), b.CA())}
}

// Signed reports whether a body's signature is by that key.
func Signed(key []byte, header string, body []byte) bool {
	v, err := url.ParseQuery(strings.ReplaceAll(header, ",", "&"))
	sum, err2 := hex.DecodeString(v.Get("v1"))
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s.%s", v.Get("t"), body)
	return err == nil && err2 == nil && hmac.Equal(mac.Sum(nil), sum)
}

func (b *Backend) serve(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	defer b.mu.Unlock()
	answer := map[string]any{"version": 1}
	status := http.StatusOK
	fail := func(code int, name string) {
		status, answer["error"] = code, map[string]string{"code": name, "message": "it is so"}
	}
	defer func() {
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(answer)
	}()
	body, _ := io.ReadAll(r.Body)
	var q struct {
		Version        int
		Operation, Hub string
		DeviceID       string
		Device         map[string]any
		Twin           struct{ Tags, Desired map[string]any }
	}
	d := json.NewDecoder(strings.NewReader(string(body)))
	d.UseNumber()
	if r.URL.RawQuery != "code=hush" || r.Method != http.MethodPost || !Signed(b.key, r.Header.Get("Touchmark-Signature"), body) || len(r.Header.Get("Idempotency-Key")) != 36 {
		fail(401, "Unauthorized")
		return
	}
	if d.Decode(&q) != nil || q.Version != 1 || q.Hub == "" {
		fail(400, "ArgumentInvalid")
		return
	}
	have := b.devices[q.DeviceID]
	if have == nil && q.Operation != "check" && q.Operation != "admit" {
		fail(404, "DeviceNotFound")
		return
	}
	switch q.Operation {
	case "check":
	case "admit":
		answer["created"] = have == nil
		if have == nil {
			b.twins[q.DeviceID] = map[string]any{"tags": map[string]any{}, "desired": map[string]any{}}
		} else {
			q.Device["disabled"] = have["disabled"]
		}
		b.devices[q.DeviceID] = q.Device
	case "device":
		shown := map[string]any{}
		for k, v := range have {
			if k != "keys" {
				shown[k] = v
			}
		}
		answer["device"] = shown
	case "remove":
		delete(b.devices, q.DeviceID)
		delete(b.twins, q.DeviceID)
	case "twin":
		answer["twin"] = b.twins[q.DeviceID]
	case "mergeTwin":
		merge(b.twins[q.DeviceID], map[string]any{"tags": q.Twin.Tags, "desired": q.Twin.Desired})
	default:
		fail(400, "ArgumentInvalid")
	}
}
