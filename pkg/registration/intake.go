package registration

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
)

// A chunk is one transaction of an intake.
type chunk struct {
	*intake
	tx      Tx
	scope   string
	res     ImportResult
	tallies []Tally // of the grants, with what this chunk did
	sum     Tally   // what this chunk did: the same for all grants
	endings bool    // the scope has some
}

// replaced is how an identity ended of which only the next one came. What a bundle says of it later counts more.
const replaced bundle.State = "replaced"

// rank orders what may be said of the end of one identity: what comes later on the list is the newer word.
func rank(s bundle.State) int { return slices.Index(bundle.States, s) }

func (c *chunk) count(add Tally) {
	c.sum.add(add)
	for i := range c.tallies {
		c.tallies[i].add(add)
	}
}

// book writes down what the chunk did to its grants.
func (c *chunk) book() error {
	if c.sum == (Tally{}) {
		return nil
	}
	for _, g := range c.grants {
		if c.cfg.DryRun {
			t := c.ahead[g.ID]
			t.add(c.sum)
			c.ahead[g.ID] = t
		} else if err := c.tx.AddToGrant(c.scope, g.ID, c.sum); err != nil {
			return err
		}
	}
	return nil
}

func name(list *[]ImportConflict, p *prepared, reason string) {
	if len(*list) < maxConflicts {
		*list = append(*list, ImportConflict{ID: p.id, Reason: reason})
	}
}

func (c *chunk) conflict(p *prepared, format string, args ...any) error {
	c.res.Conflicting++
	name(&c.res.Conflicts, p, fmt.Sprintf(format, args...))
	return nil
}

func (c *chunk) stale(p *prepared, format string, args ...any) error {
	c.res.Stale++
	name(&c.res.StaleEntries, p, fmt.Sprintf(format, args...))
	return nil
}

func (c *chunk) refuse(p *prepared, reason string) error {
	c.res.Refused++
	name(&c.res.Refusals, p, reason)
	return c.remember(p, reason)
}

// quarantine is a conflict between two stations: one of them may be a copy, so the order keeps its name.
func (c *chunk) quarantine(p *prepared, reason string) error {
	if err := c.conflict(p, "%s", reason); err != nil || c.grant == nil {
		return err
	}
	return c.remember(p, reason)
}

// remember keeps a refusal with its order.
func (c *chunk) remember(p *prepared, reason string) error {
	if c.tallies[0].Refused >= maxRefusals || c.cfg.DryRun {
		return nil
	}
	r := &Refusal{Order: c.grant.Order.ID, ID: dps.Fold(p.id), Station: c.cfg.Station, Reason: reason, At: c.s.cfg.Now()}
	if p.device != nil {
		r.Serial = p.device.Serial
	}
	added, err := c.tx.PutRefusal(c.scope, r)
	if added {
		c.count(Tally{Refused: 1})
	}
	return err
}

// errNotFresh says that there is something of entries that were taken for new ones.
var errNotFresh = errors.New("not all of it is new")

// freshOnes reports whether entries may all be new devices with individual enrollments, as they are nearly always: those are
// written together, which costs half of what one after the other does.
func freshOnes(entries []prepared) bool {
	return !slices.ContainsFunc(entries, func(p prepared) bool {
		return p.problem != "" || p.denied != "" || p.ending != nil || p.device == nil || p.record == nil || p.record.Kind != Individual
	})
}

