package bundle

import (
	"archive/tar"
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"

	"filippo.io/age"
	"github.com/klauspost/compress/zstd"

	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/hsm/tpm/residency"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
)

// OpenConfig says whom a reader trusts and what it can open.
type OpenConfig struct {
	// Trusted are the public keys of stations. At least one must have signed.
	Trusted []crypto.PublicKey
	// Identities open sealed keys. Without any, entries come without their keys.
	Identities []age.Identity
	// RequireResidency refuses devices whose key is not shown to live in such a place; empty asks for nothing.
	RequireResidency evidence.Residency
	// Makers are the TPM manufacturers that the endorsement keys of devices with TPM evidence must be certified by; nil asks
	// for none, and then a software TPM is as good as another.
	Makers *residency.Makers
}

// A Reader reads a bundle whose signature was verified.
type Reader struct {
	cfg      OpenConfig
	in       *members
	manifest Manifest
	keyID    string
	zstd     *zstd.Decoder
	started  bool
	check    []byte
	grant    []byte
}

// Open verifies the manifest's signature. The error is signed.ErrUntrusted or ErrCorrupt. The caller closes the reader.
func Open(r io.Reader, cfg OpenConfig) (*Reader, error) {
	b := &Reader{cfg: cfg, in: &members{r: r}}
	raw, signature, err := readManifest(b.in)
	if err != nil {
		return nil, err
	}
	if b.keyID, err = verify(raw, signature, cfg.Trusted); err != nil {
		return nil, err
	}
	if err := parseManifest(raw, &b.manifest); err != nil {
		return nil, err
	}
	if g := b.manifest.Grant; g != nil {
		if b.grant, err = b.chunk(g.Chunk, maxGrant); err != nil {
			return nil, err
		}
		id, err := grantID(b.grant)
		if err != nil {
			return nil, corrupt("%w", err)
		}
		if id != g.ID {
			return nil, corrupt("its grant is %.130q, and not %.130q as its manifest says", id, g.ID)
		}
	}
	b.zstd, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxPlain), zstd.WithDecoderMaxWindow(8<<20))
	return b, err
}

// Close gives the reader's buffers back.
func (b *Reader) Close() { b.zstd.Close() }

// Manifest returns what the station signed.
func (b *Reader) Manifest() Manifest { return b.manifest }

// KeyID names the trusted key that signed.
func (b *Reader) KeyID() string { return b.keyID }

// Grant returns the order or lease that the bundle's units were made on, as it came; nil if the bundle has none. It is what the
// station put there: whether it is an owner's, and for this station, package order tells.
func (b *Reader) Grant() []byte { return b.grant }

// Checkpoint returns the ledger's signed checkpoint once Entries came to its end; nil if the bundle has none.
func (b *Reader) Checkpoint() []byte { return b.check }

// Describe returns what a bundle says of itself and the key that it says it is signed with. Nothing of it is verified.
func Describe(r io.Reader) (Manifest, string, error) {
	var m Manifest
	raw, signature, err := readManifest(&members{r: r})
	if err != nil {
		return m, "", err
	}
	if err := parseManifest(raw, &m); err != nil {
		return m, "", err
	}
	return m, signature.KeyID(), nil
}

// Verify reads a bundle to its last octet.
func Verify(r io.Reader, cfg OpenConfig) (Summary, error) {
	b, err := Open(r, cfg)
	if err != nil {
		return Summary{}, err
	}
	defer b.Close()
	for _, err := range b.Entries() {
		if err != nil {
			return Summary{}, err
		}
	}
	return b.manifest.summary(b.keyID), nil
}

// errNoBundle says that a file is something else altogether. It counts as ErrCorrupt.
var errNoBundle error = notBundle{}

type notBundle struct{}

func (notBundle) Error() string        { return "not a touchmark bundle" }
func (notBundle) Is(target error) bool { return target == ErrCorrupt }

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrCorrupt, fmt.Errorf(format, args...))
}

