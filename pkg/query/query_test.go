package query_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/query"
)

const document = `{"registrationId":"Pump-1","deviceId":"Pump-1","attestation":{"type":"x509"},"provisioningStatus":"enabled","iotHubs":["hub-a.example.net","hub-b.example.net"],
"capabilities":{"iotEdge":true},"initialTwin":{"tags":{"site":"A7","floor":3,"a b":{"c":"it's"},"list":[1,2],"none":null,"when":"x"},"properties":{"desired":{"interval":1.5}}},
"createdDateTimeUtc":"2026-01-05T10:20:30.5Z","etag":"AbC"}`

func TestMatch(t *testing.T) {
	for text, want := range map[string]bool{
		``:                          true,
		` `:                         true,
		`SELECT *`:                  true,
		`select * from enrollments`: true,
		`SELECT * FROM enrollments WHERE registrationId = 'pump-1'`:                   true,
		`SELECT * WHERE "PUMP-1" = REGISTRATIONID`:                                    true,
		`SELECT * WHERE deviceId = 'pump-1'`:                                          false, // hubs tell device IDs apart by case
		`SELECT * WHERE deviceId = 'Pump-1'`:                                          true,
		`SELECT * WHERE attestation.type <> 'tpm'`:                                    true,
		`SELECT * WHERE attestation.type != 'X509'`:                                   false,
		`SELECT * WHERE provisioningStatus IN ['disabled', 'enabled']`:                true,
		`SELECT * WHERE provisioningStatus NOT IN ('disabled')`:                       true,
		`SELECT * WHERE 'hub-b.example.net' IN iotHubs`:                               true,
		`SELECT * WHERE iotHubs = 'hub-a.example.net'`:                                true,
		`SELECT * WHERE 'hub-c.example.net' IN iotHubs`:                               false,
		`SELECT * WHERE NOT 'hub-c.example.net' IN iotHubs`:                           true,
		`SELECT * WHERE tags.site = 'A7' AND tags.floor >= 3`:                         true,
		`SELECT * WHERE tags.site = 'a7'`:                                             false,
		`SELECT * WHERE 3 < tags.floor`:                                               false,
		`SELECT * WHERE 2 < tags.floor`:                                               true,
		`SELECT * WHERE tags.floor = '3'`:                                             false,
		`SELECT * WHERE tags['a b'].c = 'it''s'`:                                      true,
		`SELECT * WHERE tags.list = 2`:                                                true,
		`SELECT * WHERE tags.none = null`:                                             true,
		`SELECT * WHERE tags.site = null`:                                             false,
		`SELECT * WHERE desired.interval = 1.5e0`:                                     true,
		`SELECT * WHERE capabilities.iotEdge = true`:                                  true,
		`SELECT * WHERE capabilities.iotEdge != true`:                                 false,
		`SELECT * WHERE IS_DEFINED(tags.site)`:                                        true,
		`SELECT * WHERE NOT is_defined(tags.nothing)`:                                 true,
		`SELECT * WHERE tags.nothing != 'x'`:                                          false, // nothing can be said
		`SELECT * WHERE NOT tags.nothing = 'x'`:                                       false,
		`SELECT * WHERE tags.nothing = 1 OR tags.floor = 3`:                           true,
		`SELECT * WHERE tags.nothing = 1 AND tags.floor = 3`:                          false,
		`SELECT * WHERE STARTSWITH(registrationId, 'PUMP-')`:                          true,
		`SELECT * WHERE STARTSWITH(tags.site, 'a')`:                                   false,
		`SELECT * WHERE STARTSWITH(tags.floor, '3')`:                                  false,
		`SELECT * WHERE createdDateTimeUtc > '2026-01-05T10:20:30Z'`:                  true,
		`SELECT * WHERE createdDateTimeUtc < '2026-01-05T11:20:30.5+01:00'`:           false,
		`SELECT * WHERE (tags.floor = 1 OR tags.floor = 3) AND NOT (tags.site = 'B')`: true,
		`SELECT * WHERE tags.floor = 3 OR tags.floor = 1 AND tags.site = 'B'`:         true, // AND binds closer
		`SELECT * WHERE enrollmentGroupId = 'x'`:                                      false,
	} {
		q, err := query.Parse(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got, err := q.Match([]byte(document)); err != nil || got != want {
			t.Errorf("%s: %t, %v", text, got, err)
		}
	}
}

func TestRefused(t *testing.T) {
	for _, text := range []string{
		"SELECT registrationId FROM enrollments", "SELECT COUNT(*) FROM enrollments", "SELECT TOP 5 * FROM enrollments", "DELETE *", "SELECT * FROM", "SELECT * FROM a b", "SELECT * FROM enrollments WHERE",
		"SELECT * WHERE registrationId", "SELECT * WHERE registrationId = ", "SELECT * WHERE 1 = 1", "SELECT * WHERE registrationId = deviceId", "SELECT * WHERE password = 'x'",
		"SELECT * WHERE attestation.symmetricKey.primaryKey = 'x'", "SELECT * WHERE registrationId = 'x", "SELECT * WHERE (registrationId = 'x'", "SELECT * WHERE registrationId = 'x')", "SELECT * WHERE registrationId LIKE 'x'",
		"SELECT * WHERE registrationId IN []", "SELECT * WHERE registrationId IN ['x')", "SELECT * WHERE registrationId IN [deviceId]", "SELECT * WHERE 'x' IN ['x']", "SELECT * WHERE registrationId NOT = 'x'",
		"SELECT * WHERE tags. = 1", "SELECT * WHERE tags[1] = 1", "SELECT * WHERE tags.x > true", "SELECT * WHERE tags.x < null", "SELECT * WHERE createdDateTimeUtc > 'yesterday'", "SELECT * WHERE tags.x = 0x1F",
		"SELECT * WHERE tags.x = 1e999", "SELECT * WHERE tags.x = NaN", "SELECT * WHERE STARTSWITH(registrationId)", "SELECT * WHERE STARTSWITH('x', registrationId)", "SELECT * WHERE registrationId = 'x'; DROP TABLE records",
		"SELECT * WHERE registrationId = 'x' ORDER BY registrationId", "SELECT * WHERE \xff = 1", "SELECT * WHERE tags.x == 1", "SELECT * WHERE -",
		"SELECT * WHERE " + strings.Repeat("(", 100) + "tags.x = 1" + strings.Repeat(")", 100), "SELECT * WHERE " + strings.Repeat("NOT ", 100) + "tags.x = 1",
		"SELECT * WHERE tags" + strings.Repeat(".x", 100) + " = 1", "SELECT * WHERE tags.x IN [" + strings.Repeat("1,", 200) + "1]", "SELECT *" + strings.Repeat(" ", 5000),
	} {
		if q, err := query.Parse(text); err == nil {
			t.Errorf("%.100s: taken, from %q", text, q.From)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"SELECT * FROM enrollments WHERE tags.a = 'b' AND NOT (x IN [1, 2.5, 'y'])", `select * where startswith(deviceId, "x""y") or is_defined(tags['a b'].c)`, "SELECT * WHERE createdDateTimeUtc >= '2026-01-05T10:20:30.5Z'"} {
		f.Add(s, document)
	}
	f.Fuzz(func(t *testing.T, text, doc string) {
		q, err := query.Parse(text)
		if err != nil || !json.Valid([]byte(doc)) || doc == "" || strings.TrimSpace(doc)[0] != '{' {
			return
		}
		got, err := q.Match([]byte(doc))
		if err != nil {
			t.Fatalf("%q of %q: %v", text, doc, err)
		}
		if q.All() && !got {
			t.Fatalf("%q is for all, and not for %q", text, doc)
		}
		if q.All() {
			return
		}
		// What is said of a document cannot be false and its contrary true with it.
		if head, cond, ok := cutWhere(text); ok && got {
			if n, err := query.Parse(head + " WHERE NOT (" + cond + ")"); err == nil {
				if contrary, _ := n.Match([]byte(doc)); contrary {
					t.Fatalf("%q and its contrary are true of %q", text, doc)
				}
			}
		}
	})
}

// cutWhere splits a query at its first WHERE, where that is a word of the language for certain.
func cutWhere(text string) (head, cond string, ok bool) {
	for _, w := range []string{" WHERE ", " where "} {
		if head, cond, ok = strings.Cut(text, w); ok && !strings.ContainsAny(head, `'"`) {
			return head, cond, true
		}
	}
	return "", "", false
}