// takeFresh takes entries as live does when nothing of them is there. It reports false, having done nothing, when something shows
// that it is not so; errNotFresh says the same when that comes out too late.
func (c *chunk) takeFresh(entries []prepared) (bool, error) {
	if c.cfg.DryRun || c.endings || c.grant != nil && c.tallies[0].Refused > 0 {
		return false, nil
	}
	n := int64(len(entries))
	for i, g := range c.grants {
		if c.tallies[i].Used+n > g.Quantity {
			return false, nil
		}
	}
	for _, p := range []*prepared{&entries[0], &entries[n-1]} { // an import that is repeated, or taken up
		if known, err := found(c.tx.Device(c.scope, p.device.ID)); err != nil || known != nil {
			return false, err
		}
	}
	records, devices := make([]*Record, n), make([]*Device, n)
	for i := range entries {
		p := &entries[i]
		if c.grant != nil && c.grant.Admits(p.device.Serial) != nil {
			return false, nil
		}
		records[i], devices[i] = p.record, p.device
	}
	if err := c.tx.PutFresh(c.scope, records, devices); errors.Is(err, ErrConflict) {
		return false, errNotFresh
	} else if err != nil {
		return false, err
	}
	if c.grant != nil {
		c.count(Tally{Used: n, Imported: n})
	}
	c.res.New += len(entries)
	return true, nil
}

// found turns ErrNotFound into nil.
func found[T any](v *T, err error) (*T, error) {
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	return v, err
}

// take takes one entry.
func (c *chunk) take(p *prepared) error {
	switch {
	case p.problem != "":
		return c.conflict(p, "%s", p.problem)
	case p.denied != "":
		return c.refuse(p, p.denied)
	case p.device == nil:
		return c.group(p)
	}
	if c.grant != nil {
		if err := c.grant.Admits(p.device.Serial); err != nil {
			return c.refuse(p, err.Error())
		}
	}
	old, err := found(c.tx.Device(c.scope, p.device.ID))
	if err != nil {
		return err
	}
	if old != nil {
		d := p.device
		switch {
		case old.Serial != d.Serial:
			return c.conflict(p, "the service knows it as serial %s%s", old.Serial, ofGroup(old.Group))
		case old.Revision >= 0 && d.Revision >= 0 && (old.Group == "") != (d.Group == ""):
			return c.conflict(p, "the service has an enrollment of another kind for it%s", ofGroup(old.Group))
		case old.Station != d.Station && old.Station != "" && (old.Revision != d.Revision || old.Grant != d.Grant):
			return c.quarantine(p, stations(old, d))
		case old.Grant != d.Grant:
			return c.conflict(p, "the service has it from %s, and this bundle was made on %s", anOrder(old.Grant), anOrder(d.Grant))
		}
	}
	if p.ending != nil {
		return c.retire(p, old)
	}
	return c.live(p, old)
}

func ofGroup(group string) string {
	if group == "" {
		return ""
	}
	return " of group " + group
}

func anOrder(grant string) string {
	if grant == "" {
		return "no order"
	}
	return "order " + grant
}

func stations(old, d *Device) string {
	return fmt.Sprintf("serial %s came as %s from station %s, and this bundle is station %s's", old.Serial, old.ID, old.Station, d.Station)
}

func (c *chunk) group(p *prepared) error {
	r := p.record
	old, err := found(c.tx.Record(c.scope, Group, dps.Fold(r.ID)))
	switch {
	case err != nil:
		return err
	case old == nil && c.cfg.DryRun:
		c.groups[dps.Fold(r.ID)] = true
	case old == nil:
		if err := c.tx.PutRecord(c.scope, r); errors.Is(err, ErrConflict) {
			return c.conflict(p, "%s", whose(err))
		} else if err != nil {
			return err
		}
	case !bytes.Equal(old.Content, r.Content):
		return c.conflict(p, "%s", otherContent(old))
	case r.Closed && !old.Closed:
		return c.conflict(p, "the group is open here, and the bundle wants it closed: touchmark group close %s closes it", r.ID)
	default:
		c.res.Unchanged++
		return nil
	}
	c.res.New++
	return nil
}

func otherContent(old *Record) string {
	if old.Content == nil {
		return fmt.Sprintf("the service has an %s enrollment of this name that no bundle brought", old.Kind)
	}
	return fmt.Sprintf("the service has an %s enrollment of this name with another content", old.Kind)
}

