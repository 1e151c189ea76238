package limit_test

import (
	"testing"

	"github.com/touchmark/touchmark/pkg/limit"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/sqlstore/sqlstoretest"
)

// Nor does anybody notice three, each in front of a replica.
func TestUnnoticedAtReplicas(t *testing.T) {
	t.Parallel()
	registrationtest.Doors(t, registrationtest.Replicas(sqlstoretest.Start(t)), unnoticed(limit.Config{PerDevice: 100}))
}
