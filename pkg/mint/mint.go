// Package mint runs a list of serials through a profile: one device identity per serial, stamped, read back, written down,
// and handed on as bundle entries.
//
// [Run.Mint] takes the list in groups. A group walks through its steps together, so that one flush of the ledger and one of the
// file system serve hundreds of devices, and several groups walk at once. Each step is durable in the ledger before the
// next effect outside it:
//
//	x509, key in memory   key staged on disk → begun (key, plan) → signed → minted (certificate) → rest staged → published → read back → verified
//	x509, key in a token  begun (plan) → key made under the unit's name → signed → minted (certificate, evidence) → stamped as above
//	x509, key in a TPM    begun (plan, endorsement key) → key staged as a blob, certified by the TPM → signed → minted → stamped as above
//	x509, from a request  request read → begun (key, plan) → signed → minted → stamped as above
//	TPM                   endorsement key read and proven → minted → stamped as above, where there is anything to stamp
//	symmetric, derived    derived → minted → stamped as above, where there is anything to stamp
//	symmetric, random     key staged on disk → minted → published → read back → verified
//
// Images of device storage ([StampImage]) are files of the stamp like others. What is random in them, the keys of an encrypted
// partition, lives in one of those files and is taken from there again. Storage that a profile names is written once all files are
// in place and read back, and before the unit is verified.
//
// A run that was killed is taken up by running it again: the same profile and list are the same job. What can be proven is
// rolled forward with the same key and the same certificate plan; where a key is gone, its unit is voided and the serial
// begins anew. A certificate is never signed for a serial under two plans, and a key in the token that no unit has a use
// for does not exist: its name is in the ledger before it is made. A TPM is one device's: its endorsement key is unique in
// the ledger.
package mint

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/tpm/residency"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/order"
	"github.com/touchmark/touchmark/pkg/stamp"
	"github.com/touchmark/touchmark/templates"
)

// The files of a stamp.
const (
	stampFile = "provisioning.json"
	chainFile = "device-chain.pem"
	keyFile   = "device-key.pem"
)

// ErrUnproven says that a unit of an earlier run can be neither finished nor voided without a person looking.
var ErrUnproven = errors.New("cannot be rolled forward")

// ErrNeedsOut says that keys would be made and kept nowhere.
var ErrNeedsOut = errors.New("its keys are kept in stamps: it needs a directory to stamp to (--out)")

// ErrNoSpace says that the disk has not the room that the job needs; nothing was started.
var ErrNoSpace = errors.New("not enough free space")

// Config is what a run needs.
type Config struct {
	Ledger  *ledger.Ledger
	Profile *Profile
	List    *List
	// Store holds device keys that are made in a token; for such profiles only.
	Store hsm.Store
	// OpenStore opens a device's own store by its key URI, for profiles that name one.
	OpenStore func(ctx context.Context, uri string) (hsm.Store, error)
	// Endorsement returns the endorsement key of the TPM that a store is, and its storage root key, as whole TPM2B_PUBLIC
	// structures; for profiles with TPMs only.
	Endorsement func(ctx context.Context, store hsm.Store) (ek, srk []byte, err error)
	// Makers are the TPM manufacturers that must have certified a device's endorsement key; nil asks for none.
	Makers *residency.Makers
	// Attest has the TPM that a store is prove that a key lives in it; for keys in TPMs only.
	Attest func(ctx context.Context, store hsm.Store, key, registrationID string) (*evidence.Evidence, error)
	// Issuer signs leaves; for x509 profiles only.
	Issuer *ca.Prepared
	// GroupKey derives device keys; for symmetric-key groups only.
	GroupKey hsm.MACKey
	// Templates resolves the stamp files of the profile, in the profile's order.
	Templates []*templates.File
	// IDScope and GlobalEndpoint go into every stamp.
	IDScope        string
	GlobalEndpoint string
	// Grant is the production order, or the lease, that the units are made on; the ledger has it already. Nil where the line
	// works without orders.
	Grant *order.Grant
	// Shift makes the run a shift at a station, of that name: units come one by one by [Run.Unit], and the list has columns and
	// no rows. Names of shifts are never used again.
	Shift string
	// Operator is who works; for the ledger.
	Operator string
	// Out is the directory that stamps go to. Empty means no stamps, which profiles whose keys are nowhere else refuse.
	Out string
	// Jobs is how many groups are worked on at once; 0 means one more than there are processors.
	Jobs int
	// Progress is called with the number of devices that are finished, from one goroutine at a time. May be nil.
	Progress func(done int)
	// Rand makes keys in memory; nil means crypto/rand.
	Rand io.Reader
}

