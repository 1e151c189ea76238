package load

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"syscall"

	"github.com/coder/websocket"

	"github.com/touchmark/touchmark/pkg/device"
	"github.com/touchmark/touchmark/pkg/dps"
)

// kindOf names an error as the report counts it. An error is wrong where it is an answer, and one that this device must not
// get.
func kindOf(err error) (kind string, wrong bool) {
	var refused *device.RefusedError
	var busy *device.BusyError
	var certificate *tls.CertificateVerificationError
	var alert tls.AlertError
	var record tls.RecordHeaderError
	var closed websocket.CloseError
	var timeout net.Error
	switch {
	case errors.As(err, &busy):
		return fmt.Sprintf("busy %d", int(busy.Code)), false
	case errors.As(err, &refused):
		if refused.Code.Status() == 429 {
			return fmt.Sprintf("busy %d", int(refused.Code)), false
		}
		return fmt.Sprintf("refused %d", int(refused.Code)), true
	case errors.Is(err, device.ErrAnswer):
		return "not understood", true
	case errors.As(err, &certificate):
		return "certificate", false
	case errors.Is(err, syscall.ECONNREFUSED):
		return "connection refused", false
	case errors.Is(err, syscall.EADDRNOTAVAIL), errors.Is(err, syscall.EADDRINUSE):
		return "client has no port", false
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return "client has no file descriptor", false
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return "timeout", false
	case errors.As(err, &alert), errors.As(err, &record):
		return "tls", false
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF),
		errors.Is(err, net.ErrClosed), errors.As(err, &closed):
		return "hung up", false
	}
	return "other", false
}

// expectation is what the answers to one registration must say.
type expectation struct {
	id    string
	hubs  []string // any where empty
	group string
	// again: the device is registered, with hub; unsure: perhaps.
	again, unsure bool
	hub           string

	operation string
	answers   int
	status    dps.Status // at the end; empty before
	wrong     []string
}

func (x *expectation) fault(format string, args ...any) {
	x.wrong = append(x.wrong, fmt.Sprintf(format, args...))
}

// answer looks at one answer: that of register first, those of status then. All are of one operation, and say nothing of
// anybody else (device API, section 18, 1 to 8).
func (x *expectation) answer(st *dps.OperationStatus) {
	x.answers++
	if st.OperationID == "" || x.operation != "" && x.operation != st.OperationID {
		x.fault("operation %.80q, and before it was %.80q", st.OperationID, x.operation)
	}
	x.operation = st.OperationID
	if !st.Status.Terminal() && st.Status != dps.Assigning {
		x.fault("status %.40q", st.Status)
	}
	state := st.RegistrationState
	if state == nil {
		if x.answers > 1 {
			x.fault("status without a registrationState")
		}
		return
	}
	if state.RegistrationID != x.id {
		x.fault("registration ID %.140q", state.RegistrationID)
	}
	if state.Status != st.Status {
		x.fault("status %.40q outside and %.40q inside", st.Status, state.Status)
	}
	if !st.Status.Terminal() && (state.DeviceID != "" || state.AssignedHub != "") {
		x.fault("a device ID or a hub while assigning")
	}
}

// end looks at the end state.
func (x *expectation) end(s *dps.RegistrationState) {
	if x.status = s.Status; s.Status != dps.Assigned {
		x.fault("status %s, %d %.100q", s.Status, s.ErrorCode, s.ErrorMessage)
		return
	}
	if s.DeviceID != x.id {
		x.fault("device ID %.140q", s.DeviceID)
	}
	if s.AssignedHub == "" || len(x.hubs) > 0 && !slices.Contains(x.hubs, s.AssignedHub) {
		x.fault("hub %.140q is not among the expected", s.AssignedHub)
	}
	first := s.Substatus == dps.InitialAssignment
	moved := x.hub != "" && s.AssignedHub != x.hub
	switch {
	case x.unsure:
		if !first && s.Substatus != dps.ReprovisionedToInitialAssignment {
			x.fault("substatus %.40q", s.Substatus)
		}
	case x.again && (s.Substatus != dps.ReprovisionedToInitialAssignment || moved):
		x.fault("substatus %.40q at %.140q of a device that was assigned %.140q before", s.Substatus, s.AssignedHub, x.hub)
	case !x.again && !first:
		x.fault("substatus %.40q of a device that is new", s.Substatus)
	}
	if x.group != "" && (s.SymmetricKey == nil || s.SymmetricKey.EnrollmentGroupID != x.group) {
		x.fault("enrollment group %v, want %s", s.SymmetricKey, x.group)
	}
}
