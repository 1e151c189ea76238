package fat

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf16"
)

// A directory is a row of entries of 32 octets. A file has one with its short name (8 characters and 3), and before it as many
// as its long name needs, the last part first.
const (
	entrySize = 32
	perLong   = 13 // UTF-16 units in an entry of a long name

	attrReadOnly  = 0x01
	attrHidden    = 0x02
	attrSystem    = 0x04
	attrLabel     = 0x08
	attrDirectory = 0x10
	attrArchive   = 0x20
	attrLong      = attrReadOnly | attrHidden | attrSystem | attrLabel

	freed       = 0xe5 // the first octet of an entry that was removed
	lastLong    = 0x40 // with the number of a long name's last part
	lowerBase   = 0x08 // octet 12: the short name's base is shown in small letters,
	lowerSuffix = 0x10 // or its suffix
)

// checkName refuses names that some system could not take.
func checkName(name string) error {
	if name == "" || len(name) > maxName || name[0] == ' ' || strings.HasSuffix(name, " ") || strings.HasSuffix(name, ".") {
		return fmt.Errorf("name %q: want 1 to %d characters, no space before and no space or dot after them", name, maxName)
	}
	if strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r > '~' || strings.ContainsRune(`"*/:<>?\|`, r) }) {
		return fmt.Errorf("name %q: want printable ASCII without \"*/:<>?\\|", name)
	}
	return nil
}

// shortChar reports whether a character may be in a short name as it is.
func shortChar(c byte) bool {
	return 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c != 0 && strings.IndexByte("$%'-_@~`!(){}^#&", c) >= 0
}

// pack brings a base and a suffix to the 11 octets of an entry.
func pack(base, suffix string) (short [11]byte) {
	copy(short[:], "           ")
	copy(short[:8], base)
	copy(short[8:], suffix)
	return short
}

// shortName returns a name's short form, and whether that says all of it. Forms that are taken get another number.
func shortName(name string, taken map[[11]byte]bool) (short [11]byte, whole bool) {
	keep := func(s string) string {
		return strings.Map(func(r rune) rune {
			if shortChar(byte(r)) {
				return r
			}
			return -1
		}, strings.ToUpper(s))
	}
	dot := strings.LastIndexByte(name, '.')
	if dot <= 0 {
		dot = len(name)
	}
	rest := strings.TrimPrefix(name[dot:], ".")
	base, suffix := keep(name[:dot]), keep(rest)
	if short = pack(base, suffix); base == name[:dot] && suffix == rest && len(base) <= 8 && len(suffix) <= 3 && !taken[short] {
		return short, true
	}
	if base == "" {
		base = "_"
	}
	for n := 1; ; n++ {
		tail := fmt.Sprintf("~%d", n)
		short = pack(base[:min(len(base), 8-len(tail))]+tail, suffix[:min(len(suffix), 3)])
		if !taken[short] {
			return short, false
		}
	}
}

// checksum binds the entries of a long name to its short one.
func checksum(short [11]byte) (sum byte) {
	for _, c := range short {
		sum = sum>>1 | sum<<7
		sum += c
	}
	return sum
}

// longSlots returns how many entries a long name takes.
func longSlots(name string) int { return (len(name) + perLong - 1) / perLong }

// appendLong appends the entries of a long name.
func appendLong(dst []byte, name string, short [11]byte) []byte {
	units := make([]uint16, 0, longSlots(name)*perLong)
	for i := range len(name) {
		units = append(units, uint16(name[i]))
	}
	if len(units) < cap(units) {
		units = append(units, 0)
	}
	for len(units) < cap(units) {
		units = append(units, 0xffff)
	}
	for n := longSlots(name); n > 0; n-- {
		var e [entrySize]byte
		if e[0] = byte(n); n == longSlots(name) {
			e[0] |= lastLong
		}
		e[11], e[13] = attrLong, checksum(short)
		for i, u := range units[(n-1)*perLong : n*perLong] {
			binary.LittleEndian.PutUint16(e[longAt(i):], u)
		}
		dst = append(dst, e[:]...)
	}
	return dst
}

// longAt returns where unit i of an entry of a long name is.
func longAt(i int) int {
	switch {
	case i < 5:
		return 1 + 2*i
	case i < 11:
		return 14 + 2*(i-5)
	}
	return 28 + 2*(i-11)
}

// appendShort appends the entry with the short name.
func appendShort(dst []byte, short [11]byte, attr byte, cluster uint32, size int, at time.Time) []byte {
	var e [entrySize]byte
	copy(e[:], short[:])
	e[11] = attr
	date, clock := dosTime(at)
	binary.LittleEndian.PutUint16(e[14:], clock) // made
	binary.LittleEndian.PutUint16(e[16:], date)
	binary.LittleEndian.PutUint16(e[18:], date) // read
	binary.LittleEndian.PutUint16(e[20:], uint16(cluster>>16))
	binary.LittleEndian.PutUint16(e[22:], clock) // written
	binary.LittleEndian.PutUint16(e[24:], date)
	binary.LittleEndian.PutUint16(e[26:], uint16(cluster))
	binary.LittleEndian.PutUint32(e[28:], uint32(size))
	return append(dst, e[:]...)
}

