package registration

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// A Scope is one provisioning service, and a tenant: everything that is kept belongs to one. Devices name it by its ID,
// operators by the name of its service host. The store encrypts all but ID and name.
type Scope struct {
	ID   string `json:"id"`   // as it was given; folded wherever it is a key
	Name string `json:"name"` // of the provisioning service; unique in any case
	// Where it stands among the resources of the management API.
	Subscription  string            `json:"subscription,omitempty"`
	ResourceGroup string            `json:"resourceGroup,omitempty"`
	Location      string            `json:"location,omitempty"`
	Tags          map[string]string `json:"tags,omitempty"`
	ETag          string            `json:"etag"`
	Created       time.Time         `json:"created"`
	// Deleting says that nobody is let in any more, and that what it has is being removed.
	Deleting bool `json:"deleting,omitempty"`
	// Erasing is there as well when the scope is to go on afterwards, with nothing in it. Erased is when it last was.
	Erasing *Erasure  `json:"erasing,omitempty"`
	Erased  time.Time `json:"erased,omitzero"`
	Settings
	// Version is the one that was read (0: there was none); every write raises it.
	Version int64 `json:"-"`
}

// Settings are what a scope goes by.
type Settings struct {
	Hubs []LinkedHub `json:"hubs,omitempty"`
	// AllocationPolicy is for enrollments that have none; empty is hashed. Custom is not for a scope.
	AllocationPolicy dps.AllocationPolicy `json:"allocationPolicy,omitempty"`
	// IPFilter rules are tried in order; the first that matches decides. Without a match the caller is let in.
	IPFilter []IPRule `json:"ipFilterRules,omitempty"`
	// PublicAccessDisabled closes both APIs to all but loopback and the networks of the operator's own.
	PublicAccessDisabled bool `json:"publicAccessDisabled,omitempty"`
	EnableDataResidency  bool `json:"enableDataResidency,omitempty"` // kept and shown; data stays where the store is in any case
	// Quotas names a profile of limits: "" and "none" are none, "azure" those of DPS (service API, section 4.11).
	Quotas string `json:"quotas,omitempty"`
	// StrictRoots has a group's intermediate count only where its chain goes on to a verified certificate of the scope (service
	// API, section 4.3). Without it a group's signing certificate is trusted by itself.
	StrictRoots bool `json:"strictRoots,omitempty"`
	// PrivateEndpoints are kept for clients of the management API; they have no effect on the network.
	PrivateEndpoints []PrivateEndpoint `json:"privateEndpoints,omitempty"`
}

// An IPRule lets a network in, or keeps it out (service API, section 3.3).
type IPRule struct {
	Name   string `json:"filterName"`
	Accept bool   `json:"accept"`
	Mask   string `json:"ipMask"` // CIDR, IPv4 or IPv6
	Target string `json:"target"` // "all", "serviceApi" or "deviceApi"
}

// A PrivateEndpoint is a private endpoint connection as the management API has it (service API, section 3.7).
type PrivateEndpoint struct {
	Name            string `json:"name"`
	Endpoint        string `json:"endpoint,omitempty"` // resource ID
	Status          string `json:"status"`
	Description     string `json:"description"`
	ActionsRequired string `json:"actionsRequired,omitempty"`
}

// Records returns hubs of kind record by their names.
func Records(names ...string) (hubs []LinkedHub) {
	for _, n := range names {
		hubs = append(hubs, LinkedHub{Name: n, Kind: HubRecord})
	}
	return hubs
}

// Hub returns the linked hub of that name in any case, or nil.
func (s *Settings) Hub(name string) *LinkedHub {
	i := slices.IndexFunc(s.Hubs, func(h LinkedHub) bool { return strings.EqualFold(h.Name, name) })
	if i < 0 {
		return nil
	}
	return &s.Hubs[i]
}

// knownSettings are the settings that the scope had at a revision.
type knownSettings struct {
	revision int64
	*Settings
	rules []addressRule
	roots *x509.CertPool // verified certificates of the scope; nil without StrictRoots
}

// settingsAt returns the settings at a revision that the transaction saw. It remembers them, so the transaction must be a
// View: an Update may read what is never committed.
func (s *Service) settingsAt(view groupReader, revision int64) (*Settings, error) {
	known, err := s.knownAt(view, revision)
	if err != nil {
		return nil, err
	}
	return known.Settings, nil
}

