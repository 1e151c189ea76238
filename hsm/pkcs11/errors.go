//go:build cgo

package pkcs11

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"
)

// meanings is what the common answers of tokens mean here, and what to try. PKCS#11 2.40 §5.1 has the standard's words.
var meanings = map[uint]struct{ meaning, try string }{
	pkcs11.CKR_ARGUMENTS_BAD:                    {"the module refuses how it is called", "a module that wants parameters of its own takes them from x-init-reserved in the key URI"},
	pkcs11.CKR_ATTRIBUTE_SENSITIVE:              {"the token does not show that attribute", "nothing: sensitive keys stay inside"},
	pkcs11.CKR_ATTRIBUTE_READ_ONLY:              {"the token sets that attribute itself", "see what the token can do with touchmark token show"},
	pkcs11.CKR_ATTRIBUTE_TYPE_INVALID:           {"the token does not know that attribute", "see what the token can do with touchmark token show"},
	pkcs11.CKR_ATTRIBUTE_VALUE_INVALID:          {"the token does not take that kind of key", "see what the token can do with touchmark token show"},
	pkcs11.CKR_BUFFER_TOO_SMALL:                 {"the module answers more than it announced", "report it to the token's vendor"},
	pkcs11.CKR_CURVE_NOT_SUPPORTED:              {"the token does not have that curve", "make a key of another algorithm"},
	pkcs11.CKR_DATA_LEN_RANGE:                   {"the data is too long for that key", "report it: touchmark hashes before it signs"},
	pkcs11.CKR_DEVICE_ERROR:                     {"the token or the way to it failed", "plug it in again or restart its service; touchmark finds it by itself"},
	pkcs11.CKR_DEVICE_MEMORY:                    {"the token has no room left", "delete keys that are not needed, or make device keys in memory"},
	pkcs11.CKR_DEVICE_REMOVED:                   {"the token was pulled out", "put it back; touchmark finds it by itself"},
	pkcs11.CKR_ENCRYPTED_DATA_INVALID:           {"what was to be unwrapped was not wrapped with that key", "name the key that it was wrapped with"},
	pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE:         {"what was to be unwrapped has an impossible length", "wrap the key again"},
	pkcs11.CKR_FUNCTION_FAILED:                  {"the token gives no reason: it may be full, or the disk that it is on", "look for its reason in the log of the module, and for room"},
	pkcs11.CKR_FUNCTION_NOT_SUPPORTED:           {"the module does not have that function", "see what the token can do with touchmark token show"},
	pkcs11.CKR_GENERAL_ERROR:                    {"the module gives no reason: it may be full, or the disk that it is on, or out of reach", "look for its reason in the log of the module, and for room"},
	pkcs11.CKR_HOST_MEMORY:                      {"the module has no memory left", "restart it"},
	pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED:       {"the key was made for something else", "use a key of the right usage (touchmark key list)"},
	pkcs11.CKR_KEY_NOT_WRAPPABLE:                {"the token does not wrap that key", "only keys that were made extractable leave a token"},
	pkcs11.CKR_KEY_SIZE_RANGE:                   {"the token does not have keys of that size", "make a key of another algorithm"},
	pkcs11.CKR_KEY_TYPE_INCONSISTENT:            {"the key is of another type than the operation wants", "use a key of the right algorithm (touchmark key list)"},
	pkcs11.CKR_KEY_UNEXTRACTABLE:                {"the key was made to stay in the token", "only keys that were made extractable leave a token"},
	pkcs11.CKR_MECHANISM_INVALID:                {"the token does not have that mechanism", "see what the token can do with touchmark token show"},
	pkcs11.CKR_MECHANISM_PARAM_INVALID:          {"the token does not take the mechanism's parameters", "see what the token can do with touchmark token show"},
	pkcs11.CKR_OPERATION_ACTIVE:                 {"the session is busy with something that was not ended", "report it to the token's vendor; touchmark uses a session for one thing at a time"},
	pkcs11.CKR_PIN_EXPIRED:                      {"the PIN has to be changed first", "change it with the token's tool"},
	pkcs11.CKR_PIN_INCORRECT:                    {"the token refused the PIN", "check the PIN before the next try: a few wrong ones lock the token"},
	pkcs11.CKR_PIN_INVALID:                      {"the PIN has characters that the token does not take", "check the PIN"},
	pkcs11.CKR_PIN_LEN_RANGE:                    {"no PIN of the token has that length", "check the PIN"},
	pkcs11.CKR_PIN_LOCKED:                       {"the PIN is locked after too many wrong tries", "the security officer can set a new one with the SO PIN"},
	pkcs11.CKR_SESSION_COUNT:                    {"every session of the token is taken", "end other programs that use the token"},
	pkcs11.CKR_SESSION_HANDLE_INVALID:           {"the token forgot the session", "nothing: touchmark logs in again"},
	pkcs11.CKR_SESSION_READ_ONLY:                {"the session may not write", "check whether the token is write-protected"},
	pkcs11.CKR_TEMPLATE_INCONSISTENT:            {"the token does not take that combination of attributes", "see what the token can do with touchmark token show"},
	pkcs11.CKR_TEMPLATE_INCOMPLETE:              {"the token wants more said about the key", "see what the token can do with touchmark token show"},
	pkcs11.CKR_TOKEN_NOT_PRESENT:                {"the slot is empty", "put the token back; touchmark finds it by itself"},
	pkcs11.CKR_TOKEN_NOT_RECOGNIZED:             {"the module does not know this kind of token", "use the module of the token's vendor"},
	pkcs11.CKR_TOKEN_WRITE_PROTECTED:            {"the token is write-protected", "lift the protection with the token's tool"},
	pkcs11.CKR_UNWRAPPING_KEY_HANDLE_INVALID:    {"the unwrapping key is not there any more", "open it again"},
	pkcs11.CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT: {"that key cannot unwrap", "use an AES-256 key of usage wrap"},
	pkcs11.CKR_USER_ANOTHER_ALREADY_LOGGED_IN:   {"the security officer is logged in", "end the program that logged in with the SO PIN"},
	pkcs11.CKR_USER_NOT_LOGGED_IN:               {"the token forgot the login", "nothing: touchmark logs in again"},
	pkcs11.CKR_USER_PIN_NOT_INITIALIZED:         {"the token has no user PIN yet", "set one with the token's tool and the SO PIN"},
	pkcs11.CKR_USER_TOO_MANY_TYPES:              {"somebody else is logged in to the token", "end other programs that use the token"},
	pkcs11.CKR_WRAPPED_KEY_INVALID:              {"what was to be unwrapped was not wrapped with that key", "name the key that it was wrapped with"},
	pkcs11.CKR_WRAPPED_KEY_LEN_RANGE:            {"what was to be unwrapped has an impossible length", "wrap the key again"},
	pkcs11.CKR_WRAPPING_KEY_TYPE_INCONSISTENT:   {"that key cannot wrap", "use an AES-256 key of usage wrap"},
}

