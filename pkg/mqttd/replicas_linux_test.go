package mqttd_test

import (
	"testing"

	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/sqlstore/sqlstoretest"
)

// What devices read of three replicas on one database is what they read of one service.
func TestReplicas(t *testing.T) {
	fresh := registrationtest.Replicas(sqlstoretest.Start(t))
	for name, serve := range map[string]registrationtest.Serve{"MQTT": serve, "in WebSockets": serveSocket} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			registrationtest.Doors(t, fresh, serve)
		})
	}
}
