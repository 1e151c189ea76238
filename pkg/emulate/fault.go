package emulate

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// A Fault is what shall go wrong, and for whom: KEY=VALUE pairs between commas, such as rid=sensor-*,code=429,count=2. Each key
// stands once. These say which requests it is for; a request must match all that are given:
//
//	rid=GLOB[|GLOB]   registration ID, in any letter case; * is any text, ? one character
//	protocol=NAME|…   https, mqtt, mqtt-ws, amqp, amqp-ws
//	op=NAME|…         register, status, lookup, challenge
//	after=N           not the first N of those
//	count=N           N of them, then no more
//	nth=N             the Nth only: after=N-1,count=1
//	p=0.1             by chance, this often
//
// And these say what happens, at least one:
//
//	delay=2s          the answer comes later, up to 10m; by itself or with any other
//	retry-after=TEXT  the hint, whatever is written, or none for no hint; by itself, or with code or assigning
//	code=429          an error instead of an answer: an HTTP status or a six-digit error code
//	lost              the operation is not known (404000); for status requests
//	drop              the connection ends before the request is worked on; drop=after: afterwards, without an answer
//	assigning=N       the operation stays "assigning" for N polls; what is counted by count, after and p is operations
//	disabled          it ends "disabled"
//	failed=400208     it ends "failed", with that error code
//	hub=NAME          it ends with another hub
//
// The zero value is no fault; use [ParseFault].
type Fault struct {
	text string

	rid            []string // patterns, folded
	protocols, ops []string // empty: any
	after, count   int      // count 0: no end
	p              float64

	delay      time.Duration
	retryAfter string
	effect     string // its key; empty: delay and retryAfter only
	code       dps.Code
	polls      int
	hub        string
	dropAfter  bool
}

const (
	maxFault = 1024
	maxDelay = 10 * time.Minute
	maxCount = 1_000_000_000
)

// FaultKeys are the keys of a fault's text; those that take a value end in "=".
var faultKeys = []string{"rid=", "protocol=", "op=", "after=", "count=", "nth=", "p=", "delay=", "retry-after=", "code=", "lost", "drop",
	"assigning=", "disabled", "failed=", "hub="}

// FaultKeys returns the keys of a fault's text in the order in which they are told; those that need a value end in "=".
func FaultKeys() []string { return slices.Clone(faultKeys) }

var (
	protocols  = []string{"https", "mqtt", "mqtt-ws", "amqp", "amqp-ws"}
	operations = []string{opRegister, opStatus, opLookup, opChallenge}
	// effects are what a fault can have one of, each with the operations that it can be for.
	effects = map[string][]string{
		"code": operations, "lost": {opStatus}, "drop": operations, "assigning": {opRegister, opStatus},
		"disabled": {opRegister, opStatus, opLookup}, "failed": {opRegister, opStatus, opLookup}, "hub": {opRegister, opStatus, opLookup},
	}
)

// A FaultError says where the text of a fault is wrong.
type FaultError struct {
	Text   string
	Offset int // in octets, from 0
	Reason string
}

// Error shows the text and the place, counted from 1.
func (e *FaultError) Error() string {
	text := e.Text
	if len(text) > 128 {
		text = text[:128] + "…"
	}
	return fmt.Sprintf("fault %q, character %d: %s", text, e.Offset+1, e.Reason)
}

// ParseFault reads a fault. Its error is a *FaultError.
func ParseFault(text string) (Fault, error) {
	f := Fault{text: text, p: 1}
	wrong := func(offset int, format string, args ...any) (Fault, error) {
		return Fault{}, &FaultError{text, offset, fmt.Sprintf(format, args...)}
	}
	if len(text) > maxFault {
		return wrong(maxFault, "it has more than %d characters", maxFault)
	}
	at := make(map[string]int) // keys that stood already
	offset := 0
	for part := range strings.SplitSeq(text, ",") {
		key, value, has := strings.Cut(part, "=")
		place := offset + len(key) + 1
		switch _, twice := at[key]; {
		case part == "":
			return wrong(offset, "KEY=VALUE is missing; the keys are %s", strings.Join(faultKeys, " "))
		case twice:
			return wrong(offset, "%s stands twice", key)
		case !slices.Contains(faultKeys, key) && !slices.Contains(faultKeys, key+"="):
			return wrong(offset, "there is no key %.100q; the keys are %s", key, strings.Join(faultKeys, " "))
		case !has && slices.Contains(faultKeys, key+"="):
			return wrong(offset+len(key), "%s wants a value: %s=…", key, key)
		case has && value == "":
			return wrong(place, "the value of %s is missing", key)
		case has && (key == "lost" || key == "disabled"):
			return wrong(place, "%s takes no value", key)
		}
		if _, isEffect := effects[key]; isEffect {
			if f.effect != "" {
				return wrong(offset, "%s and %s exclude each other: make two faults of it", f.effect, key)
			}
			f.effect = key
		}
		if err := f.set(key, value); err != nil {
			return wrong(place, "%s: %v", key, err)
		}
		at[key] = offset
		offset += len(part) + 1
	}
	_, nth := at["nth"]
	_, after := at["after"]
	_, count := at["count"]
	switch {
	case nth && (after || count):
		return wrong(at["nth"], "nth stands for after and count, and not with them")
	case f.effect == "" && f.delay == 0 && f.retryAfter == "":
		return wrong(len(text), "it says for whom, and not what: want one of delay= retry-after= code= lost drop assigning= disabled failed= hub=")
	case f.retryAfter != "" && f.effect != "" && f.effect != "code" && f.effect != "assigning":
		return wrong(at["retry-after"], "an answer that is %s has no hint", f.effect)
	case f.retryAfter != "" && f.effect == "code" && !hinted(f.code):
		return wrong(at["retry-after"], "an error %d has no hint: only 429 and 5xx have", int(f.code))
	}
	for _, op := range f.ops {
		if able := effects[f.effect]; able != nil && !slices.Contains(able, op) {
			return wrong(at["op"], "%s cannot happen to %s, only to %s", f.effect, op, strings.Join(able, ", "))
		}
	}
	if len(f.ops) == 0 {
		f.ops = effects[f.effect]
	}
	return f, nil
}

