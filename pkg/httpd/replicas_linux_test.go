package httpd_test

import (
	"testing"

	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// What devices read of three replicas on one database is what they read of one service.
func TestReplicas(t *testing.T) {
	t.Parallel()
	registrationtest.DoorsOfReplicas(t, serve)
}
