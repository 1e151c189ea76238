package attest_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
)

var key7 = []byte(strings.Repeat("\x07", 32))

// Device API, section 8.3: signatures over sr as written. DPS-D 32, 34, 35, 40.
func TestTokenVectors(t *testing.T) {
	for sr, sig := range map[string]string{
		"0ne00000001/registrations/Dev-1":     "sRiYI2AfAwMLMHPMA4nj2/xmW2GWQ32zzy4fH9ePgnY=",
		"0ne00000001%2Fregistrations%2FDev-1": "ViB1ZQyJSZrkE4N9wayzWUWeNdKqTsTrF6YlfzAUhnY=",
		"0ne00000001%2fregistrations%2fdev-1": "OZMZcqM6ktMXNrGsSSfdSypK3jfIFvWtweFAoKL89J0=",
	} {
		for _, form := range []string{
			"SharedAccessSignature sr=%s&sig=%s&se=1700000000&skn=registration",
			"sharedaccesssignature   sr=%s&sig=%s&se=1700000000",
			"SharedAccessSignature sr=%s&sig=%s&foo=bar&se=1700000000&skn=",
			"SharedAccessSignature skn=somebody&se=1700000000&sig=%[2]s&sr=%[1]s",
		} {
			for _, s := range []string{sig, url.QueryEscape(sig), strings.NewReplacer("+", "%2b", "/", "%2f", "=", "%3d").Replace(sig), strings.ReplaceAll(sig, "=", "")} {
				tok, err := attest.ParseToken(fmt.Sprintf(form, sr, s))
				if err != nil {
					t.Errorf("%s: %v", sr, err)
					continue
				}
				if !tok.SignedBy(key7) || tok.SignedBy(key7[1:]) {
					t.Errorf("%s: signature", sr)
				}
				if !tok.ForDevice("0NE00000001", "dev-1") || tok.ForDevice("0ne00000001", "dev-2") || tok.ForDevice("0ne00000002", "dev-1") {
					t.Errorf("%s is for %q", sr, tok.Resource)
				}
			}
		}
	}
	// DPS-D 35: a plus is a plus, however it is written, and no space.
	expiry, sig := 1700000000, ""
	for ; !strings.Contains(sig, "+"); expiry++ {
		h := hmac.New(sha256.New, key7)
		fmt.Fprintf(h, "a\n%d", expiry+1)
		sig = base64.StdEncoding.EncodeToString(h.Sum(nil))
	}
	for plus, ok := range map[string]bool{"+": true, "%2b": true, "%2B": true, "%20": false} {
		tok, err := attest.ParseToken(fmt.Sprintf("SharedAccessSignature sr=a&sig=%s&se=%d", strings.ReplaceAll(sig, "+", plus), expiry))
		if (err == nil && tok.SignedBy(key7)) != ok {
			t.Errorf("a plus written %s: %v", plus, err)
		}
	}
	// DPS-D 33: signed over the decoded resource, written encoded.
	h := hmac.New(sha256.New, key7)
	fmt.Fprint(h, "a/registrations/b\n1700000000")
	tok, err := attest.ParseToken("SharedAccessSignature sr=a%2Fregistrations%2Fb&se=1700000000&sig=" + url.QueryEscape(base64.StdEncoding.EncodeToString(h.Sum(nil))))
	if err != nil || tok.SignedBy(key7) {
		t.Errorf("signed over the decoded resource: %v", err)
	}
}

// DPS-D 37.
func TestExpiry(t *testing.T) {
	tok, err := attest.ParseToken("SharedAccessSignature sr=a&se=1700000000&sig=" + strings.Repeat("A", 43))
	if err != nil {
		t.Fatal(err)
	}
	for late, want := range map[time.Duration]bool{time.Minute: false, time.Hour: true, -24 * time.Hour: false} {
		if got := tok.Expired(time.Unix(1700000000, 0).Add(late)); got != want {
			t.Errorf("%v after its expiry: expired %v", late, got)
		}
	}
}