func (f *Fault) set(key, value string) (err error) {
	switch key {
	case "rid":
		for _, p := range strings.Split(dps.Fold(value), "|") {
			if p == "" || len(p) > dps.MaxRegistrationID || strings.Trim(p, "abcdefghijklmnopqrstuvwxyz0123456789-._:*?") != "" {
				return fmt.Errorf("%.100q is no pattern of registration IDs: want letters, digits, -._: and the wildcards * and ?", p)
			}
			f.rid = append(f.rid, p)
		}
	case "protocol":
		f.protocols, err = words(value, protocols)
	case "op":
		f.ops, err = words(value, operations)
	case "after":
		f.after, err = number(value, 0)
	case "count":
		f.count, err = number(value, 1)
	case "nth":
		f.after, err = number(value, 1)
		f.after, f.count = f.after-1, 1
	case "p":
		if f.p, err = strconv.ParseFloat(value, 64); err != nil || !(f.p > 0 && f.p <= 1) || strings.Trim(value, "0123456789.") != "" {
			err = errors.New("want a number above 0, up to 1")
		}
	case "delay":
		if f.delay, err = time.ParseDuration(value); err != nil || f.delay <= 0 || f.delay > maxDelay {
			err = errors.New("want a time such as 250ms or 2s, up to 10m")
		}
	case "retry-after":
		if len(value) > 32 || strings.Trim(value, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._:") != "" {
			err = errors.New("want up to 32 letters, digits, dots, colons, - and _")
		}
		f.retryAfter = value
	case "code":
		f.code, err = code(value)
	case "failed":
		f.code, err = code(value)
	case "drop":
		if value != "" && value != "before" && value != "after" {
			err = errors.New("want before or after")
		}
		f.dropAfter = value == "after"
	case "assigning":
		f.polls, err = number(value, 1)
	case "hub":
		if len(value) > 253 || strings.Trim(dps.Fold(value), "abcdefghijklmnopqrstuvwxyz0123456789-._") != "" {
			err = errors.New("want a host name")
		}
		f.hub = value
	}
	return err
}

func words(value string, known []string) ([]string, error) {
	list := strings.Split(value, "|")
	for _, w := range list {
		if !slices.Contains(known, w) {
			return nil, fmt.Errorf("%.100q is not one of %s", w, strings.Join(known, ", "))
		}
	}
	return list, nil
}

func number(value string, least int) (int, error) {
	n, err := strconv.Atoi(value)
	if err != nil || n < least || n > maxCount || strconv.Itoa(n) != value {
		return 0, fmt.Errorf("want a whole number from %d to %d", least, maxCount)
	}
	return n, nil
}

// code reads an error code, or the one that goes with an HTTP status.
func code(value string) (dps.Code, error) {
	n, err := number(value, 400)
	if err == nil && n < 600 {
		switch n {
		case dps.CodeUnauthorized.Status():
			return dps.CodeUnauthorized, nil
		case dps.CodeThrottled.Status():
			return dps.CodeThrottled, nil
		}
		n *= 1000
	}
	if err != nil || n < 400_000 || n > 599_999 {
		return 0, errors.New("want an HTTP status from 400 to 599, or an error code of six digits such as 401002")
	}
	return dps.Code(n), nil
}

// hinted reports whether an error comes with a hint when to come back (device API, section 6.3).
func hinted(c dps.Code) bool { return c.Status() == 429 || c.Status() >= 500 }

// String returns the text that the fault was read from.
func (f Fault) String() string { return f.text }

// MarshalText implements [encoding.TextMarshaler].
func (f Fault) MarshalText() ([]byte, error) { return []byte(f.text), nil }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (f *Fault) UnmarshalText(b []byte) (err error) {
	*f, err = ParseFault(string(b))
	return err
}

// matches reports whether the fault is for a request, its numbers aside.
func (f *Fault) matches(op string, req *registration.Request) bool {
	if len(f.ops) > 0 && !slices.Contains(f.ops, op) || len(f.protocols) > 0 && !slices.Contains(f.protocols, req.Protocol) {
		return false
	}
	id := dps.Fold(req.RegistrationID)
	return len(f.rid) == 0 || slices.ContainsFunc(f.rid, func(p string) bool {
		ok, _ := path.Match(p, id) // the pattern has nothing in it that could be wrong
		return ok
	})
}
