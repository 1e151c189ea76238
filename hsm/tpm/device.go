package tpm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/touchmark/touchmark/hsm"
)

const (
	// A device without a resource manager is given back after idleTime without work, and after holdTime even when there is
	// more to do: another program may be waiting, and what is loaded takes the slots that it needs.
	idleTime = 50 * time.Millisecond
	holdTime = 2 * time.Second
	// minSlots is the smallest number of transient objects that a TPM may have room for (PC Client Platform TPM
	// Profile), and what the kernel's resource manager has for each connection.
	minSlots = 3
	// defaultWait is how long a TPM that went away is waited for.
	defaultWait = 6 * time.Second
	redialPause = 100 * time.Millisecond
	// How long a TPM that is busy is asked again. NV_RATE is a matter of seconds, the others of milliseconds.
	busyTime = 20 * time.Second
	maxPause = 500 * time.Millisecond
)

// A device is one TPM, shared by the stores of this process.
type device struct {
	address string
	log     *slog.Logger
	refs    int // guarded by devices

	turn chan struct{} // held by whose turn it is; guards everything below

	conn     conn
	since    time.Time   // when conn was taken up
	lease    int         // counts how often it was
	idle     *time.Timer // gives the device back
	loaded   []*object   // what is in transient slots, longest unused first
	sessions map[tpm2.TPMHandle]bool
	open     *openSession     // kept for the next operation
	foreign  []tpm2.TPMHandle // sessions of others, when conn was taken up
	begun    bool             // a session was asked for, and the answer is not there yet
	dirty    bool             // a connection broke, and what it left in the TPM was not seen to
	// Fixed properties, read with the first connection.
	slots       int
	inputBuffer int
	nvBuffer    int
}

var devices struct {
	sync.Mutex
	byAddress map[string]*device
}

// attach returns the device at an address, shared with whoever has it already.
func attach(address string, log *slog.Logger) *device {
	devices.Lock()
	defer devices.Unlock()
	d := devices.byAddress[address]
	if d == nil {
		d = &device{address: address, log: log, turn: make(chan struct{}, 1), sessions: make(map[tpm2.TPMHandle]bool)}
		if devices.byAddress == nil {
			devices.byAddress = make(map[string]*device)
		}
		devices.byAddress[address] = d
	}
	d.refs++
	return d
}

// detach gives the device up; the last one to do so closes the connection.
func (d *device) detach() error {
	devices.Lock()
	defer devices.Unlock()
	if d.refs--; d.refs > 0 {
		return nil
	}
	delete(devices.byAddress, d.address)
	d.turn <- struct{}{}
	defer func() { <-d.turn }()
	return d.release()
}

// object is something that can be in one of the TPM's transient slots.
type object struct {
	name tpm2.TPM2BName
	// persistent is where the object is without being loaded; 0 for the others. seen is the lease in which it was last seen to be
	// there: while others have the TPM they may put something else in its place.
	persistent tpm2.TPMHandle
	seen       int
	load       func(*bus) (tpm2.TPMHandle, error)
	handle     tpm2.TPMHandle // where it is loaded; 0 where it is not
	// keep has the context of an object that is dear to make saved when it is flushed.
	keep  bool
	saved *tpm2.TPMSContext
}

// bus is one operation's turn on a device. It is a [transport.TPM]: what go-tpm sends goes through Send.
type bus struct {
	ctx    context.Context
	d      *device
	pinned map[*object]bool
	// null is a primary of the null hierarchy, once something needed it.
	null       *object
	nullPublic tpm2.TPMTPublic
}

// do runs an operation when its turn has come. It runs again when the connection broke under it or what it had loaded was gone:
// an operation is written so that it may.
func (d *device) do(ctx context.Context, wait time.Duration, f func(*bus) error) error {
	select {
	case d.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-d.turn }()
	if d.idle != nil {
		d.idle.Stop()
	}
	for try := 1; ; try++ {
		err := d.connect(ctx, wait)
		if err == nil {
			b := &bus{ctx: ctx, d: d, pinned: make(map[*object]bool)}
			if err = f(b); err != nil && !lost(err) {
				_ = b.closeSession() // nobody knows how far it came
				_ = b.flushSessions()
			}
			if b.null != nil && !lost(err) {
				_ = b.evictIfLoaded(b.null)
			}
		}
		switch {
		case lost(err):
			d.drop()
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if try < 4 && d.slots != 0 {
				d.log.Warn("TPM lost, dialling again", "tpm", d.address, "error", err)
				continue
			}
			return fmt.Errorf("%w: %s: %w", hsm.ErrLost, d.address, err)
		case gone(err) && try < 3:
			if err := d.startOver(ctx); err == nil {
				continue
			}
		}
		d.giveBack()
		return err
	}
}

