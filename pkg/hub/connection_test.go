package hub_test

import (
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/hub"
	"github.com/touchmark/touchmark/pkg/registration"
)

const (
	key  = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
	hubA = "HostName=hub-a.example.net;SharedAccessKeyName=dps;SharedAccessKey=" + key
)

func TestParseConnection(t *testing.T) {
	ca := attesttest.CA(t, nil, "Root")
	text := base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Certificate.Raw}))
	for _, c := range []struct {
		kind registration.HubKind
		text string
		host string
		port int
		user string
	}{
		{"azure", hubA, "hub-a.example.net", 443, "dps"},
		{"azure", strings.ToLower(hubA[:strings.Index(hubA, key)]) + key, "hub-a.example.net", 443, "dps"},
		{"azure", "hostname=hub-a.example.net;sharedaccesskeyname=dps;sharedaccesskey=" + strings.Repeat("abcd", 8), "hub-a.example.net", 443, "dps"},
		{"builtin", "SharedAccessKey=" + key + ";PORT=8443;SharedAccessKeyName=a=c;HOSTNAME=Hub-A.Example.Net;Ca=" + text, "hub-a.example.net", 8443, "a=c"},
		{"azure", strings.Replace(hubA, "hub-a.example.net", "::1", 1), "::1", 443, "dps"},
		{"builtin", strings.Replace(hubA, ".net", ".net:8443", 1), "hub-a.example.net", 8443, "dps"},
		{"builtin", strings.Replace(hubA, "hub-a.example.net", "[::1]:8443", 1), "::1", 8443, "dps"},
		{"mosquitto", "HostName=mq;Username=u;Password=p=q", "mq", 8883, "u"},
		{"mosquitto", "HostName=127.0.0.1;Username=u;Password=p;Plain=true", "127.0.0.1", 1883, "u"},
		{"webhook", "URL=https://back.example.net:8443/a/b?code=x==&c=d;Secret=" + key, "back.example.net", 443, ""},
		{"webhook", "URL=http://127.0.0.1:8080/;Secret=" + key + ";Plain=true", "127.0.0.1", 443, ""},
		{"record", "", "", 0, ""},
	} {
		got, err := hub.ParseConnection(c.kind, c.text)
		if err != nil {
			t.Errorf("%s: %v", c.text, err)
			continue
		}
		if got.Host != c.host || got.Port != c.port || got.User != c.user {
			t.Errorf("%s: %s %d %s", c.text, got.Host, got.Port, got.User)
		}
		for _, shown := range []string{fmt.Sprint(got), fmt.Sprintf("%+v %#v", got, got)} {
			if strings.Contains(shown, key) || strings.Contains(shown, "code=") || strings.Contains(shown, "=p") {
				t.Errorf("it shows a secret: %s", shown)
			}
		}
	}
	for name, c := range map[string]struct {
		kind registration.HubKind
		text string
	}{
		"unknown kind":          {"kafka", hubA},
		"nothing":               {"azure", ""},
		"no key":                {"azure", "HostName=a;SharedAccessKeyName=dps"},
		"no host":               {"azure", "SharedAccessKeyName=dps;SharedAccessKey=" + key},
		"no name":               {"azure", "HostName=a;SharedAccessKey=" + key},
		"twice":                 {"azure", hubA + ";hostname=b"},
		"another member":        {"azure", hubA + ";GatewayHostName=b"},
		"a semicolon behind":    {"azure", hubA + ";"},
		"a line feed":           {"azure", hubA + "\n"},
		"a key that is none":    {"azure", hubA[:len(hubA)-4] + "****"},
		"a short key":           {"azure", "HostName=a;SharedAccessKeyName=dps;SharedAccessKey=AAAA"},
		"a key in base64url":    {"azure", "HostName=a;SharedAccessKeyName=dps;SharedAccessKey=" + strings.Replace(key, "M", "_", 1)},
		"a URL for a host":      {"azure", strings.Replace(hubA, "hub-a", "https://hub-a", 1)},
		"two ports":             {"azure", strings.Replace(hubA, ".net", ".net:443", 1) + ";Port=443"},
		"a port that is none":   {"azure", strings.Replace(hubA, ".net", ".net:https", 1)},
		"a colon":               {"azure", strings.Replace(hubA, ".net", ".net:", 1)},
		"a path in the host":    {"azure", strings.Replace(hubA, ".net", ".net/x", 1)},
		"a user in the host":    {"azure", strings.Replace(hubA, "hub-a", "evil@hub-a", 1)},
		"port 0":                {"azure", hubA + ";Port=0"},
		"port 65536":            {"azure", hubA + ";Port=65536"},
		"port 0443":             {"azure", hubA + ";Port=0443"},
		"a path for a CA":       {"azure", hubA + ";CA=/etc/ssl/ca.pem"},
		"a CA that is a key":    {"azure", hubA + ";CA=" + base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")}))},
		"azure without TLS":     {"azure", hubA + ";Plain=true"},
		"no password":           {"mosquitto", "HostName=mq;Username=u"},
		"password, certificate": {"mosquitto", "HostName=mq;Username=u;Password=p;Certificate=AAAA;Key=AAAA"},
		"certificate, no key":   {"mosquitto", "HostName=mq;Certificate=" + text},
		"a CA's certificate":    {"mosquitto", "HostName=mq;Certificate=" + text + ";Key=" + text},
		"plain, what?":          {"mosquitto", "HostName=mq;Username=u;Password=p;Plain=yes"},
		"webhook over http":     {"webhook", "URL=http://127.0.0.1/;Secret=" + key},
		"webhook without key":   {"webhook", "URL=https://back.example.net/"},
		"webhook with a user":   {"webhook", "URL=https://u:p@back.example.net/;Secret=" + key},
		"webhook to a file":     {"webhook", "URL=file:///etc/passwd;Secret=" + key},
		"webhook to nowhere":    {"webhook", "URL=https:///x;Secret=" + key},
		"webhook to port 99999": {"webhook", "URL=https://a:99999/x;Secret=" + key},
		"record with something": {"record", hubA},
		"long":                  {"azure", hubA + ";CA=" + strings.Repeat("A", 16<<10)},
	} {
		if c, err := hub.ParseConnection(c.kind, c.text); err == nil || strings.Contains(err.Error(), key[:20]) {
			t.Errorf("%s: %v, %v", name, c, err)
		}
	}
	if _, err := hub.ParseConnection("azure", hub.Mask(hubA)); !errors.Is(err, hub.ErrMasked) {
		t.Error(err)
	}
}