// knownAt returns the settings with what follows from them.
func (s *Service) knownAt(view groupReader, revision int64) (*knownSettings, error) {
	if known := s.settings.Load(); known != nil && known.revision == revision {
		return known, nil
	}
	sc, err := found(view.Scope(s.scope))
	switch {
	case err != nil:
		return nil, err
	case sc == nil:
		sc = &Scope{Settings: s.cfg.Settings}
	case sc.Deleting:
		return nil, because("scope", "the scope is being deleted, or erased")
	}
	known := &knownSettings{revision: revision, Settings: &sc.Settings}
	if known.rules, err = parseRules(sc.IPFilter); err != nil {
		return nil, fmt.Errorf("scope %s in the store: %w", sc.ID, err)
	}
	if sc.StrictRoots {
		if known.roots, err = s.caPool(view, true); err != nil {
			return nil, err
		}
	}
	s.settings.Store(known)
	return known, nil
}

// Settings returns what the scope goes by.
func (s *Service) Settings(ctx context.Context) (set *Settings, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) error {
		revision, err := tx.Revision(s.scope)
		if err == nil {
			set, err = s.settingsAt(tx, revision)
		}
		return err
	})
	return set, err
}

// Current returns the scope as it is now, or ErrNotFound when it is deleted, or being deleted.
func (s *Service) Current(ctx context.Context) (sc *Scope, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) error {
		if sc, err = tx.Scope(s.scope); err == nil && sc.Deleting {
			err = ErrNotFound
		}
		return err
	})
	return sc, err
}

// maxHubs is how many hubs a scope has linked at most, whatever its quotas: all of them are looked at for every device.
const maxHubs = 1000

// CheckScope says what keeps a scope from being taken.
func CheckScope(sc *Scope) error {
	if err := dps.CheckIDScope(sc.ID); err != nil {
		return invalid("%v", err)
	}
	if err := dps.CheckServiceName(sc.Name); err != nil {
		return invalid("%v", err)
	}
	if sc.AllocationPolicy == dps.AllocationCustom {
		return invalid("A service's allocation policy cannot be custom: an enrollment's can")
	}
	quotas, ok := QuotasOf(sc.Quotas)
	if !ok {
		return invalid("There is no profile of quotas %.40q: there are azure and none", sc.Quotas)
	}
	if quotas.Hubs > 0 && len(sc.Hubs) > quotas.Hubs {
		return Exceeds("linked hubs", int64(len(sc.Hubs)-1), int64(quotas.Hubs))
	}
	if len(sc.Hubs) > maxHubs {
		return invalid("A service has at most %d linked hubs", maxHubs)
	}
	seen := make(map[string]bool)
	for _, h := range sc.Hubs {
		if seen[strings.ToLower(h.Name)] {
			return invalid("Hub %s is linked twice", h.Name)
		}
		if seen[strings.ToLower(h.Name)] = true; h.Name == "" || h.Weight < 0 || h.Weight > 1000 {
			return invalid("A linked hub needs a name, and a weight from 1 to 1000")
		}
	}
	if _, err := parseRules(sc.IPFilter); err != nil {
		return invalid("%v", err)
	}
	return nil
}

// EditScope changes a scope in one transaction and returns what it was and what it is; nil was nothing. edit gets a copy that
// it changes, or nil where there is none and then returns a new one; it may run more than once. The change is in the audit
// record under that action.
func EditScope(ctx context.Context, store Store, id string, by Actor, action string, now time.Time, edit func(*Scope) (*Scope, error)) (was, is *Scope, err error) {
	return EditScopeWith(ctx, store, id, by, action, now, func(_ Tx, sc *Scope) (*Scope, error) { return edit(sc) })
}

// EditScopeWith is EditScope for what changes more than the scope's own row, in the same transaction.
func EditScopeWith(ctx context.Context, store Store, id string, by Actor, action string, now time.Time, edit func(Tx, *Scope) (*Scope, error)) (was, is *Scope, err error) {
	err = store.Update(ctx, func(tx Tx) error {
		if was, err = found(tx.Scope(dps.Fold(id))); err != nil {
			return err
		}
		var in *Scope
		if was != nil {
			c := *was
			c.Hubs, c.IPFilter = slices.Clone(was.Hubs), slices.Clone(was.IPFilter)
			in = &c
		}
		if is, err = edit(tx, in); err != nil {
			return err
		}
		if err := CheckScope(is); err != nil {
			return err
		}
		is.ETag = newETag()
		if was == nil {
			is.Created = now
		} else {
			is.Version = was.Version
		}
		if err := tx.PutScope(is); err != nil {
			return err
		}
		return tx.PutAudit(dps.Fold(id), NewAudit(by, action, "scope/"+is.Name, was, is, now))
	})
	if errors.Is(err, ErrConflict) {
		err = dps.NewError(dps.CodeServiceExists, "There is a provisioning service of that name", err)
	}
	return was, is, err
}

