package amqpd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/touchmark/touchmark/pkg/amqp"
	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// The mechanisms (device API, section 12.2).
const (
	plain     amqp.Symbol = "PLAIN"
	tpm       amqp.Symbol = "TPM"
	external  amqp.Symbol = "EXTERNAL"
	anonymous amqp.Symbol = "ANONYMOUS"
)

// sasl is the security layer. A proof that matches no enrollment is accepted here and refused at the register request, where
// the device can read why.
func (c *conn) sasl(ctx context.Context) error {
	c.out = amqp.AppendHeader(c.out, amqp.SASL)
	if err := c.write(0, &amqp.SASLMechanisms{Mechanisms: []amqp.Symbol{plain, tpm, external, anonymous}}, nil); err != nil {
		return err
	}
	err := c.mechanism(ctx)
	var refusal *dps.Error
	switch {
	case errors.Is(err, registration.ErrHangUp):
		return err
	case errors.As(err, &refusal) && (refusal.Code.Status() == 429 || refusal.Code.Status() >= 500):
		return c.outcome(amqp.SASLTemporary, err)
	case refusal == nil && gone(err):
		return err
	case err != nil:
		return c.outcome(amqp.SASLAuth, err)
	}
	return c.outcome(amqp.SASLOK, nil)
}

// gone reports whether an error is the connection's and not the peer's.
func gone(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) || errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

func (c *conn) outcome(code uint8, why error) error {
	if err := c.write(0, &amqp.SASLOutcome{Code: code}, nil); err != nil || why == nil {
		return err
	}
	return fmt.Errorf("%w: %v", errRefused, why)
}

// mechanism goes through the mechanism that the device chooses.
func (c *conn) mechanism(ctx context.Context) error {
	f, err := c.read(maxSASL)
	if err != nil {
		return err
	}
	init, ok := f.Body.(*amqp.SASLInit)
	if !ok {
		return fmt.Errorf("%T instead of SASL init", f.Body)
	}
	switch init.Mechanism {
	case plain:
		return c.plain(init.InitialResponse)
	case tpm:
		return c.tpm(ctx, init.InitialResponse)
	case external:
		if len(c.Certificates) == 0 {
			return errors.New("EXTERNAL without a client certificate")
		}
		return nil
	case anonymous: // no proof but a client certificate, if there is one: judged as a connection without SASL
		return nil
	}
	return fmt.Errorf("SASL mechanism %.20q", init.Mechanism)
}

// plain is PLAIN (RFC 4616): authcid {idScope}/registrations/{registrationId}, and the SAS token as password.
func (c *conn) plain(response []byte) error {
	parts := bytes.Split(response, []byte{0})
	if len(parts) != 3 || len(parts[0]) > 0 {
		return errors.New("PLAIN response is not NUL authcid NUL password")
	}
	var ok bool
	if c.req.IDScope, c.req.RegistrationID, ok = parseAddress(string(parts[1])); !ok {
		return errors.New("authcid is not idScope/registrations/registrationId")
	}
	c.known = true
	return c.token(parts[2])
}

// token takes a SAS token that is well-formed and has not expired.
func (c *conn) token(b []byte) error {
	c.req.Proof.Token = string(b)
	t, err := attest.ParseToken(c.req.Proof.Token)
	if err != nil {
		return err
	}
	if t.Expired(c.s.cfg.Now()) {
		return attest.ErrExpired
	}
	return nil
}

// Control octets of the TPM mechanism's segments: a part of the blob, and the last one with its number. The split is one
// that the SDK for C takes, and two segments are what that for Java does (device API, section 12.4).
const (
	firstSegment = 0x80
	lastSegment  = 0xc1
	segmentSize  = 470
)

// tpm is the mechanism TPM: the endorsement key, the storage root key, a blob that only their TPM opens, and the token that
// is signed with what was in it.
func (c *conn) tpm(ctx context.Context, response []byte) error {
	c.within(tpmTime)
	parts := bytes.SplitN(response, []byte{0}, 4) // the key may have zeros of its own
	if len(parts) != 4 || len(parts[0]) > 0 || len(parts[1]) == 0 || len(parts[2]) == 0 || len(parts[3]) == 0 {
		return errors.New("TPM init is not NUL idScope NUL registrationId NUL key")
	}
	c.req.IDScope, c.req.RegistrationID, c.known = string(parts[1]), string(parts[2]), true
	srk, err := c.step([]byte{0})
	if err != nil {
		return err
	}
	req := c.req
	req.Proof.TPM = &attest.TPMKeys{EK: parts[3], SRK: srk}
	work, cancel := c.working(ctx)
	blob, err := c.s.cfg.Registrar.Challenge(work, &req)
	cancel()
	if errors.Is(err, registration.ErrHangUp) {
		return err
	}
	if err != nil {
		return dps.AsError(err)
	}
	if len(blob) > 2*segmentSize {
		c.s.cfg.Log.Info("a TPM is refused: the challenge for its keys does not fit the two segments that SDKs take over AMQP; it can register over HTTPS",
			"registrationId", req.RegistrationID, "octets", len(blob), "most", 2*segmentSize, "protocol", req.Protocol, "remote", req.Remote)
		return errors.New("the challenge does not fit two segments")
	}
	n := min(len(blob), segmentSize)
	rest, err := c.step(append([]byte{firstSegment}, blob[:n]...))
	if err != nil {
		return err
	}
	if len(rest) > 0 {
		return errors.New("TPM response to the first segment is not empty")
	}
	token, err := c.step(append([]byte{lastSegment}, blob[n:]...))
	if err != nil {
		return err
	}
	c.req.Proof.TPM = req.Proof.TPM // which storage root key the key for the hub is to be wrapped for
	return c.token(token)
}

// step sends a challenge and returns what is behind the response's control octet.
func (c *conn) step(challenge []byte) ([]byte, error) {
	if err := c.write(0, &amqp.SASLChallenge{Challenge: challenge}, nil); err != nil {
		return nil, err
	}
	f, err := c.read(maxSASL)
	if err != nil {
		return nil, err
	}
	r, ok := f.Body.(*amqp.SASLResponse)
	if !ok || len(r.Response) == 0 || r.Response[0] != 0 {
		return nil, fmt.Errorf("%T is not a response of the mechanism TPM", f.Body)
	}
	return r.Response[1:], nil
}
