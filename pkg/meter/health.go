package meter

import (
	"context"
	"encoding/json"
	"net/http"
	"sync"
	"time"
)

// Alive answers that the process is there; for /healthz.
func Alive() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { reply(w, http.StatusOK, map[string]any{"alive": true}) })
}

// Readiness says whether a service can take work: /readyz. It is asked often, and by strangers too, so parts are checked once a
// second at most.
type Readiness struct {
	// Parts each return why they cannot work, or nil.
	Parts map[string]func(context.Context) error
	// Stopping ends when no more work is taken: what balances load sends it elsewhere while the rest is answered. Nil is never.
	Stopping <-chan struct{}

	mu    sync.Mutex
	until time.Time
	known map[string]string
	ok    bool
}

const checkTime = 2 * time.Second

// Handler answers 200 or 503, with details, or without them where strangers ask.
func (r *Readiness) Handler(details bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		ok, parts := r.check(req.Context())
		status := http.StatusOK
		if !ok {
			status = http.StatusServiceUnavailable
		}
		body := map[string]any{"ready": ok}
		if details {
			body["parts"] = parts
		}
		reply(w, status, body)
	})
}

func (r *Readiness) check(ctx context.Context) (bool, map[string]string) {
	select {
	case <-r.Stopping:
		return false, map[string]string{"service": "is stopping"}
	default:
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := time.Now(); now.Before(r.until) {
		return r.ok, r.known
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), checkTime) // who hangs up must not make the next one's answer
	defer cancel()
	r.known, r.ok = make(map[string]string), true
	for name, part := range r.Parts {
		r.known[name] = "ok"
		if err := part(ctx); err != nil {
			r.known[name], r.ok = err.Error(), false
		}
	}
	r.until = time.Now().Add(time.Second)
	return r.ok, r.known
}

func reply(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // who asked may be gone
}
