// Package dps holds the words of the Device Provisioning Service's wire: identifiers, JSON documents, API versions and
// error codes. It has no behaviour beyond parsing and printing them; every other package speaks these types, so that an
// enrollment in a bundle, in the store and on the wire is one and the same thing.
//
// The documents follow the device API (registration) and the service API (enrollments) of Azure IoT Hub DPS. Members are
// left out when empty and never null, except where Azure itself answers null.
package dps

import (
	"fmt"
	"strings"
	"time"
)

// MaxRegistrationID is the longest registration ID, and MaxCommonName the longest that fits a certificate's common name
// (X.520, ub-common-name), in characters.
const (
	MaxRegistrationID = 128
	MaxCommonName     = 64
)

// MaxIDScope is the longest ID scope, in characters.
const MaxIDScope = 32

// CheckRegistrationID says what keeps id from being a registration ID: 1 to 128 letters, digits and "-._:", the last of them
// a letter, a digit or "-". It returns nil for a good one.
func CheckRegistrationID(id string) error { return checkID("registration ID", id) }

// CheckGroupID says what keeps id from being an enrollment group ID, which has the grammar of a registration ID.
func CheckGroupID(id string) error { return checkID("group ID", id) }

// CheckDeviceID says what keeps id from being a device's name in a hub: 1 to 128 letters, digits and "-.%_#*?!(),:;=@$'+" (service
// API, section 4.1), and no part of a path. Hubs tell them apart by case.
func CheckDeviceID(id string) error {
	if id == "" || len(id) > MaxRegistrationID || id == "." || id == ".." {
		return fmt.Errorf("device ID %.20q: want 1 to %d characters, and not . or .. alone", id, MaxRegistrationID)
	}
	for i := 0; i < len(id); i++ {
		if !idByte(id[i]) && strings.IndexByte("%#*?!(),;=@$'+", id[i]) < 0 {
			return fmt.Errorf("device ID %q: character %d is not one of letters, digits and -.%%_#*?!(),:;=@$'+ characters", id, i+1)
		}
	}
	return nil
}

func checkID(what, id string) error {
	if id == "" {
		return fmt.Errorf("%s is empty", what)
	}
	if len(id) > MaxRegistrationID {
		return fmt.Errorf("%s has %d characters, at most %d are allowed", what, len(id), MaxRegistrationID)
	}
	for i := 0; i < len(id); i++ {
		if !idByte(id[i]) {
			return fmt.Errorf("%s %q: character %d is not one of letters, digits and -._: characters", what, id, i+1)
		}
	}
	if c := id[len(id)-1]; c == '.' || c == '_' || c == ':' {
		return fmt.Errorf("%s %q ends in %q: the last character must be a letter, a digit or -", what, id, c)
	}
	return nil
}

func idByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '.' || c == '_' || c == ':'
}

// Fold returns the form in which registration IDs, group IDs and ID scopes are compared and stored as keys: ASCII lower
// case.
func Fold(id string) string {
	for i := 0; i < len(id); i++ {
		if 'A' <= id[i] && id[i] <= 'Z' {
			b := []byte(id)
			for ; i < len(b); i++ {
				if 'A' <= b[i] && b[i] <= 'Z' {
					b[i] += 'a' - 'A'
				}
			}
			return string(b)
		}
	}
	return id // and what is not ASCII stays different: a Kelvin sign is no k
}

// CheckIDScope says what keeps scope from being an ID scope: 1 to 32 letters and digits.
func CheckIDScope(scope string) error {
	if scope == "" || len(scope) > MaxIDScope {
		return fmt.Errorf("ID scope %.100q: want 1 to %d characters", scope, MaxIDScope)
	}
	for i := 0; i < len(scope); i++ {
		c := scope[i]
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9') {
			return fmt.Errorf("ID scope %q: character %d is not a letter or a digit", scope, i+1)
		}
	}
	switch Fold(scope) {
	case "enrollments", "enrollmentgroups", "registrations", "touchmark", "subscriptions", "providers", "devices", "twins", "statistics", "metrics", "healthz", "readyz":
		return fmt.Errorf("ID scope %q is a word of the APIs", scope)
	}
	return nil
}

// CheckServiceName says what keeps name from being a provisioning service's: 3 to 50 letters, digits and hyphens, not digits
// alone, and no hyphen first or last (service API, section 3.1).
func CheckServiceName(name string) error {
	if len(name) < 3 || len(name) > 50 {
		return fmt.Errorf("service name %.100q: want 3 to 50 characters", name)
	}
	digits := true
	for i := 0; i < len(name); i++ {
		c := name[i]
		digit := '0' <= c && c <= '9'
		if digits = digits && digit; !digit && !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '-') {
			return fmt.Errorf("service name %q: character %d is not a letter, a digit or a hyphen", name, i+1)
		}
	}
	if digits || name[0] == '-' || name[len(name)-1] == '-' {
		return fmt.Errorf("service name %q: want a letter in it, and no hyphen first or last", name)
	}
	return nil
}

// DefaultGlobalEndpoint is where devices look for their registration service unless told otherwise.
const DefaultGlobalEndpoint = "global.azure-devices-provisioning.net"

// CheckAPIVersion accepts every value shaped YYYY-MM-DD with an optional "-preview": a device in the field cannot be
// upgraded because its server is choosy.
func CheckAPIVersion(v string) error {
	date, rest := v, ""
	if len(v) > 10 {
		date, rest = v[:10], v[10:]
	}
	if _, err := time.Parse(time.DateOnly, date); err != nil || rest != "" && rest != "-preview" {
		return fmt.Errorf("api-version %q is not of the form YYYY-MM-DD or YYYY-MM-DD-preview", v)
	}
	return nil
}

// AcceptsCSR reports whether a register request of this version may carry a certificate signing request as csr, and
// AcceptsClientCertificateCSR whether as clientCertificateCsr (device API, section 15.2).
func AcceptsCSR(apiVersion string) bool { return apiVersion >= "2025-07-01-preview" }

// AcceptsClientCertificateCSR is described at [AcceptsCSR].
func AcceptsClientCertificateCSR(apiVersion string) bool { return apiVersion == "2021-11-01-preview" }

// Time prints and parses timestamps: UTC, "Z", and seven fractional digits as the device API has them, or as many as there are,
// for the service API.
type Time struct {
	time.Time
	trimmed bool
}

const (
	timeLayout    = "2006-01-02T15:04:05.0000000Z"
	trimmedLayout = "2006-01-02T15:04:05.9999999Z"
)

// Trim returns the time as the service API prints it; of nil it is nil.
func (t *Time) Trim() *Time {
	if t == nil {
		return nil
	}
	return &Time{t.Time, true}
}

// MarshalJSON implements json.Marshaler.
func (t Time) MarshalJSON() ([]byte, error) { return []byte(`"` + t.String() + `"`), nil }

// UnmarshalJSON implements json.Unmarshaler; it takes any RFC 3339 time.
func (t *Time) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		return nil
	}
	u, err := time.Parse(`"`+time.RFC3339Nano+`"`, string(b))
	if err != nil {
		return err
	}
	t.Time = u.UTC()
	return nil
}

// String prints the time as MarshalJSON does, without quotes.
func (t Time) String() string {
	if t.trimmed {
		return t.UTC().Format(trimmedLayout)
	}
	return t.UTC().Format(timeLayout)
}
