package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/sqlstore"
)

// A crowd is a service with so many groups, and requests of their devices.
type crowd struct {
	store *sqlstore.Store
	svc   *registration.Service
}

func newCrowd(groups int, attestation func(i int) *dps.Attestation) *crowd {
	c := &crowd{}
	c.store, c.svc = newService(tempDir())
	var next atomic.Int64
	rate(groups, func() {
		i := int(next.Add(1) - 1)
		id := fmt.Sprintf("group-%05d", i)
		body := must(json.Marshal(dps.EnrollmentGroup{EnrollmentGroupID: id, Enrollment: dps.Enrollment{Attestation: attestation(i)}}))
		must(c.svc.PutEnrollment(context.Background(), registration.Actor{}, registration.Group, id, body, ""))
	})
	return c
}

// beside has devices register with two services in turn, and compares the medians of the time that it takes one device, until
// its registration is durable: whatever else the machine does slows both, and stalls count for neither.
func (b *bench) beside(name string, rounds int, ours, limit *crowd, us, them []*registration.Request) {
	var spent [2][]float64
	for k := range spent {
		spent[k] = make([]float64, rounds*len(us))
	}
	var next atomic.Int64
	rate(rounds*len(us), func() {
		at := int(next.Add(1) - 1)
		i := at % len(us)
		for j := range 2 {
			k := (i + j) % 2
			start := time.Now()
			must([]*crowd{ours, limit}[k].svc.Register(context.Background(), [][]*registration.Request{us, them}[k][i]))
			spent[k][at] = time.Since(start).Seconds()
		}
	})
	x, y := 1/median(spent[0]), 1/median(spent[1])
	b.report(result{name, x, y, x / y, "devices/s"})
}

// inTurn has devices register one after the other, and returns the median of the nanoseconds that it took one.
func (c *crowd) inTurn(requests []*registration.Request) float64 {
	var spent []float64
	for _, r := range requests {
		start := time.Now()
		must(c.svc.Register(context.Background(), r))
		spent = append(spent, float64(time.Since(start).Nanoseconds()))
	}
	return median(spent)
}

func crowdRequest(id string, p attest.Proof) *registration.Request {
	return &registration.Request{IDScope: benchScope, RegistrationID: id, APIVersion: "2019-03-31", Proof: p}
}

// lookup-x509: devices of all the groups in turn, whose CAs have one name, judged and written down, without TLS; against the
// same with ten groups. The devices of lookup-x509-again have registered before. Those of lookup-x509-first have not, and are
// mostly the first of their group since the service has started.
func (b *bench) lookupX509() {
	n := 1000 * b.scale
	build := func(groups int) (*crowd, []*registration.Request) {
		cas := make([]*authority, groups)
		var next atomic.Int64
		rate(groups, func() { cas[next.Add(1)-1] = newAuthority() })
		c := newCrowd(groups, func(i int) *dps.Attestation {
			return &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{SigningCertificates: &dps.X509Certificates{
				Primary: &dps.X509Certificate{Certificate: base64.StdEncoding.EncodeToString(cas[i].cert.Raw)}}}}
		})
		requests := make([]*registration.Request, n)
		next.Store(0)
		rate(n, func() {
			i := int(next.Add(1) - 1)
			id := fmt.Sprintf("dev-%07d", i)
			leaf := must(x509.ParseCertificate(cas[i%groups].issue(id, x509.ExtKeyUsageClientAuth).Certificate[0]))
			requests[i] = crowdRequest(id, attest.Proof{Certificates: []*x509.Certificate{leaf}})
		})
		return c, requests
	}
	for _, groups := range []int{1000, 10000} {
		few, them := build(10)
		many, us := build(groups)
		b.beside(fmt.Sprintf("lookup-x509-first-%d", groups), 1, many, few, us, them)
		b.beside(fmt.Sprintf("lookup-x509-again-%d", groups), 3, many, few, us, them)
		check(errors.Join(many.store.Close(), few.store.Close()))
	}
}

// lookup-key: the same for groups by symmetric key, to which nothing leads but trying. lookup-key-first is the time of a first
// registration, one device at a time, by group; against trying two keys with crypto/hmac and nothing else.
// lookup-key-again, as above, is against ten groups.
func (b *bench) lookupKey() {
	n := 100 * b.scale
	build := func(groups int) (*crowd, []*registration.Request) {
		key := func(i int) []byte {
			sum := sha256.Sum256(fmt.Append(nil, i))
			return sum[:]
		}
		c := newCrowd(groups, func(i int) *dps.Attestation {
			return &dps.Attestation{Type: dps.AttestationSymmetricKey, SymmetricKey: &dps.SymmetricKeyAttestation{
				PrimaryKey: base64.StdEncoding.EncodeToString(key(i)), SecondaryKey: base64.StdEncoding.EncodeToString(key(-i - 1))}}
		})
		var requests []*registration.Request
		for i := range n {
			id := fmt.Sprintf("dev-%07d", i)
			// The last group's: all have to be tried.
			requests = append(requests, crowdRequest(id, attest.Proof{Token: attesttest.Token(attest.DeriveKey(key(groups-1), id), benchScope, id, time.Now().Add(time.Hour))}))
		}
		_, err := c.svc.Register(context.Background(), crowdRequest("warm", attest.Proof{Token: attesttest.Token(key(0), benchScope, "warm", time.Now().Add(time.Hour))}))
		if dps.AsError(err).Code != dps.CodeUnauthorized {
			check(fmt.Errorf("a wrong key: %v", err))
		}
		return c, requests
	}
	token := must(attest.ParseToken(attesttest.Token([]byte(rand.Text()), benchScope, "dev-0000000", time.Now())))
	var spent []float64
	for range 1000 {
		start := time.Now()
		for range 200 {
			token.SignedBy(attest.DeriveKey([]byte("a group's key of thirty-two octet"), "dev-0000000"))
		}
		spent = append(spent, float64(time.Since(start).Nanoseconds())/100)
	}
	bare := median(spent)
	few, them := build(10)
	defer few.store.Close()
	few.inTurn(them)
	for _, groups := range []int{10, 1000, 10000} {
		many, us := build(groups)
		ours := many.inTurn(us) / float64(groups)
		b.report(result{fmt.Sprintf("lookup-key-first-%d", groups), ours, bare, ours / bare, "ns/group"})
		b.beside(fmt.Sprintf("lookup-key-again-%d", groups), 3, many, few, us, them)
		check(many.store.Close())
	}
}
