package order

import (
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
)

// Serials says which serials an order or a lease has. What is set must hold together; nothing set means any.
type Serials struct {
	// Pattern is a picture of a serial: "#" stands for a digit, "@" for an upper-case letter, "\" makes the next character stand for itself.
	Pattern string `json:"pattern,omitempty"`
	// From and To bound a range, both inside it: serials of one length that differ in their last digits, such as SN00001 and SN05000.
	From string `json:"from,omitempty"`
	To   string `json:"to,omitempty"`
	// List names each.
	List []string `json:"list,omitempty"`

	index map[string]struct{} // of List, once checked or indexed
}

const maxSerial = 128

func (s *Serials) check() error {
	if len(s.Pattern) > 2*maxSerial || strings.HasSuffix(strings.ReplaceAll(s.Pattern, `\\`, ""), `\`) {
		return fmt.Errorf("serial pattern %.60q", s.Pattern)
	}
	if (s.From == "") != (s.To == "") {
		return errors.New("a range of serials needs from and to")
	}
	if s.From != "" {
		if _, _, ok := s.bounds(); !ok {
			return fmt.Errorf("serials from %.60q to %.60q: want one length, and a difference in the last digits only", s.From, s.To)
		}
		if s.List != nil {
			return errors.New("serials come as a range or as a list")
		}
	}
	s.Index()
	for _, serial := range s.List {
		if serial == "" || len(serial) > maxSerial {
			return fmt.Errorf("serial %.60q in the list", serial)
		}
	}
	if len(s.index) != len(s.List) {
		return errors.New("a serial is in the list twice")
	}
	return nil
}

// maxDigits bounds the counting part of a range, so that it fits an int64.
const maxDigits = 18

// bounds returns the numbers that a range counts from and to, behind what all its serials begin with.
func (s *Serials) bounds() (prefix string, n [2]int64, ok bool) {
	if len(s.From) != len(s.To) || len(s.From) > maxSerial || s.From > s.To {
		return "", n, false
	}
	i := 0
	for i < len(s.From) && s.From[i] == s.To[i] {
		i++
	}
	for i > 0 && len(s.From)-i < maxDigits && isDigit(s.From[i-1]) {
		i-- // SN00009 and SN00010 count in all their digits
	}
	digits := s.From[i:] + s.To[i:]
	if len(s.From)-i > maxDigits || len(digits) == 0 || strings.Trim(digits, "0123456789") != "" {
		return "", n, false
	}
	for k, text := range []string{s.From[i:], s.To[i:]} {
		v, _ := new(big.Int).SetString(text, 10)
		n[k] = v.Int64()
	}
	return s.From[:i], n, true
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

// Has reports whether a serial is one of them.
func (s *Serials) Has(serial string) bool {
	if serial == "" || len(serial) > maxSerial || s.Pattern != "" && !matches(s.Pattern, serial) {
		return false
	}
	if s.From != "" {
		prefix, _, ok := s.bounds()
		if !ok || len(serial) != len(s.From) || serial[:len(prefix)] != prefix || serial < s.From || serial > s.To || strings.Trim(serial[len(prefix):], "0123456789") != "" {
			return false
		}
	}
	if s.List == nil {
		return true
	}
	if s.index == nil { // neither checked nor indexed: a value made by hand
		return slices.Contains(s.List, serial)
	}
	_, ok := s.index[serial]
	return ok
}

// Index makes Has of a list as quick as a map: for a value that is asked often and was not verified here.
func (s *Serials) Index() {
	s.index = make(map[string]struct{}, len(s.List))
	for _, serial := range s.List {
		s.index[serial] = struct{}{}
	}
}

func matches(pattern, serial string) bool {
	for len(pattern) > 0 {
		if serial == "" {
			return false
		}
		c := serial[0]
		switch p := pattern[0]; {
		case p == '#' && !isDigit(c), p == '@' && (c < 'A' || c > 'Z'):
			return false
		case p == '#', p == '@':
		case p == '\\' && len(pattern) > 1:
			pattern = pattern[1:]
			if c != pattern[0] {
				return false
			}
		case p != c:
			return false
		}
		pattern, serial = pattern[1:], serial[1:]
	}
	return serial == ""
}

// Count returns how many serials there are, where a range or a list says so.
func (s *Serials) Count() (n int64, counted bool) {
	if _, b, ok := s.bounds(); s.From != "" && ok {
		return b[1] - b[0] + 1, true
	}
	return int64(len(s.List)), s.List != nil
}

// All yields the serials of a range or a list, in order.
func (s *Serials) All(yield func(string) bool) {
	if prefix, b, ok := s.bounds(); s.From != "" && ok {
		width := len(s.From) - len(prefix)
		for n := b[0]; n <= b[1]; n++ {
			if !yield(fmt.Sprintf("%s%0*d", prefix, width, n)) {
				return
			}
		}
		return
	}
	for _, serial := range s.List {
		if !yield(serial) {
			return
		}
	}
}

// Cut returns a part of s with n serials, none of which is taken: the next block of a range, or the next ones of a list. Where s
// is a pattern alone the part has the pattern, and nothing says that two parts differ: the service finds that out.
func (s *Serials) Cut(n int64, taken func(serial string) (bool, error)) (Serials, error) {
	if _, counted := s.Count(); !counted {
		return Serials{Pattern: s.Pattern}, nil
	}
	var block []string
	for serial := range s.All {
		if s.Pattern != "" && !matches(s.Pattern, serial) {
			continue
		}
		t, err := taken(serial)
		if err != nil {
			return Serials{}, err
		}
		if t {
			if s.From != "" {
				block = block[:0]
			}
			continue
		}
		if block = append(block, serial); int64(len(block)) == n {
			if s.From != "" {
				return Serials{Pattern: s.Pattern, From: block[0], To: block[n-1]}, nil
			}
			return Serials{List: block}, nil
		}
	}
	return Serials{}, fmt.Errorf("no %d serials together are left", n)
}
