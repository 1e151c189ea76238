// Package fat builds and parses FAT12, FAT16 and FAT32 images with a device's files in them.
//
// A [Volume] says how large the file system is and what it is called; [Volume.Build] makes the whole image, [Volume.Write]
// writes the part of it that matters to a file or device of that size. [Parse] reads a file system back, [Read] from a
// device. The same input gives the same octets: there is no clock in an image.
//
// Images are plain file systems without a partition table. Names are long names (VFAT) of ASCII, with folders separated by
// slashes. Files lie in one piece each, in the order given. Functions may be called by many goroutines.
//
// The format is Microsoft's "FAT: General Overview of On-Disk Format", version 1.03, and, for long names, its "Long File
// Name Specification". Which of the three a file system is follows from its number of clusters alone (section 3.5), so a type
// that a size cannot have is refused.
package fat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// Errors that callers branch on.
var (
	// ErrFull says that the files do not fit.
	ErrFull = errors.New("the files do not fit into the FAT file system")
	// ErrSize says that a file system of that type cannot have that size.
	ErrSize = errors.New("not a size for that FAT file system")
	// ErrDamaged says that an image is not a FAT file system that can be trusted: the error beside it says why.
	ErrDamaged = errors.New("damaged FAT file system")
)

// A Type is one of the three sorts of FAT file system: 12, 16 or 32 bits for each entry of the table.
type Type int

// The types. The zero value lets the size choose: FAT12 up to 8 MiB, FAT16 up to 512 MiB, FAT32 beyond.
const (
	FAT12 Type = 12
	FAT16 Type = 16
	FAT32 Type = 32
)

func (t Type) String() string { return fmt.Sprintf("FAT%d", int(t)) }

// maxClusters returns how many clusters a type has at most: one more makes it the next type, or reaches the marks of FAT32.
func (t Type) maxClusters() uint32 {
	switch t {
	case FAT12:
		return 4084
	case FAT16:
		return 65524
	}
	return 0x0ffffff5 - 2
}

// end returns the mark of a chain's last cluster; everything from end-7 on is one.
func (t Type) end() uint32 {
	switch t {
	case FAT12:
		return 0xfff
	case FAT16:
		return 0xffff
	}
	return 0x0fffffff
}

// Limits.
const (
	maxSize  = 32 << 30 // of a file system, in octets
	maxImage = 1 << 30  // of one that is built in memory
	maxDepth = 8        // folders in each other
	maxName  = 255      // characters of a name
	maxFiles = 4096     // files and folders
	maxData  = 64 << 20 // octets of all files that are read
)

// A Volume is a file system to build.
type Volume struct {
	// Size in octets, a multiple of the sector size, at most 32 GiB.
	Size int64
	// Type of file system; 0 chooses by size.
	Type Type
	// SectorSize is 512 (0 means that), 1024, 2048 or 4096 octets.
	SectorSize int
	// Label is the volume's name: at most 11 capitals, digits, spaces and -_ characters; may be empty.
	Label string
	// ID is the volume's serial number, which systems tell volumes apart by.
	ID uint32
	// Time is that of all files; the zero value means 1980-01-01, where FAT begins. Two seconds are its finest step.
	Time time.Time
}

// A File is one file of a file system.
type File struct {
	// Name, with its folders before it: "certs/device.pem". Each part has 1 to 255 characters of printable ASCII without
	// "*/:<>?\|, begins with no space and ends in neither space nor dot. Names that differ in case alone are the same.
	Name string
	Data []byte
}

// A geometry says where the parts of a file system are. All of it is in sectors but clusters.
type geometry struct {
	typ         Type
	sector      int64 // octets
	total       int64
	reserved    int64
	fats        int64 // copies of the table
	fatSectors  int64 // of one copy
	rootEntries int64 // of a root directory of fixed size; 0 in FAT32
	perCluster  int64
	clusters    uint32
	root        uint32 // first cluster of the root directory in FAT32
}

func (g *geometry) rootStart() int64     { return (g.reserved + g.fats*g.fatSectors) * g.sector }
func (g *geometry) dataStart() int64     { return g.rootStart() + g.rootEntries*entrySize }
func (g *geometry) clusterOctets() int64 { return g.perCluster * g.sector }
func (g *geometry) at(cluster uint32) int64 {
	return g.dataStart() + int64(cluster-2)*g.clusterOctets()
}

