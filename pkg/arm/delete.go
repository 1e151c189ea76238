package arm

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/access"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// deletePrefix and erasePrefix begin the ID of an operation; the ID scope follows. So any replica can say how far it is.
const (
	deletePrefix = "delete-"
	erasePrefix  = "erase-"
)

// delete deletes a service with all that is kept of it. Nobody is let in when the answer goes out.
func (c *call) delete(sc *registration.Scope) (*answer, error) {
	if dps.Fold(sc.ID) == dps.Fold(c.cfg.First) {
		return nil, conflict("The process stands on this provisioning service: it goes with its data directory. POST …/erase empties it (touchmark scope erase).")
	}
	if err := registration.CloseScope(c.r.Context(), c.store, sc.ID, c.by, c.cfg.First, c.cfg.Now()); err != nil {
		return nil, err
	}
	return c.begun(deletePrefix, sc)
}

// erase deletes all that is kept of a service's devices, and has the service go on without: a call of ours. Nobody is let in until it
// has.
func (c *call) erase(sc *registration.Scope) (*answer, error) {
	if err := c.method(http.MethodPost); err != nil {
		return nil, err
	}
	if sc.Deleting && sc.Erasing == nil {
		return nil, busy(sc)
	}
	if err := registration.BeginErasure(c.r.Context(), c.store, sc.ID, c.by, c.cfg.Now()); err != nil {
		return nil, err
	}
	return c.begun(erasePrefix, sc)
}

// busy refuses to change a service that is being deleted, or erased.
func busy(sc *registration.Scope) error {
	if sc.Erasing != nil {
		return conflict("The provisioning service is being erased.")
	}
	return conflict("The provisioning service is being deleted.")
}

// begun waits for a while for the end of what was begun.
func (c *call) begun(operation string, sc *registration.Scope) (*answer, error) {
	done := c.end(sc.ID)
	if c.cfg.DeleteWait > 0 {
		wait := time.NewTimer(c.cfg.DeleteWait)
		defer wait.Stop()
		select {
		case <-done:
		case <-wait.C:
		}
	}
	if running, err := c.goesOn(sc); err != nil || !running {
		return &answer{http.StatusNoContent, nil}, err
	}
	return c.running(operation, sc), nil
}

// running answers 202, and where to ask how it goes on.
func (c *call) running(operation string, sc *registration.Scope) *answer {
	id := operation + sc.ID
	c.w.Header().Set("Azure-AsyncOperation", c.link(serviceID(sc)+"/operationResults/"+id, url.Values{"asyncinfo": {""}}))
	c.w.Header().Set("Location", c.link("/subscriptions/"+sc.Subscription+"/providers/Microsoft.Devices/locations/"+plain(sc.Location+"global")+"/provisioningServiceOperationResults/"+id, url.Values{}))
	c.w.Header().Set("Retry-After", strconv.Itoa(dps.RetryAfter))
	return &answer{http.StatusAccepted, nil}
}

// goesOn reports whether something of a service is still to be erased: of one that is deleted its name is the last to go.
func (c *call) goesOn(sc *registration.Scope) (bool, error) {
	now, err := c.find(sc.Name)
	return err == nil && now != nil && dps.Fold(now.ID) == dps.Fold(sc.ID) && now.Deleting, err
}

// operationResult says how far a deletion or an erasure is, and has it go on: as a document to those who ask with asyncinfo, and as a
// status to others.
func (c *call) operationResult(operation string) (*answer, error) {
	if err := c.method(http.MethodGet); err != nil {
		return nil, err
	}
	unknown := nothing("The operation")
	prefix := deletePrefix
	id, known := strings.CutPrefix(operation, deletePrefix)
	if !known {
		prefix = erasePrefix
		id, known = strings.CutPrefix(operation, erasePrefix)
	}
	if !known || dps.CheckIDScope(id) != nil {
		return nil, unknown
	}
	var sc *registration.Scope
	err := c.store.View(c.r.Context(), func(tx registration.Tx) (err error) {
		sc, err = tx.Scope(dps.Fold(id))
		return err
	})
	if errors.Is(err, registration.ErrNotFound) ||
		err == nil && (!sc.Deleting && (prefix == deletePrefix || sc.Erased.IsZero()) || !strings.EqualFold(sc.Subscription, c.sub)) {
		err = unknown
	}
	if err != nil {
		return nil, err
	}
	if err := c.may(sc.Name, access.ManagementRead); err != nil {
		return nil, err
	}
	running, err := c.goesOn(sc)
	if running { // the replica that began it may be gone; of two that are at it each finds less to do
		c.end(sc.ID)
	}
	switch {
	case err != nil:
		return nil, err
	case c.r.URL.Query().Has("asyncinfo") && running:
		c.w.Header().Set("Retry-After", strconv.Itoa(dps.RetryAfter))
		return ok(map[string]any{"status": "Running", "error": nil}), nil
	case c.r.URL.Query().Has("asyncinfo"):
		return ok(map[string]any{"status": "Succeeded", "error": nil}), nil
	case running:
		return c.running(prefix, sc), nil
	}
	return &answer{http.StatusNoContent, nil}, nil
}

// end removes what is kept of a scope that was closed, in the background; done is closed when it has, or the server stops.
func (s *Server) end(id string) (done <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	folded := dps.Fold(id)
	if ch := s.erasing[folded]; ch != nil {
		return ch
	}
	ch := make(chan struct{})
	s.erasing[folded] = ch
	s.erasers.Go(func() {
		defer func() {
			s.mu.Lock()
			delete(s.erasing, folded)
			s.mu.Unlock()
			close(ch)
		}()
		for {
			gone, err := registration.EndErasure(s.ctx, s.store, id, s.cfg.Now())
			if err == nil {
				if gone {
					s.cfg.Scopes.Forget(id)
				}
				s.cfg.Log.Info("provisioning service erased", "idScope", id, "deleted", gone)
				return
			}
			if s.ctx.Err() != nil {
				return // Resume takes it up at the next start
			}
			s.cfg.Log.Error("erasing a provisioning service, to be tried again", "idScope", id, "cause", err)
			select {
			case <-s.ctx.Done():
				return
			case <-time.After(eraseAgain):
			}
		}
	})
	return ch
}

// Resume takes up the deletions and erasures that an earlier process did not end.
func (s *Server) Resume(ctx context.Context) error {
	for after, more := "", true; more; {
		err := s.store.View(ctx, func(tx registration.Tx) error {
			all, err := tx.Scopes(after, pageSize)
			more = len(all) == pageSize
			for _, sc := range all {
				if after = dps.Fold(sc.ID); sc.Deleting {
					s.end(sc.ID)
				}
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Wait waits for what goes on in the background, which ends with the context of New. No request may come any more.
func (s *Server) Wait() { s.erasers.Wait() }
