package residency

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"slices"
	"strings"
	"time"
)

// Makers are the certificates of TPM manufacturers that a reader trusts. They may be used by many goroutines.
type Makers struct {
	roots, intermediates *x509.CertPool
	count                int
}

const (
	maxCertificate = 16 << 10
	maxMakerFile   = 1 << 20
	maxMakerFiles  = 2000
	maxChain       = 8
)

// LoadMakers reads the certificates in the files of a folder that end in .pem, .crt, .cer or .der, PEM or DER. Those that
// are signed by themselves are roots, the others may lead to one.
func LoadMakers(folder fs.FS) (*Makers, error) {
	m := &Makers{roots: x509.NewCertPool(), intermediates: x509.NewCertPool()}
	entries, err := fs.ReadDir(folder, ".")
	if err != nil {
		return nil, err
	}
	if len(entries) > maxMakerFiles {
		return nil, fmt.Errorf("more than %d files", maxMakerFiles)
	}
	for _, e := range entries {
		i := strings.LastIndexByte(e.Name(), '.')
		if i < 0 || !slices.Contains([]string{".pem", ".crt", ".cer", ".der"}, strings.ToLower(e.Name()[i:])) {
			continue
		}
		b, err := readFile(folder, e.Name())
		if err != nil {
			return nil, err
		}
		if err := m.add(b); err != nil {
			return nil, fmt.Errorf("%s: %w", e.Name(), err)
		}
	}
	if m.count == 0 {
		return nil, errors.New("no root certificate is there")
	}
	return m, nil
}

func readFile(folder fs.FS, name string) ([]byte, error) {
	f, err := folder.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxMakerFile+1))
	if err == nil && len(b) > maxMakerFile {
		err = fmt.Errorf("%s is larger than %d octets", name, maxMakerFile)
	}
	return b, err
}

func (m *Makers) add(b []byte) error {
	if !bytes.Contains(b, []byte("-----BEGIN")) {
		return m.addDER(b)
	}
	for {
		block, rest := pem.Decode(b)
		if block == nil {
			return nil
		}
		if block.Type == "CERTIFICATE" {
			if err := m.addDER(block.Bytes); err != nil {
				return err
			}
		}
		b = rest
	}
}

func (m *Makers) addDER(der []byte) error {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	if bytes.Equal(c.RawIssuer, c.RawSubject) {
		m.roots.AddCert(c)
		m.count++
	} else {
		m.intermediates.AddCert(c)
	}
	return nil
}

// An EKCertificate is what a manufacturer says of a TPM.
type EKCertificate struct {
	// Manufacturer, Model and Version are the TCG's attributes of the subject alternative name, as they stand there; the
	// manufacturer is "id:" and eight hexadecimal digits.
	Manufacturer string    `json:"manufacturer,omitempty"`
	Model        string    `json:"model,omitempty"`
	Version      string    `json:"version,omitempty"`
	Serial       string    `json:"serial"`
	Issuer       string    `json:"issuer"`
	NotAfter     time.Time `json:"notAfter"`
	// Root is the subject of the root that it leads to, RootSHA256 the hash of that certificate.
	Root       string `json:"root,omitempty"`
	RootSHA256 string `json:"rootSha256,omitempty"`
}

var (
	oidSAN           = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidManufacturer  = asn1.ObjectIdentifier{2, 23, 133, 2, 1}
	oidModel         = asn1.ObjectIdentifier{2, 23, 133, 2, 2}
	oidVersion       = asn1.ObjectIdentifier{2, 23, 133, 2, 3}
	oidEKCertificate = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
	oidRSAESOAEP     = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 7}
)

// TrimCertificate cuts off what some TPMs have behind the certificate in its NV index: the index is larger than it.
func TrimCertificate(b []byte) ([]byte, error) {
	var raw asn1.RawValue
	if len(b) > maxCertificate {
		return nil, fmt.Errorf("an EK certificate has at most %d octets", maxCertificate)
	}
	if _, err := asn1.Unmarshal(b, &raw); err != nil || raw.Class != asn1.ClassUniversal || raw.Tag != asn1.TagSequence {
		return nil, errors.New("what is there is no certificate in DER")
	}
	return raw.FullBytes, nil
}

