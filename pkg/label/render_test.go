package label_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"image"
	"image/png"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/label"
)

// tool runs a program of somebody else's and returns what it prints.
func tool(t *testing.T, pkg, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		hsmtest.Require(t, name+" (apt-get install "+pkg+")")
	}
	cmd := exec.CommandContext(t.Context(), name, args...)
	out, err := cmd.Output()
	if err != nil {
		t.Errorf("%s: %v", cmd, err)
	}
	return string(out)
}

// scan reads the codes in a picture: one QR code, DataMatrix or Code 128 each, as wanted.
func scan(t *testing.T, picture string, want map[string]string) {
	t.Helper()
	for kind, text := range want {
		var got string
		if kind == "datamatrix" {
			got = tool(t, "dmtx-utils", "dmtxread", "--stop-after=1", picture)
		} else {
			got = strings.TrimSuffix(tool(t, "zbar-tools", "zbarimg", "--quiet", "--raw", "-Sdisable", "-S"+kind+".enable", picture), "\n")
		}
		if got != text {
			t.Errorf("%s of %s reads as %q, want %q", kind, picture, got, text)
		}
	}
}

// pages makes pictures of a PDF's pages.
func pages(t *testing.T, pdf []byte, dpi int) []string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "label")
	if err := os.WriteFile(path+".pdf", pdf, 0o644); err != nil {
		t.Fatal(err)
	}
	tool(t, "poppler-utils", "pdftoppm", "-png", "-r", fmt.Sprint(dpi), path+".pdf", path)
	found, err := filepath.Glob(path + "-*.png")
	if err != nil || len(found) == 0 {
		t.Fatalf("no pages: %v", err)
	}
	return found
}

// Readers that know nothing of us read every code of every template, turned any way, in every resolution.
func TestCodesReadBack(t *testing.T) {
	all := builtIn(t)
	all["all"] = everyCode + codes
	for name, text := range all {
		for _, how := range [][2]string{{"203", "0"}, {"203", "90"}, {"203", "180"}, {"203", "270"}, {"300", "90"}, {"600", "0"}} {
			t.Run(name+"/"+how[0]+"/"+how[1], func(t *testing.T) {
				dpi, orientation := how[0], how[1]
				text := strings.Replace(strings.Replace(text, "dpi = 203", "dpi = "+dpi, 1), "dpi = 300", "dpi = "+dpi, 1)
				tmpl := parse(t, name, "orientation = "+orientation+"\n"+text)
				l := pump()
				content := label.Scan{Serial: l.Serial, Fingerprint: l.Fingerprint}.String()
				want := map[string]map[string]string{
					"unit-50x25":       {"qrcode": content},
					"tiny-30x10":       {"datamatrix": content},
					"traveller-100x50": {"qrcode": content, "code128": l.Serial},
					"all":              {"qrcode": content, "code128": l.Serial, "datamatrix": l.Serial},
				}[name]
				job, err := tmpl.Render(label.PNG, l)
				if err != nil {
					t.Fatal(err)
				}
				path := filepath.Join(t.TempDir(), "label.png")
				if err := os.WriteFile(path, job.Data, 0o644); err != nil {
					t.Fatal(err)
				}
				scan(t, path, want)
				if job, err = tmpl.Render(label.PDF, l); err != nil {
					t.Fatal(err)
				}
				scan(t, pages(t, job.Data, 300)[0], want)
			})
		}
	}
}

// What a serial list can hold, the codes can, and the reader's answer is the unit's.
func TestHostileSerialsReadBack(t *testing.T) {
	tmpl := parse(t, "all", everyCode+codes)
	for _, serial := range hostile {
		l := pump()
		l.Serial = serial
		job, err := tmpl.Render(label.PNG, l)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "label.png")
		if err := os.WriteFile(path, job.Data, 0o644); err != nil {
			t.Fatal(err)
		}
		scan(t, path, map[string]string{"qrcode": label.Scan{Serial: serial, Fingerprint: fingerprint}.String(), "datamatrix": serial, "code128": serial})
	}
}

func TestPNG(t *testing.T) {
	for _, dpi := range []int{203, 300, 600} {
		tmpl := parse(t, "all", strings.Replace(everyCode, "300", fmt.Sprint(dpi), 1)+"orientation = 90\n"+codes)
		job, err := tmpl.Render(label.PNG, pump())
		if err != nil {
			t.Fatal(err)
		}
		// Signature, IHDR with a depth of one bit, pHYs in pixels per metre.
		b := job.Data
		perMetre := uint32(math.Round(float64(dpi) / 0.0254))
		if b[24] != 1 || string(b[37:41]) != "pHYs" || binary.BigEndian.Uint32(b[41:]) != perMetre || binary.BigEndian.Uint32(b[45:]) != perMetre || b[49] != 1 {
			t.Errorf("%d dpi: header % x", dpi, b[:54])
		}
		config, err := png.DecodeConfig(bytes.NewReader(b))
		dots := func(mm float64) int { return int(math.Round(mm / 25.4 * float64(dpi))) }
		if err != nil || config.Width != dots(60) || config.Height != dots(90) {
			t.Errorf("%d dpi: %d × %d, %v", dpi, config.Width, config.Height, err)
		}
	}
}