// live takes an identity. What is known is old, nil for nothing.
func (c *chunk) live(p *prepared, old *Device) error {
	next := *p.device
	known := old != nil && old.Revision >= 0
	if known && next.Revision < old.Revision {
		if err := c.supersede(&next, old); err != nil {
			return err
		}
		return c.stale(p, "revision %d: the service has revision %d", next.Revision, old.Revision)
	}
	again := known && next.Revision == old.Revision
	record, reason, err := c.inTheWay(p, old, again)
	switch {
	case err != nil:
		return err
	case reason != "" && known && old.Station != next.Station:
		return c.quarantine(p, stations(old, &next))
	case reason != "":
		return c.conflict(p, "%s", reason)
	case !known && record != nil && c.grant != nil:
		return c.conflict(p, "the service has it from no order")
	case again && !old.Lives():
		return c.stale(p, "revision %d was %s", next.Revision, old.State)
	case again && (record != nil || p.record == nil), !known && record != nil:
		c.res.Unchanged++
		return nil
	}

	if old != nil {
		next.Ended, next.State, next.Disabled = old.Ended, old.State, old.Disabled
	}
	if c.endings && next.KeyHash != "" { // one that was voided before anybody named it
		e, err := found(c.tx.Ending(c.scope, next.ID, next.Revision, next.KeyHash))
		if err != nil {
			return err
		}
		if e != nil && e.Revision >= next.Ended && e.State != replaced {
			next.Ended, next.State = e.Revision+1, e.State
		}
	}
	if next.KeyHash != "" && next.Lives() {
		issued, err := c.tx.KeyIssued(c.scope, next.KeyHash, next.ID)
		if err != nil {
			return err
		}
		if issued {
			return c.conflict(p, "its key is that of another device's operational certificate")
		}
	}
	if again {
		next.Seen = old.Seen
	}
	if c.grant != nil {
		if reason, err := c.moved(&next); err != nil || reason != "" {
			if err != nil {
				return err
			}
			return c.quarantine(p, reason)
		}
		if slot(&next) && !slot(old) {
			for i, g := range c.grants {
				if c.tallies[i].Used >= g.Quantity {
					return c.refuse(p, fmt.Sprintf("%s is spent: it has %d, and %d serials came on it before", g.ID, g.Quantity, c.tallies[i].Used))
				}
			}
		}
		if !known && next.Lives() {
			reg, err := found(c.tx.Registration(c.scope, next.ID))
			if err != nil {
				return err
			}
			next.Seen = reg != nil && reg.State.Status == dps.Assigned
		}
	}
	if p.record != nil {
		r, err := c.renewed(p.record, record, &next)
		if err != nil {
			return err
		}
		if !c.cfg.DryRun {
			if err := c.tx.PutRecord(c.scope, r); errors.Is(err, ErrConflict) {
				return c.conflict(p, "%s", whose(err))
			} else if err != nil {
				return err
			}
		}
	}
	if known && !again {
		if err := c.supersede(old, &next); err != nil {
			return err
		}
	}
	if err := c.put(old, &next); err != nil {
		return err
	}
	if c.grant != nil && c.tallies[0].Refused > 0 && !c.cfg.DryRun {
		gone, err := c.tx.DeleteRefusal(c.scope, c.grant.Order.ID, next.ID, next.Station)
		if err != nil {
			return err
		}
		if gone {
			c.count(Tally{Refused: -1})
		}
	}
	switch {
	case !next.Lives():
		return c.stale(p, "revision %d was %s", next.Revision, next.State)
	case known && !again:
		c.res.Replaced++
	default:
		c.res.New++
	}
	return nil
}

