package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
	"github.com/touchmark/touchmark/pkg/order"
	"github.com/touchmark/touchmark/pkg/registration"
)

func must[T any](v T, err error) T {
	if err != nil {
		fmt.Fprintln(os.Stderr, "factory:", err)
		os.Exit(1)
	}
	return v
}

// factoryMain is the program "factory SCOPE" of the scripts: an owner who orders ten units, a station that holds the order and one
// that works on a lease of it, with what they write, honest and not. It writes public keys, bundles and reports into its directory.
func factoryMain() {
	scope := os.Args[1]
	party := func(name string) *ecdsa.PrivateKey {
		key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		must(0, os.WriteFile(name+".pem", must(publicPEM(key.Public())), 0o600))
		return key
	}
	owner, holder, leased := party("owner"), party("holder"), party("leased")
	now := time.Now().UTC().Truncate(time.Second)
	caKey := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	root := must(ca.NewRoot(ca.AuthorityConfig{Subject: pkix.Name{CommonName: "factory"}, Signer: caKey, Now: now, Validity: time.Hour}))
	o := &order.Order{Version: 1, ID: "PO-1", Product: "pump", Profile: "x509-group", ProfileSHA256: strings.Repeat("ab", 32), Quantity: 10,
		Serials: order.Serials{From: "SN01", To: "SN20"}, IDScope: scope, GlobalEndpoint: "dps.example.net", Issuer: must(evidence.KeyHash(caKey.Public())),
		Holder: must(signed.KeyID(holder.Public())), Stations: []string{must(signed.KeyID(leased.Public()))}, NotBefore: now, NotAfter: now.Add(time.Hour)}
	paper := must(o.Sign(owner))
	l := &order.Lease{Version: 1, ID: "PO-1/a", Order: string(paper), Station: must(signed.KeyID(leased.Public())), Quantity: 3,
		Serials: order.Serials{From: "SN11", To: "SN13"}, NotBefore: now, NotAfter: o.NotAfter}
	lease := must(l.Sign(holder, []crypto.PublicKey{owner.Public()}))

	unit := func(n int, revision int64) *bundle.Entry {
		var hash [32]byte
		hash[0], hash[1] = byte(n), byte(revision)
		return &bundle.Entry{Serial: fmt.Sprintf("SN%02d", n), Revision: revision,
			Device: &bundle.GroupDevice{RegistrationID: fmt.Sprintf("pump-%02d", n), Group: "pumps", KeyHash: hex.EncodeToString(hash[:])}}
	}
	units := func(from, to int) (all []*bundle.Entry) {
		for n := from; n <= to; n++ {
			all = append(all, unit(n, 0))
		}
		return all
	}
	gone := func(n int, state bundle.State) *bundle.Entry {
		u := unit(n, 0)
		return &bundle.Entry{Serial: u.Serial, Retired: &bundle.RetiredDevice{RegistrationID: u.Device.RegistrationID, Group: "pumps", KeyHash: u.Device.KeyHash, State: state, Reason: "radio dead", At: now}}
	}
	group := &bundle.Entry{Closed: true, Group: &dps.EnrollmentGroup{EnrollmentGroupID: "pumps", Enrollment: dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationX509,
		X509: &dps.X509Attestation{SigningCertificates: &dps.X509Certificates{Primary: &dps.X509Certificate{Certificate: base64.StdEncoding.EncodeToString(root.Raw)}}}}}}}
	write := func(name string, by crypto.Signer, grant []byte, e ...*bundle.Entry) {
		w := must(bundle.NewWriter(bundle.WriterConfig{Path: name + ".tmb", IDScope: scope, Created: now, Signer: by}))
		w.SetGrant(grant)
		for _, x := range e {
			must(0, w.Add(x))
		}
		must(w.Close())
	}
	write("first", holder, paper, append([]*bundle.Entry{group}, units(1, 5)...)...)
	write("second", holder, paper, gone(5, bundle.Reworked), unit(5, 1), unit(6, 0), unit(7, 0))
	write("part", leased, lease, units(11, 12)...)
	write("lease", leased, lease, units(11, 13)...)
	write("over", holder, paper, units(7, 10)...)
	write("plain", holder, nil, units(8, 8)...)
	write("stolen", leased, paper, units(8, 8)...)

	report := func(name string, by *ecdsa.PrivateKey, edit func(*order.Report)) {
		r := &order.Report{Version: 1, Grant: "PO-1", Order: "PO-1", Station: must(signed.KeyID(by.Public())), At: now, Closed: true, Ordered: 10,
			Minted: 7, Stamped: 7, Verified: 7, Sealed: 7, Exported: 7, Reworked: 1, Checkpoint: "checkpoint",
			Leases: []order.LeaseLine{{Lease: "PO-1/a", Station: l.Station, Quantity: 3, Used: 3}}}
		edit(r)
		must(0, os.WriteFile(name+".report", must(r.Sign(by)), 0o600))
	}
	report("good", holder, func(*order.Report) {})
	report("short", holder, func(r *order.Report) {
		r.Stamped, r.Verified, r.Sealed, r.Exported, r.Scrapped, r.Minted = 5, 5, 5, 5, 1, 6
		r.Missing = []order.MissingUnit{{Serial: "SN06", State: "minted"}, {Serial: "SN07", State: "scrapped", Reason: "dropped"}}
	})
	report("out", holder, func(r *order.Report) { r.Leases[0].Used = -1 })
	report("lease", leased, func(r *order.Report) {
		r.Grant, r.Ordered, r.Leases, r.Reworked = "PO-1/a", 3, nil, 0
		r.Minted, r.Stamped, r.Verified, r.Sealed, r.Exported = 3, 3, 3, 3, 3
	})
	os.Exit(0)
}

