package dps

import (
	"bytes"
	"encoding/json"
	"unicode/utf16"
	"unicode/utf8"
)

// RetryAfter is the pause, in seconds, that every non-terminal answer asks for: the one value that every SDK takes
// (device API, section 6.3).
const RetryAfter = 3

// NoRetryAfter, as the hint of an answer or an error, is none at all. No service does that; devices must bear it.
const NoRetryAfter = "none"

// Encode renders a document as UTF-8, without escapes for & < >: what was free-form on its way in comes out octet by octet, but for
// white space.
func Encode(v any) ([]byte, error) {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(buf.Bytes(), []byte("\n")), nil
}

// Marshal renders an answer the way that every device parser takes it: pure ASCII, with other characters as \uXXXX, and
// without escapes for & < >, which some parsers would keep (device API, section 5.6).
func Marshal(v any) ([]byte, error) {
	b, err := Encode(v)
	return ascii(b), err
}

// ascii escapes what is not ASCII. Outside of strings JSON has nothing else.
func ascii(b []byte) []byte {
	i := 0
	for i < len(b) && b[i] < utf8.RuneSelf {
		i++
	}
	if i == len(b) {
		return b
	}
	out := append(make([]byte, 0, len(b)+16), b[:i]...)
	for i < len(b) {
		if b[i] < utf8.RuneSelf {
			out = append(out, b[i])
			i++
			continue
		}
		r, n := utf8.DecodeRune(b[i:])
		i += n
		if hi, lo := utf16.EncodeRune(r); hi != utf8.RuneError {
			out = appendEscape(appendEscape(out, hi), lo)
		} else {
			out = appendEscape(out, r)
		}
	}
	return out
}

func appendEscape(b []byte, r rune) []byte {
	const hex = "0123456789abcdef"
	return append(b, '\\', 'u', hex[r>>12&15], hex[r>>8&15], hex[r>>4&15], hex[r&15])
}
