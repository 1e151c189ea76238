package screen

import (
	"strings"
	"unicode/utf8"
)

// glyphs are the letters that can be read from two metres: five rows of pixels, no more letters than verdicts, codes and step
// numbers need.
var glyphs = map[rune][5]string{
	'P': {"#### ", "#   #", "#### ", "#    ", "#    "},
	'A': {" ### ", "#   #", "#####", "#   #", "#   #"},
	'S': {" ####", "#    ", " ### ", "    #", "#### "},
	'F': {"#####", "#    ", "#### ", "#    ", "#    "},
	'I': {"#####", "  #  ", "  #  ", "  #  ", "#####"},
	'L': {"#    ", "#    ", "#    ", "#    ", "#####"},
	'E': {"####", "#   ", "### ", "#   ", "####"},
	'0': {" ## ", "#  #", "#  #", "#  #", " ## "},
	'1': {"  # ", " ## ", "  # ", "  # ", " ###"},
	'2': {"### ", "   #", " ## ", "#   ", "####"},
	'3': {"### ", "   #", " ## ", "   #", "### "},
	'4': {"#  #", "#  #", "####", "   #", "   #"},
	'5': {"####", "#   ", "### ", "   #", "### "},
	'6': {" ## ", "#   ", "### ", "#  #", " ## "},
	'7': {"####", "   #", "  # ", " #  ", " #  "},
	'8': {" ## ", "#  #", " ## ", "#  #", " ## "},
	'9': {" ## ", "#  #", " ###", "   #", " ## "},
	'-': {"   ", "   ", "###", "   ", "   "},
	'/': {"    #", "   # ", "  #  ", " #   ", "#    "},
}

// A scale is how wide a pixel is, in columns, and how high, in half rows.
type scale struct{ x, y int }

// Largest first. Half rows need characters that ASCII does not have.
var (
	scales      = []scale{{6, 6}, {4, 4}, {3, 3}, {2, 2}, {1, 2}, {1, 1}}
	scalesASCII = []scale{{6, 6}, {4, 4}, {2, 2}, {1, 2}}
)

// rows is the height of a line of letters.
func (s scale) rows() int { return (5*s.y + 1) / 2 }

// big draws s in block letters. It returns nil where s has a character that there is no letter for.
func big(s string, at scale, ascii bool) []string {
	var pix [5]string
	for i, r := range s {
		g, ok := glyphs[r]
		if !ok {
			return nil
		}
		for y := range pix {
			if i > 0 {
				pix[y] += " "
			}
			pix[y] += g[y]
		}
	}
	on := func(x, y int) bool { return y/at.y < 5 && pix[y/at.y][x/at.x] == '#' } // y in half rows
	lines := make([]string, at.rows())
	for row := range lines {
		var b strings.Builder
		for x := range len(pix[0]) * at.x {
			up, down := on(x, 2*row), on(x, 2*row+1)
			switch {
			case up && down && ascii:
				b.WriteByte('#')
			case up && down:
				b.WriteRune('█')
			case up:
				b.WriteRune('▀')
			case down:
				b.WriteRune('▄')
			default:
				b.WriteByte(' ')
			}
		}
		lines[row] = b.String()
	}
	return lines
}

// bigIn draws s as large as fits into w columns and h rows, but no larger than max; nil where no size fits.
func bigIn(s string, w, h int, ascii bool, max scale) []string {
	all := scales
	if ascii {
		all = scalesASCII
	}
	for _, at := range all {
		if at.x > max.x || at.y > max.y || at.rows() > h {
			continue
		}
		if l := big(s, at, ascii); l != nil && utf8.RuneCountInString(l[0]) <= w {
			return l
		}
	}
	return nil
}