// DPS-S 65 and 66.
func TestMask(t *testing.T) {
	for text, want := range map[string]string{
		hubA:                  "HostName=hub-a.example.net;SharedAccessKeyName=dps;SharedAccessKey=****",
		strings.ToUpper(hubA): "HOSTNAME=HUB-A.EXAMPLE.NET;SHAREDACCESSKEYNAME=DPS;SHAREDACCESSKEY=****",
		"HostName=mq;Username=u;Password=p=q;Port=1": "HostName=mq;Username=u;Password=****;Port=1",
		"HostName=mq;Password=ab;cd=ef;gh":           "HostName=mq;Password=****;****=****;****",
		"HostName=mq;Certificate=AA==;Key=hush":      "HostName=mq;Certificate=AA==;Key=****",
		"Url=https://b/x?code=hush;Secret=hush":      "Url=https://b/x?****;Secret=****",
		"URL=https://u:hush@b/x":                     "URL=****",
		"hush":                                       "****",
		"":                                           "",
	} {
		if got := hub.Mask(text); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
		if got := hub.Mask(hub.Mask(text)); got != want {
			t.Errorf("%s, twice: %s", text, got)
		}
	}
	const back = "URL=https://b.example.net/x?code=hush;Secret=" + key
	for name, c := range map[string]struct{ text, stored, want string }{
		"the same":                {hub.Mask(hubA), hubA, hubA},
		"another order and case":  {"SHAREDACCESSKEY=****;hostname=HUB-A.example.net;SharedAccessKeyName=dps", hubA, "SHAREDACCESSKEY=" + key + ";hostname=HUB-A.example.net;SharedAccessKeyName=dps"},
		"with a key":              {hubA, "", hubA},
		"with another key":        {hubA, strings.Replace(hubA, "MDEy", "MDEz", 1), hubA},
		"another host":            {strings.Replace(hub.Mask(hubA), "hub-a", "hub-b", 1), hubA, ""},
		"another policy":          {strings.Replace(hub.Mask(hubA), "=dps", "=owner", 1), hubA, ""},
		"another port":            {hub.Mask(hubA) + ";Port=8443", hubA, ""},
		"another CA":              {hub.Mask(hubA) + ";CA=AAAA", hubA, ""},
		"less":                    {"HostName=hub-a.example.net;SharedAccessKey=****", hubA, ""},
		"a host of two":           {"HostName=evil.example.net;" + hub.Mask(hubA), hubA, ""},
		"nothing stored":          {hub.Mask(hubA), "", ""},
		"a webhook":               {hub.Mask(back), back, back},
		"a webhook, new secret":   {"URL=https://b.example.net/x?****;Secret=new", back, "URL=https://b.example.net/x?code=hush;Secret=new"},
		"a webhook, new query":    {"URL=https://b.example.net/x?code=new;Secret=****", back, ""},
		"another webhook":         {strings.Replace(hub.Mask(back), "b.ex", "c.ex", 1), back, ""},
		"another path":            {strings.Replace(hub.Mask(back), "/x", "/y", 1), back, ""},
		"a webhook without query": {"URL=https://b.example.net/x;Secret=****", "URL=https://b.example.net/x;Secret=" + key, "URL=https://b.example.net/x;Secret=" + key},
		"plain":                   {"HostName=127.0.0.1;Username=u;Password=****;Plain=true", "HostName=127.0.0.1;Username=u;Password=p", ""},
	} {
		got, err := hub.Restore(c.text, c.stored)
		if got != c.want || (err == nil) != (c.want != "") || err != nil && !errors.Is(err, hub.ErrMasked) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

func FuzzParseConnection(f *testing.F) {
	for _, seed := range []string{hubA, hub.Mask(hubA), hubA + ";Port=8443", "HostName=mq;Username=u;Password=p;Plain=true", "URL=https://b/x?code=hush;Secret=" + key, ";=;", "URL=https://%;Secret=****"} {
		f.Add(seed, hubA)
	}
	f.Fuzz(func(t *testing.T, text, stored string) {
		masked := hub.Mask(text)
		if hub.Mask(masked) != masked {
			t.Fatalf("masked twice: %q, %q", masked, hub.Mask(masked))
		}
		for _, kind := range []registration.HubKind{"azure", "mosquitto", "webhook", "record"} {
			c, err := hub.ParseConnection(kind, text)
			if err != nil || kind == "record" {
				continue
			}
			if strings.ContainsAny(c.Host, "/:@?# ") && !strings.Contains(c.Host, ":") || c.Port < 1 || c.Port > 65535 {
				t.Fatalf("%q: %q %d", text, c.Host, c.Port)
			}
			if _, err := hub.ParseConnection(kind, masked); err == nil {
				t.Fatalf("masked, it is still good: %q", masked)
			}
			if again, err := hub.Restore(masked, text); err != nil || again != text {
				t.Fatalf("%q comes back from %q as %q, %v", text, masked, again, err)
			}
			if _, err := hub.Open(hub.Config{Hub: registration.LinkedHub{Name: "h", Kind: kind, ConnectionString: text}}); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := hub.Restore(text, stored); err == nil && got != text && hub.Mask(got) != hub.Mask(text) {
			t.Fatalf("%q and %q: %q", text, stored, got)
		}
	})
}
