package registration

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
)

// Bounds of what is kept of groups, and of what is done to find one.
const (
	maxAnchors   = 16384 // issuers that are known, each with its CAs
	maxStrangers = 4096  // issuers that are known to be nobody's: devices choose these
	// tryAtOnce is how many symmetric-key groups are tried right away.
	tryAtOnce = 16
	// searchChunk is how many groups a core tries between two looks at whether another has found the one.
	searchChunk = 128
	// maxSearches is how many searches there are at once, most of them waiting for a core. Who comes then is told to come again.
	maxSearches = 64
	// maxWrong is how many tokens are remembered that no group's key signed.
	maxWrong = 8192
)

// groupCache keeps what the hot path needs of the scope's groups. When groups change it reads what has changed, and not the
// rest again.
type groupCache struct {
	// refresh is held by the one request that reads changes; the others that need them wait.
	refresh  sync.Mutex
	revision atomic.Int64 // what everything below is up to, at least
	keyed    atomic.Pointer[keyedGroups]

	mu        sync.RWMutex // guards what follows
	at        int64        // the revision of anchors and strangers
	anchors   map[issuer][]groupAnchor
	strangers map[issuer]struct{}
}

type groupAnchor = attest.Anchor[admitting]

// admitting is a group and which of its CAs.
type admitting struct {
	*cachedGroup
	by *Admission
}

// An issuer is what a certificate says of its issuer: the SHA-256 of the name, and the key identifier or nothing.
type issuer struct {
	subject [32]byte
	keyID   string
}

// keyedGroups are the groups that attest by symmetric key, in the order of their IDs. They do not change.
type keyedGroups struct {
	revision int64
	all      []*cachedGroup
}

type cachedGroup struct {
	id, folded string
	enrollment dps.Enrollment // without certificates
	keys       []attest.GroupKey
	cas        []*x509.Certificate
	slots      []int // that the CAs stand in
	disabled   bool
	closed     bool
	// unverified are those of cas that the group refers to and that are not verified, or not there any more. missing marks what
	// stands for them.
	unverified []*x509.Certificate
	missing    bool
}

func cacheGroup(r *Record) (*cachedGroup, error) {
	d, err := open(r)
	if err != nil {
		return nil, err
	}
	g := &cachedGroup{id: r.ID, folded: dps.Fold(r.ID), disabled: d.group.ProvisioningStatus == dps.EnrollmentDisabled, closed: r.Closed}
	if certs := d.x509(); certs != nil {
		for i, slot := range []*dps.X509Certificate{certs.Primary, certs.Secondary} {
			if slot == nil {
				continue
			}
			c, err := parseCertificate(slot.Certificate)
			if err != nil {
				return nil, fmt.Errorf("group %q in the store: %w", r.ID, err)
			}
			if !slices.ContainsFunc(g.cas, c.Equal) {
				g.cas, g.slots = append(g.cas, c), append(g.slots, i)
				if slot.Info == nil && len(d.references()) > 0 {
					g.unverified = append(g.unverified, c)
				}
			}
		}
		d.group.Attestation.X509 = nil
	}
	if r.Symmetric {
		keys, err := keysOf(r)
		if err != nil {
			return nil, err
		}
		for _, k := range keys {
			g.keys = append(g.keys, attest.NewGroupKey(k))
		}
	}
	g.enrollment = d.group.Enrollment
	return g, nil
}

// groupsAt brings the cache to the revision that the transaction sees, or finds it beyond, and returns that revision: what is
// judged by a newer cache than the transaction's does not hold when it comes to writing, and is judged again.
func (s *Service) groupsAt(tx groupReader) (int64, error) {
	rev, err := tx.Revision(s.scope)
	c := &s.groups
	if err != nil || c.revision.Load() >= rev {
		return rev, err
	}
	c.refresh.Lock()
	defer c.refresh.Unlock()
	since := c.revision.Load()
	if since >= rev {
		return rev, nil
	}
	keyed := c.keyed.Load()
	if keyed == nil && c.idle() {
		c.forget(rev, nil)
		c.revision.Store(rev)
		return rev, nil
	}
	written, deleted, err := tx.ChangedGroups(s.scope, since)
	if err != nil {
		return 0, err
	}
	changed := make(map[string]*cachedGroup, len(written)+len(deleted))
	for _, id := range deleted {
		changed[id] = nil
	}
	for _, r := range written {
		g, err := cacheGroup(r)
		if err != nil {
			return 0, err
		}
		changed[g.folded] = g
	}
	all := slices.Contains(deleted, "")
	if keyed != nil {
		if all {
			keyed = &keyedGroups{}
		}
		c.keyed.Store(keyed.with(rev, changed))
	}
	if all {
		changed = nil
	}
	c.forget(rev, changed)
	c.revision.Store(rev)
	return rev, nil
}

// idle reports whether no CA is kept: there is nothing that changes could make wrong.
func (c *groupCache) idle() bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return len(c.anchors) == 0
}

// with returns the groups as they are after some have changed; nil is one that is not there any more.
func (k *keyedGroups) with(revision int64, changed map[string]*cachedGroup) *keyedGroups {
	next := &keyedGroups{revision: revision, all: make([]*cachedGroup, 0, len(k.all)+len(changed))}
	for _, g := range k.all {
		if _, ok := changed[g.folded]; !ok {
			next.all = append(next.all, g)
		}
	}
	for _, g := range changed {
		if g != nil && len(g.keys) > 0 {
			next.all = append(next.all, g)
		}
	}
	next.sort()
	return next
}

