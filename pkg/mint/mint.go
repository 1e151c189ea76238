// Package mint runs a list of serials through a profile: one device identity per serial, stamped, read back, written down,
// and handed on as bundle entries.
//
// [Run.Mint] takes the list in groups. A group walks through its steps together, so that one flush of the ledger and one of the
// file system serve hundreds of devices, and several groups walk at once. Each step is durable in the ledger before the
// next effect outside it:
//
//	x509, key in memory   key staged on disk → begun (key, plan) → signed → minted (certificate) → rest staged → published → read back → verified
//	x509, key in a token  begun (plan) → key made under the unit's name → signed → minted → stamped as above
//	symmetric, derived    derived → minted → stamped as above, where there is anything to stamp
//	symmetric, random     key staged on disk → minted → published → read back → verified
//
// A run that was killed is taken up by running it again: the same profile and list are the same job. What can be proven is
// rolled forward with the same key and the same certificate plan; where a key is gone, its unit is voided and the serial
// begins anew. A certificate is never signed for a serial under two plans, and a key in the token that no unit has a use
// for does not exist: its name is in the ledger before it is made.
package mint

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/ledger"
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

// ErrNoSpace says that the disk has not the room that the job needs; nothing was started.
var ErrNoSpace = errors.New("not enough free space")

// Config is what a run needs.
type Config struct {
	Ledger  *ledger.Ledger
	Profile *Profile
	List    *List
	// Store holds device keys that are made in a token; for such profiles only.
	Store hsm.Store
	// Issuer signs leaves; for x509 profiles only.
	Issuer *ca.Prepared
	// GroupKey derives device keys; for symmetric-key groups only.
	GroupKey hsm.MACKey
	// Templates resolves the stamp files of the profile, in the profile's order.
	Templates []*templates.File
	// IDScope and GlobalEndpoint go into every stamp.
	IDScope        string
	GlobalEndpoint string
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
)

// A Summary says what a run did.
type Summary struct {
	Job     ledger.Job
	Resumed bool
	Minted  int // identities made in this run
	Before  int // identities that an earlier run had made
	Voided  int // identities given up because their key was lost in a crash
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
	r.r.summary.Voided = int(r.r.voids.Load())
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

	listOnce sync.Once // of the keys that earlier runs made in the token
	listErr  error
	inToken  map[string]hsm.Key
}

