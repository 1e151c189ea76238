package dps

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// AttestationType names how a device proves itself.
type AttestationType string

// The attestation types.
const (
	AttestationNone         AttestationType = "none"
	AttestationTPM          AttestationType = "tpm"
	AttestationX509         AttestationType = "x509"
	AttestationSymmetricKey AttestationType = "symmetricKey"
)

// UnmarshalJSON folds the spelling: Azure's clients write enum values in any case.
func (t *AttestationType) UnmarshalJSON(b []byte) error {
	return unmarshalEnum(b, t, AttestationNone, AttestationTPM, AttestationX509, AttestationSymmetricKey)
}

// ProvisioningStatus lets an enrollment admit devices or refuse them.
type ProvisioningStatus string

// The provisioning statuses. Empty means enabled, and so does null, which is kept and shown as null, as Azure does.
const (
	EnrollmentEnabled    ProvisioningStatus = "enabled"
	EnrollmentDisabled   ProvisioningStatus = "disabled"
	EnrollmentStatusNull ProvisioningStatus = "null"
)

// UnmarshalJSON folds the spelling.
func (s *ProvisioningStatus) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		*s = EnrollmentStatusNull
		return nil
	}
	return unmarshalEnum(b, s, EnrollmentEnabled, EnrollmentDisabled)
}

// MarshalJSON prints null as null.
func (s ProvisioningStatus) MarshalJSON() ([]byte, error) {
	if s == EnrollmentStatusNull {
		return []byte("null"), nil
	}
	return json.Marshal(string(s))
}

// AllocationPolicy says how a hub is chosen.
type AllocationPolicy string

// The allocation policies. Empty means the service's own.
const (
	AllocationHashed     AllocationPolicy = "hashed"
	AllocationGeoLatency AllocationPolicy = "geoLatency"
	AllocationStatic     AllocationPolicy = "static"
	AllocationCustom     AllocationPolicy = "custom"
)

// UnmarshalJSON folds the spelling.
func (p *AllocationPolicy) UnmarshalJSON(b []byte) error {
	return unmarshalEnum(b, p, AllocationHashed, AllocationGeoLatency, AllocationStatic, AllocationCustom)
}

func unmarshalEnum[T ~string](b []byte, dst *T, values ...T) error {
	if bytes.Equal(b, []byte("null")) {
		return nil
	}
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	for _, v := range values {
		if strings.EqualFold(s, string(v)) {
			*dst = v
			return nil
		}
	}
	return fmt.Errorf("value %q is not one of %v", s, values)
}

// IndividualEnrollment is the standing permission for one device, in wire form.
type IndividualEnrollment struct {
	RegistrationID            string             `json:"registrationId"`
	DeviceID                  string             `json:"deviceId,omitempty"`
	RegistrationState         *RegistrationState `json:"registrationState,omitempty"`
	OptionalDeviceInformation json.RawMessage    `json:"optionalDeviceInformation,omitempty"`
	Enrollment
}

// EnrollmentGroup is the standing permission for every device that a CA or a key vouches for, in wire form.
type EnrollmentGroup struct {
	EnrollmentGroupID string `json:"enrollmentGroupId"`
	Enrollment
}

