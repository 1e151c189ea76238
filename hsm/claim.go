package hsm

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A Claim says which process holds a counter. It is kept in the store itself, in its JSON form, and is no secret.
type Claim struct {
	// ID tells this claim from every other: 32 lower-case hexadecimal digits.
	ID string `json:"id"`
	// Owner is what the holder calls itself, Host the name of its machine.
	Owner string `json:"owner"`
	Host  string `json:"host"`
	// Boot is the machine's boot ID and Space its PID namespace. Where they cannot be learnt they are empty, and whether the process
	// has ended is nobody's to tell.
	Boot  string `json:"boot,omitempty"`
	Space string `json:"space,omitempty"`
	// PID is the process, Started when it started, in the kernel's ticks since the boot.
	PID     int    `json:"pid"`
	Started uint64 `json:"started,omitempty"`
	// Since is when the claim was made, by the holder's clock, in whole seconds of UTC.
	Since time.Time `json:"since"`
}

// maxClaim bounds a claim in its JSON form, in octets.
const maxClaim = 1024

// NewClaim makes a claim of this process. The owner has 1 to 64 printable ASCII characters.
func NewClaim(owner string) (Claim, error) {
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return Claim{}, err
	}
	host, err := os.Hostname()
	if err != nil || !plain(host, 255) {
		host = "unknown"
	}
	c := Claim{ID: hex.EncodeToString(id), Owner: owner, Host: host, PID: os.Getpid(), Since: time.Now().UTC().Truncate(time.Second)}
	// A /proc that shows another PID namespace than ours says nothing about our processes.
	if self, err := os.Readlink("/proc/self"); err == nil && self == strconv.Itoa(c.PID) {
		boot, berr := os.ReadFile("/proc/sys/kernel/random/boot_id")
		space, serr := os.Readlink("/proc/self/ns/pid")
		_, started, perr := processState(c.PID)
		if berr == nil && serr == nil && perr == nil {
			c.Boot, c.Space, c.Started = strings.TrimSpace(string(boot)), space, started
		}
	}
	return c, c.Check()
}

// ParseClaim parses a claim's JSON form, of which it takes one only.
func ParseClaim(b []byte) (Claim, error) {
	var c Claim
	if len(b) > maxClaim {
		return c, fmt.Errorf("a claim of %d octets: want at most %d", len(b), maxClaim)
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return Claim{}, fmt.Errorf("a claim that does not parse: %w", err)
	}
	if again, err := json.Marshal(c); err != nil || !bytes.Equal(again, b) {
		return Claim{}, errors.New("a claim that is not in its one form")
	}
	return c, c.Check()
}

// Check returns an error that says what is wrong with a claim, which may be untrusted.
func (c Claim) Check() error {
	id, err := hex.DecodeString(c.ID)
	switch {
	case err != nil || len(id) != 16 || hex.EncodeToString(id) != c.ID:
		return errors.New("claim: its ID wants 32 lower-case hexadecimal digits")
	case !plain(c.Owner, 64):
		return errors.New("claim: its owner wants 1 to 64 printable ASCII characters")
	case !plain(c.Host, 255), c.Boot != "" && !plain(c.Boot, 64), c.Space != "" && !plain(c.Space, 64):
		return errors.New("claim: it names no machine")
	case c.PID < 1 || c.PID > 1<<31-1:
		return errors.New("claim: it names no process")
	case c.Since.IsZero(), c.Since.Location() != time.UTC, c.Since.Nanosecond() != 0:
		return errors.New("claim: its time is not in whole seconds of UTC")
	}
	return nil
}

// plain reports whether s is printable ASCII of at most that length, and something.
func plain(s string, most int) bool {
	return s != "" && len(s) <= most && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })
}

// String says who holds it, for a person.
func (c Claim) String() string {
	return fmt.Sprintf("%q (host %s, process %d, since %s)", c.Owner, c.Host, c.PID, c.Since.Format(time.RFC3339))
}

// SameMachine reports whether the two claims were made in one PID namespace of one machine since it started. A copy of that
// machine started at another time, and so did the machine itself after its power was lost.
func (c Claim) SameMachine(d Claim) bool {
	return c.Boot != "" && c.Space != "" && c.Host == d.Host && c.Boot == d.Boot && c.Space == d.Space
}

// Ended reports that the claim's process ran on this machine and has ended. False means that it runs or that this cannot be
// told: it runs elsewhere, or ran before this machine was started.
func (c Claim) Ended() bool {
	known, runs := c.runs()
	return known && !runs
}

// Running reports that the claim's process runs on this machine. False means that it has ended or that this cannot be told.
func (c Claim) Running() bool {
	known, runs := c.runs()
	return known && runs
}

func (c Claim) runs() (known, runs bool) {
	here, err := NewClaim("here")
	if err != nil || !c.SameMachine(here) {
		return false, false
	}
	// The kernel is asked by signal 0: a /proc that hides others' processes would make them look ended.
	p, err := os.FindProcess(c.PID)
	if err != nil {
		return errors.Is(err, os.ErrProcessDone) || errors.Is(err, syscall.ESRCH), false
	}
	defer func() { _ = p.Release() }()
	if err := p.Signal(syscall.Signal(0)); errors.Is(err, os.ErrProcessDone) || errors.Is(err, syscall.ESRCH) {
		return true, false
	}
	state, started, err := processState(c.PID)
	if err != nil {
		return false, false
	}
	return true, started == c.Started && state != "Z" && state != "X" // one that waits for its parent has ended (proc(5))
}

// processState reads a process's state and when it started (proc(5), /proc/PID/stat, fields 3 and 22).
func processState(pid int) (state string, started uint64, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return "", 0, err
	}
	// The program's name before is in parentheses and may hold anything, parentheses too.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 20 {
		return "", 0, errors.New("process state is not as proc(5) has it")
	}
	started, err = strconv.ParseUint(f[19], 10, 64)
	return f[0], started, err
}
