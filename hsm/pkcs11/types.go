package pkcs11

import (
	"context"

	"github.com/touchmark/touchmark/hsm"
)

// A Module is what a PKCS#11 library says about itself and about the tokens that it reaches (CK_INFO, PKCS#11 2.40 §3.1).
type Module struct {
	Path         string  `json:"path"`
	Manufacturer string  `json:"manufacturer"`
	Description  string  `json:"description"`
	Version      string  `json:"version"`
	Cryptoki     string  `json:"cryptoki"` // version of the standard that it speaks
	Tokens       []Token `json:"tokens"`
}

// A Token is what a module says about a token before anybody logs in (CK_TOKEN_INFO, PKCS#11 2.40 §3.2).
type Token struct {
	Label        string `json:"label"`
	Manufacturer string `json:"manufacturer"`
	Model        string `json:"model"`
	Serial       string `json:"serial"`
	Hardware     string `json:"hardwareVersion"`
	Firmware     string `json:"firmwareVersion"`
	// Slot is where it is at present. It changes; nothing should be kept that names a token by it.
	Slot        uint     `json:"slot"`
	Initialized bool     `json:"initialized"`
	Login       bool     `json:"loginRequired"`
	ReadOnly    bool     `json:"readOnly"`
	UserPIN     PINState `json:"userPin"`
	SOPIN       PINState `json:"soPin"`
	// Sessions and MaxSessions count read-write sessions; nil where the token does not say. MaxSessions 0 means no limit.
	Sessions    *uint `json:"sessions,omitempty"`
	MaxSessions *uint `json:"maxSessions,omitempty"`
	// FreeMemory is how many octets are left for private objects, nil where the token does not say.
	FreeMemory *uint `json:"freeMemory,omitempty"`
}

// URI names the token by label and serial, with the module that reaches it.
func (t Token) URI(modulePath string) hsm.URI {
	return hsm.URI{Scheme: hsm.SchemePKCS11, Token: t.Label, Serial: t.Serial, ModulePath: modulePath}
}

// A PINState is what a token tells of a PIN before it is tried.
type PINState string

// The states of a PIN.
const (
	PINReady    PINState = "ready"
	PINUnset    PINState = "not set"
	PINCountLow PINState = "wrong before" // at least one wrong try since the last right one
	PINFinalTry PINState = "one try left"
	PINLocked   PINState = "locked"
	PINToChange PINState = "to be changed"
)

// InitConfig says how to make a blank token ready.
type InitConfig struct {
	// URI names the module, and the label that the token has from then on, at most 32 octets. No other token of the module may
	// have it.
	URI hsm.URI
	// Serial chooses among blank tokens; empty is right when there is one alone, or when they are all alike.
	Serial string
	// SOPIN and UserPIN become the token's PINs. They are asked for once each.
	SOPIN, UserPIN func(context.Context) (hsm.Secret, error)
}

// Objects counts what a token holds.
type Objects struct {
	PrivateKeys  int `json:"privateKeys"`
	PublicKeys   int `json:"publicKeys"`
	SecretKeys   int `json:"secretKeys"`
	Certificates int `json:"certificates"`
	Data         int `json:"data"`
}

// Total returns how many there are.
func (o Objects) Total() int {
	return o.PrivateKeys + o.PublicKeys + o.SecretKeys + o.Certificates + o.Data
}
