package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/load"
	"github.com/touchmark/touchmark/pkg/operator"
)

// ownGroups are the enrollment groups that a load made for itself.
type ownGroups struct {
	a     *app
	svc   *service
	name  string
	there []string

	mu      sync.Mutex
	devices []string // with enrollments of their own
}

// cleanTime bounds the removal, which a second interrupt ends at once.
const cleanTime = 10 * time.Minute

// make makes a group for each attestation, with keys that live here only.
func (g *ownGroups) make(ctx context.Context, mix load.Mix, o *loadOptions) (all []load.Attestation, err error) {
	var info struct {
		IDScope string `json:"idScope"`
	}
	if err := g.svc.call(ctx, http.MethodGet, "/touchmark/info", nil, nil, nil, &info); err != nil {
		return nil, importError(err)
	}
	if o.idScope != "" && dps.Fold(o.idScope) != dps.Fold(info.IDScope) {
		return nil, usageError{fmt.Errorf("the service has ID scope %s, not %s", info.IDScope, o.idScope)}
	}
	if err := dps.CheckIDScope(info.IDScope); err != nil {
		return nil, fmt.Errorf("the service's ID scope: %w", err)
	}
	if n := len(slices.DeleteFunc(slices.Clone(mix), func(w load.Weight) bool { return w.Name == "tpm" })); n > 0 {
		g.a.note("making %d groups, %s-…", n, g.name)
	}
	for _, w := range mix {
		id := g.name + "-" + w.Name
		switch w.Name {
		case "symmetric":
			keys := make([]byte, 128)
			if _, err := rand.Read(keys); err != nil {
				return nil, err
			}
			text := base64.StdEncoding.EncodeToString
			err = g.put(ctx, id, &dps.Attestation{Type: dps.AttestationSymmetricKey, SymmetricKey: &dps.SymmetricKeyAttestation{PrimaryKey: text(keys[:64]), SecondaryKey: text(keys[64:])}})
			all = append(all, load.Symmetric(info.IDScope, id, w.Weight, keys[:64]))
		case "x509":
			var key *ecdsa.PrivateKey
			if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
				return nil, err
			}
			var root *x509.Certificate
			root, err = ca.NewRoot(ca.AuthorityConfig{Subject: pkix.Name{CommonName: id}, Signer: key, Now: time.Now().Add(-time.Hour), Validity: 60 * 24 * time.Hour})
			if err != nil {
				return nil, err
			}
			err = g.put(ctx, id, &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{SigningCertificates: &dps.X509Certificates{
				Primary: &dps.X509Certificate{Certificate: base64.StdEncoding.EncodeToString(root.Raw)}}}})
			all = append(all, load.X509(info.IDScope, w.Weight, []*x509.Certificate{root}, key))
		case "tpm":
			all = append(all, load.TPM(info.IDScope, w.Weight, func(id string, ek []byte) error { return g.enroll(ctx, id, ek) }))
		}
		if err != nil {
			return nil, importError(err)
		}
	}
	return all, nil
}

// enroll makes an individual enrollment for a device with a TPM.
func (g *ownGroups) enroll(ctx context.Context, id string, ek []byte) error {
	g.mu.Lock()
	g.devices = append(g.devices, id) // even where the answer is lost
	g.mu.Unlock()
	return g.svc.callJSON(ctx, http.MethodPut, "/enrollments/"+url.PathEscape(id), dps.IndividualEnrollment{RegistrationID: id, Enrollment: dps.Enrollment{
		Attestation: &dps.Attestation{Type: dps.AttestationTPM, TPM: &dps.TPMAttestation{EndorsementKey: base64.StdEncoding.EncodeToString(ek)}}}}, nil)
}

func (g *ownGroups) put(ctx context.Context, id string, attestation *dps.Attestation) error {
	g.there = append(g.there, id) // even where the answer is lost
	return g.svc.callJSON(ctx, http.MethodPut, "/enrollmentGroups/"+url.PathEscape(id), dps.EnrollmentGroup{EnrollmentGroupID: id, Enrollment: dps.Enrollment{Attestation: attestation}}, nil)
}

// remove removes the groups and the registrations of their devices, also when the context has ended, and says what is left.
func (g *ownGroups) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTime)
	defer cancel()
	progress := g.a.newProgress("", 0)
	defer progress.clear()
	var faults []error
	var left []string
	for _, id := range g.there {
		if err := g.removeGroup(ctx, id, progress); err != nil {
			left = append(left, id)
			faults = append(faults, err)
		}
	}
	eg := errgroup.Group{}
	eg.SetLimit(8)
	for _, id := range g.devices {
		eg.Go(func() error {
			return errors.Join(g.delete(ctx, "/registrations/"+url.PathEscape(id)), g.delete(ctx, "/enrollments/"+url.PathEscape(id)))
		})
	}
	if err := eg.Wait(); err != nil {
		left = append(left, "the enrollments of load-…-tpm-…")
		faults = append(faults, err)
	}
	if len(left) == 0 {
		return nil
	}
	return hint(fmt.Errorf("left at the service: %s, with what registered there: %w", strings.Join(left, " and "), errors.Join(faults...)),
		"the next load makes groups of its own; these can be deleted with any client of the service API")
}

func (g *ownGroups) removeGroup(ctx context.Context, id string, progress *progress) error {
	done := 0
	for {
		var page []struct {
			RegistrationID string `json:"registrationId"`
		}
		err := g.svc.call(ctx, http.MethodPost, "/registrations/"+url.PathEscape(id)+"/query", nil, http.Header{"X-Ms-Max-Item-Count": {"1000"}}, nil, &page)
		if notThere(err) {
			return nil
		}
		if err != nil {
			return err
		}
		if len(page) == 0 {
			break
		}
		eg, ctx := errgroup.WithContext(ctx)
		eg.SetLimit(8)
		for _, r := range page {
			eg.Go(func() error { return g.delete(ctx, "/registrations/"+url.PathEscape(r.RegistrationID)) })
		}
		if err := eg.Wait(); err != nil {
			return err
		}
		done += len(page)
		progress.say(func() string { return fmt.Sprintf("removing registrations of %s: %d", id, done) })
	}
	return g.delete(ctx, "/enrollmentGroups/"+url.PathEscape(id))
}

// delete deletes what may not be there.
func (g *ownGroups) delete(ctx context.Context, path string) error {
	err := g.svc.call(ctx, http.MethodDelete, path, nil, nil, nil, nil)
	if notThere(err) {
		return nil
	}
	return err
}

func notThere(err error) bool {
	return errors.Is(err, operator.ErrNotFound)
}
