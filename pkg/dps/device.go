package dps

import "encoding/json"

// A Status says what became of a registration. Devices compare it case-sensitively.
type Status string

// The statuses. Unassigned is for the service API only: a device never sees it.
const (
	Unassigned Status = "unassigned"
	Assigning  Status = "assigning"
	Assigned   Status = "assigned"
	Failed     Status = "failed"
	Disabled   Status = "disabled"
)

// Terminal reports whether a device that sees this status stops asking.
func (s Status) Terminal() bool { return s == Assigned || s == Failed || s == Disabled }

// A Substatus says how an assigned device came to its hub.
type Substatus string

// The substatuses.
const (
	InitialAssignment                Substatus = "initialAssignment"
	DeviceDataMigrated               Substatus = "deviceDataMigrated"
	DeviceDataReset                  Substatus = "deviceDataReset"
	ReprovisionedToInitialAssignment Substatus = "reprovisionedToInitialAssignment"
)

// RegisterRequest is the body of a register request. Every member is optional on some transport.
type RegisterRequest struct {
	RegistrationID string          `json:"registrationId,omitempty"`
	TPM            *TPMAttestation `json:"tpm,omitempty"`
	Payload        json.RawMessage `json:"payload,omitempty"`
	// CSR is base64 DER (2025-07-01-preview and later), ClientCertificateCSR its older name (2021-11-01-preview).
	CSR                  string `json:"csr,omitempty"`
	ClientCertificateCSR string `json:"clientCertificateCsr,omitempty"`
}

// OperationStatus answers register and status requests. RegistrationState is absent from the register answer and present
// in every status answer.
type OperationStatus struct {
	OperationID       string             `json:"operationId"`
	Status            Status             `json:"status"`
	RegistrationState *RegistrationState `json:"registrationState,omitempty"`
	// RetryAfter is what the device is asked to wait, in seconds, where that is not [RetryAfter]. It travels beside the
	// document, and only while the status is not terminal.
	RetryAfter string `json:"-"`
}

// RegistrationState is the registration record as a device sees it, and as the service API shows it.
type RegistrationState struct {
	RegistrationID         string             `json:"registrationId"`
	CreatedDateTimeUTC     *Time              `json:"createdDateTimeUtc,omitempty"`
	AssignedHub            string             `json:"assignedHub,omitempty"`
	DeviceID               string             `json:"deviceId,omitempty"`
	Status                 Status             `json:"status"`
	Substatus              Substatus          `json:"substatus,omitempty"`
	ErrorCode              int                `json:"errorCode,omitempty"`
	ErrorMessage           string             `json:"errorMessage,omitempty"`
	LastUpdatedDateTimeUTC *Time              `json:"lastUpdatedDateTimeUtc,omitempty"`
	ETag                   string             `json:"etag,omitempty"`
	X509                   *struct{}          `json:"x509,omitempty"`
	SymmetricKey           *SymmetricKeyState `json:"symmetricKey,omitempty"`
	TPM                    *TPMState          `json:"tpm,omitempty"`
	Payload                json.RawMessage    `json:"payload,omitempty"`
	// IssuedCertificateChain answers a CSR, in status answers alone: DER of the operational certificate, the intermediates and the
	// root. IssuedClientCertificate is the same as PEM, in answer to a ClientCertificateCSR (device API, section 15.2).
	IssuedCertificateChain  [][]byte `json:"issuedCertificateChain,omitempty"`
	IssuedClientCertificate string   `json:"issuedClientCertificate,omitempty"`
}

// SymmetricKeyState names the enrollment group that a symmetric-key device came in by.
type SymmetricKeyState struct {
	EnrollmentGroupID string `json:"enrollmentGroupId"`
}

// TPMState carries the device's key for its hub: an activation blob, which only the device's TPM opens.
type TPMState struct {
	AuthenticationKey []byte `json:"authenticationKey"`
}
