package registration

import (
	"context"
	"errors"
	"time"

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
	// Operation is the ID that the operation is to have, for a registration that was put off: a ticket of this device
	// ([IsTicket]). Where the device has an operation of that ID, Register finds it and does nothing. Doors leave it empty.
	Operation string
	// Protocol is "https", "mqtt", "mqtt-ws", "amqp" or "amqp-ws", Remote the caller's address and ClientVersion what it says it is; all for the log.
	Protocol      string
	Remote        string
	ClientVersion string
	// Began is when it came in, for the log's durations; zero for unknown. Doors leave it empty.
	Began time.Time

	searched *searched // by the service itself
}

// A Registrar answers devices. Doors take this interface, so that limits, faults and records can wrap it.
//
// Errors are *dps.Error, or become one by [dps.AsError]; two more mean something to a door: [*Challenge] and [ErrHangUp]. A
// device that lost an answer asks again and gets the same assignment.
type Registrar interface {
	// Register starts a registration, or finds the one in progress. The answer's status is "assigning" and it has no
	// registrationState, even when the assignment is already durable; only clients that are known to take it are told the end
	// at once.
	Register(ctx context.Context, req *Request) (*dps.OperationStatus, error)
	// Status says what became of an operation of this device.
	Status(ctx context.Context, req *Request, operationID string) (*dps.OperationStatus, error)
	// Lookup returns the device's registration record.
	Lookup(ctx context.Context, req *Request) (*dps.RegistrationState, error)
	// Challenge returns an activation blob for the TPM of the request's proof, which only that TPM can open; what it holds
	// signs the device's token (device API, section 9). Whoever is not enrolled gets one, too, that is good for nothing, and is
	// refused when it registers.
	Challenge(ctx context.Context, req *Request) ([]byte, error)
}

// A Challenge is what Register and Lookup return, as an error, to a TPM that has not proved itself: a blob to prove itself
// with. A door that cannot carry it answers its refusal.
type Challenge struct {
	Blob    []byte
	Refusal *dps.Error
}

// Error says that the TPM is challenged.
func (c *Challenge) Error() string { return "the TPM is challenged" }

// Unwrap returns the refusal.
func (c *Challenge) Unwrap() error { return c.Refusal }

// ErrHangUp tells a door to end the connection without a word.
var ErrHangUp = errors.New("the connection is to be dropped")
