package operator

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strings"

	"github.com/touchmark/touchmark/pkg/dps"
)

// MaxBulk is how many enrollments a bulk call takes (service API, section 1.9).
const MaxBulk = 10

const pageSize = 500

// Any is the tag that goes with every version.
const Any = "*"

func (k Kind) item(id string) string { return k.path() + "/" + url.PathEscape(id) }

func ifMatch(tag string) http.Header {
	if tag == "" {
		return nil
	}
	return http.Header{"If-Match": {tag}}
}

// Get returns an enrollment, without its keys and its certificates. The error is ErrNotFound.
func (c *Client) Get(ctx context.Context, k Kind, id string) (*Document, error) {
	d := &Document{}
	_, err := c.do(ctx, request{method: http.MethodGet, path: k.item(id), again: true}, d)
	if err != nil {
		return nil, err
	}
	return d, nil
}

// Create makes an enrollment, and returns it as the service has it: with its keys, those too that the service made. The error is
// ErrExists where there is one of that ID, unless it is there because an earlier attempt of this very call made it.
func (c *Client) Create(ctx context.Context, d *Document) (*Document, error) {
	d = d.clone()
	d.Portable()
	out, lost, err := c.put(ctx, d, "")
	if !lost || !errors.Is(err, ErrExists) {
		return out, err
	}
	changes, have, err2 := c.Differs(ctx, d)
	if err2 != nil || len(changes) > 0 {
		return nil, err
	}
	return have, nil
}

// Replace puts a whole enrollment in the place of the version that the tag names, or of any with [Any]. The error is ErrNotFound or
// ErrChanged.
func (c *Client) Replace(ctx context.Context, d *Document, tag string) (*Document, error) {
	d = d.clone()
	d.Portable()
	out, lost, err := c.put(ctx, d, tag)
	if !lost || !errors.Is(err, ErrChanged) {
		return out, err
	}
	changes, have, err2 := c.Differs(ctx, d)
	if err2 != nil || len(changes) > 0 {
		return nil, err
	}
	return have, nil
}

func (c *Client) put(ctx context.Context, d *Document, tag string) (*Document, bool, error) {
	b, err := json.Marshal(d)
	if err != nil {
		return nil, false, err
	}
	out := &Document{}
	a, err := c.do(ctx, request{method: http.MethodPut, path: d.Kind.item(d.ID), header: ifMatch(tag), body: b, again: true}, out)
	if err != nil {
		return nil, a.lost, err
	}
	return out, a.lost, nil
}

// Edit gets an enrollment, changes it, and puts it back on condition that nobody else changed it meanwhile. Without a tag the whole is
// tried again when somebody did; with one, the error is ErrChanged. Keys that the service does not show are sent along, since some
// services make new ones where there are none (service API, section 1.6, rule 3). Edit returns what was there before too. A change
// that returns ErrUnchanged leaves the enrollment alone.
func (c *Client) Edit(ctx context.Context, k Kind, id, tag string, change func(*Document) error) (before, after *Document, err error) {
	for range 5 {
		if before, err = c.Get(ctx, k, id); err != nil {
			return nil, nil, err
		}
		if tag != "" && tag != Any && strings.Trim(tag, `"`) != strings.Trim(before.ETag(), `"`) {
			return nil, nil, &Error{Host: c.host, Status: http.StatusPreconditionFailed, Code: dps.CodeETagMismatch, Message: fmt.Sprintf("%s has another etag by now", before)}
		}
		d := before.clone()
		if err := change(d); errors.Is(err, ErrUnchanged) {
			return before, before, nil
		} else if err != nil {
			return nil, nil, err
		}
		if err := c.keepKeys(ctx, d); err != nil {
			return nil, nil, err
		}
		after, err = c.Replace(ctx, d, before.ETag())
		if tag != "" || !errors.Is(err, ErrChanged) {
			break
		}
	}
	return before, after, err
}

// ErrUnchanged is what a change for [Client.Edit] returns where there is nothing to do.
var ErrUnchanged = errors.New("unchanged")

