// Package raw keeps a device's identity at an offset of an image, a block device or an EEPROM, where there is no file system.
//
// A stamp is a list of [Record]s. [Encode] makes its octets, [Parse] reads them. On storage there are two copies, in two
// [Slots] beside each other: [Write] puts a stamp over the older copy, so that a write that is cut off at any octet leaves the
// newer one whole, and [Read] takes the newer one that is whole. templates/c/touchmark_tlv.h reads the same in C99.
//
// # Layout
//
// Numbers have their lowest octet first. A copy is:
//
//	offset  size
//	     0     4  magic: "TMRK"
//	     4     1  version: 1
//	     5     1  0
//	     6     2  number of records
//	     8     4  total length in octets, magic and CRC included
//	    12     4  sequence number, from 1; the copy with the greater one is the newer
//	    16        records: type (2), length (2), value; types rise, so that none comes twice
//	  last     4  CRC-32 (IEEE 802.3, as in zlib) of everything before it
//
// What follows in the slot is 0xff. A value has 1 to 65,535 octets. The first slot begins at the offset, the second where the
// first ends. A reader passes over types that it does not know. The CRC finds accidents, not forgery: what must not be forged
// must be signed.
//
// The storage must take a write of any octets over any others, as EEPROM, FRAM, SD cards and eMMC do. Bare NOR and NAND flash
// has to be erased first and is not for this package.
//
// Encode and Parse are pure. Read may be called by many goroutines, Write by one at a time for the same slots.
package raw

import (
	"bytes"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"slices"
	"syscall"
	"unicode"
	"unicode/utf8"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// Errors that callers branch on.
var (
	// ErrNone says that there is no copy: neither slot has one that was finished.
	ErrNone = errors.New("no stamp there")
	// ErrDamaged says that octets are not a stamp, or not all of one.
	ErrDamaged = errors.New("damaged stamp")
	// ErrFull says that the records do not fit into a slot.
	ErrFull = errors.New("the stamp does not fit into its slot")
	// ErrMismatch says that what was read back is not what was written. Read returns a whole stamp all the same.
	ErrMismatch = errors.New("stamp reads back differently")
)

// A Type says what a record is. Types below FirstUser are assigned here and nowhere else.
type Type uint16

// The types. Text is UTF-8 without control characters and without an ending NUL.
const (
	IDScope             Type = 1      // text
	GlobalEndpoint      Type = 2      // text: a host name
	RegistrationID      Type = 3      // text
	Serial              Type = 4      // text
	CertificateChain    Type = 5      // certificates in DER one after another, the device's first
	CertificateChainPEM Type = 6      // the same in PEM
	PrivateKey          Type = 7      // PKCS #8, DER; secret
	SymmetricKey        Type = 8      // its octets, not base64; secret
	KeyURI              Type = 9      // text: where the private key is instead
	FirstUser           Type = 0x8000 // to LastUser: any octets
	LastUser            Type = 0xfffe
)

// A Record is one value of a stamp. It prints without its value, which may be secret.
type Record struct {
	Type  Type
	Value []byte
}

// Format prints the type and how long the value is.
func (r Record) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "record of type %d, %d octets", uint16(r.Type), len(r.Value))
}

const (
	magic      = "TMRK"
	version    = 1
	headerSize = 16
	crcSize    = 4
	maxSlot    = 1 << 20
)

func (r Record) check() error {
	if len(r.Value) == 0 || len(r.Value) > math.MaxUint16 {
		return fmt.Errorf("%v: want 1 to %d", r, math.MaxUint16)
	}
	ok := true
	switch r.Type {
	case 0, math.MaxUint16: // what erased storage is full of
		return fmt.Errorf("%v: no such type", r)
	case IDScope, GlobalEndpoint, RegistrationID, Serial, KeyURI:
		ok = utf8.Valid(r.Value) && !bytes.ContainsFunc(r.Value, unicode.IsControl)
	case CertificateChain, PrivateKey:
		n := 0
		for s := cryptobyte.String(r.Value); ok && len(s) > 0; n++ {
			var element cryptobyte.String
			ok = s.ReadASN1(&element, asn1.SEQUENCE)
		}
		ok = ok && (n == 1 || r.Type == CertificateChain)
	case CertificateChainPEM:
		for rest := r.Value; ok && len(rest) > 0; {
			var block *pem.Block
			ok = bytes.HasPrefix(rest, []byte("-----BEGIN CERTIFICATE-----\n"))
			if block, rest = pem.Decode(rest); block == nil {
				ok = false
			}
		}
	}
	if !ok {
		return fmt.Errorf("%v: the value is not of that type", r)
	}
	return nil
}

