package httpd_test

import (
	"testing"

	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/sqlstore/sqlstoretest"
)

// What devices read of three replicas on one database is what they read of one service. DPS-D 51: a TPM proves itself at another one
// than challenged it.
func TestReplicas(t *testing.T) {
	t.Parallel()
	server := sqlstoretest.Start(t)
	registrationtest.DoorsOfReplicas(t, server, serve)
	t.Run("TPM", func(t *testing.T) {
		var doors []*service
		for _, r := range registrationtest.NewReplicas(t, server, "hub-a.example.net").Replicas() {
			doors = append(doors, open(t, r))
		}
		tpmChallenge(t, doors...)
	})
}
