// Package allocation chooses a hub for a device, as far as that is arithmetic: by weight ([Hashed]), and by what an operator
// knows of the ways between networks and hubs ([Table]).
//
// It keeps no state. A [Table] does not change and may be used by many goroutines. Service API, section 4.6.
package allocation

import (
	"crypto/sha256"
	"encoding/binary"
	"math"
	"strings"
)

// A Hub is one that a device may be allocated to.
type Hub struct {
	Name     string // in any case
	Location string // for a Table, in any case
	Weight   int    // its share, 1 to 1000; 0 is 1
}

// Hashed picks a hub by rendezvous hashing with weights, and returns its index, or -1 of none: each has its share of the
// devices, a device has the same one every time, and a hub that comes or goes moves its own devices and no others. The ID is
// folded.
func Hashed(id string, hubs []Hub) int {
	best, most := -1, math.Inf(-1)
	var buf [256]byte
	for i, h := range hubs {
		b := append(buf[:0], strings.ToLower(h.Name)...)
		b = append(append(b, 0), id...)
		sum := sha256.Sum256(b)
		// Uniform in (0, 1), so that the logarithm is below 0. The score -weight/ln(x) is the greatest of all with a chance that is in
		// proportion to the weight; with equal weights it orders as x does.
		x := (float64(binary.BigEndian.Uint64(sum[:8])>>11) + 0.5) / (1 << 53)
		if score := -float64(max(h.Weight, 1)) / math.Log(x); score > most {
			best, most = i, score
		}
	}
	return best
}