// Encode makes the octets of a stamp. Records may come in any order; a type that comes twice is an error.
func Encode(sequence uint32, records []Record) ([]byte, error) {
	if sequence == 0 || len(records) > math.MaxUint16 {
		return nil, fmt.Errorf("stamp %d of %d records: want at least 1, and at most %d records", sequence, len(records), math.MaxUint16)
	}
	records = slices.SortedFunc(slices.Values(records), func(a, b Record) int { return int(a.Type) - int(b.Type) })
	le := binary.LittleEndian
	b := append(make([]byte, 0, 256), magic...)
	b = append(b, version, 0)
	b = le.AppendUint16(b, uint16(len(records)))
	b = le.AppendUint32(b, 0)
	b = le.AppendUint32(b, sequence)
	for i, r := range records {
		if err := r.check(); err != nil {
			return nil, err
		}
		if i > 0 && r.Type == records[i-1].Type {
			return nil, fmt.Errorf("%v is there twice", r)
		}
		if b = le.AppendUint16(le.AppendUint16(b, uint16(r.Type)), uint16(len(r.Value))); len(b)+len(r.Value)+crcSize > maxSlot {
			return nil, ErrFull
		}
		b = append(b, r.Value...)
	}
	le.PutUint32(b[8:], uint32(len(b)+crcSize))
	return le.AppendUint32(b, crc32.ChecksumIEEE(b)), nil
}

// Parse reads the stamp that b begins with; what follows it is not looked at. The values are parts of b. Where no magic stands
// the error is ErrNone; else, and when anything is not as Encode makes it, ErrDamaged. Types that are not assigned yet pass.
func Parse(b []byte) (sequence uint32, records []Record, err error) {
	if !bytes.HasPrefix(b, []byte(magic)) {
		return 0, nil, ErrNone
	}
	damaged := func(format string, args ...any) (uint32, []Record, error) {
		return 0, nil, fmt.Errorf("%w: %w", ErrDamaged, fmt.Errorf(format, args...))
	}
	if len(b) < headerSize+crcSize {
		return damaged("it has %d octets", len(b))
	}
	le := binary.LittleEndian
	total := le.Uint32(b[8:])
	if total < headerSize+crcSize || uint64(total) > uint64(min(len(b), maxSlot)) {
		return damaged("it says that it has %d octets", total)
	}
	body, sum := b[:total-crcSize], le.Uint32(b[total-crcSize:])
	if crc32.ChecksumIEEE(body) != sum {
		return damaged("the CRC-32 does not match")
	}
	if body[4] != version || body[5] != 0 {
		return damaged("version %d.%d is not known", body[4], body[5])
	}
	if sequence = le.Uint32(body[12:]); sequence == 0 {
		return damaged("its sequence number is 0")
	}
	for rest := body[headerSize:]; len(rest) > 0; {
		if len(rest) < 4 || len(rest)-4 < int(le.Uint16(rest[2:])) {
			return damaged("a record is longer than the stamp")
		}
		n := 4 + int(le.Uint16(rest[2:]))
		r := Record{Type: Type(le.Uint16(rest)), Value: rest[4:n:n]}
		if err := r.check(); err != nil {
			return damaged("%w", err)
		}
		if len(records) > 0 && records[len(records)-1].Type >= r.Type {
			return damaged("%v does not come in order", r)
		}
		records, rest = append(records, r), rest[n:]
	}
	if len(records) != int(le.Uint16(body[6:])) {
		return damaged("it has %d records, and says %d", len(records), le.Uint16(body[6:]))
	}
	return sequence, records, nil
}

// Storage is what a stamp is written to; an [os.File] is one. Sync returns when everything written is on the medium.
type Storage interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

// Slots says where the two copies are.
type Slots struct {
	// Offset of the first slot in octets; the second follows it.
	Offset int64
	// Size of one slot in octets, at most 1 MiB.
	Size int
	// Page is how many octets the storage writes at once, and may lose at once when a write is cut off: the page of an EEPROM, the
	// sector of a disk. Offset and Size are multiples of it; writes are whole pages. 0 for storage without pages.
	Page int
}

func (s Slots) check() error {
	if s.Offset < 0 || s.Offset > math.MaxInt64-2*maxSlot || s.Size < headerSize+crcSize || s.Size > maxSlot || s.Page < 0 {
		return fmt.Errorf("slots of %d octets at %d: want %d to %d", s.Size, s.Offset, headerSize+crcSize, maxSlot)
	}
	if s.Page > 0 && (s.Offset%int64(s.Page) != 0 || s.Size%s.Page != 0) {
		return fmt.Errorf("slots of %d octets at %d: want multiples of the page, %d", s.Size, s.Offset, s.Page)
	}
	return nil
}

func (s Slots) at(slot int) int64 { return s.Offset + int64(slot)*int64(s.Size) }

