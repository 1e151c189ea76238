package device

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/touchmark/touchmark/pkg/dps"
)

// A TPM is a device's TPM as registering with it needs it (device API, section 9). hsm/tpm's Identity is one, and [SoftTPM].
type TPM interface {
	// Keys returns the endorsement key and the storage root key as whole TPM2B_PUBLIC structures.
	Keys(ctx context.Context) (ek, srk []byte, err error)
	// Activate takes in the key of an activation blob, in place of the one before.
	Activate(ctx context.Context, blob []byte) error
	// MAC computes HMAC-SHA256 of data with that key, and appends it to dst.
	MAC
}

// A challenger is a talker whose protocol can challenge a TPM.
type challenger interface {
	talker
	// challenge asks for an activation blob.
	challenge(ctx context.Context, body []byte) ([]byte, error)
	// prove sets the token that the requests from now on go with.
	prove(token string)
}

var errNoBlob = errors.New("the service sends no key for the device's TPM")

// tpmBody is the register body of a device with a TPM.
func tpmBody(ctx context.Context, cfg *Config) ([]byte, error) {
	if cfg.TPM == nil {
		return nil, fmt.Errorf("%s attests by its TPM, which was not opened", cfg.Stamp.RegistrationID)
	}
	ek, srk, err := cfg.TPM.Keys(ctx)
	if err != nil {
		return nil, err
	}
	return json.Marshal(dps.RegisterRequest{RegistrationID: cfg.Stamp.RegistrationID, Payload: cfg.Payload, CSR: base64.StdEncoding.EncodeToString(cfg.CSR), TPM: &dps.TPMAttestation{
		EndorsementKey: base64.StdEncoding.EncodeToString(ek), StorageRootKey: base64.StdEncoding.EncodeToString(srk),
	}})
}

// proveTPM opens the service's challenge in the TPM, and has the talker go on with what that proves.
func proveTPM(ctx context.Context, cfg *Config, t talker, body []byte) error {
	c, ok := t.(challenger)
	if !ok {
		return fmt.Errorf("no TPM attests over %s", cfg.Protocol)
	}
	blob, err := c.challenge(ctx, body)
	if err != nil {
		return err
	}
	token, err := openChallenge(ctx, cfg, blob)
	if err != nil {
		return err
	}
	c.prove(token)
	return nil
}

// openChallenge opens a challenge in the TPM and returns the token that it can sign then.
func openChallenge(ctx context.Context, cfg *Config, blob []byte) (string, error) {
	if err := cfg.TPM.Activate(ctx, blob); err != nil {
		return "", fmt.Errorf("the service's challenge: %w", err)
	}
	return cfg.Stamp.token(ctx, cfg.TPM, cfg.Now())
}

// saslTPM is a TPM's part in the SASL mechanism TPM (device API, section 12.4).
type saslTPM struct {
	EK, SRK []byte // whole TPM2B_PUBLIC structures
	// Activate takes the service's blob, and returns a SAS token that is signed with the key in it.
	Activate func(ctx context.Context, blob []byte) (token string, err error)
}

func newSASLTPM(ctx context.Context, cfg *Config) (*saslTPM, error) {
	ek, srk, err := cfg.TPM.Keys(ctx)
	return &saslTPM{ek, srk, func(ctx context.Context, blob []byte) (string, error) { return openChallenge(ctx, cfg, blob) }}, err
}

// keepKey takes the key in that the device's hub knows it by.
func keepKey(ctx context.Context, cfg *Config, state *dps.RegistrationState) error {
	if !cfg.Stamp.TPM || state.Status != dps.Assigned {
		return nil
	}
	if state.TPM == nil {
		return errNoBlob
	}
	if err := cfg.TPM.Activate(ctx, state.TPM.AuthenticationKey); err != nil {
		return fmt.Errorf("the device's key: %w", err)
	}
	return nil
}

// challenge implements challenger (device API, section 10.5).
func (h *httpsTalker) challenge(ctx context.Context, body []byte) ([]byte, error) {
	status, answered, after, err := h.exchange(ctx, http.MethodPut, "/register", body)
	if err != nil {
		return nil, err
	}
	if status == http.StatusUnauthorized {
		var doc struct {
			AuthenticationKey []byte `json:"authenticationKey"`
		}
		if json.Unmarshal(answered, &doc) == nil && len(doc.AuthenticationKey) > 0 {
			return doc.AuthenticationKey, nil
		}
	}
	if _, _, err := answer(status, answered, after); err != nil {
		return nil, err
	}
	return nil, errNoBlob
}

// prove implements challenger.
func (h *httpsTalker) prove(token string) { h.token = token }
