package emulate

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// MaxEnrollments is how long a file of enrollments may be, in octets.
const MaxEnrollments = 16 << 20

// An Enrollment is an individual enrollment or an enrollment group from a file.
type Enrollment struct {
	Kind registration.Kind
	ID   string
	// Document is the wire form, for [registration.Service.PutEnrollment].
	Document []byte
	// Line is where it begins, from 1.
	Line int
}

// ParseEnrollments reads one enrollment, or an array of them, in the wire form of the service API; what has an
// enrollmentGroupId is a group. Members that the wire form has not are errors, and so are those that stand twice: a slip of
// the pen must not make an enrollment that lets nobody in. Errors name the line and the column.
func ParseEnrollments(b []byte) ([]Enrollment, error) {
	if len(b) > MaxEnrollments {
		return nil, fmt.Errorf("it has more than %d octets", MaxEnrollments)
	}
	var list []json.RawMessage
	first := bytes.IndexFunc(b, func(r rune) bool { return !strings.ContainsRune(" \t\r\n", r) })
	if first < 0 {
		return nil, errors.New("it is empty")
	}
	if !json.Valid(b) {
		var syntax *json.SyntaxError
		var v any
		if errors.As(json.Unmarshal(b, &v), &syntax) {
			return nil, at(b, int(syntax.Offset)-1, "%v", syntax)
		}
		return nil, errors.New("it is not JSON")
	}
	starts := []int{first}
	switch b[first] {
	case '{':
		list = []json.RawMessage{b[first:]}
	case '[':
		starts = nil
		d := json.NewDecoder(bytes.NewReader(b))
		if _, err := d.Token(); err != nil {
			return nil, err
		}
		for d.More() {
			var e json.RawMessage
			if err := d.Decode(&e); err != nil {
				return nil, err
			}
			list, starts = append(list, e), append(starts, int(d.InputOffset())-len(e))
		}
	default:
		return nil, at(b, first, "want an enrollment, or an array of enrollments")
	}
	out := make([]Enrollment, 0, len(list))
	for i, doc := range list {
		e, offset, err := parseEnrollment(doc)
		if err != nil {
			return nil, at(b, starts[i]+offset, "%v", err)
		}
		e.Line, _ = position(b, starts[i])
		out = append(out, e)
	}
	return out, nil
}

func parseEnrollment(doc []byte) (e Enrollment, offset int, err error) {
	var which struct {
		RegistrationID    *string `json:"registrationId"`
		EnrollmentGroupID *string `json:"enrollmentGroupId"`
	}
	_ = json.Unmarshal(doc, &which) // its faults come again below
	var v any
	switch {
	case which.RegistrationID != nil && which.EnrollmentGroupID != nil:
		return e, 0, errors.New("it has both registrationId and enrollmentGroupId")
	case which.RegistrationID != nil:
		e.Kind, e.ID, v = registration.Individual, *which.RegistrationID, &dps.IndividualEnrollment{}
	case which.EnrollmentGroupID != nil:
		e.Kind, e.ID, v = registration.Group, *which.EnrollmentGroupID, &dps.EnrollmentGroup{}
	default:
		return e, 0, errors.New("want an enrollment: an object with a registrationId or an enrollmentGroupId that is a string")
	}
	d := json.NewDecoder(bytes.NewReader(doc))
	if err := members(d, reflect.TypeOf(v), "enrollment"); err != nil {
		return e, int(d.InputOffset()) - 1, err
	}
	if err := json.Unmarshal(doc, v); err != nil {
		var wrong *json.UnmarshalTypeError
		if errors.As(err, &wrong) {
			return e, int(wrong.Offset) - 1, fmt.Errorf("%s cannot be a %s", strings.TrimPrefix(wrong.Field, "Enrollment."), wrong.Value)
		}
		return e, 0, err
	}
	e.Document = doc
	return e, 0, nil
}

var (
	jsonUnmarshaler = reflect.TypeFor[json.Unmarshaler]()
	textUnmarshaler = reflect.TypeFor[encoding.TextUnmarshaler]()
)

// members reads a value and says which member of it t has not, or which stands twice; the decoder stands behind it then. A
// nil type has any.
func members(d *json.Decoder, t reflect.Type, path string) error {
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t != nil && (t.Kind() == reflect.Interface || reflect.PointerTo(t).Implements(jsonUnmarshaler) || reflect.PointerTo(t).Implements(textUnmarshaler)) {
		t = nil
	}
	token, err := d.Token()
	if err != nil {
		return err
	}
	switch token {
	case json.Delim('{'):
		known := make(map[string]reflect.Type)
		object := t != nil && t.Kind() == reflect.Struct
		if object {
			fields(t, known)
		}
		seen := make(map[string]bool)
		for d.More() {
			token, err := d.Token()
			if err != nil {
				return err
			}
			name, _ := token.(string)
			if seen[name] {
				return fmt.Errorf("%s has %q twice", path, name)
			}
			seen[name] = true
			of, ok := known[name]
			if object && !ok {
				return fmt.Errorf("%s has no member %q", path, name)
			}
			if err := members(d, of, name); err != nil {
				return err
			}
		}
	case json.Delim('['):
		var of reflect.Type
		if t != nil && t.Kind() == reflect.Slice {
			of = t.Elem()
		}
		for d.More() {
			if err := members(d, of, path); err != nil {
				return err
			}
		}
	default:
		return nil
	}
	_, err = d.Token()
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return err
}

// fields collects the names that a struct has in JSON.
func fields(t reflect.Type, into map[string]reflect.Type) {
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case f.Anonymous && name == "":
			fields(f.Type, into)
		case name != "-" && name != "":
			into[name] = f.Type
		}
	}
}

func at(b []byte, offset int, format string, args ...any) error {
	line, column := position(b, offset)
	return fmt.Errorf("line %d, column %d: %s", line, column, fmt.Sprintf(format, args...))
}

// position returns the line and column of an offset, both from 1.
func position(b []byte, offset int) (line, column int) {
	b = b[:max(0, min(offset, len(b)))]
	return 1 + bytes.Count(b, []byte("\n")), len(b) - bytes.LastIndexByte(b, '\n')
}
