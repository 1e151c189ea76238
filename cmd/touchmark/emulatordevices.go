package main

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"os"
	"path/filepath"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/dps"
)

// writeDevices writes what was asked for of the two groups.
func (e *emulator) writeDevices() error {
	if dir := e.o.deviceCAOut; dir != "" {
		key, err := keyPEM(e.deviceKey)
		if err != nil {
			return err
		}
		if err := writeFiles(dir, map[string][]byte{deviceCAFile: ca.EncodeChain(e.deviceCA), deviceCAKeyFile: key}); err != nil {
			return err
		}
	}
	for _, dir := range e.o.symmetricStamps {
		doc := e.stamp(dir, dps.AttestationSymmetricKey)
		doc["symmetricKey"] = base64.StdEncoding.EncodeToString(attest.DeriveKey(e.groupKey, filepath.Base(dir)))
		if err := writeStamp(dir, doc, nil); err != nil {
			return err
		}
	}
	for _, dir := range e.o.certificateStamps {
		key, chain, err := e.leaf(filepath.Base(dir))
		if err != nil {
			return err
		}
		doc := e.stamp(dir, dps.AttestationX509)
		doc["certificateChain"], doc["privateKey"] = "device.pem", "device.key"
		if err := writeStamp(dir, doc, map[string][]byte{"device.pem": chain, "device.key": key}); err != nil {
			return err
		}
	}
	return nil
}

func (e *emulator) stamp(dir string, a dps.AttestationType) map[string]string {
	return map[string]string{"idScope": e.d.scope, "globalEndpoint": e.o.hostnames[0], "registrationId": filepath.Base(dir), "attestation": string(a)}
}

func writeStamp(dir string, doc map[string]string, files map[string][]byte) error {
	b, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		return err
	}
	if files == nil {
		files = make(map[string][]byte)
	}
	files["provisioning.json"] = append(b, '\n')
	return writeFiles(dir, files)
}

func writeFiles(dir string, files map[string][]byte) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, b := range files {
		if err := writeFile(filepath.Join(dir, name), b, 0o600, true); err != nil {
			return err
		}
	}
	return nil
}

// leaf makes a device's key and certificate. The same device has the same key in every run under a seed.
func (e *emulator) leaf(id string) (key, chain []byte, err error) {
	if len(id) > dps.MaxCommonName {
		return nil, nil, usageError{fmt.Errorf("--stamp-x509 %s: a certificate's common name holds at most %d characters", id, dps.MaxCommonName)}
	}
	priv, err := e.d.seed.Key("device " + id)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(e.d.seed.Bytes("device "+id+", serial number", 16)), Subject: pkix.Name{CommonName: id},
		NotBefore: e.deviceCA.NotBefore, NotAfter: e.deviceCA.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, e.deviceCA, priv.Public(), e.d.seed.Signer(e.deviceKey))
	if err != nil {
		return nil, nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	key, err = keyPEM(priv)
	return key, ca.EncodeChain(cert), err
}
