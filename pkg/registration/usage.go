package registration

import "time"

// Usage is how often something was asked for in a scope on one day.
type Usage struct {
	Day       string `json:"-"` // "2026-11-21", UTC
	API       string `json:"api"`
	Operation string `json:"operation"`
	// Result is "success", "refused" for 4xx, "throttled" or "error".
	Result string `json:"result"`
	Calls  int64  `json:"calls"`
}

// The APIs that usage tells apart.
const (
	UsageDevice     = "device"
	UsageService    = "service"
	UsageManagement = "management"
	UsageOwn        = "touchmark" // what Azure has not
)

// Billable reports whether Azure bills such calls (service API, section 4.12): every call on enrollments, groups and
// registrations, and a device's registration, but not its polls. Whether Azure bills calls that it refuses is not documented;
// those that were throttled, or failed by the service's own fault, are not reckoned here.
func (u *Usage) Billable() bool {
	if u.Result != "success" && u.Result != "refused" {
		return false
	}
	return u.API == UsageService || u.API == UsageDevice && u.Operation == "register"
}

// DayOf returns the day of a time.
func DayOf(t time.Time) string { return t.UTC().Format(time.DateOnly) }
