package label

import (
	"errors"
	"fmt"
	"image/color"
	"math"
	"sync"

	"github.com/boombuler/barcode"
	"github.com/boombuler/barcode/code128"
	"github.com/boombuler/barcode/datamatrix"
	"golang.org/x/image/font"
	"golang.org/x/image/font/gofont/goregular"
	"golang.org/x/image/font/opentype"
	"golang.org/x/image/font/sfnt"
	"rsc.io/qr"
)

// A rect is a rectangle in dots.
type rect struct{ x, y, w, h int }

// An item is an element in its place: a filled rectangle, or a text, or a code.
type item struct {
	kind string
	// rect is the rectangle; the code's symbol without its quiet zone; of a text, the point where its baseline begins.
	rect
	text   string
	em     int // of a text: its size
	module int // of a code
	symbol *symbol
}

// A symbol is a code's modules. A linear one has a single row, as high as the bars are.
type symbol struct {
	columns, rows int
	dark          []bool
}

const (
	// minModule is the smallest module that handheld scanners read when printed on a line, in mm.
	minModule = 0.16
	// maxModule is the largest that all ZPL printers take, in dots.
	maxModule = 10
	// minLine and minEm are the height of a line and of its font, in dots, below which letters run together.
	minLine = 12
	minEm   = 6
)

func (t *Template) dots(mm float64) int { return int(math.Round(mm * float64(t.DPI) / 25.4)) }

func (t *Template) size() (w, h int) { return t.dots(t.Width), t.dots(t.Height) }

// turn returns where a rectangle of the label as it is read is on the label as it is printed.
func (t *Template) turn(r rect) rect {
	w, h := t.size()
	switch t.Orientation {
	case 90:
		return rect{h - r.y - r.h, r.x, r.h, r.w}
	case 180:
		return rect{w - r.x - r.w, h - r.y - r.h, r.w, r.h}
	case 270:
		return rect{r.y, w - r.x - r.w, r.h, r.w}
	}
	return r
}

// layout puts a unit's label together.
func (t *Template) layout(l *Label) ([]item, error) {
	if err := l.check(); err != nil {
		return nil, fmt.Errorf("label template %s: %w", t.Name, err)
	}
	var items []item
	for i := range t.Elements {
		e := &t.Elements[i]
		more, err := t.place(e, l)
		if err != nil {
			return nil, fmt.Errorf("label template %s, serial %s, element %d (%s): %w", t.Name, l.Serial, i+1, e.Kind, err)
		}
		items = append(items, more...)
	}
	return items, nil
}

func (t *Template) place(e *Element, l *Label) ([]item, error) {
	// Both edges are rounded, so that what touches in mm touches in dots.
	box := rect{x: t.dots(e.X), y: t.dots(e.Y)}
	box.w, box.h = t.dots(e.X+e.Width)-box.x, t.dots(e.Y+e.Height)-box.y
	text, err := e.expand(l)
	if err != nil {
		return nil, err
	}
	switch e.Kind {
	case "line":
		box.w, box.h = max(box.w, 1), max(box.h, 1)
		return []item{{kind: "rect", rect: box}}, nil
	case "box":
		thick := max(t.dots(e.Thickness), 1)
		return []item{
			{kind: "rect", rect: rect{box.x, box.y, box.w, thick}},
			{kind: "rect", rect: rect{box.x, box.y + box.h - thick, box.w, thick}},
			{kind: "rect", rect: rect{box.x, box.y, thick, box.h}},
			{kind: "rect", rect: rect{box.x + box.w - thick, box.y, thick, box.h}},
		}, nil
	case "text":
		if text == "" {
			return nil, nil
		}
		return placeText(box, text)
	}
	it, err := t.placeCode(e.Kind, box, text)
	return []item{it}, err
}

