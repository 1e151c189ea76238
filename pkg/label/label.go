// Package label lays out the label of a unit from a template, renders it for a printer, prints it, and reads back what a
// scanner says of it.
//
// A [Template] is a file that says what stands where. With a [Label], what is known of one unit, it becomes ZPL II for label
// printers, a PNG picture, or a PDF sheet ([Template.Render], [Template.PDF]). A [Printer] takes the [Job] to a file, a network
// port, a serial port or a program. A [Scan] is what the codes on the label hold: it ties the unit's serial to its key, so that a
// label on the wrong unit, or a unit with the wrong label, is found by scanning it ([Scan.Matches]).
//
// The layout is made once, in dots of the printer, and all renderers follow it; the printer's own font, which ZPL uses, is
// narrower than the one that the layout is measured with. Nothing is cut and nothing overlaps: what does not fit is an error.
//
// Templates and printers may be used by many goroutines. ZPL follows Zebra's ZPL II Programming Guide, P1099958.
package label

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// maxText bounds each text that a label shows, in octets.
const maxText = 1024

// A Label is what is known of one unit. Texts are UTF-8 without control characters.
type Label struct {
	// Serial has 1 to 128 printable ASCII characters other than space. Required.
	Serial string
	// RegistrationID, Product and Revision are shown where the template asks for them.
	RegistrationID, Product, Revision string
	// Fingerprint is what [Fingerprint] returns, or empty for a unit without a public key.
	Fingerprint string
	// Copy is 0 for the first label of a unit, and counts its reprints.
	Copy int
	// Date is shown as year, month and day, in its own location; the zero time is empty.
	Date time.Time
	// Columns holds the row of the serial list, by column.
	Columns map[string]string
}

// Fingerprint names a public key on labels: the first 16 hexadecimal digits, in upper case, of the SHA-256 of its
// SubjectPublicKeyInfo (RFC 5280 §4.1).
func Fingerprint(pub crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", fmt.Errorf("taking a public key's fingerprint: %w", err)
	}
	sum := sha256.Sum256(der)
	return fmt.Sprintf("%X", sum[:fingerprintDigits/2]), nil
}

func (l *Label) check() error {
	if err := (Scan{Serial: l.Serial, Fingerprint: l.Fingerprint}).check(); err != nil {
		return err
	}
	if isContent(l.Serial) {
		return fmt.Errorf("serial %q begins like the content of a code, and would be read back as one", l.Serial)
	}
	if l.Copy < 0 {
		return errors.New("the copy number is negative")
	}
	return nil
}

// builtIn are the names that a template may use beside those of columns. They go before columns of the same name.
var builtIn = []string{"scan", "serial", "registration-id", "fingerprint", "product", "revision", "date", "copy"}

// value returns what stands for a name in braces.
func (l *Label) value(name string) (string, error) {
	switch name {
	case "scan":
		return Scan{Serial: l.Serial, Fingerprint: l.Fingerprint}.String(), nil
	case "serial":
		return l.Serial, nil
	case "registration-id":
		return l.RegistrationID, nil
	case "fingerprint":
		return l.Fingerprint, nil
	case "product":
		return l.Product, nil
	case "revision":
		return l.Revision, nil
	case "date":
		if l.Date.IsZero() {
			return "", nil
		}
		return l.Date.Format(time.DateOnly), nil
	case "copy":
		if l.Copy == 0 {
			return "", nil
		}
		return fmt.Sprintf("R%d", l.Copy), nil
	}
	v, ok := l.Columns[name]
	if !ok {
		return "", fmt.Errorf("the serial list has no column %q", name)
	}
	return v, nil
}

// checkText refuses what no label can show.
func checkText(s string) error {
	if len(s) > maxText {
		return fmt.Errorf("a text of %d octets: at most %d", len(s), maxText)
	}
	if !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return fmt.Errorf("%q has characters that do not print", s)
	}
	return nil
}
