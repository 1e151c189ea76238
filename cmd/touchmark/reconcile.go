package main

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/operator"
	"github.com/touchmark/touchmark/pkg/order"
	"github.com/touchmark/touchmark/pkg/registration"
)

type reconcileOptions struct {
	serviceOptions
	report string
	trust  []string
}

func newReconcile(a *app) *cobra.Command {
	o := &reconcileOptions{}
	c := &cobra.Command{
		Use:   "reconcile REPORT --service FILE --trust PEM",
		Short: "Hold a station's close report against what the registration service knows",
		Long: `reconcile takes the signed report that a station closes an order or a lease with, and the service's own counts, and shows how
many units were ordered, minted, stamped, verified, sealed, exported, imported and first seen. Each unit that got lost between
two of them is named, where the report or the service can tell.

It ends with 0 when the order balances, and with 3 when something is missing or too much. Devices that have not called yet are
shown, and are not missing.`,
		Example: `  touchmark reconcile PO-1234.report --service service/owner.connection --trust line-3/station.pem`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.report = args[0]
			return a.runReconcile(cmd.Context(), o)
		},
	}
	f := c.Flags()
	o.serviceOptions.flags(c)
	f.StringArrayVar(&o.trust, "trust", nil, "PEM file with the public key of the station that signed the report (required); again for more")
	_ = c.MarkFlagRequired("trust")
	return c
}

// maxNamed is how many units, refusals and devices a reconciliation names of each kind.
const maxNamed = 100

// A step is one stage of an order, and what got lost on the way to it.
type step struct {
	Step    string   `json:"step"`
	Units   int64    `json:"units"`
	Missing int64    `json:"missing"` // below 0: too many
	Which   []string `json:"which,omitempty"`
}

// A reconciliation is an order's report beside the service's counts.
type reconciliation struct {
	Grant    string           `json:"grant"`
	Station  string           `json:"station"`
	Closed   bool             `json:"closed"`
	Balanced bool             `json:"balanced"`
	Steps    []step           `json:"steps"`
	Ended    map[string]ended `json:"ended"`
	// Refused are entries that the service did not take, Attempts what the station itself refused.
	Refused  []*registration.Refusal       `json:"refused,omitempty"`
	Attempts []order.Refusal               `json:"attempts,omitempty"`
	Unseen   []*registration.OrderedDevice `json:"unseen,omitempty"`
}

// ended counts the identities that ended in one way.
type ended struct {
	Factory int64 `json:"factory"`
	Service int64 `json:"service"`
}

func (a *app) runReconcile(ctx context.Context, o *reconcileOptions) error {
	var trusted []crypto.PublicKey
	for _, f := range o.trust {
		pub, err := readPublicKey(f)
		if err != nil {
			return err
		}
		trusted = append(trusted, pub)
	}
	st, err := os.Stat(o.report)
	if err != nil {
		return usageError{err}
	}
	if st.Size() > order.MaxDocument {
		return usageError{fmt.Errorf("%s has %d octets: no report is that large", o.report, st.Size())}
	}
	b, err := os.ReadFile(o.report)
	if err != nil {
		return usageError{err}
	}
	r, err := order.OpenReport(b, trusted)
	if err != nil {
		return fmt.Errorf("report %s: %w", o.report, err)
	}
	svc, err := a.openService(o.service, o.ca)
	if err != nil {
		return err
	}
	known, err := svc.order(ctx, r.Grant)
	if err != nil {
		return importError(err)
	}
	rec := reconcile(r, known)
	if err := svc.fillIn(ctx, r, known, rec); err != nil {
		return importError(err)
	}
	if a.json {
		err = a.printJSON(rec)
	} else {
		err = a.printReconciliation(rec)
	}
	if err != nil || rec.Balanced {
		return err
	}
	return hint(partialError{error: fmt.Errorf("%s does not balance", rec.Grant)}, "import the bundles that are still out; what is refused or lost, the factory has to answer for")
}