// Explain returns what a token's answer in err means here and what to try about it. ok is false when err holds none, or one
// without an entry.
func Explain(err error) (meaning, try string, ok bool) {
	var e pkcs11.Error
	if !errors.As(err, &e) {
		return "", "", false
	}
	m, ok := meanings[uint(e)]
	return m.meaning, m.try, ok
}

// explainedError adds to a token's answer what it means.
type explainedError struct {
	error
	meaning string
}

func (e explainedError) Error() string { return e.error.Error() + " (" + e.meaning + ")" }
func (e explainedError) Unwrap() error { return e.error }

// explained adds to an error what the token's answer in it means.
func explained(err error) error {
	var already explainedError
	if meaning, _, ok := Explain(err); ok && !errors.As(err, &already) {
		return explainedError{err, meaning}
	}
	return err
}

// is reports whether err holds one of these answers of a token.
func is(err error, codes ...uint) bool {
	var e pkcs11.Error
	return errors.As(err, &e) && slices.Contains(codes, uint(e))
}

// didYouMean names those of names that are near to what was asked for, behind a semicolon.
func didYouMean(want string, names []string) string {
	type near struct {
		name     string
		distance int
	}
	var found []near
	for _, n := range names {
		if n == want || n == "" || want == "" {
			continue
		}
		d := distance(strings.ToLower(want), strings.ToLower(n))
		if d <= max(1, len(want)/3) || strings.HasPrefix(strings.ToLower(n), strings.ToLower(want)) {
			found = append(found, near{n, d})
		}
	}
	if len(found) == 0 {
		return ""
	}
	slices.SortFunc(found, func(a, b near) int {
		if a.distance != b.distance {
			return a.distance - b.distance
		}
		return strings.Compare(a.name, b.name)
	})
	text := make([]string, 0, 3)
	for _, n := range found[:min(3, len(found))] {
		text = append(text, fmt.Sprintf("%q", n.name))
	}
	return "; did you mean " + strings.Join(text, " or ") + "?"
}

// distance is Levenshtein's.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		last := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			last, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, last+cost)
		}
	}
	return row[len(b)]
}
