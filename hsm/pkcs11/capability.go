package pkcs11

import "github.com/touchmark/touchmark/hsm"

// A Capability is one thing that a token was asked for, and whether it can do it.
type Capability struct {
	// Operation is make, sign, mac, agree, wrap or unwrap.
	Operation string `json:"operation"`
	// Algorithm is the key's. For wrap and unwrap it is that of the wrapping key.
	Algorithm hsm.Algorithm `json:"algorithm"`
	// Can says that the token offers what it takes. It is what the token announces: it may still refuse.
	Can bool `json:"can"`
	// Mechanisms are those that are used, by their PKCS#11 names; those that are missing when the token cannot.
	Mechanisms []string `json:"mechanisms,omitempty"`
	// Fallback says in what way the token is worked around, or is empty.
	Fallback string `json:"fallback,omitempty"`
}
