package registration

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/access"
	"github.com/touchmark/touchmark/pkg/dps"
)

// Bounds of shared access policies.
const (
	maxPolicies   = 100
	maxPolicyName = 64
	policyKeySize = 64 // of one that is made, in octets
)

func newKey() []byte {
	b := make([]byte, policyKeySize)
	_, _ = rand.Read(b) // crypto/rand.Read never fails
	return b
}

func checkPolicyName(name string) error {
	if name == "" || len(name) > maxPolicyName || strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._") != "" {
		return invalid("A policy's name has 1 to %d letters, digits and -._ characters", maxPolicyName)
	}
	return nil
}

func noPolicy() *dps.Error { return dps.NewError(dps.CodeNotFound, "Policy not found.", nil) }

// PutPolicy writes a shared access policy of a scope in a transaction, with its entry in the audit record: where nothing
// changes, that its keys were shown, for whoever writes a policy is answered with them. Empty keys are made: whoever keeps
// some fills them in. It completes p, and spells its name as it was first written.
func PutPolicy(tx Tx, scope string, by Actor, p *Policy, now time.Time) error {
	if err := checkPolicyName(p.Name); err != nil {
		return err
	}
	rights, err := access.ParseRights(p.Rights, access.Policy)
	if err != nil {
		return invalid("Rights of policy %s: %v", p.Name, err)
	}
	p.Rights = rights.String()
	for _, k := range []*[]byte{&p.Primary, &p.Secondary} {
		if len(*k) == 0 {
			*k = newKey()
		}
		if len(*k) < 16 || len(*k) > 64 {
			return invalid("A key of a policy must be base64 of 16 to 64 octets")
		}
	}
	was, others, err := policyNamed(tx, scope, p.Name)
	action := "update"
	switch {
	case err != nil:
		return err
	case was != nil:
		p.Name = was.Name
	case others >= maxPolicies:
		return invalid("A service has at most %d policies", maxPolicies)
	default:
		action = "create"
	}
	a := NewAudit(by, action, "policy/"+p.Name, plainPolicy(was), plainPolicy(p), now)
	if a.Before == a.After {
		a.Action = "show keys"
		return tx.PutAudit(dps.Fold(scope), a)
	}
	return errors.Join(tx.PutPolicy(dps.Fold(scope), p), tx.PutAudit(dps.Fold(scope), a))
}

// policyNamed returns the policy of that name in any case, or nil, and how many others there are. Tokens name one to the letter.
func policyNamed(tx Tx, scope, name string) (named *Policy, others int, err error) {
	all, err := tx.Policies(dps.Fold(scope))
	for _, p := range all {
		if strings.EqualFold(p.Name, name) {
			named = p
		} else {
			others++
		}
	}
	return named, others, err
}

// plainPolicy is what of a policy the audit record's hashes are of; nil for none.
func plainPolicy(p *Policy) any {
	if p == nil {
		return nil
	}
	return fmt.Appendf(nil, "%s\n%s\n%x\n%x", p.Name, p.Rights, p.Primary, p.Secondary)
}

// DeletePolicy removes a policy of a scope in a transaction, with its entry in the audit record, or says ErrNotFound.
func DeletePolicy(tx Tx, scope string, by Actor, name string, now time.Time) error {
	was, _, err := policyNamed(tx, scope, name)
	if err != nil {
		return err
	}
	if was == nil {
		return ErrNotFound
	}
	return errors.Join(tx.DeletePolicy(dps.Fold(scope), was.Name), tx.PutAudit(dps.Fold(scope), NewAudit(by, "delete", "policy/"+was.Name, plainPolicy(was), nil, now)))
}

// Policy returns a shared access policy, or ErrNotFound.
func (s *Service) Policy(ctx context.Context, name string) (p *Policy, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) error {
		p, err = tx.Policy(s.scope, name)
		return err
	})
	return p, err
}

// Policies returns all shared access policies, by name.
func (s *Service) Policies(ctx context.Context) (all []*Policy, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) error {
		all, err = tx.Policies(s.scope)
		return err
	})
	return all, err
}

// ShowPolicy returns a shared access policy to be shown with its keys, which is in the audit record.
func (s *Service) ShowPolicy(ctx context.Context, by Actor, name string) (p *Policy, err error) {
	err = s.cfg.Store.Update(ctx, func(tx Tx) error {
		if p, _, err = policyNamed(tx, s.scope, name); err != nil {
			return err
		}
		if p == nil {
			return noPolicy()
		}
		return s.audit(tx, by, "show keys", "policy/"+p.Name, plainPolicy(p), plainPolicy(p))
	})
	return p, err
}

// EditPolicy makes or changes a shared access policy: edit gets the one that is there, or one with a name only, and may run more
// than once. Keys that are empty then are made.
func (s *Service) EditPolicy(ctx context.Context, by Actor, name string, edit func(*Policy) error) (p *Policy, err error) {
	err = s.cfg.Store.Update(ctx, func(tx Tx) error {
		if p, _, err = policyNamed(tx, s.scope, name); err != nil {
			return err
		}
		if p == nil {
			p = &Policy{Name: name}
		}
		if err := edit(p); err != nil {
			return err
		}
		return PutPolicy(tx, s.scope, by, p, s.cfg.Now())
	})
	return p, err
}

// DeletePolicy removes a shared access policy.
func (s *Service) DeletePolicy(ctx context.Context, by Actor, name string) error {
	return s.cfg.Store.Update(ctx, func(tx Tx) error {
		err := DeletePolicy(tx, s.scope, by, name, s.cfg.Now())
		if errors.Is(err, ErrNotFound) {
			return noPolicy()
		}
		return err
	})
}
