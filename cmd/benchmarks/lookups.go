package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
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
		must(c.svc.PutEnrollment(context.Background(), registration.Group, id, body, ""))
	})
	return c
}

// register returns how many requests are answered in a second, each with what is durable by then.
func (c *crowd) register(requests []*registration.Request) float64 {
	return clients(len(requests), func(i int) { must(c.svc.Register(context.Background(), requests[i])) })
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
	few, fewRequests := build(10)
	defer few.store.Close()
	first := few.register(fewRequests)
	for _, groups := range []int{1000, 10000} {
		many, requests := build(groups)
		ours := many.register(requests)
		b.report(result{fmt.Sprintf("lookup-x509-first-%d", groups), ours, first, ours / first, "devices/s"})
		b.compare(fmt.Sprintf("lookup-x509-again-%d", groups), "devices/s", func() float64 { return many.register(requests) }, func() float64 { return few.register(fewRequests) })
		check(many.store.Close())
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
	start := time.Now()
	const tries = 100_000
	for range tries {
		for range 2 {
			token.SignedBy(attest.DeriveKey([]byte("a group's key of thirty-two octets"), "dev-0000000"))
		}
	}
	bare := float64(time.Since(start).Nanoseconds()) / tries
	few, fewRequests := build(10)
	defer few.store.Close()
	for _, groups := range []int{10, 1000, 10000} {
		many, requests := build(groups)
		start := time.Now()
		for _, r := range requests {
			must(many.svc.Register(context.Background(), r))
		}
		ours := float64(time.Since(start).Nanoseconds()) / float64(len(requests)*groups)
		b.report(result{fmt.Sprintf("lookup-key-first-%d", groups), ours, bare, ours / bare, "ns/group"})
		b.compare(fmt.Sprintf("lookup-key-again-%d", groups), "devices/s", func() float64 { return many.register(requests) }, func() float64 { return few.register(fewRequests) })
		check(many.store.Close())
	}
}
