package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/touchmark/touchmark/pkg/hub/hubtest"
)

// Issue 6, done when 2: a device that registers at the service may connect to the broker that it is assigned, and publish; one that
// did not is refused, and so is one whose enrollment is there but that has not registered.
func TestMosquittoFromEndToEnd(t *testing.T) {
	t.Parallel()
	m := hubtest.StartMosquitto(t)
	dir := t.TempDir()
	ready, _ := startService(t, dir, "127.0.0.1:0", "127.0.0.1:0", "off")
	do := func(args ...string) {
		t.Helper()
		if code, text := attempt(t, dir, args...); code != 0 {
			t.Fatalf("touchmark %v: exit code %d\n%s", args, code, text)
		}
	}
	linked := m.Linked("localhost")
	if err := os.WriteFile(filepath.Join(dir, "broker.connection"), []byte(linked.ConnectionString), 0o600); err != nil {
		t.Fatal(err)
	}
	do("hub", "link", "--connection-string-file", "broker.connection", "--kind", "mosquitto", "--management", "svc/management.connection")
	enroll := func(id, key string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "key"), []byte(key), 0o600); err != nil {
			t.Fatal(err)
		}
		do("enrollment", "create", id, "--attestation-type", "symmetricKey", "--primary-key-file", "key", "--allocation-policy", "static", "--iot-hubs", linked.Name, "--service", "svc/owner.connection")
	}
	keys := hubtest.Keys()
	enroll("pump-1", keys.PrimaryKey)
	enroll("pump-2", keys.SecondaryKey)
	publish := func(id, key string) error {
		d, err := m.Connect(t, id, key, nil)
		if err != nil {
			return err
		}
		return d.Publish("devices/"+id+"/up", "hello")
	}
	for id, key := range map[string]string{"pump-1": keys.PrimaryKey, "pump-2": keys.SecondaryKey} {
		if publish(id, key) == nil {
			t.Errorf("%s is let in before it has registered", id)
		}
	}
	stamp, err := json.Marshal(map[string]any{"idScope": ready["idScope"], "registrationId": "pump-1", "globalEndpoint": "localhost", "attestation": "symmetricKey", "symmetricKey": keys.PrimaryKey})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "stamp"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "stamp", "provisioning.json"), stamp, 0o600); err != nil {
		t.Fatal(err)
	}
	do("register", "--stamp", "stamp", "--protocol", "mqtt", "--endpoint", ready["mqtt"].(string), "--ca", "svc/ca.pem")
	if err := publish("pump-1", keys.PrimaryKey); err != nil {
		t.Errorf("the device that registered: %v", err)
	}
	if publish("pump-2", keys.SecondaryKey) == nil {
		t.Error("a device that never registered is let in")
	}
}
