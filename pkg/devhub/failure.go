package devhub

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// A failure is a refusal as IoT Hub has it: a name, a number that begins with the HTTP status, and a message that is safe to
// show (service API, section 5.5).
type failure struct {
	name    string
	number  int
	message string
	// structured has the body carry number and all as JSON inside of its Message, as IoT Hub does for methods.
	structured bool
}

func (f *failure) Error() string { return fmt.Sprintf("%s: %s", f.name, f.message) }

func (f *failure) status() int { return f.number / 1000 }

// The failures, by the names that IoT Hub has for them.
func badArgument(format string, args ...any) *failure {
	return &failure{name: "ArgumentInvalid", number: 400004, message: fmt.Sprintf(format, args...)}
}

func badJSON(err error) *failure {
	return &failure{name: "IotHubFormatError", number: 400006, message: "The body is not valid: " + err.Error()}
}

func badVersion() *failure {
	return &failure{name: "InvalidProtocolVersion", number: 400001, message: "api-version is missing or not known"}
}

func unauthorized() *failure {
	return &failure{name: "IotHubUnauthorizedAccess", number: 401002, message: "Unauthorized"}
}

func notFound(id string) *failure {
	return &failure{name: "DeviceNotFound", number: 404001, message: fmt.Sprintf("Device %s not registered", id)}
}

func exists(id string) *failure {
	return &failure{name: "DeviceAlreadyExists", number: 409001, message: fmt.Sprintf("A device with ID '%s' is already registered", id)}
}

func stale() *failure {
	return &failure{name: "PreconditionFailed", number: 412001, message: "Precondition failed: the ETag does not match"}
}

func tooMany(n int) *failure {
	return &failure{name: "TooManyDevices", number: 413002, message: fmt.Sprintf("This hub takes no more than %d devices", n)}
}

func tooLarge(n int) *failure {
	return &failure{name: "MessageTooLarge", number: 413001, message: fmt.Sprintf("More than %d octets", n)}
}

func queueFull() *failure {
	return &failure{name: "DeviceMaximumQueueDepthExceeded", number: 403004, message: fmt.Sprintf("%d messages wait for the device already, or too many for all", maxQueue)}
}

const internalError = 500001

// asFailure returns err as a failure. What is none is ours to answer for, and its text stays here.
func asFailure(err error) *failure {
	var f *failure
	if errors.As(err, &f) {
		return f
	}
	return &failure{name: "ServerError", number: internalError, message: "An internal error occurred"}
}

// body is the failure's document. The message has no semicolon: SDKs take it apart there.
func (f *failure) body(now time.Time) []byte {
	tracking := dps.NewUUID()
	doc := struct {
		Message          string `json:"Message"`
		ExceptionMessage string `json:"ExceptionMessage"`
	}{fmt.Sprintf("ErrorCode:%s;%s", f.name, f.message), fmt.Sprintf("Tracking ID:%s-TimeStamp:%s", tracking, now.Format("01/02/2006 15:04:05"))}
	if f.structured {
		inner, err := json.Marshal(map[string]any{"errorCode": f.number, "trackingId": tracking, "message": f.message, "timestampUtc": dps.Time{Time: now}})
		if err == nil {
			doc.Message, doc.ExceptionMessage = string(inner), ""
		}
	}
	b, err := dps.Marshal(doc)
	if err != nil {
		return []byte(`{}`)
	}
	return b
}

// write answers a REST caller.
func (f *failure) write(w http.ResponseWriter, now time.Time) {
	w.Header().Set("Iothub-Errorcode", f.name)
	answer(w, f.status(), f.body(now))
}
