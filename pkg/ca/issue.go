package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"sync/atomic"
	"text/template/parse"
	"time"

	"go.step.sm/crypto/x509util"
	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/touchmark/touchmark/pkg/dps"
)

// Config is what an issuer needs.
type Config struct {
	Signer      crypto.Signer
	Certificate *x509.Certificate
	// Chain goes from the certificate's issuer up to the root.
	Chain []*x509.Certificate
	// Now and Rand are the clock and the random source; nil means the real ones.
	Now  func() time.Time
	Rand io.Reader
}

// An Issuer is a CA that signs leaves.
type Issuer struct{ cfg Config }

// NewIssuer checks that the certificate is a CA's, the key is its key, and the chain holds.
func NewIssuer(cfg Config) (*Issuer, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	c := cfg.Certificate
	pub, ok := cfg.Signer.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(c.PublicKey) {
		return nil, fmt.Errorf("the key is not the one of CA %q", c.Subject)
	}
	if !c.BasicConstraintsValid || !c.IsCA || c.KeyUsage&x509.KeyUsageCertSign == 0 {
		return nil, fmt.Errorf("%q is no CA: its certificate does not allow it to sign others", c.Subject)
	}
	child := c
	for _, parent := range cfg.Chain {
		if err := child.CheckSignatureFrom(parent); err != nil {
			return nil, fmt.Errorf("%q was not signed by %q: %w", child.Subject, parent.Subject, err)
		}
		child = parent
	}
	return &Issuer{cfg}, nil
}

// A Profile is what leaves of a kind look like.
type Profile struct {
	// Template is the text of a certificate template. It sees RegistrationID, Serial and Columns.
	Template string
	Validity time.Duration
	// Until is when leaves end that would be valid for longer. Zero means never: a leaf that would outlive its CA is refused.
	Until time.Time
	// Backdate is how far before its issue a leaf begins, for devices whose clocks are behind.
	Backdate time.Duration
	// Columns are the names that a unit's Columns have.
	Columns []string
}

// A Unit is what one leaf is for.
type Unit struct {
	RegistrationID string
	Serial         string
	Columns        map[string]string
}

// A Plan is everything about a leaf but its signature and its public key.
type Plan struct {
	Unit         Unit
	SerialNumber []byte // 20 octets
	NotBefore    time.Time
	NotAfter     time.Time
}

const planVersion = 1

// Encode returns the plan for a journal, without its unit.
func (p Plan) Encode() []byte {
	b := append(make([]byte, 0, 1+serialSize+16), planVersion)
	b = append(b, p.SerialNumber...)
	b = binary.BigEndian.AppendUint64(b, uint64(p.NotBefore.Unix()))
	return binary.BigEndian.AppendUint64(b, uint64(p.NotAfter.Unix()))
}

// DecodePlan reads a plan from a journal. The caller puts the unit back.
func DecodePlan(b []byte) (Plan, error) {
	if len(b) != 1+serialSize+16 || b[0] != planVersion {
		return Plan{}, errors.New("certificate plan is damaged or of another version")
	}
	return Plan{
		SerialNumber: bytes.Clone(b[1 : 1+serialSize]),
		NotBefore:    time.Unix(int64(binary.BigEndian.Uint64(b[1+serialSize:])), 0).UTC(),
		NotAfter:     time.Unix(int64(binary.BigEndian.Uint64(b[1+serialSize+8:])), 0).UTC(),
	}, nil
}

// Prepared is an issuer ready to sign leaves of one profile. It may be used by many goroutines.
type Prepared struct {
	issuer  *Issuer
	profile Profile
	chain   []byte
	checked atomic.Bool   // the first leaf was verified
	lintKey crypto.Signer // of the CA's kind, thrown away

	// The parts of the fast path; proto is nil when the template needs rendering for each unit.
	proto *prototype
}

// prototype is a leaf's TBSCertificate (RFC 5280 §4.1), less what differs from leaf to leaf.
type prototype struct {
	signature  []byte // AlgorithmIdentifier
	issuer     []byte // Name
	subject    pkix.Name
	extensions []pkix.Extension
	ski        int // which extension is the subject key identifier
}

var oidSubjectKeyID = asn1.ObjectIdentifier{2, 5, 29, 14}