// order returns what the service knows of an order or a lease: nothing, as long as no bundle of it came.
func (s *service) order(ctx context.Context, id string) (*registration.OrderView, error) {
	v := &registration.OrderView{Grant: &registration.Grant{}}
	err := s.call(ctx, http.MethodGet, "/touchmark/orders/"+url.PathEscape(id), nil, nil, nil, v)
	if errors.Is(err, operator.ErrNotFound) {
		err = nil
	}
	return v, err
}

// reconcile counts. What was done on leases counts as far as they were used, on both sides; their own reports tell more.
func reconcile(r *order.Report, known *registration.OrderView) *reconciliation {
	rec := &reconciliation{Grant: r.Grant, Station: r.Station, Closed: r.Closed, Balanced: true, Attempts: r.Refused[:min(len(r.Refused), maxNamed)]}
	var leased int64
	var out []string
	for _, l := range r.Leases {
		if l.Used < 0 {
			out = append(out, "lease "+l.Lease+" is still out")
			continue
		}
		leased += l.Used
	}
	imported, seen := known.Imported, known.Seen
	for _, l := range known.Leases {
		imported += l.Used - l.Imported
	}
	at := map[string]string{"begun": "minted", "minted": "stamped", "stamped": "verified", "verified": "sealed", "sealed": "exported"}
	which := map[string][]string{"minted": out}
	for _, u := range r.Missing {
		s, ok := at[u.State]
		if !ok {
			s = "minted"
		}
		text := u.Serial + " " + u.State
		if u.Reason != "" {
			text += ": " + u.Reason
		}
		which[s] = append(which[s], text)
	}
	for _, serial := range r.Unmade {
		which["minted"] = append(which["minted"], serial+" unmade")
	}
	rec.Steps = []step{{Step: "ordered", Units: r.Ordered}}
	for _, s := range []step{
		{Step: "minted", Units: r.Minted + leased}, {Step: "stamped", Units: r.Stamped + leased}, {Step: "verified", Units: r.Verified + leased},
		{Step: "sealed", Units: r.Sealed + leased}, {Step: "exported", Units: r.Exported + leased}, {Step: "imported", Units: imported},
	} {
		s.Missing, s.Which = rec.Steps[len(rec.Steps)-1].Units-s.Units, which[s.Step]
		rec.Balanced = rec.Balanced && s.Missing == 0
		rec.Steps = append(rec.Steps, s)
	}
	rec.Steps = append(rec.Steps, step{Step: "first seen", Units: seen})
	rec.Balanced = rec.Balanced && known.Refused == 0 && len(out) == 0
	rec.Ended = map[string]ended{
		string(bundle.Voided): {r.Voided, known.Voided}, string(bundle.Reworked): {r.Reworked, known.Reworked},
		string(bundle.Scrapped): {r.Scrapped, known.Scrapped}, string(bundle.Returned): {r.Returned, known.Returned},
	}
	return rec
}