func (k *keyedGroups) sort() {
	slices.SortFunc(k.all, func(a, b *cachedGroup) int { return strings.Compare(a.folded, b.folded) })
}

// group returns the group of a folded ID, nil for none.
func (k *keyedGroups) group(id string) *cachedGroup {
	i, ok := slices.BinarySearchFunc(k.all, id, func(g *cachedGroup, id string) int { return strings.Compare(g.folded, id) })
	if !ok {
		return nil
	}
	return k.all[i]
}

// forget drops what some changed groups make wrong: the issuers that they were found for, and those of their CAs' names,
// whatever the key identifier. Nil drops everything.
func (c *groupCache) forget(revision int64, changed map[string]*cachedGroup) {
	names := make(map[[32]byte]bool)
	for _, g := range changed {
		if g != nil {
			for _, ca := range g.cas {
				names[sha256.Sum256(ca.RawSubject)] = true
			}
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = revision
	clear(c.strangers)
	for k, anchors := range c.anchors {
		if changed == nil || names[k.subject] || slices.ContainsFunc(anchors, func(a groupAnchor) bool { _, ok := changed[a.Group.folded]; return ok }) {
			delete(c.anchors, k)
		}
	}
}

// find returns what is known of an issuer.
func (c *groupCache) find(k issuer) (anchors []groupAnchor, known bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if anchors, known = c.anchors[k]; !known {
		_, known = c.strangers[k]
	}
	return anchors, known
}

// keep remembers what was read of an issuer at a revision. Who is nobody's is kept apart: devices make up issuers as they
// like, and must not drive out those that are somebody's, of which there are only as many as CAs.
func (c *groupCache) keep(revision int64, k issuer, anchors []groupAnchor) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.at != revision {
		return // read from another state of the store than the rest
	}
	if len(anchors) > 0 {
		put(&c.anchors, maxAnchors, k, anchors)
	} else {
		put(&c.strangers, maxStrangers, k, struct{}{})
	}
}

// put writes into a map of bounded size, in which a random entry makes room.
func put[K comparable, V any](m *map[K]V, size int, k K, v V) {
	if *m == nil {
		*m = make(map[K]V)
	}
	if _, ok := (*m)[k]; !ok && len(*m) >= size {
		for old := range *m {
			delete(*m, old)
			break
		}
	}
	(*m)[k] = v
}

// anchors returns the groups' CAs that could have signed a certificate, as an attest.Lookup does: one indexed read, then
// from memory.
func (s *Service) anchors(tx groupReader, revision int64, child *x509.Certificate, byName bool) ([]groupAnchor, error) {
	k := issuer{subject: sha256.Sum256(child.RawIssuer)}
	var keyID []byte
	if !byName {
		if keyID = attest.AuthorityKeyID(child); len(keyID) == 0 {
			return nil, nil
		}
		k.keyID = string(keyID)
	}
	if found, ok := s.groups.find(k); ok {
		return found, nil
	}
	records, err := tx.GroupsByCA(s.scope, k.subject, keyID, attest.MaxCandidates)
	if errors.Is(err, ErrTooMany) {
		return nil, attest.ErrAmbiguous
	}
	if err != nil {
		return nil, err
	}
	var found []groupAnchor
	for _, r := range records {
		g, err := cacheGroup(r)
		if err != nil {
			return nil, err
		}
		for i, ca := range g.cas {
			named := byName || slices.ContainsFunc(attest.KeyIDs(ca), func(id []byte) bool { return string(id) == k.keyID })
			if named && sha256.Sum256(ca.RawSubject) == k.subject {
				a := groupAnchor{Certificate: ca, Group: admitting{g, caAdmission(ca, g.slots[i])}, Blocks: g.disabled}
				if slices.Contains(g.unverified, ca) {
					missing := *g
					missing.missing = true
					a.Group.cachedGroup, a.Blocks = &missing, true
				}
				found = append(found, a)
			}
		}
	}
	s.groups.keep(revision, k, found)
	return found, nil
}

// keyedGroups returns the symmetric-key groups, at the transaction's revision or a newer one.
func (s *Service) keyedGroups(tx groupReader) (groups *keyedGroups, revision int64, err error) {
	if revision, err = s.groupsAt(tx); err != nil {
		return nil, 0, err
	}
	c := &s.groups
	if groups = c.keyed.Load(); groups != nil {
		return groups, revision, nil
	}
	c.refresh.Lock()
	defer c.refresh.Unlock()
	if groups = c.keyed.Load(); groups != nil {
		return groups, revision, nil
	}
	records, err := tx.SymmetricGroups(s.scope)
	if err != nil {
		return nil, 0, err
	}
	groups = &keyedGroups{revision: revision}
	for _, r := range records {
		g, err := cacheGroup(r)
		if err != nil {
			return nil, 0, err
		}
		groups.all = append(groups.all, g)
	}
	groups.sort()
	if c.revision.Load() == revision { // else another transaction has seen newer ones meanwhile, and this is for this request alone
		c.keyed.Store(groups)
	}
	return groups, revision, nil
}