// newest reads both slots and returns the newer stamp and its slot. Of two with the same number, which no Write leaves, the
// first counts.
func (s Slots) newest(f io.ReaderAt) (sequence uint32, records []Record, slot int, err error) {
	if err := s.check(); err != nil {
		return 0, nil, 0, err
	}
	err = ErrNone
	for i := range 2 {
		b := make([]byte, s.Size)
		if n, err := f.ReadAt(b, s.at(i)); n < len(b) {
			return 0, nil, 0, fmt.Errorf("reading slot %d at %d: %w", i, s.at(i), err)
		}
		n, r, parseErr := Parse(b)
		switch {
		case parseErr == nil && n > sequence:
			sequence, records, slot = n, r, i
		case parseErr != nil && !errors.Is(parseErr, ErrNone):
			err = fmt.Errorf("slot %d: %w", i, parseErr)
		}
	}
	if sequence > 0 {
		err = nil
	}
	return sequence, records, slot, err
}

// Read returns the newer stamp that is whole, and its sequence number. Without one the error is ErrNone, or ErrDamaged if a
// slot has something that claims to be one.
func Read(f io.ReaderAt, s Slots) (sequence uint32, records []Record, err error) {
	sequence, records, _, err = s.newest(f)
	if err != nil {
		err = fmt.Errorf("reading the stamp: %w", err)
	}
	return sequence, records, err
}

// Write puts a stamp over the older copy and returns its sequence number. When it returns without an error the stamp is on the
// medium and was read back. Whatever happens before that, cut off at any octet, Read returns the stamp from before or this
// one whole. A second Write of the same removes the last of what was there before from the other slot, as a key's rotation
// needs. Records that do not fit are ErrFull; what reads back differently is ErrMismatch.
//
// Reading back goes through the system's cache: where the medium itself is in doubt, open it with O_DIRECT or look again after
// the power was off.
func Write(f Storage, s Slots, records []Record) (sequence uint32, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("writing the stamp: %w", err)
		}
	}()
	// The copy that counts stays as it is, throughout. Everything below happens in the other slot, and no page is in both.
	sequence, _, newest, err := s.newest(f)
	slot := 1 - newest
	switch {
	case errors.Is(err, ErrNone) || errors.Is(err, ErrDamaged):
		sequence, slot = 0, 0 // there is nothing to keep
	case err != nil:
		return 0, err
	case sequence == math.MaxUint32:
		return 0, fmt.Errorf("sequence number %d is the last", sequence)
	}
	sequence++
	b, err := Encode(sequence, records)
	if err != nil {
		return 0, err
	}
	if len(b) > s.Size {
		return 0, fmt.Errorf("%d octets in %d: %w", len(b), s.Size, ErrFull)
	}
	// To the slot's end, so that no part of a key that was there before stays behind.
	b = append(b, bytes.Repeat([]byte{0xff}, s.Size-len(b))...)
	head := len(magic) // the octets that the magic is written with
	if s.Page > 0 {
		head = (head + s.Page - 1) / s.Page * s.Page
	}

	// 1. Everything of the first page but the magic. A cut leaves the old copy of this slot, which does not count, or something
	// that has no magic or a wrong CRC.
	copy(b, "\x00\x00\x00\x00")
	if err := s.write(f, slot, b[:head], 0); err != nil {
		return 0, err
	}
	// 2. The rest. It is on the medium only after this, in whatever order its pages went, and without a magic it is nothing.
	if err := s.write(f, slot, b[head:], head); err != nil {
		return 0, err
	}
	// 3. The magic. All else is there and stays: of the octets written now only the magic's change. A cut inside leaves part of
	// a magic, which is none; or, where a page was lost whole, a CRC that does not match. With its last octet the stamp counts.
	copy(b, magic)
	if err := s.write(f, slot, b[:head], 0); err != nil {
		return 0, err
	}
	// 4. If the storage lied, the copy from before is there still.
	back := make([]byte, len(b))
	if n, err := f.ReadAt(back, s.at(slot)); n < len(back) {
		return 0, fmt.Errorf("reading back: %w", err)
	}
	if !bytes.Equal(back, b) {
		return 0, fmt.Errorf("slot %d at %d: %w", slot, s.at(slot), ErrMismatch)
	}
	return sequence, nil
}

// write writes part of a slot, page by page, and waits until it is on the medium.
func (s Slots) write(f Storage, slot int, b []byte, at int) error {
	step := s.Page
	if step == 0 {
		step = max(len(b), 1)
	}
	for page := range slices.Chunk(b, step) {
		if _, err := f.WriteAt(page, s.at(slot)+int64(at)); err != nil {
			return err
		}
		at += len(page)
	}
	// A device file without a cache says EINVAL: fsync(2).
	if err := f.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) {
		return err
	}
	return nil
}
