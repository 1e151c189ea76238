package tpm

import (
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm"
)

// An Error is a TPM's refusal: what was being done, the response code as the TPM gave it, what that means here and what
// to try. It wraps the sentinel of package hsm that fits, and the [tpm2.TPMRC].
type Error struct {
	// Op is what was being done.
	Op string
	// Code is the response code; its text begins with TPM_RC_….
	Code tpm2.TPMRC
	// Advice says what it means and what to try; empty where there is no more to say than the code's own text.
	Advice string

	is error
}

// Error returns the whole of it.
func (e *Error) Error() string {
	s := e.Op + ": "
	if e.is != nil {
		s += e.is.Error() + ": "
	}
	s += e.Code.Error()
	if e.Advice != "" {
		s += " (" + e.Advice + ")"
	}
	return s
}

// Unwrap returns the sentinel, if one fits, and the response code.
func (e *Error) Unwrap() []error {
	if e.is == nil {
		return []error{e.Code}
	}
	return []error{e.is, e.Code}
}

// meanings says what response codes mean to a person at a station (TPM 2.0 Part 2, 6.6.3).
var meanings = []struct {
	code   tpm2.TPMRC
	is     error
	advice string
}{
	{tpm2.TPMRCAuthFail, hsm.ErrPINIncorrect, "the authorization value was refused and counts towards lockout; it was tried once"},
	{tpm2.TPMRCBadAuth, hsm.ErrPINIncorrect, "the authorization value was refused; it was tried once"},
	{tpm2.TPMRCLockout, hsm.ErrPINLocked, "too many wrong authorization values: the TPM refuses them all until its recovery time is over; \"touchmark tpm lockout\" shows when, and resets it with the lockout authorization"},
	{tpm2.TPMRCObjectMemory, hsm.ErrFull, "all slots for loaded objects are taken, by another program or one that was killed: use /dev/tpmrm0, or \"touchmark tpm flush\""},
	{tpm2.TPMRCObjectHandles, hsm.ErrFull, "no object handles are left: the TPM wants a restart"},
	{tpm2.TPMRCSessionMemory, hsm.ErrFull, "all slots for sessions are taken, by another program or one that was killed: \"touchmark tpm flush\""},
	{tpm2.TPMRCSessionHandles, hsm.ErrFull, "all sessions are taken, by other programs or those that were killed: \"touchmark tpm flush\""},
	{tpm2.TPMRCNVSpace, hsm.ErrFull, "the TPM's non-volatile memory is full: delete an NV index or a persistent key that is not needed"},
	{tpm2.TPMRCNVDefined, hsm.ErrExists, "the NV index or the persistent handle is taken; nothing was overwritten"},
	{tpm2.TPMRCNVLocked, nil, "the NV index is locked: what is in it stays"},
	{tpm2.TPMRCNVUninitialized, nil, "nothing was written to the NV index yet"},
	{tpm2.TPMRCNVAuthorization, nil, "the NV index does not take this kind of authorization"},
	{tpm2.TPMRCNVRange, nil, "the NV index is smaller than that"},
	{tpm2.TPMRCIntegrity, nil, "the blob is not of this TPM and parent, or the TPM was cleared since, or the blob is damaged"},
	{tpm2.TPMRCHierarchy, nil, "the hierarchy is disabled, by the firmware or by another program"},
	{tpm2.TPMRCCommandCode, hsm.ErrUnsupported, "this TPM does not have the command"},
	{tpm2.TPMRCInitialize, nil, "the TPM was not started"},
	{tpm2.TPMRCFailure, nil, "the TPM failed its self-test: it wants a power cycle, or a replacement"},
	{tpm2.TPMRCNVRate, nil, "the TPM protects its memory from wear and did not become free in time: try again later"},
	{tpm2.TPMRCRetry, nil, "the TPM stayed busy: try again later"},
	{tpm2.TPMRCTesting, nil, "the TPM is still testing itself: try again later"},
	{tpm2.TPMRCYielded, nil, "the TPM stayed busy: try again later"},
	{tpm2.TPMRCDisabled, nil, "the firmware or the platform disabled the command"},
}

// explain says what an answer of the TPM means. Errors that are none pass as they are.
func explain(op string, err error) error {
	if err == nil {
		return nil
	}
	var done *Error
	var rc tpm2.TPMRC
	if errors.As(err, &done) || !errors.As(err, &rc) {
		return fmt.Errorf("%s: %w", op, err)
	}
	e := &Error{Op: op, Code: rc}
	for _, m := range meanings {
		if errors.Is(rc, m.code) {
			e.is, e.Advice = m.is, m.advice
			break
		}
	}
	return e
}

// refusesParameters reports whether the TPM says that it does not have an algorithm, a size or a curve.
func refusesParameters(err error) bool {
	for _, rc := range []tpm2.TPMRC{tpm2.TPMRCValue, tpm2.TPMRCKeySize, tpm2.TPMRCCurve, tpm2.TPMRCAsymmetric, tpm2.TPMRCType, tpm2.TPMRCScheme, tpm2.TPMRCHash, tpm2.TPMRCSize, tpm2.TPMRCSymmetric} {
		if errors.Is(err, rc) {
			return true
		}
	}
	return false
}

// lostError is a connection that broke.
type lostError struct{ cause error }

func (e *lostError) Error() string { return e.cause.Error() }
func (e *lostError) Unwrap() error { return e.cause }

func lost(err error) bool {
	var l *lostError
	return errors.As(err, &l)
}

// gone reports whether the TPM says that an object that was loaded is not (TPM_RC_REFERENCE_H0 and following): another
// program flushed it, or the TPM was restarted behind a proxy.
func gone(err error) bool {
	var rc tpm2.TPMRC
	return errors.As(err, &rc) && rc >= tpm2.TPMRCReferenceH0 && rc <= tpm2.TPMRCReferenceS6
}
