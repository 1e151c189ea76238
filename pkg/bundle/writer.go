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
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"filippo.io/age"
	"github.com/gowebpki/jcs"
	"github.com/klauspost/compress/zstd"

	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/pkg/dps"
)

// WriterConfig says what bundle to write.
type WriterConfig struct {
	Path string
	// Overwrite replaces a file that is there already.
	Overwrite bool
	IDScope   string
	// Created stands in the manifest and in the tar; whole seconds.
	Created time.Time
	// Signer is the station key.
	Signer crypto.Signer
	// Recipients are whom keys are sealed to. Without any, an entry with a key is refused.
	Recipients []age.Recipient
	// Info is free text about the bundle: line, profile, order.
	Info map[string]string
}

// A Writer makes a bundle.
type Writer struct {
	cfg      WriterConfig
	manifest Manifest
	spool    *os.File // finished chunks, one behind the other
	zstd     *zstd.Encoder
	plain    []byte // the chunk being filled: JSON Lines
	lines    int64
	sealed   []byte // and its keys: secret
	sealedN  int64
	packed   []byte
	content  [sha256.Size]byte // hash over all lines so far: the bundle's ID
	check    []byte
	grant    []byte
	order    []Chunk // as they are in the spool
	done     bool
}

// NewWriter begins a bundle. Close finishes it, Abort gives it up; until then nothing stands at its path.
func NewWriter(cfg WriterConfig) (*Writer, error) {
	if err := dps.CheckIDScope(cfg.IDScope); err != nil {
		return nil, err
	}
	if !cfg.Overwrite {
		if _, err := os.Lstat(cfg.Path); err == nil {
			return nil, fmt.Errorf("bundle %s: %w", cfg.Path, fs.ErrExist)
		}
	}
	if len(cfg.Info) > maxInfo {
		return nil, fmt.Errorf("bundle info has more than %d items", maxInfo)
	}
	// The spool stands beside the destination, so a disk that is too small is noticed before the bundle is in place. It has
	// no name once it is open: a crash leaves nothing behind.
	spool, err := os.CreateTemp(filepath.Dir(cfg.Path), ".bundle-*")
	if err != nil {
		return nil, writing(cfg.Path, err)
	}
	if err := os.Remove(spool.Name()); err != nil {
		return nil, errors.Join(err, spool.Close())
	}
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return nil, errors.Join(err, spool.Close())
	}
	w := &Writer{cfg: cfg, spool: spool, zstd: enc}
	w.manifest = Manifest{Version: formatVersion, Created: cfg.Created.UTC().Format(time.RFC3339), IDScope: cfg.IDScope, Info: cfg.Info, Entries: []Chunk{}}
	return w, nil
}

// writing says what could not be written by its own name: the temporary files' names tell nobody anything.
func writing(path string, err error) error {
	var file *fs.PathError
	if errors.As(err, &file) {
		err = file.Err
	}
	return fmt.Errorf("writing bundle %s: %w", path, err)
}

// sealedKey is a line of a sealed chunk.
type sealedKey struct {
	RegistrationID string `json:"registrationId"`
	PrimaryKey     string `json:"primaryKey"`
	SecondaryKey   string `json:"secondaryKey,omitempty"`
}

// Add puts an entry into the bundle. The keys of an individual symmetric-key enrollment go into the sealed part only.
func (w *Writer) Add(e *Entry) error {
	if err := e.Check(); err != nil {
		return fmt.Errorf("bundle entry: %w", err)
	}
	switch {
	case e.Device != nil && e.Evidence == nil:
		w.plain = appendDevice(w.plain, e)
	case e.Device != nil, e.Retired != nil:
		if err := w.appendJSON(e); err != nil {
			return err
		}
	case e.Group != nil:
		if e.Group.Attestation.SymmetricKey != nil {
			return fmt.Errorf("bundle entry: group %q carries its key: group keys never leave the service but sealed to a line", e.Group.EnrollmentGroupID)
		}
		if err := w.appendJSON(e); err != nil {
			return err
		}
	default:
		open := *e
		if k := e.Individual.Attestation.SymmetricKey; k != nil {
			if len(w.cfg.Recipients) == 0 {
				return fmt.Errorf("bundle entry %q has a key and the bundle has no recipient to seal it to", e.Individual.RegistrationID)
			}
			line, err := json.Marshal(sealedKey{e.Individual.RegistrationID, k.PrimaryKey, k.SecondaryKey})
			if err != nil {
				return err
			}
			w.sealed = append(append(w.sealed, line...), '\n')
			clear(line)
			w.sealedN++
			in := *e.Individual
			in.Attestation = &dps.Attestation{Type: dps.AttestationSymmetricKey}
			open.Individual = &in
		}
		if err := w.appendJSON(&open); err != nil {
			return err
		}
	}
	w.manifest.Counts.add(e)
	w.lines++
	if w.lines >= chunkEntries || len(w.plain) >= chunkPlain {
		return w.flush()
	}
	return nil
}