// ReadEKCertificate reads an EK certificate (TCG EK Credential Profile 2.5, 3.2) and wants its key to be that of the EK, given as
// the whole TPM2B_PUBLIC. Nobody vouches for it yet: see [Makers.Judge]. Its subject alternative name is critical and holds
// a directory name only, which x509 does not handle: it is checked here, and its mark taken off.
func ReadEKCertificate(ek, der []byte) (*x509.Certificate, *EKCertificate, error) {
	public, err := ParsePublic(ek)
	if err != nil {
		return nil, nil, err
	}
	want, err := PublicKey(public)
	if err != nil {
		return nil, nil, err
	}
	if len(der) > maxCertificate {
		return nil, nil, fmt.Errorf("it is larger than %d octets", maxCertificate)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	key := c.PublicKey
	if key == nil {
		if key, err = oaepKey(c.RawSubjectPublicKeyInfo); err != nil {
			return nil, nil, err
		}
	}
	if k, ok := want.(interface{ Equal(crypto.PublicKey) bool }); !ok || !k.Equal(key) {
		return nil, nil, errors.New("it is for another endorsement key than this TPM has")
	}
	if c.IsCA {
		return nil, nil, errors.New("it is a CA's")
	}
	if (len(c.ExtKeyUsage) > 0 || len(c.UnknownExtKeyUsage) > 0) && !slices.ContainsFunc(c.UnknownExtKeyUsage, oidEKCertificate.Equal) {
		return nil, nil, errors.New("it is not for endorsement keys (extended key usage)")
	}
	if c.KeyUsage != 0 && c.KeyUsage&(x509.KeyUsageKeyEncipherment|x509.KeyUsageKeyAgreement) == 0 {
		return nil, nil, errors.New("its key usage is neither key encipherment nor key agreement")
	}
	e := &EKCertificate{Serial: c.SerialNumber.Text(16), Issuer: c.Issuer.String(), NotAfter: c.NotAfter}
	for _, ext := range c.Extensions {
		if !ext.Id.Equal(oidSAN) {
			continue
		}
		if err := e.readSAN(ext.Value); err != nil {
			return nil, nil, fmt.Errorf("its subject alternative name: %w", err)
		}
		c.UnhandledCriticalExtensions = slices.DeleteFunc(c.UnhandledCriticalExtensions, oidSAN.Equal)
	}
	return c, e, nil
}

// oaepKey reads a key that the certificate calls RSAES-OAEP, as some manufacturers do.
func oaepKey(spki []byte) (crypto.PublicKey, error) {
	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	if rest, err := asn1.Unmarshal(spki, &info); err != nil || len(rest) > 0 || !info.Algorithm.Algorithm.Equal(oidRSAESOAEP) {
		return nil, errors.New("its key is of an algorithm that is not known")
	}
	var k struct {
		N *big.Int
		E int
	}
	if rest, err := asn1.Unmarshal(info.Key.RightAlign(), &k); err != nil || len(rest) > 0 || k.N.Sign() <= 0 {
		return nil, errors.New("its key is no RSA key")
	}
	return &rsa.PublicKey{N: k.N, E: k.E}, nil
}

// readSAN reads a subject alternative name that is one directory name with the TCG's attributes.
func (e *EKCertificate) readSAN(value []byte) error {
	var names []asn1.RawValue
	if rest, err := asn1.Unmarshal(value, &names); err != nil || len(rest) > 0 {
		return errors.New("it is damaged")
	}
	for _, n := range names {
		if n.Class != asn1.ClassContextSpecific || n.Tag != 4 { // directoryName: RFC 5280 §4.2.1.6
			return errors.New("it holds more than a directory name")
		}
		var rdns pkix.RDNSequence
		if rest, err := asn1.Unmarshal(n.Bytes, &rdns); err != nil || len(rest) > 0 {
			return errors.New("it is damaged")
		}
		for _, set := range rdns {
			for _, a := range set {
				text, _ := a.Value.(string)
				switch {
				case a.Type.Equal(oidManufacturer):
					e.Manufacturer = text
				case a.Type.Equal(oidModel):
					e.Model = text
				case a.Type.Equal(oidVersion):
					e.Version = text
				}
			}
		}
	}
	return nil
}

// Judge checks an EK certificate: that it is for this EK, given as the whole TPM2B_PUBLIC, and leads to one of the makers'
// roots at that time (zero means now). It vouches for the EK's key, not for the rest of its public area. chain is the certificate and, behind it, any that lead towards a root, in DER.
func (m *Makers) Judge(ek []byte, chain [][]byte, now time.Time) (*EKCertificate, error) {
	if len(chain) == 0 || len(chain) > maxChain {
		return nil, fmt.Errorf("want 1 to %d certificates", maxChain)
	}
	c, e, err := ReadEKCertificate(ek, chain[0])
	if err != nil {
		return nil, err
	}
	intermediates := m.intermediates.Clone()
	for _, der := range chain[1:] {
		if len(der) > maxCertificate {
			return nil, fmt.Errorf("a certificate is larger than %d octets", maxCertificate)
		}
		i, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		intermediates.AddCert(i)
	}
	chains, err := c.Verify(x509.VerifyOptions{Roots: m.roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return nil, err
	}
	root := chains[0][len(chains[0])-1]
	sum := sha256.Sum256(root.Raw)
	e.Root, e.RootSHA256 = root.Subject.String(), hex.EncodeToString(sum[:])
	return e, nil
}
