package label

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/boombuler/barcode/code128"
)

// The printer draws a Code 128 exactly as wide as it was laid out.
func TestInvocationsWidth(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 20_000 {
		b := make([]byte, 1+r.IntN(20))
		for i := range b {
			if b[i] = byte('0' + r.IntN(10)); r.IntN(4) == 0 {
				b[i] = byte(' ' + r.IntN(95))
			}
		}
		code, err := code128.Encode(string(b))
		if err != nil {
			t.Fatal(err)
		}
		symbols, inC := 0, false
		for data := invocations(string(b)); data != ""; symbols++ {
			n := 1
			if data[0] == '>' || inC {
				n = 2
			}
			switch data[:n] {
			case ">;", ">5":
				inC = true
			case ">:", ">6":
				inC = false
			}
			data = data[n:]
		}
		if got, want := 11*(symbols+1)+13, code.Bounds().Dx(); got != want {
			t.Fatalf("%q is %d modules wide as %s, and was laid out with %d", b, got, invocations(string(b)), want)
		}
	}
}

// Whatever a printer says is either the status of one that is ready, or an error.
func FuzzStatus(f *testing.F) {
	const ready = "\x02030,0,0,1245,000,0,0,0,000,0,0,0\x03\r\n\x02000,0,0,0,0,2,4,0,00000000,1,000\x03\r\n\x021234,0\x03"
	f.Add(ready)
	f.Add(strings.Replace(ready, "030,0", "030,1", 1))
	f.Add(ready[:40])
	f.Fuzz(func(t *testing.T, answer string) {
		if parseStatus(answer) == nil && (strings.Count(answer, "\x02") != 3 || strings.Count(answer, ",") != 22) {
			t.Fatalf("%q is a printer that is ready", answer)
		}
	})
}
