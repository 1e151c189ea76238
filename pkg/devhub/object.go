package devhub

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"
)

// Limits of any JSON that comes in. Twins have narrower ones.
const maxNesting = 24

// parse reads one JSON value: UTF-8, no name twice in an object, nothing behind it. Numbers stay as they were written.
func parse(b []byte) (any, error) {
	if !utf8.Valid(b) {
		return nil, errors.New("it is not UTF-8")
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	v, err := value(dec, maxNesting)
	if err != nil {
		return nil, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something stands behind the JSON")
	}
	return v, nil
}

func value(dec *json.Decoder, depth int) (any, error) {
	t, err := dec.Token()
	if err != nil {
		return nil, errors.New("it is not JSON")
	}
	delim, ok := t.(json.Delim)
	if !ok {
		return t, nil
	}
	if depth == 0 {
		return nil, fmt.Errorf("it is nested deeper than %d", maxNesting)
	}
	if delim == '[' {
		list := []any{}
		for dec.More() {
			v, err := value(dec, depth-1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err := dec.Token()
		return list, err
	}
	o := object{}
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			return nil, errors.New("it is not JSON")
		}
		text, ok := name.(string)
		if !ok {
			return nil, errors.New("it is not JSON")
		}
		if _, twice := o[text]; twice {
			return nil, fmt.Errorf("%.40q stands twice in an object", text)
		}
		if o[text], err = value(dec, depth-1); err != nil {
			return nil, err
		}
	}
	if _, err := dec.Token(); err != nil {
		return nil, errors.New("it is not JSON")
	}
	return o, nil
}

// object is a JSON object. Values are objects, []any, string, json.Number, bool and nil.
type object map[string]any

// parseObject reads one JSON object.
func parseObject(b []byte) (object, error) {
	v, err := parse(b)
	if err != nil {
		return nil, err
	}
	o, ok := v.(object)
	if !ok {
		return nil, errors.New("it is not a JSON object")
	}
	return o, nil
}

// member returns a member, and its zero value where there is none or it is null; else the member must be of that type.
func member[T any](o object, name string) (T, error) {
	var none T
	v := o[name]
	if v == nil {
		return none, nil
	}
	t, ok := v.(T)
	if !ok {
		return none, fmt.Errorf("%s has the wrong type", name)
	}
	return t, nil
}

// whole returns a member that is a whole number between two, or a default where there is none.
func whole(o object, name string, low, high, def int64) (int64, error) {
	n, err := member[json.Number](o, name)
	if err != nil || n == "" {
		return def, err
	}
	v, err := n.Int64()
	if err != nil || v < low || v > high {
		return 0, fmt.Errorf("%s is not a whole number from %d to %d", name, low, high)
	}
	return v, nil
}