func newRun(ctx context.Context, cfg Config) (*run, error) {
	p := cfg.Profile
	if cfg.Rand == nil {
		cfg.Rand = rand.Reader
	}
	r := &run{Config: cfg, jobs: cfg.Jobs, alg: hsm.Algorithm(p.Key.Algorithm)}
	if r.jobs <= 0 {
		r.jobs = runtime.GOMAXPROCS(0) + 1
	}
	if cfg.Out == "" && p.Key.Made == madeMemory {
		return nil, fmt.Errorf("profile %s makes keys in memory: it needs a directory to stamp them to (--out)", p.Name)
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
	digest := sha256.New()
	fmt.Fprintf(digest, "touchmark job 1\n%s\n%x", p.Name, cfg.List.Digest)
	job := ledger.Job{Digest: digest.Sum(nil), Profile: p.Name, Out: cfg.Out}
	if cfg.Out != "" {
		// Opened, and its space checked, before the job is written down.
		if r.out, err = stamp.OpenFiles(cfg.Out, hex.EncodeToString(job.Digest[:6])); err != nil {
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
	if r.summary.Resumed {
		r.existing = make(map[string]ledger.Unit)
		for u, err := range cfg.Ledger.Units(ctx, r.summary.Job.ID) {
			if err != nil {
				return fail(err)
			}
			r.existing[u.Serial] = u
		}
	}
	if err := r.checkSpace(len(cfg.List.Rows) - len(r.existing)); err != nil {
		return fail(err)
	}
	if err := r.discardStrays(); err != nil {
		return fail(err)
	}
	return r, nil
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
	files := uint64(3 + len(r.Profile.Stamp.File)) // and the directory itself
	octets, inodes, err := stamp.Free(r.Out)
	if err != nil {
		return err
	}
	need = uint64(devices) * (files + 1) * block
	if octets < need {
		return fmt.Errorf("%w: %d stamps need about %d MiB in %s, %d MiB are free", ErrNoSpace, devices, need>>20+1, r.Out, octets>>20)
	}
	if inodes != 0 && inodes < uint64(devices)*(files+1) { // some file systems do not count them and say 0
		return fmt.Errorf("%w: %d stamps need %d files in %s, %d are free", ErrNoSpace, devices, uint64(devices)*(files+1), r.Out, inodes)
	}
	return nil
}

// discardStrays removes staged directories of units that the ledger never heard of: the run died between staging a key
// and beginning its unit. Nothing was signed for it.
func (r *run) discardStrays() error {
	if r.out == nil {
		return nil
	}
	staged, err := r.out.Staged()
	if err != nil || len(staged) == 0 {
		return err
	}
	known := make(map[string]bool)
	for _, u := range r.existing {
		known[u.RegistrationID] = true
	}
	for _, name := range staged {
		if !known[name] {
			if err := r.out.Discard(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// unit is one device on its way through a group.
type unit struct {
	row       *Row
	id        int64
	state     ledger.State // 0: not begun
	found     bool         // an earlier run began it
	published bool
	keyHash   []byte
	plan      ca.Plan
	signer    crypto.Signer // x509, key in memory
	keyPEM    []byte        // secret
	pub       crypto.PublicKey
	keyURI    string
	cert      []byte // DER
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
		if r.out == nil && r.Profile.Key.Made != madeToken {
			size = ledgerGroup
		}
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
			if err := sink(r.entry(u)); err != nil {
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
		if err := r.recover(ctx, units); err != nil {
			return err
		}
	}
	make := r.makeX509
	switch {
	case r.Profile.Attestation == AttestationX509:
	case r.Profile.Key.Made == madeDerived:
		make = r.makeDerived
	default:
		make = r.makeRandom
	}
	if err := make(ctx, units); err != nil {
		return err
	}
	if r.out == nil {
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
		u.id, u.state = events[i].Unit, state
	}
	return nil
}

// inTheWay refuses to begin a unit whose place on disk is taken by something that this job did not put there.
func (r *run) inTheWay(units []*unit) error {
	if r.out == nil {
		return nil
	}
	for _, u := range units {
		if r.out.Published(u.row.RegistrationID) {
			return fmt.Errorf("serial %s: %w: %s: move it away, or stamp to another directory", u.row.Serial, stamp.ErrExists, r.out.Dir(u.row.RegistrationID))
		}
	}
	return nil
}

func (r *run) makeX509(ctx context.Context, units []unit) error {
	fresh := only(units, 0)
	if err := r.inTheWay(fresh); err != nil {
		return err
	}
	inMemory := r.Profile.Key.Made == madeMemory
	for _, u := range fresh {
		if err := ctx.Err(); err != nil {
			return err
		}
		var err error
		if u.plan, err = r.Issuer.Plan(r.unitOf(u.row)); err != nil {
			return fmt.Errorf("serial %s: %w", u.row.Serial, err)
		}
		if !inMemory {
			continue
		}
		if u.signer, err = generate(r.alg, r.Rand); err != nil {
			return fmt.Errorf("serial %s: making its key: %w", u.row.Serial, err)
		}
		if err := u.setKey(); err != nil {
			return err
		}
		if err := r.out.Stage(u.row.RegistrationID, stamp.File{Name: keyFile, Data: u.keyPEM, Secret: true}); err != nil {
			return err
		}
	}
	if inMemory && len(fresh) > 0 {
		// The key is durable before the ledger says that it is this unit's.
		if err := r.out.Sync(); err != nil {
			return err
		}
	}
	if err := r.commit(ctx, fresh, ledger.Begun, func(u *unit, e *ledger.Event) { e.KeyHash, e.Data = u.keyHash, u.plan.Encode() }); err != nil {
		return r.unstage(fresh, err)
	}
	begun := only(units, ledger.Begun)
	for _, u := range begun {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !inMemory {
			if err := r.tokenKey(ctx, u); err != nil {
				return err
			}
		}
		var err error
		if u.cert, err = r.Issuer.Issue(u.plan, u.pub); err != nil {
			return fmt.Errorf("serial %s: %w", u.row.Serial, err)
		}
	}
	return r.commit(ctx, begun, ledger.Minted, func(u *unit, e *ledger.Event) {
		e.Data = u.cert
		if !inMemory {
			e.KeyHash = u.keyHash
		}
	})
}

// tokenKeyName names a device's key in the token.
func tokenKeyName(registrationID string) string { return tokenKeyPrefix + dps.Fold(registrationID) }

const tokenKeyPrefix = "device:"

// tokenKey makes the unit's key in the token. The name is in the ledger already, so a run that dies right here finds the
// key by it and makes no second one.
func (r *run) tokenKey(ctx context.Context, u *unit) error {
	name := tokenKeyName(u.row.RegistrationID)
	var k hsm.Key
	err := hsm.ErrNotFound
	if u.found {
		k, err = r.keyInToken(ctx, name)
	}
	if errors.Is(err, hsm.ErrNotFound) {
		k, err = r.Store.Generate(ctx, hsm.Spec{Name: name, Algorithm: r.alg})
	}
	if err != nil {
		return fmt.Errorf("serial %s: %w", u.row.Serial, err)
	}
	return u.setTokenKey(k)
}

// keyInToken finds a key that an earlier run made. All of them are listed once: a search for each would cost the square of
// their number.
func (r *run) keyInToken(ctx context.Context, name string) (hsm.Key, error) {
	r.listOnce.Do(func() {
		lister, ok := r.Store.(hsm.Lister)
		if !ok {
			return // then each is searched for
		}
		var keys []hsm.Key
		if keys, r.listErr = lister.List(ctx, tokenKeyPrefix); r.listErr != nil {
			return
		}
		r.inToken = make(map[string]hsm.Key, len(keys))
		for _, k := range keys {
			r.inToken[k.Name()] = k
		}
	})
	switch {
	case r.listErr != nil:
		return nil, r.listErr
	case r.inToken == nil:
		return r.Store.Open(ctx, name)
	}
	if k, ok := r.inToken[name]; ok {
		return k, nil
	}
	return nil, fmt.Errorf("key %q: %w", name, hsm.ErrNotFound)
}

func (u *unit) setTokenKey(k hsm.Key) error {
	signing, err := hsm.SigningKeyOf(k)
	if err != nil {
		return err
	}
	u.pub, u.keyURI = signing.Public(), k.URI()
	u.keyHash, err = publicKeyHash(u.pub)
	return err
}

// setKey fills in what follows from the signer: its PEM, its public half and that one's hash.
func (u *unit) setKey() error {
	der, err := marshalPKCS8(u.signer)
	if err != nil {
		return err
	}
	u.keyPEM = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	clear(der)
	u.pub = u.signer.Public()
	u.keyHash, err = publicKeyHash(u.pub)
	return err
}

func publicKeyHash(pub crypto.PublicKey) ([]byte, error) {
	spki, err := marshalPKIX(pub)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(spki)
	return sum[:], nil
}

// generate makes a key pair in memory.
func generate(alg hsm.Algorithm, random io.Reader) (crypto.Signer, error) {
	switch alg {
	case hsm.ECP256:
		return ecdsa.GenerateKey(elliptic.P256(), random)
	case hsm.ECP384:
		return ecdsa.GenerateKey(elliptic.P384(), random)
	case hsm.RSA2048:
		return rsa.GenerateKey(random, 2048)
	case hsm.RSA3072:
		return rsa.GenerateKey(random, 3072)
	case hsm.RSA4096:
		return rsa.GenerateKey(random, 4096)
	case hsm.Ed25519:
		_, priv, err := ed25519.GenerateKey(random)
		return priv, err
	}
	return nil, fmt.Errorf("key pairs of algorithm %q: %w", alg, hsm.ErrUnsupported)
}

// symmetricKeyHash names a symmetric key without telling it: SHA-256 over a label and the key, which has 256 bits of
// entropy.
func symmetricKeyHash(key hsm.Secret) []byte {
	h := sha256.New()
	h.Write([]byte("touchmark symmetric key\x00"))
	h.Write(key)
	return h.Sum(nil)
}

// makeDerived derives each device's key from the group key: base64(HMAC-SHA256(group key, registration ID)). It comes out
// the same every time, so nothing has to be durable before the unit is minted.
func (r *run) makeDerived(ctx context.Context, units []unit) error {
	fresh := only(units, 0)
	if err := r.inTheWay(fresh); err != nil {
		return err
	}
	for i := range units {
		u := &units[i]
		if u.state > ledger.Minted || u.state == ledger.Minted && r.out == nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		key, err := r.GroupKey.MAC(ctx, make([]byte, 0, sha256.Size), []byte(u.row.RegistrationID))
		if err != nil {
			return fmt.Errorf("serial %s: deriving its key: %w", u.row.Serial, err)
		}
		u.symmetric = key
		hash := symmetricKeyHash(key)
		if u.state == ledger.Minted && !bytes.Equal(hash, u.keyHash) {
			return fmt.Errorf("serial %s: %w: the group key derives another key than it did when the unit was minted", u.row.Serial, ErrUnproven)
		}
		u.keyHash = hash
	}
	return r.commit(ctx, fresh, ledger.Minted, func(u *unit, e *ledger.Event) { e.KeyHash = u.keyHash })
}

// makeRandom gives each device a key of its own. The staged stamp is where it lives until the device has it.
func (r *run) makeRandom(ctx context.Context, units []unit) error {
	fresh := only(units, 0)
	if err := r.inTheWay(fresh); err != nil {
		return err
	}
	for _, u := range fresh {
		u.symmetric = make(hsm.Secret, 32)
		if _, err := io.ReadFull(r.Rand, u.symmetric); err != nil {
			return err
		}
		u.keyHash = symmetricKeyHash(u.symmetric)
		if err := r.render(u); err != nil {
			return err
		}
		if err := r.out.Stage(u.row.RegistrationID, u.files...); err != nil {
			return err
		}
	}
	if len(fresh) > 0 {
		if err := r.out.Sync(); err != nil {
			return err
		}
	}
	if err := r.commit(ctx, fresh, ledger.Minted, func(u *unit, e *ledger.Event) { e.KeyHash = u.keyHash }); err != nil {
		return r.unstage(fresh, err)
	}
	return nil
}

// unstage throws away what was staged for units that the ledger refused. Where it is not known that it refused, the staged
// keys stay for the next run to look at.
func (r *run) unstage(units []*unit, cause error) error {
	var dup *ledger.DuplicateError
	if r.out == nil || !errors.As(cause, &dup) {
		return cause
	}
	for _, u := range units {
		if err := r.out.Discard(u.row.RegistrationID); err != nil {
			return errors.Join(cause, err)
		}
	}
	return cause
}

// stamp brings minted units to verified: everything staged and flushed, one rename each, flushed, read back.
func (r *run) stamp(ctx context.Context, units []unit) error {
	minted := only(units, ledger.Minted)
	if len(minted) == 0 {
		return nil
	}
	for _, u := range minted {
		if err := r.render(u); err != nil {
			return err
		}
		if u.published {
			continue
		}
		if err := r.out.Stage(u.row.RegistrationID, r.unstaged(u)...); err != nil {
			return err
		}
	}
	if err := r.out.Sync(); err != nil {
		return err
	}
	for _, u := range minted {
		if u.published {
			continue
		}
		if err := r.out.Publish(u.row.RegistrationID); err != nil {
			return err
		}
	}
	if err := r.out.Sync(); err != nil {
		return err
	}
	for _, u := range minted {
		if err := r.out.ReadBack(u.row.RegistrationID, u.files...); err != nil {
			return fmt.Errorf("serial %s: %w", u.row.Serial, err)
		}
	}
	return r.commit(ctx, minted, ledger.Verified, nil)
}

// unstaged returns the files that are not in the staged directory yet.
func (r *run) unstaged(u *unit) []stamp.File {
	if u.found {
		return u.files // what a dead run left there may be half-written
	}
	if r.Profile.Attestation == AttestationX509 {
		if r.Profile.Key.Made == madeMemory {
			return u.files[1:] // the key went first
		}
		return u.files
	}
	if r.Profile.Key.Made == madeMemory {
		return nil
	}
	return u.files
}

// provisioning is the document provisioning.json.
type provisioning struct {
	IDScope          string `json:"idScope"`
	GlobalEndpoint   string `json:"globalEndpoint"`
	RegistrationID   string `json:"registrationId"`
	Attestation      string `json:"attestation"`
	CertificateChain string `json:"certificateChain,omitempty"`
	PrivateKey       string `json:"privateKey,omitempty"`
	KeyURI           string `json:"keyUri,omitempty"`
	SymmetricKey     string `json:"symmetricKey,omitempty"`
}

// render makes the files of a unit's stamp. The key file of a key in memory comes first.
func (r *run) render(u *unit) error {
	if u.files != nil {
		return nil
	}
	doc := provisioning{IDScope: r.IDScope, GlobalEndpoint: r.GlobalEndpoint, RegistrationID: u.row.RegistrationID}
	files := make([]stamp.File, 0, 3+len(r.Templates))
	if r.Profile.Attestation == AttestationX509 {
		doc.Attestation, doc.CertificateChain = "x509", chainFile
		if r.Profile.Key.Made == madeMemory {
			doc.PrivateKey = keyFile
			files = append(files, stamp.File{Name: keyFile, Data: u.keyPEM, Secret: true})
		} else {
			doc.KeyURI = u.keyURI
		}
		leaf := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: u.cert})
		files = append(files, stamp.File{Name: chainFile, Data: append(leaf, r.chain...)})
	} else {
		doc.Attestation, doc.SymmetricKey = "symmetricKey", base64.StdEncoding.EncodeToString(u.symmetric)
	}
	b, err := json.Marshal(doc)
	if err != nil {
		return err
	}
	files = append(files, stamp.File{Name: stampFile, Data: append(b, '\n'), Secret: doc.SymmetricKey != ""})
	for i, t := range r.Templates {
		s := r.Profile.Stamp.File[i]
		out, err := t.Render(nil, templates.Device{
			IDScope: doc.IDScope, GlobalEndpoint: doc.GlobalEndpoint, RegistrationID: doc.RegistrationID, Serial: u.row.Serial,
			Attestation: doc.Attestation, CertificateChainFile: doc.CertificateChain, PrivateKeyFile: doc.PrivateKey,
			KeyURI: doc.KeyURI, SymmetricKey: doc.SymmetricKey, Columns: r.fields(u.row),
		})
		if err != nil {
			return fmt.Errorf("serial %s: %s: %w", u.row.Serial, s.Name, err)
		}
		if doc.SymmetricKey != "" && !s.Secret && bytes.Contains(out, []byte(doc.SymmetricKey)) {
			return fmt.Errorf("serial %s: %s would show the device's key to everybody: set secret = true for it in profile %s", u.row.Serial, s.Name, r.Profile.Name)
		}
		files = append(files, stamp.File{Name: s.Name, Data: out, Secret: s.Secret})
	}
	u.files = files
	return nil
}

func (r *run) fields(row *Row) map[string]string {
	if len(r.List.Columns) == 1 && len(r.Templates) == 0 {
		return nil
	}
	m := make(map[string]string, len(r.List.Columns))
	for i, c := range r.List.Columns {
		m[c] = row.Fields[i]
	}
	return m
}

// unitOf is what a certificate is made for.
func (r *run) unitOf(row *Row) ca.Unit {
	return ca.Unit{RegistrationID: row.RegistrationID, Serial: row.Serial, Columns: r.fields(row)}
}

// groupEntry tells the service of the issuing CA that vouches for the devices.
func (r *run) groupEntry() *bundle.Entry {
	e := r.base
	e.Attestation = &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{
		SigningCertificates: &dps.X509Certificates{Primary: &dps.X509Certificate{
			Certificate: base64.StdEncoding.EncodeToString(r.Issuer.Certificate().Raw),
		}},
	}}
	return &bundle.Entry{Group: &dps.EnrollmentGroup{EnrollmentGroupID: r.Profile.Group, Enrollment: e}}
}

func (r *run) entry(u *unit) *bundle.Entry {
	if r.Profile.Enrollment == "group" {
		d := &bundle.GroupDevice{RegistrationID: u.row.RegistrationID, Group: r.Profile.Group}
		if r.Profile.Attestation == AttestationX509 {
			d.KeyHash = hex.EncodeToString(u.keyHash)
		}
		return &bundle.Entry{Serial: u.row.Serial, Device: d}
	}
	e := r.base
	if r.Profile.Attestation == AttestationX509 {
		e.Attestation = &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{
			ClientCertificates: &dps.X509Certificates{Primary: &dps.X509Certificate{Certificate: base64.StdEncoding.EncodeToString(u.cert)}},
		}}
	} else {
		e.Attestation = &dps.Attestation{Type: dps.AttestationSymmetricKey, SymmetricKey: &dps.SymmetricKeyAttestation{
			PrimaryKey: base64.StdEncoding.EncodeToString(u.symmetric),
		}}
	}
	in := &dps.IndividualEnrollment{RegistrationID: u.row.RegistrationID, Enrollment: e}
	if r.Profile.DeviceInformation != nil {
		in.OptionalDeviceInformation, _ = json.Marshal(r.Profile.DeviceInformation) // maps from TOML always marshal
	}
	return &bundle.Entry{Serial: u.row.Serial, Individual: in}
}

// Seal writes down that the run's units left the factory in a bundle. It may be repeated.
func Seal(ctx context.Context, l *ledger.Ledger, s Summary, bundleID string) error {
	const step = 8192
	for ids := s.Units; len(ids) > 0; {
		n := min(step, len(ids))
		events := make([]ledger.Event, n)
		for i, id := range ids[:n] {
			events[i] = ledger.Event{State: ledger.Sealed, Unit: id, Data: []byte(bundleID)}
		}
		if err := l.Commit(ctx, events); err != nil {
			return fmt.Errorf("sealing: %w", err)
		}
		ids = ids[n:]
	}
	return nil
}

var errNoKey = errors.New("key is gone")

// recover finds out how far an earlier run brought each unit, and what of it can still be proven.
func (r *run) recover(ctx context.Context, units []unit) error {
	var known []*ledger.Unit
	var at []*unit
	for i := range units {
		if have, ok := r.existing[units[i].row.Serial]; ok {
			known, at = append(known, &have), append(at, &units[i])
		}
	}
	if err := r.Ledger.Fill(ctx, known...); err != nil {
		return err
	}
	var void []ledger.Event
	for i, have := range known {
		u := at[i]
		if have.RegistrationID != u.row.RegistrationID {
			return fmt.Errorf("serial %s was begun as %s, and would be %s now: the profile's registration-id was changed in the middle of a job",
				have.Serial, have.RegistrationID, u.row.RegistrationID)
		}
		err := r.prove(ctx, u, have)
		if errors.Is(err, errNoKey) {
			void = append(void, ledger.Event{State: ledger.Voided, Unit: have.ID, Data: []byte("its key was lost before it reached the device")})
			if err := r.out.Discard(u.row.RegistrationID); err != nil {
				return err
			}
			*u = unit{row: u.row}
			continue
		}
		if err != nil {
			return fmt.Errorf("serial %s: %w", have.Serial, err)
		}
	}
	if len(void) == 0 {
		return nil
	}
	r.voids.Add(int64(len(void)))
	return r.Ledger.Commit(ctx, void)
}

// prove loads what the unit's state promises, or says errNoKey.
func (r *run) prove(ctx context.Context, u *unit, have *ledger.Unit) error {
	u.found, u.id, u.state, u.keyHash = true, have.ID, have.State, have.KeyHash
	u.published = r.out != nil && r.out.Published(u.row.RegistrationID)
	done := u.state >= ledger.Verified || u.state == ledger.Minted && r.out == nil
	if r.Profile.Attestation == AttestationX509 {
		if u.state == ledger.Begun {
			var err error
			if u.plan, err = ca.DecodePlan(have.Data); err != nil {
				return err
			}
			u.plan.Unit = r.unitOf(u.row)
		} else {
			u.cert = have.Data
		}
		switch {
		case done:
			return nil
		case r.Profile.Key.Made == madeMemory:
			return r.keyOnDisk(u)
		case u.state == ledger.Begun:
			return nil // tokenKey looks for the key by its name
		}
		k, err := r.keyInToken(ctx, tokenKeyName(u.row.RegistrationID))
		if err != nil {
			return fmt.Errorf("%w: its certificate was signed: %w", ErrUnproven, err)
		}
		hash := u.keyHash
		if err := u.setTokenKey(k); err != nil {
			return err
		}
		if !bytes.Equal(hash, u.keyHash) {
			return fmt.Errorf("%w: the token holds another key under its name", ErrUnproven)
		}
		return nil
	}
	if r.Profile.Key.Made == madeDerived {
		return nil
	}
	return r.secretOnDisk(u, done)
}

// keyOnDisk loads a private key from the staged or published stamp, if it is the unit's.
func (r *run) keyOnDisk(u *unit) error {
	b, err := r.onDisk(u, keyFile)
	if err != nil {
		return err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return errNoKey
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	clear(block.Bytes)
	signer, ok := key.(crypto.Signer)
	if err != nil || !ok {
		return errNoKey
	}
	hash := u.keyHash
	u.signer = signer
	if err := u.setKey(); err != nil {
		return err
	}
	if !bytes.Equal(hash, u.keyHash) {
		return r.foreign(u)
	}
	return nil
}

// secretOnDisk loads a symmetric key from the staged or published stamp, if it is the unit's.
func (r *run) secretOnDisk(u *unit, done bool) error {
	b, err := r.onDisk(u, stampFile)
	if err != nil {
		if done && errors.Is(err, errNoKey) {
			return fmt.Errorf("%w: its stamp %s is gone, and its key with it", ErrUnproven, r.out.Dir(u.row.RegistrationID))
		}
		return err
	}
	var doc provisioning
	err = json.Unmarshal(b, &doc)
	clear(b)
	if err != nil {
		return r.foreign(u)
	}
	if u.symmetric, err = base64.StdEncoding.DecodeString(doc.SymmetricKey); err != nil || !bytes.Equal(symmetricKeyHash(u.symmetric), u.keyHash) {
		return r.foreign(u)
	}
	return nil
}

func (r *run) onDisk(u *unit, name string) ([]byte, error) {
	read := r.out.StagedFile
	if u.published {
		read = r.out.PublishedFile
	}
	b, err := read(u.row.RegistrationID, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errNoKey
	}
	return b, err
}

// foreign decides about a stamp that holds another key than the unit's: a staged one is half-written and void, a published
// one is somebody's work and needs a person.
func (r *run) foreign(u *unit) error {
	if u.published {
		return fmt.Errorf("%w: %s holds another key", ErrUnproven, r.out.Dir(u.row.RegistrationID))
	}
	return errNoKey
}
