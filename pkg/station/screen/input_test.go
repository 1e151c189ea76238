package screen

import (
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

var sgr = regexp.MustCompile(`\x1b\[[0-9;]*m`)

// typed spells keys out: text as it is, Enter as ⏎, functions by their name.
func typed(keys []key) string {
	var b strings.Builder
	for _, k := range keys {
		switch k.kind {
		case keyRune:
			b.WriteRune(k.r)
		case keyEnter:
			b.WriteString("⏎")
		case keyBack:
			b.WriteString("⌫")
		case keyClear:
			b.WriteString("✗")
		case keyFunction:
			b.WriteString("<" + string(k.function) + ">")
		case keyInterrupt:
			b.WriteString("<^C>")
		}
	}
	return b.String()
}

func decode(chunks ...string) string {
	var d decoder
	var keys []key
	for _, c := range chunks {
		keys = append(keys, d.decode([]byte(c))...)
	}
	return typed(append(keys, d.flush()...))
}

func TestDecoder(t *testing.T) {
	for in, want := range map[string]string{
		"TM26-000311\r":                           "TM26-000311⏎",
		"\tTM26-000311\t\r\n":                     "TM26-000311⏎",
		"\x02TM26-000311\n":                       "TM26-000311⏎",
		"A\r\nB\r\n\r\n":                          "A⏎B⏎⏎",
		"A\r\rB\n\nC":                             "A⏎⏎B⏎⏎C",
		"(21)A\x1d(10)B\x1e\x04\r":                "(21)A\x1d(10)B\x1e⏎",
		"TM!rework\r":                             "TM!rework⏎",
		"Nguyễn 界\r":                              "Nguyễn 界⏎",
		"\x1bOP\x1bOQ\x1bOR\x1bOS\x1b[21~":        "<help><rework><scrap><reprint><end>",
		"\x1b[11~\x1b[12~\x1b[13~\x1b[14~":        "<help><rework><scrap><reprint>",
		"\x1b[[A\x1b[[B\x1b[[C\x1b[[D":            "<help><rework><scrap><reprint>",
		"\x1b":                                    "<cancel>",
		"\x1b\x1b":                                "<cancel><cancel>",
		"\x1b\r":                                  "<cancel>⏎",
		"\x1bx":                                   "x",
		"AB\x7f\x08C\x15D\x03":                    "AB⌫⌫C✗D<^C>",
		"\x1b[A\x1b[1;5B\x1b[<0;1;1M\x1b[I":       "",
		"\x1b[8;65535;65535t\x1b[48;9;9;9;9t":     "", // a new window size
		"\x1b[200~deaf\r":                         "deaf⏎",
		"\x1b[27u\x1b[?1u\x1b[1;2R\x1b[?2026;1":   "",
		"\x1b[" + strings.Repeat("1", 9999) + "A": "",
		"\x1b[12\rX":                              "⏎X",
		"\x1b[":                                   "",
		"\x1bO\x1bOP":                             "<help>",
		"A\xffB\xe7\x95C\xc2\x9b31m\xe7":          "A\ufffdB\ufffdC31m\ufffd",
		"\xf0\x80\x80\x80\r":                      "\ufffd\ufffd\ufffd\ufffd⏎",
	} {
		if got := decode(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
		if got := decode(strings.Split(in, "")...); utf8.ValidString(in) && got != want {
			t.Errorf("%q, byte by byte: %q, want %q", in, got, want)
		}
	}
}

// TestDecoderPause: half a sequence or character is settled after a pause, and what follows is itself.
func TestDecoderPause(t *testing.T) {
	for in, want := range map[string]string{"\x1b": "<cancel>OP⏎", "\x1b[2": "OP⏎", "\x1bO": "OP⏎", "\xe7": "\ufffdOP⏎", "A": "AOP⏎"} {
		var d decoder
		keys := d.decode([]byte(in))
		if d.pending() != (in != "A") {
			t.Errorf("%q: pending %v", in, d.pending())
		}
		keys = append(keys, d.flush()...)
		if got := typed(append(keys, d.decode([]byte("OP\r"))...)); got != want || d.pending() {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// FuzzDecoder: only what a serial may hold comes out, whatever goes in, and however it was cut.
func FuzzDecoder(f *testing.F) {
	for _, s := range []string{"TM26\r\n", "\x1b[21~\x1bOP\x1b[[A", "\x1b[200~x\x1b[201~", "\xe7\x95\x8c\xff\x9b", "\x1b]0;x\a", "\x1b", "\r\n\n\r", "\x1b[\x1b[8;1;1t"} {
		f.Add([]byte(s), 1)
		f.Add([]byte(s), 3)
	}
	f.Fuzz(func(t *testing.T, in []byte, at int) {
		var d decoder
		whole := append(d.decode(in), d.flush()...)
		for _, k := range whole {
			if k.kind == keyRune && (!utf8.ValidRune(k.r) || unicode.IsControl(k.r) && (k.r < 0x1c || k.r > 0x1f)) {
				t.Fatalf("%q: %U", in, k.r)
			}
			if k.kind == keyFunction && !slices.ContainsFunc(functions, func(f functionKey) bool {
				return f.f == k.function
			}) {
				t.Fatalf("%q: function %q", in, k.function)
			}
		}
		if len(whole) > len(in) {
			t.Fatalf("%q: %d keys", in, len(whole))
		}
		at = min(max(at, 0), len(in))
		var e decoder
		cut := append(e.decode(in[:at]), e.decode(in[at:])...)
		if cut = append(cut, e.flush()...); !slices.Equal(cut, whole) {
			t.Fatalf("%q cut at %d: %q, whole %q", in, at, typed(cut), typed(whole))
		}
	})
}