func dosTime(t time.Time) (date, clock uint16) {
	t = t.UTC()
	return uint16(t.Year()-1980)<<9 | uint16(t.Month())<<5 | uint16(t.Day()), uint16(t.Hour())<<11 | uint16(t.Minute())<<5 | uint16(t.Second()/2)
}

// An item is a file or folder as its directory shows it. Everything in it is untrusted but the name.
type item struct {
	name    string
	folder  bool
	cluster uint32
	size    uint32
}

// parseDirectory reads a directory's entries strictly: long names whole, in order and bound to their short name, short names
// of legal characters, no name twice.
func parseDirectory(b []byte, root bool) (items []item, label string, err error) {
	taken, shorts := make(map[string]bool), make(map[[11]byte]bool)
	var units []uint16 // of a long name so far, the last part first in time and in place
	var want, sum byte // the next part's number, and the checksum that all parts have
	for n := 0; len(b) >= entrySize && b[0] != 0; b, n = b[entrySize:], n+1 {
		e := b[:entrySize]
		if e[0] == freed {
			if want != 0 {
				return nil, "", fmt.Errorf("entry %d: a long name is cut off", n)
			}
			continue
		}
		if e[11]&0x3f == attrLong {
			part := e[0] &^ lastLong
			if e[0]&lastLong != 0 && want == 0 && units == nil && part >= 1 && part <= 20 {
				want, sum = part, e[13]
			}
			if part == 0 || part != want || e[13] != sum || (e[0]&lastLong != 0) != (units == nil) || e[12] != 0 || e[26] != 0 || e[27] != 0 {
				return nil, "", fmt.Errorf("entry %d: a long name is out of order", n)
			}
			piece := make([]uint16, perLong, perLong+len(units))
			for i := range piece {
				piece[i] = binary.LittleEndian.Uint16(e[longAt(i):])
			}
			units = append(piece, units...)
			want--
			continue
		}
		if want != 0 {
			return nil, "", fmt.Errorf("entry %d: a long name is cut off", n)
		}
		it := item{folder: e[11]&attrDirectory != 0, size: binary.LittleEndian.Uint32(e[28:]),
			cluster: uint32(binary.LittleEndian.Uint16(e[20:]))<<16 | uint32(binary.LittleEndian.Uint16(e[26:]))}
		short := [11]byte(e[:11])
		if e[11]&attrLabel != 0 {
			if !root || label != "" || units != nil || it.folder {
				return nil, "", fmt.Errorf("entry %d: a label where none can be", n)
			}
			if label = strings.TrimRight(string(short[:]), " "); checkLabel(label) != nil || label == "" {
				return nil, "", fmt.Errorf("entry %d: the label is not one", n)
			}
			continue
		}
		if !root && n < 2 { // every folder begins with itself and the one above
			if want := pack([]string{".", ".."}[n], ""); short != want || !it.folder || units != nil {
				return nil, "", fmt.Errorf("entry %d: want %q", n, strings.TrimRight(string(want[:]), " "))
			}
			items = append(items, it)
			continue
		}
		if it.name, err = itemName(short, e[12], units, sum); err != nil {
			return nil, "", fmt.Errorf("entry %d: %w", n, err)
		}
		if fold := strings.ToLower(it.name); taken[fold] || shorts[short] {
			return nil, "", fmt.Errorf("entry %d: name %q is there twice", n, it.name)
		} else {
			taken[fold], shorts[short] = true, true
		}
		if items, units = append(items, it), nil; len(items) > maxFiles {
			return nil, "", fmt.Errorf("more than %d files in a folder", maxFiles)
		}
	}
	if units != nil {
		return nil, "", errors.New("a long name is cut off")
	}
	if !root && len(items) < 2 {
		return nil, "", errors.New("a folder does not begin with itself and the one above")
	}
	return items, label, nil
}

// itemName returns a file's name: the long one, or else the short one.
func itemName(short [11]byte, lower byte, units []uint16, sum byte) (string, error) {
	base, suffix := bytes.TrimRight(short[:8], " "), bytes.TrimRight(short[8:], " ")
	for i, c := range append(bytes.Clone(base), suffix...) {
		if !shortChar(c) {
			return "", fmt.Errorf("character %d of its short name is %#02x", i, c)
		}
	}
	if len(base) == 0 {
		return "", errors.New("its short name is empty")
	}
	name := string(base)
	if lower&lowerBase != 0 {
		name = strings.ToLower(name)
	}
	if len(suffix) > 0 {
		if lower&lowerSuffix != 0 {
			suffix = bytes.ToLower(suffix)
		}
		name += "." + string(suffix)
	}
	if units != nil {
		if sum != checksum(short) {
			return "", errors.New("its long name belongs to another short one")
		}
		end := len(units)
		for i, u := range units {
			if u == 0 {
				end = i
				break
			}
		}
		for i, u := range units[end:] {
			if i > 0 && u != 0xffff {
				return "", errors.New("its long name goes on after its end")
			}
		}
		if end <= len(units)-perLong {
			return "", errors.New("its long name has more parts than it needs")
		}
		name = string(utf16.Decode(units[:end]))
	}
	return name, checkName(name)
}
