package fat

import (
	"encoding/binary"
	"fmt"
	"io"
	"strings"
	"time"
)

// A node is a file or folder to place.
type node struct {
	name     string
	folder   bool
	data     []byte
	children []*node
	byName   map[string]*node
	cluster  uint32
}

// A builder places nodes into an image's head: everything up to the end of the last cluster that is used.
type builder struct {
	*geometry
	label string
	at    time.Time
	head  []byte
	next  uint32 // the first free cluster
	table []byte
}

func checkLabel(label string) error {
	if len(label) > 11 || strings.HasPrefix(label, " ") || strings.HasSuffix(label, " ") ||
		strings.ContainsFunc(label, func(r rune) bool { return r != ' ' && (r > '~' || !shortChar(byte(r))) }) {
		return fmt.Errorf("label %q: want at most 11 capitals, digits, spaces and -_", label)
	}
	return nil
}

// Build makes an image with files in it. It is made in memory, so it has at most 1 GiB. Files that do not fit are ErrFull, a
// size that the type cannot have is ErrSize.
func (v *Volume) Build(files []File) ([]byte, error) {
	if v.Size > maxImage {
		return nil, fmt.Errorf("a FAT image of %d octets in memory: %w: want at most %d", v.Size, ErrSize, maxImage)
	}
	head, err := v.build(files)
	if err != nil {
		return nil, err
	}
	image := make([]byte, v.Size)
	copy(image, head)
	return image, nil
}

// Write writes a file system to the beginning of w, which must have the volume's size: a device, or a file that is made as
// large. Only what counts is written; what lies in free clusters stays what it was. A write that is cut off leaves no file
// system behind, since its first sector is written last: zeros for it, then the rest, then it. After each of the three
// sync makes them durable in that order; nil if w needs none.
func (v *Volume) Write(w io.WriterAt, sync func() error, files []File) error {
	head, err := v.build(files)
	if err != nil {
		return err
	}
	if sync == nil {
		sync = func() error { return nil }
	}
	sector := max(v.SectorSize, 512)
	for _, step := range []struct {
		data []byte
		at   int64
	}{{make([]byte, sector), 0}, {head[sector:], int64(sector)}, {head[:sector], 0}} {
		if _, err := w.WriteAt(step.data, step.at); err != nil {
			return fmt.Errorf("writing a FAT file system: %w", err)
		}
		if err := sync(); err != nil {
			return fmt.Errorf("writing a FAT file system: %w", err)
		}
	}
	return nil
}

func (v *Volume) build(files []File) ([]byte, error) {
	g, err := v.lay()
	if err != nil {
		return nil, err
	}
	if err := checkLabel(v.Label); err != nil {
		return nil, err
	}
	b := &builder{geometry: g, label: v.Label, at: v.Time, next: 2}
	if b.at.IsZero() {
		b.at = time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)
	}
	if y := b.at.UTC().Year(); y < 1980 || y > 2107 {
		return nil, fmt.Errorf("the year %d: FAT knows 1980 to 2107", y)
	}
	root, err := tree(files)
	if err != nil {
		return nil, err
	}
	b.head = make([]byte, g.dataStart())
	b.table = make([]byte, g.fatSectors*g.sector)
	b.setEntry(b.table, 0, g.typ.end()&^0xff|0xf8) // the media octet, and ones
	b.setEntry(b.table, 1, g.typ.end())
	if err := b.folder(root, nil); err != nil {
		return nil, err
	}
	for i := range g.fats {
		copy(b.head[(g.reserved+i*g.fatSectors)*g.sector:], b.table)
	}
	v.bootSector(b)
	return b.head, nil
}

// tree sorts files into their folders.
func tree(files []File) (*node, error) {
	root := &node{folder: true, byName: make(map[string]*node)}
	count := 0
	for _, f := range files {
		parts := strings.Split(f.Name, "/")
		if len(parts) > maxDepth {
			return nil, fmt.Errorf("file %q: more than %d folders in each other", f.Name, maxDepth-1)
		}
		if int64(len(f.Data)) > maxData {
			return nil, fmt.Errorf("file %q has %d octets: want at most %d", f.Name, len(f.Data), maxData)
		}
		at := root
		for i, part := range parts {
			if err := checkName(part); err != nil {
				return nil, err
			}
			child := at.byName[strings.ToLower(part)]
			last := i == len(parts)-1
			if child != nil && (last || !child.folder || child.name != part) {
				return nil, fmt.Errorf("file %q: its name is taken by %q", f.Name, child.name)
			}
			if child == nil {
				if count++; count > maxFiles {
					return nil, fmt.Errorf("more than %d files and folders", maxFiles)
				}
				child = &node{name: part, folder: !last}
				if last {
					child.data = f.Data
				} else {
					child.byName = make(map[string]*node)
				}
				at.byName[strings.ToLower(part)] = child
				at.children = append(at.children, child)
			}
			at = child
		}
	}
	return root, nil
}

