package dps

import "strconv"

// A Reply is an answer to a device as it goes on the wire: what is the same through every door.
type Reply struct {
	// Status is as in HTTP.
	Status int
	// RetryAfter is the hint, in seconds; empty for none.
	RetryAfter string
	// Body is a JSON object.
	Body []byte
}

// NewReply renders what a registrar answered. An *OperationStatus is 202 with a hint until it is terminal, and anything
// else 200; an error is its document, with a hint where the device may come back: 429 and 5xx, and no other (device API,
// sections 6.2, 6.3 and 17).
func NewReply(answer any, err error) Reply {
	if err == nil {
		r := Reply{Status: 200}
		if st, ok := answer.(*OperationStatus); ok && !st.Status.Terminal() {
			r.Status, r.RetryAfter = 202, hint(st.RetryAfter)
		}
		if r.Body, err = Marshal(answer); err == nil {
			return r
		}
	}
	e := AsError(err)
	r := Reply{Status: e.Code.Status()}
	if r.Status == 429 || r.Status >= 500 {
		r.RetryAfter = hint(e.RetryAfter)
	}
	if r.Body, err = Marshal(e); err != nil {
		r.Body = []byte(`{"errorCode":500000,"message":"Internal error"}`) // cannot be: an error is strings and a number
	}
	return r
}

func hint(s string) string {
	switch s {
	case "":
		return strconv.Itoa(RetryAfter)
	case NoRetryAfter:
		return ""
	}
	return s
}