// Prepare renders the profile and lints what comes out, before anything is signed with the CA's key.
func (i *Issuer) Prepare(p Profile) (*Prepared, error) {
	r := &Prepared{issuer: i, profile: p}
	if chain := i.cfg.Chain; len(chain) > 0 {
		r.chain = EncodeChain(append([]*x509.Certificate{i.cfg.Certificate}, chain[:len(chain)-1]...)...)
	} else {
		r.chain = EncodeChain(i.cfg.Certificate)
	}
	if err := r.checkValidity(i.cfg.Now()); err != nil {
		return nil, err
	}
	var err error
	if r.lintKey, err = throwAway(i.cfg.Signer.Public()); err != nil {
		return nil, err
	}
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	var protos [2]*x509.Certificate
	for n, id := range []string{"sample-00a", "sample-11b"} {
		u := Unit{RegistrationID: id, Serial: "serial-" + id, Columns: make(map[string]string)}
		for _, c := range p.Columns {
			u.Columns[c] = c + "-" + id
		}
		plan, err := r.Plan(u)
		if err != nil {
			return nil, err
		}
		if protos[n], err = r.sample(plan, leafKey.Public()); err != nil {
			return nil, err
		}
		if err := r.lint(protos[n], u); err != nil {
			return nil, err
		}
	}
	if dependsOnNameOnly(p.Template) {
		r.proto = fastPath(protos[0], protos[1])
	}
	return r, nil
}

// sample returns what the CA would sign, signed by a throw-away key in its name.
func (r *Prepared) sample(p Plan, pub crypto.PublicKey) (*x509.Certificate, error) {
	t, err := r.render(p, pub)
	if err != nil {
		return nil, err
	}
	stand := *r.issuer.cfg.Certificate
	stand.PublicKey = r.lintKey.Public()
	c, err := create(nil, t, &stand, pub, r.lintKey)
	if err != nil {
		return nil, fmt.Errorf("certificate template: %w", err)
	}
	return c, nil
}

// Size returns how many octets a leaf has at most, without signing it. Of the public key only its kind and size count.
func (r *Prepared) Size(u Unit, pub crypto.PublicKey) (int, error) {
	p, err := r.Plan(u)
	if err != nil {
		return 0, err
	}
	c, err := r.sample(p, pub)
	if err != nil {
		return 0, err
	}
	const lengths = 8 // lengths in DER may take more octets
	signature := ed25519.SignatureSize
	switch k := r.issuer.cfg.Signer.Public().(type) {
	case *ecdsa.PublicKey:
		signature = 2*((k.Curve.Params().BitSize+7)/8+3) + 3
	case *rsa.PublicKey:
		signature = k.Size()
	}
	return len(c.Raw) - len(c.Signature) + signature + lengths, nil
}

// lint says what is wrong with a leaf.
func (r *Prepared) lint(c *x509.Certificate, u Unit) error {
	ca := r.issuer.cfg.Certificate
	switch {
	case c.Subject.CommonName != u.RegistrationID:
		return fmt.Errorf("certificate template: the common name is %q and must be the registration ID %q", c.Subject.CommonName, u.RegistrationID)
	case c.IsCA || c.KeyUsage&x509.KeyUsageCertSign != 0:
		return errors.New("certificate template: a leaf must not be a CA")
	case c.NotBefore.Before(ca.NotBefore) || c.NotAfter.After(ca.NotAfter):
		return fmt.Errorf("certificate validity %s to %s is not inside the CA's", c.NotBefore.Format(time.DateOnly), c.NotAfter.Format(time.DateOnly))
	case len(c.UnhandledCriticalExtensions) > 0:
		return fmt.Errorf("certificate template: critical extension %v, which nothing here understands", c.UnhandledCriticalExtensions[0])
	}
	for _, usage := range c.ExtKeyUsage {
		if usage == x509.ExtKeyUsageClientAuth || usage == x509.ExtKeyUsageAny {
			return nil
		}
	}
	if len(c.ExtKeyUsage) > 0 {
		return errors.New("certificate template: the extended key usage has no clientAuth, so TLS servers would refuse the device")
	}
	return nil
}

func (r *Prepared) checkValidity(now time.Time) error {
	ca := r.issuer.cfg.Certificate
	if now.Before(ca.NotBefore) {
		return fmt.Errorf("%w: it shows %s, CA %q begins %s: set the clock", ErrClock, now.UTC().Format(time.RFC3339), ca.Subject.CommonName, ca.NotBefore.Format(time.RFC3339))
	}
	end := r.end(now)
	if now.After(ca.NotAfter) || !end.After(now) {
		return fmt.Errorf("%w: CA %q on %s", ErrEnded, ca.Subject.CommonName, earlier(ca.NotAfter, end).Format(time.DateOnly))
	}
	if end.After(ca.NotAfter) {
		return fmt.Errorf("leaves would be valid until %s and outlive CA %q, which ends on %s: lower certificate.days in the profile",
			end.UTC().Format(time.DateOnly), ca.Subject.CommonName, ca.NotAfter.Format(time.DateOnly))
	}
	return nil
}

