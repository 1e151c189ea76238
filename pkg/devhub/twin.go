package devhub

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"
	"unicode"
)

// Limits of a twin, as IoT Hub has them.
const (
	maxTags     = 8 << 10 // octets, as size counts them
	maxProperty = 32 << 10
	maxDepth    = 10
	maxName     = 1 << 10
	maxText     = 4 << 10
	maxInteger  = 1 << 52 // either way
)

// twin is a device's twin. It is changed by making another one.
type twin struct {
	Version           int64
	Tags              object
	Desired, Reported section
}

// section is one of a twin's two sets of properties.
type section struct {
	Values  object
	Meta    object // of Values' shape, with $lastUpdated, and $lastUpdatedVersion for desired ones
	Version int64
}

func newTwin(now time.Time) twin {
	fresh := func() section {
		return section{Values: object{}, Meta: object{"$lastUpdated": stamp(now)}, Version: 1}
	}
	return twin{Version: 1, Tags: object{}, Desired: fresh(), Reported: fresh()}
}

// stamp writes a time as the service API does: UTC, "Z", no zeros at the end.
func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.9999999Z") }

// never is how a time that has not been is written.
const never = "0001-01-01T00:00:00Z"

func stampOr(t time.Time) string {
	if t.IsZero() {
		return never
	}
	return stamp(t)
}

// merged returns what comes of merging a patch into values: members that are null go away, objects are merged, everything else
// is put in place. Neither argument is changed; parts of them may be shared with the result.
func merged(values, patch object) object {
	out := maps.Clone(values)
	if out == nil {
		out = object{}
	}
	for name, v := range patch {
		inner, isObject := v.(object)
		switch {
		case v == nil:
			delete(out, name)
		case isObject:
			below, _ := out[name].(object)
			out[name] = merged(below, inner)
		default:
			out[name] = v
		}
	}
	return out
}

// updated returns the metadata of what merged makes.
func updated(meta, patch object, mark object) object {
	out := maps.Clone(meta)
	if out == nil {
		out = object{}
	}
	for name, v := range patch {
		inner, isObject := v.(object)
		switch {
		case v == nil:
			delete(out, name)
		case isObject:
			below, _ := out[name].(object)
			out[name] = updated(below, inner, mark)
		default:
			out[name] = maps.Clone(mark)
		}
	}
	maps.Copy(out, mark)
	return out
}

// change merges a patch into a section, or puts it in place of all that is there.
func (s section) change(patch object, replace, desired bool, now time.Time) (section, error) {
	next := section{Version: s.Version + 1}
	mark := object{"$lastUpdated": stamp(now)}
	if desired {
		mark["$lastUpdatedVersion"] = next.Version
	}
	if replace {
		s.Values, s.Meta = nil, nil
	}
	next.Values, next.Meta = merged(s.Values, patch), updated(s.Meta, patch, mark)
	return next, checkSection(next.Values, maxProperty)
}

// differences is the patch that makes one set of values of another.
func differences(from, to object) object {
	patch := object{}
	for name := range from {
		if to[name] == nil {
			patch[name] = nil
		}
	}
	maps.Copy(patch, to)
	return patch
}

// checkSection checks names, values, depth and size of tags or properties, as merged.
func checkSection(o object, most int) error {
	n, err := size(o, maxDepth)
	if err == nil && n > most {
		err = fmt.Errorf("it has %d octets, more than %d", n, most)
	}
	return err
}

