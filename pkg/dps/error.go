package dps

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// A Code is the wire's six-digit error code: the HTTP status times a thousand, plus a detail.
type Code int

// The codes in use. Where Azure's own is not known the value follows its pattern.
const (
	CodeBadRequest       Code = 400000
	CodeInvalidArgument  Code = 400004
	CodeBadCSR           Code = 400012
	CodeCustomAllocation Code = 400207
	CodeNoHub            Code = 400208
	CodeHubRefused       Code = 400209
	CodeHubUnreachable   Code = 401001
	CodeUnauthorized     Code = 401002
	CodeQuota            Code = 403002
	CodeNotFound         Code = 404000
	CodeNoEnrollment     Code = 404201
	CodeNoGroup          Code = 404202
	CodeNoCertificate    Code = 404203
	CodeNoService        Code = 404204
	CodeMethodNotAllowed Code = 405000
	CodeEnrollmentExists Code = 409201
	CodeGroupExists      Code = 409202
	CodeServiceExists    Code = 409203
	CodeETagMismatch     Code = 412001
	CodeTooLarge         Code = 413000
	CodeUnsupportedMedia Code = 415000
	CodeThrottled        Code = 429001
	CodeInternal         Code = 500000
	// Ours: a bundle that is damaged, one that nobody trusted signed, one for another ID scope, one sealed to others, one that
	// does not show where its devices' keys live, one whose production order does not allow it.
	CodeBundleCorrupt     Code = 400901
	CodeBundleUntrusted   Code = 400902
	CodeBundleScope       Code = 400903
	CodeBundleSealed      Code = 400904
	CodeBundleResidency   Code = 400905
	CodeBundleOrder       Code = 400906
	CodeServiceOverloaded Code = 503000
)

// Status returns the HTTP status of the code.
func (c Code) Status() int { return int(c) / 1000 }

// An Error is what a caller may see of a failure: code, tracking ID and a safe message. Its cause goes to the log, under
// the same tracking ID, and is never sent.
type Error struct {
	Code       Code
	TrackingID string // a UUID
	Message    string
	Time       time.Time
	Cause      error
	// RetryAfter is what the caller is asked to wait, in seconds, where that is not [RetryAfter]. It travels beside the document.
	RetryAfter string
}

// NewError makes an error with a fresh tracking ID. The cause may be nil.
func NewError(code Code, message string, cause error) *Error {
	return &Error{Code: code, TrackingID: NewUUID(), Message: message, Time: time.Now(), Cause: cause}
}

// AsError returns err as an *Error; anything that is not one becomes "Internal error" with err as its cause.
func AsError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return NewError(CodeInternal, "Internal error", err)
}

// Error returns the safe text followed by the cause; it is for logs.
func (e *Error) Error() string {
	if e.Cause != nil {
		return fmt.Sprintf("%d %s: %v", int(e.Code), e.Message, e.Cause)
	}
	return fmt.Sprintf("%d %s", int(e.Code), e.Message)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Cause }

// MarshalJSON renders the wire's error document, without the cause.
func (e *Error) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		ErrorCode  Code   `json:"errorCode"`
		TrackingID string `json:"trackingId"`
		Message    string `json:"message"`
		Timestamp  Time   `json:"timestampUtc"`
	}{e.Code, e.TrackingID, e.Message, Time{Time: e.Time}})
}

// NewUUID returns a random UUID (RFC 9562, version 4) in lower-case text.
func NewUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // crypto/rand.Read never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return uuid(b)
}

func uuid(b [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// NewOrderedID returns a UUID that is greater, as text, than those of earlier times (RFC 9562, version 7, with the microseconds
// in rand_a).
func NewOrderedID(at time.Time) string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	return orderedID(at, b)
}

// FirstOrderedID returns a text that ordered IDs of earlier times are below, and those of that time and later above.
func FirstOrderedID(at time.Time) string { return orderedID(at, [16]byte{}) }

func orderedID(at time.Time, b [16]byte) string {
	micro := uint64(at.UnixMicro())
	binary.BigEndian.PutUint64(b[:8], micro/1000<<16|7<<12|micro%1000<<2|uint64(b[7]&3))
	b[8] = b[8]&0x3f | 0x80
	return uuid(b)
}
