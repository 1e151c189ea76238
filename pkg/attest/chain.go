package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// Bounds of what a device may present, and of what is done about it.
const (
	MaxCertificates = 10
	maxPath         = 8
	maxCommonName   = 64 // X.520's ub-common-name
	// maxSignatures bounds the signatures that are verified for one device, and with them the paths.
	maxSignatures = 64
)

// Errors of a chain. None of them goes to the device.
var (
	ErrNoCertificate = errors.New("no client certificate")
	ErrCommonName    = errors.New("the certificate's common name is not the registration ID")
	ErrValidity      = errors.New("a certificate is not valid now")
	ErrChain         = errors.New("no path to a known CA")
	// ErrAmbiguous is a Lookup's answer where more than MaxCandidates CAs could have signed a certificate.
	ErrAmbiguous = errors.New("more CAs than can be tried have the issuer's name, and key identifiers do not tell them apart")
)

var (
	oidCommonName      = asn1.ObjectIdentifier{2, 5, 4, 3}
	oidNameConstraints = asn1.ObjectIdentifier{2, 5, 29, 30}
)

// CheckLeaf says what keeps a leaf from being this device's: its common name, of which it must have exactly one, its
// validity, its key and what it is for. It says nothing of who vouches for it.
//
// A certificate that becomes valid within [Skew] is taken: the clocks of factories and services differ, and devices call in
// minutes after they were made. One that has expired is refused without mercy, here and everywhere in a path.
func CheckLeaf(leaf *x509.Certificate, registrationID string, now time.Time) error {
	names := 0
	for _, n := range leaf.Subject.Names {
		if n.Type.Equal(oidCommonName) {
			names++
		}
	}
	if cn := leaf.Subject.CommonName; names != 1 || len(cn) > maxCommonName || dps.Fold(cn) != dps.Fold(registrationID) {
		return fmt.Errorf("%w: %d of them, the last %q, not %q", ErrCommonName, names, cn, registrationID)
	}
	if err := checkTime(leaf, now); err != nil {
		return err
	}
	if leaf.KeyUsage != 0 && leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return fmt.Errorf("%w: the leaf's key is not for signatures", ErrChain)
	}
	if !forClients(leaf) {
		return fmt.Errorf("%w: the leaf is not for client authentication", ErrChain)
	}
	if len(leaf.UnhandledCriticalExtensions) > 0 {
		return fmt.Errorf("%w: the leaf has a critical extension that is not understood", ErrChain)
	}
	if !strongKey(leaf) {
		return fmt.Errorf("%w: the leaf's key is weak, or of a kind that is not known", ErrChain)
	}
	return nil
}

// CheckCA says what keeps a certificate from vouching for devices, its validity and what is below it aside.
func CheckCA(c *x509.Certificate) error {
	if !c.BasicConstraintsValid || !c.IsCA {
		return fmt.Errorf("%q is no CA", c.Subject)
	}
	if c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0 {
		return fmt.Errorf("%q may not sign certificates", c.Subject)
	}
	if len(c.UnhandledCriticalExtensions) > 0 {
		return fmt.Errorf("%q has a critical extension that is not understood", c.Subject)
	}
	if !forClients(c) {
		return fmt.Errorf("%q may not vouch for clients", c.Subject)
	}
	if !strongKey(c) {
		return fmt.Errorf("%q has a weak key, or one of a kind that is not known", c.Subject)
	}
	// RFC 5280 §4.2.1.10 has them critical. Where they are not, constraints that are not understood would go unseen.
	if e := constraints(c); e != nil && !e.Critical {
		return fmt.Errorf("%q has name constraints that are not critical", c.Subject)
	}
	return nil
}

// forClients reports whether a certificate that names purposes names client authentication, or any.
func forClients(c *x509.Certificate) bool {
	if len(c.ExtKeyUsage) == 0 && len(c.UnknownExtKeyUsage) == 0 {
		return true
	}
	return slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth) || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny)
}

// strongKey reports whether a key has 112 bits of strength; RSA keys beyond 8192 bits are only there to keep us busy.
func strongKey(c *x509.Certificate) bool {
	switch k := c.PublicKey.(type) {
	case *rsa.PublicKey:
		return k.N.BitLen() >= 2048 && k.N.BitLen() <= 8192
	case *ecdsa.PublicKey:
		return k.Params().BitSize >= 256
	case ed25519.PublicKey:
		return true
	}
	return false
}

