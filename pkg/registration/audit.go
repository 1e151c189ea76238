package registration

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// An Actor is who changes something, for the audit record.
type Actor struct {
	Name   string // "policy provisioningserviceowner", a subject of the identity provider's, or "the start of the service"
	Remote string // address that the request came from; empty for the service itself
	// RequestID is that of the answer, so that a caller can be shown what it did.
	RequestID string
}

// An Audit is an entry of the audit record. Entries are written in the transaction of the change that they tell of, and are
// never changed.
type Audit struct {
	ID     string    `json:"id"` // rises with time
	At     time.Time `json:"at"`
	Actor  string    `json:"actor"`
	Remote string    `json:"remote,omitempty"`
	// RequestID is that of the request, Action a verb, and Object what it was done to, "enrollment/pump-1".
	RequestID string `json:"requestId,omitempty"`
	Action    string `json:"action"`
	Object    string `json:"object"`
	// Before and After are the SHA-256 of the object's document, in hex; empty where there was none. Secrets are part of what is
	// hashed and do not follow from it: they have 128 bits at least.
	Before string `json:"before,omitempty"`
	After  string `json:"after,omitempty"`
}

// NewAudit returns an entry. before and after are what the object was and is: octets, or anything that JSON can say, or nil.
func NewAudit(by Actor, action, object string, before, after any, now time.Time) *Audit {
	return &Audit{ID: dps.NewOrderedID(now), At: now.UTC(), Actor: by.Name, Remote: by.Remote, RequestID: by.RequestID, Action: action, Object: object,
		Before: documentHash(before), After: documentHash(after)}
}

func documentHash(v any) string {
	b, ok := v.([]byte)
	if !ok {
		b, _ = json.Marshal(v) // of plain structs
	}
	if len(b) == 0 || string(b) == "null" {
		return ""
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// AuditFrom returns what the IDs of entries from a time on are greater than.
func AuditFrom(at time.Time) string { return dps.FirstOrderedID(at) }
