package fat

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Contents is what a file system holds.
type Contents struct {
	Type  Type
	Label string
	ID    uint32
	// Files in the order of their directories, a folder's where the folder stands. Empty folders do not show.
	Files []File
}

// Parse reads an image: see [Read].
func Parse(image []byte) (*Contents, error) { return Read(bytes.NewReader(image), int64(len(image))) }

// Read reads a file system from the beginning of r, which has that many octets. It takes what this package and the usual
// formatters write, and takes nothing on trust: everything is inside the size, the copies of the table are equal, a cluster
// belongs to one file, a chain is as long as its file, names are whole, unique and of ASCII. Everything else is ErrDamaged. It reads
// at most 4096 files of 64 MiB together, and two copies of the table, each no longer than twice what its clusters need.
func Read(r io.ReaderAt, size int64) (*Contents, error) {
	p := &parser{r: r}
	if err := p.read(size); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return &p.Contents, nil
}

type parser struct {
	Contents
	r     io.ReaderAt
	g     geometry
	table []byte
	used  []byte // a bit for each cluster
	items int
	left  int64 // octets that files may still have
}

func (p *parser) read(size int64) error {
	boot := make([]byte, 512)
	if err := p.readAt(boot, 0); err != nil {
		return err
	}
	if err := p.boot(boot, size); err != nil {
		return err
	}
	p.Type = p.g.typ
	p.table = make([]byte, p.g.fatSectors*p.g.sector)
	if err := p.readAt(p.table, p.g.reserved*p.g.sector); err != nil {
		return err
	}
	copies := make([]byte, len(p.table))
	for i := int64(1); i < p.g.fats; i++ {
		if err := p.readAt(copies, (p.g.reserved+i*p.g.fatSectors)*p.g.sector); err != nil {
			return err
		}
		if !bytes.Equal(copies, p.table) {
			return errors.New("the copies of the table differ")
		}
	}
	p.used, p.left = make([]byte, (p.g.clusters+2+7)/8), maxData
	var root []byte
	var err error
	if p.g.typ == FAT32 {
		root, err = p.chain(p.g.root, -1)
	} else {
		root = make([]byte, p.g.rootEntries*entrySize)
		err = p.readAt(root, p.g.rootStart())
	}
	if err != nil {
		return fmt.Errorf("the root: %w", err)
	}
	return p.folder("", root, 0, 0, 1)
}

func (p *parser) readAt(b []byte, at int64) error {
	if n, err := p.r.ReadAt(b, at); n < len(b) {
		return fmt.Errorf("reading %d octets at %d: %w", len(b), at, err)
	}
	return nil
}

// boot reads the first sector. All of it is untrusted until g is whole.
func (p *parser) boot(s []byte, size int64) error {
	le := binary.LittleEndian
	g := geometry{sector: int64(le.Uint16(s[11:])), perCluster: int64(s[13]), reserved: int64(le.Uint16(s[14:])), fats: int64(s[16]),
		rootEntries: int64(le.Uint16(s[17:])), total: int64(le.Uint16(s[19:])), fatSectors: int64(le.Uint16(s[22:]))}
	if g.total == 0 {
		g.total = int64(le.Uint32(s[32:]))
	}
	ext := s[36:]
	wide := g.fatSectors == 0 // FAT32 has its numbers elsewhere
	if wide {
		g.fatSectors, g.root, ext = int64(le.Uint32(s[36:])), le.Uint32(s[44:]), s[64:]
	}
	switch {
	case s[510] != 0x55 || s[511] != 0xaa:
		return errors.New("no boot sector")
	case g.sector != 512 && g.sector != 1024 && g.sector != 2048 && g.sector != 4096:
		return fmt.Errorf("sectors of %d octets", g.sector)
	case g.perCluster == 0 || g.perCluster&(g.perCluster-1) != 0 || g.clusterOctets() > 64<<10:
		return fmt.Errorf("clusters of %d sectors", g.perCluster)
	case g.reserved == 0 || g.fats == 0 || g.fats > 2 || g.rootEntries*entrySize%g.sector != 0:
		return errors.New("no room for the boot sector, the table or the root")
	case g.total == 0 || g.total*g.sector > size || g.total*g.sector > maxSize:
		return fmt.Errorf("%d sectors of %d octets in %d octets", g.total, g.sector, size)
	case g.dataStart() >= g.total*g.sector:
		return errors.New("the tables leave no room for data")
	}
	g.clusters = uint32((g.total*g.sector - g.dataStart()) / g.clusterOctets())
	switch {
	case g.clusters == 0:
		return errors.New("no clusters")
	case g.clusters <= FAT12.maxClusters():
		g.typ = FAT12
	case g.clusters <= FAT16.maxClusters():
		g.typ = FAT16
	default:
		g.typ = FAT32
	}
	switch {
	case (g.typ == FAT32) != wide || wide != (g.rootEntries == 0):
		return fmt.Errorf("%d clusters make a %v, and the boot sector is of another type", g.clusters, g.typ)
	case g.typ.tableOctets(g.clusters) > g.fatSectors*g.sector:
		return fmt.Errorf("a table of %d sectors for %d clusters", g.fatSectors, g.clusters)
	case g.fatSectors*g.sector > 2*g.typ.tableOctets(g.clusters)+1<<16:
		// The table is read whole. A larger one than its clusters need does no harm, up to that.
		return fmt.Errorf("a table of %d sectors for %d clusters", g.fatSectors, g.clusters)
	}
	if ext[2] == 0x29 {
		p.ID = le.Uint32(ext[3:])
	}
	p.g = g
	return nil
}