// strongSignature leaves out MD5 and SHA-1, which can be made to fit two certificates.
func strongSignature(c *x509.Certificate) bool {
	switch c.SignatureAlgorithm {
	case x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA, x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS,
		x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512, x509.PureEd25519:
		return true
	}
	return false
}

func checkTime(c *x509.Certificate, now time.Time) error {
	if now.Add(Skew).Before(c.NotBefore) || now.After(c.NotAfter) {
		return fmt.Errorf("%w: %q from %s to %s", ErrValidity, c.Subject, c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// Lookup returns the enrolled CA certificates that could have signed child: those of its issuer's name that its authority
// key identifier names, none where it has no such identifier; or, by name alone, all of its issuer's name, for identifiers
// are hints that not everybody writes. ErrAmbiguous says that they are too many to try; by name, it ends the walk.
type Lookup[Group any] func(child *x509.Certificate, byName bool) ([]Anchor[Group], error)

// An Anchor is an enrolled CA certificate and what it stands for.
type Anchor[Group any] struct {
	Certificate *x509.Certificate
	Group       Group
	// Blocks says that the group is there to keep devices out: it decides about all that its key signed, also when the
	// certificate itself has expired or may not sign.
	Blocks bool
}

// A link is a certificate of a path, with the one that it signed below it.
type link struct {
	cert  *x509.Certificate
	below *link // nil for the leaf
	depth int   // how many are below it
}

// has reports whether a certificate's name and key are in the path already: a loop of cross-certificates ends here.
func (l *link) has(c *x509.Certificate) bool {
	for ; l != nil; l = l.below {
		if bytes.Equal(l.cert.RawSubject, c.RawSubject) && bytes.Equal(l.cert.RawSubjectPublicKeyInfo, c.RawSubjectPublicKeyInfo) {
			return true
		}
	}
	return false
}

// FindGroup walks from the leaf towards the roots and returns the group of the first enrolled certificate on the way:
// presented by the device, or, as an issuer, known to the service only. A path may go through presented certificates, in
// whatever order they come, and through stored ones, which the operator told the service of; nil stores none. Signatures,
// validity, basic constraints, key usage, path length and name constraints are checked on the way (RFC 5280 §6.1), stricter
// than it in this: self-issued certificates count for the path length, purposes of CAs bind what is below them, and the
// common name, which registrations go by, is held against constraints of DNS names.
//
// Where there are several paths the shortest decides, and of equal ones an anchor that blocks. The error is ErrChain when no
// path ends at a group.
func FindGroup[Group any](presented []*x509.Certificate, stored *Pool, lookup Lookup[Group], now time.Time) (Group, error) {
	var none Group
	if len(presented) == 0 {
		return none, ErrNoCertificate
	}
	if len(presented) > MaxCertificates {
		return none, fmt.Errorf("%w: %d certificates were presented", ErrChain, len(presented))
	}
	w := walk{now: now}
	level := []*link{{cert: presented[0]}}
	for len(level) > 0 {
		var first *Anchor[Group]
		for _, l := range level {
			a, err := anchorAbove(&w, l, lookup)
			if err != nil {
				return none, err
			}
			if a != nil && (first == nil || a.Blocks && !first.Blocks) {
				first = a
			}
		}
		if first != nil {
			return first.Group, nil
		}
		var next []*link
		for _, l := range level {
			if l.depth+1 < maxPath {
				next = w.above(next, l, presented[1:])
				next = w.above(next, l, stored.issuers(l.cert))
			}
		}
		level = next
	}
	if w.reason != nil {
		return none, fmt.Errorf("%w: %w", ErrChain, w.reason)
	}
	return none, fmt.Errorf("%w: nobody known signed %q", ErrChain, presented[0].Subject)
}

// anchorAbove returns the enrolled certificate that signed the end of a path, nil for none.
func anchorAbove[Group any](w *walk, l *link, lookup Lookup[Group]) (*Anchor[Group], error) {
	for _, byName := range []bool{false, true} {
		anchors, err := lookup(l.cert, byName)
		switch ambiguous := errors.Is(err, ErrAmbiguous); {
		case ambiguous && !byName:
			continue
		case ambiguous: // one of those that are not tried may be there to keep the device out
			return nil, fmt.Errorf("%w: above %q: %w", ErrChain, l.cert.Subject, err)
		case err != nil:
			return nil, err
		}
		var first *Anchor[Group]
		signed := false
		for i, a := range anchors {
			if l.has(a.Certificate) || !w.signed(a.Certificate, l.cert) {
				continue
			}
			signed = true
			if a.Blocks {
				return &anchors[i], nil
			}
			if err := w.vouches(a.Certificate, l); err != nil {
				w.because(err)
			} else if first == nil {
				first = &anchors[i]
			}
		}
		if signed {
			return first, nil
		}
	}
	return nil, nil
}

// A walk is one search for paths.
type walk struct {
	now        time.Time
	signatures int
	reason     error // the last thing that stood in the way
}

var errTooMany = errors.New("too many signatures to verify")

func (w *walk) because(err error) {
	if !errors.Is(w.reason, errTooMany) {
		w.reason = err
	}
}

// above adds the paths that go on through one of some certificates.
func (w *walk) above(next []*link, l *link, through []*x509.Certificate) []*link {
	for _, c := range through {
		same := func(n *link) bool { return n.below == l && n.cert.Equal(c) } // sent twice, or sent and stored
		if l.has(c) || slices.ContainsFunc(next, same) || !w.signed(c, l.cert) {
			continue
		}
		if err := w.vouches(c, l); err != nil {
			w.because(err)
			continue
		}
		next = append(next, &link{cert: c, below: l, depth: l.depth + 1})
	}
	return next
}

// signed reports whether parent's name and key are those that issued child.
func (w *walk) signed(parent, child *x509.Certificate) bool {
	if !bytes.Equal(parent.RawSubject, child.RawIssuer) {
		return false
	}
	var err error
	switch {
	case !strongSignature(child):
		err = fmt.Errorf("%q has a weak signature: %s", child.Subject, child.SignatureAlgorithm)
	case w.signatures >= maxSignatures:
		err = errTooMany
	default:
		w.signatures++
		if err = parent.CheckSignature(child.SignatureAlgorithm, child.RawTBSCertificate, child.Signature); err != nil {
			err = fmt.Errorf("%q did not sign %q: %w", parent.Subject, child.Subject, err)
		}
	}
	if err != nil {
		w.because(err)
	}
	return err == nil
}

// vouches says what keeps a CA that signed the end of a path from vouching for it.
func (w *walk) vouches(ca *x509.Certificate, l *link) error {
	if err := CheckCA(ca); err != nil {
		return err
	}
	if (ca.MaxPathLen > 0 || ca.MaxPathLenZero) && l.depth > ca.MaxPathLen {
		return fmt.Errorf("%q may not have %d CAs below it", ca.Subject, l.depth)
	}
	if err := checkTime(ca, w.now); err != nil {
		return err
	}
	if constraints(ca) == nil {
		return nil
	}
	if err := w.constrained(ca, l); err != nil {
		return fmt.Errorf("the name constraints of %q: %w", ca.Subject, err)
	}
	return nil
}

// constraints returns a CA's name constraints, nil for none.
func constraints(c *x509.Certificate) *pkix.Extension {
	i := slices.IndexFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oidNameConstraints) })
	if i < 0 {
		return nil
	}
	return &c.Extensions[i]
}

