package attest_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
)

type (
	holder = attesttest.Holder
	edit   = func(*x509.Certificate)
	gs     = map[string]*holder
)

func certs(h ...*holder) (out []*x509.Certificate) {
	for _, x := range h {
		out = append(out, x.Certificate)
	}
	return out
}

func from(d time.Duration) edit  { return func(c *x509.Certificate) { c.NotBefore = now.Add(d) } }
func until(d time.Duration) edit { return func(c *x509.Certificate) { c.NotAfter = now.Add(d) } }

func pathLen(n int) edit {
	return func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = n, n == 0 }
}

// Ways from a leaf to a group: what is sent and what is stored, in whatever order and company. Device API, section 7.3;
// DPS-D 42, 43, 45, DPS-S 83.
func TestPaths(t *testing.T) {
	root := attesttest.CA(t, nil, "root")
	mid := attesttest.CA(t, root, "mid")
	low := attesttest.CA(t, mid, "low")
	dev := attesttest.Leaf(t, low, "dev")
	twin := attesttest.CA(t, nil, "low") // the same name, another key
	foreign := attesttest.CA(t, nil, "foreign")
	midAgain := attesttest.Cross(t, root, mid)
	midOld := attesttest.Cross(t, root, mid, until(-time.Second))
	// Two CAs that certify each other.
	a, b := attesttest.CA(t, nil, "a"), attesttest.CA(t, nil, "b")
	ab, ba := attesttest.Cross(t, b, a), attesttest.Cross(t, a, b)
	ofA := attesttest.Leaf(t, a, "dev")
	outB := attesttest.Cross(t, root, b)
	deep := []*holder{attesttest.CA(t, nil, "deep")}
	for i := range 8 {
		deep = append(deep, attesttest.CA(t, deep[i], fmt.Sprint("deep ", i)))
	}
	none := attesttest.CA(t, root, "none", pathLen(0))
	below := attesttest.CA(t, none, "below")
	one := attesttest.CA(t, nil, "one", pathLen(1))
	onesLow := attesttest.CA(t, one, "one's low")
	for name, x := range map[string]struct {
		sent, stored []*x509.Certificate
		groups       gs
		want         string
	}{
		"intermediates sent":                     {certs(dev, low, mid), nil, gs{"root": root}, "root"},
		"intermediates not sent":                 {certs(dev), nil, gs{"root": root}, ""},
		"intermediates not sent, mid enrolled":   {certs(dev), nil, gs{"mid": mid}, ""},
		"intermediates stored":                   {certs(dev), certs(mid, low), gs{"root": root}, "root"},
		"one sent, one stored":                   {certs(dev, low), certs(mid), gs{"root": root}, "root"},
		"the lower one stored":                   {certs(dev, mid), certs(low), gs{"root": root}, "root"},
		"stored among many of the name":          {certs(dev), append(sameName(t, "low", 40), low.Certificate, mid.Certificate), gs{"root": root}, "root"},
		"stored, and no group":                   {certs(dev), certs(root, mid, low), gs{"foreign": foreign}, ""},
		"stored root admits nobody":              {certs(attesttest.Leaf(t, foreign, "dev")), certs(foreign), gs{"root": root}, ""},
		"reversed":                               {certs(dev, root, mid, low), nil, gs{"root": root}, "root"},
		"duplicated":                             {certs(dev, low, low, mid, low, mid, dev, dev), nil, gs{"root": root}, "root"},
		"with foreign ones":                      {certs(dev, foreign, twin, low, onesLow, mid), nil, gs{"root": root}, "root"},
		"with its twin first":                    {certs(dev, twin, low, mid), certs(twin, low), gs{"root": root}, "root"},
		"ten":                                    {certs(dev, foreign, twin, a, b, ab, ba, one, low, mid), nil, gs{"root": root}, "root"},
		"eleven":                                 {certs(dev, foreign, twin, a, b, ab, ba, one, below, low, mid), nil, gs{"root": root}, ""},
		"certificates that certify each other":   {certs(ofA, ab, ba), nil, gs{"root": root}, ""},
		"the same, and a way out":                {certs(ofA, ab, ba, outB), nil, gs{"root": root}, "root"},
		"the same, stored":                       {certs(ofA), certs(ab, ba, outB), gs{"root": root}, "root"},
		"the same, one enrolled":                 {certs(ofA, ab, ba), nil, gs{"b": b}, "b"},
		"a renewed one beside an expired one":    {certs(dev, low, midOld, midAgain), nil, gs{"root": root}, "root"},
		"an expired one alone":                   {certs(dev, low, midOld), nil, gs{"root": root}, ""},
		"too deep":                               {certs(attesttest.Leaf(t, deep[8], "dev")), certs(deep[1:]...), gs{"deep": deep[0]}, ""},
		"deep":                                   {certs(attesttest.Leaf(t, deep[7], "dev")), certs(deep[1:]...), gs{"deep": deep[0]}, "deep"},
		"path length 0, its leaf":                {certs(attesttest.Leaf(t, none, "dev"), none), nil, gs{"root": root}, "root"},
		"path length 0, a CA below it":           {certs(attesttest.Leaf(t, below, "dev"), below, none), nil, gs{"root": root}, ""},
		"path length 0 enrolled, a CA below it":  {certs(attesttest.Leaf(t, below, "dev"), below), nil, gs{"none": none}, ""},
		"path length 1":                          {certs(attesttest.Leaf(t, onesLow, "dev")), certs(onesLow), gs{"one": one}, "one"},
		"path length 1, renewed by itself":       {certs(attesttest.Leaf(t, attesttest.CA(t, onesLow, "x"), "dev")), certs(onesLow), gs{"one": one}, ""},
		"the enrolled certificate as a device's": {certs(root), nil, gs{"root": root}, ""},
		"an enrolled one's twin as a device's":   {certs(attesttest.Cross(t, nil, root)), nil, gs{"root": root}, ""},
	} {
		got, err := attest.FindGroup(x.sent, attest.NewPool(x.stored), groups(x.groups), now)
		if got != x.want || (err == nil) != (x.want != "") || err != nil && !errors.Is(err, attest.ErrChain) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

// sameName makes CAs of one name.
func sameName(t testing.TB, name string, n int) (out []*x509.Certificate) {
	for range n {
		out = append(out, attesttest.CA(t, nil, name).Certificate)
	}
	return out
}

// Key identifiers find the CA; signatures decide.
func TestKeyIdentifiers(t *testing.T) {
	ca := attesttest.CA(t, nil, "ca")
	unnamed := *ca.Certificate
	unnamed.SubjectKeyId = nil // so what it signs does not say whose key did
	plain := attesttest.Leaf(t, &holder{Certificate: &unnamed, Key: ca.Key}, "dev")
	lying := attesttest.Cross(t, nil, ca, func(c *x509.Certificate) { c.SubjectKeyId = []byte("what nobody calls it") })
	liar := attesttest.CA(t, nil, "ca", func(c *x509.Certificate) { c.SubjectKeyId = ca.Certificate.SubjectKeyId })
	dev := attesttest.Leaf(t, ca, "dev")
	odd := attesttest.Leaf(t, lying, "dev")
	if bytes.Equal(odd.Certificate.AuthorityKeyId, dev.Certificate.AuthorityKeyId) || len(attest.KeyIDs(ca.Certificate)) != 3 || plain.Certificate.AuthorityKeyId != nil {
		t.Fatalf("%x, %x, %x", plain.Certificate.AuthorityKeyId, odd.Certificate.AuthorityKeyId, attest.KeyIDs(ca.Certificate))
	}
	many := gs{}
	for i := range attest.MaxCandidates {
		many[fmt.Sprint(i)] = attesttest.CA(t, nil, "ca")
	}
	all := func(more gs) attest.Lookup[string] {
		find := groups(more)
		rest := groups(many)
		return func(child *x509.Certificate, byName bool) ([]attest.Anchor[string], error) {
			x, _ := find(child, byName)
			y, _ := rest(child, byName)
			if x = append(x, y...); len(x) > attest.MaxCandidates {
				return nil, attest.ErrAmbiguous
			}
			return x, nil
		}
	}
	for name, x := range map[string]struct {
		dev    *holder
		lookup attest.Lookup[string]
		want   string
	}{
		"by identifier, among many":              {dev, all(gs{"ca": ca}), "ca"},
		"renewed with another identifier":        {dev, all(gs{"ca": lying}), "ca"}, // computed from the key
		"an identifier that is only written":     {odd, all(gs{"ca": lying}), "ca"},
		"another's identifier":                   {dev, groups(gs{"ca": liar}), ""},
		"another's identifier, and the CA":       {dev, groups(gs{"liar": liar, "ca": ca}), "ca"},
		"a wrong identifier":                     {odd, groups(gs{"ca": ca}), "ca"},
		"a wrong identifier, among many":         {odd, all(gs{"ca": ca}), ""},
		"a wrong identifier, a liar beside it":   {odd, groups(gs{"liar": liar, "ca": ca}), "ca"},
		"no identifier":                          {plain, groups(gs{"ca": ca}), "ca"},
		"no identifier, among many":              {plain, all(gs{"ca": ca}), ""},
		"an identifier of a hundred kilo-octets": {attesttest.Leaf(t, attesttest.Cross(t, nil, ca, func(c *x509.Certificate) { c.SubjectKeyId = make([]byte, 1e5) }), "dev"), groups(gs{"ca": ca}), "ca"},
	} {
		got, err := attest.FindGroup(certs(x.dev), nil, x.lookup, now)
		if got != x.want || (err == nil) != (x.want != "") {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		if strings.HasSuffix(name, "among many") && err != nil && !errors.Is(err, attest.ErrAmbiguous) {
			t.Errorf("%s: the reason is %v", name, err)
		}
	}
}

// Of more CAs than are tried, one may be there to keep the device out: no group further up decides.
func TestAmbiguous(t *testing.T) {
	root := attesttest.CA(t, nil, "root")
	low := attesttest.CA(t, root, "low")
	unnamed := *low.Certificate
	unnamed.SubjectKeyId = nil
	plain := attesttest.Leaf(t, &holder{Certificate: &unnamed, Key: low.Key}, "dev")
	enrolled := gs{"root": root, "low": low}
	for i := range attest.MaxCandidates {
		enrolled[fmt.Sprint(i)] = attesttest.CA(t, nil, "low")
	}
	find := groups(enrolled)
	lookup := func(child *x509.Certificate, byName bool) ([]attest.Anchor[string], error) {
		all, err := find(child, byName)
		if len(all) > attest.MaxCandidates {
			return nil, attest.ErrAmbiguous
		}
		return all, err
	}
	for name, x := range map[string]struct {
		dev  *holder
		want string
	}{"without an identifier": {plain, ""}, "with one": {attesttest.Leaf(t, low, "dev"), "low"}} {
		got, err := attest.FindGroup(certs(x.dev, low), nil, lookup, now)
		if got != x.want || x.want == "" && !(errors.Is(err, attest.ErrChain) && errors.Is(err, attest.ErrAmbiguous)) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

// A disabled group keeps out what its key signed, in whatever certificate, and whatever way round it there is.
func TestBlocks(t *testing.T) {
	good, bad := attesttest.CA(t, nil, "good"), attesttest.CA(t, nil, "bad")
	low := attesttest.CA(t, bad, "low")
	cross := attesttest.Cross(t, good, low)
	dev := attesttest.Leaf(t, low, "dev")
	expired := attesttest.Cross(t, bad, low, until(-time.Minute))
	high := attesttest.CA(t, good, "high")
	highByBad := attesttest.Cross(t, bad, high)
	ofHigh := attesttest.Leaf(t, high, "dev")
	for name, x := range map[string]struct {
		sent          []*x509.Certificate
		groups        gs
		blocks, wants string
	}{
		"below an enabled one":                    {certs(dev, cross), gs{"low": low, "good": good}, "low", "low"},
		"the same, cross-certificate not sent":    {certs(dev), gs{"low": low, "good": good}, "low", "low"},
		"expired, the key certified elsewhere":    {certs(dev, cross), gs{"low": expired, "good": good}, "low", "low"},
		"above an enabled one":                    {certs(dev, low), gs{"low": cross, "bad": bad}, "bad", "low"},
		"one of two ways":                         {certs(ofHigh, high, highByBad), gs{"good": good, "bad": bad}, "bad", "bad"},
		"one of two ways, the other sent first":   {certs(ofHigh, highByBad, high), gs{"good": good, "bad": bad}, "bad", "bad"},
		"the other way alone":                     {certs(ofHigh, high), gs{"good": good, "bad": bad}, "bad", "good"},
		"two certificates of one key, one blocks": {certs(dev), gs{"low": low, "cross": cross}, "cross", "cross"},
	} {
		find := groups(x.groups)
		got, err := attest.FindGroup(x.sent, nil, func(child *x509.Certificate, byName bool) ([]attest.Anchor[string], error) {
			found, err := find(child, byName)
			for i := range found {
				found[i].Blocks = found[i].Group == x.blocks
			}
			return found, err
		}, now)
		if err != nil || got != x.wants {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

// What a CA must be, by one edit of a good one each: enrolled, and between the leaf and the enrolled one. DPS-D 46, DPS-S 85.
func TestCAs(t *testing.T) {
	root := attesttest.CA(t, nil, "root")
	critical := func(c *x509.Certificate) {
		c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
	}
	constrain := func(f func(*x509.Certificate)) edit {
		return func(c *x509.Certificate) { c.PermittedDNSDomainsCritical = true; f(c) }
	}
	permit := func(domains ...string) edit {
		return constrain(func(c *x509.Certificate) { c.PermittedDNSDomains = domains })
	}
	exclude := func(domains ...string) edit {
		return constrain(func(c *x509.Certificate) { c.ExcludedDNSDomains = domains })
	}
	network := func(text string) *net.IPNet {
		_, n, err := net.ParseCIDR(text)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	usage := func(u ...x509.ExtKeyUsage) edit { return func(c *x509.Certificate) { c.ExtKeyUsage = u } }
	// The leaf is dev.line3.example, with that as its DNS name and 127.0.0.1 as its address.
	for name, x := range map[string]struct {
		edit edit
		ok   bool
	}{
		"as it should be":                 {func(*x509.Certificate) {}, true},
		"valid in four minutes":           {from(4 * time.Minute), true},
		"valid in six minutes":            {from(6 * time.Minute), false},
		"expired a second ago":            {until(-time.Second), false},
		"expires now":                     {until(0), true},
		"no CA":                           {func(c *x509.Certificate) { c.IsCA, c.MaxPathLen = false, 0 }, false},
		"no basic constraints":            {func(c *x509.Certificate) { c.BasicConstraintsValid, c.IsCA, c.MaxPathLen = false, false, 0 }, false},
		"any key usage":                   {func(c *x509.Certificate) { c.KeyUsage = 0 }, true},
		"signs lists only":                {func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }, false},
		"for clients":                     {usage(x509.ExtKeyUsageClientAuth), true},
		"for any purpose":                 {usage(x509.ExtKeyUsageAny), true},
		"for servers":                     {usage(x509.ExtKeyUsageServerAuth), false},
		"for a purpose that is not known": {func(c *x509.Certificate) { c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{1, 2, 3}} }, false},
		"critical, not understood":        {critical, false},
		"constrained to the line":         {permit("line3.example"), true},
		"constrained, with a dot":         {permit(".line3.example"), true},
		"constrained, in capitals":        {permit("Line3.EXAMPLE"), true},
		"constrained to the device":       {permit("dev.line3.example"), true},
		"constrained to two lines":        {permit("line4.example", "line3.example"), true},
		"constrained to another line":     {permit("line4.example"), false},
		"constrained to a part of a name": {permit("ine3.example"), false},
		"another line excluded":           {exclude("line4.example"), true},
		"the line excluded":               {exclude("line3.example"), false},
		"everything excluded":             {exclude(""), false},
		"addresses excluded":              {constrain(func(c *x509.Certificate) { c.ExcludedIPRanges = []*net.IPNet{network("127.0.0.0/8")} }), false},
		"other addresses excluded":        {constrain(func(c *x509.Certificate) { c.ExcludedIPRanges = []*net.IPNet{network("10.0.0.0/8")} }), true},
		"constrained, valid soon":         {func(c *x509.Certificate) { permit("line3.example")(c); from(4 * time.Minute)(c) }, true},
		"constrained, not critical":       {func(c *x509.Certificate) { c.PermittedDNSDomains = []string{"line3.example"} }, false},
		"constrained by directory name": {func(c *x509.Certificate) { // permits all below the name CN=x
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 30}, Critical: true, Value: []byte("\x30\x14\xa0\x12\x30\x10\xa4\x0e\x30\x0c\x31\x0a\x30\x08\x06\x03\x55\x04\x03\x0c\x01x")}}
		}, false},
	} {
		between := attesttest.CA(t, root, "between", x.edit)
		dev := attesttest.Leaf(t, between, "dev.line3.example")
		for how, chain := range map[string]struct {
			sent   []*x509.Certificate
			groups gs
		}{"enrolled": {certs(dev), gs{"g": between}}, "sent": {certs(dev, between), gs{"g": root}}} {
			got, err := attest.FindGroup(chain.sent, nil, groups(chain.groups), now)
			if (err == nil) != x.ok || (got == "g") != x.ok {
				t.Errorf("%s, %s: %q, %v", name, how, got, err)
			}
		}
	}
	// The common name counts where there is no alternative name, and where it is another than that.
	line3 := attesttest.CA(t, nil, "line 3", permit("line3.example"))
	for name, dev := range map[string]*holder{
		"no alternative name":      attesttest.Leaf(t, line3, "dev", func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = nil, nil }),
		"another alternative name": attesttest.Leaf(t, line3, "dev", func(c *x509.Certificate) { c.DNSNames = []string{"dev.line3.example"} }),
		"the other way round":      attesttest.Leaf(t, line3, "dev.line3.example", func(c *x509.Certificate) { c.DNSNames = []string{"dev"} }),
	} {
		if _, err := attest.FindGroup(certs(dev), nil, groups(gs{"g": line3}), now); !errors.Is(err, attest.ErrChain) {
			t.Errorf("constrained, %s: %v", name, err)
		}
	}
	// Roll-over: two CAs of one group, of which one has expired.
	old, fresh := attesttest.CA(t, nil, "ca", until(-time.Minute)), attesttest.CA(t, nil, "ca")
	both := gs{"old": old, "fresh": fresh}
	if got, err := attest.FindGroup(certs(attesttest.Leaf(t, fresh, "dev")), nil, groups(both), now); got != "fresh" {
		t.Errorf("beside an expired CA: %v", err)
	}
	if got, err := attest.FindGroup(certs(attesttest.Leaf(t, old, "dev")), nil, groups(both), now); !errors.Is(err, attest.ErrValidity) {
		t.Errorf("of an expired CA: %q, %v", got, err)
	}
}

// What a leaf must be. DPS-D 44, 46, DPS-S 85.
func TestLeaves(t *testing.T) {
	root := attesttest.CA(t, nil, "root")
	long := strings.Repeat("x", 65)
	names := func(cn ...string) edit {
		return func(c *x509.Certificate) {
			c.DNSNames, c.Subject = nil, pkix.Name{}
			for _, n := range cn {
				c.Subject.ExtraNames = append(c.Subject.ExtraNames, pkix.AttributeTypeAndValue{Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: n})
			}
		}
	}
	usage := func(u x509.KeyUsage) edit { return func(c *x509.Certificate) { c.KeyUsage = u } }
	for name, x := range map[string]struct {
		id   string
		edit edit
		want error
	}{
		"as it should be":               {"dev", usage(x509.KeyUsageDigitalSignature), nil},
		"in capitals":                   {"dev", names("DEV"), nil},
		"with more in its subject":      {"dev", func(c *x509.Certificate) { c.Subject.Organization, c.Subject.SerialNumber = []string{"o"}, "7" }, nil},
		"two names, hers last":          {"dev", names("x", "dev"), attest.ErrCommonName},
		"two names, hers first":         {"dev", names("dev", "x"), attest.ErrCommonName},
		"her name twice":                {"dev", names("dev", "dev"), attest.ErrCommonName},
		"no name":                       {"dev", names(), attest.ErrCommonName},
		"a space before":                {"dev", names(" dev"), attest.ErrCommonName},
		"a space behind":                {"dev", names("dev "), attest.ErrCommonName},
		"a NUL behind":                  {"dev", names("dev\x00"), attest.ErrCommonName},
		"a NUL within":                  {"dev", names("dev\x00x"), attest.ErrCommonName},
		"a Kelvin sign":                 {"key1", names("\u212aey1"), attest.ErrCommonName},
		"a dotless i":                   {"pin", names("p\u0131n"), attest.ErrCommonName},
		"a dotted capital I":            {"pin", names("P\u0130N"), attest.ErrCommonName},
		"a long s":                      {"sn1", names("\u017fn1"), attest.ErrCommonName},
		"64 characters":                 {long[1:], names(long[1:]), nil},
		"65 characters":                 {long, names(long), attest.ErrCommonName},
		"in the alternative name alone": {"dev", func(c *x509.Certificate) { c.Subject.CommonName = "x" }, attest.ErrCommonName},
		"valid in four minutes":         {"dev", from(4 * time.Minute), nil},
		"valid in six minutes":          {"dev", from(6 * time.Minute), attest.ErrValidity},
		"expired a second ago":          {"dev", until(-time.Second), attest.ErrValidity},
		"any key usage":                 {"dev", usage(0), nil},
		"for encryption":                {"dev", usage(x509.KeyUsageKeyEncipherment), attest.ErrChain},
		"for servers":                   {"dev", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, attest.ErrChain},
		"for any purpose":               {"dev", func(c *x509.Certificate) { c.ExtKeyUsage = nil }, nil},
	} {
		dev := attesttest.Leaf(t, root, "dev", x.edit)
		if err := attest.CheckLeaf(dev.Certificate, x.id, now); !errors.Is(err, x.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// sign makes a certificate by hand: those of attesttest are all of P-256.
func sign(t testing.TB, cn string, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer, edits ...edit) *x509.Certificate {
	t.Helper()
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: cn}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), BasicConstraintsValid: true}
	for _, f := range edits {
		f(c)
	}
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	return parse(t, der)
}

func parse(t testing.TB, der []byte) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// withSHA1 signs a certificate of an RSA key again, with SHA-1.
func withSHA1(t testing.TB, c *x509.Certificate, key *rsa.PrivateKey) *x509.Certificate {
	t.Helper()
	oid := []byte("\x2a\x86\x48\x86\xf7\x0d\x01\x01")
	der := bytes.ReplaceAll(c.Raw, append(oid, 11), append(slices.Clone(oid), 5))
	sum := sha1.Sum(parse(t, der).RawTBSCertificate)
	sig, err := rsa.SignPKCS1v15(nil, key, crypto.SHA1, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	copy(der[len(der)-len(sig):], sig)
	return parse(t, der)
}

func TestWeakness(t *testing.T) {
	key := func(bits int) *rsa.PrivateKey {
		k, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	strong, weak := key(2048), key(1024)
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	asCA := func(c *x509.Certificate) { c.IsCA = true }
	caOf := func(k crypto.Signer) *x509.Certificate { return sign(t, "ca", nil, k.Public(), k, asCA) }
	leafOf := func(k crypto.Signer, pub crypto.PublicKey) *x509.Certificate { return sign(t, "dev", caOf(k), pub, k) }
	leaf := leafOf(strong, strong.Public())
	sha := withSHA1(t, leaf, strong)
	digest := sha1.Sum(sha.RawTBSCertificate)
	if sha.SignatureAlgorithm != x509.SHA1WithRSA || rsa.VerifyPKCS1v15(&strong.PublicKey, crypto.SHA1, digest[:], sha.Signature) != nil {
		t.Fatal("the SHA-1 signature is no good, and would be refused for that")
	}
	// An intermediate with a SHA-1 signature, between a good leaf and a good root.
	mid := withSHA1(t, sign(t, "mid", caOf(strong), strong.Public(), strong, asCA), strong)
	md5 := parse(t, bytes.ReplaceAll(leaf.Raw, []byte("\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0b"), []byte("\x2a\x86\x48\x86\xf7\x0d\x01\x01\x04")))
	for name, x := range map[string]struct {
		sent []*x509.Certificate
		ca   *x509.Certificate
		ok   bool
	}{
		"RSA 2048":                  {[]*x509.Certificate{leaf}, caOf(strong), true},
		"RSA 1024":                  {[]*x509.Certificate{leafOf(weak, strong.Public())}, caOf(weak), false},
		"P-224":                     {[]*x509.Certificate{leafOf(p224, strong.Public())}, caOf(p224), false},
		"SHA-1":                     {[]*x509.Certificate{sha}, caOf(strong), false},
		"MD5":                       {[]*x509.Certificate{md5}, caOf(strong), false},
		"SHA-1 higher up":           {[]*x509.Certificate{sign(t, "dev", mid, strong.Public(), strong), mid}, caOf(strong), false},
		"SHA-1 on the enrolled one": {[]*x509.Certificate{sign(t, "dev", mid, strong.Public(), strong)}, mid, true}, // nobody relies on that signature
	} {
		find := groups(gs{"g": {Certificate: x.ca}})
		if got, err := attest.FindGroup(x.sent, nil, find, now); (err == nil) != x.ok || (got == "g") != x.ok {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for name, pub := range map[string]crypto.PublicKey{"RSA 1024": weak.Public(), "P-224": p224.Public()} {
		if err := attest.CheckLeaf(leafOf(strong, pub), "dev", now); !errors.Is(err, attest.ErrChain) {
			t.Errorf("a leaf with %s: %v", name, err)
		}
	}
}

// However certificates certify each other, the work for one device is bounded.
func TestHostileMesh(t *testing.T) {
	sent := []*x509.Certificate{nil}
	var cas []*holder
	for range 3 {
		cas = append(cas, attesttest.CA(t, nil, "x"))
	}
	sent[0] = attesttest.Leaf(t, cas[0], "dev").Certificate
	for _, a := range cas { // all of one name, and each certified by all
		for _, b := range cas {
			sent = append(sent, attesttest.Cross(t, b, a).Certificate)
		}
	}
	lookups := 0
	_, err := attest.FindGroup(sent, attest.NewPool(sameName(t, "x", 16)), func(*x509.Certificate, bool) ([]attest.Anchor[string], error) { lookups++; return nil, nil }, now)
	if !errors.Is(err, attest.ErrChain) || !strings.Contains(err.Error(), "too many signatures") || lookups > 2*64 {
		t.Errorf("%d lookups, %v", lookups, err)
	}
}

// A chain of which a bit is changed admits only where the change is outside of all that was signed and verified.
func TestMutatedChains(t *testing.T) {
	root := attesttest.CA(t, nil, "root")
	mid := attesttest.CA(t, root, "mid")
	dev := attesttest.Leaf(t, mid, "dev")
	find := groups(gs{"root": root})
	admitted := 0
	for _, x := range []*holder{dev, mid} {
		for bit := range len(x.Certificate.Raw) * 8 {
			der := bytes.Clone(x.Certificate.Raw)
			der[bit/8] ^= 1 << (bit % 8)
			c, err := x509.ParseCertificate(der)
			if err != nil {
				continue
			}
			sent := certs(dev, mid)
			sent[slices.Index([]*holder{dev, mid}, x)] = c
			if _, err := attest.FindGroup(sent, nil, find, now); err == nil {
				admitted++
				t.Errorf("bit %d of %s", bit, x.Certificate.Subject)
			}
		}
	}
	if _, err := attest.FindGroup(certs(dev, mid), nil, find, now); err != nil || admitted > 0 {
		t.Errorf("%d changed, and as it was: %v", admitted, err)
	}
}

// Certificates are hostile until judged. Whatever is made of a good chain, it leads to its group only by what its CAs
// signed: the leaf, and if the leaf is the intermediate's, the intermediate.
func FuzzFindGroup(f *testing.F) {
	root := attesttest.CA(f, nil, "root")
	mid := attesttest.CA(f, root, "mid")
	dev, direct := attesttest.Leaf(f, mid, "dev"), attesttest.Leaf(f, root, "dev")
	foreign := attesttest.CA(f, nil, "root")
	for _, chain := range [][]*holder{{dev, mid}, {direct}, {dev, root, mid}, {attesttest.Leaf(f, foreign, "dev"), foreign}, {mid}} {
		var der []byte
		for _, h := range chain {
			der = append(der, h.Certificate.Raw...)
		}
		f.Add(der)
	}
	find := groups(gs{"root": root})
	f.Fuzz(func(t *testing.T, der []byte) {
		sent, err := x509.ParseCertificates(der)
		if err != nil || len(sent) == 0 {
			return
		}
		_ = attest.CheckLeaf(sent[0], "dev", now)
		g, err := attest.FindGroup(sent, nil, find, now)
		if err != nil {
			if !errors.Is(err, attest.ErrChain) {
				t.Fatal(err)
			}
			return
		}
		is := func(c *x509.Certificate, h *holder) bool {
			return bytes.Equal(c.RawTBSCertificate, h.Certificate.RawTBSCertificate)
		}
		hasMid := slices.ContainsFunc(sent[1:], func(c *x509.Certificate) bool { return is(c, mid) })
		if g != "root" || !is(sent[0], direct) && !is(sent[0], mid) && !(is(sent[0], dev) && hasMid) {
			t.Fatalf("%q admits %q", g, sent[0].Subject)
		}
	})
}

// Prepared keys give what HMAC gives, over tokens as SDKs write them. DPS-D 39.
func TestGroupKeys(t *testing.T) {
	for _, n := range []int{1, 16, 32, 63, 64, 65, 200} {
		key := bytes.Repeat([]byte{byte(n)}, n)
		for _, id := range []string{"dev-1", "Dev-1", strings.Repeat("x", 55), strings.Repeat("X", 56), strings.Repeat("x", 128)} {
			for signs, want := range map[string]bool{id: true, strings.ToLower(id): true, "other": false} {
				tok, err := attest.ParseToken(attesttest.Token(attest.DeriveKey(key, signs), "scope", id, now))
				if err != nil {
					t.Fatal(err)
				}
				trial := tok.Trial(id)
				for range 2 { // a trial keeps nothing from one key to the next
					if trial.Signed(attest.NewGroupKey([]byte("another"))) || trial.Signed(attest.NewGroupKey(key)) != want {
						t.Errorf("%d octets, %q signed as %q", n, id, signs)
					}
				}
			}
		}
	}
	if s := fmt.Sprint(attest.NewGroupKey([]byte("secret"))); s != "[redacted]" {
		t.Error(s)
	}
}

// Prepared keys are states of a hash, which another implementation of it might not give away.
func TestFIPS(t *testing.T) {
	cmd := exec.Command(os.Args[0], "-test.run=^(TestGroupKeys|TestKeyIdentifiers|TestWeakness|TestCAs)$")
	cmd.Env = append(os.Environ(), "GODEBUG=fips140=on")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("in FIPS mode: %v\n%s", err, out)
	}
}

func BenchmarkGroupKey(b *testing.B) {
	tok, err := attest.ParseToken(attesttest.Token([]byte("key"), "0ne00C0FFEE", "dev-1", now))
	if err != nil {
		b.Fatal(err)
	}
	trial, key := tok.Trial("dev-1"), attest.NewGroupKey(bytes.Repeat([]byte{1}, 64))
	b.ReportAllocs()
	for b.Loop() {
		trial.Signed(key)
	}
}