// What a reconciliation counts, with every gap on its own.
func TestReconcile(t *testing.T) {
	full := order.Report{Grant: "PO", Order: "PO", Ordered: 10, Minted: 10, Stamped: 10, Verified: 10, Sealed: 10, Exported: 10, Closed: true}
	all := registration.Tally{Used: 10, Imported: 10}
	for name, c := range map[string]struct {
		edit     func(*order.Report, *registration.OrderView)
		balanced bool
		gap      string
	}{
		"balanced":         {func(*order.Report, *registration.OrderView) {}, true, ""},
		"one never made":   {func(r *order.Report, v *registration.OrderView) { r.Ordered = 11 }, false, "minted 1"},
		"one not stamped":  {func(r *order.Report, v *registration.OrderView) { r.Minted, r.Ordered = 11, 11 }, false, "stamped 1"},
		"one not verified": {func(r *order.Report, v *registration.OrderView) { r.Minted, r.Ordered, r.Stamped = 11, 11, 11 }, false, "verified 1"},
		"one not exported": {func(r *order.Report, v *registration.OrderView) { r.Exported, v.Imported = 9, 9 }, false, "exported 1"},
		"one not imported": {func(r *order.Report, v *registration.OrderView) { v.Imported = 9 }, false, "imported 1"},
		"one too many":     {func(r *order.Report, v *registration.OrderView) { v.Imported = 11 }, false, "imported -1"},
		"refused":          {func(r *order.Report, v *registration.OrderView) { v.Refused = 1 }, false, ""},
		"voided, made again": {func(r *order.Report, v *registration.OrderView) {
			r.Voided, r.Missing = 1, []order.MissingUnit{{Serial: "S", State: "voided"}}
		}, true, ""},
		"a lease came back": {func(r *order.Report, v *registration.OrderView) {
			r.Ordered, r.Leases = 14, []order.LeaseLine{{Lease: "PO/a", Quantity: 4, Used: 4}}
			v.Imported, v.Leases = 13, []*registration.Grant{{ID: "PO/a", Tally: registration.Tally{Used: 4, Imported: 3}}} // one of its was scrapped since
		}, true, ""},
		"a lease is out": {func(r *order.Report, v *registration.OrderView) {
			r.Leases = []order.LeaseLine{{Lease: "PO/a", Quantity: 4, Used: -1}}
		}, false, ""},
	} {
		r, v := full, &registration.OrderView{Grant: &registration.Grant{ID: "PO", Tally: all}}
		c.edit(&r, v)
		rec := reconcile(&r, v)
		var gaps []string
		for _, s := range rec.Steps {
			if s.Missing != 0 {
				gaps = append(gaps, fmt.Sprint(s.Step, " ", s.Missing))
			}
		}
		if got := strings.Join(gaps, ", "); got != c.gap || rec.Balanced != c.balanced {
			t.Errorf("%s: balanced %v, gaps %q", name, rec.Balanced, got)
		}
	}
}
