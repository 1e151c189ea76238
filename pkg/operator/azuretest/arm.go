package azuretest

import "net/http"

// management is the state of the management API.
type management struct{}

func (s *Server) arm(http.Header, *http.Request, []byte) (any, error) {
	return nil, refuse(404000, "Not found")
}
