// Package ubootenv builds and parses the environment images that U-Boot keeps in flash, eMMC or EEPROM.
//
// An image is a CRC-32, a flag octet if the environment is stored twice, and data: "name=value" strings, each ended by a NUL,
// and one NUL more after the last. A [Layout] says what a board's U-Boot was built for. [Layout.Build] makes an image,
// [Layout.Parse] reads one, [Layout.ParsePair] reads the one of two that U-Boot would take.
//
// Functions are pure and may be called by many goroutines. An image has at most 1 MiB. The format is that of U-Boot's
// include/env_internal.h and env/common.c; there is no other specification.
package ubootenv

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
)

// Errors that callers branch on.
var (
	// ErrCRC says that an image's checksum is not that of its data: it is erased, cut off, or of another size or layout.
	ErrCRC = errors.New("the environment's CRC-32 does not match")
	// ErrFull says that the variables do not fit into the image.
	ErrFull = errors.New("the variables do not fit into the environment")
)

// maxSize bounds an image, in octets.
const maxSize = 1 << 20

// A Var is one variable of an environment.
type Var struct {
	// Name has printable ASCII characters without space and "=", and does not begin with "#".
	Name string
	// Value is what is stored, without NUL, and not empty: an empty value deletes a variable when U-Boot imports it. U-Boot
	// takes a backslash for the mark of an escaped character, fw_printenv does not: both read the same where there is none.
	Value string
}

// A Layout is how a board's U-Boot keeps its environment.
type Layout struct {
	// Size of an image in octets, CONFIG_ENV_SIZE: 16 to 1 MiB.
	Size int
	// Redundant says that there are two images, each with a flag octet (CONFIG_ENV_REDUNDANT).
	Redundant bool
	// BigEndian says that the CRC is stored with its highest octet first, as CPUs of that order have it.
	BigEndian bool
}

// header returns how many octets come before the data.
func (l Layout) header() (int, error) {
	if l.Size < 16 || l.Size > maxSize {
		return 0, fmt.Errorf("environment of %d octets: want 16 to %d", l.Size, maxSize)
	}
	if l.Redundant {
		return 5, nil
	}
	return 4, nil
}

func (l Layout) order() binary.ByteOrder {
	if l.BigEndian {
		return binary.BigEndian
	}
	return binary.LittleEndian
}

func (v Var) check() error {
	name := v.Name
	if len(name) > 64 {
		name = name[:64]
	}
	switch {
	case v.Name == "" || v.Name[0] == '#':
		return fmt.Errorf("variable %q: the name is empty or begins with #", name)
	case strings.ContainsFunc(v.Name, func(r rune) bool { return r <= ' ' || r > '~' || r == '=' }):
		return fmt.Errorf("variable %q: want a name of printable ASCII without space and =", name)
	case v.Value == "":
		return fmt.Errorf("variable %s has no value: U-Boot would delete it", name)
	case strings.Contains(v.Value, "\x00"):
		return fmt.Errorf("variable %s has a NUL in its value", name)
	}
	return nil
}

// Build makes an image of variables, in their order. Octets after the data are 0xff, as mkenvimage leaves them. The flag is
// the age of a redundant image, see [Layout.ParsePair]; mkenvimage writes 1. It is 0 in a layout that has none. A name that
// comes twice is an error; variables that do not fit are ErrFull.
func (l Layout) Build(vars []Var, flag byte) ([]byte, error) {
	header, err := l.header()
	if err != nil {
		return nil, err
	}
	if flag != 0 && !l.Redundant {
		return nil, fmt.Errorf("flag %d in an environment that is not redundant", flag)
	}
	image := make([]byte, header, l.Size)
	seen := make(map[string]bool, len(vars))
	for _, v := range vars {
		if err := v.check(); err != nil {
			return nil, err
		}
		if seen[v.Name] {
			return nil, fmt.Errorf("variable %s is there twice", v.Name)
		}
		seen[v.Name] = true
		if len(image)+len(v.Name)+len(v.Value)+3 > l.Size { // =, NUL, and the NUL after the last
			return nil, fmt.Errorf("environment of %d octets: %w", l.Size, ErrFull)
		}
		image = append(append(append(append(image, v.Name...), '='), v.Value...), 0)
	}
	image = append(image, 0)
	image = append(image, bytes.Repeat([]byte{0xff}, l.Size-len(image))...)
	l.order().PutUint32(image, crc32.ChecksumIEEE(image[header:]))
	if l.Redundant {
		image[4] = flag // outside the CRC, so that U-Boot can mark an image as old without writing it anew
	}
	return image, nil
}

// Parse reads an image of just the layout's size and returns its variables and its flag, 0 where there is none. A wrong
// checksum is ErrCRC. What Build would not make is an error: names that come twice, entries without a value. Octets after
// the data may be anything, since programs that change variables leave there what was there before.
func (l Layout) Parse(image []byte) (vars []Var, flag byte, err error) {
	header, err := l.header()
	if err != nil {
		return nil, 0, err
	}
	if len(image) != l.Size {
		return nil, 0, fmt.Errorf("an image of %d octets: want %d", len(image), l.Size)
	}
	if l.order().Uint32(image) != crc32.ChecksumIEEE(image[header:]) {
		return nil, 0, ErrCRC
	}
	if l.Redundant {
		flag = image[4]
	}
	seen := make(map[string]bool)
	for data := image[header:]; ; {
		entry, rest, ended := bytes.Cut(data, []byte{0})
		if !ended {
			return nil, 0, errors.New("the environment's data have no end")
		}
		if len(entry) == 0 {
			return vars, flag, nil
		}
		name, value, _ := strings.Cut(string(entry), "=")
		v := Var{name, value}
		if err := v.check(); err != nil {
			return nil, 0, err
		}
		if seen[name] {
			return nil, 0, fmt.Errorf("variable %s is there twice", name)
		}
		seen[name] = true
		vars, data = append(vars, v), rest
	}
}

// ParsePair reads the two images of a redundant environment and returns the variables, the index (0 or 1) and the flag of
// the one that counts. U-Boot (env_import_redund) takes the one whose CRC is right; of two, the one with the greater flag,
// where 0 is greater than 255, since flags count up and wrap; of two equal ones the first. The next image to write is the
// other one, with the flag one up. ErrCRC means that neither is right.
func (l Layout) ParsePair(first, second []byte) (vars []Var, index int, flag byte, err error) {
	if !l.Redundant {
		return nil, 0, 0, errors.New("a pair of images in a layout that is not redundant")
	}
	if len(first) != l.Size || len(second) != l.Size {
		return nil, 0, 0, fmt.Errorf("images of %d and %d octets: want %d each", len(first), len(second), l.Size)
	}
	vars, flag, err = l.Parse(first)
	other, otherFlag, otherErr := l.Parse(second)
	// Only the CRC chooses. U-Boot would load an image of the right CRC that we refuse, so that one is not passed over.
	switch {
	case errors.Is(err, ErrCRC) && errors.Is(otherErr, ErrCRC):
		return nil, 0, 0, err
	case errors.Is(otherErr, ErrCRC):
	case errors.Is(err, ErrCRC) || newer(second[4], first[4]):
		return other, 1, otherFlag, otherErr
	}
	return vars, 0, flag, err
}

// newer reports whether flag a is greater than flag b, as U-Boot compares them.
func newer(a, b byte) bool {
	switch {
	case a == 0 && b == 255:
		return true
	case a == 255 && b == 0:
		return false
	}
	return a > b
}
