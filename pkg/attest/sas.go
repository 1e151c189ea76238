package attest

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// Skew is how far a token's expiry may lie in the past: clocks differ, and some SDKs sign for 30 seconds (device API,
// section 8.2). A certificate may become valid as far in the future.
const Skew = 5 * time.Minute

// maxToken bounds a SAS token, in octets. Azure's SDKs stay below 512.
const maxToken = 2048

// Errors of a token. None of them goes to the device.
var (
	ErrMalformed = errors.New("token is malformed")
	ErrExpired   = errors.New("token has expired")
	ErrSignature = errors.New("signature does not verify")
	ErrResource  = errors.New("token is for another resource")
)

// A Token is a parsed SAS token: SharedAccessSignature sr=…&sig=…&se=…&skn=….
type Token struct {
	// Resource is sr, decoded; untrusted until verified.
	Resource string
	// Policy is skn, decoded. Devices' tokens need none.
	Policy string
	// Expiry is se.
	Expiry time.Time

	signed []byte // sr as written, line feed, se as written
	sig    []byte
}

// ParseToken parses a token. The string that was signed is taken exactly as it stands: every SDK encodes the resource in
// its own way and signs what it wrote.
func ParseToken(s string) (Token, error) {
	var t Token
	if len(s) > maxToken {
		return t, fmt.Errorf("%w: longer than %d octets", ErrMalformed, maxToken)
	}
	const scheme = "sharedaccesssignature"
	if len(s) <= len(scheme) || !strings.EqualFold(s[:len(scheme)], scheme) || s[len(scheme)] != ' ' {
		return t, fmt.Errorf("%w: it does not begin with SharedAccessSignature", ErrMalformed)
	}
	var sr, sig, se string
	var has struct{ sr, sig, se, skn bool }
	for part := range strings.SplitSeq(strings.TrimLeft(s[len(scheme):], " "), "&") {
		name, value, _ := strings.Cut(part, "=")
		var dst *string
		var seen *bool
		var policy string
		switch name {
		case "sr":
			dst, seen = &sr, &has.sr
		case "sig":
			dst, seen = &sig, &has.sig
		case "se":
			dst, seen = &se, &has.se
		case "skn":
			dst, seen = &policy, &has.skn
		default:
			continue
		}
		if *seen {
			return t, fmt.Errorf("%w: %s stands twice", ErrMalformed, name)
		}
		*dst, *seen = value, true
		if name == "skn" {
			var ok bool
			if t.Policy, ok = percentDecode(policy); !ok {
				return t, fmt.Errorf("%w: skn", ErrMalformed)
			}
		}
	}
	if !has.sr || !has.sig || !has.se {
		return t, fmt.Errorf("%w: sr, sig and se are needed", ErrMalformed)
	}
	seconds, err := strconv.ParseUint(se, 10, 40)
	if err != nil {
		return t, fmt.Errorf("%w: se is not a time", ErrMalformed)
	}
	t.Expiry = time.Unix(int64(seconds), 0)
	var ok bool
	if t.Resource, ok = percentDecode(sr); !ok {
		return t, fmt.Errorf("%w: sr", ErrMalformed)
	}
	text, ok := percentDecode(sig)
	if !ok {
		return t, fmt.Errorf("%w: sig", ErrMalformed)
	}
	t.sig, err = base64.RawStdEncoding.DecodeString(strings.TrimRight(text, "="))
	if err != nil || len(t.sig) != sha256.Size {
		return t, fmt.Errorf("%w: sig is not base64 of 32 octets", ErrMalformed)
	}
	t.signed = append(append([]byte(sr), '\n'), se...)
	return t, nil
}

// percentDecode undoes percent-encoding. A "+" stays one: it is a digit of base64, and this is no form.
func percentDecode(s string) (string, bool) {
	if !strings.Contains(s, "%") {
		return s, true
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] != '%' {
			b = append(b, s[i])
			continue
		}
		if i+2 >= len(s) {
			return "", false
		}
		v, err := strconv.ParseUint(s[i+1:i+3], 16, 8)
		if err != nil {
			return "", false
		}
		b = append(b, byte(v))
		i += 2
	}
	return string(b), true
}

// Expired reports whether the token's time is over, skew allowed for.
func (t *Token) Expired(now time.Time) bool { return now.After(t.Expiry.Add(Skew)) }

// SignedBy reports whether the token was signed with the key. It takes the same time whatever the answer.
func (t *Token) SignedBy(key []byte) bool {
	h := hmac.New(sha256.New, key)
	h.Write(t.signed)
	return hmac.Equal(h.Sum(nil), t.sig)
}

// ForDevice reports whether the token's resource is that registration ID of that ID scope, whatever the letter case.
func (t *Token) ForDevice(idScope, registrationID string) bool {
	return dps.Fold(t.Resource) == dps.Fold(idScope+"/registrations/"+registrationID)
}

// DeriveKey returns a device's key in a symmetric-key group: HMAC-SHA256(group key, registration ID), with the ID as the
// device writes it (device API, section 8.3).
func DeriveKey(groupKey []byte, registrationID string) []byte {
	h := hmac.New(sha256.New, groupKey)
	h.Write([]byte(registrationID))
	return h.Sum(nil)
}