// size is how IoT Hub counts a value: names and texts by their octets, eight for a number, four for a boolean.
func size(v any, depth int) (int, error) {
	switch v := v.(type) {
	case string:
		if len(v) > maxText {
			return 0, fmt.Errorf("a text is longer than %d octets", maxText)
		}
		return len(v), nil
	case json.Number:
		if i, err := v.Int64(); err == nil && (i > maxInteger || i < -maxInteger) {
			return 0, fmt.Errorf("%s is beyond ±2^52", v)
		}
		if f, err := v.Float64(); err != nil || len(v) > 32 || !strings.ContainsAny(v.String(), ".eE") && (f > maxInteger || f < -maxInteger) {
			return 0, fmt.Errorf("a number is beyond what a twin takes")
		}
		return 8, nil
	case bool:
		return 4, nil
	case object:
		if depth == 0 {
			return 0, fmt.Errorf("it is nested deeper than %d", maxDepth)
		}
		total := 0
		for name, below := range v {
			if err := checkName(name); err != nil {
				return 0, err
			}
			n, err := size(below, depth-1)
			if err != nil {
				return 0, err
			}
			total += len(name) + n
		}
		return total, nil
	case []any:
		if depth == 0 {
			return 0, fmt.Errorf("it is nested deeper than %d", maxDepth)
		}
		total := 0
		for _, below := range v {
			n, err := size(below, depth-1)
			if err != nil {
				return 0, err
			}
			total += n
		}
		return total, nil
	}
	return 0, nil
}

func checkName(name string) error {
	switch {
	case name == "" || len(name) > maxName:
		return fmt.Errorf("a name has not 1 to %d octets", maxName)
	case strings.ContainsAny(name, ".$ ") || strings.ContainsFunc(name, unicode.IsControl):
		return fmt.Errorf("the name %.40q has a dot, a dollar sign, a space or a control character", name)
	}
	return nil
}

// document is a section as it is sent: with its version, and for services with its metadata.
func (s section) document(meta bool) object {
	o := maps.Clone(s.Values)
	o["$version"] = s.Version
	if meta {
		o["$metadata"] = s.Meta
	}
	return o
}

// forDevice is what a device gets when it asks for its twin.
func (t twin) forDevice() object {
	return object{"desired": t.Desired.document(false), "reported": t.Reported.document(false)}
}

// A twinPatch is a change of a twin by a service. Nil leaves a part as it is.
type twinPatch struct {
	tags, desired object
}

// parseTwinPatch reads {"tags":{…},"properties":{"desired":{…}}}. What the hub itself writes into a twin is left out again, so
// that one that was read may be written.
func parseTwinPatch(o object) (twinPatch, error) {
	var p twinPatch
	var err, err2 error
	p.tags, err = member[object](o, "tags")
	properties, err2 := member[object](o, "properties")
	if err = errors.Join(err, err2); err != nil {
		return p, err
	}
	p.desired, err = member[object](properties, "desired")
	for _, part := range []object{p.tags, p.desired} {
		delete(part, "$version")
		delete(part, "$metadata")
	}
	return p, err
}

// apply returns the changed twin, and what a device that is connected is to be told: nil for nothing.
func (t twin) apply(p twinPatch, replace bool, now time.Time) (twin, object, error) {
	if replace { // what is not named goes away
		if p.tags == nil {
			p.tags = object{}
		}
		if p.desired == nil {
			p.desired = object{}
		}
	}
	var told object
	t.Version++
	if p.tags != nil {
		if replace {
			t.Tags = nil
		}
		t.Tags = merged(t.Tags, p.tags)
		if err := checkSection(t.Tags, maxTags); err != nil {
			return t, nil, badArgument("tags: %v", err)
		}
	}
	if p.desired != nil {
		told = p.desired
		if replace {
			told = differences(t.Desired.Values, p.desired)
		}
		next, err := t.Desired.change(p.desired, replace, true, now)
		if err != nil {
			return t, nil, badArgument("desired properties: %v", err)
		}
		t.Desired = next
		told = maps.Clone(told)
		told["$version"] = next.Version
	}
	return t, told, nil
}

// report merges what a device reports.
func (t twin) report(patch object, now time.Time) (twin, error) {
	delete(patch, "$version")
	next, err := t.Reported.change(patch, false, false, now)
	t.Reported = next
	t.Version++
	return t, err
}