// members reads the tar member by member. Every header must be, octet for octet, the one that a Writer gives a member of
// that name, size and time, and all padding must be zeros: a bundle has one form, and nothing hides beside what was signed.
type members struct {
	r       io.Reader
	created time.Time
	seen    bool
}

const block = 512

func (m *members) next(name string, limit int64) ([]byte, error) {
	raw := make([]byte, block)
	if _, err := io.ReadFull(m.r, raw); err != nil {
		if !m.seen {
			return nil, errNoBundle
		}
		return nil, corrupt("it ends before %s", name)
	}
	h, err := tar.NewReader(bytes.NewReader(raw)).Next()
	if err != nil && !m.seen {
		return nil, errNoBundle
	}
	if err != nil {
		return nil, corrupt("the header of %s: %w", name, err)
	}
	if !m.seen {
		m.created, m.seen = h.ModTime, true
	}
	var want bytes.Buffer
	if err := tar.NewWriter(&want).WriteHeader(header(name, h.Size, m.created)); err != nil || !bytes.Equal(want.Bytes(), raw) {
		return nil, corrupt("member %.100q stands where %s belongs, or has an unusual header", h.Name, name)
	}
	if h.Size > limit {
		return nil, corrupt("%s has %d octets, at most %d are read", name, h.Size, limit)
	}
	// The buffer grows with what arrives, not with what the header says.
	var body bytes.Buffer
	if _, err := io.CopyN(&body, m.r, h.Size); err != nil {
		return nil, corrupt("%s is cut off: %w", name, err)
	}
	return body.Bytes(), m.zeros(int((block-h.Size%block)%block), name)
}

func (m *members) zeros(n int, where string) error {
	pad := make([]byte, n)
	if _, err := io.ReadFull(m.r, pad); err != nil || !bytes.Equal(pad, make([]byte, n)) {
		return corrupt("behind %s it is cut off, or not empty", where)
	}
	return nil
}

// end makes sure that the tar ends here: two empty blocks and nothing else.
func (m *members) end() error {
	if err := m.zeros(2*block, "the last member"); err != nil {
		return err
	}
	if n, _ := io.ReadFull(m.r, make([]byte, 1)); n != 0 {
		return corrupt("something follows its end")
	}
	return nil
}

func readManifest(in *members) ([]byte, *signed.Envelope, error) {
	raw, err := in.next(manifestName, maxManifest)
	if err != nil {
		return nil, nil, err
	}
	b, err := in.next(signatureName, 2*maxManifest)
	if err != nil {
		return nil, nil, err
	}
	envelope, err := signed.Parse(b)
	if err != nil {
		return nil, nil, corrupt("signature: %w", err)
	}
	return raw, envelope, nil
}

// verify checks the envelope against the trusted keys and the manifest, and returns the key that signed.
func verify(raw []byte, envelope *signed.Envelope, trusted []crypto.PublicKey) (string, error) {
	if !bytes.Equal(envelope.Unverified(), raw) {
		return "", corrupt("the signature is over another manifest")
	}
	_, keyID, err := envelope.Verify(payloadType, trusted)
	if errors.Is(err, signed.ErrCorrupt) {
		return "", corrupt("%w", err)
	}
	if err != nil {
		return "", fmt.Errorf("bundle is %w", err)
	}
	return keyID, nil
}

// strictJSON decodes one JSON value without unknown members and with nothing behind it.
func strictJSON(b []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if dec.InputOffset() != int64(len(b)) {
		return errors.New("something follows the JSON value")
	}
	return nil
}