// Enrollment holds what individual enrollments and enrollment groups share.
type Enrollment struct {
	Attestation                *Attestation                `json:"attestation,omitempty"`
	Capabilities               *Capabilities               `json:"capabilities,omitempty"`
	IoTHubHostName             string                      `json:"iotHubHostName,omitempty"`
	InitialTwin                *InitialTwin                `json:"initialTwin,omitempty"`
	ETag                       string                      `json:"etag,omitempty"`
	ProvisioningStatus         ProvisioningStatus          `json:"provisioningStatus,omitempty"`
	ReprovisionPolicy          *ReprovisionPolicy          `json:"reprovisionPolicy,omitempty"`
	CreatedDateTimeUTC         *Time                       `json:"createdDateTimeUtc,omitempty"`
	LastUpdatedDateTimeUTC     *Time                       `json:"lastUpdatedDateTimeUtc,omitempty"`
	AllocationPolicy           AllocationPolicy            `json:"allocationPolicy,omitempty"`
	IoTHubs                    []string                    `json:"iotHubs,omitempty"`
	CustomAllocationDefinition *CustomAllocationDefinition `json:"customAllocationDefinition,omitempty"`
	CredentialPolicyName       string                      `json:"credentialPolicyName,omitempty"`

	// ClientCertificateIssuancePolicy lets devices have operational certificates; without it they get none.
	ClientCertificateIssuancePolicy *ClientCertificateIssuancePolicy `json:"clientCertificateIssuancePolicy,omitempty"`

	// Parent is the edge device that the device is put below at its hub: its registration ID or its device ID. An extension of this
	// service, which does not go into portable exports.
	Parent string `json:"parent,omitempty"`
}

// ClientCertificateIssuancePolicy names the CA that signs operational certificates for an enrollment's devices (service API,
// 2021-11-01-preview).
type ClientCertificateIssuancePolicy struct {
	CertificateAuthorityName string `json:"certificateAuthorityName"`
}

// Attestation is the wire's attestationMechanism: a type and exactly the member that goes with it.
type Attestation struct {
	Type         AttestationType          `json:"type"`
	TPM          *TPMAttestation          `json:"tpm,omitempty"`
	X509         *X509Attestation         `json:"x509,omitempty"`
	SymmetricKey *SymmetricKeyAttestation `json:"symmetricKey,omitempty"`
}

// TPMAttestation holds a TPM's public keys: base64 of whole TPM2B_PUBLIC structures.
type TPMAttestation struct {
	EndorsementKey string `json:"endorsementKey,omitempty"`
	StorageRootKey string `json:"storageRootKey,omitempty"`
}

// X509Attestation has exactly one member: leaves for an individual enrollment; signing certificates, or the names of
// uploaded ones, for a group.
type X509Attestation struct {
	ClientCertificates  *X509Certificates `json:"clientCertificates,omitempty"`
	SigningCertificates *X509Certificates `json:"signingCertificates,omitempty"`
	CAReferences        *CAReferences     `json:"caReferences,omitempty"`
}

// X509Certificates are the two slots that a certificate is rolled over between.
type X509Certificates struct {
	Primary   *X509Certificate `json:"primary,omitempty"`
	Secondary *X509Certificate `json:"secondary,omitempty"`
}

// X509Certificate carries a certificate in (PEM, or base64 DER) and its description out.
type X509Certificate struct {
	Certificate string               `json:"certificate,omitempty"`
	Info        *X509CertificateInfo `json:"info,omitempty"`
}

// Same reports whether both slots hold the same certificate with the same description.
func (c *X509Certificate) Same(other *X509Certificate) bool {
	return c != nil && other != nil && c.Certificate == other.Certificate && (c.Info == other.Info || c.Info != nil && other.Info != nil && *c.Info == *other.Info)
}

// X509CertificateInfo describes a certificate. All members are always present.
type X509CertificateInfo struct {
	SubjectName      string `json:"subjectName"`
	SHA1Thumbprint   string `json:"sha1Thumbprint"`
	SHA256Thumbprint string `json:"sha256Thumbprint"`
	IssuerName       string `json:"issuerName"`
	NotBeforeUTC     string `json:"notBeforeUtc"`
	NotAfterUTC      string `json:"notAfterUtc"`
	SerialNumber     string `json:"serialNumber"`
	Version          int    `json:"version"`
}

// CAReferences names certificates that were uploaded to the service.
type CAReferences struct {
	Primary   string `json:"primary,omitempty"`
	Secondary string `json:"secondary,omitempty"`
}

// SymmetricKeyAttestation holds two base64 keys of 16 to 64 octets. Its String and log forms are redacted; only JSON,
// which is the wire, shows them.
type SymmetricKeyAttestation struct {
	PrimaryKey   string `json:"primaryKey,omitempty"`
	SecondaryKey string `json:"secondaryKey,omitempty"`
}

