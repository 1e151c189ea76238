package nvs

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"
)

// Parse reads the image of a partition and returns its entries in their order; keys are those it is encrypted with, or nil.
//
// An image may have been written by a device since: pages in any order, entries erased. Everything else has one form, and
// whatever deviates is [ErrInvalid]: headers, checksums, states, padding, a key twice, a value without its namespace, a chunk
// without its index, a page in the middle of being moved, no free page. The image is not kept and not changed.
func Parse(image []byte, keys *Keys) ([]Entry, error) {
	entries, err := parse(image, keys)
	if err != nil {
		return nil, fmt.Errorf("reading an NVS partition: %w: %w", ErrInvalid, err)
	}
	return entries, nil
}

func parse(image []byte, keys *Keys) ([]Entry, error) {
	if err := checkSize(len(image)); err != nil {
		return nil, err
	}
	if keys != nil {
		image = bytes.Clone(image) // it is decrypted in place
	}
	pages, err := pageOrder(image)
	if err != nil {
		return nil, err
	}
	var items []item
	for _, at := range pages {
		if items, err = pageItems(items, image[at:at+pageSize], at, keys); err != nil {
			return nil, err
		}
	}
	return assemble(items)
}

// pageOrder returns where the pages in use begin, by their sequence numbers.
func pageOrder(image []byte) ([]int, error) {
	var order []int
	sequence := func(at int) uint32 { return le.Uint32(image[at+4:]) }
	active := -1
	for at := 0; at < len(image); at += pageSize {
		p := image[at : at+pageSize]
		if isBlank(p) {
			continue
		}
		if p[0] != pageActive && p[0] != pageFull || !isBlank(p[1:4]) || p[8] != version2 || !isBlank(p[9:28]) || le.Uint32(p[28:]) != pageSum(p) {
			return nil, fmt.Errorf("the header of the page at 0x%x", at)
		}
		if p[0] == pageActive {
			if active >= 0 {
				return nil, errors.New("two active pages")
			}
			active = at
		}
		order = append(order, at)
	}
	if active < 0 {
		return nil, errors.New("no active page")
	}
	if len(order) == len(image)/pageSize {
		return nil, errors.New("no free page")
	}
	slices.SortFunc(order, func(a, b int) int { return cmp.Compare(sequence(a), sequence(b)) })
	for i := 1; i < len(order); i++ {
		if sequence(order[i-1]) == sequence(order[i]) {
			return nil, errors.New("two pages with the same sequence number")
		}
	}
	if order[len(order)-1] != active {
		return nil, errors.New("the active page is not the latest")
	}
	return order, nil
}

func isBlank(b []byte) bool { return string(b) == blank[:len(b)] }

// An item is checked by itself, not yet against the others.
type item struct {
	ns, typ, chunk byte
	key            string
	data           uint64
	octets         []byte // of a string or chunk; part of the image
}

// pageItems appends the items of a page which is at an offset in the image.
func pageItems(items []item, p []byte, at int, keys *Keys) ([]item, error) {
	state := func(n int) byte { return p[statesAt+n/4] >> (n % 4 * 2) & 3 }
	n := 0
	for n < pageEntries && state(n) != entryEmpty {
		if state(n) == entryErased {
			n++
			continue
		}
		e := p[entriesAt+n*entrySize:]
		if keys != nil {
			keys.decrypt(e[:entrySize], at+entriesAt+n*entrySize)
		}
		if state(n) != entryWritten || le.Uint32(e[4:]) != headerSum(e) {
			return nil, fmt.Errorf("the checksum or state of entry %d at 0x%x", n, at)
		}
		span := int(e[2])
		if span == 0 || n+span > pageEntries {
			return nil, fmt.Errorf("the span of entry %d at 0x%x", n, at)
		}
		for i := 1; i < span; i++ {
			if state(n+i) != entryWritten {
				return nil, fmt.Errorf("the state of entry %d at 0x%x", n+i, at)
			}
			if keys != nil {
				keys.decrypt(e[i*entrySize:(i+1)*entrySize], at+entriesAt+(n+i)*entrySize)
			}
		}
		it, err := parseItem(e[:span*entrySize])
		if err != nil {
			return nil, fmt.Errorf("entry %d at 0x%x: %w", n, at, err)
		}
		items = append(items, it)
		n += span
	}
	// Entries are written one after the other, so there is nothing behind the first empty one.
	if !isBlank(p[entriesAt+n*entrySize:]) {
		return nil, fmt.Errorf("octets behind the entries at 0x%x", at)
	}
	for ; n < pageEntries+2; n++ {
		if state(n) != entryEmpty {
			return nil, fmt.Errorf("the state of entry %d at 0x%x", n, at)
		}
	}
	return items, nil
}