// entry returns an entry of a table.
func (g *geometry) entry(table []byte, n uint32) uint32 {
	switch g.typ {
	case FAT12: // two entries in three octets
		v := uint32(binary.LittleEndian.Uint16(table[n+n/2:]))
		if n%2 == 1 {
			return v >> 4
		}
		return v & 0xfff
	case FAT16:
		return uint32(binary.LittleEndian.Uint16(table[2*n:]))
	}
	return binary.LittleEndian.Uint32(table[4*n:]) & 0x0fffffff
}

func (g *geometry) setEntry(table []byte, n, v uint32) {
	switch g.typ {
	case FAT12:
		at := table[n+n/2:]
		if n%2 == 1 {
			at[0], at[1] = at[0]&0x0f|byte(v<<4), byte(v>>4)
		} else {
			at[0], at[1] = byte(v), at[1]&0xf0|byte(v>>8)
		}
	case FAT16:
		binary.LittleEndian.PutUint16(table[2*n:], uint16(v))
	default:
		binary.LittleEndian.PutUint32(table[4*n:], v)
	}
}

// tableOctets returns how many octets entries for that many clusters take.
func (t Type) tableOctets(clusters uint32) int64 { return (int64(clusters+2)*int64(t) + 7) / 8 }

// lay returns the geometry of a volume: the smallest clusters that its type allows, or for FAT32 those of Microsoft's own
// formatter, which keep the table small.
func (v *Volume) lay() (*geometry, error) {
	g := &geometry{typ: v.Type, sector: int64(v.SectorSize), fats: 2}
	if g.sector == 0 {
		g.sector = 512
	}
	if g.sector != 512 && g.sector != 1024 && g.sector != 2048 && g.sector != 4096 {
		return nil, fmt.Errorf("sectors of %d octets: want 512, 1024, 2048 or 4096", g.sector)
	}
	if v.Size <= 0 || v.Size > maxSize || v.Size%g.sector != 0 {
		return nil, fmt.Errorf("%d octets: %w: want a multiple of %d, at most 32 GiB", v.Size, ErrSize, g.sector)
	}
	g.total = v.Size / g.sector
	if g.typ == 0 {
		switch {
		case v.Size <= 8<<20:
			g.typ = FAT12
		case v.Size <= 512<<20:
			g.typ = FAT16
		default:
			g.typ = FAT32
		}
	}
	least, octets := uint32(1), g.sector
	switch g.typ {
	case FAT12:
		g.reserved, g.rootEntries = 1, 512
		if v.Size < 1<<20 {
			g.rootEntries = 128
		}
	case FAT16:
		g.reserved, g.rootEntries, least = 1, 512, FAT12.maxClusters()+1
	case FAT32:
		g.reserved, least = 32, FAT16.maxClusters()+1
		switch {
		case v.Size > 16<<30:
			octets = 16 << 10
		case v.Size > 8<<30:
			octets = 8 << 10
		case v.Size > 260<<20:
			octets = 4 << 10
		}
	default:
		return nil, fmt.Errorf("type %d: want FAT12, FAT16 or FAT32", int(g.typ))
	}
	for g.perCluster = max(1, octets/g.sector); g.clusterOctets() <= 32<<10; g.perCluster *= 2 {
		// The table has entries for the clusters, and takes the room of some: it only grows until both agree.
		for g.fatSectors = 1; ; g.fatSectors++ {
			data := g.total*g.sector - g.dataStart()
			if data < 0 {
				return nil, fmt.Errorf("%d octets: %w: too small for a %v", v.Size, ErrSize, g.typ)
			}
			clusters := min(data/g.clusterOctets(), int64(g.typ.maxClusters())+1)
			g.clusters = uint32(clusters)
			short := g.typ.tableOctets(g.clusters) - g.fatSectors*g.sector
			if short <= 0 {
				break
			}
			// Each sector that is added takes room for less than one sector's worth of entries.
			g.fatSectors += short / g.sector / 2
		}
		if g.clusters < least {
			break
		}
		if g.clusters <= g.typ.maxClusters() {
			g.root = 0
			if g.typ == FAT32 {
				g.root = 2
			}
			return g, nil
		}
	}
	return nil, fmt.Errorf("%d octets: %w: as %v it would have %d clusters, want %d to %d", v.Size, ErrSize, g.typ, g.clusters, least, g.typ.maxClusters())
}
