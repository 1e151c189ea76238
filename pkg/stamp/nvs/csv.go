package nvs

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/sha1"
	"encoding/base64"
	"encoding/csv"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// FromCSV reads the input of Espressif's nvs_partition_gen.py: lines of key,type,encoding,value below a line that says so,
// without those that begin with "#". Types are namespace, data and file; encodings u8, i8, u16, i16, u32, i32, u64, i64,
// string, hex2bin, base64 and binary. Files are taken from files, whose root stands for the directory that the generator
// runs in; without it, lines of type file are errors. All of the input is bounded by [MaxSize], and so are the files together.
//
// What the generator makes of a line, [Build] makes of its entries, also of Wi-Fi settings (sta.ssid, sta.pswd, ap.ssid,
// ap.passwd, ap.authmode), to which the generator adds entries of its own. What it does not read as it looks is an error here:
// a namespace that is come back to, whose entries it puts into the latest one; text that is not ASCII as binary data, whose
// length it takes wrongly; a line within a quoted value that begins with "#". Its fill encodings are not supported. Errors
// name the line, never a value.
func FromCSV(r io.Reader, files fs.FS) ([]Entry, error) {
	entries, err := fromCSV(r, files)
	if err != nil {
		return nil, fmt.Errorf("reading NVS entries from CSV: %w", err)
	}
	return entries, nil
}

var header = []string{"key", "type", "encoding", "value"}

func fromCSV(r io.Reader, files fs.FS) ([]Entry, error) {
	text, err := io.ReadAll(io.LimitReader(r, MaxSize+1))
	if err != nil {
		return nil, err
	}
	if len(text) > MaxSize {
		return nil, fmt.Errorf("more than %d octets", MaxSize)
	}
	if !utf8.Valid(text) || bytes.IndexByte(text, 0) >= 0 || bytes.Count(text, []byte("\r")) != bytes.Count(text, []byte("\r\n")) {
		return nil, errors.New("not lines of UTF-8")
	}
	rows := csv.NewReader(bytes.NewReader(text))
	rows.Comment, rows.FieldsPerRecord = '#', len(header)
	first, err := rows.Read()
	if err != nil && err != io.EOF {
		return nil, err
	}
	if !slices.Equal(first, header) {
		return nil, fmt.Errorf("the first line is not %s", strings.Join(header, ","))
	}
	c := csvReader{files: files, left: MaxSize, known: map[string]bool{}}
	for {
		row, err := rows.Read()
		if err == io.EOF {
			c.declare()
			return c.entries, nil
		}
		if err != nil {
			return nil, err
		}
		if err := c.row(row[0], row[1], row[2], row[3]); err != nil {
			line, _ := rows.FieldPos(0)
			return nil, fmt.Errorf("line %d: key %q: %w", line, row[0], err)
		}
	}
}

type csvReader struct {
	files     fs.FS
	left      int64 // octets that files may still have
	entries   []Entry
	namespace string
	empty     bool // the namespace has no entries yet
	known     map[string]bool

	ssid, password, authMode string // of the access point
	ap, station              bool   // the generator's own entries are written
}

// declare keeps a namespace that no entry declares.
func (c *csvReader) declare() {
	if c.empty {
		c.entries = append(c.entries, Entry{Namespace: c.namespace})
	}
}

func (c *csvReader) row(key, typ, encoding, value string) error {
	if strings.Contains(value, "\n#") {
		return errors.New("a line in the value begins with #")
	}
	switch typ {
	case "namespace":
		if encoding != "" || value != "" {
			return errors.New("a namespace with an encoding or value")
		}
		if c.known[key] {
			return errors.New("the namespace is there already")
		}
		c.known[key] = true
		c.declare()
		c.namespace, c.empty = key, true
		return (&Entry{Namespace: key}).check()
	case "data", "file":
	default:
		return errors.New("the type is none of namespace, data, file")
	}
	if c.namespace == "" {
		return errors.New("before any namespace")
	}
	wifi := slices.Contains([]string{"sta.ssid", "sta.pswd", "ap.ssid", "ap.passwd", "ap.authmode"}, key)
	text := value
	if typ == "file" {
		if wifi {
			return errors.New("the generator does not read this one from a file")
		}
		data, err := c.file(value)
		if err != nil {
			return err
		}
		text = string(data)
	}
	v, err := decode(encoding, text, typ == "file")
	if err != nil {
		return err
	}
	if wifi && key[0] == 'a' {
		if err := c.accessPoint(key, value); err != nil {
			return err
		}
	}
	if err := c.add(key, v); err != nil {
		return err
	}
	if wifi && key[0] == 's' && !c.station {
		c.station = true
		return errors.Join(c.add("sta.apinfo", bytes.Repeat([]byte{0xFF}, 140)), c.add("sta.pmk", make([]byte, 32)), c.add("sta.apsw", make([]byte, 2)))
	}
	return nil
}

