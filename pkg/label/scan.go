package label

import (
	"errors"
	"fmt"
	"strings"
)

// A Scan is what a code on a label says. Its text is
//
//	TM1.<serial>.<fingerprint>    or    TM1.<serial>    for a unit without a public key
//
// where every character of the serial that is no upper-case letter and no digit is written as % and two upper-case hexadecimal
// digits. So the text has upper-case letters, digits, '.' and '%' only: QR codes hold it in their alphanumeric mode, and a
// scanner that types like a keyboard needs no key that national QWERTY and QWERTZ layouts have elsewhere, but Y and Z, whose
// exchange changes the serial and so never matches.
type Scan struct {
	Serial string
	// Fingerprint is that of the unit's public key ([Fingerprint]), or empty.
	Fingerprint string
	// Bare says that the code held the serial as it is and nothing else, as a Code 128 does that people made for serials.
	Bare bool
}

const (
	prefix            = "TM1."
	maxSerial         = 128 // pkg/mint takes as many
	fingerprintDigits = 16
	upperHex          = "0123456789ABCDEF"
)

func isContent(s string) bool {
	return len(s) >= len(prefix) && strings.EqualFold(s[:len(prefix)], prefix)
}

// plain reports whether a character of a serial stands for itself.
func plain(c byte) bool { return c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' }

func (s Scan) check() error {
	if s.Serial == "" || len(s.Serial) > maxSerial {
		return fmt.Errorf("serial %.40q: want 1 to %d characters", s.Serial, maxSerial)
	}
	for i := range len(s.Serial) {
		if c := s.Serial[i]; c <= ' ' || c >= 0x7f {
			return fmt.Errorf("serial %q: character %d is not a printable ASCII character other than space", s.Serial, i+1)
		}
	}
	if f := s.Fingerprint; f != "" && (len(f) != fingerprintDigits || strings.Trim(f, upperHex) != "") {
		return fmt.Errorf("fingerprint %.40q: want %d upper-case hexadecimal digits", f, fingerprintDigits)
	}
	return nil
}

// String returns the text of the code.
func (s Scan) String() string {
	if s.Bare {
		return s.Serial
	}
	b := []byte(prefix)
	for i := range len(s.Serial) {
		if c := s.Serial[i]; plain(c) {
			b = append(b, c)
		} else {
			b = append(b, '%', upperHex[c>>4], upperHex[c&15])
		}
	}
	if s.Fingerprint != "" {
		b = append(append(b, '.'), s.Fingerprint...)
	}
	return string(b)
}

// ParseScan reads what a scanner typed, without the key that it ends lines with: the text of a code, in the one form that
// [Scan.String] writes, or a bare serial. What begins like the former is never taken for the latter.
func ParseScan(text string) (Scan, error) {
	var s Scan
	rest, ok := strings.CutPrefix(text, prefix)
	if !ok {
		if isContent(text) {
			return Scan{}, errors.New("the scan is in lower case: is Caps Lock on?")
		}
		s = Scan{Serial: text, Bare: true}
	} else {
		if len(text) > len(prefix)+3*maxSerial+1+fingerprintDigits {
			return Scan{}, fmt.Errorf("the scan has %d characters, more than any label of ours", len(text))
		}
		serial, fingerprint, _ := strings.Cut(rest, ".")
		b := make([]byte, 0, len(serial))
		for i := 0; i < len(serial); i++ {
			c := serial[i]
			if c == '%' && i+2 < len(serial) {
				c = byte(strings.IndexByte(upperHex, serial[i+1])<<4 | strings.IndexByte(upperHex, serial[i+2]))
				i += 2
			}
			b = append(b, c)
		}
		s = Scan{Serial: string(b), Fingerprint: fingerprint}
	}
	if err := s.check(); err != nil {
		return Scan{}, fmt.Errorf("reading a scan: %w", err)
	}
	if s.String() != text {
		// A second form of the same content, or characters that a keyboard layout has changed.
		return Scan{}, fmt.Errorf("the scan %q is not as a label of ours has it: is the scanner set to another keyboard layout?", text)
	}
	return s, nil
}

// Matches reports whether the scanned label is this unit's. The fingerprint is empty for a unit without a public key. A bare
// serial says nothing of the key, and matches by serial alone.
func (s Scan) Matches(serial, fingerprint string) bool {
	return s.Serial != "" && s.Serial == serial && (s.Bare || s.Fingerprint == fingerprint)
}
