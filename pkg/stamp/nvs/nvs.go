// Package nvs writes and reads partition images of ESP-IDF's non-volatile storage, as an ESP32 finds its settings in flash.
//
// An [Entry] is a key with its value in a namespace. [Build] lays entries out in an image, octet for octet as Espressif's
// nvs_partition_gen.py does for the same entries in the same order, encrypted when it is given [Keys]; [Parse] reads an image
// back, also one that a device wrote to since. [FromCSV] takes the generator's own input. [Keys.Image] and [ParseKeys] are
// the key partition that goes with an encrypted one.
//
// Functions may be called by many goroutines; Keys may be shared. Limits: format version 2 (blobs over many pages) only,
// partitions of 12 KiB to 16 MiB, keys and names of 15 ASCII characters, strings of 3999 octets, blobs of 508000, 254
// namespaces.
//
// The format is described in ESP-IDF's Programming Guide, "Non-Volatile Storage Library", under "Internals".
package nvs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
)

var (
	// ErrFull says that the entries do not fit into the partition with one page of it kept free.
	ErrFull = errors.New("the NVS partition is too small for its entries")
	// ErrInvalid says that an image is damaged, of another form, or encrypted with other keys.
	ErrInvalid = errors.New("not a valid NVS image")
)

// Bounds of a partition, in octets; sizes are multiples of a page, 4096.
const (
	MinSize = 3 * pageSize
	MaxSize = 16 << 20 // the largest flash that an ESP32 maps
)

// An Entry is one value of the partition. Its value may be a key, so an Entry prints and logs without it.
type Entry struct {
	// Namespace and Key name the value: 1 to 15 printable ASCII characters each.
	Namespace, Key string
	// Value is an int8 to int64, uint8 to uint64, a string without NUL, or a []byte, which NVS calls a blob. With neither a
	// value nor a key, the entry declares a namespace that has no values; any other is declared by its first value.
	Value any
}

// String returns the entry's name and type.
func (e Entry) String() string { return fmt.Sprintf("%s/%s (%T)", e.Namespace, e.Key, e.Value) }

// Format implements [fmt.Formatter] for every verb: the value is left out.
func (e Entry) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(e.String())) }

// MarshalText returns what String does.
func (e Entry) MarshalText() ([]byte, error) { return []byte(e.String()), nil }

func (e *Entry) check() error {
	if err := checkName(e.Namespace); err != nil {
		return fmt.Errorf("the namespace %w", err)
	}
	if e.Key == "" && e.Value == nil {
		return nil
	}
	if err := checkName(e.Key); err != nil {
		return fmt.Errorf("the key %w", err)
	}
	switch v := e.Value.(type) {
	case uint8, int8, uint16, int16, uint32, int32, uint64, int64:
	case string:
		if len(v) >= maxChunk {
			return fmt.Errorf("a string of %d octets, want at most %d", len(v), maxChunk-1)
		}
		if strings.IndexByte(v, 0) >= 0 {
			return errors.New("a string with NUL in it")
		}
	case []byte:
		if len(v) > maxChunks*maxChunk {
			return errBlobTooLong
		}
	default:
		return fmt.Errorf("a value of type %T", v)
	}
	return nil
}

var errBlobTooLong = fmt.Errorf("a blob of more than %d octets or %d pages", maxChunks*maxChunk, maxChunks)

func checkName(s string) error {
	if s == "" || len(s) > maxName {
		return fmt.Errorf("has %d characters, want 1 to %d", len(s), maxName)
	}
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return errors.New("has characters other than printable ASCII")
		}
	}
	return nil
}

// A partition is made of pages: a header of 32 octets, the states of its entries in two bits each, and 126 entries of 32
// octets. An item is a header entry and, for strings and chunks of blobs, the entries after it that hold the octets.
const (
	pageSize    = 4096
	statesAt    = 32
	entriesAt   = 64
	entrySize   = 32
	pageEntries = 126

	maxName       = 15
	maxChunk      = (pageEntries - 1) * entrySize
	maxChunks     = 127 // the other half of the numbers is for the next version of the blob
	maxNamespaces = 254

	version2 = 0xFE
	noChunk  = 0xFF
)

// A page's state is the first octet of its header; the three after it are 0xFF. Flash can clear bits but not set them.
const (
	pageActive = 0xFE
	pageFull   = 0xFC
)

// States of an entry.
const (
	entryErased  = 0
	entryWritten = 2
	entryEmpty   = 3
)

// Types of items. Of numbers, the low half is the width in octets, the high half says that they are signed.
const (
	typeU8, typeI8   = 0x01, 0x11
	typeU16, typeI16 = 0x02, 0x12
	typeU32, typeI32 = 0x04, 0x14
	typeU64, typeI64 = 0x08, 0x18
	typeString       = 0x21
	typeBlobData     = 0x42
	typeBlobIndex    = 0x48
)

// blank is an erased page.
var blank = strings.Repeat("\xFF", pageSize)

func checksum(b []byte) uint32 { return crc32.Update(1<<32-1, crc32.IEEETable, b) }

// headerSum is over the header entry without the four octets that hold it.
func headerSum(e []byte) uint32 {
	return crc32.Update(checksum(e[:4]), crc32.IEEETable, e[8:entrySize])
}

// pageSum is over the page header from the sequence number on.
func pageSum(p []byte) uint32 { return checksum(p[4:28]) }

// entriesFor is how many entries n octets take.
func entriesFor(n int) int { return (n + entrySize - 1) / entrySize }

// An id names a value within the partition: the number of its namespace and its key. Number 0 has the names of namespaces.
type id [1 + maxName]byte

func newID(namespace byte, key string) (i id) {
	i[0] = namespace
	copy(i[1:], key)
	return i
}

func checkSize(size int) error {
	if size < MinSize || size > MaxSize || size%pageSize != 0 {
		return fmt.Errorf("a size of %d octets, want a multiple of %d from %d to %d", size, pageSize, MinSize, MaxSize)
	}
	return nil
}

var le = binary.LittleEndian
