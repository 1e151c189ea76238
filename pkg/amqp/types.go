package amqp

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"unicode/utf8"
)

// Types that Go has no own for (part 1, §1.6).
type (
	// A Symbol is a name of ASCII characters.
	Symbol string
	// A Char is a Unicode character.
	Char rune
	// A Timestamp is in milliseconds since 1970, UTC.
	Timestamp int64
	// A UUID is RFC 9562's.
	UUID [16]byte
	// Decimals are IEEE 754's, as on the wire.
	Decimal32  [4]byte
	Decimal64  [8]byte
	Decimal128 [16]byte
	// A Map is in the order of the wire; its keys differ.
	Map []Pair
)

// A Pair is an entry of a map.
type Pair struct{ Key, Value any }

// Get returns the value of a key, or nil. The key must be of a type that can be compared.
func (m Map) Get(key any) any {
	for _, p := range m {
		switch p.Key.(type) {
		case string, Symbol:
			if p.Key == key {
				return p.Value
			}
		}
	}
	return nil
}

// An Array is a sequence of values of one type.
type Array struct {
	// Code is the constructor of each item as it was, or is to be, on the wire. Array items of a described type have the
	// descriptor beside it.
	Code       byte
	Descriptor any
	Items      []any
}

// Symbols returns an array of symbols, as SASL mechanisms are announced.
func Symbols(s ...Symbol) *Array {
	a := &Array{Code: 0xb3}
	for _, x := range s {
		a.Items = append(a.Items, x)
	}
	return a
}

// A Described is a value with a descriptor that is not known here.
type Described struct{ Descriptor, Value any }

// Bounds of what is decoded at once.
const (
	maxDepth  = 12
	maxValues = 1024
)

// Decode reads one value and returns what is behind it.
func Decode(b []byte) (v any, rest []byte, err error) {
	d := decoder{b: b, left: maxValues}
	v, err = d.value(maxDepth)
	return v, d.b, err
}

type decoder struct {
	b    []byte
	left int // values that may still come
}

func (d *decoder) take(n uint32) ([]byte, error) {
	if uint64(n) > uint64(len(d.b)) {
		return nil, malformed("%d octets announced, %d there", n, len(d.b))
	}
	v := d.b[:n:n]
	d.b = d.b[n:]
	return v, nil
}

// size reads a size or a count, of one octet or four.
func (d *decoder) size(wide bool) (uint32, error) {
	if wide {
		b, err := d.take(4)
		if err != nil {
			return 0, err
		}
		return binary.BigEndian.Uint32(b), nil
	}
	b, err := d.take(1)
	if err != nil {
		return 0, err
	}
	return uint32(b[0]), nil
}

func (d *decoder) value(depth int) (any, error) {
	code, err := d.size(false)
	if err != nil {
		return nil, err
	}
	if code != 0 {
		return d.body(byte(code), depth)
	}
	if depth--; depth < 0 {
		return nil, fmt.Errorf("%w: values are nested too deep", ErrTooLarge)
	}
	descriptor, err := d.value(depth)
	if err != nil {
		return nil, err
	}
	v, err := d.value(depth)
	if err != nil {
		return nil, err
	}
	return describe(descriptor, v)
}

// width is how a constructor says how many octets its value has (part 1, §1.2): by the high half of the code.
var width = [16]byte{4: 0, 5: 1, 6: 2, 7: 4, 8: 8, 9: 16}