// fillIn asks the service for names.
func (s *service) fillIn(ctx context.Context, r *order.Report, known *registration.OrderView, rec *reconciliation) (err error) {
	path := "/touchmark/orders/" + url.PathEscape(r.Order)
	ours := func(d *registration.OrderedDevice) bool { return r.Grant == r.Order || d.Grant == r.Grant }
	if known.Refused > 0 {
		if rec.Refused, err = operator.List[*registration.Refusal](ctx, s.Client, path+"/refusals", maxNamed); err != nil {
			return err
		}
	}
	if known.Imported > known.Seen {
		unseen, err := operator.List[*registration.OrderedDevice](ctx, s.Client, path+"/unseen", 10*maxNamed)
		if err != nil {
			return err
		}
		unseen = slices.DeleteFunc(unseen, func(d *registration.OrderedDevice) bool { return !ours(d) })
		rec.Unseen = unseen[:min(len(unseen), maxNamed)]
	}
	imported := &rec.Steps[len(rec.Steps)-2]
	if imported.Missing <= 0 || len(r.Leases) > 0 || int64(len(r.Unmade)) != r.UnmadeCount || known.Document == "" {
		return nil
	}
	// Where the order has a range or a list, what was made is all of it but what the report names.
	g, err := order.Describe([]byte(known.Document))
	if err != nil {
		return fmt.Errorf("the service's copy of %s: %w", r.Grant, err)
	}
	serials := &g.Order.Serials
	if g.Lease != nil {
		serials = &g.Lease.Serials
	}
	if n, counted := serials.Count(); !counted || n > maxSerials {
		return nil
	}
	have := make(map[string]bool)
	for _, serial := range r.Unmade {
		have[serial] = true
	}
	for _, u := range r.Missing {
		have[u.Serial] = true
	}
	devices, err := operator.List[*registration.OrderedDevice](ctx, s.Client, path+"/devices", maxSerials)
	if err != nil {
		return err
	}
	for _, d := range devices {
		have[d.Serial] = true
	}
	for serial := range serials.All {
		if serials.Has(serial) && !have[serial] && len(imported.Which) < maxNamed {
			imported.Which = append(imported.Which, serial+" was exported and did not come")
		}
	}
	return nil
}

// maxSerials bounds the orders whose missing units are looked for one by one.
const maxSerials = 1_000_000

func (a *app) printReconciliation(rec *reconciliation) error {
	verdict := a.paint(a.out, "32", "balances")
	if !rec.Balanced {
		verdict = a.paint(a.out, "31", "does not balance")
	}
	if !rec.Closed {
		verdict += ", and is not closed"
	}
	if err := a.table(nil, [][]string{{"Order", rec.Grant, verdict}, {"  station", rec.Station}}); err != nil {
		return err
	}
	var rows [][]string
	for _, s := range rec.Steps {
		gap, which := "", ""
		switch {
		case s.Missing > 0:
			gap = fmt.Sprintf("%d missing", s.Missing)
		case s.Missing < 0:
			gap = fmt.Sprintf("%d too many", -s.Missing)
		}
		if n := len(s.Which); n > 0 {
			which = strings.Join(s.Which[:min(n, 10)], "; ")
			if n > 10 {
				which += fmt.Sprintf("; and %d more", n-10)
			}
		}
		rows = append(rows, []string{s.Step, fmt.Sprint(s.Units), gap, which})
	}
	fmt.Fprintln(a.out)
	if err := a.table([]string{"STEP", "UNITS", "GAP", "WHICH"}, rows); err != nil {
		return err
	}
	rows = nil
	for _, s := range bundle.States {
		if e := rec.Ended[string(s)]; e != (ended{}) {
			rows = append(rows, []string{string(s), fmt.Sprint(e.Factory), fmt.Sprint(e.Service)})
		}
	}
	section := func(header []string, rows [][]string) error {
		if len(rows) == 0 {
			return nil
		}
		fmt.Fprintln(a.out)
		return a.table(header, rows)
	}
	if err := section([]string{"ENDED", "FACTORY", "SERVICE"}, rows); err != nil {
		return err
	}
	rows = nil
	for _, r := range rec.Refused {
		rows = append(rows, []string{r.Serial, r.ID, r.Reason})
	}
	if err := section([]string{"REFUSED", "REGISTRATION ID", "REASON"}, rows); err != nil {
		return err
	}
	rows = nil
	for _, r := range rec.Attempts {
		rows = append(rows, []string{r.Serial, r.Kind, r.Why})
	}
	if err := section([]string{"ATTEMPT", "KIND", "WHY"}, rows); err != nil {
		return err
	}
	rows = nil
	for _, d := range rec.Unseen {
		rows = append(rows, []string{d.Serial, d.RegistrationID})
	}
	return section([]string{"NOT YET SEEN", "REGISTRATION ID"}, rows)
}