func TestMalformedTokens(t *testing.T) {
	good := "sr=a&se=1&sig=" + strings.Repeat("A", 43)
	for _, s := range []string{"", "Bearer x", "SharedAccessSignature", "SharedAccessSignature sr=a&se=1", "SharedAccessSignature " + good + "&sr=b",
		"SharedAccessSignature sr=%zz&se=1&sig=" + strings.Repeat("A", 43), "SharedAccessSignature sr=a&se=-1&sig=" + strings.Repeat("A", 43),
		"SharedAccessSignature sr=a&se=1&sig=AAAA", "SharedAccessSignature " + good + "&x=" + strings.Repeat("y", 3000)} {
		if _, err := attest.ParseToken(s); !errors.Is(err, attest.ErrMalformed) {
			t.Errorf("%.60q: %v", s, err)
		}
	}
}

// DPS-D 39, DPS-S 40.
func TestDeriveKey(t *testing.T) {
	group, _ := base64.StdEncoding.DecodeString("8isrFI1sGsIlvvFSSFRiMfCNzv21fjbE/+ah/lSh3lF8e2YG1Te7w1KpZhJFFXJrqYKi9yegxkqIChbqOS9Egw==")
	for id, want := range map[string]string{
		"sn-007-888-abc-mac-a1-b2-c3-d4-e5-f6": "Jsm0lyGpjaVYVP2g3FnmnmG9dI/9qU24wNoykUmermc=",
		"dev-1":                                "p1YFPLQZuL5qaxFVrb3Uz4y0hleay+ET6RiT5xj6Jsw=",
		"Dev-1":                                "F1mXZWHA8qWiusvDoMAQkOQozj2xIZxYw+EXfZAaWos=",
	} {
		if got := base64.StdEncoding.EncodeToString(attest.DeriveKey(group, id)); got != want {
			t.Errorf("%s: %s", id, got)
		}
	}
}

var now = attesttest.Now

// groups is a lookup as the service's is, among the CAs of groups by name.
func groups(g map[string]*attesttest.Holder) attest.Lookup[string] {
	return func(child *x509.Certificate, byName bool) ([]attest.Anchor[string], error) {
		var out []attest.Anchor[string]
		for name, n := range g {
			named := byName || slices.ContainsFunc(attest.KeyIDs(n.Certificate), func(id []byte) bool { return bytes.Equal(id, attest.AuthorityKeyID(child)) })
			if named && bytes.Equal(n.Certificate.RawSubject, child.RawIssuer) {
				out = append(out, attest.Anchor[string]{Certificate: n.Certificate, Group: name})
			}
		}
		return out, nil
	}
}