// body reads the value of a primitive constructor.
func (d *decoder) body(code byte, depth int) (v any, err error) {
	if d.left--; d.left < 0 {
		return nil, fmt.Errorf("%w: more than %d values", ErrTooLarge, maxValues)
	}
	class := code >> 4
	wide := class&1 == 1
	var n uint32
	switch {
	case class < 4:
		return nil, malformed("constructor %#x", code)
	case class < 10:
		n = uint32(width[class])
	default:
		if n, err = d.size(wide); err != nil {
			return nil, err
		}
	}
	b, err := d.take(n)
	if err != nil {
		return nil, err
	}
	if class >= 12 {
		if depth--; depth < 0 {
			return nil, fmt.Errorf("%w: values are nested too deep", ErrTooLarge)
		}
		rest := d.b
		d.b = b
		if v, err = d.compound(code, wide, depth); err == nil && len(d.b) > 0 {
			err = malformed("%d octets too many in constructor %#x", len(d.b), code)
		}
		d.b = rest
		return v, err
	}
	switch code {
	case 0x40:
		return nil, nil
	case 0x41:
		return true, nil
	case 0x42:
		return false, nil
	case 0x43:
		return uint32(0), nil
	case 0x44:
		return uint64(0), nil
	case 0x45:
		return []any{}, nil
	case 0x50:
		return b[0], nil
	case 0x51:
		return int8(b[0]), nil
	case 0x52:
		return uint32(b[0]), nil
	case 0x53:
		return uint64(b[0]), nil
	case 0x54:
		return int32(int8(b[0])), nil
	case 0x55:
		return int64(int8(b[0])), nil
	case 0x56:
		if b[0] > 1 {
			return nil, malformed("boolean %d", b[0])
		}
		return b[0] == 1, nil
	case 0x60:
		return binary.BigEndian.Uint16(b), nil
	case 0x61:
		return int16(binary.BigEndian.Uint16(b)), nil
	case 0x70:
		return binary.BigEndian.Uint32(b), nil
	case 0x71:
		return int32(binary.BigEndian.Uint32(b)), nil
	case 0x72:
		return math.Float32frombits(binary.BigEndian.Uint32(b)), nil
	case 0x73:
		c := binary.BigEndian.Uint32(b)
		if c > utf8.MaxRune || !utf8.ValidRune(rune(c)) {
			return nil, malformed("character %#x", c)
		}
		return Char(c), nil
	case 0x74:
		return Decimal32(b), nil
	case 0x80:
		return binary.BigEndian.Uint64(b), nil
	case 0x81:
		return int64(binary.BigEndian.Uint64(b)), nil
	case 0x82:
		return math.Float64frombits(binary.BigEndian.Uint64(b)), nil
	case 0x83:
		return Timestamp(binary.BigEndian.Uint64(b)), nil
	case 0x84:
		return Decimal64(b), nil
	case 0x94:
		return Decimal128(b), nil
	case 0x98:
		return UUID(b), nil
	case 0xa0, 0xb0:
		return b, nil
	case 0xa1, 0xb1:
		if !utf8.Valid(b) {
			return nil, malformed("string that is not UTF-8")
		}
		return string(b), nil
	case 0xa3, 0xb3:
		for _, c := range b {
			if c > 0x7f {
				return nil, malformed("symbol that is not ASCII")
			}
		}
		return Symbol(b), nil
	}
	return nil, malformed("constructor %#x", code)
}

// compound reads a list, a map or an array, whose octets are all that is left.
func (d *decoder) compound(code byte, wide bool, depth int) (any, error) {
	n, err := d.size(wide)
	if err != nil {
		return nil, err
	}
	if uint64(n) > uint64(len(d.b)) { // every item has an octet at least; in an array see below
		return nil, malformed("%d items in %d octets", n, len(d.b))
	}
	if int(n) > d.left {
		return nil, fmt.Errorf("%w: more than %d values", ErrTooLarge, maxValues)
	}
	switch code {
	case 0xc0, 0xd0:
		return d.items(n, func() (any, error) { return d.value(depth) })
	case 0xc1, 0xd1:
		return d.pairs(n, depth)
	case 0xe0, 0xf0:
		return d.array(n, depth)
	}
	return nil, malformed("constructor %#x", code)
}

func (d *decoder) items(n uint32, next func() (any, error)) ([]any, error) {
	items := make([]any, n)
	for i := range items {
		var err error
		if items[i], err = next(); err != nil {
			return nil, err
		}
	}
	return items, nil
}