func parseManifest(raw []byte, m *Manifest) error {
	if err := strictJSON(raw, m); err != nil {
		return corrupt("manifest: %w", err)
	}
	if m.Version != formatVersion {
		return fmt.Errorf("bundle format %d is not known to this version of touchmark", m.Version)
	}
	if err := dps.CheckIDScope(m.IDScope); err != nil {
		return corrupt("manifest: %w", err)
	}
	if len(m.Entries) > maxChunks || len(m.Sealed) > maxChunks || len(m.Info) > maxInfo {
		return corrupt("manifest lists too much")
	}
	var entries, sealed int64
	for i, c := range m.Entries {
		if c.Name != entryChunkName(i) || c.Count < 1 || c.Size < 1 {
			return corrupt("manifest: chunk %d", i)
		}
		entries += c.Count
	}
	at := 0
	for i, c := range m.Sealed {
		for at < len(m.Entries) && c.Name != sealedChunkName(at) {
			at++
		}
		if at == len(m.Entries) || c.Count < 1 || c.Size < 1 {
			return corrupt("manifest: sealed chunk %d", i)
		}
		at++
		sealed += c.Count
	}
	if m.Checkpoint != nil && m.Checkpoint.Name != checkpointName {
		return corrupt("manifest: checkpoint")
	}
	if m.Grant != nil && (m.Grant.Name != grantName || m.Grant.Size < 1) {
		return corrupt("manifest: grant")
	}
	if entries != m.Counts.Total() || sealed != m.Counts.Sealed {
		return corrupt("manifest: its counts contradict each other")
	}
	return nil
}

// chunk reads a member and holds it against the manifest, before anything looks into it.
func (b *Reader) chunk(c Chunk, limit int64) ([]byte, error) {
	got, err := b.in.next(c.Name, min(limit, max(c.Size, 0)))
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(got)
	if int64(len(got)) != c.Size || hex.EncodeToString(sum[:]) != c.SHA256 {
		return nil, corrupt("%s is not what was signed", c.Name)
	}
	return got, nil
}

// Entries yields each entry once its chunk is verified. It can be gone through once. An error is yielded last: ErrCorrupt
// for what was changed, cut off or added, ErrSealed when identities were given and none opens the keys,
// evidence.ErrResidency for a device without the evidence that was asked for. A caller that
// stops early has not verified the rest.
//
// Where keys were opened, the individual symmetric-key enrollments of a chunk come behind its other entries.
func (b *Reader) Entries() iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		if b.started {
			yield(Entry{}, errors.New("bundle entries can be read once"))
			return
		}
		b.started = true
		if err := b.read(func(e Entry) bool { return yield(e, nil) }); err != nil && !errors.Is(err, errStopped) {
			yield(Entry{}, err)
		}
	}
}

var errStopped = errors.New("stopped by the caller")