// connect dials if need be. A TPM that answered before is waited for.
func (d *device) connect(ctx context.Context, wait time.Duration) error {
	if d.conn != nil {
		return nil
	}
	begin := time.Now()
	for {
		c, err := dial(ctx, d.address)
		if err == nil {
			d.conn, d.since = c, time.Now()
			d.lease++
			b := &bus{ctx: ctx, d: d}
			if err = b.properties(); err == nil && d.dirty {
				err = b.sweep()
			}
			if err == nil && !managed(d.address) {
				d.foreign, err = b.handles(loadedSessions)
			}
			if err == nil || !lost(err) {
				d.dirty = false
				return err
			}
			d.drop()
		}
		if errors.Is(err, hsm.ErrUnsupported) {
			return err
		}
		// A TPM that never answered is not there; one that did is being restarted.
		if d.slots == 0 || time.Since(begin) >= wait {
			return &lostError{err}
		}
		select {
		case <-time.After(redialPause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// drop forgets a connection that broke, and what was loaded behind it.
func (d *device) drop() {
	if d.conn != nil {
		_ = d.conn.Close()
		d.conn, d.dirty = nil, true
	}
	d.forget()
}

// startOver empties the slots of what is ours, after the TPM did not know a thing that should have been there.
func (d *device) startOver(ctx context.Context) error {
	b := &bus{ctx: ctx, d: d}
	if managed(d.address) {
		for _, o := range d.loaded {
			_ = b.flush(o.handle)
		}
		d.forget()
		return nil
	}
	d.forget()
	return b.flushStrays()
}

func (d *device) forget() {
	for _, o := range d.loaded {
		o.handle = 0
	}
	d.loaded, d.open = nil, nil
}

// giveBack lets others have a TPM that has no resource manager, now or when it has been idle for a moment.
func (d *device) giveBack() {
	if d.conn == nil || managed(d.address) {
		return
	}
	if time.Since(d.since) > holdTime {
		_ = d.release() // what went wrong shows when it is taken up again
		return
	}
	if d.idle != nil {
		d.idle.Reset(idleTime)
		return
	}
	d.idle = time.AfterFunc(idleTime, func() {
		select {
		case d.turn <- struct{}{}: // nobody is at work, so the time is over
			_ = d.release()
			<-d.turn
		default: // whoever is at work sets the timer anew
		}
	})
}

// release flushes what is loaded and closes the connection.
func (d *device) release() error {
	if d.idle != nil {
		d.idle.Stop()
	}
	if d.conn == nil {
		return nil
	}
	ctx := context.Background()
	b := &bus{ctx: ctx, d: d}
	err := errors.Join(b.closeSession(), b.flushSessions())
	for len(d.loaded) > 0 && !lost(err) {
		err = errors.Join(err, b.evict(d.loaded[0]))
	}
	if lost(err) {
		d.drop()
		// Once more, for what would stay behind. A TPM that is gone has nothing in it.
		if err = d.connect(ctx, 0); err != nil {
			return nil
		}
	}
	err = errors.Join(err, d.conn.Close())
	d.conn = nil
	return err
}

// Send sends one command. A TPM that is busy is asked again, with pauses that grow, for a bounded time.
func (b *bus) Send(command []byte) ([]byte, error) {
	begin, pause := time.Now(), time.Millisecond
	started := false
	for {
		if err := b.ctx.Err(); err != nil {
			return nil, err
		}
		b.d.begun = b.d.begun || commandCode(command) == tpm2.TPMCCStartAuthSession
		response, err := b.d.conn.Send(b.ctx, command)
		if err == nil && len(response) < headerSize {
			err = fmt.Errorf("the response has %d octets only", len(response))
		}
		if err != nil {
			return nil, &lostError{err}
		}
		switch code := tpm2.TPMRC(binary.BigEndian.Uint32(response[6:])); code {
		case tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting, tpm2.TPMRCNVRate:
			if time.Since(begin) > busyTime {
				return response, nil
			}
			select {
			case <-time.After(pause):
			case <-b.ctx.Done():
				return nil, b.ctx.Err()
			}
			pause = min(2*pause, maxPause)
		case tpm2.TPMRCInitialize:
			// Behind a socket there is no firmware that would have started the TPM (TPM 2.0 Part 3, 9.3).
			if started || managed(b.d.address) {
				return response, nil
			}
			started = true
			if _, err := (tpm2.Startup{StartupType: tpm2.TPMSUClear}).Execute(rawBus{b}); err != nil {
				return nil, fmt.Errorf("starting the TPM: %w", err)
			}
		default:
			b.note(command, response, code)
			return response, nil
		}
	}
}

// rawBus sends without any care.
type rawBus struct{ b *bus }

func (r rawBus) Send(command []byte) ([]byte, error) {
	response, err := r.b.d.conn.Send(r.b.ctx, command)
	if err != nil {
		return nil, &lostError{err}
	}
	return response, nil
}

func commandCode(command []byte) tpm2.TPMCC { return tpm2.TPMCC(binary.BigEndian.Uint32(command[6:])) }

// note keeps count of the sessions that are open, so that none outlives a broken connection.
func (b *bus) note(command, response []byte, code tpm2.TPMRC) {
	b.d.begun = false
	if code != tpm2.TPMRCSuccess {
		return
	}
	switch commandCode(command) {
	case tpm2.TPMCCStartAuthSession:
		if len(response) >= headerSize+4 {
			b.d.sessions[tpm2.TPMHandle(binary.BigEndian.Uint32(response[headerSize:]))] = true
		}
	case tpm2.TPMCCFlushContext:
		if len(command) >= headerSize+4 {
			delete(b.d.sessions, tpm2.TPMHandle(binary.BigEndian.Uint32(command[headerSize:])))
		}
	}
}

// The first handles of loaded and of saved sessions, to list them by (Part 2, 7.2: TPM_HT_LOADED_SESSION and
// TPM_HT_SAVED_SESSION).
const (
	loadedSessions = tpm2.TPMHandle(0x02000000)
	savedSessions  = tpm2.TPMHandle(0x03000000)
)

// sweep flushes what a broken connection left behind: sessions that were open, and objects of the names that we load.
func (b *bus) sweep() error {
	if err := b.flushSessions(); err != nil {
		return err
	}
	if b.d.begun && !managed(b.d.address) {
		now, err := b.handles(loadedSessions)
		if err != nil {
			return err
		}
		for _, h := range now {
			if !slices.Contains(b.d.foreign, h) {
				if err := b.flush(h); err != nil {
					return err
				}
			}
		}
	}
	b.d.begun = false
	if managed(b.d.address) {
		return nil // went with the connection
	}
	return b.flushStrays()
}

// flushSessions flushes the sessions that were begun and not flushed. Most of them the TPM closed after their one command.
func (b *bus) flushSessions() error {
	for h := range b.d.sessions {
		if b.d.open != nil && b.d.open.Handle() == h {
			continue
		}
		if err := b.flush(h); lost(err) {
			return err
		}
		delete(b.d.sessions, h)
	}
	return nil
}

// flushStrays flushes transient objects that are ours by name and that we do not know to be loaded: a process of ours was
// killed, or an answer was lost.
func (b *bus) flushStrays() error {
	handles, err := b.handles(0x80000000)
	if err != nil {
		return err
	}
	for _, h := range handles {
		if b.isLoaded(h) {
			continue
		}
		pub, err := (tpm2.ReadPublic{ObjectHandle: h}).Execute(b)
		if lost(err) {
			return err
		}
		if err != nil || !ours.has(pub.Name.Buffer) {
			continue
		}
		if _, err := (tpm2.FlushContext{FlushHandle: h}).Execute(b); lost(err) {
			return err
		}
	}
	return nil
}

// isLoaded reports whether we know of an object at that handle.
func (b *bus) isLoaded(h tpm2.TPMHandle) bool {
	return slices.ContainsFunc(b.d.loaded, func(o *object) bool { return o.handle == h })
}

// ours remembers the names of objects that this process loads, the latest few thousand of them.
var ours nameSet

type nameSet struct {
	sync.Mutex
	names map[string]bool
}

func (n *nameSet) add(name []byte) {
	n.Lock()
	defer n.Unlock()
	if n.names == nil || len(n.names) > 4096 {
		n.names = make(map[string]bool)
	}
	n.names[string(name)] = true
}

func (n *nameSet) has(name []byte) bool {
	n.Lock()
	defer n.Unlock()
	return n.names[string(name)]
}

// use returns the handle of an object, which it loads if need be and keeps loaded until the operation ends.
func (b *bus) use(o *object) (tpm2.TPMHandle, error) {
	if o.persistent != 0 {
		if o.seen != b.d.lease {
			rsp, err := b.readPublic(o.persistent)
			if errors.Is(err, tpm2.TPMRCHandle) || err == nil && !sameName(rsp.Name, o.name) {
				return 0, fmt.Errorf("the key that was at %s is not there any more: %w", hsm.TPMHandleName(uint32(o.persistent)), hsm.ErrNotFound)
			}
			if err != nil {
				return 0, err
			}
			o.seen = b.d.lease
		}
		// The TPM brings it into a slot for as long as a command needs it.
		b.pinned[o] = true
		return o.persistent, b.roomFor(0, func() error { return nil })
	}
	if i := slices.Index(b.d.loaded, o); i >= 0 {
		b.d.loaded = append(slices.Delete(b.d.loaded, i, i+1), o)
		b.pinned[o] = true
		return o.handle, nil
	}
	if len(o.name.Buffer) > 0 {
		ours.add(o.name.Buffer)
	}
	var h tpm2.TPMHandle
	err := b.roomFor(1, func() (err error) {
		if o.saved != nil {
			if rsp, err := (tpm2.ContextLoad{Context: *o.saved}).Execute(b); err == nil {
				h = rsp.LoadedHandle
				return nil
			} else if lost(err) || errors.Is(err, tpm2.TPMRCObjectMemory) {
				return err
			}
			o.saved = nil // the TPM was restarted: it makes the object anew
		}
		h, err = o.load(b)
		return err
	})
	if err != nil {
		return 0, err
	}
	o.handle = h
	b.d.loaded = append(b.d.loaded, o)
	b.pinned[o] = true
	ours.add(o.name.Buffer) // a primary learns its name when it is made
	return h, nil
}

// unpin lets go of an object before the operation's end.
func (b *bus) unpin(o *object) { delete(b.pinned, o) }

// roomFor runs f, which fills n transient slots, with that many free: what was not used for longest makes way.
func (b *bus) roomFor(n int, f func() error) error {
	for o := range b.pinned {
		if o.persistent != 0 {
			n++
		}
	}
	for i := 0; len(b.d.loaded)+n > b.d.slots && i < len(b.d.loaded); {
		if o := b.d.loaded[i]; b.pinned[o] {
			i++
		} else if err := b.evict(o); err != nil {
			return err
		}
	}
	err := f()
	if !errors.Is(err, tpm2.TPMRCObjectMemory) {
		return err
	}
	// Something else is in the slots: a stray of ours, or another program's. Of ours nothing needs to be.
	for _, o := range slices.Clone(b.d.loaded) {
		if !b.pinned[o] {
			if err := b.evict(o); err != nil {
				return err
			}
		}
	}
	if !managed(b.d.address) {
		if err := b.flushStrays(); err != nil {
			return err
		}
	}
	return f()
}

func (b *bus) evictIfLoaded(o *object) error {
	if !slices.Contains(b.d.loaded, o) {
		return nil
	}
	return b.evict(o)
}

// evict flushes a loaded object.
func (b *bus) evict(o *object) error {
	if o.keep && o.saved == nil {
		if rsp, err := (tpm2.ContextSave{SaveHandle: o.handle}).Execute(b); err == nil {
			o.saved = &rsp.Context
		}
	}
	h := o.handle
	o.handle = 0
	b.d.loaded = slices.DeleteFunc(b.d.loaded, func(x *object) bool { return x == o })
	return b.flush(h)
}

// readPublic reads the public area of a persistent object, which takes a slot for that moment.
func (b *bus) readPublic(h tpm2.TPMHandle) (rsp *tpm2.ReadPublicResponse, err error) {
	err = b.roomFor(1, func() (err error) {
		rsp, err = tpm2.ReadPublic{ObjectHandle: h}.Execute(b)
		return err
	})
	return rsp, err
}

// flush flushes a handle, whether or not somebody still waits for the operation. One that is not there is as good as flushed.
func (b *bus) flush(h tpm2.TPMHandle) error {
	_, err := tpm2.FlushContext{FlushHandle: h}.Execute(&bus{ctx: context.WithoutCancel(b.ctx), d: b.d})
	if errors.Is(err, tpm2.TPMRCHandle) || gone(err) {
		return nil
	}
	return err
}

// transient runs f with the handle of an object that make loads, and flushes it afterwards.
func (b *bus) transient(load func() (tpm2.TPMHandle, error), f func(tpm2.TPMHandle) error) error {
	var h tpm2.TPMHandle
	if err := b.roomFor(1, func() (err error) { h, err = load(); return err }); err != nil {
		return err
	}
	// It takes a slot, which others must not be promised.
	o := &object{handle: h}
	b.d.loaded = append(b.d.loaded, o)
	b.pinned[o] = true
	err := f(h)
	if lost(err) || !slices.Contains(b.d.loaded, o) {
		return err
	}
	return errors.Join(err, b.evict(o))
}

// properties reads the fixed properties that the package works by (TPM 2.0 Part 2, 6.13).
func (b *bus) properties() error {
	if b.d.slots != 0 {
		return nil
	}
	fixed, err := b.tpmProperties(tpm2.TPMPTFamilyIndicator, 64)
	if err != nil {
		return err
	}
	if family := fixed[tpm2.TPMPTFamilyIndicator]; family != 0x322e3000 { // "2.0"
		return fmt.Errorf("%s: what answers there is not a TPM 2.0", b.d.address)
	}
	b.d.slots = minSlots
	if n := fixed[tpm2.TPMPTHRTransientMin]; n > minSlots && !managed(b.d.address) {
		b.d.slots = int(min(n, 8))
	}
	b.d.inputBuffer = int(min(max(fixed[tpm2.TPMPTInputBuffer], 64), 1024))
	b.d.nvBuffer = int(min(max(fixed[tpm2.TPMPTNVBufferMax], 64), 1024))
	return nil
}

// tpmProperties reads up to count properties from first on.
func (b *bus) tpmProperties(first tpm2.TPMPT, count uint32) (map[tpm2.TPMPT]uint32, error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(first), PropertyCount: count}.Execute(b)
	if err != nil {
		return nil, err
	}
	list, err := rsp.CapabilityData.Data.TPMProperties()
	if err != nil {
		return nil, err
	}
	m := make(map[tpm2.TPMPT]uint32)
	for _, p := range list.TPMProperty {
		m[p.Property] = p.Value
	}
	return m, nil
}

// handles lists the handles of first's kind, from first on.
func (b *bus) handles(first tpm2.TPMHandle) ([]tpm2.TPMHandle, error) {
	var all []tpm2.TPMHandle
	for len(all) < 4096 {
		rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: uint32(first), PropertyCount: 254}.Execute(b)
		if err != nil {
			return nil, err
		}
		list, err := rsp.CapabilityData.Data.Handles()
		if err != nil {
			return nil, err
		}
		all = append(all, list.Handle...)
		if !rsp.MoreData || len(list.Handle) == 0 {
			break
		}
		first = list.Handle[len(list.Handle)-1] + 1
	}
	return all, nil
}

// sameName compares the name that the TPM gives an object with the one that it had.
func sameName(a, b tpm2.TPM2BName) bool { return bytes.Equal(a.Buffer, b.Buffer) }

var _ transport.TPM = (*bus)(nil)