func (d *decoder) pairs(n uint32, depth int) (Map, error) {
	if n%2 != 0 {
		return nil, malformed("map of %d items", n)
	}
	m := make(Map, n/2)
	keys := make([][]byte, 0, n/2) // as they are on the wire, to be told apart
	for i := range m {
		at := d.b
		var err error
		if m[i].Key, err = d.value(depth); err != nil {
			return nil, err
		}
		key := at[:len(at)-len(d.b)]
		for _, k := range keys {
			if bytes.Equal(k, key) {
				return nil, malformed("a map has a key twice")
			}
		}
		keys = append(keys, key)
		if m[i].Value, err = d.value(depth); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (d *decoder) array(n uint32, depth int) (any, error) {
	a := &Array{}
	code, err := d.size(false)
	if err == nil && code == 0 {
		if a.Descriptor, err = d.value(depth); err == nil {
			code, err = d.size(false)
		}
	}
	if err != nil {
		return nil, err
	}
	a.Code = byte(code)
	// A constructor without octets of its own could stand for any number of items.
	if a.Code>>4 <= 4 || uint64(n) > uint64(len(d.b)) {
		return nil, malformed("array of %d items of constructor %#x", n, a.Code)
	}
	a.Items, err = d.items(n, func() (any, error) { return d.body(a.Code, depth) })
	return a, err
}

// Append appends a value in its shortest form. The value is of a type that [Decode] returns.
func Append(b []byte, v any) []byte {
	switch v := v.(type) {
	case *Described:
		return Append(Append(append(b, 0), v.Descriptor), v.Value)
	case composite:
		return Append(Append(append(b, 0), v.code()), listOf(v))
	}
	code, start := constructor(v), len(b)
	b = appendBody(append(b, code), code, v)
	if head := b[start:]; code >= 0xd0 && len(head) <= 3+252 && head[8] == byte(binary.BigEndian.Uint32(head[5:])) {
		// As short as it can be: sizes of one octet instead of four.
		head[0], head[1], head[2] = code&^0x10, byte(len(head)-8), head[8]
		b = b[:start+3+copy(head[3:], head[9:])]
	}
	return b
}

// constructor returns the shortest constructor of a value; that of a list, a map and an array is the wide one.
func constructor(v any) byte {
	switch v := v.(type) {
	case nil:
		return 0x40
	case bool:
		if v {
			return 0x41
		}
		return 0x42
	case uint8:
		return 0x50
	case int8:
		return 0x51
	case uint16:
		return 0x60
	case int16:
		return 0x61
	case uint32:
		return shorter(v == 0, 0x43, v < 256, 0x52, 0x70)
	case int32:
		return shorter(false, 0, int32(int8(v)) == v, 0x54, 0x71)
	case float32:
		return 0x72
	case Char:
		return 0x73
	case Decimal32:
		return 0x74
	case uint64:
		return shorter(v == 0, 0x44, v < 256, 0x53, 0x80)
	case int64:
		return shorter(false, 0, int64(int8(v)) == v, 0x55, 0x81)
	case float64:
		return 0x82
	case Timestamp:
		return 0x83
	case Decimal64:
		return 0x84
	case Decimal128:
		return 0x94
	case UUID:
		return 0x98
	case []byte:
		return shorter(false, 0, len(v) < 256, 0xa0, 0xb0)
	case string:
		return shorter(false, 0, len(v) < 256, 0xa1, 0xb1)
	case Symbol:
		return shorter(false, 0, len(v) < 256, 0xa3, 0xb3)
	case []any:
		return shorter(len(v) == 0, 0x45, false, 0, 0xd0)
	case Map:
		return 0xd1
	case *Array:
		return 0xf0
	}
	panic(fmt.Sprintf("amqp: %T is no AMQP type", v))
}

func shorter(zero bool, none byte, small bool, short, long byte) byte {
	switch {
	case zero:
		return none
	case small:
		return short
	}
	return long
}

// appendBody appends what stands behind a constructor.
func appendBody(b []byte, code byte, v any) []byte {
	class := code >> 4
	wide := class&1 == 1
	switch {
	case class < 9:
		n := bits(v)
		for i := width[class]; i > 0; i-- {
			b = append(b, byte(n>>(8*(i-1))))
		}
		return b
	case class == 9:
		switch v := v.(type) {
		case UUID:
			return append(b, v[:]...)
		case Decimal128:
			return append(b, v[:]...)
		}
	case class < 12:
		switch v := v.(type) {
		case []byte:
			return append(appendSize(b, wide, len(v)), v...)
		case string:
			return append(appendSize(b, wide, len(v)), v...)
		case Symbol:
			return append(appendSize(b, wide, len(v)), v...)
		}
	default:
		start := len(b)
		b = appendSize(appendSize(b, wide, 0), wide, 0)
		count := 0
		switch v := v.(type) {
		case []any:
			for _, x := range v {
				b = Append(b, x)
			}
			count = len(v)
		case Map:
			for _, p := range v {
				b = Append(Append(b, p.Key), p.Value)
			}
			count = 2 * len(v)
		case *Array:
			if v.Descriptor != nil {
				b = Append(append(b, 0), v.Descriptor)
			}
			b = append(b, v.Code)
			for _, x := range v.Items {
				b = appendBody(b, v.Code, x)
			}
			count = len(v.Items)
		default:
			panic(fmt.Sprintf("amqp: %T is no item of constructor %#x", v, code))
		}
		if wide {
			binary.BigEndian.PutUint32(b[start:], uint32(len(b)-start-4))
			binary.BigEndian.PutUint32(b[start+4:], uint32(count))
		} else {
			b[start], b[start+1] = byte(len(b)-start-1), byte(count)
		}
		return b
	}
	panic(fmt.Sprintf("amqp: %T is no item of constructor %#x", v, code))
}

func appendSize(b []byte, wide bool, n int) []byte {
	if wide {
		return binary.BigEndian.AppendUint32(b, uint32(n))
	}
	return append(b, byte(n))
}

// bits returns a value of at most eight octets as a number.
func bits(v any) uint64 {
	switch v := v.(type) {
	case bool:
		if v {
			return 1
		}
	case uint8:
		return uint64(v)
	case int8:
		return uint64(v)
	case uint16:
		return uint64(v)
	case int16:
		return uint64(v)
	case uint32:
		return uint64(v)
	case int32:
		return uint64(v)
	case float32:
		return uint64(math.Float32bits(v))
	case Char:
		return uint64(v)
	case Decimal32:
		return uint64(binary.BigEndian.Uint32(v[:]))
	case uint64:
		return v
	case int64:
		return uint64(v)
	case float64:
		return math.Float64bits(v)
	case Timestamp:
		return uint64(v)
	case Decimal64:
		return binary.BigEndian.Uint64(v[:])
	}
	return 0 // null, and the empty list
}
