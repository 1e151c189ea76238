package azuretest

import (
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"strings"
	"time"
)

// attest takes an attestation mechanism apart (section 1.7): it keeps the secrets, and returns what is shown.
func (r *record) attest(kind string, v any, old *record) (object, error) {
	in, _ := noNulls(v).(object)
	if in == nil {
		return nil, refuse(400004, "The attestation is missing.")
	}
	if err := canonical(in, "type", "tpm", "x509", "symmetricKey"); err != nil || in["type"] == nil {
		return nil, refuse(400004, "The attestation's type is invalid.")
	}
	if old != nil && old.doc["attestation"].(object)["type"] != in["type"] {
		return nil, refuse(400004, "The attestation's type cannot be changed.")
	}
	for _, member := range []string{"tpm", "x509", "symmetricKey"} {
		if in[member] != nil && member != in["type"] {
			return nil, refuse(400004, "The attestation has a member of another type.")
		}
	}
	switch in["type"] {
	case "symmetricKey":
		given, _ := in["symmetricKey"].(object)
		r.keys = make(map[string]string)
		for _, slot := range []string{"primary", "secondary"} {
			key, _ := given[slot+"Key"].(string)
			if key == "" {
				b := make([]byte, 64)
				_, _ = rand.Read(b)
				key = base64.StdEncoding.EncodeToString(b)
			}
			if b, err := base64.StdEncoding.DecodeString(key); err != nil || len(b) < 16 || len(b) > 64 {
				return nil, refuse(400004, "A key is not base64 of 16 to 64 bytes.")
			}
			r.keys[slot] = key
		}
		return object{"type": "symmetricKey"}, nil
	case "tpm":
		tpm, _ := in["tpm"].(object)
		ek, _ := tpm["endorsementKey"].(string)
		if b, err := base64.StdEncoding.DecodeString(ek); err != nil || len(b) == 0 || kind == group {
			return nil, refuse(400004, "The endorsement key is missing or invalid.")
		}
		return object{"type": "tpm", "tpm": tpm}, nil
	}
	x, _ := in["x509"].(object)
	if len(x) != 1 {
		return nil, refuse(400004, "Exactly one of clientCertificates, signingCertificates and caReferences is required.")
	}
	if refs := x["caReferences"]; refs != nil && kind == group {
		return object{"type": "x509", "x509": object{"caReferences": refs}}, nil
	}
	member := map[string]string{individual: "clientCertificates", group: "signingCertificates"}[kind]
	certs, _ := x[member].(object)
	if len(certs) == 0 {
		return nil, refuse(400004, "%s is required.", member)
	}
	r.der = make(map[string][]byte)
	shown := make(object)
	for _, slot := range []string{"primary", "secondary"} {
		c, _ := certs[slot].(object)
		if c == nil {
			continue
		}
		der, err := certificate(c, slot, old)
		if err != nil {
			return nil, err
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, refuse(400004, "A certificate is invalid.")
		}
		r.der[slot], shown[slot] = der, object{"info": info(cert)}
	}
	if first, _ := certs["primary"].(object); shown["secondary"] == nil && first["certificate"] != nil {
		r.der["secondary"], shown["secondary"] = r.der["primary"], shown["primary"]
	}
	return object{"type": "x509", "x509": object{member: shown}}, nil
}

// certificate returns what a slot holds: what came, or what was there if the description says so.
func certificate(c object, slot string, old *record) ([]byte, error) {
	if text, _ := c["certificate"].(string); text != "" {
		if block, _ := pem.Decode([]byte(text)); block != nil {
			return block.Bytes, nil
		}
		der, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(text), ""))
		if err != nil {
			return nil, refuse(400004, "A certificate is neither PEM nor base64.")
		}
		return der, nil
	}
	desc, _ := c["info"].(object)
	print, _ := desc["sha256Thumbprint"].(string)
	if old != nil && old.der[slot] != nil && strings.EqualFold(print, fmt.Sprintf("%X", sha256.Sum256(old.der[slot]))) {
		return old.der[slot], nil
	}
	return nil, refuse(400004, "A certificate is missing.")
}

func info(c *x509.Certificate) object {
	return object{
		"subjectName": c.Subject.String(), "issuerName": c.Issuer.String(), "version": c.Version, "serialNumber": fmt.Sprintf("%X", c.SerialNumber.Bytes()),
		"sha1Thumbprint": fmt.Sprintf("%X", sha1.Sum(c.Raw)), "sha256Thumbprint": fmt.Sprintf("%X", sha256.Sum256(c.Raw)),
		"notBeforeUtc": c.NotBefore.UTC().Format(time.RFC3339), "notAfterUtc": c.NotAfter.UTC().Format(time.RFC3339),
	}
}
