package emulate_test

import (
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/emulate"
	"github.com/touchmark/touchmark/pkg/registration"
)

const goodEnrollments = `[
  {"registrationId":"dev-1","attestation":{"type":"symmetricKey","symmetricKey":{"primaryKey":"a2tra2tra2tra2tra2tra2s="}},
   "initialTwin":{"tags":{"anything":{"may":["be","here"]}}}, "etag":"x", "createdDateTimeUtc":"2026-01-02T03:04:05Z"},

  {"enrollmentGroupId":"g","attestation":{"type":"symmetricKey"},"provisioningStatus":"enabled"}
]
`

func TestParseEnrollments(t *testing.T) {
	list, err := emulate.ParseEnrollments([]byte(goodEnrollments))
	if err != nil || len(list) != 2 || list[0].Kind != registration.Individual || list[0].ID != "dev-1" || list[0].Line != 2 ||
		list[1].Kind != registration.Group || list[1].ID != "g" || list[1].Line != 5 || !strings.HasPrefix(string(list[1].Document), `{"enr`) {
		t.Fatalf("%+v, %v", list, err)
	}
	if list, err := emulate.ParseEnrollments([]byte("\n\n {\"registrationId\":\"x\"}\n")); err != nil || len(list) != 1 || list[0].Line != 3 {
		t.Errorf("%+v, %v", list, err)
	}
	if list, err := emulate.ParseEnrollments([]byte("[]")); err != nil || len(list) != 0 {
		t.Errorf("%+v, %v", list, err)
	}
	for text, want := range map[string]string{
		"":                                   "empty",
		" \n":                                "empty",
		"7":                                  "line 1, column 1: want an enrollment",
		"\"x\"":                              "line 1, column 1: want an enrollment",
		"[\n {\"registrationId\":\"x\",}\n]": "line 2, column 24: invalid character '}'",
		"[7]":                                "line 1, column 2: want an enrollment",
		"{\"registrationId\":\"x\"} {}":      "line 1, column 24: invalid character '{'",
		"{\"registrationId\":\"x\",\n  \"attestaton\":{}}":                                  `line 2, column 14: enrollment has no member "attestaton"`,
		"{\"RegistrationId\":\"x\"}":                                                        `has no member "RegistrationId"`,
		"{\"registrationId\":\"x\",\"attestation\":{\"type\":\"x509\",\"x509\":{\"a\":1}}}": `x509 has no member "a"`,
		"{\"registrationId\":\"x\",\"registrationId\":\"x\"}":                               `enrollment has "registrationId" twice`,
		"{\"registrationId\":\"x\",\"initialTwin\":{\"tags\":{\"a\":1,\"a\":2}}}":           `tags has "a" twice`,
		"{\"registrationId\":\"x\",\"enrollmentGroupId\":\"x\"}":                            "both",
		"{\"enrollmentGroupId\":\"x\",\"deviceId\":\"x\"}":                                  `has no member "deviceId"`,
		"{\"registrationId\":7}":                                                            "line 1, column 19: registrationId cannot be a number",
		"{\"registrationId\":\"x\",\n\"iotHubs\":\"h\"}":                                    "line 2, column 13: iotHubs cannot be a string",
		"{\"registrationId\":\"x\",\"provisioningStatus\":\"maybe\"}":                       `"maybe" is not one of`,
	} {
		_, err := emulate.ParseEnrollments([]byte(text))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
}

// What is taken is whole, and stands where it says.
func FuzzEnrollments(f *testing.F) {
	f.Add([]byte(goodEnrollments))
	f.Add([]byte(`{"registrationId":"x","attestation":{"tpm":{"endorsementKey":"A"},"type":"tpm"}}`))
	f.Add([]byte(`[[{"registrationId":"x"}],null,{"enrollmentGroupId":null}]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := emulate.ParseEnrollments(b)
		if err != nil {
			return
		}
		lines := strings.Split(string(b), "\n")
		for _, e := range list {
			if e.Line < 1 || e.Line > len(lines) || !strings.Contains(lines[e.Line-1], "{") || e.Document[0] != '{' || e.Kind == "" {
				t.Fatalf("%q: %+v", b, e)
			}
			if again, err := emulate.ParseEnrollments(e.Document); err != nil || len(again) != 1 || again[0].ID != e.ID {
				t.Fatalf("%q: %+v, %v", b, again, err)
			}
		}
	})
}
