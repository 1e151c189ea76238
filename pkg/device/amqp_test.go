package device

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"net"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/amqpd"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// blobRegistrar has a blob for one TPM.
type blobRegistrar struct {
	registration.Registrar
	ek, srk, blob []byte
}

func (r *blobRegistrar) Challenge(_ context.Context, req *registration.Request) ([]byte, error) {
	if !bytes.Equal(req.Proof.TPM.EK, r.ek) || !bytes.Equal(req.Proof.TPM.SRK, r.srk) {
		return nil, dps.NewError(dps.CodeUnauthorized, "Unauthorized", nil)
	}
	return r.blob, nil
}

// A conversation on a connection of any kind, opened with a TPM; and messages larger than a frame.
func TestAMQP(t *testing.T) {
	f := registrationtest.NewFixture(t, "hub-a.example.net")
	r := &blobRegistrar{Registrar: f.Service, ek: bytes.Repeat([]byte{1, 0}, 158), srk: bytes.Repeat([]byte{0, 2}, 142), blob: bytes.Repeat([]byte("blob"), 205)}
	l := f.Listen(t, func(ctx context.Context, l net.Listener, cert func(*tls.ClientHelloInfo) (*tls.Certificate, error)) error {
		return door.New(door.Config{TLS: door.TLSConfig(cert)}).Serve(ctx, l, amqpd.New(amqpd.Config{Registrar: r, Now: f.Now, ResponseDelay: -1}).Handle)
	})
	cfg := &Config{Stamp: Stamp{IDScope: registrationtest.Scope, RegistrationID: "own-key"}}
	tpm := &saslTPM{EK: r.ek, SRK: r.srk, Activate: func(_ context.Context, blob []byte) (string, error) {
		if !bytes.Equal(blob, r.blob) {
			return "", errors.New("the TPM does not take the blob")
		}
		return f.ByKey("own-key", f.OwnKey).Token, nil
	}}
	talk, err := openAMQP(t.Context(), l.Dial(t, nil), cfg, registrationtest.Host, "", tpm)
	if err != nil {
		t.Fatal(err)
	}
	defer talk.close()
	for _, payload := range []string{"", strings.Repeat("x", 60_000), strings.Repeat("x", 70_000)} {
		body, _ := json.Marshal(dps.RegisterRequest{RegistrationID: "own-key", Payload: json.RawMessage(`"` + payload + `"`)})
		st, _, err := talk.register(t.Context(), body)
		var refused *RefusedError
		if len(payload) > registration.MaxBody {
			if !errors.As(err, &refused) || refused.Code != dps.CodeTooLarge {
				t.Errorf("too large: %+v, %v", st, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if st, _, err = talk.status(t.Context(), st.OperationID); err != nil || st.Status != dps.Assigned {
			t.Errorf("%+v, %v", st, err)
		}
	}
	for why, x := range map[string]*saslTPM{"another TPM": {EK: r.srk, SRK: r.srk, Activate: tpm.Activate}, "no token": {EK: r.ek, SRK: r.srk, Activate: func(context.Context, []byte) (string, error) { return "x", nil }}} {
		var refused *RefusedError
		if _, err := openAMQP(t.Context(), l.Dial(t, nil), cfg, registrationtest.Host, "", x); !errors.As(err, &refused) || refused.Code != dps.CodeUnauthorized {
			t.Errorf("%s: %v", why, err)
		}
	}
}
