package hub

import (
	"encoding/json"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/registration"
)

func TestIsPublic(t *testing.T) {
	for address, want := range map[string]bool{
		"8.8.8.8": true, "52.174.1.1": true, "2606:4700::1111": true, "2a00:1450::1": true,
		"127.0.0.1": false, "127.9.9.9": false, "::1": false, "::ffff:10.0.0.1": false, "10.1.2.3": false, "172.16.0.1": false, "172.31.255.255": false,
		"192.168.1.1": false, "169.254.169.254": false, "fe80::1": false, "fd12::1": false, "100.64.0.1": false, "100.127.255.255": false,
		"0.0.0.0": false, "0.1.2.3": false, "::": false, "224.0.0.1": false, "ff02::1": false, "255.255.255.255": false, "240.0.0.1": false,
		"192.0.2.1": false, "198.18.0.1": false, "64:ff9b::7f00:1": false, "2002:7f00:1::": false, "::7f00:1": false,
	} {
		if got := (addresses{publicOnly: true}).control("tcp", netip.AddrPortFrom(netip.MustParseAddr(address), 443).String(), nil) == nil; got != want {
			t.Errorf("%s: %v", address, got)
		}
	}
}

// The shapes of section 5.5.
func TestParseError(t *testing.T) {
	for _, c := range []struct{ header, body, name, message string }{
		{"", `{"Message":"ErrorCode:DeviceNotFound;E2 gone","ExceptionMessage":"Tracking ID:1"}`, "DeviceNotFound", "E2 gone"},
		{"DeviceNotFound", `{"Message":"ErrorCode:DeviceNotFound;E2 gone"}`, "DeviceNotFound", "E2 gone"},
		{"", `{"Message":"{\"errorCode\":404001,\"trackingId\":\"1\",\"message\":\"gone\",\"timestampUtc\":\"x\"}"}`, "DeviceNotFound", "gone"},
		{"DeviceNotFound", `{"Message":"{\"errorCode\":404001,\"message\":\"gone\"}"}`, "DeviceNotFound", "gone"},
		{"ThrottlingException", `{"Message":"{\"errorCode\":429999,\"message\":\"slow\"}"}`, "ThrottlingException", "slow"},
		{"", `{"errorCode":"401002","message":"no"}`, "IotHubUnauthorizedAccess", "no"},
		{"", `{"errorCode":401002,"message":"no"}`, "IotHubUnauthorizedAccess", "no"},
		{"", `{"Message":"no"}`, "", "no"},
		{"DeviceNotFound", "", "DeviceNotFound", ""},
		{"DeviceNotFound", "<html>", "DeviceNotFound", ""},
		{"DeviceNotFound", `{"Message":"ErrorCode:DeviceAlreadyExists;x"}`, "", "x"},
		{"DeviceNotFound", `{"errorCode":409001}`, "", ""},
		{"", `[]`, "", ""}, {"", `{"Message":7}`, "", ""}, {"", `{"Message":"ErrorCode:"}`, "", ""},
	} {
		if name, message := parseError(c.header, []byte(c.body)); name != c.name || message != c.message {
			t.Errorf("%q, %s: %q, %q", c.header, c.body, name, message)
		}
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	for s, want := range map[string]time.Duration{"": 0, "7": 7 * time.Second, "-7": 0, "7.5": 0, "999999": time.Hour, "99999999999999999999": 0, "soon": 0,
		now.Add(time.Minute).Format(http.TimeFormat): time.Minute, now.Add(-time.Minute).Format(http.TimeFormat): 0, now.AddDate(9, 0, 0).Format(http.TimeFormat): time.Hour} {
		if got := retryAfter(s, now); got != want {
			t.Errorf("%q: %v, want %v", s, got, want)
		}
	}
}

func FuzzParseError(f *testing.F) {
	f.Add("DeviceNotFound", []byte(`{"Message":"ErrorCode:DeviceNotFound;x","ExceptionMessage":"y"}`))
	f.Add("", []byte(`{"Message":"{\"errorCode\":404001,\"message\":\"gone\"}"}`))
	f.Add("", []byte(`{"errorCode":"","message":""}`))
	h := rest{name: "hub", now: time.Now}
	f.Fuzz(func(t *testing.T, header string, body []byte) {
		name, message := parseError(header, body)
		e := h.refused("asking", answer{status: 404, body: body}, name, message)
		if len(e.Error()) > 600 || strings.ContainsFunc(e.Err.Error(), func(r rune) bool { return r < ' ' || r == 0x7f }) || opaque.MatchString(said(message)) {
			t.Fatalf("%q", e.Error())
		}
		if header != "" && name != header && name != "" {
			t.Fatalf("header %q, name %q", header, name)
		}
	})
}

func FuzzParseResults(f *testing.F) {
	f.Add([]byte(`{"responses":[{"command":"getClient","correlationData":"c","data":{"client":{"username":"d","textdescription":"{\"touchmark\":1,\"key\":\"00\"}","roles":[{"rolename":"touchmark:d"}]}}}]}`))
	f.Add([]byte(`{"responses":[{"command":"getClient","correlationData":"c","error":"Client not found"}]}`))
	f.Add([]byte(`{"responses":[{"command":"getClient","correlationData":"c"},{}]}`))
	f.Fuzz(func(t *testing.T, payload []byte) {
		results, err := parseResults(payload, []command{{Command: "getClient", Correlation: "c"}})
		if err != nil || results == nil {
			return
		}
		if len(results) != 1 || results[0].Command != "getClient" || results[0].Correlation != "c" {
			t.Fatalf("%+v", results)
		}
		c, err := parseClient(results[0].Data, "d")
		if err != nil {
			return
		}
		if c.Username != "d" {
			t.Fatalf("%+v", c)
		}
		if c.Touchmark != 0 { // what is ours is written again as something that is ours, and the same
			again := client{}
			if decode([]byte(c.description.text()), &again.description, true) != nil || again.description.text() != c.description.text() {
				t.Fatalf("%+v", c.description)
			}
		}
	})
}

func FuzzParseBackend(f *testing.F) {
	f.Add([]byte(`{"version":1,"created":true}`))
	f.Add([]byte(`{"version":1,"device":{"deviceId":"d","thumbprints":["A"]}}`))
	f.Add([]byte(`{"version":1,"twin":{"tags":{"a":1},"desired":{"$version":1}}}`))
	f.Add([]byte(`{"version":1,"error":{"code":"DeviceNotFound","message":"x"}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		a, err := parseBackend(body)
		if err != nil {
			return
		}
		if a.Version != 1 {
			t.Fatal(a.Version)
		}
		if a.Twin != nil {
			if _, err := json.Marshal(registration.HubTwin{Tags: a.Twin.Tags, Desired: a.Twin.Desired}); err != nil {
				t.Fatal(err)
			}
		}
	})
}
