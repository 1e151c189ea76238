package label

import (
	"bytes"
	"fmt"
	"strings"
)

// zpl writes the label for a printer that draws it itself. Fields can say what they like: of their characters all but letters,
// digits, space and .-:,> go as _ and two hexadecimal digits (^FH), so that none of them can begin a command, whatever
// characters the printer is set to take for ^ and ~.
func (t *Template) zpl(l *Label) ([]byte, error) {
	items, err := t.layout(l)
	if err != nil {
		return nil, err
	}
	w, h := t.size()
	page := t.turn(rect{0, 0, w, h})
	turned := map[int]string{0: "N", 90: "R", 180: "I", 270: "B"}[t.Orientation]
	var b bytes.Buffer
	// What an earlier format may have left set is set here: character set, origin, orientation, mirror, reverse.
	fmt.Fprintf(&b, "^XA\n^CI28\n^PW%d\n^LL%d\n^LH0,0\n^PON\n^PMN\n^LRN\n^FWN\n", page.w, page.h)
	for i := range items {
		it := &items[i]
		p := t.turn(it.rect)
		switch it.kind {
		case "rect":
			fmt.Fprintf(&b, "^FO%d,%d^GB%d,%d,%d^FS\n", p.x, p.y, p.w, p.h, min(p.w, p.h))
		case "text":
			fmt.Fprintf(&b, "^FT%d,%d^A0%s,%d,%d", p.x, p.y, turned, it.em, it.em)
			field(&b, it.text)
		case "qr":
			// Printers put a QR code lower than ^FO says, by the height that ^BY was last given. Its orientation is always N.
			fmt.Fprintf(&b, "^BY%d,2,1^FO%d,%d^BQN,2,%d", it.module, p.x, p.y-1, it.module)
			field(&b, "MA,"+it.text)
		case "datamatrix":
			// With rows and columns given, the symbol is as large as the one that was laid out. "_" begins the printer's own escapes
			// in the content, and stands for itself when doubled.
			fmt.Fprintf(&b, "^FO%d,%d^BX%s,%d,200,%d,%d,6,_", p.x, p.y, turned, it.module, it.symbol.columns, it.symbol.rows)
			field(&b, strings.ReplaceAll(it.text, "_", "__"))
		case "code128":
			fmt.Fprintf(&b, "^BY%d,2,%d^FO%d,%d^BC%s,%d,N,N,N,N", it.module, it.h, p.x, p.y, turned, it.h)
			field(&b, invocations(it.text))
		}
	}
	b.WriteString("^PQ1,0,1,N\n^XZ\n")
	return b.Bytes(), nil
}

// field writes field data, and ends the field.
func field(b *bytes.Buffer, s string) {
	b.WriteString("^FH_^FD")
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', plain(c), strings.IndexByte(" .-:,>", c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(b, "_%02X", c)
		}
	}
	b.WriteString("^FS\n")
}

// invocations returns content of a Code 128 in the printer's words: ">" begins a change of subset, and three characters have codes of
// their own. The subsets are those of the symbol that was laid out, B, and C for digits from four on, so that it is as wide.
func invocations(s string) string {
	var b strings.Builder
	digits := func(s string, n int) bool { return len(s) >= n && strings.Trim(s[:n], "0123456789") == "" }
	inC := digits(s, 4)
	b.WriteString(map[bool]string{true: ">;", false: ">:"}[inC])
	for s != "" {
		n := 1
		switch {
		case inC && digits(s, 2):
			n = 2
		case inC:
			inC, n = false, 0
			b.WriteString(">6")
		case digits(s, 4):
			inC, n = true, 0
			b.WriteString(">5")
		case s[0] == '>':
			b.WriteString(">0")
		case s[0] == '^':
			b.WriteString("><")
		case s[0] == '~':
			b.WriteString(">=")
		}
		if n == 2 || n == 1 && !strings.Contains(">^~", s[:1]) {
			b.WriteString(s[:n])
		}
		s = s[n:]
	}
	return b.String()
}
