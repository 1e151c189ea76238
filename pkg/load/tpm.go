package load

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/device"
)

// maxTPMs bounds software TPMs: to make one takes a good part of a second.
const maxTPMs = 50

// restTPM is how long a TPM rests: to register takes it three or four requests, and a device has one a second by default.
const restTPM = 4 * time.Second

// TPM makes devices with software TPMs, fifty at most. Enroll tells the service of one's endorsement key, a TPM2B_PUBLIC. All share
// one storage root key, which the service does not look at.
func TPM(idScope string, weight int, enroll func(id string, ek []byte) error) Attestation {
	srk := sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })
	soft := func(id string) (device.Config, *device.SoftTPM, error) {
		c := device.Config{Stamp: device.Stamp{IDScope: idScope, RegistrationID: id, TPM: true}}
		key, err := srk()
		if err != nil {
			return c, nil, err
		}
		t, err := device.NewSoftTPM(nil, key)
		c.TPM = t
		return c, t, err
	}
	return Attestation{Name: "tpm", Weight: weight, Max: maxTPMs, Rest: restTPM, Protocols: []string{"https", "amqp", "amqp-ws"},
		Device: func(id string) (device.Config, error) {
			c, t, err := soft(id)
			if err != nil {
				return c, err
			}
			ek, _, err := t.Keys(context.Background())
			if err != nil {
				return c, err
			}
			return c, enroll(id, ek)
		},
		Forge: func(id string) (device.Config, error) {
			c, _, err := soft(id)
			return c, err
		},
	}
}
