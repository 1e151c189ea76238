package serviceapi

import "github.com/touchmark/touchmark/pkg/access"

// A Route is a call of the API as tests see it.
type Route struct {
	Method, Pattern string
	Right           access.Right
}

// Routes are all of them.
func Routes() (all []Route) {
	for _, r := range routes {
		all = append(all, Route{r.method, r.pattern, r.right})
	}
	return all
}