// keepKeys fills in the symmetric keys that a document lacks.
func (c *Client) keepKeys(ctx context.Context, d *Document) error {
	e, err := d.Enrollment()
	if err != nil || e.Attestation == nil || e.Attestation.Type != dps.AttestationSymmetricKey {
		return err
	}
	k := e.Attestation.SymmetricKey
	if k == nil {
		k = &dps.SymmetricKeyAttestation{}
	}
	if k.PrimaryKey != "" && k.SecondaryKey != "" {
		return nil
	}
	was, err := c.Mechanism(ctx, d.Kind, d.ID)
	if err != nil || was.SymmetricKey == nil {
		return err
	}
	if k.PrimaryKey == "" {
		k.PrimaryKey = was.SymmetricKey.PrimaryKey
	}
	if k.SecondaryKey == "" {
		k.SecondaryKey = was.SymmetricKey.SecondaryKey
	}
	e.Attestation.SymmetricKey = k
	return d.Set("attestation", e.Attestation)
}

// Delete removes an enrollment: the version that the tag names, or any with "". The error is ErrNotFound or ErrChanged.
func (c *Client) Delete(ctx context.Context, k Kind, id, tag string) error {
	return c.remove(ctx, k.item(id), tag)
}

func (c *Client) remove(ctx context.Context, path, tag string) error {
	a, err := c.do(ctx, request{method: http.MethodDelete, path: path, header: ifMatch(tag), again: true}, nil)
	if a.lost && errors.Is(err, ErrNotFound) {
		return nil // an earlier attempt did it
	}
	return err
}

// Mechanism returns how an enrollment attests, with its symmetric keys: a call of its own, which services write down.
func (c *Client) Mechanism(ctx context.Context, k Kind, id string) (*dps.Attestation, error) {
	a := &dps.Attestation{}
	_, err := c.do(ctx, request{method: http.MethodPost, path: k.item(id) + "/attestationmechanism", again: true}, a)
	return a, err
}

// All yields all enrollments of a kind, as Get returns them but for their registration state. Records that come and go meanwhile
// may be in it or not.
func (c *Client) All(ctx context.Context, k Kind) iter.Seq2[*Document, error] {
	return func(yield func(*Document, error) bool) {
		pages(ctx, c.caller, http.MethodPost, k.path()+"/query", pageSize, yield)
	}
}

// A BulkMode says what a bulk call does with its enrollments.
type BulkMode string

// The modes. There is none that replaces whatever is there: Azure refuses an update without a tag as if it were a create.
const (
	BulkCreate BulkMode = "create"
	BulkUpdate BulkMode = "updateIfMatchETag"
	BulkDelete BulkMode = "delete"
)

// A BulkError is what became of one enrollment of a bulk call that was not taken.
type BulkError struct {
	RegistrationID    string   `json:"registrationId"`
	EnrollmentGroupID string   `json:"enrollmentGroupId"`
	Code              dps.Code `json:"errorCode"`
	Status            string   `json:"errorStatus"` // untrusted text
}

// Bulk makes one call for up to MaxBulk enrollments of one kind. It returns those that were not taken, by folded ID; the others were.
// With lost an earlier attempt may have taken some of these.
func (c *Client) Bulk(ctx context.Context, mode BulkMode, docs []*Document) (refused map[string]BulkError, lost bool, err error) {
	k := docs[0].Kind
	b, err := json.Marshal(map[string]any{k.list(): docs, "mode": mode})
	if err != nil {
		return nil, false, err
	}
	var res struct {
		Errors       []BulkError `json:"errors"`
		IsSuccessful bool        `json:"isSuccessful"`
	}
	a, err := c.do(ctx, request{method: http.MethodPost, path: k.path(), body: b, again: true}, &res)
	if err != nil {
		return nil, a.lost, err
	}
	if !res.IsSuccessful && len(res.Errors) == 0 {
		return nil, a.lost, fmt.Errorf("the service at %s says that a bulk call failed, and not what of it", c.host)
	}
	refused = make(map[string]BulkError)
	for _, e := range res.Errors {
		refused[dps.Fold(k.pick(e.RegistrationID, e.EnrollmentGroupID))] = e
	}
	return refused, a.lost, nil
}