// How many devices share a flush. Where files are written, past a few hundred the gain per device is lost in the noise.
// Where only the ledger is, its pages count: the indexes of thousands of units share many of them, those of hundreds do not.
const (
	stampGroup  = 512
	ledgerGroup = 4096
	groupImages = 16 << 20 // octets of images that a group has in memory at once, or one unit's
)

// A Summary says what a run did.
type Summary struct {
	Job     ledger.Job
	Resumed bool
	Minted  int // identities made in this run
	Before  int // identities that an earlier run had made
	Voided  int // identities given up because their key was lost in a crash
	Absent  int // of Before: their stamps are not in Out any more
	Units   []int64
}

// Begin writes the job down, or finds it, and looks at what an earlier run left. Nothing is made yet. The caller closes the
// run.
func Begin(ctx context.Context, cfg Config) (*Run, error) {
	r, err := newRun(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return &Run{r}, nil
}

// A Run is a job being worked on.
type Run struct{ r *run }

// Job returns the job as the ledger has it.
func (r *Run) Job() ledger.Job { return r.r.summary.Job }

// Close gives the stamp target back.
func (r *Run) Close() error {
	if r.r.out == nil {
		return nil
	}
	return r.r.out.Close()
}

// Mint mints every row of the list and calls sink with each entry, in the order of the list, once the identity that it
// tells of is durable. It returns with the first error, or when the context ends; what was done until then is in the
// ledger, and another run takes it up from there.
func (r *Run) Mint(ctx context.Context, sink func(*bundle.Entry) error) (Summary, error) {
	err := r.r.run(ctx, sink)
	r.r.summary.Voided, r.r.summary.Absent = int(r.r.voids.Load()), int(r.r.absent.Load())
	return r.r.summary, err
}

type run struct {
	Config
	base     dps.Enrollment
	jobs     int
	out      *stamp.Files
	existing map[string]ledger.Unit // of a resumed job, by serial
	summary  Summary
	chain    []byte // PEM of the issuing certificates below the root
	alg      hsm.Algorithm
	voids    atomic.Int64
	absent   atomic.Int64

	stampless bool         // nothing is stamped: a minted unit is finished
	stamped   ledger.State // what a unit is once its storage is written: Verified, or Stamped where a station goes on with it

	identityOnce sync.Once // of the line's store
	identityErr  error
	identity     hsm.Identity

	foreseen sync.Map // sizes of rows whose images fit

	listOnce sync.Once // of the keys that earlier runs made in the token
	listErr  error
	inToken  map[string]hsm.Key
}

func newRun(ctx context.Context, cfg Config) (*run, error) {
	p := cfg.Profile
	if cfg.Rand == nil {
		cfg.Rand = rand.Reader
	}
	r := &run{Config: cfg, jobs: cfg.Jobs, alg: hsm.Algorithm(p.Key.Algorithm), stampless: cfg.Out == "" && !p.Stamp.Token && p.nv == 0, stamped: ledger.Verified}
	if r.jobs <= 0 {
		r.jobs = runtime.GOMAXPROCS(0) + 1
	}
	if cfg.Out == "" && (len(p.images) > 0 || p.Key.In == keyInMemory || p.Key.In == keyInTPM && p.Attestation == AttestationX509) {
		return nil, fmt.Errorf("profile %s: %w", p.Name, ErrNeedsOut)
	}
	if err := cfg.Ledger.CheckClock(); err != nil {
		return nil, err
	}
	var err error
	if r.base, err = p.enrollmentBase(); err != nil {
		return nil, err
	}
	if cfg.Issuer != nil {
		r.chain = cfg.Issuer.ChainPEM()
	}
	if err := r.checkImages(); err != nil {
		return nil, err
	}
	job := ledger.Job{Profile: p.Name, Out: cfg.Out, Operator: cfg.Operator}
	digest := sha256.New()
	if cfg.Shift == "" {
		fmt.Fprintf(digest, "touchmark job 1\n%s\n%x", p.Name, cfg.List.Digest)
	} else {
		fmt.Fprintf(digest, "touchmark shift 1\n%s\n%s", p.Name, cfg.Shift)
		r.stamped = ledger.Stamped
	}
	if cfg.Grant != nil {
		job.Grant = cfg.Grant.ID()
		fmt.Fprintf(digest, "\n%s", job.Grant)
		if err := admitted(cfg.Grant, cfg.List); err != nil {
			return nil, err
		}
	}
	job.Digest = digest.Sum(nil)
	place := job.Digest
	if cfg.Shift != "" {
		// One place for all shifts of a ledger, and one shift at a time: each finds what the one before left.
		sum := sha256.Sum256([]byte("touchmark shifts 1\n" + cfg.Ledger.Path()))
		place = sum[:]
	}
	if cfg.Out != "" {
		// Opened, and its space checked, before the job is written down.
		if r.out, err = stamp.OpenFiles(cfg.Out, hex.EncodeToString(place[:6])); err != nil {
			return nil, err
		}
	}
	fail := func(err error) (*run, error) {
		if r.out != nil {
			err = errors.Join(err, r.out.Close())
		}
		return nil, err
	}
	if r.summary.Job, r.summary.Resumed, err = cfg.Ledger.BeginJob(ctx, job); err != nil {
		return fail(err)
	}
	if was := r.summary.Job.Out; was != cfg.Out {
		return fail(fmt.Errorf("this list was begun with profile %s on %s with --out %q: take that again, or another list", p.Name,
			r.summary.Job.Started.Format("2006-01-02 15:04"), was))
	}
	if r.summary.Resumed && cfg.Shift == "" { // a shift asks the ledger for each unit when it comes
		r.existing = make(map[string]ledger.Unit)
		for u, err := range cfg.Ledger.Units(ctx, r.summary.Job.ID) {
			if err != nil {
				return fail(err)
			}
			r.existing[u.Serial] = u
		}
	}
	fresh := len(cfg.List.Rows) - len(r.existing)
	if cfg.Grant != nil && fresh > 0 {
		var serials []string
		for i := range cfg.List.Rows {
			if _, have := r.existing[cfg.List.Rows[i].Serial]; !have {
				serials = append(serials, cfg.List.Rows[i].Serial)
			}
		}
		places, err := cfg.Ledger.Places(ctx, job.Grant, serials...)
		if err == nil {
			_, err = cfg.Ledger.CheckGrant(ctx, job.Grant, places)
		}
		if err != nil {
			return fail(err)
		}
	}
	if err := r.checkSpace(fresh); err != nil {
		return fail(err)
	}
	if err := r.discardStrays(ctx); err != nil {
		return fail(err)
	}
	return r, nil
}

// admitted refuses a list that has serials which the grant does not.
func admitted(g *order.Grant, list *List) error {
	faults := &ListError{}
	for i := range list.Rows {
		if err := g.Admits(list.Rows[i].Serial); err != nil {
			faults.add("line %d: %s", list.Rows[i].Line, list.Rows[i].Serial)
		}
	}
	if len(faults.Faults) > 0 {
		return fmt.Errorf("%s: %w:\n%s", g.ID(), order.ErrSerial, faults) // a refusal, not a fault of the list
	}
	return nil
}

// checkSpace refuses to start what the disks cannot hold. It is an estimate: a disk that fills up in the middle is an
// error then, and loses nothing.
func (r *run) checkSpace(devices int) error {
	if devices <= 0 {
		return nil
	}
	const (
		block = 4096
		entry = 3 << 10 // a unit in the ledger: its row, its index entries, its certificate, and the same in the write-ahead log
	)
	need := uint64(devices) * entry
	octets, _, err := stamp.Free(filepath.Dir(r.Ledger.Path()))
	if err != nil {
		return err
	}
	if octets < need {
		return fmt.Errorf("%w: %d units need about %d MiB in the ledger %s, %d MiB are free", ErrNoSpace, devices, need>>20+1, r.Ledger.Path(), octets>>20)
	}
	if r.out == nil {
		return nil
	}
	files := uint64(3 + len(r.Profile.Stamp.File) + len(r.Profile.images)) // and the directory itself
	octets, inodes, err := stamp.Free(r.Out)
	if err != nil {
		return err
	}
	need = uint64(devices) * ((files+1)*block + uint64(r.Profile.imageSize()))
	if octets < need {
		return fmt.Errorf("%w: %d stamps need about %d MiB in %s, %d MiB are free", ErrNoSpace, devices, need>>20+1, r.Out, octets>>20)
	}
	if inodes != 0 && inodes < uint64(devices)*(files+1) { // some file systems do not count them and say 0
		return fmt.Errorf("%w: %d stamps need %d files in %s, %d are free", ErrNoSpace, devices, uint64(devices)*(files+1), r.Out, inodes)
	}
	return nil
}

// unit is one device on its way through a group.
type unit struct {
	row       *Row
	id        int64
	state     ledger.State // 0: not begun
	revision  int64
	found     bool // an earlier run began it
	published bool
	keyHash   []byte
	plan      ca.Plan
	signer    crypto.Signer // x509, key in memory
	keyPEM    []byte        // secret
	pub       crypto.PublicKey
	keyURI    string // of a key in a store
	cert      []byte // DER
	evidence  []byte // JSON; nil where the key may go anywhere
	ekHash    []byte // of the device's TPM, where it has one
	srk       []byte // TPM attestation: the TPM's storage root key
	symmetric hsm.Secret
	files     []stamp.File
}

func (u *unit) wipe() {
	clear(u.keyPEM)
	u.symmetric.Wipe()
	for i := range u.files {
		if u.files[i].Secret {
			clear(u.files[i].Data)
		}
	}
	u.files = nil
}

type group struct {
	units []unit
	done  chan error
}

func (r *run) run(ctx context.Context, sink func(*bundle.Entry) error) error {
	eg, ctx := errgroup.WithContext(ctx)
	order := make(chan *group, r.jobs) // groups in the order of the list; its room bounds how far ahead work runs
	slots := make(chan struct{}, r.jobs)
	eg.Go(func() error {
		defer close(order)
		rows, size := r.List.Rows, stampGroup
		if r.out == nil && r.Profile.store == nil && r.Profile.Key.In != keyInToken {
			size = ledgerGroup
		}
		size = max(1, min(size, groupImages/max(1, r.Profile.imageSize())))
		for len(rows) > 0 {
			n := min(size, len(rows))
			g := &group{units: make([]unit, n), done: make(chan error, 1)}
			for i := range g.units {
				g.units[i].row = &rows[i]
			}
			rows = rows[n:]
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return ctx.Err()
			}
			eg.Go(func() error {
				err := r.work(ctx, g.units)
				<-slots
				g.done <- err
				return err
			})
			select {
			case order <- g:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	eg.Go(func() error { return r.emit(ctx, order, sink) })
	return eg.Wait()
}

// emit hands finished groups on, in order.
func (r *run) emit(ctx context.Context, order <-chan *group, sink func(*bundle.Entry) error) error {
	if r.Profile.Enrollment == "group" && r.Issuer != nil {
		if err := sink(r.groupEntry()); err != nil {
			return err
		}
	}
	done := 0
	for g := range order {
		select {
		case err := <-g.done:
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
		for i := range g.units {
			u := &g.units[i]
			e, err := r.entry(u)
			if err != nil {
				return err
			}
			if err := sink(e); err != nil {
				return err
			}
			r.summary.Units = append(r.summary.Units, u.id)
			if u.found {
				r.summary.Before++
			} else {
				r.summary.Minted++
			}
			u.wipe()
		}
		done += len(g.units)
		if r.Progress != nil {
			r.Progress(done)
		}
	}
	return nil
}

// work walks a group through its steps.
func (r *run) work(ctx context.Context, units []unit) error {
	if r.existing != nil {
		if err := r.recover(ctx, units, r.existing); err != nil {
			return err
		}
	}
	make := r.makeX509
	switch {
	case r.Profile.Attestation == AttestationX509:
	case r.Profile.Attestation == AttestationTPM:
		make = r.makeTPM
	case r.Profile.Key.In == keyDerived:
		make = r.makeDerived
	default:
		make = r.makeRandom
	}
	if err := make(ctx, units); err != nil {
		return err
	}
	if r.stampless {
		return nil
	}
	return r.stamp(ctx, units)
}

// only returns the units that stand in a state.
func only(units []unit, state ledger.State) []*unit {
	var out []*unit
	for i := range units {
		if units[i].state == state {
			out = append(out, &units[i])
		}
	}
	return out
}

// commit moves units to a state in one durable step.
func (r *run) commit(ctx context.Context, units []*unit, state ledger.State, fill func(*unit, *ledger.Event)) error {
	if len(units) == 0 {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	events := make([]ledger.Event, len(units))
	for i, u := range units {
		events[i] = ledger.Event{State: state, Unit: u.id, Job: r.summary.Job.ID, Serial: u.row.Serial, RegistrationID: u.row.RegistrationID}
		if fill != nil {
			fill(u, &events[i])
		}
	}
	if err := r.Ledger.Commit(ctx, events); err != nil {
		return err
	}
	for i, u := range units {
		if u.id == 0 {
			u.revision = events[i].Revision
		}
		u.id, u.state = events[i].Unit, state
	}
	return nil
}

// inTheWay refuses to begin a unit whose place on disk is taken by something that this job did not put there.
func (r *run) inTheWay(ctx context.Context, units []*unit) error {
	if r.out == nil {
		return nil
	}
	for _, u := range units {
		if r.out.Published(u.row.RegistrationID) {
			// Most likely it is there because another job made it: then the ledger knows more.
			if err := r.Ledger.Taken(ctx, u.row.Serial, u.row.RegistrationID); err != nil {
				return err
			}
			return fmt.Errorf("serial %s: %w: %s: move it away, or stamp to another directory", u.row.Serial, stamp.ErrExists, r.out.Dir(u.row.RegistrationID))
		}
		if err := r.readyImages(u); err != nil {
			return fmt.Errorf("serial %s: %w", u.row.Serial, err)
		}
	}
	return nil
}

// unitOf is what a certificate is made for.
func (r *run) unitOf(row *Row) ca.Unit {
	return ca.Unit{RegistrationID: row.RegistrationID, Serial: row.Serial, Columns: r.fields(row)}
}

// Exported writes down that units left the factory in a bundle. It may be repeated.
func Exported(ctx context.Context, l *ledger.Ledger, units []int64, bundleID string) error {
	const step = 8192
	for ids := units; len(ids) > 0; {
		n := min(step, len(ids))
		events := make([]ledger.Event, n)
		for i, id := range ids[:n] {
			events[i] = ledger.Event{State: ledger.Exported, Unit: id, Data: []byte(bundleID)}
		}
		if err := l.Commit(ctx, events); err != nil {
			return fmt.Errorf("writing down what was exported: %w", err)
		}
		ids = ids[n:]
	}
	return nil
}
