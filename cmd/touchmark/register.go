package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/coder/websocket"
	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/tpm"
	"github.com/touchmark/touchmark/pkg/amqp"
	"github.com/touchmark/touchmark/pkg/device"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/mqtt"
)

type registerOptions struct {
	stamp, endpoint, protocol, ca, tpm string
	csrKey                             string
}

func newRegister(a *app) *cobra.Command {
	o := &registerOptions{}
	c := &cobra.Command{
		Use:   "register --stamp DIR",
		Short: "Register as a stamped device would at its first power-on",
		Long: `register reads a device's stamp, proves to the registration service that it is that device, and keeps the hub that it was
assigned in assignment.json beside the stamp.

With --csr-key it asks for an operational certificate, too, and keeps it with its chain in operational.pem beside the stamp: behind
its key, where that is new, and without it, where the key has a URI. To renew the certificate, register again.`,
		Example: `  touchmark register --stamp stamps/pump-0001
  touchmark register --stamp stamps/pump-0001 --protocol mqtt --endpoint localhost:8883 --ca service/ca.pem
  touchmark register --stamp stamps/pump-0001 --csr-key new
  touchmark register --stamp stamps/pump-0002 --tpm tpm:?device=/dev/tpmrm0`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.runRegister(cmd.Context(), o) },
	}
	f := c.Flags()
	f.StringVar(&o.stamp, "stamp", "", "the device's directory (required)")
	f.StringVar(&o.endpoint, "endpoint", "", "HOST:PORT, instead of the stamped global endpoint")
	f.StringVar(&o.protocol, "protocol", "https", strings.Join(device.Protocols(), ", "))
	f.StringVar(&o.ca, "ca", "", "PEM file with the CA of the service's certificate (default: the system's)")
	f.StringVar(&o.csrKey, "csr-key", "", "ask for an operational certificate, for the key of a key URI, which is made if there is none, or for a new one; again to renew it")
	f.StringVar(&o.tpm, "tpm", "", "key URI of the TPM of a device that attests by it (default: $TOUCHMARK_TPM, else "+tpm.DefaultDevice+")")
	_ = c.MarkFlagRequired("stamp")
	_ = c.MarkFlagDirname("stamp")
	_ = c.RegisterFlagCompletionFunc("protocol", cobra.FixedCompletions(device.Protocols(), cobra.ShellCompDirectiveNoFileComp))
	return c
}

func (a *app) runRegister(ctx context.Context, o *registerOptions) error {
	state, err := a.registerStamp(ctx, o)
	if err != nil {
		return err
	}
	if state.Status == dps.Assigned {
		if err := device.SaveAssignment(o.stamp, state); err != nil {
			return err
		}
	}
	if a.json {
		if err := a.printJSON(state); err != nil {
			return err
		}
	} else if err := a.table(nil, slices.DeleteFunc([][]string{
		{"Registration ID", state.RegistrationID},
		{"Status", string(state.Status)},
		{"Assigned hub", state.AssignedHub},
		{"Device ID", state.DeviceID},
	}, func(row []string) bool { return row[1] == "" })); err != nil {
		return err
	}
	return notAssigned(state)
}

func notAssigned(state *dps.RegistrationState) error {
	if state.Status == dps.Assigned {
		return nil
	}
	text := fmt.Sprintf("the registration is %s", state.Status)
	if state.ErrorCode != 0 || state.ErrorMessage != "" {
		text += fmt.Sprintf(": %d %s", state.ErrorCode, state.ErrorMessage)
	}
	err := refusedError{errors.New(text)}
	if strings.Contains(state.ErrorMessage, "issuance is not configured") {
		return hint(err, "the enrollment names no issuer: touchmark help issuers")
	}
	return err
}

