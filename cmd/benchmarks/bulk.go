package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/operator"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/serviceapi"
)

// import-bulk: the same enrollments by the service API, ten to a call from sixteen callers for each core over TLS, the operator's
// client beside the service; against the same bare inserts.
func (b *bench) importBulk() {
	f := newFleet(tempDir(), 10_000*b.scale)
	b.compare("import-bulk", "rows/s", f.bulk, f.bare)
}

func (f *fleet) bulk() float64 {
	dir := must(os.MkdirTemp(f.dir, "bulk-*"))
	store, _ := newService(dir)
	defer func() { check(store.Close()) }()
	ctx, stop := context.WithCancel(context.Background())
	key := make([]byte, 32)
	_, _, err := registration.EditScope(ctx, store, benchScope, registration.Actor{}, "create", time.Now(), func(*registration.Scope) (*registration.Scope, error) {
		return &registration.Scope{ID: benchScope, Name: "bench"}, nil
	})
	check(err)
	check(store.Update(ctx, func(tx registration.Tx) error {
		return tx.PutPolicy(benchScope, &registration.Policy{Name: "owner", Rights: "EnrollmentWrite", Primary: key, Secondary: key})
	}))
	scopes := registration.NewScopes(registration.ScopesConfig{Config: registration.Config{Store: store}})
	a := newAuthority()
	server := a.issue("localhost", x509.ExtKeyUsageServerAuth)
	dc := door.Config{TLS: door.TLSConfig(func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &server, nil }), MaxPerAddress: 1 << 20}
	dc.TLS.NextProtos = []string{"http/1.1"}
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	front := httpd.New(httpd.Config{Registrar: scopes, Door: door.New(dc), Handlers: serviceapi.New(serviceapi.Config{Scopes: scopes, First: benchScope, Hosts: []string{"localhost"}}).Handlers()})
	var doors sync.WaitGroup
	doors.Go(func() { check(front.Serve(ctx, l)) })
	defer doors.Wait()
	defer stop()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	client := operator.New(operator.Config{Roots: roots, Connection: must(operator.ParseConnection(fmt.Sprintf("HostName=localhost:%s;SharedAccessKeyName=owner;SharedAccessKey=%s", port, base64.StdEncoding.EncodeToString(key))))})
	docs := make(chan []*operator.Document, 64)
	go func() {
		defer close(docs)
		var page []*operator.Document
		for i, der := range f.certificates(0, f.n) {
			page = append(page, must(operator.NewDocument(scaleEnrollment(i, der))))
			if len(page) == operator.MaxBulk {
				docs <- page
				page = nil
			}
		}
		if page != nil {
			docs <- page
		}
	}()
	var done atomic.Int64
	start := time.Now()
	clients(32, func(int) {
		for page := range docs {
			refused, _, err := client.Bulk(ctx, operator.BulkCreate, page)
			if err != nil || len(refused) > 0 {
				check(fmt.Errorf("%d refused: %w", len(refused), err))
			}
			done.Add(int64(len(page)))
		}
	})
	return float64(done.Load()) / time.Since(start).Seconds()
}
