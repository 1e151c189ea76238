// Package exchange reads HTTP requests and writes answers as the device API and the service API both have them: paths in
// segments, bodies with a bound, JSON with its length, errors as documents. A function may be used by many goroutines, each with
// its own request.
package exchange

import (
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/touchmark/touchmark/pkg/dps"
)

const maxSegments = 6

// Segments returns the path of a request in its segments, decoded once. It is split before: an encoded slash is part of an ID and
// not a separator. A slash at the end does not count, and a "+" is a "+".
func Segments(r *http.Request) ([]string, error) {
	path := strings.TrimSuffix(strings.TrimPrefix(r.URL.EscapedPath(), "/"), "/")
	segments := strings.Split(path, "/")
	if len(segments) > maxSegments {
		return nil, NotFound()
	}
	for i, seg := range segments {
		decoded, err := url.PathUnescape(seg)
		if err != nil {
			return nil, dps.NewError(dps.CodeBadRequest, "The path is not properly encoded", err)
		}
		segments[i] = decoded
	}
	return segments, nil
}

// NotFound says that a path leads nowhere.
func NotFound() *dps.Error {
	return dps.NewError(dps.CodeNotFound, "There is nothing at this path", nil)
}

// NotAllowed says which methods a path takes.
func NotAllowed(w http.ResponseWriter, methods ...string) *dps.Error {
	w.Header().Set("Allow", strings.Join(methods, ", "))
	return dps.NewError(dps.CodeMethodNotAllowed, "Method not allowed", nil)
}

// Body reads a request's body, bounded in size; the server bounds its time.
func Body(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	if r.ContentLength == 0 {
		return nil, nil
	}
	if r.ContentLength > limit {
		return nil, dps.NewError(dps.CodeTooLarge, "Request body is too large", nil)
	}
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return nil, dps.NewError(dps.CodeTooLarge, "Request body is too large", nil)
	}
	if err != nil {
		return nil, dps.NewError(dps.CodeBadRequest, "Request body cannot be read", err)
	}
	return b, nil
}

// Write writes a JSON answer with its length: some clients cannot read chunks. An answer without a request ID gets one.
func Write(w http.ResponseWriter, status int, body []byte) {
	h := w.Header()
	h.Set("Content-Type", "application/json; charset=utf-8")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	if h.Get("X-Ms-Request-Id") == "" {
		h.Set("X-Ms-Request-Id", dps.NewUUID())
	}
	w.WriteHeader(status)
	_, _ = w.Write(body) // the caller may be gone
}

// Fail writes an error document. There is no WWW-Authenticate: HTTP stacks would act on it. What is our own fault is logged.
func Fail(w http.ResponseWriter, r *http.Request, log *slog.Logger, err error) {
	e := dps.AsError(err)
	p := dps.NewReply(nil, e)
	if p.RetryAfter != "" {
		w.Header().Set("Retry-After", p.RetryAfter)
	}
	if p.Status >= 500 {
		log.Error("internal error", "path", r.URL.Path, "trackingId", e.TrackingID, "cause", e.Error(), "remote", r.RemoteAddr)
	}
	w.Header().Set("X-Ms-Request-Id", e.TrackingID)
	w.Header().Set("X-Ms-Error-Code", strconv.Itoa(int(e.Code)))
	Write(w, p.Status, p.Body)
}
