package order

import (
	"crypto"
	"time"
)

// A Report says what became of an order or a lease, signed by the station that had it.
type Report struct {
	Version int       `json:"version"`
	Grant   string    `json:"grant"` // the order's or the lease's ID
	Order   string    `json:"order"`
	Station string    `json:"station"`
	At      time.Time `json:"at"`
	Closed  bool      `json:"closed"` // nothing more will be made on it
	Ordered int64     `json:"ordered"`
	// How far the living units came: each count holds those that came further.
	Minted   int64 `json:"minted"`
	Stamped  int64 `json:"stamped"`
	Verified int64 `json:"verified"`
	Sealed   int64 `json:"sealed"`
	Exported int64 `json:"exported"`
	// What ended.
	Voided   int64 `json:"voided"`
	Scrapped int64 `json:"scrapped"`
	Reworked int64 `json:"reworked"`
	Returned int64 `json:"returned"`
	// Leases cut from it.
	Leases []LeaseLine `json:"leases,omitempty"`
	// Missing names each unit that is not what it should be: begun and not exported, scrapped, voided; Unmade each serial of the order's
	// range or list that was never begun. Where the order has no range or list, UnmadeCount alone tells.
	Missing     []MissingUnit `json:"missing,omitempty"`
	Unmade      []string      `json:"unmade,omitempty"`
	UnmadeCount int64         `json:"unmadeCount"`
	// Refused names each attempt to make what the order does not allow.
	Refused []Refusal `json:"refused,omitempty"`
	// Checkpoint is the ledger's signed checkpoint at the time.
	Checkpoint string `json:"checkpoint"`
	// Bundles are the IDs of the bundles that the units left in.
	Bundles []string `json:"bundles,omitempty"`
}

// A LeaseLine is a lease in the report of its order.
type LeaseLine struct {
	Lease    string `json:"lease"`
	Station  string `json:"station"`
	Quantity int64  `json:"quantity"`
	Used     int64  `json:"used"` // -1 while it is out
}

// A MissingUnit is a unit in a report that did not leave the factory.
type MissingUnit struct {
	Serial   string `json:"serial"`
	Revision int64  `json:"revision,omitempty"`
	State    string `json:"state"`
	Reason   string `json:"reason,omitempty"`
}

// A Refusal is an attempt to make what an order does not allow.
type Refusal struct {
	At       time.Time `json:"at"`
	Kind     string    `json:"kind"` // "spent", "expired", "serial", …
	Serial   string    `json:"serial,omitempty"`
	Operator string    `json:"operator,omitempty"`
	Why      string    `json:"why"`
}

// Balanced reports whether every unit that was ordered is accounted for as exported, here or by returned leases.
func (r *Report) Balanced() bool {
	made := r.Exported
	for _, l := range r.Leases {
		if l.Used < 0 {
			return false
		}
		made += l.Used
	}
	return made == r.Ordered && len(r.Missing) == 0
}

// Sign returns the report, signed with the station's key.
func (r *Report) Sign(station crypto.Signer) ([]byte, error) { return seal(station, reportType, r) }

// OpenReport verifies a report against the key of the station that made it.
func OpenReport(b []byte, stations []crypto.PublicKey) (*Report, error) {
	r := &Report{}
	id, err := open(b, reportType, stations, r)
	if err != nil {
		return nil, err
	}
	if r.Version != version || r.Station != id {
		return nil, invalid("the report of %.130q", r.Grant)
	}
	return r, nil
}
