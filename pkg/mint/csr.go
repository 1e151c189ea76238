package mint

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/fixture"
)

// maxCSR bounds a certificate signing request.
const maxCSR = 64 << 10

// readCSR takes a device's public key from its certificate signing request: from a file, or from the program that prints it.
// The request must be signed with the key that it holds (RFC 2986 §3), which shows that whoever made it has the private half.
func (r *run) readCSR(ctx context.Context, u *unit) error {
	var raw []byte
	var from string
	var err error
	if cmd := r.Profile.csrCommand; cmd != nil {
		var res fixture.Result
		res, err = cmd.Run(ctx, fixture.Input{Fields: r.List.fields(u.row)})
		raw, from = res.Stdout, strings.Join(res.Words, " ")
		if err != nil {
			err = fmt.Errorf("csr-command %w", err)
		}
	} else {
		from = r.Profile.csr.Expand(r.List.values(u.row.Fields))
		raw, err = readCSRFile(from)
	}
	if err != nil {
		return err
	}
	csr, err := parseCSR(raw)
	if err != nil {
		return fmt.Errorf("certificate signing request %s: %w", from, err)
	}
	if cn := csr.Subject.CommonName; cn != "" && dps.Fold(cn) != dps.Fold(u.row.RegistrationID) {
		return fmt.Errorf("certificate signing request %s is for %q, and the unit is %s: is it another device's?", from, cn, u.row.RegistrationID)
	}
	alg, err := ca.AlgorithmOf(csr.PublicKey)
	if err == nil && alg != r.alg {
		err = fmt.Errorf("its key is %s, and the profile wants %s", alg, r.alg)
	}
	if err != nil {
		return fmt.Errorf("certificate signing request %s: %w", from, err)
	}
	u.pub = csr.PublicKey
	u.keyHash, err = publicKeyHash(u.pub)
	return err
}

// sameCSR reads the request again of a unit that was begun: it may have been signed, or not. With the same key in it the same
// certificate is signed; with another one the unit is given up, and its plan, with its serial number, is never used.
func (r *run) sameCSR(ctx context.Context, u *unit) error {
	hash := u.keyHash
	if err := r.readCSR(ctx, u); err != nil {
		return err
	}
	if !bytes.Equal(hash, u.keyHash) {
		return errNoKey
	}
	return nil
}

func readCSRFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("reading its certificate signing request: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxCSR+1))
	if err != nil {
		return nil, fmt.Errorf("reading its certificate signing request: %w", err)
	}
	return b, nil
}

// parseCSR parses a request, PEM or DER, and checks its proof of possession.
func parseCSR(b []byte) (*x509.CertificateRequest, error) {
	if len(b) == 0 || len(b) > maxCSR {
		return nil, fmt.Errorf("it has %d octets: want 1 to %d", len(b), maxCSR)
	}
	if block, _ := pem.Decode(b); block != nil {
		if block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST" {
			return nil, fmt.Errorf("it holds a %.40q", block.Type)
		}
		b = block.Bytes
	}
	csr, err := x509.ParseCertificateRequest(b)
	if err != nil {
		return nil, errors.New("it is no PKCS #10 request")
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("whoever made it does not have its key: %w", err)
	}
	return csr, nil
}