func (w *Writer) appendJSON(e *Entry) error {
	b, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("bundle entry: %w", err)
	}
	if len(b) > maxLine {
		return fmt.Errorf("bundle entry of %d octets: at most %d fit", len(b), maxLine)
	}
	w.plain = append(append(w.plain, b...), '\n')
	return nil
}

// appendDevice writes what json.Marshal would, for the entry that a bundle holds most of.
func appendDevice(b []byte, e *Entry) []byte {
	b = append(b, '{')
	if e.Serial != "" {
		b = append(b, `"serial":`...)
		s, _ := json.Marshal(e.Serial) // a string always marshals
		b = append(append(b, s...), ',')
	}
	if e.Revision != 0 {
		b = append(strconv.AppendInt(append(b, `"revision":`...), e.Revision, 10), ',')
	}
	b = append(b, `"device":{"registrationId":"`...)
	b = append(b, e.Device.RegistrationID...) // Check let only letters, digits and -._: through
	b = append(b, `","group":"`...)
	b = append(b, e.Device.Group...)
	if e.Device.KeyHash != "" {
		b = append(b, `","keyHash":"`...)
		b = append(b, e.Device.KeyHash...)
	}
	return append(b, "\"}}\n"...)
}

// flush compresses the chunk being filled into the spool, and seals its keys.
func (w *Writer) flush() error {
	if w.lines == 0 {
		return nil
	}
	h := sha256.New()
	h.Write(w.content[:])
	h.Write(w.plain)
	h.Sum(w.content[:0])
	w.packed = w.zstd.EncodeAll(w.plain, w.packed[:0])
	if err := w.put(&w.manifest.Entries, entryChunkName(len(w.manifest.Entries)), w.packed, w.lines); err != nil {
		return err
	}
	w.plain, w.lines = w.plain[:0], 0
	if w.sealedN == 0 {
		return nil
	}
	var buf bytes.Buffer
	enc, err := age.Encrypt(&buf, w.cfg.Recipients...)
	if err != nil {
		return fmt.Errorf("sealing keys: %w", err)
	}
	if _, err := enc.Write(w.sealed); err != nil {
		return fmt.Errorf("sealing keys: %w", err)
	}
	if err := enc.Close(); err != nil {
		return fmt.Errorf("sealing keys: %w", err)
	}
	clear(w.sealed)
	w.manifest.Counts.Sealed += w.sealedN
	err = w.put(&w.manifest.Sealed, sealedChunkName(len(w.manifest.Entries)-1), buf.Bytes(), w.sealedN)
	w.sealed, w.sealedN = w.sealed[:0], 0
	return err
}

func (w *Writer) put(list *[]Chunk, name string, b []byte, count int64) error {
	if len(b) > maxChunk || len(*list) == maxChunks {
		return fmt.Errorf("bundle member %s is too large", name)
	}
	if _, err := w.spool.Write(b); err != nil {
		return writing(w.cfg.Path, err)
	}
	sum := sha256.Sum256(b)
	c := Chunk{Name: name, Size: int64(len(b)), SHA256: hex.EncodeToString(sum[:]), Count: count}
	*list, w.order = append(*list, c), append(w.order, c)
	return nil
}

// SetCheckpoint puts the ledger's signed checkpoint into the bundle.
func (w *Writer) SetCheckpoint(signed []byte) { w.check = bytes.Clone(signed) }

// SetGrant puts the signed order or lease that all units of the bundle were made on into it.
func (w *Writer) SetGrant(document []byte) {
	w.grant = bytes.Clone(bytes.TrimSuffix(document, []byte("\n")))
}

// Abort gives the bundle up. After Close it does nothing.
func (w *Writer) Abort() {
	if !w.done {
		w.done = true
		clear(w.sealed)
		_ = w.spool.Close()
		_ = w.zstd.Close()
	}
}