// Judge asks touchmark's service what would be refused of up to [MaxBulk] documents of one kind: to be made, or, with an etag, to be
// put in the place of that version. Nothing is written. The error is ErrUnsupported where the service is another's, does not say, or says it
// to others only.
func (c *Client) Judge(ctx context.Context, docs []*Document) (refused map[string]BulkError, err error) {
	k := docs[0].Kind
	b, err := json.Marshal(map[string]any{k.list(): docs})
	if err != nil {
		return nil, err
	}
	var res struct {
		Errors []BulkError `json:"errors"`
	}
	_, err = c.do(ctx, request{method: http.MethodPost, path: "/touchmark/judge" + k.path(), body: b, again: true}, &res)
	var e *Error
	if errors.As(err, &e) && !errors.Is(err, ErrThrottled) && e.Status < 500 {
		return nil, ErrUnsupported
	}
	refused = make(map[string]BulkError)
	for _, e := range res.Errors {
		refused[dps.Fold(k.pick(e.RegistrationID, e.EnrollmentGroupID))] = e
	}
	return refused, err
}

// Registration returns what became of a device. The error is ErrNotFound.
func (c *Client) Registration(ctx context.Context, id string) (*dps.RegistrationState, error) {
	st := &dps.RegistrationState{}
	_, err := c.do(ctx, request{method: http.MethodGet, path: "/registrations/" + url.PathEscape(id), again: true}, st)
	return st, err
}

// Registrations yields what became of the devices that came in by a group. The error is ErrNotFound.
func (c *Client) Registrations(ctx context.Context, group string) iter.Seq2[*dps.RegistrationState, error] {
	return func(yield func(*dps.RegistrationState, error) bool) {
		pages(ctx, c.caller, http.MethodPost, "/registrations/"+url.PathEscape(group)+"/query", pageSize, yield)
	}
}

// A Registered is what became of a device, and the folded ID of the group that it came in by; "" for an individual enrollment.
type Registered struct {
	dps.RegistrationState
	EnrollmentGroupID string `json:"enrollmentGroupId,omitempty"`
}

// AllRegistrations yields what became of all devices, or of those that came in by a group, which at a touchmark service need not be
// there any more. Azure has no list of all: there every group is asked for its devices, and then for the device of every individual
// enrollment, a call for each. The error is ErrNotFound for a group that nothing is known of.
func (c *Client) AllRegistrations(ctx context.Context, group string) iter.Seq2[*Registered, error] {
	return func(yield func(*Registered, error) bool) {
		path := "/touchmark/registrations"
		if group != "" {
			path = "/touchmark/groups/" + url.PathEscape(group) + "/registrations"
		}
		begun, elsewhere := false, false
		pages(ctx, c.caller, http.MethodGet, path, pageSize, func(r *Registered, err error) bool {
			// Somebody else's service may refuse a path that it does not know, and take the same token elsewhere.
			if elsewhere = !begun && (errors.Is(unsupported(err), ErrUnsupported) || errors.Is(err, ErrUnauthorized)); elsewhere {
				return false
			}
			begun = true
			return yield(r, err)
		})
		if elsewhere {
			c.eachRegistration(ctx, group, yield)
		}
	}
}

// eachRegistration yields the same with Azure's calls alone.
func (c *Client) eachRegistration(ctx context.Context, group string, yield func(*Registered, error) bool) {
	of := func(group string) (err error, on bool) {
		for st, err := range c.Registrations(ctx, group) {
			if err != nil {
				return err, true
			}
			if !yield(&Registered{*st, dps.Fold(group)}, nil) {
				return nil, false
			}
		}
		return nil, true
	}
	if group != "" {
		if err, _ := of(group); err != nil {
			yield(nil, err)
		}
		return
	}
	for _, k := range []Kind{Group, Individual} {
		for d, err := range c.All(ctx, k) {
			on := true
			if err == nil && k == Group {
				err, on = of(d.ID)
			} else if err == nil {
				var st *dps.RegistrationState
				if st, err = c.Registration(ctx, d.ID); err == nil {
					on = yield(&Registered{RegistrationState: *st}, nil)
				}
			}
			if err != nil && !errors.Is(err, ErrNotFound) { // it went meanwhile, or its device has not come in
				on = yield(nil, err) && false
			}
			if !on {
				return
			}
		}
	}
}

// ForgetAttempts has a touchmark service forget what it keeps of a device's attempts to register. The error is ErrUnsupported.
func (c *Client) ForgetAttempts(ctx context.Context, id string) error {
	_, err := c.do(ctx, request{method: http.MethodDelete, path: "/touchmark/diagnose/" + url.PathEscape(id), again: true}, nil)
	return unsupported(err)
}

