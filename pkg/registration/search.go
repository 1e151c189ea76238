package registration

import (
	"context"
	"crypto/sha256"
	"errors"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/semaphore"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
)

// A token does not name its group: where the device is not known, each group's key has to be tried. That is work that
// anybody can ask for, so it is done beside the store and all locks, by half of the machine at most.

// A search is what judge returns, as an error, when a group has to be looked for among many. [Service.judging] does it.
type search struct {
	groups *keyedGroups
	token  *attest.Token
	id     string
	wrong  [32]byte
}

// Error says that a search is needed.
func (*search) Error() string { return "the group has to be looked for" }

// Unwrap is what it means to whoever cannot search.
func (w *search) Unwrap() error { return overloaded(nil) }

// A searched is what came of a search.
type searched struct {
	group    *cachedGroup // nil: none, at this revision
	revision int64
}

// A searcher does the searches of a scope.
type searcher struct {
	cores  *semaphore.Weighted // who waits longest is next
	asking atomic.Int64        // searches under way and waiting
	wrong  wrongTokens
}

func searchCores() int { return max(1, runtime.GOMAXPROCS(0)/2) }

func newSearcher() *searcher {
	return &searcher{cores: semaphore.NewWeighted(int64(searchCores()))}
}

// judging runs f in a View, with the request to judge, unless IP rules keep its caller out. Where a group has to be looked for, it is done between two Views.
func (s *Service) judging(ctx context.Context, req *Request, f func(Tx, *Request) error) error {
	r := *req
	for range 10 {
		err := s.cfg.Store.View(ctx, func(tx Tx) error {
			if err := s.filter(tx, req); err != nil {
				return err
			}
			return f(tx, &r)
		})
		var want *search
		if !errors.As(err, &want) {
			return err
		}
		if r.searched, err = s.searcher.search(ctx, want); err != nil {
			return err
		}
	}
	return overloaded(errors.New("the groups kept changing"))
}

func overloaded(cause error) error {
	return dps.NewError(dps.CodeServiceOverloaded, "Try again later", cause)
}

// search tries the keys of all groups, in the order of their IDs, on as many cores as are free. The first that fits counts.
func (s *searcher) search(ctx context.Context, want *search) (*searched, error) {
	defer s.asking.Add(-1)
	if s.asking.Add(1) > maxSearches {
		return nil, overloaded(errors.New("too many devices wait for their group to be looked for"))
	}
	if err := s.cores.Acquire(ctx, 1); err != nil {
		return nil, overloaded(err)
	}
	groups := want.groups.all
	var next, hit atomic.Int64 // the chunk to take next, the lowest index that fits
	hit.Store(int64(len(groups)))
	work := func() {
		defer s.cores.Release(1)
		trial := want.token.Trial(want.id)
		for ctx.Err() == nil {
			from := (next.Add(1) - 1) * searchChunk
			if from >= hit.Load() { // chunks are taken in order: whatever comes before is tried, or being tried
				return
			}
			for i := from; i < min(from+searchChunk, int64(len(groups))); i++ {
				if groups[i].signed(trial) >= 0 {
					for old := hit.Load(); i < old && !hit.CompareAndSwap(old, i); old = hit.Load() {
					}
					break
				}
			}
		}
	}
	var wg sync.WaitGroup
	for more := len(groups) / searchChunk; more > 1 && s.cores.TryAcquire(1); more-- {
		wg.Go(work)
	}
	work()
	wg.Wait()
	if ctx.Err() != nil {
		return nil, overloaded(ctx.Err())
	}
	found := &searched{revision: want.groups.revision}
	if i := hit.Load(); i < int64(len(groups)) {
		found.group = groups[i]
	} else {
		s.wrong.add(found.revision, want.wrong)
	}
	return found, nil
}

// signed returns below which of the group's keys a device's token was signed, -1 for none; there may be no group.
func (g *cachedGroup) signed(t *attest.Trial) int {
	if g == nil {
		return -1
	}
	return slices.IndexFunc(g.keys, t.Signed)
}

// wrongTokens remembers tokens that no group's key signed, with the ID that they came with: a device with a wrong key
// retries for ever, and is searched for once while the groups stay as they are.
type wrongTokens struct {
	mu       sync.Mutex
	revision int64
	tokens   map[[32]byte]struct{}
}

func wrongToken(req *Request) [32]byte {
	return sha256.Sum256([]byte(req.RegistrationID + "\x00" + req.Proof.Token))
}

func (w *wrongTokens) add(revision int64, token [32]byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.revision != revision {
		w.revision = revision
		clear(w.tokens)
	}
	put(&w.tokens, maxWrong, token, struct{}{})
}

func (w *wrongTokens) has(revision int64, token [32]byte) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, ok := w.tokens[token]
	return ok && w.revision == revision
}