func (b *Reader) read(yield func(Entry) bool) error {
	var counts Counts
	var waiting []Entry
	var plain []byte
	content := [sha256.Size]byte{}
	sealedChunks := b.manifest.Sealed
	for i, c := range b.manifest.Entries {
		var sealed *Chunk
		if len(sealedChunks) > 0 && sealedChunks[0].Name == sealedChunkName(i) {
			sealed, sealedChunks = &sealedChunks[0], sealedChunks[1:]
		}
		packed, err := b.chunk(c, maxChunk)
		if err != nil {
			return err
		}
		if plain, err = b.zstd.DecodeAll(packed, plain[:0]); err != nil {
			return corrupt("%s: %w", c.Name, err)
		}
		h := sha256.New()
		h.Write(content[:])
		h.Write(plain)
		h.Sum(content[:0])
		lines := int64(0)
		err = eachLine(plain, func(line []byte) error {
			lines++
			var e Entry
			if err := strictJSON(line, &e); err != nil {
				return corrupt("%s, line %d: %w", c.Name, lines, err)
			}
			if err := e.Check(); err != nil {
				return corrupt("%s, line %d: %w", c.Name, lines, err)
			}
			if b.cfg.RequireResidency != "" {
				if err := e.Resides(b.cfg.RequireResidency); err != nil {
					return fmt.Errorf("%s, line %d: %s: %w", c.Name, lines, e.name(), err)
				}
			}
			if e.Evidence != nil && b.cfg.Makers != nil && e.Evidence.Kind == evidence.TPM {
				if _, err := e.Evidence.Genuine(b.cfg.Makers); err != nil {
					return fmt.Errorf("%s, line %d: %s: %w", c.Name, lines, e.name(), err)
				}
			}
			counts.add(&e)
			if e.Individual != nil {
				if a := e.Individual.Attestation; a.Type == dps.AttestationSymmetricKey {
					if a.SymmetricKey != nil {
						return corrupt("%s, line %d: it has a key in the clear", c.Name, lines)
					}
					if len(b.cfg.Identities) > 0 && sealed != nil {
						waiting = append(waiting, e)
						return nil
					}
				}
			}
			if !yield(e) {
				return errStopped
			}
			return nil
		})
		if err != nil {
			return err
		}
		if lines != c.Count {
			return corrupt("%s has %d entries, not %d", c.Name, lines, c.Count)
		}
		if sealed != nil {
			if waiting, err = b.unseal(*sealed, waiting, yield); err != nil {
				return err
			}
		}
	}
	counts.Sealed = b.manifest.Counts.Sealed
	if counts != b.manifest.Counts || hex.EncodeToString(content[:]) != b.manifest.ID {
		return corrupt("its entries are not the ones that the manifest counts")
	}
	if c := b.manifest.Checkpoint; c != nil {
		var err error
		if b.check, err = b.chunk(*c, maxCheckpoint); err != nil {
			return err
		}
	}
	return b.in.end()
}

// unseal reads a chunk of keys, and opens it where there are identities: each key goes to the entry that waits for it, in
// the same order.
func (b *Reader) unseal(c Chunk, waiting []Entry, yield func(Entry) bool) ([]Entry, error) {
	sealed, err := b.chunk(c, maxChunk)
	if err != nil || len(b.cfg.Identities) == 0 {
		return nil, err
	}
	r, err := age.Decrypt(bytes.NewReader(sealed), b.cfg.Identities...)
	if err != nil {
		var none *age.NoIdentityMatchError
		if errors.As(err, &none) {
			return nil, fmt.Errorf("%s: %w", c.Name, ErrSealed)
		}
		return nil, corrupt("%s: %w", c.Name, err)
	}
	plain, err := io.ReadAll(io.LimitReader(r, maxPlain+1))
	if err != nil || len(plain) > maxPlain {
		return nil, corrupt("%s does not open, or is too large", c.Name)
	}
	defer clear(plain)
	lines := int64(0)
	err = eachLine(plain, func(line []byte) error {
		lines++
		var k sealedKey
		if err := strictJSON(line, &k); err != nil {
			return corrupt("%s, line %d is not a key", c.Name, lines) // its text would show one
		}
		if len(waiting) == 0 || waiting[0].Individual.RegistrationID != k.RegistrationID {
			return corrupt("%s, line %d: no entry waits for this key", c.Name, lines)
		}
		e := waiting[0]
		waiting = waiting[1:]
		e.Individual.Attestation.SymmetricKey = &dps.SymmetricKeyAttestation{PrimaryKey: k.PrimaryKey, SecondaryKey: k.SecondaryKey}
		if !yield(e) {
			return errStopped
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if lines != c.Count || len(waiting) > 0 {
		return nil, corrupt("%s has %d keys, not %d, and %d entries wait in vain", c.Name, lines, c.Count, len(waiting))
	}
	return waiting[:0], nil
}

func eachLine(b []byte, f func([]byte) error) error {
	for len(b) > 0 {
		i := bytes.IndexByte(b, '\n')
		if i < 0 || i > maxLine {
			return corrupt("a line is cut off, or too long")
		}
		if err := f(b[:i]); err != nil {
			return err
		}
		b = b[i+1:]
	}
	return nil
}
