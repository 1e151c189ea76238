package label

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"math"
	"time"

	"codeberg.org/go-pdf/fpdf"
	"golang.org/x/image/font"
	"golang.org/x/image/font/gofont/goregular"
	"golang.org/x/image/math/fixed"
)

// A Format is what a label is rendered as.
type Format string

// The formats.
const (
	ZPL Format = "zpl"
	PNG Format = "png"
	PDF Format = "pdf"
)

// Render makes one unit's label ready for a printer. Equal input gives equal octets.
func (t *Template) Render(f Format, l Label) (Job, error) {
	job := Job{Serial: l.Serial, Copy: l.Copy, Format: f}
	var err error
	switch f {
	case ZPL:
		job.Data, err = t.zpl(&l)
	case PNG:
		job.Data, err = t.png(&l)
	case PDF:
		job.Data, err = t.PDF(l)
	default:
		err = fmt.Errorf("%q is not a label format: zpl, png or pdf", f)
	}
	return job, err
}

// png draws the label, one bit per pixel, one pixel per dot.
func (t *Template) png(l *Label) ([]byte, error) {
	items, err := t.layout(l)
	if err != nil {
		return nil, err
	}
	w, h := t.size()
	canvas := image.NewGray(image.Rect(0, 0, w, h))
	draw.Draw(canvas, canvas.Bounds(), image.White, image.Point{}, draw.Src)
	fill := func(r rect) {
		draw.Draw(canvas, image.Rect(r.x, r.y, r.x+r.w, r.y+r.h), image.Black, image.Point{}, draw.Src)
	}
	for i := range items {
		switch it := &items[i]; it.kind {
		case "rect":
			fill(it.rect)
		case "text":
			d := font.Drawer{Dst: canvas, Src: image.Black, Face: newFace(it.em), Dot: fixed.P(it.x, it.y)}
			d.DrawString(it.text)
		default:
			for _, r := range it.bars() {
				fill(r)
			}
		}
	}
	page := t.turn(rect{0, 0, w, h})
	out := image.NewPaletted(image.Rect(0, 0, page.w, page.h), color.Palette{color.White, color.Black})
	for y := range h {
		for x := range w {
			if canvas.GrayAt(x, y).Y < 128 {
				p := t.turn(rect{x, y, 1, 1})
				out.SetColorIndex(p.x, p.y, 1)
			}
		}
	}
	var b bytes.Buffer
	if err := png.Encode(&b, out); err != nil {
		return nil, err
	}
	// The pixel density goes behind the header, which is the first chunk and always as long (PNG §11.2.1, §11.3.4.3).
	const header = 8 + 12 + 13
	chunk := []byte("\x00\x00\x00\x09pHYs")
	perMetre := uint32(math.Round(float64(t.DPI) / 0.0254))
	chunk = append(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(chunk, perMetre), perMetre), 1)
	chunk = binary.BigEndian.AppendUint32(chunk, crc32.ChecksumIEEE(chunk[4:]))
	return append(append(bytes.Clone(b.Bytes()[:header]), chunk...), b.Bytes()[header:]...), nil
}

// maxLabels bounds one PDF.
const maxLabels = 10_000

// PDF draws labels on sheets, or on a page each where the template has no sheet. Equal input gives equal octets.
func (t *Template) PDF(labels ...Label) ([]byte, error) {
	if len(labels) == 0 || len(labels) > maxLabels {
		return nil, fmt.Errorf("%d labels: a PDF has 1 to %d", len(labels), maxLabels)
	}
	w, h := t.Width, t.Height
	if t.Orientation%180 != 0 {
		w, h = h, w
	}
	s := t.Sheet
	if s.Columns == 0 {
		s = Sheet{Width: w, Height: h, Columns: 1, Rows: 1}
	}
	doc := fpdf.NewCustom(&fpdf.InitType{OrientationStr: "P", UnitStr: "mm", Size: fpdf.SizeType{Wd: s.Width, Ht: s.Height}})
	epoch := time.Unix(0, 0).UTC() // no clock: equal input gives equal octets
	doc.SetCreationDate(epoch)
	doc.SetModificationDate(epoch)
	doc.SetCatalogSort(true)
	doc.SetMargins(0, 0, 0)
	doc.SetAutoPageBreak(false, 0)
	doc.AddUTF8FontFromBytes("label", "", goregular.TTF)
	doc.SetFillColor(0, 0, 0)
	dot := 25.4 / float64(t.DPI)
	for n := range labels {
		items, err := t.layout(&labels[n])
		if err != nil {
			return nil, err
		}
		cell := n % (s.Columns * s.Rows)
		if cell == 0 {
			doc.AddPage()
		}
		left := s.Left + float64(cell%s.Columns)*(w+s.GapX)
		top := s.Top + float64(cell/s.Columns)*(h+s.GapY)
		fill := func(r rect) {
			r = t.turn(r)
			doc.Rect(left+float64(r.x)*dot, top+float64(r.y)*dot, float64(r.w)*dot, float64(r.h)*dot, "F")
		}
		for i := range items {
			switch it := &items[i]; it.kind {
			case "rect":
				fill(it.rect)
			case "text":
				p := t.turn(it.rect)
				x, y := left+float64(p.x)*dot, top+float64(p.y)*dot
				doc.SetFont("label", "", float64(it.em)*dot/25.4*72)
				doc.TransformBegin()
				doc.TransformRotate(float64(-t.Orientation), x, y)
				doc.Text(x, y, it.text)
				doc.TransformEnd()
			default:
				for _, r := range it.bars() {
					fill(r)
				}
			}
		}
	}
	var b bytes.Buffer
	if err := errors.Join(doc.Output(&b), doc.Error()); err != nil {
		return nil, fmt.Errorf("label template %s: making a PDF: %w", t.Name, err)
	}
	return b.Bytes(), nil
}