// end is when a leaf ends that is made now.
func (r *Prepared) end(now time.Time) time.Time {
	end := now.Add(r.profile.Validity)
	if u := r.profile.Until; !u.IsZero() {
		end = earlier(end, u)
	}
	return end
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// Certificate returns the issuing CA's certificate, and ChainPEM the chain that devices carry behind their leaf: from the
// issuing CA up, without the root.
func (r *Prepared) Certificate() *x509.Certificate { return r.issuer.cfg.Certificate }

// ChainPEM returns the PEM of the intermediates.
func (r *Prepared) ChainPEM() []byte { return r.chain }

// Plan fixes one leaf: a fresh serial number, and a validity that begins in the past by the profile's backdate, though not
// before the CA.
func (r *Prepared) Plan(u Unit) (Plan, error) {
	if err := dps.CheckRegistrationID(u.RegistrationID); err != nil {
		return Plan{}, err
	}
	if len(u.RegistrationID) > dps.MaxCommonName {
		return Plan{}, fmt.Errorf("registration ID %q has %d characters, a certificate's common name holds at most %d", u.RegistrationID, len(u.RegistrationID), dps.MaxCommonName)
	}
	now := r.issuer.cfg.Now().UTC().Truncate(time.Second)
	if err := r.checkValidity(now); err != nil {
		return Plan{}, err
	}
	serial, err := newSerial(r.issuer.cfg.Rand)
	if err != nil {
		return Plan{}, err
	}
	begin := now.Add(-r.profile.Backdate)
	if first := r.issuer.cfg.Certificate.NotBefore; begin.Before(first) {
		begin = first
	}
	return Plan{Unit: u, SerialNumber: serial, NotBefore: begin, NotAfter: r.end(now)}, nil
}

// render makes the x509 template of a plan.
func (r *Prepared) render(p Plan, pub crypto.PublicKey) (*x509.Certificate, error) {
	columns := p.Unit.Columns
	if columns == nil {
		columns = map[string]string{}
	}
	c, err := x509util.NewCertificateFromX509(&x509.Certificate{PublicKey: pub}, x509util.WithTemplate(r.profile.Template, x509util.TemplateData{
		"RegistrationID": p.Unit.RegistrationID, "Serial": p.Unit.Serial, "Columns": columns,
	}))
	if err != nil {
		return nil, fmt.Errorf("certificate template: %w", err)
	}
	t := c.GetCertificate()
	ski, err := keyID(pub)
	if err != nil {
		return nil, err
	}
	t.SerialNumber, t.NotBefore, t.NotAfter = new(big.Int).SetBytes(p.SerialNumber), p.NotBefore, p.NotAfter
	t.SubjectKeyId, t.AuthorityKeyId = ski, r.issuer.cfg.Certificate.SubjectKeyId
	t.SignatureAlgorithm, t.Issuer = x509.UnknownSignatureAlgorithm, pkix.Name{}
	return t, nil
}

// dependsOnNameOnly reports whether all that a template takes of a unit is its registration ID, once, as JSON: nothing is
// computed, asked or repeated. Whatever else the certificate holds is then the same in each.
func dependsOnNameOnly(text string) bool {
	tree := parse.New("certificate")
	tree.Mode = parse.SkipFuncCheck
	if _, err := tree.Parse(text, "", "", map[string]*parse.Tree{}); err != nil {
		return false
	}
	uses := 0
	for _, n := range tree.Root.Nodes {
		switch n := n.(type) {
		case *parse.TextNode, *parse.CommentNode:
		case *parse.ActionNode:
			if len(n.Pipe.Decl) != 0 || len(n.Pipe.Cmds) != 1 || n.Pipe.Cmds[0].String() != "toJson .RegistrationID" {
				return false
			}
			uses++
		default:
			return false
		}
	}
	return uses == 1
}

// fastPath compares two prototypes; it returns nil unless they differ in the common name and the serial number only.
func fastPath(a, b *x509.Certificate) *prototype {
	if len(a.Extensions) != len(b.Extensions) {
		return nil
	}
	p := &prototype{issuer: a.RawIssuer, subject: a.Subject, extensions: a.Extensions, ski: -1}
	for n := range a.Extensions {
		x, y := a.Extensions[n], b.Extensions[n]
		if !x.Id.Equal(y.Id) || x.Critical != y.Critical || !bytes.Equal(x.Value, y.Value) {
			return nil
		}
		if x.Id.Equal(oidSubjectKeyID) {
			p.ski = n
		}
	}
	if p.ski < 0 {
		return nil
	}
	// Names is what was parsed; ToRDNSequence would put it in twice. Setting the other's common name must give its subject.
	p.subject.Names = nil
	got, err := p.name(b.Subject.CommonName)
	if err != nil || !bytes.Equal(got, b.RawSubject) {
		return nil
	}
	in := cryptobyte.String(a.RawTBSCertificate)
	var body, version, serial, alg cryptobyte.String
	if !in.ReadASN1(&body, cbasn1.SEQUENCE) || !body.ReadASN1Element(&version, cbasn1.Tag(0).ContextSpecific().Constructed()) ||
		!body.ReadASN1Element(&serial, cbasn1.INTEGER) || !body.ReadASN1Element(&alg, cbasn1.SEQUENCE) {
		return nil
	}
	p.signature = alg
	return p
}

func (p *prototype) name(cn string) ([]byte, error) {
	n := p.subject
	n.CommonName = cn
	return asn1.Marshal(n.ToRDNSequence())
}

// Issue signs the leaf of a plan, once.
func (r *Prepared) Issue(p Plan, pub crypto.PublicKey) ([]byte, error) {
	if p.Unit.RegistrationID == "" || len(p.SerialNumber) != serialSize {
		return nil, errors.New("issuing a certificate: the plan is not whole")
	}
	var der []byte
	var err error
	if r.proto != nil {
		der, err = r.assemble(p, pub)
	} else {
		der, err = r.create(p, pub)
	}
	if err != nil {
		return nil, fmt.Errorf("issuing the certificate of %s: %w", p.Unit.RegistrationID, err)
	}
	if !r.checked.Load() {
		// A key that signs wrongly, or a mistake in here, shows on the first leaf and not on the thousandth device.
		if err := r.verify(der, p, pub); err != nil {
			return nil, fmt.Errorf("the first certificate, of %s, does not verify: %w", p.Unit.RegistrationID, err)
		}
		r.checked.Store(true)
	}
	return der, nil
}

func (r *Prepared) create(p Plan, pub crypto.PublicKey) ([]byte, error) {
	t, err := r.render(p, pub)
	if err != nil {
		return nil, err
	}
	if err := r.lint(t, p.Unit); err != nil {
		return nil, err
	}
	return x509.CreateCertificate(rand.Reader, t, r.issuer.cfg.Certificate, pub, r.issuer.cfg.Signer)
}

// assemble builds the TBSCertificate from the prepared parts and signs it.
func (r *Prepared) assemble(p Plan, pub crypto.PublicKey) ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, err
	}
	ski, err := keyIDOf(spki)
	if err != nil {
		return nil, err
	}
	subject, err := r.proto.name(p.Unit.RegistrationID)
	if err != nil {
		return nil, err
	}
	b := cryptobyte.NewBuilder(make([]byte, 0, 600))
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(cbasn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) { b.AddASN1Int64(2) })
		b.AddASN1(cbasn1.INTEGER, func(b *cryptobyte.Builder) { b.AddBytes(p.SerialNumber) })
		b.AddBytes(r.proto.signature)
		b.AddBytes(r.proto.issuer)
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			addTime(b, p.NotBefore)
			addTime(b, p.NotAfter)
		})
		b.AddBytes(subject)
		b.AddBytes(spki)
		b.AddASN1(cbasn1.Tag(3).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
				for n := range r.proto.extensions {
					e := &r.proto.extensions[n]
					b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
						b.AddASN1ObjectIdentifier(e.Id)
						if e.Critical {
							b.AddASN1Boolean(true)
						}
						b.AddASN1(cbasn1.OCTET_STRING, func(b *cryptobyte.Builder) {
							if n == r.proto.ski {
								b.AddASN1OctetString(ski)
							} else {
								b.AddBytes(e.Value)
							}
						})
					})
				}
			})
		})
	})
	tbs, err := b.Bytes()
	if err != nil {
		return nil, err
	}
	signer := r.issuer.cfg.Signer
	hash := digestFor(signer.Public())
	digest := tbs
	if hash != 0 {
		h := hash.New()
		h.Write(tbs)
		digest = h.Sum(nil)
	}
	sig, err := signer.Sign(rand.Reader, digest, hash)
	if err != nil {
		return nil, err
	}
	out := cryptobyte.NewBuilder(make([]byte, 0, len(tbs)+len(sig)+32))
	out.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(tbs)
		b.AddBytes(r.proto.signature)
		b.AddASN1BitString(sig)
	})
	return out.Bytes()
}

// addTime adds a Time: UTCTime until 2049, GeneralizedTime from 2050 on (RFC 5280 §4.1.2.5).
func addTime(b *cryptobyte.Builder, t time.Time) {
	if t.Year() < 2050 {
		b.AddASN1UTCTime(t)
	} else {
		b.AddASN1GeneralizedTime(t)
	}
}

func (r *Prepared) verify(der []byte, p Plan, pub crypto.PublicKey) error {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	if err := c.CheckSignatureFrom(r.issuer.cfg.Certificate); err != nil {
		return err
	}
	if !pub.(interface{ Equal(crypto.PublicKey) bool }).Equal(c.PublicKey) {
		return errors.New("it has another public key")
	}
	if !bytes.Equal(c.SerialNumber.Bytes(), p.SerialNumber) {
		return errors.New("it has another serial number")
	}
	return r.lint(c, p.Unit)
}
