package hsm

import (
	"context"
	"errors"
	"fmt"
)

var (
	// ErrCounter says that a counter does not stand where the caller took it to be. The [CounterError] that it comes with says
	// where it does.
	ErrCounter = errors.New("counter stands elsewhere")
	// ErrClaimed says that somebody else holds a counter. The [ClaimedError] that it comes with says who.
	ErrClaimed = errors.New("counter is held by another")
)

// A CounterStore is a store with counters that only go up. Who keeps files beside it (a ledger, say) writes the counter's value
// into them and moves the counter with each of their states: a copy of the files, or an older state of them, then shows,
// because the counter did not go back with them.
//
// PKCS#11 tokens and TPMs are such stores. Key files are not: whoever can copy the ledger can copy them with it.
//
// What a counter is worth differs. A TPM's never goes back, whoever commands it, and one that is deleted and made anew begins
// above everything that was. A PKCS#11 token knows no counters: there it is kept in private objects, so that whoever has the
// user PIN and writes a program for it can put it back; who has copies of files alone cannot.
type CounterStore interface {
	// CreateCounter makes a counter. Its first value is any number, and not only for those that were made before. The error is
	// ErrExists when the name is taken, ErrFull when there is no room, ErrUnsupported when this token cannot keep one. Of several who
	// create one name at once at most one is told that it did.
	CreateCounter(ctx context.Context, name string) (Counter, error)
	// OpenCounter finds a counter by name. The error is ErrNotFound when there is none.
	OpenCounter(ctx context.Context, name string) (Counter, error)
	// DeleteCounter destroys a counter, readable or not. The error is ErrNotFound when there is none, ErrClaimed when a process
	// that may still run holds it.
	DeleteCounter(ctx context.Context, name string) error
	// Counters returns the names of all counters, sorted.
	Counters(ctx context.Context) ([]string, error)
}

// A Counter is one counter of a store. It may be used by many goroutines, and many processes may open one counter.
type Counter interface {
	// Name is the counter's name: 1 to 32 characters of ASCII letters, digits and "-._:", see [ValidCounterName].
	Name() string
	// Value returns the number that the counter stands at. Values that Increment returned are never taken back, here or after any
	// crash. A value that is read while somebody else is in Increment may be one that this somebody is then refused.
	Value(ctx context.Context) (uint64, error)
	// Increment moves the counter from one value to the next, which it returns, and proves that nobody else moved it: of several
	// who increment from the same value at most one succeeds, in one process, in several or on several machines. The error is
	// ErrCounter, with the value found, when the counter stood elsewhere before or stands elsewhere after; it may then have moved by
	// one for each who tried. The error is ErrClaimed when somebody else holds the counter, or took this claim over.
	//
	// ErrLost, or a crash in the middle, leaves it unknown whether the counter moved: it then stands at from or at from+1.
	// A caller writes down what it means to do before, and takes either value for its own afterwards.
	Increment(ctx context.Context, from uint64) (uint64, error)

	// Claim takes the counter for this process and says who owns it: 1 to 64 printable ASCII characters, a station's name for
	// instance. The error is ErrClaimed while another holds it, in this process or any other, be it with copies of the same files;
	// of several who claim it at once at most one gets it. A claim whose process was one of this machine and has ended
	// is taken over without asking (see [Claim.Ended]); any other stays until it is released or taken over by [Counter.TakeOver].
	//
	// release gives the counter back, before the store is closed. It may be called again when it failed. The error is ErrClaimed
	// when the claim was taken over meanwhile.
	Claim(ctx context.Context, owner string) (release func() error, err error)
	// Holder returns the claim on the counter. The error is ErrNotFound when nobody holds it.
	Holder(ctx context.Context) (Claim, error)
	// TakeOver ends a claim that Holder returned, because a person knows that its process is gone for good; should it live on, its
	// next Increment is refused. The counter is free afterwards. The error is ErrNotFound when that claim is not there any more,
	// ErrClaimed when its process runs on this machine.
	TakeOver(ctx context.Context, c Claim) error
}

// A MarkedCounter keeps a mark with its value: what the caller means by it. It tells two who each went on from the same value apart,
// one of whom only believes that the counter was moved for it. PKCS#11 tokens have them; the counters of TPMs are numbers and no
// more.
type MarkedCounter interface {
	Counter
	// IncrementMarked is Increment, and has the next value keep a mark: at most 128 printable ASCII characters.
	IncrementMarked(ctx context.Context, from uint64, mark string) (uint64, error)
	// Mark returns the mark of the value that the counter stands at; empty for one that has none.
	Mark(ctx context.Context) (string, error)
}

// MaxMark bounds a mark.
const MaxMark = 128

// ValidCounterName reports whether a counter may be called that.
func ValidCounterName(name string) bool { return ValidName(name) && len(name) <= 32 }

// CheckCounterName returns an error that says what is wrong with a counter's name.
func CheckCounterName(name string) error {
	if !ValidCounterName(name) {
		return fmt.Errorf("counter name %q: want 1 to 32 letters, digits or -._: characters", name)
	}
	return nil
}

// A CounterError says where a counter stands. It is an ErrCounter.
type CounterError struct {
	Name string
	// From is where the caller took the counter to be, Found where it stands. They are the same when somebody else was
	// moving it at the same time and was refused, too.
	From, Found uint64
}

func (e *CounterError) Error() string {
	if e.From == e.Found {
		return fmt.Sprintf("counter %q: somebody else was moving it from %d at the same time", e.Name, e.From)
	}
	return fmt.Sprintf("counter %q stands at %d, not at %d", e.Name, e.Found, e.From)
}

// Unwrap returns ErrCounter.
func (e *CounterError) Unwrap() error { return ErrCounter }

// A ClaimedError says who holds a counter. It is an ErrClaimed.
type ClaimedError struct {
	Name string
	// Claim is the other's; the zero value when this caller's claim was taken over and nobody holds the counter now.
	Claim Claim
}

func (e *ClaimedError) Error() string {
	if e.Claim.ID == "" {
		return fmt.Sprintf("counter %q: the claim on it was taken over", e.Name)
	}
	return fmt.Sprintf("counter %q is held by %s", e.Name, e.Claim)
}

// Unwrap returns ErrClaimed.
func (e *ClaimedError) Unwrap() error { return ErrClaimed }