// allowed refuses a host name that is not a linked hub's.
func (s *Settings) allowed(name string) error {
	if s.Hub(name) == nil {
		return invalid("Hub %s is not linked to this service", fmt.Sprintf("%.100q", name))
	}
	return nil
}

// Deleted reports whether a scope is deleted, or is being deleted or erased: nothing more is to be written of it.
func Deleted(tx Tx, scope string) (bool, error) {
	sc, err := found(tx.Scope(scope))
	return sc != nil && sc.Deleting, err
}

// eraseAtOnce is how many rows of a deleted scope one transaction removes.
const eraseAtOnce = 2000

// An Erasure is who has a scope erased.
type Erasure struct {
	By    Actor     `json:"by"`
	Begun time.Time `json:"begun"`
}

// BeginErasure begins to remove everything that is kept of a scope's devices, and the audit record: from here on nobody is let in and
// there is no way back. EndErasure does the rest, and then lets the scope go on with nothing in it: with its name and ID, its settings
// and linked hubs, its policies, and the counts of its usage. The audit record begins anew, with who did this. A scope that is being
// deleted is left to that. ErrNotFound: there is none of that ID.
func BeginErasure(ctx context.Context, store Store, id string, by Actor, now time.Time) error {
	return store.Update(ctx, func(tx Tx) error {
		sc, err := tx.Scope(dps.Fold(id))
		if err != nil || sc.Deleting {
			return err
		}
		sc.Deleting, sc.Erasing, sc.ETag = true, &Erasure{by, now}, newETag()
		return tx.PutScope(sc)
	})
}

// EndErasure brings to its end what CloseScope or BeginErasure began, in small transactions, and reports whether the scope is gone. One
// that was interrupted goes on when it is called again, and any number of callers may be at it: each finds less to do.
func EndErasure(ctx context.Context, store Store, id string, now time.Time) (gone bool, err error) {
	scrubbed := false
	for done := false; !done && err == nil; {
		err = store.Update(ctx, func(tx Tx) error {
			sc, err := tx.Scope(dps.Fold(id))
			if err != nil {
				return err
			}
			if gone, done = sc.Deleting && sc.Erasing == nil, !sc.Deleting; done {
				return nil
			}
			if gone {
				done, err = tx.EraseScope(dps.Fold(id), eraseAtOnce)
			} else {
				done, err = tx.EmptyScope(dps.Fold(id), eraseAtOnce)
			}
			switch {
			case err != nil || !done:
				return err
			case !scrubbed:
				return errUnscrubbed
			case gone:
				return nil
			}
			by := sc.Erasing.By
			sc.Deleting, sc.Erasing, sc.Erased, sc.ETag = false, nil, now, newETag()
			if err := tx.PutScope(sc); err != nil {
				return err
			}
			return tx.PutAudit(dps.Fold(id), NewAudit(by, "erase", "scope/"+sc.Name, nil, sc, now))
		})
		if errors.Is(err, errUnscrubbed) {
			done, scrubbed, err = false, true, nil
			if s, ok := store.(Scrubber); ok {
				err = s.Scrub(ctx)
			}
		}
	}
	return gone, err
}

// errUnscrubbed has the last step of a deletion wait: nobody knows of it any more behind that, and could go on.
var errUnscrubbed = fmt.Errorf("%w: the store is to be scrubbed first", ErrConflict) // no fault of the store

// A Scrubber is a store that can have what was erased leave its files, too.
type Scrubber interface {
	Scrub(ctx context.Context) error
}

// CloseScope begins to delete a scope with everything that is kept of it: from here on nobody is let in and there is no way back, and
// EndErasure does the rest. ErrNotFound: there is none of that ID. A scope's audit record goes
// with it: that it was deleted is written into that of another scope, unless witness is empty.
func CloseScope(ctx context.Context, store Store, id string, by Actor, witness string, now time.Time) error {
	return store.Update(ctx, func(tx Tx) error {
		was, err := tx.Scope(dps.Fold(id))
		if err != nil || was.Deleting && was.Erasing == nil {
			return err
		}
		is := *was
		is.Deleting, is.Erasing, is.Settings, is.Tags, is.ETag = true, nil, Settings{}, nil, newETag()
		if err := tx.PutScope(&is); err != nil {
			return err
		}
		a := NewAudit(by, "delete", "scope/"+is.Name, was, nil, now)
		if witness != "" {
			if err := tx.PutAudit(dps.Fold(witness), a); err != nil {
				return err
			}
		}
		return tx.PutAudit(dps.Fold(id), a)
	})
}
