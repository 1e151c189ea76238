package registration

import (
	"context"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
)

// A Request is one device asking, whatever door it came through. Every member is untrusted.
type Request struct {
	IDScope        string
	RegistrationID string
	APIVersion     string
	Proof          attest.Proof
	// Body is the register body as received; empty is allowed. A status request has none.
	Body []byte
	// Repeat says that the transport marked the request as one that it sends again (MQTT's DUP).
	Repeat bool
	// Protocol is "https" or "mqtt", Remote the caller's address and ClientVersion what it says it is; all for the log.
	Protocol      string
	Remote        string
	ClientVersion string
}

// A Registrar answers devices. Doors take this interface, so that limits, audit and metrics can wrap it.
//
// Errors are *dps.Error, or become one by [dps.AsError]. A device that lost an answer asks again and gets the same
// assignment.
type Registrar interface {
	// Register starts a registration, or finds the one in progress. The answer's status is always "assigning" and it
	// has no registrationState, even when the assignment is already durable.
	Register(ctx context.Context, req *Request) (*dps.OperationStatus, error)
	// Status says what became of an operation of this device.
	Status(ctx context.Context, req *Request, operationID string) (*dps.OperationStatus, error)
	// Lookup returns the device's registration record.
	Lookup(ctx context.Context, req *Request) (*dps.RegistrationState, error)
}