func (c *csvReader) add(key string, v any) error {
	e := Entry{c.namespace, key, v}
	c.entries, c.empty = append(c.entries, e), false
	return e.check()
}

// accessPoint adds the access point's pairwise master key (IEEE 802.11-2020, J.4.1) when the last of what it is made from
// comes.
func (c *csvReader) accessPoint(key, value string) error {
	switch {
	case key == "ap.ssid":
		c.ssid = value
	case key == "ap.passwd":
		c.password = value
	case value != "0": // which is an open network
		c.authMode = value
	}
	if c.ssid == "" || c.password == "" || c.authMode == "" {
		return nil
	}
	if c.ap {
		return errors.New("a second access point")
	}
	c.ap = true
	pmk, err := pbkdf2.Key(sha1.New, c.password, []byte(c.ssid), 4096, 32)
	if err != nil {
		return err
	}
	return c.add("ap.pmk_info", append(make([]byte, 100), pmk...))
}

// file reads a file that a line names.
func (c *csvReader) file(name string) ([]byte, error) {
	if c.files == nil {
		return nil, errors.New("a file, and none are to be read")
	}
	name = path.Clean(name)
	// Asked for before it is opened: opening a named pipe may wait for ever.
	if info, err := fs.Stat(c.files, name); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", name)
	}
	f, err := c.files.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, c.left+1))
	if err != nil {
		return nil, err
	}
	if c.left -= int64(len(data)); c.left < 0 {
		return nil, fmt.Errorf("files of more than %d octets", MaxSize)
	}
	return data, nil
}

// decode makes a value of its text. The errors of what it calls would show the text.
func decode(encoding, text string, file bool) (any, error) {
	switch encoding {
	case "u8", "u16", "u32", "u64":
		bits, _ := strconv.Atoi(encoding[1:])
		n, err := strconv.ParseUint(strings.TrimSpace(text), 10, bits)
		if err != nil {
			return nil, fmt.Errorf("not a decimal number from 0 to 2^%d-1", bits)
		}
		switch bits {
		case 8:
			return uint8(n), nil
		case 16:
			return uint16(n), nil
		case 32:
			return uint32(n), nil
		}
		return n, nil
	case "i8", "i16", "i32", "i64":
		bits, _ := strconv.Atoi(encoding[1:])
		n, err := strconv.ParseInt(strings.TrimSpace(text), 10, bits)
		if err != nil {
			return nil, fmt.Errorf("not a decimal number from -2^%d to 2^%[1]d-1", bits-1)
		}
		switch bits {
		case 8:
			return int8(n), nil
		case 16:
			return int16(n), nil
		case 32:
			return int32(n), nil
		}
		return n, nil
	case "string":
		if !utf8.ValidString(text) {
			return nil, errors.New("not UTF-8")
		}
		return text, nil
	case "hex2bin":
		if b, err := hex.DecodeString(strings.TrimSpace(text)); err == nil {
			return b, nil
		}
		return nil, errors.New("not hexadecimal")
	case "base64":
		if b, err := base64.StdEncoding.Strict().DecodeString(text); err == nil {
			return b, nil
		}
		return nil, errors.New("not base64")
	case "binary":
		if !file && strings.IndexFunc(text, func(r rune) bool { return r > '~' }) >= 0 {
			return nil, errors.New("not ASCII")
		}
		return []byte(text), nil
	}
	return nil, fmt.Errorf("encoding %q is not supported", encoding)
}
