package nvs

import (
	"errors"
	"fmt"
	"slices"
)

// Build appends the image of a partition of size octets to dst, which may be nil, and returns the extended slice; a dst with
// room for it is not allocated again. Entries are written in their order. With keys, they are encrypted.
//
// The error is [ErrFull] when they do not fit; the same key twice in a namespace, and what [Entry] does not allow, are errors
// too. Nothing is returned then.
func Build(dst []byte, size int, entries []Entry, keys *Keys) ([]byte, error) {
	if err := checkSize(size); err != nil {
		return nil, fmt.Errorf("building an NVS partition: %w", err)
	}
	w := writer{image: slices.Grow(dst, size), base: len(dst), size: size, keys: keys, known: make(map[id]byte, 2*len(entries))}
	err := w.turn()
	for i := 0; i < len(entries) && err == nil; i++ {
		if err = w.entry(&entries[i]); err != nil {
			err = fmt.Errorf("key %q in namespace %q: %w", entries[i].Key, entries[i].Namespace, err)
		}
	}
	if err != nil {
		clear(w.image[w.base:]) // it held secrets that nobody is given
		return nil, fmt.Errorf("building an NVS partition of %d octets: %w", size, err)
	}
	for len(w.image) < w.base+size {
		w.image = append(w.image, blank...)
	}
	return w.image, nil
}

// A writer fills one page after another.
type writer struct {
	image      []byte
	base       int // where the partition begins in image
	size       int
	keys       *Keys
	n          int         // entries written in the last page
	known      map[id]byte // ids written so far; those of namespaces with their numbers
	namespaces byte
}

func (w *writer) page() []byte { return w.image[len(w.image)-pageSize:] }

// turn closes the page and begins the next. The last page of the partition stays free: a device moves entries there when it
// runs out of room.
func (w *writer) turn() error {
	used := len(w.image) - w.base
	if used+2*pageSize > w.size {
		return ErrFull
	}
	if used > 0 {
		w.page()[0] = pageFull
	}
	w.image = append(w.image, blank...)
	w.n = 0
	p := w.page()
	p[0], p[8] = pageActive, version2
	le.PutUint32(p[4:], uint32(used/pageSize))
	le.PutUint32(p[28:], pageSum(p))
	return nil
}

// ensure turns the page when it is full.
func (w *writer) ensure() error {
	if w.n == pageEntries {
		return w.turn()
	}
	return nil
}

func (w *writer) entry(e *Entry) error {
	if err := e.check(); err != nil {
		return err
	}
	name := newID(0, e.Namespace)
	ns := w.known[name]
	if ns == 0 {
		if w.namespaces == maxNamespaces {
			return fmt.Errorf("more than %d namespaces", maxNamespaces)
		}
		w.namespaces++
		ns = w.namespaces
		w.known[name] = ns
		if err := w.number(0, typeU8, e.Namespace, uint64(ns)); err != nil {
			return err
		}
	}
	if e.Value == nil {
		return nil
	}
	key := newID(ns, e.Key)
	if _, twice := w.known[key]; twice {
		return errors.New("there already")
	}
	w.known[key] = ns
	switch v := e.Value.(type) {
	case uint8:
		return w.number(ns, typeU8, e.Key, uint64(v))
	case int8:
		return w.number(ns, typeI8, e.Key, uint64(v))
	case uint16:
		return w.number(ns, typeU16, e.Key, uint64(v))
	case int16:
		return w.number(ns, typeI16, e.Key, uint64(v))
	case uint32:
		return w.number(ns, typeU32, e.Key, uint64(v))
	case int32:
		return w.number(ns, typeI32, e.Key, uint64(v))
	case uint64:
		return w.number(ns, typeU64, e.Key, v)
	case int64:
		return w.number(ns, typeI64, e.Key, uint64(v))
	case string:
		return w.text(ns, e.Key, v)
	default:
		return w.blob(ns, e.Key, v.([]byte))
	}
}

func (w *writer) number(ns, typ byte, key string, v uint64) error {
	if err := w.ensure(); err != nil {
		return err
	}
	w.item(ns, typ, 1, noChunk, key, v|pad(typ&0xF))
	return nil
}

// pad has the bits set that a number of that many octets leaves unused.
func pad(octets byte) uint64 { return ^uint64(0) << (8 * octets) }

// text writes a string in one piece. Where it would fill the page to its last entry, Espressif's generator turns the page,
// and so do we. A string that takes a whole page, of 3968 octets or more, is one that the generator fails on.
func (w *writer) text(ns byte, key, v string) error {
	n := len(v) + 1
	if w.n+1+entriesFor(n) >= pageEntries {
		if err := w.turn(); err != nil {
			return err
		}
	}
	room := w.room()
	room[copy(room, v)] = 0
	w.value(ns, typeString, noChunk, key, n)
	return nil
}

// blob writes chunks, one to a page, and the index that names them. In a page's last entry the first chunk has no octets:
// so does the generator, and a device reads it.
func (w *writer) blob(ns byte, key string, v []byte) error {
	if err := w.ensure(); err != nil {
		return err
	}
	size, chunks := uint64(len(v)), byte(0)
	for more := true; more; chunks++ {
		if chunks == maxChunks {
			return errBlobTooLong
		}
		n := copy(w.room(), v)
		v = v[n:]
		w.value(ns, typeBlobData, chunks, key, n)
		more = len(v) > 0
		if err := w.ensure(); err != nil {
			return err
		}
	}
	w.item(ns, typeBlobIndex, 1, noChunk, key, size|uint64(chunks)<<32|0xFFFF<<48)
	return nil
}

// room is where the octets of the next item go.
func (w *writer) room() []byte { return w.page()[entriesAt+(w.n+1)*entrySize:] }

// value writes the header of a string or chunk whose n octets are in their room.
func (w *writer) value(ns, typ, chunk byte, key string, n int) {
	sum := checksum(w.room()[:n])
	w.item(ns, typ, byte(1+entriesFor(n)), chunk, key, uint64(n)|0xFFFF<<16|uint64(sum)<<32)
}

// item writes a header, marks the entries of its span as written, and encrypts them.
func (w *writer) item(ns, typ, span, chunk byte, key string, data uint64) {
	p := w.page()
	e := p[entriesAt+w.n*entrySize:]
	e[0], e[1], e[2], e[3] = ns, typ, span, chunk
	clear(e[8:24])
	copy(e[8:24], key)
	le.PutUint64(e[24:], data)
	le.PutUint32(e[4:], headerSum(e))
	for range span {
		p[statesAt+w.n/4] &^= 1 << (w.n % 4 * 2)
		if w.keys != nil {
			at := entriesAt + w.n*entrySize
			w.keys.encrypt(p[at:at+entrySize], len(w.image)-pageSize-w.base+at)
		}
		w.n++
	}
}
