package label

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/touchmark/touchmark/pkg/settings"
)

// A Template says what a kind of label looks like: one TOML file. The fields' comments are its manual. Lengths are in
// millimetres, from the upper left corner of the label as it is read. Text has names in braces: {scan} (what codes should hold, see
// [Scan]), {serial}, {registration-id}, {fingerprint}, {product}, {revision}, {date}, {copy} (empty, or "R1" on the first
// reprint), and any other column of the serial list.
type Template struct {
	// Name is the file's name without its ending.
	Name string `toml:"-"`

	// width and height of the label as it is read: 5 to 200 each.
	Width  float64 `toml:"width"`
	Height float64 `toml:"height"`
	// dpi of the printer: 203, 300 or 600.
	DPI int `toml:"dpi"`
	// orientation turns the label on its way out of the printer, in degrees clockwise: 0 (default), 90, 180 or 270.
	Orientation int `toml:"orientation"`
	// element lists what is on the label.
	Elements []Element `toml:"element"`
	// sheet is how labels lie on a page of a PDF; without it each label is a page of its own.
	Sheet Sheet `toml:"sheet"`
}

// An Element is one thing on a label.
type Element struct {
	// kind is "text", "qr", "datamatrix", "code128", "line" or "box".
	Kind string `toml:"kind"`
	// x and y are where its upper left corner is.
	X float64 `toml:"x"`
	Y float64 `toml:"y"`
	// size is the height of a line of text, from accents to descenders, or the side of the square that a qr or datamatrix has with its
	// quiet zone: the code gets the largest modules of whole dots, up to ten, that fit.
	Size float64 `toml:"size"`
	// width and height of a line (a filled rectangle), of a box, and of a code128 with its quiet zones. The width of a text is
	// optional and ends at the label's edge: what is longer is set smaller, down to half the size.
	Width  float64 `toml:"width"`
	Height float64 `toml:"height"`
	// thickness of a box's border.
	Thickness float64 `toml:"thickness"`
	// text of the line, or content of the code, with names in braces. A text that turns out empty is left out.
	Text string `toml:"text"`

	parts []part
}

// A Sheet is a page of labels, filled row by row.
type Sheet struct {
	// width and height of the page: 210 and 297 for A4.
	Width  float64 `toml:"width"`
	Height float64 `toml:"height"`
	// columns and rows of labels.
	Columns int `toml:"columns"`
	Rows    int `toml:"rows"`
	// left and top are where the first label begins; gap-x and gap-y lie between labels.
	Left float64 `toml:"left"`
	Top  float64 `toml:"top"`
	GapX float64 `toml:"gap-x"`
	GapY float64 `toml:"gap-y"`
}

// Limits of a template.
const (
	maxTemplate = 64 << 10
	maxElements = 64
	minSide     = 5.0
	maxSide     = 200.0
	maxPage     = 1200.0
	maxPerSide  = 100
)

// A part is a piece of a text: literal, or a name.
type part struct{ text, name string }

// Parse reads a template strictly. The error names every fault. A template is refused when its elements leave the label, or when
// something lies in a code's square or on a text.
func Parse(name string, r io.Reader) (*Template, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxTemplate+1))
	if err != nil {
		return nil, fmt.Errorf("reading label template %s: %w", name, err)
	}
	if len(b) > maxTemplate {
		return nil, fmt.Errorf("label template %s is larger than %d octets", name, maxTemplate)
	}
	t := &Template{Name: name}
	faults := settings.Decode("label template "+name, b, t)
	t.check(faults)
	if err := faults.Err(); err != nil {
		return nil, err
	}
	return t, nil
}

// Columns returns the columns that a serial list must have for this label.
func (t *Template) Columns() []string {
	var need []string
	for _, e := range t.Elements {
		for _, p := range e.parts {
			if p.name != "" && !slices.Contains(builtIn, p.name) && !slices.Contains(need, p.name) {
				need = append(need, p.name)
			}
		}
	}
	return need
}

func (t *Template) check(f *settings.Faults) {
	// TOML has nan and inf, which no comparison is true of.
	within := func(v, low, high float64) bool { return v >= low && v <= high }
	for key, v := range map[string]float64{"width": t.Width, "height": t.Height} {
		if !within(v, minSide, maxSide) {
			f.Key(key, "%s is %v: want %v to %v mm", key, v, minSide, maxSide)
		}
	}
	if !slices.Contains([]int{203, 300, 600}, t.DPI) {
		f.Key("dpi", "dpi is %d: want 203, 300 or 600", t.DPI)
	}
	if !slices.Contains([]int{0, 90, 180, 270}, t.Orientation) {
		f.Key("orientation", "orientation is %d: want 0, 90, 180 or 270", t.Orientation)
	}
	if len(t.Elements) == 0 || len(t.Elements) > maxElements {
		f.Key("element", "the label has %d elements: want 1 to %d", len(t.Elements), maxElements)
	}
	if f.Err() != nil {
		return // elements are looked at when what they lie on, and their settings' types, are right
	}
	sound := true
	for i := range t.Elements {
		e := &t.Elements[i]
		if err := e.check(t); err != nil {
			f.Key("element", "element %d (%s): %v", i+1, e.Kind, err)
			sound = false
		}
	}
	for i := range t.Elements {
		for j := range i {
			if a, b := &t.Elements[i], &t.Elements[j]; sound && a.overlaps(b) {
				f.Key("element", "element %d (%s) lies on element %d (%s)", i+1, a.Kind, j+1, b.Kind)
			}
		}
	}
	if t.Sheet == (Sheet{}) {
		return
	}
	s := &t.Sheet
	w, h := t.Width, t.Height
	if t.Orientation%180 != 0 {
		w, h = h, w
	}
	if s.Columns < 1 || s.Columns > maxPerSide || s.Rows < 1 || s.Rows > maxPerSide {
		f.Key("sheet", "sheet: want 1 to %d columns and rows", maxPerSide)
	} else if c, r := float64(s.Columns), float64(s.Rows); !within(s.Width, minSide, maxPage) || !within(s.Height, minSide, maxPage) ||
		!within(s.Left, 0, maxPage) || !within(s.Top, 0, maxPage) || !within(s.GapX, 0, maxPage) || !within(s.GapY, 0, maxPage) ||
		!within(s.Left+c*w+(c-1)*s.GapX, 0, s.Width+slack) || !within(s.Top+r*h+(r-1)*s.GapY, 0, s.Height+slack) {
		f.Key("sheet", "sheet: %d × %d labels do not lie on a page of %v × %v mm (at most %v)",
			s.Columns, s.Rows, s.Width, s.Height, maxPage)
	}
}

