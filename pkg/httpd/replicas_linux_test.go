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
	fresh := registrationtest.Replicas(sqlstoretest.Start(t))
	registrationtest.Doors(t, fresh, serve)
	t.Run("TPM", func(t *testing.T) {
		var doors []*service
		for _, r := range fresh(t, "hub-a.example.net").Replicas() {
			doors = append(doors, open(t, r))
		}
		tpmChallenge(t, doors...)
	})
}
