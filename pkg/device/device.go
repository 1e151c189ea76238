// Package device is the device's side of its first power-on: it reads the stamp that the factory left, registers, and
// keeps the hub that it was assigned.
//
// [Register] speaks HTTPS, MQTT or AMQP as Azure's device SDKs do (device API, sections 10 to 12).
package device

import (
	"context"
	"crypto"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/touchmark/touchmark/internal/durable"
	"github.com/touchmark/touchmark/pkg/dps"
)

// A Stamp is what the factory left in a device's storage.
type Stamp struct {
	IDScope        string
	GlobalEndpoint string
	RegistrationID string
	// Certificates is the leaf and what goes behind it, DER; for x509.
	Certificates [][]byte
	// PrivateKey is the leaf's key, unless KeyURI says where it is.
	PrivateKey crypto.Signer
	KeyURI     string
	// SymmetricKey is secret; for symmetric keys, unless KeyURI says where it is.
	SymmetricKey []byte
	// Symmetric: the device attests by a symmetric key.
	Symmetric bool
	// TPM: the device attests by its TPM.
	TPM bool
}

const (
	stampFile      = "provisioning.json"
	assignmentFile = "assignment.json"
	maxFile        = 1 << 20
)

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading the stamp: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s is larger than %d octets", path, maxFile)
	}
	return b, err
}

// LoadStamp reads a stamp directory: provisioning.json and the files that it names beside it.
func LoadStamp(dir string) (Stamp, error) {
	var s Stamp
	b, err := readFile(filepath.Join(dir, stampFile))
	if err != nil {
		return s, err
	}
	var doc struct {
		IDScope          string `json:"idScope"`
		GlobalEndpoint   string `json:"globalEndpoint"`
		RegistrationID   string `json:"registrationId"`
		Attestation      string `json:"attestation"`
		CertificateChain string `json:"certificateChain"`
		PrivateKey       string `json:"privateKey"`
		KeyURI           string `json:"keyUri"`
		SymmetricKey     string `json:"symmetricKey"`
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return s, fmt.Errorf("%s is not a stamp", filepath.Join(dir, stampFile)) // its text may hold a key
	}
	s = Stamp{IDScope: doc.IDScope, GlobalEndpoint: doc.GlobalEndpoint, RegistrationID: doc.RegistrationID, KeyURI: doc.KeyURI}
	if err := errors.Join(dps.CheckIDScope(s.IDScope), dps.CheckRegistrationID(s.RegistrationID)); err != nil {
		return s, fmt.Errorf("stamp %s: %w", dir, err)
	}
	switch doc.Attestation {
	case "symmetricKey":
		s.Symmetric = true
		if s.KeyURI != "" && doc.SymmetricKey == "" {
			return s, nil
		}
		if s.SymmetricKey, err = base64.StdEncoding.DecodeString(doc.SymmetricKey); err != nil || len(s.SymmetricKey) == 0 {
			return s, fmt.Errorf("stamp %s: symmetricKey is not base64", dir)
		}
		return s, nil
	case "tpm":
		s.TPM = true
		return s, nil
	case "x509":
	default:
		return s, fmt.Errorf("stamp %s: attestation %q is not known", dir, doc.Attestation)
	}
	beside := func(name string) ([]byte, error) {
		if name == "" || name != filepath.Base(name) || strings.HasPrefix(name, ".") {
			return nil, fmt.Errorf("stamp %s: %q is not the name of a file beside it", dir, name)
		}
		return readFile(filepath.Join(dir, name))
	}
	chain, err := beside(doc.CertificateChain)
	if err != nil {
		return s, err
	}
	for {
		var block *pem.Block
		if block, chain = pem.Decode(chain); block == nil {
			break
		}
		s.Certificates = append(s.Certificates, block.Bytes)
	}
	if len(s.Certificates) == 0 {
		return s, fmt.Errorf("stamp %s: %s holds no certificate", dir, doc.CertificateChain)
	}
	if doc.KeyURI != "" {
		return s, nil
	}
	keyPEM, err := beside(doc.PrivateKey)
	if err != nil {
		return s, err
	}
	defer clear(keyPEM)
	block, _ := pem.Decode(keyPEM)
	if block == nil {
		return s, fmt.Errorf("stamp %s: %s holds no key", dir, doc.PrivateKey)
	}
	defer clear(block.Bytes)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	signer, ok := key.(crypto.Signer)
	if err != nil || !ok {
		return s, fmt.Errorf("stamp %s: %s is not a PKCS #8 key", dir, doc.PrivateKey)
	}
	s.PrivateKey = signer
	return s, nil
}

// certificate returns the stamp's client certificate with its key.
func (s *Stamp) certificate(signer crypto.Signer) (tls.Certificate, error) {
	if signer == nil {
		signer = s.PrivateKey
	}
	if signer == nil {
		return tls.Certificate{}, fmt.Errorf("the key of %s is at %s and was not opened", s.RegistrationID, s.KeyURI)
	}
	return tls.Certificate{Certificate: s.Certificates, PrivateKey: signer}, nil
}

// token makes a SAS token that is good for an hour (device API, section 8.1).
func (s *Stamp) token(ctx context.Context, mac MAC, now time.Time) (string, error) {
	sr := url.QueryEscape(s.IDScope + "/registrations/" + s.RegistrationID)
	se := strconv.FormatInt(now.Add(time.Hour).Unix(), 10)
	text := []byte(sr + "\n" + se)
	var sum []byte
	switch {
	case s.SymmetricKey != nil:
		h := hmac.New(sha256.New, s.SymmetricKey)
		h.Write(text)
		sum = h.Sum(nil)
	case mac == nil:
		return "", fmt.Errorf("the key of %s is at %s and was not opened", s.RegistrationID, s.KeyURI)
	default:
		var err error
		if sum, err = mac.MAC(ctx, nil, text); err != nil {
			return "", err
		}
	}
	return "SharedAccessSignature sr=" + sr + "&sig=" + url.QueryEscape(base64.StdEncoding.EncodeToString(sum)) + "&se=" + se + "&skn=registration", nil
}

// SaveAssignment keeps what a device was assigned beside its stamp: written whole, flushed, renamed over what was there.
func SaveAssignment(dir string, state *dps.RegistrationState) error {
	b, err := json.MarshalIndent(state, "", "  ")
	if err != nil {
		return err
	}
	if err := durable.Replace(filepath.Join(dir, assignmentFile), append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("keeping the assignment: %w", err)
	}
	return nil
}