// slack is how far things may touch, in mm: decimal fractions do not add up exactly.
const slack = 0.001

func (e *Element) check(t *Template) error {
	var err error
	if e.parts, err = parseText(e.Text); err != nil {
		return fmt.Errorf("text: %w", err)
	}
	need, forbid := func(name string, v float64) {
		if !(v > 0) && err == nil {
			err = fmt.Errorf("%s is missing", name)
		}
	}, func(name string, v float64) {
		if v != 0 && err == nil {
			err = fmt.Errorf("%s is not one of its settings", name)
		}
	}
	text := true
	switch e.Kind {
	case "text":
		need("size", e.Size)
		forbid("height", e.Height)
		forbid("thickness", e.Thickness)
		if e.Width == 0 {
			e.Width = t.Width - e.X
		}
		e.Height = e.Size
	case "qr", "datamatrix":
		need("size", e.Size)
		forbid("width", e.Width)
		forbid("height", e.Height)
		forbid("thickness", e.Thickness)
		e.Width, e.Height = e.Size, e.Size
	case "code128", "line", "box":
		need("width", e.Width)
		need("height", e.Height)
		forbid("size", e.Size)
		if e.Kind == "box" {
			need("thickness", e.Thickness)
		} else {
			forbid("thickness", e.Thickness)
		}
		text = e.Kind == "code128"
	default:
		return errors.New(`want kind = "text", "qr", "datamatrix", "code128", "line" or "box"`)
	}
	switch {
	case err != nil:
		return err
	case text && e.Text == "":
		return errors.New("text is missing")
	case !text && e.Text != "":
		return errors.New("text is not one of its settings")
	case e.Kind == "text" && t.dots(e.Size) < minLine:
		return fmt.Errorf("a line of %v mm has %d dots at %d dpi, and letters need %d", e.Size, t.dots(e.Size), t.DPI, minLine)
	case !(e.X >= 0 && e.Y >= 0 && e.Width > 0 && e.X+e.Width <= t.Width+slack && e.Y+e.Height <= t.Height+slack):
		return errors.New("leaves the label")
	case e.Kind == "box" && !(2*e.Thickness <= min(e.Width, e.Height)):
		return errors.New("the border is thicker than the box")
	}
	return nil
}

// overlaps reports whether one of the two would spoil the other. Lines and boxes may cross.
func (e *Element) overlaps(o *Element) bool {
	drawn := func(e *Element) bool { return e.Kind == "line" || e.Kind == "box" }
	if drawn(e) && drawn(o) {
		return false
	}
	for _, a := range e.areas() {
		for _, b := range o.areas() {
			if a[0]+slack < b[2] && b[0]+slack < a[2] && a[1]+slack < b[3] && b[1]+slack < a[3] {
				return true
			}
		}
	}
	return false
}

// areas returns the rectangles that an element covers, as left, top, right, bottom: of a box its four sides.
func (e *Element) areas() [][4]float64 {
	x, y, right, bottom, t := e.X, e.Y, e.X+e.Width, e.Y+e.Height, e.Thickness
	if e.Kind != "box" {
		return [][4]float64{{x, y, right, bottom}}
	}
	return [][4]float64{{x, y, right, y + t}, {x, bottom - t, right, bottom}, {x, y, x + t, bottom}, {right - t, y, right, bottom}}
}

// parseText parses text with names in braces.
func parseText(s string) ([]part, error) {
	var out []part
	for s != "" {
		text, rest, brace := strings.Cut(s, "{")
		if strings.Contains(text, "}") {
			return nil, errors.New("} without {")
		}
		if err := checkText(text); err != nil {
			return nil, err
		}
		out = append(out, part{text: text})
		if !brace {
			break
		}
		name, after, closed := strings.Cut(rest, "}")
		if !closed || name == "" || strings.Contains(name, "{") {
			return nil, errors.New("{ without a name and }")
		}
		out = append(out, part{name: name})
		s = after
	}
	return out, nil
}

// expand puts what is known of a unit into an element's text.
func (e *Element) expand(l *Label) (string, error) {
	var b strings.Builder
	for _, p := range e.parts {
		text := p.text
		if p.name != "" {
			var err error
			if text, err = l.value(p.name); err != nil {
				return "", err
			}
		}
		b.WriteString(text)
	}
	return b.String(), checkText(b.String())
}
