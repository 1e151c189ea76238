package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/tpm"
	"github.com/touchmark/touchmark/pkg/device"
	"github.com/touchmark/touchmark/pkg/dps"
)

type registerOptions struct {
	stamp, endpoint, protocol, ca, tpm string
}

func newRegister(a *app) *cobra.Command {
	o := &registerOptions{}
	c := &cobra.Command{
		Use:   "register --stamp DIR",
		Short: "Register as a stamped device would at its first power-on",
		Long: `register reads a device's stamp, proves to the registration service that it is that device, and keeps the hub that it was
assigned in assignment.json beside the stamp.`,
		Example: `  touchmark register --stamp stamps/pump-0001
  touchmark register --stamp stamps/pump-0001 --protocol mqtt --endpoint localhost:8883 --ca service/ca.pem
  touchmark register --stamp stamps/pump-0002 --tpm tpm:?device=/dev/tpmrm0`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.runRegister(cmd.Context(), o) },
	}
	f := c.Flags()
	f.StringVar(&o.stamp, "stamp", "", "the device's directory (required)")
	f.StringVar(&o.endpoint, "endpoint", "", "HOST:PORT, instead of the stamped global endpoint")
	f.StringVar(&o.protocol, "protocol", "https", "https, mqtt or amqp")
	f.StringVar(&o.ca, "ca", "", "PEM file with the CA of the service's certificate (default: the system's)")
	f.StringVar(&o.tpm, "tpm", "", "key URI of the TPM of a device that attests by it (default: $TOUCHMARK_TPM, else "+tpm.DefaultDevice+")")
	_ = c.MarkFlagRequired("stamp")
	_ = c.MarkFlagDirname("stamp")
	_ = c.RegisterFlagCompletionFunc("protocol", cobra.FixedCompletions([]string{"https", "mqtt", "amqp"}, cobra.ShellCompDirectiveNoFileComp))
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
	} else if err := a.table(nil, [][]string{
		{"Registration ID", state.RegistrationID},
		{"Status", string(state.Status)},
		{"Assigned hub", state.AssignedHub},
		{"Device ID", state.DeviceID},
	}); err != nil {
		return err
	}
	return notAssigned(state)
}

func notAssigned(state *dps.RegistrationState) error {
	if state.Status != dps.Assigned {
		return refusedError{fmt.Errorf("the registration is %s: %d %s", state.Status, state.ErrorCode, state.ErrorMessage)}
	}
	return nil
}

// registerStamp registers the device of a stamp, as it would itself.
func (a *app) registerStamp(ctx context.Context, o *registerOptions) (_ *dps.RegistrationState, err error) {
	if o.protocol != "https" && o.protocol != "mqtt" && o.protocol != "amqp" {
		return nil, usageError{fmt.Errorf("--protocol %s: want https, mqtt or amqp", o.protocol)}
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
	if errors.As(err, &refused) {
		return nil, hint(err, "the service does not know the device with this proof: was its bundle imported there, and is the stamp that of the last minting?")
	}
	if err != nil {
		return nil, connectHint(err)
	}
	return state, nil
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
