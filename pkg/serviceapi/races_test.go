package serviceapi_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/touchmark/touchmark/pkg/registration"
)

const writers = 64

// Of writers with one tag exactly one is let through, of creators and of deleters too.
func TestOneWinner(t *testing.T) {
	_, o := newOperator(t)
	var statuses sync.Map
	race := func(want map[int]int, call func(n int) (*http.Response, []byte)) {
		t.Helper()
		statuses.Clear()
		var wg sync.WaitGroup
		for n := range writers {
			wg.Go(func() {
				res, _ := call(n)
				statuses.Store(n, res.StatusCode)
			})
		}
		wg.Wait()
		got := map[int]int{}
		statuses.Range(func(_, status any) bool { got[status.(int)]++; return true })
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%v, not %v", got, want)
		}
	}
	body := func(n int) string { return ofDevice("w", fmt.Sprintf(`"deviceId":"d-%d",`, n)+newKeys) }
	for range 5 {
		race(map[int]int{200: 1, 409: writers - 1}, func(n int) (*http.Response, []byte) { return o.call(t, "PUT", "/enrollments/w", body(n)) })
		for range 3 {
			tag := fmt.Sprint(o.want(t, 200, 0, "GET", "/enrollments/w", "")["etag"])
			race(map[int]int{200: 1, 412: writers - 1}, func(n int) (*http.Response, []byte) {
				return o.call(t, "PUT", "/enrollments/w", body(n), "If-Match: "+tag)
			})
		}
		tag := fmt.Sprint(o.want(t, 200, 0, "GET", "/enrollments/w", "")["etag"])
		race(map[int]int{204: 1, 404: writers - 1}, func(n int) (*http.Response, []byte) {
			if n%2 == 0 {
				return o.call(t, "DELETE", "/enrollments/w", "", "If-Match: "+tag)
			}
			return o.call(t, "DELETE", "/enrollments/w", "")
		})
	}
}

// Writers that read, add and write under the tag that they read lose nothing: what was acknowledged follows each other without a
// gap, in the document, and in the audit record as in the answers.
func TestWriters(t *testing.T) {
	_, o := newOperator(t)
	const each = 2
	body := func(n int) string {
		return ofDevice("w", fmt.Sprintf(`"initialTwin":{"tags":{"n":%d}},"attestation":{"type":"symmetricKey"}`, n))
	}
	type doc struct {
		ETag        string
		InitialTwin struct{ Tags struct{ N int } }
	}
	read := func(b []byte) (d doc) {
		if err := json.Unmarshal(b, &d); err != nil {
			t.Error(err)
		}
		return d
	}
	o.want(t, 200, 0, "PUT", "/enrollments/w", body(0))
	var follows sync.Map // the tag that an acknowledged write took the place of, and its own
	var tries atomic.Int64
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for done := 0; done < each && tries.Add(1) < 1_000_000; {
				_, b := o.call(t, "GET", "/enrollments/w", "")
				was := read(b)
				res, b := o.call(t, "PUT", "/enrollments/w", body(was.InitialTwin.Tags.N+1), "If-Match: "+was.ETag)
				switch res.StatusCode {
				case http.StatusOK:
					if is := read(b); is.InitialTwin.Tags.N != was.InitialTwin.Tags.N+1 {
						t.Errorf("the answer to write %d is write %d", was.InitialTwin.Tags.N+1, is.InitialTwin.Tags.N)
					} else if _, twice := follows.LoadOrStore(was.ETag, is.ETag); twice {
						t.Errorf("two writes were acknowledged under %s", was.ETag)
					}
					done++
				case http.StatusPreconditionFailed:
				default:
					t.Errorf("%d %s", res.StatusCode, b)
					return
				}
			}
		})
	}
	wg.Wait()
	_, b := o.call(t, "GET", "/enrollments/w", "")
	if is := read(b); is.InitialTwin.Tags.N != writers*each {
		t.Errorf("%d writes of %d are there", is.InitialTwin.Tags.N, writers*each)
	}
	_, b = o.call(t, "GET", "/touchmark/audit", "", "X-Ms-Max-Item-Count: 1000")
	var all []registration.Audit
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatal(err)
	}
	next := make(map[string]string)
	first := ""
	for _, a := range all {
		switch {
		case a.Object != "enrollment/w":
		case a.Action == "create":
			first = a.After
		case next[a.Before] != "":
			t.Error("two changes of the same content")
		default:
			next[a.Before] = a.After
		}
	}
	length := 0
	for at := first; next[at] != ""; at = next[at] {
		length++
	}
	if length != writers*each {
		t.Errorf("the audit record has a chain of %d changes, of %d", length, writers*each)
	}
}

// Policies, too: one change after the other, and never more of them than there may be.
func TestPolicyRaces(t *testing.T) {
	_, o := newOperator(t)
	var made atomic.Int64
	var wg sync.WaitGroup
	for n := range 130 {
		wg.Go(func() {
			if res, b := o.call(t, "PUT", fmt.Sprint("/touchmark/policies/p", n), `{"rights":"EnrollmentRead"}`); res.StatusCode == 200 {
				made.Add(1)
			} else if res.StatusCode != 400 {
				t.Errorf("%d %s", res.StatusCode, b)
			}
		})
	}
	wg.Wait()
	if made.Load() != 99 { // and the owner's
		t.Errorf("%d policies were made", made.Load())
	}
}