// inTheWay returns the enrollment that an entry is about, if there is one, or why the entry cannot be taken. Again says that
// the same revision came before.
func (c *chunk) inTheWay(p *prepared, old *Device, again bool) (record *Record, reason string, err error) {
	d := p.device
	if again && old.KeyHash != d.KeyHash {
		return nil, "the service has this revision with another key", nil
	}
	if again && d.Group != "" {
		if old.Group != d.Group {
			reason = "the service knows it as serial " + old.Serial + ofGroup(old.Group)
		}
		return nil, reason, nil
	}
	known := old != nil && old.Revision >= 0
	if !known || d.Group == "" {
		if record, err = found(c.tx.Record(c.scope, Individual, d.ID)); err != nil {
			return nil, "", err
		}
	}
	switch {
	case d.Group == "":
		if record != nil && (!known || again) && !bytes.Equal(record.Content, p.record.Content) {
			reason = otherContent(record)
		}
		return record, reason, nil
	case record != nil:
		return nil, "the service has an individual enrollment of this name", nil
	}
	g, err := found(c.tx.Record(c.scope, Group, d.Group))
	if err == nil && g == nil && !c.groups[d.Group] {
		reason = fmt.Sprintf("the service has no group %s", d.Group)
	}
	return nil, reason, err
}

// renewed is the enrollment that a new revision makes of the one that is there. One that an operator disabled stays so.
func (c *chunk) renewed(fresh, old *Record, next *Device) (*Record, error) {
	if old == nil && next.Lives() {
		r := *fresh
		r.Fresh, next.Disabled = true, false
		return &r, nil
	}
	d, err := open(fresh)
	if err != nil {
		return nil, err
	}
	blocked := false
	if old != nil {
		before, err := open(old)
		if err != nil {
			return nil, err
		}
		d.base().CreatedDateTimeUTC = before.base().CreatedDateTimeUTC
		blocked = before.base().ProvisioningStatus == dps.EnrollmentDisabled && !next.Disabled
	}
	next.Disabled = !next.Lives() && !blocked && d.base().ProvisioningStatus != dps.EnrollmentDisabled
	if blocked || next.Disabled {
		d.base().ProvisioningStatus = dps.EnrollmentDisabled
	}
	r := *fresh
	r.Document, err = d.encode()
	return &r, err
}

// disable disables the enrollment of an identity that ended, and reports whether it was enabled.
func (c *chunk) disable(id string) (bool, error) {
	r, err := found(c.tx.Record(c.scope, Individual, id))
	if err != nil || r == nil {
		return false, err
	}
	d, err := open(r)
	if err != nil || d.base().ProvisioningStatus == dps.EnrollmentDisabled {
		return false, err
	}
	now := dps.Time{Time: c.s.cfg.Now()}
	d.base().ProvisioningStatus, d.base().LastUpdatedDateTimeUTC, d.base().ETag = dps.EnrollmentDisabled, &now, newETag()
	if r.Document, err = d.encode(); err != nil {
		return false, err
	}
	if c.cfg.DryRun {
		return true, nil
	}
	return true, putAgain(c.tx, c.scope, r, d)
}

// retire takes the end of an identity.
func (c *chunk) retire(p *prepared, old *Device) error {
	e, next := p.ending, *p.device
	if old != nil {
		next = *old
	}
	// Nobody outside knew what was voided, and the next identity of the unit has the same revision: the key alone ended.
	if e.State != bundle.Voided || old != nil && old.Revision == e.Revision && old.KeyHash == e.KeyHash && e.KeyHash != "" {
		if e.Revision >= next.Ended || e.Revision == next.Ended-1 && rank(e.State) > rank(next.State) {
			next.Ended, next.State = e.Revision+1, e.State
		}
	}
	if c.grant != nil && old == nil && next.Ended > 0 {
		if reason, err := c.moved(&next); err != nil || reason != "" {
			if err != nil {
				return err
			}
			return c.quarantine(p, reason)
		}
	}
	changed, err := c.end(e)
	if err != nil {
		return err
	}
	if !changed {
		c.res.Unchanged++
		return nil
	}
	c.res.Retired++
	if next.Ended == 0 || old != nil && next == *old {
		return nil
	}
	if old != nil && old.Revision >= 0 && old.Lives() && !next.Lives() && next.Group == "" {
		if next.Disabled, err = c.disable(next.ID); err != nil {
			return err
		}
	}
	return c.put(old, &next)
}