// Sheets are filled row by row, and equal input is equal octets.
func TestSheet(t *testing.T) {
	text := builtIn(t)["unit-50x25"]
	tmpl := parse(t, "sheet", text+"\n[sheet]\nwidth = 210\nheight = 297\ncolumns = 4\nrows = 2\nleft = 5\ntop = 20\ngap-y = 3\n")
	var labels []label.Label
	for n := range 9 {
		l := pump()
		l.Serial = fmt.Sprintf("SN-%d", n)
		labels = append(labels, l)
	}
	first, err := tmpl.PDF(labels...)
	if err != nil {
		t.Fatal(err)
	}
	second, err := tmpl.PDF(labels...)
	if err != nil || !bytes.Equal(first, second) {
		t.Errorf("the same labels are other octets: %v", err)
	}
	sheets := pages(t, first, 300)
	if len(sheets) != 2 {
		t.Fatalf("%d pages", len(sheets))
	}
	for n, l := range labels {
		// The page without the other labels.
		page := cut(t, sheets[n/8], 300, 5+float64(n%4)*50, 20+float64(n%8/4)*28, 50, 25)
		scan(t, page, map[string]string{"qrcode": label.Scan{Serial: l.Serial, Fingerprint: fingerprint}.String()})
	}
	if _, err := tmpl.PDF(); err == nil {
		t.Error("a PDF of no labels")
	}
}

func TestRefusedLabels(t *testing.T) {
	all := builtIn(t)
	for name, c := range map[string]struct {
		change func(*label.Label)
		want   string
	}{
		"no serial":           {func(l *label.Label) { l.Serial = "" }, "want 1 to 128"},
		"space":               {func(l *label.Label) { l.Serial = "a b" }, "character 2"},
		"like a code's":       {func(l *label.Label) { l.Serial = "tm1.SN1" }, "read back"},
		"fingerprint":         {func(l *label.Label) { l.Fingerprint = strings.ToLower(fingerprint) }, "upper-case"},
		"copy":                {func(l *label.Label) { l.Copy = -1 }, "negative"},
		"control":             {func(l *label.Label) { l.Product = "a\x1bb" }, "do not print"},
		"not UTF-8":           {func(l *label.Label) { l.Product = "a\xff" }, "do not print"},
		"not in the font":     {func(l *label.Label) { l.Product = "泵" }, "the font has no '泵'"},
		"too long for text":   {func(l *label.Label) { l.Product = strings.Repeat("wide ", 30) }, "does not fit"},
		"too long for a code": {func(l *label.Label) { l.Serial = strings.Repeat("a", 60) }, "no room"},
		"endless":             {func(l *label.Label) { l.Product = strings.Repeat("w", 1<<20) }, "at most"},
	} {
		l := pump()
		c.change(&l)
		for _, f := range []label.Format{label.ZPL, label.PNG, label.PDF} {
			if _, err := parse(t, "traveller-100x50", all["traveller-100x50"]).Render(f, l); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s as %s: %v", name, f, err)
			}
		}
	}
	if _, err := parse(t, "tiny-30x10", all["tiny-30x10"]).Render("epl", pump()); err == nil {
		t.Error("renders as EPL")
	}
}

// A first label shows no copy number, and a unit without a key no fingerprint.
func TestWhatIsNotThere(t *testing.T) {
	job, err := parse(t, "unit", builtIn(t)["unit-50x25"]).Render(label.ZPL, label.Label{Serial: "S1"})
	if err != nil {
		t.Fatal(err)
	}
	if strings.Count(string(job.Data), "^FD") != 2 || !strings.Contains(string(job.Data), "^FDMA,TM1.S1^FS") || strings.Contains(string(job.Data), "0001") {
		t.Errorf("%s", job.Data)
	}
}

// cut cuts a picture, in mm.
func cut(t *testing.T, path string, dpi, x, y, w, h float64) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	img, err := png.Decode(f)
	if err != nil {
		t.Fatal(err)
	}
	dots := func(mm float64) int { return int(mm / 25.4 * dpi) }
	part := img.(interface {
		SubImage(image.Rectangle) image.Image
	}).SubImage(image.Rect(dots(x), dots(y), dots(x+w), dots(y+h)))
	var b bytes.Buffer
	if err := png.Encode(&b, part); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "cut.png")
	if err := os.WriteFile(out, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return out
}
