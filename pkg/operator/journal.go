package operator

import (
	"crypto/hmac"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// A Journal is a small file that remembers how far an import of a file came: how many of its rows are decided, a hash of them, and at
// which service. It holds no secret. An import that was cut off passes over these rows if the file begins with the same ones; without a
// journal it would compare them all again.
type Journal struct {
	path    string
	state   journalState
	Counts  Counts // of the rows that an earlier import decided
	written time.Time
}

type journalState struct {
	Version int    `json:"version"`
	Host    string `json:"host"`
	Mode    string `json:"mode"` // what the import does with what exists
	Digest  string `json:"digest"`
	Counts  Counts `json:"counts"`
}

// ErrOtherFile says that a journal is of a file that began differently.
var ErrOtherFile = errors.New("the file does not begin with the rows that an earlier import of it did")

// maxJournal bounds the file.
const maxJournal = 4 << 10

// OpenJournal reads a journal. One that is not there, of another service or another mode, or not readable, is an empty one.
func OpenJournal(path, host, mode string) (*Journal, error) {
	j := &Journal{path: path, state: journalState{Version: 1, Host: host, Mode: mode}}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return j, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, maxJournal)
	n, _ := f.Read(b)
	var was journalState
	if json.Unmarshal(b[:n], &was) == nil && was.Version == 1 && was.Host == host && was.Mode == mode && was.Counts.Rows > 0 {
		j.state, j.Counts = was, was.Counts
	}
	return j, nil
}

func (j *Journal) matches(digest []byte) bool {
	return hmac.Equal([]byte(j.state.Digest), []byte(hex.EncodeToString(digest)))
}

// save remembers, a few times a second at most: what is not remembered is compared again, which is right too.
func (j *Journal) save(c Counts, digest []byte) error {
	j.state.Counts, j.state.Digest = c, hex.EncodeToString(digest)
	if time.Since(j.written) < 200*time.Millisecond {
		return nil
	}
	j.written = time.Now()
	return j.Flush()
}

// Flush writes what is remembered.
func (j *Journal) Flush() error {
	if j.state.Counts.Rows == 0 {
		return nil
	}
	b, err := json.Marshal(j.state)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(j.path), "."+filepath.Base(j.path)+".*")
	if err != nil {
		return fmt.Errorf("remembering how far the import came: %w", err)
	}
	_, err = tmp.Write(append(b, '\n'))
	if err = errors.Join(err, tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), j.path)
	}
	if err != nil {
		_ = os.Remove(tmp.Name())
		return fmt.Errorf("remembering how far the import came: %w", err)
	}
	return nil
}

// Remove takes the journal away once the import is through.
func (j *Journal) Remove() error {
	if err := os.Remove(j.path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
