package screen

import (
	"unicode"
	"unicode/utf8"

	"github.com/touchmark/touchmark/pkg/station"
)

// A key is one thing that a scanner or keyboard did: a character, or one of the others.
type key struct {
	r        rune
	kind     keyKind
	function station.Function // of keyFunction
}

type keyKind uint8

const (
	keyRune keyKind = iota
	keyEnter
	keyBack      // takes the last character away
	keyClear     // takes the line away
	keyFunction  // function keys and Esc
	keyInterrupt // Ctrl-C
)

// A decoder turns what a scanner or keyboard sends (untrusted: a barcode may hold any byte) into keys. It knows the function keys and
// no other sequence: what a general terminal library also finds in its input, such as a new window size or the start of a paste that
// never ends, a label must not be able to say. Control characters are dropped, apart from the four that separate the fields of a GS1
// or ISO/IEC 15434 code, which belong to what was scanned. Bytes that are not UTF-8 become U+FFFD.
type decoder struct {
	state   state
	seq     []byte // of an escape sequence, bounded by maxSequence
	part    []byte // of a character, less than four bytes
	afterCR bool
}

type state uint8

const (
	stateGround state = iota
	stateEscape       // ESC
	stateSS3          // ESC O
	stateCSI          // ESC [
	stateLinux        // ESC [ [, as the Linux console begins F1 to F5
)

const maxSequence = 16

// functionKeys are the sequences behind ESC: vt100 to xterm, rxvt, and the Linux console.
var functionKeys = map[string]station.Function{
	"OP": station.Help, "OQ": station.Rework, "OR": station.Scrap, "OS": station.Reprint,
	"[11~": station.Help, "[12~": station.Rework, "[13~": station.Scrap, "[14~": station.Reprint, "[21~": station.End,
	"[[A": station.Help, "[[B": station.Rework, "[[C": station.Scrap, "[[D": station.Reprint,
}

// pending says that more bytes may change what the last ones meant; after a pause, [decoder.flush] settles it.
func (d *decoder) pending() bool { return d.state != stateGround || len(d.part) > 0 }

// flush ends what is unfinished: ESC alone is the Esc key, the rest of a sequence is nothing.
func (d *decoder) flush() (keys []key) {
	if d.state == stateEscape {
		keys = append(keys, key{kind: keyFunction, function: station.Cancel})
	}
	if len(d.part) > 0 {
		keys = append(keys, key{r: utf8.RuneError})
	}
	d.state, d.part = stateGround, d.part[:0]
	return keys
}

// decode takes the next bytes, however they were cut.
func (d *decoder) decode(p []byte) (keys []key) {
	for _, b := range p {
		keys = d.next(keys, b)
	}
	return keys
}

func (d *decoder) next(keys []key, b byte) []key {
	if d.state != stateGround && (b < 0x20 || b > 0x7e) { // not part of any sequence: what there is of it is over
		keys = append(keys, d.flush()...)
	}
	switch d.state {
	case stateEscape:
		switch b {
		case 'O':
			d.state, d.seq = stateSS3, append(d.seq[:0], b)
			return keys
		case '[':
			d.state, d.seq = stateCSI, append(d.seq[:0], b)
			return keys
		}
		d.state = stateGround // Alt and a character
	case stateSS3, stateCSI, stateLinux:
		if len(d.seq) < maxSequence {
			d.seq = append(d.seq, b)
		}
		if d.state == stateCSI && len(d.seq) == 2 && b == '[' {
			d.state = stateLinux
		} else if d.state != stateCSI || b >= 0x40 { // the final byte, ECMA-48 §5.4
			d.state = stateGround
			if f, ok := functionKeys[string(d.seq)]; ok {
				keys = append(keys, key{kind: keyFunction, function: f})
			}
		}
		return keys
	}

	if len(d.part) > 0 || b >= utf8.RuneSelf {
		if len(d.part) > 0 && utf8.RuneStart(b) {
			d.part = d.part[:0]
			return d.next(append(keys, key{r: utf8.RuneError}), b)
		}
		if d.part = append(d.part, b); !utf8.FullRune(d.part) {
			return keys
		}
		r, n := utf8.DecodeRune(d.part)
		lost := len(d.part) - n
		d.part = d.part[:0]
		if r == utf8.RuneError || !unicode.IsControl(r) { // C1
			keys = append(keys, key{r: r})
		}
		for range lost {
			keys = append(keys, key{r: utf8.RuneError})
		}
		d.afterCR = false
		return keys
	}

	wasCR := d.afterCR
	d.afterCR = b == '\r'
	switch {
	case b == '\n' && wasCR: // CR LF is one Enter: an empty line means something, too
	case b == '\r', b == '\n':
		keys = append(keys, key{kind: keyEnter})
	case b == 0x1b:
		d.state = stateEscape
	case b == 0x03:
		keys = append(keys, key{kind: keyInterrupt})
	case b == 0x08, b == 0x7f:
		keys = append(keys, key{kind: keyBack})
	case b == 0x15:
		keys = append(keys, key{kind: keyClear})
	case b >= 0x1c:
		keys = append(keys, key{r: rune(b)})
	}
	return keys
}
