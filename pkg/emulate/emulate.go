// Package emulate makes a registration service one that firmware is tested against: the same keys in every run, enrollments
// from a file, faults on demand, and a record of every exchange.
//
// [New] wraps a [registration.Registrar]: what a door asks goes through [Faults], which may answer in the service's place or
// change its answer, and into [Exchanges], which writes down what was asked and answered. Either may be nil. A [Seed] makes
// secrets from a text, and [ParseEnrollments] reads enrollments in the wire form of the service API.
//
// All types may be used by many goroutines. The words and answers are those of the device API of Azure IoT Hub DPS.
package emulate

import (
	"context"
	"errors"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// The operations of a device, as faults and exchanges name them.
const (
	opRegister  = "register"
	opStatus    = "status"
	opLookup    = "lookup"
	opChallenge = "challenge"
)

// Config is what a registrar needs.
type Config struct {
	// Registrar answers.
	Registrar registration.Registrar
	// Faults answer instead of it, or change what it answered; nil for none.
	Faults *Faults
	// Exchanges is told of every request and its answer; nil for nobody.
	Exchanges *Exchanges
	// Stop cuts delays short when it is closed: a service that stops waits for nobody that it holds up itself. Nil never is.
	Stop <-chan struct{}
}

// Registrar implements [registration.Registrar].
type Registrar struct{ cfg Config }

var _ registration.Registrar = (*Registrar)(nil)

// New returns a registrar.
func New(cfg Config) *Registrar { return &Registrar{cfg} }

// Register implements [registration.Registrar].
func (r *Registrar) Register(ctx context.Context, req *registration.Request) (*dps.OperationStatus, error) {
	return exchange(ctx, r, opRegister, req, "", func() (*dps.OperationStatus, error) { return r.cfg.Registrar.Register(ctx, req) })
}

// Status implements [registration.Registrar].
func (r *Registrar) Status(ctx context.Context, req *registration.Request, operationID string) (*dps.OperationStatus, error) {
	return exchange(ctx, r, opStatus, req, operationID, func() (*dps.OperationStatus, error) {
		return r.cfg.Registrar.Status(ctx, req, operationID)
	})
}

// Lookup implements [registration.Registrar].
func (r *Registrar) Lookup(ctx context.Context, req *registration.Request) (*dps.RegistrationState, error) {
	return exchange(ctx, r, opLookup, req, "", func() (*dps.RegistrationState, error) { return r.cfg.Registrar.Lookup(ctx, req) })
}

// Challenge implements [registration.Registrar].
func (r *Registrar) Challenge(ctx context.Context, req *registration.Request) ([]byte, error) {
	return exchange(ctx, r, opChallenge, req, "", func() ([]byte, error) { return r.cfg.Registrar.Challenge(ctx, req) })
}

func exchange[T any](ctx context.Context, r *Registrar, op string, req *registration.Request, operationID string, call func() (T, error)) (T, error) {
	begin := time.Now()
	var answer T
	var none T
	applied, delay, err := r.cfg.Faults.before(op, req)
	r.wait(ctx, delay)
	if err == nil {
		if answer, err = call(); err != nil {
			answer = none
		}
		var more []string
		var changed any
		changed, more, delay, err = r.cfg.Faults.after(op, req, answer, err)
		if answer, _ = changed.(T); err != nil {
			answer = none
		}
		applied = append(applied, more...)
		r.wait(ctx, delay)
	}
	var challenge *registration.Challenge
	if err != nil && !errors.Is(err, registration.ErrHangUp) && !errors.As(err, &challenge) {
		err = dps.AsError(err) // now, so that the device and the record read one tracking ID
	}
	r.cfg.Exchanges.add(op, req, operationID, answer, err, begin, applied)
	return answer, err
}

func (r *Registrar) wait(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	case <-r.cfg.Stop:
	}
}