// registerStamp registers the device of a stamp, as it would itself.
func (a *app) registerStamp(ctx context.Context, o *registerOptions) (_ *dps.RegistrationState, err error) {
	if !slices.Contains(device.Protocols(), o.protocol) {
		return nil, usageError{fmt.Errorf("--protocol %s: want %s", o.protocol, strings.Join(device.Protocols(), ", "))}
	}
	if o.endpoint != "" {
		if _, _, err := net.SplitHostPort(o.endpoint); err != nil {
			return nil, usageError{fmt.Errorf("--endpoint %s: want HOST:PORT", o.endpoint)}
		}
	}
	roots, err := loadRoots(o.ca)
	if err != nil {
		return nil, err
	}
	stamp, err := device.LoadStamp(o.stamp)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, usageError{err}
	}
	if err != nil {
		return nil, err
	}
	cfg := device.Config{Stamp: stamp, Endpoint: o.endpoint, Protocol: o.protocol, RootCAs: roots}
	if stamp.KeyURI != "" {
		var key hsm.Key
		var closeStore func() error
		if key, closeStore, err = a.openKeyURI(ctx, stamp.KeyURI, o.stamp); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, closeStore()) }()
		if stamp.Symmetric {
			cfg.MAC, err = hsm.MACKeyOf(key)
		} else {
			cfg.Signer, err = hsm.SigningKeyOf(key)
		}
		if err != nil {
			return nil, err
		}
	}
	keep := func(*dps.RegistrationState) error { return nil }
	if o.csrKey != "" {
		var closeKey func() error
		keep, closeKey, err = a.askCertificate(ctx, o, &cfg)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, closeKey()) }()
	}
	var state *dps.RegistrationState
	if stamp.TPM {
		err = a.withTPM(ctx, &tpmOptions{uri: o.tpm}, func(s *tpm.Store) error {
			cfg.TPM = s.Identity()
			state, err = device.Register(ctx, cfg)
			return err
		})
	} else {
		state, err = device.Register(ctx, cfg)
	}
	var refused *device.RefusedError
	if errors.As(err, &refused) && o.csrKey != "" && refused.Code.Status() == 400 {
		return nil, hint(err, "the service certifies no key that another device has or had, and none of a kind that its issuer does not take")
	}
	if errors.As(err, &refused) && refused.Code.Status() == 404 {
		return nil, hint(err, "the service forgot the operation: register again")
	}
	if errors.As(err, &refused) {
		return nil, hint(err, "the service does not know the device with this proof: was its bundle imported there, and is the stamp that of the last minting? touchmark diagnose tells its operator why")
	}
	if err != nil {
		return nil, portHint(err, o.protocol)
	}
	return state, keep(state)
}

// portHint asks for the port where the other side speaks something else than the device, or ends.
func portHint(err error, protocol string) error {
	var record tls.RecordHeaderError
	var closed websocket.CloseError
	other := errors.As(err, &record) || errors.As(err, &closed) || strings.Contains(err.Error(), "malformed HTTP") // which net/http has no error for
	for _, is := range []error{device.ErrAnswer, mqtt.ErrMalformed, amqp.ErrMalformed, amqp.ErrHeader, io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE} {
		other = other || errors.Is(err, is)
	}
	if other {
		return hint(err, "is that the port of %s? What answers there speaks something else, or ended", protocol)
	}
	return connectHint(err)
}

// askCertificate has a registration ask for an operational certificate. Keep checks what came and keeps it; the state is
// without it then.
func (a *app) askCertificate(ctx context.Context, o *registerOptions, cfg *device.Config) (keep func(*dps.RegistrationState) error, closeKey func() error, err error) {
	closeKey = func() error { return nil }
	var fresh, key crypto.Signer
	if o.csrKey == "new" {
		if fresh, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return nil, nil, err
		}
		key = fresh
	} else if key, closeKey, err = a.openOrMakeKey(ctx, o.csrKey); err != nil {
		return nil, nil, err
	}
	if cfg.CSR, err = device.NewCSR(cfg.Stamp.RegistrationID, key); err != nil {
		return nil, nil, errors.Join(err, closeKey())
	}
	return func(state *dps.RegistrationState) error {
		if state.Status != dps.Assigned {
			return nil
		}
		chain, err := device.CheckChain(state, key.Public(), time.Now())
		if err != nil {
			return err
		}
		state.IssuedCertificateChain = nil
		return device.SaveOperational(o.stamp, chain, fresh)
	}, closeKey, nil
}

// wantObject is how a key URI names a key.
const wantObject = "want one, as file:DIR?object=NAME or pkcs11:token=…;object=NAME"

// openOrMakeKey opens the key that a URI names, or makes it there.
func (a *app) openOrMakeKey(ctx context.Context, raw string) (_ crypto.Signer, _ func() error, err error) {
	uri, err := hsm.ParseURI(raw)
	if err == nil && uri.Object == "" {
		err = errors.New("the key URI names a store, and no key in it: " + wantObject)
	}
	if err != nil {
		return nil, nil, usageError{fmt.Errorf("--csr-key: %w", err)}
	}
	wd, err := os.Getwd()
	if err != nil {
		return nil, nil, err
	}
	store, err := a.openStore(ctx, raw, wd)
	if err != nil {
		return nil, nil, err
	}
	key, err := store.Open(ctx, uri.Object)
	if errors.Is(err, hsm.ErrNotFound) {
		key, err = store.Generate(ctx, hsm.Spec{Name: uri.Object, Algorithm: hsm.ECP256})
	}
	var signer hsm.SigningKey
	if err == nil {
		signer, err = hsm.SigningKeyOf(key)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("operational key: %w", errors.Join(err, store.Close()))
	}
	return signer, store.Close, nil
}

// openKeyURI opens the one key that a URI names.
func (a *app) openKeyURI(ctx context.Context, raw, base string) (hsm.Key, func() error, error) {
	uri, err := hsm.ParseURI(raw)
	if err != nil {
		return nil, nil, err
	}
	store, err := a.openStore(ctx, raw, base)
	if err != nil {
		return nil, nil, err
	}
	key, err := store.Open(ctx, uri.Object)
	if err != nil {
		return nil, nil, errors.Join(err, store.Close())
	}
	return key, store.Close, nil
}