// A groupDevice is a device that came in by a group, as touchmark tells of it.
type groupDevice struct {
	RegistrationID string     `json:"registrationId"`
	Status         dps.Status `json:"status"`
	LastUpdated    *dps.Time  `json:"lastUpdatedDateTimeUtc"`
	Admitted       *Admitted  `json:"admitted"`
}

// groupDevices yields the devices that came in by a group of a touchmark service, a page with each call.
func (c *Client) groupDevices(ctx context.Context, group string) iter.Seq2[*groupDevice, error] {
	return func(yield func(*groupDevice, error) bool) {
		pages(ctx, c.caller, http.MethodGet, "/touchmark/groups/"+url.PathEscape(group)+"/devices", pageSize, yield)
	}
}

// DeleteRegistration forgets what became of a device. Its enrollment stays, and so does what its hub knows of it.
func (c *Client) DeleteRegistration(ctx context.Context, id, tag string) error {
	return c.remove(ctx, "/registrations/"+url.PathEscape(id), tag)
}

// Info is what a touchmark service says of itself.
type Info struct {
	IDScope   string `json:"idScope"`
	Recipient string `json:"recipient"`
}

// Info returns what a touchmark service says of itself. The error is ErrUnsupported where it is another's.
func (c *Client) Info(ctx context.Context) (*Info, error) {
	info := &Info{}
	_, err := c.do(ctx, request{method: http.MethodGet, path: "/touchmark/info", again: true}, info)
	switch {
	case err == nil && info.IDScope == "":
		return nil, ErrUnsupported
	case errors.Is(err, ErrUnauthorized):
		// Somebody else's service may refuse a path that it does not know, and take the same token elsewhere.
		_, other := c.do(ctx, request{method: http.MethodPost, path: "/enrollments/query", body: []byte(`{"query":"SELECT *"}`), header: http.Header{"X-Ms-Max-Item-Count": {"1"}}, again: true}, nil)
		if other == nil {
			return nil, ErrUnsupported
		}
	}
	return info, unsupported(err)
}

// unsupported tells a service that lacks a call of touchmark's from one that lacks what was asked for.
func unsupported(err error) error {
	var e *Error
	if errors.As(err, &e) && (e.Status == http.StatusNotFound || e.Status == http.StatusMethodNotAllowed || e.Status == http.StatusBadRequest || e.Status == http.StatusNotImplemented) {
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	return err
}

// Usage is what was used of a touchmark service, by day.
type Usage struct {
	IDScope  string     `json:"idScope"`
	From     string     `json:"from"` // days, both of them counted
	To       string     `json:"to"`
	Calls    int64      `json:"calls"`
	Billable int64      `json:"billable"` // those that Azure bills
	Days     []UsageDay `json:"days"`
}

// A UsageDay is what was used on one day.
type UsageDay struct {
	Date     string      `json:"date"`
	Calls    int64       `json:"calls"`
	Billable int64       `json:"billable"`
	Usage    []UsageItem `json:"usage"`
}

// A UsageItem counts calls of one operation that ended in one way.
type UsageItem struct {
	API       string `json:"api"`
	Operation string `json:"operation"`
	Result    string `json:"result"`
	Calls     int64  `json:"calls"`
	Billable  bool   `json:"billable"`
}

// Usage returns what was used from one day to another, as in 2026-11-21; empty ones are the first of the month, and today. The error is
// ErrUnsupported.
func (c *Client) Usage(ctx context.Context, from, to string) (*Usage, error) {
	query := url.Values{}
	for name, day := range map[string]string{"from": from, "to": to} {
		if day != "" {
			query.Set(name, day)
		}
	}
	u := &Usage{}
	_, err := c.do(ctx, request{method: http.MethodGet, path: "/touchmark/usage", query: query, again: true}, u)
	var e *Error
	if errors.As(err, &e) && e.Status == http.StatusBadRequest {
		return nil, err // a day that is none
	}
	return u, unsupported(err)
}

func checkKeys(k *dps.SymmetricKeyAttestation) error {
	if k == nil {
		return nil
	}
	for _, s := range []string{k.PrimaryKey, k.SecondaryKey} {
		if b, err := base64.StdEncoding.DecodeString(s); s != "" && (err != nil || len(b) < 16 || len(b) > 64) {
			return errors.New("a symmetric key is not base64 of 16 to 64 octets")
		}
	}
	return nil
}
