// Package access says who may do what with a provisioning service: rights, principals, and the bearer tokens that prove them.
//
// A [Principal] has rights in scopes: those of a shared access policy in one, those that an identity provider's claims map to
// ([OIDC]), or everything, for whoever has the management token. An [Authenticator] makes principals of bearer tokens; tokens
// that a shared access policy signs are for those who keep policies. An Authenticator may be used by many goroutines. What it
// fetches from an identity provider is bounded in size, in time and in how often.
//
// Rights follow the service API, section 2.3; tokens RFC 7519, RFC 9068 and OpenID Connect Discovery 1.0.
package access

import (
	"fmt"
	"strings"

	"github.com/touchmark/touchmark/pkg/dps"
)

// A Right is one right, or several ored together.
type Right uint16

// The rights. The first six are those of shared access policies.
const (
	// ServiceConfig is for the service's own settings: policies, the audit record.
	ServiceConfig Right = 1 << iota
	// EnrollmentRead reads and queries enrollments, without keys.
	EnrollmentRead
	// EnrollmentWrite creates, changes and deletes enrollments, and reads their keys. It has EnrollmentRead,
	// RegistrationStatusRead, RegistrationStatusWrite and AttestationDetails in it: the policy that everybody uses has it alone.
	EnrollmentWrite
	// RegistrationStatusRead reads and queries registrations.
	RegistrationStatusRead
	// RegistrationStatusWrite deletes registrations.
	RegistrationStatusWrite
	// DeviceConnect is kept and shown; devices prove themselves in other ways.
	DeviceConnect

	// AttestationDetails reads the keys of enrollments, for identity providers that grant it by itself.
	AttestationDetails
	// ManagementRead reads provisioning services and their certificates by the management API, without keys.
	ManagementRead
	// ManagementWrite creates, changes and deletes them, has ManagementRead in it, and links hubs.
	ManagementWrite
	// ManagementKeys lists the keys of shared access policies by the management API.
	ManagementKeys

	end
)

// Policy are the rights that a shared access policy can have, and Everything all there are.
const (
	Policy     = ServiceConfig | EnrollmentRead | EnrollmentWrite | RegistrationStatusRead | RegistrationStatusWrite | DeviceConnect
	Everything = end - 1
)

var names = [...]string{"ServiceConfig", "EnrollmentRead", "EnrollmentWrite", "RegistrationStatusRead", "RegistrationStatusWrite", "DeviceConnect",
	"AttestationDetails", "ManagementRead", "ManagementWrite", "ManagementKeys"}

// maxRights bounds the text of rights, in octets.
const maxRights = 512

// ParseRights reads rights as policies have them, "ServiceConfig, EnrollmentWrite", in any case: at least one, and none but
// those allowed.
func ParseRights(text string, allowed Right) (Right, error) {
	if len(text) > maxRights {
		return 0, fmt.Errorf("rights of more than %d octets", maxRights)
	}
	var all Right
	for word := range strings.SplitSeq(text, ",") {
		word = strings.TrimSpace(word)
		found := false
		for i, n := range names {
			if r := Right(1 << i); strings.EqualFold(word, n) && allowed&r != 0 {
				all, found = all|r, true
			}
		}
		if !found {
			return 0, fmt.Errorf("right %q: want some of %s", word, allowed)
		}
	}
	return all, nil
}

// String prints rights as ParseRights reads them, in the order of the constants.
func (r Right) String() string {
	var words []string
	for i, n := range names {
		if r&(1<<i) != 0 {
			words = append(words, n)
		}
	}
	return strings.Join(words, ", ")
}

// Implied returns the rights with those that they have in them.
func (r Right) Implied() Right {
	if r&EnrollmentWrite != 0 {
		r |= EnrollmentRead | RegistrationStatusRead | RegistrationStatusWrite | AttestationDetails
	}
	if r&ManagementWrite != 0 {
		r |= ManagementRead
	}
	return r
}

// A Grant gives rights in a scope.
type Grant struct {
	Scope  string // name of a provisioning service, in any case; "*" for every one
	Rights Right
}

// A Principal is a caller who has proved itself. The zero value may nothing.
type Principal struct {
	Name   string // for the audit record: "policy NAME", "oidc SUBJECT", "management token"
	Grants []Grant
}

// May reports whether the principal has all of these rights in the scope of that name. The name "" is no scope's: only those may
// that have the rights in every one.
func (p *Principal) May(scope string, r Right) bool {
	var has Right
	for _, g := range p.Grants {
		if g.Scope == "*" || scope != "" && dps.Fold(g.Scope) == dps.Fold(scope) {
			has |= g.Rights.Implied()
		}
	}
	return r != 0 && has&r == r
}
