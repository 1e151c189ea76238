package registration

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"regexp"

	"github.com/touchmark/touchmark/pkg/dps"
)

// maxDeferrable is the longest body that is looked into before it is put off, in octets.
const maxDeferrable = 512

// uuidForm is how [dps.NewUUID] writes.
var uuidForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)

// NewTicket returns an operation ID for a registration that nobody has begun: what a device is told that is to come later.
// It has the shape of the service's IDs but begins with "4.", and no state anywhere. Who sees the device ask for its status
// begins the registration then, with the ticket as [Request.Operation]. It names its device, so that another device's is an
// unknown operation; it is no secret and no permission, since the device proves itself with it as without.
func NewTicket(scope, id string) string { return ticket(scope, id, dps.NewUUID()) }

// IsTicket reports whether an operation ID is a ticket of this device.
func IsTicket(scope, id, operation string) bool {
	return len(operation) == 55 && uuidForm.MatchString(operation[19:]) && operation == ticket(scope, id, operation[19:])
}

func ticket(scope, id, uuid string) string {
	sum := sha256.Sum256([]byte(dps.Fold(scope) + "\x00" + dps.Fold(id) + "\x00" + uuid))
	return "4." + hex.EncodeToString(sum[:8]) + "." + uuid
}

// Deferrable reports whether a register request may be forgotten and made again from what a status request brings: there is
// no TPM to challenge, and the body is a good one that carries nothing which would be lost.
func Deferrable(req *Request) bool {
	if len(req.Body) > maxDeferrable || req.Proof.TPM != nil || dps.CheckRegistrationID(req.RegistrationID) != nil {
		return false
	}
	body, err := parseBody(req)
	return err == nil && body.TPM == nil && body.CSR == "" && body.ClientCertificateCSR == "" &&
		(len(body.Payload) == 0 || bytes.Equal(body.Payload, []byte("null")))
}