// parseItem reads the entries of one span.
func parseItem(e []byte) (item, error) {
	name, rest, _ := bytes.Cut(e[8:24], []byte{0})
	it := item{ns: e[0], typ: e[1], chunk: e[3], key: string(name), data: le.Uint64(e[24:])}
	if len(bytes.Trim(rest, "\x00")) > 0 {
		return item{}, errors.New("a key with octets behind its end")
	}
	if err := checkName(it.key); err != nil {
		return item{}, fmt.Errorf("the key %w", err)
	}
	reserved, whole := true, it.chunk == noChunk
	n := 0 // octets behind the header
	switch it.typ {
	case typeU8, typeI8, typeU16, typeI16, typeU32, typeI32, typeU64, typeI64:
		unused := pad(it.typ & 0xF)
		reserved = it.data&unused == unused
	case typeString, typeBlobData:
		n = int(it.data & 0xFFFF)
		reserved = it.data>>16&0xFFFF == 0xFFFF
	case typeBlobIndex:
		reserved = it.data>>48 == 0xFFFF
	default:
		return item{}, fmt.Errorf("an item of type 0x%02x", it.typ)
	}
	if it.typ == typeBlobData {
		whole = it.chunk&0x7F < maxChunks
	}
	if !reserved || !whole || len(e) != (1+entriesFor(n))*entrySize {
		return item{}, errors.New("an item that contradicts its type")
	}
	if it.ns > maxNamespaces || it.ns == 0 && (it.typ != typeU8 || it.number() == 0 || it.number() > maxNamespaces) {
		return item{}, errors.New("a namespace without a number of its own")
	}
	it.octets = e[entrySize : entrySize+n]
	if it.typ != typeString && it.typ != typeBlobData {
		return it, nil
	}
	if uint32(it.data>>32) != checksum(it.octets) || !isBlank(e[entrySize+n:]) {
		return item{}, errors.New("the checksum of its octets, or what is behind them")
	}
	if it.typ == typeString && bytes.IndexByte(it.octets, 0) != n-1 {
		return item{}, errors.New("a string that NUL does not end")
	}
	return it, nil
}

// number is the value of an item of type U8.
func (it *item) number() byte { return byte(it.data) }

// assemble holds the items against each other.
func assemble(items []item) ([]Entry, error) {
	var names [maxNamespaces + 1]string
	var used [maxNamespaces + 1]bool
	type part struct {
		id    id
		chunk byte
	}
	chunks := map[part][]byte{}
	known := make(map[id]bool, len(items))
	count := 0
	for i := range items {
		it := &items[i]
		key := newID(it.ns, it.key)
		if it.typ == typeBlobData {
			p := part{key, it.chunk}
			if _, twice := chunks[p]; twice {
				return nil, fmt.Errorf("key %q has a chunk twice", it.key)
			}
			chunks[p] = it.octets
			continue
		}
		if known[key] {
			return nil, fmt.Errorf("key %q is there twice", it.key)
		}
		known[key] = true
		used[it.ns] = true
		if it.ns == 0 {
			if names[it.number()] != "" {
				return nil, fmt.Errorf("two namespaces of number %d", it.number())
			}
			names[it.number()] = it.key
		}
		count++
	}
	entries := make([]Entry, 0, count)
	for i := range items {
		it := &items[i]
		e := Entry{Namespace: names[it.ns], Key: it.key}
		switch {
		case it.typ == typeBlobData:
			continue
		case it.ns == 0:
			if !used[it.number()] {
				entries = append(entries, Entry{Namespace: it.key})
			}
			continue
		case e.Namespace == "":
			return nil, fmt.Errorf("key %q is in no namespace", it.key)
		}
		switch it.typ {
		case typeU8:
			e.Value = uint8(it.data)
		case typeI8:
			e.Value = int8(it.data)
		case typeU16:
			e.Value = uint16(it.data)
		case typeI16:
			e.Value = int16(it.data)
		case typeU32:
			e.Value = uint32(it.data)
		case typeI32:
			e.Value = int32(it.data)
		case typeU64:
			e.Value = it.data
		case typeI64:
			e.Value = int64(it.data)
		case typeString:
			e.Value = string(it.octets[:len(it.octets)-1])
		case typeBlobIndex:
			blob, p := []byte{}, part{newID(it.ns, it.key), byte(it.data >> 40)}
			n := byte(it.data >> 32)
			if n == 0 || n > maxChunks || p.chunk&0x7F != 0 {
				return nil, fmt.Errorf("key %q has an index of no chunks", it.key)
			}
			for range n {
				octets, ok := chunks[p]
				if !ok {
					return nil, fmt.Errorf("key %q lacks a chunk", it.key)
				}
				delete(chunks, p)
				blob = append(blob, octets...)
				p.chunk++
			}
			if uint64(len(blob)) != it.data&0xFFFFFFFF {
				return nil, fmt.Errorf("key %q has %d octets, and an index that says otherwise", it.key, len(blob))
			}
			e.Value = blob
		}
		entries = append(entries, e)
	}
	if len(chunks) > 0 {
		return nil, errors.New("a chunk without an index")
	}
	return entries, nil
}