// end writes the end of an identity down, and reports whether it says more than was known.
func (c *chunk) end(e *Ending) (bool, error) {
	old, err := found(c.tx.Ending(c.scope, e.ID, e.Revision, e.KeyHash))
	if err != nil || old != nil && rank(old.State) >= rank(e.State) {
		return false, err
	}
	if c.grant != nil {
		if old != nil {
			c.count(endings(old.State, -1))
		}
		c.count(endings(e.State, 1))
	}
	c.endings = true
	if c.cfg.DryRun {
		return true, nil
	}
	return true, c.tx.PutEnding(c.scope, e)
}

func endings(s bundle.State, n int64) (t Tally) {
	switch s {
	case bundle.Voided:
		t.Voided = n
	case bundle.Reworked:
		t.Reworked = n
	case bundle.Scrapped:
		t.Scrapped = n
	case bundle.Returned:
		t.Returned = n
	}
	return t
}

// supersede ends the key of an identity that a newer one took the place of, whether or not a bundle says so too.
func (c *chunk) supersede(old, by *Device) error {
	if old.KeyHash == "" || old.KeyHash == by.KeyHash {
		return nil
	}
	_, err := c.end(&Ending{ID: old.ID, Revision: old.Revision, KeyHash: old.KeyHash, State: replaced, At: c.s.cfg.Now(), Station: old.Station,
		Reason: fmt.Sprintf("revision %d of %s took its place", by.newest(), by.ID)})
	return err
}

// newest is the newest revision that is known of.
func (d *Device) newest() int64 { return max(d.Revision, d.Ended-1) }

// moved settles which of two registration IDs has a serial, where next is not the first: the one of the newer revision. The
// other one ends. The reason is why the service cannot tell.
func (c *chunk) moved(next *Device) (reason string, err error) {
	other, err := found(c.tx.DeviceBySerial(c.scope, next.Serial))
	if err != nil || other == nil || other.ID == next.ID {
		return "", err
	}
	if other.Grant != next.Grant || other.Station != next.Station || other.newest() == next.newest() {
		return stations(other, next), nil
	}
	before := *other
	older, newer := next, other
	if next.newest() > other.newest() {
		older, newer = other, next
	}
	older.Moved = true
	if err := c.supersede(older, newer); err != nil {
		return "", err
	}
	if older.Lives() {
		older.Ended, older.State = older.Revision+1, replaced
	}
	if older == next {
		return "", nil
	}
	if before.Lives() && older.Group == "" {
		if older.Disabled, err = c.disable(older.ID); err != nil {
			return "", err
		}
	}
	return "", c.put(&before, older)
}

// put writes a device, and counts what changed for its order.
func (c *chunk) put(old, next *Device) error {
	if c.grant != nil {
		c.count(Tally{Used: less(slot, next, old), Imported: less(lives, next, old), Seen: less(seen, next, old)})
	}
	if c.cfg.DryRun {
		return nil
	}
	return c.tx.PutDevice(c.scope, next)
}

// slot reports whether a device has one of its order's: every serial has one, until the owner was shown that it is no more.
func slot(d *Device) bool {
	return d != nil && !d.Moved && (lives(d) || !d.Lives() && d.State != bundle.Returned)
}

func lives(d *Device) bool { return d != nil && d.Revision >= 0 && d.Lives() }
func seen(d *Device) bool  { return lives(d) && d.Seen }

// less is f of a less f of b.
func less(f func(*Device) bool, a, b *Device) (n int64) {
	if f(a) {
		n++
	}
	if f(b) {
		n--
	}
	return n
}
