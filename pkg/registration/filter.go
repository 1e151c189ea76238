package registration

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// What IP rules are for.
const (
	AllAPIs    = "all"
	ServiceAPI = "serviceApi"
	DeviceAPI  = "deviceApi"
)

const (
	maxRules    = 100
	maxRuleName = 128
)

// ErrAddress says that IP rules keep a caller out, or that it is none of a private network's. Callers are not told.
var ErrAddress = errors.New("the caller's address is not let in")

// errPublicAccess is ErrAddress without a rule that says so.
var errPublicAccess = fmt.Errorf("%w: public network access is disabled", ErrAddress)

// An addressRule is an IPRule that was parsed.
type addressRule struct {
	*IPRule
	netip.Prefix
}

// parseRules reads IP rules. A mask is an address or a network in CIDR notation, IPv4 or IPv6; bits behind it do not count.
func parseRules(rules []IPRule) ([]addressRule, error) {
	if len(rules) > maxRules {
		return nil, fmt.Errorf("%d IP rules: at most %d are taken", len(rules), maxRules)
	}
	var all []addressRule
	seen := make(map[string]bool)
	for i := range rules {
		r := &rules[i]
		if name := strings.ToLower(r.Name); r.Name == "" || len(r.Name) > maxRuleName || seen[name] {
			return nil, fmt.Errorf("IP rule %.150q: want a name of its own, of 1 to %d octets", r.Name, maxRuleName)
		} else {
			seen[name] = true
		}
		if !slices.Contains([]string{AllAPIs, ServiceAPI, DeviceAPI}, r.Target) {
			return nil, fmt.Errorf("IP rule %q: target %.20q is not all, serviceApi or deviceApi", r.Name, r.Target)
		}
		p, err := netip.ParsePrefix(r.Mask)
		if err != nil {
			a, aerr := netip.ParseAddr(r.Mask)
			if aerr != nil || a.Zone() != "" {
				return nil, fmt.Errorf("IP rule %q: ipMask %.60q is not ADDRESS or ADDRESS/BITS", r.Name, r.Mask)
			}
			p = netip.PrefixFrom(a, a.BitLen())
		}
		if p.Addr().Is4In6() {
			return nil, fmt.Errorf("IP rule %q: ipMask %.60q: write the IPv4 address", r.Name, r.Mask)
		}
		all = append(all, addressRule{r, p.Masked()})
	}
	return all, nil
}

// rejects returns ErrAddress where a caller of an API is not let in: by the first rule that matches, or, where public access is
// disabled, unless it is of this machine or a private network. Addresses that cannot be read are let in only where all are.
func (s *Service) rejects(known *knownSettings, remote, api string) error {
	if !known.PublicAccessDisabled && len(known.rules) == 0 {
		return nil
	}
	var a netip.Addr
	if p, err := netip.ParseAddrPort(remote); err == nil {
		a = p.Addr()
	} else if a, err = netip.ParseAddr(remote); err != nil {
		return fmt.Errorf("%w: it cannot be read", ErrAddress)
	}
	a = a.Unmap().WithZone("")
	if known.PublicAccessDisabled {
		if a.IsLoopback() || slices.ContainsFunc(s.cfg.PrivateNetworks, func(p netip.Prefix) bool { return p.Contains(a) }) {
			return nil
		}
		return errPublicAccess
	}
	for _, r := range known.rules {
		if (r.Target == AllAPIs || r.Target == api) && r.Contains(a) {
			if r.Accept {
				return nil
			}
			return fmt.Errorf("%w: IP rule %q", ErrAddress, r.Name)
		}
	}
	return nil
}

// filter refuses a device that IP rules keep out, by the rules that the transaction sees.
func (s *Service) filter(view groupReader, req *Request) error {
	revision, err := view.Revision(s.scope)
	if err != nil {
		return err
	}
	known, err := s.knownAt(view, revision)
	if err != nil {
		return err
	}
	if err := s.rejects(known, req.Remote, DeviceAPI); err != nil {
		return refuse(err)
	}
	return nil
}

// Admits says what keeps a caller from an API of the scope, [ServiceAPI] or [DeviceAPI], by its address: ADDRESS or
// ADDRESS:PORT. The error is ErrAddress then, and its text is for the log: the caller learns 401 and no more (service API,
// section 3.3). Devices are held against the rules by Register and its like themselves.
func (s *Service) Admits(ctx context.Context, remote, api string) error {
	return s.cfg.Store.View(ctx, func(tx Tx) error {
		revision, err := tx.Revision(s.scope)
		if err != nil {
			return err
		}
		known, err := s.knownAt(tx, revision)
		if err != nil {
			return err
		}
		return s.rejects(known, remote, api)
	})
}
