// Package query reads the queries of the service API where their text is to count: SELECT * FROM x WHERE …, over documents as
// JSON has them.
//
// [Parse] takes one form only and says what it does not understand; projections, functions and fields that are not named here
// are refused. A [Query] matches documents, and may be used by many goroutines. Text, depth and lists are bounded.
//
//	query    = "SELECT" "*" [ "FROM" name ] [ "WHERE" or ]
//	or       = and { "OR" and }
//	and      = not { "AND" not }
//	not      = [ "NOT" ] ( "(" or ")" | function | operand compare operand | operand [ "NOT" ] "IN" list )
//	function = "STARTSWITH" "(" field "," string ")" | "IS_DEFINED" "(" field ")"
//	compare  = "=" | "!=" | "<>" | "<" | "<=" | ">" | ">="
//	list     = "[" literal { "," literal } "]" | "(" literal { "," literal } ")" | field
//
// Words are read in any case. A literal is 'text' or "text" (a quote inside stands twice), a number, true, false or null. Fields
// are registrationId, enrollmentGroupId, deviceId, provisioningStatus, attestation.type, allocationPolicy, iotHubHostName,
// iotHubs, capabilities.iotEdge, status, substatus, assignedHub, etag, createdDateTimeUtc, lastUpdatedDateTimeUtc, and whatever
// stands below tags and desired, member by member; tags['a b'] is for names that are no words. Registration and group IDs compare
// in any case, times as times. A comparison with what a document has not is neither true nor false, as in SQL, and so is one
// between types; of iotHubs, one element is enough.
package query

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// A Query is a parsed query.
type Query struct {
	// From is the name that it is from, as it was written; empty for none.
	From  string
	where expr // nil: all
}

// All reports whether every document matches.
func (q *Query) All() bool { return q.where == nil }

// Match reports whether a document matches.
func (q *Query) Match(document []byte) (bool, error) {
	if q.where == nil {
		return true, nil
	}
	d := json.NewDecoder(bytes.NewReader(document))
	d.UseNumber()
	var doc map[string]any
	if err := d.Decode(&doc); err != nil {
		return false, err
	}
	return q.where(doc) == yes, nil
}

// truth has a third value, for what cannot be said of a document.
type truth int8

const (
	no truth = iota - 1
	unknown
	yes
)

func is(b bool) truth {
	if b {
		return yes
	}
	return no
}

type expr func(doc map[string]any) truth

// kind is how a field's values compare.
type kind uint8

const (
	plain  kind = iota
	folded      // texts in any case
	moment      // times
)

// A field is where a value stands in a document.
type field struct {
	path []string
	kind kind
}

var fields = map[string]field{
	"registrationid": {[]string{"registrationId"}, folded}, "enrollmentgroupid": {[]string{"enrollmentGroupId"}, folded},
	"deviceid": {[]string{"deviceId"}, plain}, "provisioningstatus": {[]string{"provisioningStatus"}, folded},
	"attestation.type": {[]string{"attestation", "type"}, folded}, "allocationpolicy": {[]string{"allocationPolicy"}, folded},
	"iothubhostname": {[]string{"iotHubHostName"}, folded}, "iothubs": {[]string{"iotHubs"}, folded},
	"capabilities.iotedge": {[]string{"capabilities", "iotEdge"}, plain},
	"status":               {[]string{"status"}, folded}, "substatus": {[]string{"substatus"}, folded}, "assignedhub": {[]string{"assignedHub"}, folded},
	"etag": {[]string{"etag"}, plain}, "createddatetimeutc": {[]string{"createdDateTimeUtc"}, moment},
	"lastupdateddatetimeutc": {[]string{"lastUpdatedDateTimeUtc"}, moment},
}

// free are fields that go on below, and where they stand.
var free = map[string][]string{"tags": {"initialTwin", "tags"}, "desired": {"initialTwin", "properties", "desired"}}

// newField finds a field by the names that were written.
func newField(names []string) (*field, error) {
	if root, ok := free[strings.ToLower(names[0])]; ok {
		return &field{append(slices.Clip(root), names[1:]...), plain}, nil
	}
	if f, ok := fields[strings.ToLower(strings.Join(names, "."))]; ok {
		return &f, nil
	}
	return nil, fmt.Errorf("there is no field %q", strings.Join(names, "."))
}

// in returns what a document has there, and whether it has it.
func (f *field) in(doc map[string]any) (v any, ok bool) {
	v = doc
	for _, name := range f.path {
		object, is := v.(map[string]any)
		if !is {
			return nil, false
		}
		if v, ok = object[name]; !ok {
			return nil, false
		}
	}
	return v, true
}

// order compares a document's value with a literal, which is a string, a float64, a bool, a time.Time or nil. ok is false where
// they cannot be compared; a bool and null have no order, only the same and another.
func (k kind) order(v, literal any) (c int, ok bool) {
	switch want := literal.(type) {
	case nil:
		return different(v != nil), true
	case bool:
		got, ok := v.(bool)
		return different(got != want), ok
	case float64:
		n, ok := v.(json.Number)
		if !ok {
			return 0, false
		}
		got, err := n.Float64()
		switch {
		case got < want:
			return -1, err == nil
		case got > want:
			return 1, err == nil
		}
		return 0, err == nil
	case time.Time:
		text, _ := v.(string)
		got, err := time.Parse(time.RFC3339, text)
		return got.Compare(want), err == nil
	case string:
		got, ok := v.(string)
		if k == folded {
			return strings.Compare(dps.Fold(got), dps.Fold(want)), ok
		}
		return strings.Compare(got, want), ok
	}
	return 0, false
}

func different(b bool) int {
	if b {
		return 1
	}
	return 0
}

// literal makes of a literal what the field's values compare with.
func (f *field) literal(v any) (any, error) {
	if text, ok := v.(string); ok && f.kind == moment {
		t, err := time.Parse(time.RFC3339, text)
		if err != nil {
			return nil, fmt.Errorf("%s is a time, and %.40q is none: want 2026-01-31T12:00:00Z", strings.Join(f.path, "."), text)
		}
		return t, nil
	}
	return v, nil
}

// test holds a field against literals: true where one of its values and one of them are so.
func (f *field) test(literals []any, ordered bool, so func(int) bool) (expr, error) {
	for i, l := range literals {
		var err error
		if literals[i], err = f.literal(l); err != nil {
			return nil, err
		}
		if _, flag := l.(bool); ordered && (flag || l == nil) {
			return nil, errors.New("true, false and null are not greater or less than anything")
		}
	}
	return func(doc map[string]any) truth {
		v, ok := f.in(doc)
		if !ok {
			return unknown
		}
		values, list := v.([]any)
		if !list {
			values = []any{v}
		}
		result := unknown
		for _, v := range values {
			for _, l := range literals {
				if c, ok := f.kind.order(v, l); ok {
					if so(c) {
						return yes
					}
					result = no
				}
			}
		}
		return result
	}, nil
}
