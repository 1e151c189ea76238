package load

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
)

// A Mix is names with weights.
type Mix []Weight

// A Weight is one name of a mix.
type Weight struct {
	Name   string
	Weight int
}

const maxWeight = 1_000_000

// ParseMix reads name=weight, comma-separated; a name alone has the weight 1. Names are among the known ones, and come once.
func ParseMix(s string, known ...string) (Mix, error) {
	var m Mix
	for part := range strings.SplitSeq(s, ",") {
		name, text, weighted := strings.Cut(part, "=")
		w := Weight{name, 1}
		if weighted {
			n, err := strconv.Atoi(text)
			if err != nil || n < 0 || n > maxWeight || text != strconv.Itoa(n) {
				return nil, fmt.Errorf("%q: want a weight from 0 to %d", part, maxWeight)
			}
			w.Weight = n
		}
		if !slices.Contains(known, name) {
			return nil, fmt.Errorf("%q is not one of %s", name, strings.Join(known, ", "))
		}
		if slices.ContainsFunc(m, func(o Weight) bool { return o.Name == name }) {
			return nil, fmt.Errorf("%s stands twice", name)
		}
		m = append(m, w)
	}
	m = slices.DeleteFunc(m, func(w Weight) bool { return w.Weight == 0 })
	if len(m) == 0 {
		return nil, fmt.Errorf("%q has no weight", s)
	}
	return m, nil
}

// total is the sum of the weights.
func (m Mix) total() (n int) {
	for _, w := range m {
		n += w.Weight
	}
	return n
}

// pick returns the index of a random name.
func (m Mix) pick() int {
	n := rand.IntN(m.total())
	for i, w := range m {
		if n -= w.Weight; n < 0 {
			return i
		}
	}
	panic("unreachable")
}
