// Package bundle writes, opens and verifies the one file that leaves the factory.
//
// A bundle is a plain tar. Its members stand in this order:
//
//	manifest.json               canonical JSON (RFC 8785): what the bundle is, and every other member with its SHA-256
//	manifest.dsse.json          DSSE envelope over the manifest, signed by the station key
//	grant.dsse.json             the signed order or lease that its units were made on, if there is one
//	entries/000000.jsonl.zst    a chunk of entries, JSON Lines under zstd
//	sealed/000000.jsonl.age     the keys of its individual symmetric-key enrollments, JSON Lines under age, if it has any
//	…                           and so on, chunk by chunk
//	checkpoint.txt              the ledger's signed checkpoint, if there is one
//
// The signature covers the manifest and the manifest covers the rest, so a reader that has the first members verifies
// every further one as it streams by, each before it is parsed, in memory that does not grow with the bundle. [Open] gives
// verified entries and nothing else; there is no way to the rest, but for [Describe], which says so.
//
// [Writer] keeps memory flat too: chunks wait in a file beside the destination, which [Writer.Close] assembles, flushes and
// renames into place. It holds nothing secret that is not sealed.
//
// Writers and readers serve one goroutine at a time.
package bundle

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/touchmark/touchmark/hsm/signed"
)

// Errors that callers branch on.
var (
	// ErrCorrupt says that the bundle is not what was signed: changed, cut off, or added to.
	ErrCorrupt = errors.New("bundle is damaged")
	// ErrSealed says that entries carry keys which no given identity opens.
	ErrSealed = errors.New("bundle's keys are sealed to somebody else")
)

const (
	payloadType    = "application/vnd.touchmark.manifest+json"
	formatVersion  = 2
	manifestName   = "manifest.json"
	signatureName  = "manifest.dsse.json"
	grantName      = "grant.dsse.json"
	checkpointName = "checkpoint.txt"
)

// Limits. A bundle past them is refused; a Writer stays inside.
const (
	maxManifest   = 16 << 20 // chunk lists of a hundred million entries
	maxCheckpoint = 64 << 10
	maxGrant      = 64 << 20 // an order with a list of a million serials
	maxChunk      = 8 << 20  // compressed or sealed
	maxPlain      = 16 << 20 // decompressed or opened
	maxLine       = 1 << 20
	maxChunks     = 100_000
	chunkEntries  = 2000
	chunkPlain    = 4 << 20
	maxInfo       = 64
	maxName       = 128
	maxReason     = 1000
)

// Manifest is what a bundle says of itself.
type Manifest struct {
	Version int    `json:"version"`
	ID      string `json:"id"` // hex SHA-256 over the content: two bundles of one content have one ID
	Created string `json:"created"`
	IDScope string `json:"idScope"`
	Counts  Counts `json:"counts"`
	// Entries and Sealed list the chunks in their order. A sealed chunk has the number of the chunk of entries before it.
	Entries    []Chunk           `json:"entries"`
	Sealed     []Chunk           `json:"sealed,omitempty"`
	Grant      *Grant            `json:"grant,omitempty"`
	Checkpoint *Chunk            `json:"checkpoint,omitempty"`
	Info       map[string]string `json:"info,omitempty"`
}

// Counts says how many entries of each kind there are, and how many of them have a sealed key, evidence, or a revision.
type Counts struct {
	Individual int64 `json:"individual"`
	Group      int64 `json:"group"`
	Device     int64 `json:"device"`
	Retired    int64 `json:"retired,omitempty"`
	Sealed     int64 `json:"sealed"`
	Evidence   int64 `json:"evidence,omitempty"` // entries with evidence of where their key lives
	Revised    int64 `json:"revised,omitempty"`  // enrollments and devices of a revision above 0
}

// Total returns how many entries there are.
func (c Counts) Total() int64 { return c.Individual + c.Group + c.Device + c.Retired }

// add counts an entry in. Sealed keys are counted where they are.
func (c *Counts) add(e *Entry) {
	if e.Evidence != nil {
		c.Evidence++
	}
	if e.Revision > 0 && e.Retired == nil {
		c.Revised++
	}
	switch {
	case e.Group != nil:
		c.Group++
	case e.Device != nil:
		c.Device++
	case e.Retired != nil:
		c.Retired++
	default:
		c.Individual++
	}
}

// A Grant is the member that holds the order or lease that a bundle's units were made on, all of them on that one.
type Grant struct {
	ID string `json:"id"` // as the document says
	Chunk
}

// A Chunk is one member of the tar.
type Chunk struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"` // hex
	Count  int64  `json:"count"`  // lines in it
}

// Summary is what a verified or finished bundle amounts to.
type Summary struct {
	ID      string `json:"id"`
	IDScope string `json:"idScope"`
	Created string `json:"created"`
	Entries int64  `json:"entries"`
	Counts  Counts `json:"counts"`
	Grant   string `json:"grant,omitempty"` // ID of the order or lease
	KeyID   string `json:"keyId"`           // of the station that signed
	Size    int64  `json:"size,omitempty"`
}

func (m *Manifest) summary(keyID string) Summary {
	s := Summary{ID: m.ID, IDScope: m.IDScope, Created: m.Created, Entries: m.Counts.Total(), Counts: m.Counts, KeyID: keyID}
	if m.Grant != nil {
		s.Grant = m.Grant.ID
	}
	return s
}

// grantID returns what an order or a lease calls itself. It verifies nothing of it: package order does.
func grantID(document []byte) (string, error) {
	e, err := signed.Parse(document)
	if err != nil {
		return "", fmt.Errorf("grant: %w", err)
	}
	var g struct {
		ID string `json:"id"`
	}
	if err := json.Unmarshal(e.Unverified(), &g); err != nil || g.ID == "" || len(g.ID) > maxName {
		return "", errors.New("grant: it is no order and no lease")
	}
	return g.ID, nil
}

func entryChunkName(n int) string  { return fmt.Sprintf("entries/%06d.jsonl.zst", n) }
func sealedChunkName(n int) string { return fmt.Sprintf("sealed/%06d.jsonl.age", n) }

// header returns the one tar header that a member of that name and size has.
func header(name string, size int64, created time.Time) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: created, Format: tar.FormatUSTAR}
}