// Close signs the manifest and puts the bundle in place: assembled beside it, flushed, renamed, the directory flushed. A
// crash before the rename leaves what was there; after it, the whole bundle.
func (w *Writer) Close() (_ Summary, err error) {
	var none Summary
	if w.done {
		return none, errors.New("bundle is closed already")
	}
	defer w.Abort()
	if err := w.flush(); err != nil {
		return none, err
	}
	m := &w.manifest
	if len(w.check) > 0 {
		if len(w.check) > maxCheckpoint {
			return none, fmt.Errorf("checkpoint of %d octets", len(w.check))
		}
		sum := sha256.Sum256(w.check)
		m.Checkpoint = &Chunk{Name: checkpointName, Size: int64(len(w.check)), SHA256: hex.EncodeToString(sum[:]), Count: 1}
	}
	if len(w.grant) > 0 {
		id, err := grantID(w.grant)
		if err != nil {
			return none, err
		}
		if len(w.grant) > maxGrant {
			return none, fmt.Errorf("grant %s has %d octets", id, len(w.grant))
		}
		sum := sha256.Sum256(w.grant)
		m.Grant = &Grant{id, Chunk{Name: grantName, Size: int64(len(w.grant)), SHA256: hex.EncodeToString(sum[:]), Count: 1}}
	}
	m.ID = hex.EncodeToString(w.content[:])
	raw, err := json.Marshal(m)
	if err != nil {
		return none, err
	}
	manifest, err := jcs.Transform(raw)
	if err != nil {
		return none, err
	}
	if len(manifest) > maxManifest {
		return none, errors.New("bundle is too large: its manifest would not be read")
	}
	signature, err := signed.Sign(w.cfg.Signer, payloadType, manifest)
	if err != nil {
		return none, fmt.Errorf("bundle: %w", err)
	}

	out, err := os.CreateTemp(filepath.Dir(w.cfg.Path), "."+filepath.Base(w.cfg.Path)+".*")
	if err != nil {
		return none, writing(w.cfg.Path, err)
	}
	defer func() {
		if err != nil {
			_ = out.Close()
			_ = os.Remove(out.Name())
		}
	}()
	if err := w.assemble(out, manifest, signature); err != nil {
		return none, writing(w.cfg.Path, err)
	}
	size, err := out.Seek(0, io.SeekCurrent)
	if err != nil {
		return none, err
	}
	if err := errors.Join(out.Chmod(0o644), out.Sync(), out.Close()); err != nil {
		return none, writing(w.cfg.Path, err)
	}
	if w.cfg.Overwrite {
		err = os.Rename(out.Name(), w.cfg.Path)
	} else if err = os.Link(out.Name(), w.cfg.Path); err == nil {
		err = os.Remove(out.Name())
	}
	if err != nil {
		return none, writing(w.cfg.Path, err)
	}
	dir, err := os.Open(filepath.Dir(w.cfg.Path))
	if err != nil {
		return none, err
	}
	if err := errors.Join(dir.Sync(), dir.Close()); err != nil {
		return none, err
	}
	id, err := signed.KeyID(w.cfg.Signer.Public())
	sum := m.summary(id)
	sum.Size = size
	return sum, err
}

func (w *Writer) assemble(out io.Writer, manifest, signature []byte) error {
	created := w.cfg.Created.UTC().Truncate(time.Second)
	t := tar.NewWriter(out)
	member := func(name string, size int64, r io.Reader) error {
		if err := t.WriteHeader(header(name, size, created)); err != nil {
			return err
		}
		_, err := io.CopyN(t, r, size)
		return err
	}
	if err := member(manifestName, int64(len(manifest)), bytes.NewReader(manifest)); err != nil {
		return err
	}
	if err := member(signatureName, int64(len(signature)), bytes.NewReader(signature)); err != nil {
		return err
	}
	if w.manifest.Grant != nil {
		if err := member(grantName, int64(len(w.grant)), bytes.NewReader(w.grant)); err != nil {
			return err
		}
	}
	var offset int64
	for _, c := range w.order {
		if err := member(c.Name, c.Size, io.NewSectionReader(w.spool, offset, c.Size)); err != nil {
			return err
		}
		offset += c.Size
	}
	if w.manifest.Checkpoint != nil {
		if err := member(checkpointName, int64(len(w.check)), bytes.NewReader(w.check)); err != nil {
			return err
		}
	}
	return t.Close()
}
