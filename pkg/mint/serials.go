package mint

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/touchmark/touchmark/pkg/dps"
)

// A Row is one device to make: a line of the serial list.
type Row struct {
	Serial         string
	RegistrationID string
	// Line in the list, counted from 1 with the header.
	Line int
	// Fields holds the row's columns in the order of List.Columns.
	Fields []string
}

// A List is a whole serial list, checked.
type List struct {
	Columns []string
	Rows    []Row
	// Digest is the SHA-256 of the list's content, however it was quoted.
	Digest [32]byte
}

// Limits of a serial list.
const (
	maxListSize = 1 << 30
	maxFaults   = 20
	maxSerial   = 128
	maxColumns  = 64
)

// A ListError names what is wrong with a serial list: the first faults, each with its line.
type ListError struct {
	Faults []string
	More   int // how many are not listed
}

// Error returns the faults, one per line.
func (e *ListError) Error() string {
	s := strings.Join(e.Faults, "\n")
	if e.More > 0 {
		s += fmt.Sprintf("\n(and %d more)", e.More)
	}
	return s
}

func (e *ListError) add(format string, args ...any) {
	if len(e.Faults) == maxFaults {
		e.More++
		return
	}
	e.Faults = append(e.Faults, fmt.Sprintf(format, args...))
}

// ReadList reads a serial list for a profile: CSV (RFC 4180) with a header that has a column "serial". Every row is checked
// before any work starts: serials and registration IDs must be well formed and appear once. The name is for messages.
func ReadList(name string, r io.Reader, p *Profile) (*List, error) {
	limited := &io.LimitedReader{R: r, N: maxListSize + 1}
	in := bufio.NewReaderSize(limited, 64<<10)
	if bom, err := in.Peek(3); err == nil && bytes.Equal(bom, []byte("\xef\xbb\xbf")) {
		_, _ = in.Discard(3) // spreadsheets write a byte-order mark
	}
	c := csv.NewReader(in)
	c.ReuseRecord = true
	header, err := c.Read()
	if errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("serial list %s is empty: want a header line with a column \"serial\"", name)
	}
	if err != nil {
		return nil, readError(name, err)
	}
	list := &List{Columns: slices.Clone(header)}
	for i := range list.Columns {
		list.Columns[i] = strings.TrimSpace(list.Columns[i])
	}
	if err := checkHeader(name, list.Columns, p); err != nil {
		return nil, err
	}
	at := slices.Index(list.Columns, "serial")
	limit, what := dps.MaxRegistrationID, "registration ID"
	if p.Attestation == AttestationX509 {
		limit, what = dps.MaxCommonName, "common name of a certificate"
	}
	faults := &ListError{}
	serials, ids := make(map[string]int), make(map[string]int)
	digest := sha256.New()
	sum := func(fields []string) {
		var b []byte
		for _, f := range fields {
			b = append(binary.AppendUvarint(b, uint64(len(f))), f...)
		}
		digest.Write(binary.AppendUvarint(b, 1<<40)) // no field is that long: an end of line
	}
	sum(list.Columns)
	for {
		record, err := c.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			faults.add("%v", readError(name, err))
			return nil, faults
		}
		sum(record)
		line, _ := c.FieldPos(0)
		row := Row{Serial: record[at], Line: line, Fields: slices.Clone(record)}
		if err := CheckSerial(row.Serial); err != nil {
			_, column := c.FieldPos(at)
			faults.add("%s, line %d, column %d: %v", name, line, column, err)
			continue
		}
		if p.pattern == nil { // known once the device's TPM is asked
			if first, dup := serials[row.Serial]; dup {
				faults.add("%s, line %d: serial %s was first listed on line %d", name, line, row.Serial, first)
				continue
			}
			serials[row.Serial] = line
			list.Rows = append(list.Rows, row)
			continue
		}
		row.RegistrationID = p.pattern.Expand(list.values(record))
		if err := dps.CheckRegistrationID(row.RegistrationID); err != nil {
			faults.add("%s, line %d: serial %s: %v", name, line, row.Serial, err)
			continue
		}
		if len(row.RegistrationID) > limit {
			faults.add("%s, line %d: serial %s: registration ID %q has %d characters, a %s holds at most %d", name, line, row.Serial,
				row.RegistrationID, len(row.RegistrationID), what, limit)
			continue
		}
		if first, dup := serials[row.Serial]; dup {
			faults.add("%s, line %d: serial %s was first listed on line %d", name, line, row.Serial, first)
			continue
		}
		serials[row.Serial] = line
		folded := dps.Fold(row.RegistrationID)
		if first, dup := ids[folded]; dup {
			faults.add("%s, line %d: serial %s would get registration ID %s, which line %d has", name, line, row.Serial, row.RegistrationID, first)
			continue
		}
		ids[folded] = line
		list.Rows = append(list.Rows, row)
	}
	if limited.N <= 0 {
		return nil, fmt.Errorf("serial list %s is larger than %d octets", name, maxListSize)
	}
	if len(faults.Faults) > 0 {
		return nil, faults
	}
	if len(list.Rows) == 0 {
		return nil, fmt.Errorf("serial list %s has a header and no serials", name)
	}
	digest.Sum(list.Digest[:0])
	return list, nil
}

func checkHeader(name string, columns []string, p *Profile) error {
	if len(columns) > maxColumns {
		return fmt.Errorf("serial list %s has %d columns, at most %d are read", name, len(columns), maxColumns)
	}
	for i, c := range columns {
		if c == "" || slices.Index(columns, c) < i {
			return fmt.Errorf("serial list %s, line 1: column %d is called %q: names must be there and differ", name, i+1, c)
		}
	}
	for _, want := range p.columns() {
		if !slices.Contains(columns, want) {
			return fmt.Errorf("serial list %s, line 1: column %q is missing (columns are %q)", name, want, columns)
		}
	}
	return nil
}

// columns returns the columns that the profile needs.
func (p *Profile) columns() []string {
	need := []string{"serial"}
	for _, fields := range [][]string{p.pattern.Fields(), p.uri.Fields(), p.store.Fields(), p.csr.Fields(), p.csrCommand.Fields(), p.imageColumns()} {
		for _, f := range fields {
			if !slices.Contains(need, f) {
				need = append(need, f)
			}
		}
	}
	return need
}

// fields returns a row's fields by their columns' names.
func (l *List) fields(row *Row) map[string]string {
	m := make(map[string]string, len(l.Columns))
	for i, c := range l.Columns {
		m[c] = row.Fields[i]
	}
	return m
}

// values returns what patterns ask: a row's field by its column's name.
func (l *List) values(fields []string) func(column string) string {
	return func(column string) string { return fields[slices.Index(l.Columns, column)] }
}

// CheckSerial says what keeps s from being a serial.
func CheckSerial(s string) error {
	if s == "" || len(s) > maxSerial {
		return fmt.Errorf("serial %.40q: want 1 to %d characters", s, maxSerial)
	}
	for i := 0; i < len(s); i++ {
		if s[i] <= ' ' || s[i] >= 0x7f {
			return fmt.Errorf("serial %q: character %d is not a printable ASCII character other than space", s, i+1)
		}
	}
	return nil
}

func readError(name string, err error) error {
	var pe *csv.ParseError
	if errors.As(err, &pe) {
		return fmt.Errorf("serial list %s, line %d, column %d: %w", name, pe.Line, pe.Column, pe.Err)
	}
	return fmt.Errorf("reading serial list %s: %w", name, err)
}