// chain reads the clusters of a file of that many octets, or of a directory, whose size is how long its chain is: -1.
func (p *parser) chain(first uint32, size int64) ([]byte, error) {
	if size == 0 {
		if first != 0 {
			return nil, errors.New("an empty file with clusters")
		}
		return nil, nil
	}
	octets := p.g.clusterOctets()
	limit := (size + octets - 1) / octets
	if size < 0 {
		limit = (2*maxFiles*entrySize*21 + octets - 1) / octets
	}
	var data []byte
	for c, n := first, int64(1); ; n++ {
		if c < 2 || c-2 >= p.g.clusters {
			return nil, fmt.Errorf("cluster %d is none", c)
		}
		// No cluster is read twice, so a chain that runs into itself or another one ends here.
		if p.used[c/8]&(1<<(c%8)) != 0 {
			return nil, fmt.Errorf("cluster %d belongs to two files", c)
		}
		p.used[c/8] |= 1 << (c % 8)
		if n > limit {
			return nil, errors.New("the chain is longer than its file")
		}
		data = append(data, make([]byte, octets)...)
		if err := p.readAt(data[len(data)-int(octets):], p.g.at(c)); err != nil {
			return nil, err
		}
		next := p.g.entry(p.table, c)
		if next >= p.g.typ.end()-7 {
			if size >= 0 && n != limit {
				return nil, errors.New("the chain is shorter than its file")
			}
			break
		}
		c = next
	}
	if size >= 0 {
		data = data[:size]
	}
	return data, nil
}

// folder reads what a directory names. Its own cluster and the one above are what its first two entries must say.
func (p *parser) folder(path string, entries []byte, self, above uint32, depth int) error {
	items, label, err := parseDirectory(entries, depth == 1)
	if err != nil {
		return fmt.Errorf("folder %q: %w", path, err)
	}
	if depth == 1 {
		p.Label = label
	} else {
		if items[0].cluster != self || items[1].cluster != above {
			return fmt.Errorf("folder %q is not the one above or inside it", path)
		}
		items = items[2:]
	}
	for _, it := range items {
		name := path + it.name
		if p.items++; p.items > maxFiles {
			return fmt.Errorf("more than %d files and folders", maxFiles)
		}
		size := int64(it.size)
		if it.folder {
			if size != 0 || depth == maxDepth {
				return fmt.Errorf("folder %q has a size, or is in more than %d others", name, maxDepth-1)
			}
			size = -1
		} else if p.left -= size; p.left < 0 {
			return fmt.Errorf("file %q: more than %d octets of files", name, maxData)
		}
		data, err := p.chain(it.cluster, size)
		if err != nil {
			return fmt.Errorf("file %q: %w", name, err)
		}
		if !it.folder {
			p.Files = append(p.Files, File{Name: strings.Clone(name), Data: data})
		} else if err := p.folder(name+"/", data, it.cluster, self, depth+1); err != nil {
			return err
		}
	}
	return nil
}