// String hides the keys.
func (SymmetricKeyAttestation) String() string { return "[redacted]" }

// GoString hides the keys.
func (SymmetricKeyAttestation) GoString() string { return "[redacted]" }

// Capabilities of a device in its hub.
type Capabilities struct {
	IoTEdge bool `json:"iotEdge"`
}

// InitialTwin is written to a device's twin when the service creates the device in a hub. Its parts are free-form JSON
// objects, kept byte for byte.
type InitialTwin struct {
	Tags       json.RawMessage `json:"tags,omitempty"`
	Properties *TwinProperties `json:"properties,omitempty"`
}

// TwinProperties holds the desired properties of an initial twin.
type TwinProperties struct {
	Desired json.RawMessage `json:"desired,omitempty"`
}

// ReprovisionPolicy says what happens when a device registers again.
type ReprovisionPolicy struct {
	UpdateHubAssignment bool `json:"updateHubAssignment"`
	MigrateDeviceData   bool `json:"migrateDeviceData"`
}

// CustomAllocationDefinition names the webhook that chooses a hub.
type CustomAllocationDefinition struct {
	WebhookURL string `json:"webhookUrl"`
	APIVersion string `json:"apiVersion"`
}

// A BulkOperation is up to ten enrollments, or groups, and what to do with each.
type BulkOperation struct {
	Enrollments      []json.RawMessage `json:"enrollments"`
	EnrollmentGroups []json.RawMessage `json:"enrollmentGroups"`
	Mode             BulkMode          `json:"mode"`
}

// BulkMode says what a bulk operation does.
type BulkMode string

// The modes.
const (
	BulkCreate            BulkMode = "create"
	BulkUpdate            BulkMode = "update"
	BulkUpdateIfMatchETag BulkMode = "updateIfMatchETag"
	BulkDelete            BulkMode = "delete"
)

// UnmarshalJSON folds the spelling.
func (m *BulkMode) UnmarshalJSON(b []byte) error {
	return unmarshalEnum(b, m, BulkCreate, BulkUpdate, BulkUpdateIfMatchETag, BulkDelete)
}

// A BulkResult says which items of a bulk operation failed.
type BulkResult struct {
	Errors       []BulkError `json:"errors"`
	IsSuccessful bool        `json:"isSuccessful"`
}

// A BulkError is one item that failed, by the one of its IDs that it has.
type BulkError struct {
	RegistrationID    string `json:"registrationId,omitempty"`
	EnrollmentGroupID string `json:"enrollmentGroupId,omitempty"`
	ErrorCode         Code   `json:"errorCode"`
	ErrorStatus       string `json:"errorStatus"`
}

// Check says what keeps a from being a well-formed attestation: the type, and exactly the member that goes with it.
func (a *Attestation) Check() error {
	if a == nil {
		return errors.New("attestation is missing")
	}
	members := 0
	for _, present := range []bool{a.TPM != nil, a.X509 != nil, a.SymmetricKey != nil} {
		if present {
			members++
		}
	}
	want := map[AttestationType]bool{
		AttestationTPM: a.TPM != nil, AttestationX509: a.X509 != nil,
		// A symmetric-key attestation without keys asks the service to make them.
		AttestationSymmetricKey: a.SymmetricKey != nil || members == 0,
	}
	if ok, known := want[a.Type]; !known || !ok || members > 1 {
		return fmt.Errorf("attestation of type %q must have exactly the member of that name", a.Type)
	}
	if x := a.X509; x != nil {
		kinds := 0
		for _, present := range []bool{x.ClientCertificates != nil, x.SigningCertificates != nil, x.CAReferences != nil} {
			if present {
				kinds++
			}
		}
		if kinds != 1 {
			return errors.New("x509 attestation must have exactly one of clientCertificates, signingCertificates and caReferences")
		}
	}
	return nil
}