// alloc takes clusters for that many octets, in one piece, and returns the first, and their place in the head; 0 for none.
func (b *builder) alloc(octets int) (first uint32, place []byte, err error) {
	n := (int64(octets) + b.clusterOctets() - 1) / b.clusterOctets()
	if n == 0 {
		return 0, nil, nil
	}
	if n > int64(b.clusters)+2-int64(b.next) {
		return 0, nil, ErrFull
	}
	first = b.next
	b.next += uint32(n)
	for c := first; c < b.next-1; c++ {
		b.setEntry(b.table, c, c+1)
	}
	b.setEntry(b.table, b.next-1, b.typ.end())
	at := len(b.head)
	b.head = append(b.head, make([]byte, n*b.clusterOctets())...)
	return first, b.head[at:], nil
}

// folder places a folder, what is in it, and then its entries, which name where that is.
func (b *builder) folder(d, parent *node) error {
	size, shorts := 0, make(map[[11]byte]bool)
	switch {
	case parent != nil:
		size = 2
	case b.label != "":
		size = 1
	}
	short, whole := make([][11]byte, len(d.children)), make([]bool, len(d.children))
	for i, c := range d.children {
		short[i], whole[i] = shortName(c.name, shorts)
		shorts[short[i]] = true
		if size++; !whole[i] {
			size += longSlots(c.name)
		}
	}
	at := b.rootStart() // of the entries, in the head
	if parent == nil && b.rootEntries > 0 {
		if int64(size) > b.rootEntries {
			return fmt.Errorf("%d directory entries: %w: its root has %d", size, ErrFull, b.rootEntries)
		}
	} else {
		var err error
		if d.cluster, _, err = b.alloc(max(size, 1) * entrySize); err != nil {
			return err
		}
		at = b.geometry.at(d.cluster)
	}
	var entries []byte
	if parent != nil {
		entries = appendShort(entries, pack(".", ""), attrDirectory, d.cluster, 0, b.at)
		above := parent.cluster
		if above == b.root {
			above = 0 // the root is 0 here, wherever it is
		}
		entries = appendShort(entries, pack("..", ""), attrDirectory, above, 0, b.at)
	} else if b.label != "" {
		entries = appendShort(entries, [11]byte([]byte(fmt.Sprintf("%-11s", b.label))), attrLabel, 0, 0, b.at)
	}
	for i, c := range d.children {
		attr := byte(attrArchive)
		if c.folder {
			attr = attrDirectory
			if err := b.folder(c, d); err != nil {
				return err
			}
		} else {
			first, place, err := b.alloc(len(c.data))
			if err != nil {
				return err
			}
			c.cluster = first
			copy(place, c.data)
		}
		if !whole[i] {
			entries = appendLong(entries, c.name, short[i])
		}
		entries = appendShort(entries, short[i], attr, c.cluster, len(c.data), b.at)
	}
	copy(b.head[at:], entries)
	return nil
}

// bootSector writes the first sector, and FAT32's further ones.
func (v *Volume) bootSector(b *builder) {
	s := b.head[:b.sector]
	le := binary.LittleEndian
	copy(s, "\xeb\x3c\x90TOUCHMRK")
	le.PutUint16(s[11:], uint16(b.sector))
	s[13] = byte(b.perCluster)
	le.PutUint16(s[14:], uint16(b.reserved))
	s[16] = byte(b.fats)
	le.PutUint16(s[17:], uint16(b.rootEntries))
	if b.total < 1<<16 && b.typ != FAT32 {
		le.PutUint16(s[19:], uint16(b.total))
	} else {
		le.PutUint32(s[32:], uint32(b.total))
	}
	s[21] = 0xf8            // a disk that stays
	le.PutUint16(s[24:], 1) // sectors of a track and heads: of no disk, and a divisor of every size
	le.PutUint16(s[26:], 1)
	ext := s[36:]
	if b.typ == FAT32 {
		s[1] = 0x58
		le.PutUint32(s[36:], uint32(b.fatSectors))
		le.PutUint32(s[44:], b.root)
		le.PutUint16(s[48:], 1) // where the information sector is
		le.PutUint16(s[50:], 6) // and the copy of both
		ext = s[64:]
	} else {
		le.PutUint16(s[22:], uint16(b.fatSectors))
	}
	ext[0], ext[2] = 0x80, 0x29 // a disk's drive number; three fields follow
	le.PutUint32(ext[3:], v.ID)
	label := b.label
	if label == "" {
		label = "NO NAME"
	}
	copy(ext[7:], fmt.Sprintf("%-11s%-8v", label, b.typ))
	copy(ext[26:], "\xf4\xeb\xfd") // halt, for who starts a machine from it
	s[510], s[511] = 0x55, 0xaa
	if b.typ != FAT32 {
		return
	}
	info := b.head[b.sector : 2*b.sector]
	copy(info, "RRaA")
	copy(info[484:], "rrAa")
	le.PutUint32(info[488:], b.clusters+2-b.next) // free clusters
	le.PutUint32(info[492:], b.next)              // where to look for one
	info[510], info[511] = 0x55, 0xaa
	copy(b.head[6*b.sector:], b.head[:2*b.sector])
}