func (t *Template) placeCode(kind string, box rect, text string) (item, error) {
	it := item{kind: kind, text: text}
	for i := range len(text) {
		if text[i] < ' ' || text[i] >= 0x7f {
			return it, fmt.Errorf("%q: codes hold printable ASCII only", text)
		}
	}
	var err error
	var code barcode.Barcode
	quiet := 0 // modules on each side
	switch {
	case text == "":
		return it, errors.New("the code has nothing to hold")
	case kind == "qr":
		quiet = 4 // ISO/IEC 18004 §9.1
		var c *qr.Code
		if c, err = qr.Encode(text, qr.M); err == nil {
			it.symbol = newSymbol(c.Size, c.Size, c.Black)
		}
	case kind == "datamatrix":
		quiet = 2 // ISO/IEC 16022 §7.5 asks for one
		code, err = datamatrix.Encode(text)
	case kind == "code128":
		quiet = 10 // ISO/IEC 15417 §4.4
		code, err = code128.Encode(text)
	}
	if err != nil {
		return it, fmt.Errorf("encoding %q: %w", text, err)
	}
	if code != nil {
		b := code.Bounds()
		it.symbol = newSymbol(b.Dx(), b.Dy(), func(x, y int) bool { return code.At(x, y) == color.Black })
	}
	s := it.symbol
	room := box.w
	if s.rows > 1 {
		room = min(box.w, box.h)
	}
	it.module = min(room/(s.columns+2*quiet), maxModule)
	if float64(it.module)*25.4/float64(t.DPI) < minModule {
		return it, fmt.Errorf("%q needs a code of %d modules with its quiet zone, and %.1f mm have no room for it", text, s.columns+2*quiet,
			float64(room)*25.4/float64(t.DPI))
	}
	it.w, it.h = s.columns*it.module, s.rows*it.module
	if s.rows == 1 {
		it.h = box.h
	}
	it.x, it.y = box.x+(box.w-it.w)/2, box.y+(box.h-it.h)/2
	return it, nil
}

func newSymbol(columns, rows int, dark func(x, y int) bool) *symbol {
	s := &symbol{columns: columns, rows: rows, dark: make([]bool, 0, columns*rows)}
	for y := range rows {
		for x := range columns {
			s.dark = append(s.dark, dark(x, y))
		}
	}
	return s
}

// bars returns the dark parts of a code as rectangles, each a run of modules in one row.
func (it *item) bars() []rect {
	var bars []rect
	s := it.symbol
	height := it.h / s.rows
	for y := range s.rows {
		row := s.dark[y*s.columns : (y+1)*s.columns]
		for x := 0; x < len(row); x++ {
			from := x
			for x < len(row) && row[x] {
				x++
			}
			if x > from {
				bars = append(bars, rect{it.x + from*it.module, it.y + y*height, (x - from) * it.module, height})
			}
		}
	}
	return bars
}

// typeface is the font of pictures and sheets. It is only ever read.
var typeface = sync.OnceValue(func() *opentype.Font {
	f, err := opentype.Parse(goregular.TTF)
	if err != nil {
		panic(err) // part of the program
	}
	return f
})

// newFace returns the font at a size in dots. It is for one goroutine.
func newFace(em int) font.Face {
	f, err := opentype.NewFace(typeface(), &opentype.FaceOptions{Size: float64(em), DPI: 72, Hinting: font.HintingFull})
	if err != nil {
		panic(err) // of no size
	}
	return f
}

// placeText finds the size at which a text fits.
func placeText(box rect, text string) ([]item, error) {
	var buf sfnt.Buffer
	for _, r := range text {
		if g, err := typeface().GlyphIndex(&buf, r); err != nil || g == 0 {
			return nil, fmt.Errorf("the font has no %q of %q", r, text)
		}
	}
	const many = 1000
	m := newFace(many).Metrics()
	full := box.h * many / (m.Ascent + m.Descent).Ceil() // accents and descenders included
	for em := full; em >= minEm && 2*em >= full; em-- {
		face := newFace(em)
		if width := font.MeasureString(face, text).Ceil(); width > box.w {
			em = max(em-max(1, em*(width-box.w)/width)+1, 0) // skips most of the way
			continue
		}
		return []item{{kind: "text", rect: rect{x: box.x, y: box.y + face.Metrics().Ascent.Ceil()}, text: text, em: em}}, nil
	}
	return nil, fmt.Errorf("%q does not fit its width even at half its size", text)
}
