package dps_test

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// Device API, section 3.
func TestCheckRegistrationID(t *testing.T) {
	for id, ok := range map[string]bool{
		"a": true, "A-b.c_d:e-": true, "0": true, strings.Repeat("a", 128): true, "a-": true,
		"": false, strings.Repeat("a", 129): false, "a b": false, "a.": false, "a_": false, "a:": false, "-a": true, ".a": true, "ä": false, "a/b": false, "a\n": false,
	} {
		if err := dps.CheckRegistrationID(id); (err == nil) != ok {
			t.Errorf("%q: %v", id, err)
		}
	}
}

func TestFold(t *testing.T) {
	for in, want := range map[string]string{"": "", "abc-1": "abc-1", "aBC": "abc", "\u212aey": "\u212aey", "Ä": "Ä"} {
		if got := dps.Fold(in); got != want {
			t.Errorf("%q folds to %q", in, got)
		}
	}
	for _, scope := range []string{"Enrollments", "enrollmentgroups", "registrations", "touchmark", "", "a-b", strings.Repeat("a", 33)} {
		if dps.CheckIDScope(scope) == nil {
			t.Errorf("%q is an ID scope", scope)
		}
	}
}

// DPS-D 3, 4: pure ASCII, and nothing escaped that need not be.
func TestMarshal(t *testing.T) {
	b, err := dps.Marshal(map[string]any{"n": "ä𝄞\u2028", "h": "<a&b>/"})
	if want := `{"h":"<a&b>/","n":"\u00e4\ud834\udd1e\u2028"}`; err != nil || string(b) != want {
		t.Errorf("%s, %v; want %s", b, err, want)
	}
}

// DPS-D 9, DPS-S 8: times come with up to seven digits and leave with seven.
func TestTime(t *testing.T) {
	for in, want := range map[string]string{
		`"2026-01-02T03:04:05.1234567Z"`: `"2026-01-02T03:04:05.1234567Z"`, `"2026-01-02T03:04:05Z"`: `"2026-01-02T03:04:05.0000000Z"`,
	} {
		var x dps.Time
		if err := json.Unmarshal([]byte(in), &x); err != nil {
			t.Errorf("%s: %v", in, err)
		}
		if b, err := json.Marshal(x); err != nil || string(b) != want {
			t.Errorf("%s comes out as %s, %v", in, b, err)
		}
	}
	if got := (dps.Time{Time: time.Date(2026, 1, 2, 3, 4, 5, 999999999, time.FixedZone("", 3600))}).String(); got != "2026-01-02T02:04:05.9999999Z" {
		t.Error(got)
	}
}

func FuzzMarshal(f *testing.F) {
	f.Add("ä\xff\u2028<&>")
	f.Fuzz(func(t *testing.T, s string) {
		b, err := dps.Marshal(map[string]string{"s": s})
		if err != nil {
			t.Fatal(err)
		}
		var back map[string]string
		if err := json.Unmarshal(b, &back); err != nil || back["s"] != strings.ToValidUTF8(s, "\ufffd") && len(back["s"]) == 0 && s != "" {
			t.Fatalf("%q: %s, %v", s, b, err)
		}
		for _, c := range b {
			if c < ' ' || c > 0x7f {
				t.Fatalf("%q: %q", s, b)
			}
		}
	})
}

// What is read of an enrollment is written the same way again.
func FuzzEnrollment(f *testing.F) {
	f.Add([]byte(`{"registrationId":"x","attestation":{"type":"SYMMETRICKEY"},"provisioningStatus":null,"createdDateTimeUtc":"2026-01-02T03:04:05Z","iotHubs":["a"]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var e, again dps.IndividualEnrollment
		if json.Unmarshal(b, &e) != nil || e.Attestation.Check() != nil {
			return // and so would the service have it
		}
		out, err := dps.Marshal(e)
		if err != nil {
			t.Fatalf("%q: %v", b, err)
		}
		if err := json.Unmarshal(out, &again); err != nil {
			t.Fatalf("%q becomes %s: %v", b, out, err)
		}
		if twice, err := dps.Marshal(again); err != nil || !reflect.DeepEqual(out, twice) {
			t.Fatalf("%q becomes %s, then %s, %v", b, out, twice, err)
		}
	})
}