// Device API, section 7.3; DPS-D 42, 43, 45, 46, DPS-S 83, 85.
func TestFindGroup(t *testing.T) {
	root := attesttest.CA(t, nil, "root")
	mid := attesttest.CA(t, root, "mid")
	low := attesttest.CA(t, mid, "low")
	dev := attesttest.Leaf(t, low, "dev")
	c := func(n ...*attesttest.Holder) (out []*x509.Certificate) {
		for _, x := range n {
			out = append(out, x.Certificate)
		}
		return out
	}
	tight := attesttest.CA(t, nil, "root", func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true })
	tightMid := attesttest.CA(t, tight, "tmid")
	old := attesttest.CA(t, root, "old", func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Minute) })
	noCA := attesttest.Leaf(t, root, "noca")
	noSign := attesttest.CA(t, root, "nosign", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign })
	twin := attesttest.CA(t, nil, "low") // the same name, another key
	for name, x := range map[string]struct {
		presented []*x509.Certificate
		groups    map[string]*attesttest.Holder
		want      string
	}{
		"issuer enrolled, leaf alone":       {c(dev), map[string]*attesttest.Holder{"low": low}, "low"},
		"root enrolled, intermediates sent": {c(dev, low, mid), map[string]*attesttest.Holder{"root": root}, "root"},
		"in any order, root sent too":       {c(dev, root, mid, low), map[string]*attesttest.Holder{"root": root}, "root"},
		"root enrolled, leaf alone":         {c(dev), map[string]*attesttest.Holder{"root": root}, ""},
		"first from the leaf decides":       {c(dev, low, mid), map[string]*attesttest.Holder{"root": root, "mid": mid, "low": low}, "low"},
		"of one name, the one that signed":  {c(dev), map[string]*attesttest.Holder{"twin": twin, "low": low}, "low"},
		"of one name, another key":          {c(dev), map[string]*attesttest.Holder{"twin": twin}, ""},
		"path length":                       {c(attesttest.Leaf(t, tightMid, "dev"), tightMid), map[string]*attesttest.Holder{"tight": tight}, ""},
		"expired intermediate":              {c(attesttest.Leaf(t, old, "dev"), old), map[string]*attesttest.Holder{"root": root}, ""},
		"expired anchor":                    {c(attesttest.Leaf(t, old, "dev")), map[string]*attesttest.Holder{"old": old}, ""},
		"intermediate is no CA":             {c(attesttest.Leaf(t, noCA, "dev"), noCA), map[string]*attesttest.Holder{"root": root}, ""},
		"intermediate may not sign":         {c(attesttest.Leaf(t, noSign, "dev"), noSign), map[string]*attesttest.Holder{"root": root}, ""},
		"nothing presented":                 {nil, map[string]*attesttest.Holder{"root": root}, ""},
		"too many":                          {c(dev, low, mid, root, old, noCA, noSign, twin, tight, tightMid, dev), map[string]*attesttest.Holder{"low": low}, ""},
	} {
		got, err := attest.FindGroup(x.presented, nil, groups(x.groups), now)
		if got != x.want || (err == nil) != (x.want != "") {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for name, x := range map[string]struct {
		id   string
		at   time.Time
		want error
	}{"good": {"DEV", now, nil}, "name": {"other", now, attest.ErrCommonName}, "late": {"dev", now.Add(2 * time.Hour), attest.ErrValidity}, "early": {"dev", now.Add(-2 * time.Hour), attest.ErrValidity}} {
		if err := attest.CheckLeaf(dev.Certificate, x.id, x.at); !errors.Is(err, x.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What a certificate says it is for counts, also where it says it in words that are not known here.
func TestPurposes(t *testing.T) {
	root := attesttest.CA(t, nil, "root")
	servers := func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }
	documents := func(c *x509.Certificate) {
		c.ExtKeyUsage, c.UnknownExtKeyUsage = nil, []asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 36}}
	}
	critical := func(c *x509.Certificate) {
		c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
	}
	for why, dev := range map[string]*attesttest.Holder{
		"servers only": attesttest.Leaf(t, root, "dev", servers), "documents only": attesttest.Leaf(t, root, "dev", documents),
		"a critical extension": attesttest.Leaf(t, root, "dev", critical), "a Kelvin sign": attesttest.Leaf(t, root, "\u212aey1", func(c *x509.Certificate) { c.DNSNames = nil }),
	} {
		id := "dev"
		if why == "a Kelvin sign" {
			id = "key1"
		}
		if attest.CheckLeaf(dev.Certificate, id, now) == nil {
			t.Errorf("%s: taken", why)
		}
	}
	mid := attesttest.CA(t, root, "mid", servers)
	dev := attesttest.Leaf(t, mid, "dev")
	if g, err := attest.FindGroup([]*x509.Certificate{dev.Certificate, mid.Certificate}, nil, groups(map[string]*attesttest.Holder{"root": root}), now); err == nil {
		t.Errorf("an intermediate for servers vouches for a device of %q", g)
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add("SharedAccessSignature sr=0ne00000001%2Fregistrations%2FDev-1&sig=ViB1ZQyJSZrkE4N9wayzWUWeNdKqTsTrF6YlfzAUhnY%3D&se=1700000000&skn=registration")
	f.Add("SharedAccessSignature sr=a&sig=" + strings.Repeat("+", 43) + "&se=1")
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := attest.ParseToken(s)
		if err == nil && (tok.Expiry.IsZero() || len(s) > 2048) {
			t.Fatal(s)
		}
		if err == nil {
			tok.SignedBy(key7)
			tok.ForDevice("a", "b")
		}
	})
}