// constrained holds the names of a path against a CA's name constraints. Alternative names are crypto/x509's to judge. The
// common name of the leaf is what it registers by, and no alternative name; a CA that is bound to some DNS names, or kept
// from some, is bound in common names as well, or the constraint would be for nothing.
func (w *walk) constrained(ca *x509.Certificate, l *link) error {
	o := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: w.now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	o.Roots.AddCert(ca)
	if ca.NotBefore.After(o.CurrentTime) {
		o.CurrentTime = ca.NotBefore
	}
	for ; ; l = l.below {
		if l.cert.NotBefore.After(o.CurrentTime) { // within Skew, as was checked
			o.CurrentTime = l.cert.NotBefore
		}
		if l.below == nil {
			break
		}
		o.Intermediates.AddCert(l.cert)
	}
	leaf := l.cert
	if _, err := leaf.Verify(o); err != nil {
		return err
	}
	within := func(domain string) bool {
		domain = "." + strings.TrimPrefix(dps.Fold(domain), ".")
		return strings.HasSuffix("."+dps.Fold(leaf.Subject.CommonName), domain) || domain == "."
	}
	if len(ca.PermittedDNSDomains) > 0 && !slices.ContainsFunc(ca.PermittedDNSDomains, within) || slices.ContainsFunc(ca.ExcludedDNSDomains, within) {
		return fmt.Errorf("they do not allow the name %q", leaf.Subject.CommonName)
	}
	return nil
}
