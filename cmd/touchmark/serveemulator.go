package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/emulate"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/serviceapi"
)

// emulatorOptions are what serve --ephemeral takes beside the rest.
type emulatorOptions struct {
	ephemeral, exposed                 bool
	seed                               string
	enroll, trust, faults              []string
	caOut, connectionOut, deviceCAOut  string
	symmetricStamps, certificateStamps []string

	seeded bool
}

// What an emulator has when nothing is named.
const (
	emulatorHub      = "hub.example.invalid"
	emulatorHTTPS    = "127.0.0.1:443"
	emulatorMQTT     = "127.0.0.1:8883"
	emulatorAMQP     = "127.0.0.1:5671"
	emulatorFree     = "127.0.0.1:0"
	symmetricGroup   = "devices"
	certificateGroup = "devices-x509"
	deviceCAFile     = "device-ca.pem"
	deviceCAKeyFile  = "device-ca.key"
)

// emulatorOnly are the flags that make no sense for a service that is there for good, or would harm it.
var emulatorOnly = []string{"seed", "expose-test-keys", "enroll", "trust", "fault", "ca-out", "connection-out", "device-ca-out", "stamp", "stamp-x509"}

func (o *emulatorOptions) bind(c *cobra.Command) {
	f := c.Flags()
	f.BoolVar(&o.ephemeral, "ephemeral", false, "keep everything in memory: an emulator for tests, gone when it stops (touchmark help emulator)")
	f.StringVar(&o.seed, "seed", "", "with --ephemeral: make ID scope, CA and all keys from this text, the same in every run; for tests only")
	f.BoolVar(&o.exposed, "expose-test-keys", false, "with --seed: listen on other addresses than loopback, though whoever knows the seed has every key")
	f.StringArrayVar(&o.enroll, "enroll", nil, "with --ephemeral: bundle, or JSON file of enrollments and groups, to begin with; again for more")
	f.StringArrayVar(&o.trust, "trust", nil, "with --ephemeral: PEM file with the public key of a station whose bundles count; again for more")
	f.StringArrayVar(&o.faults, "fault", nil, "with --ephemeral: what goes wrong, such as rid=sensor-*,code=429,count=2; again for more (touchmark help emulator)")
	f.StringVar(&o.caOut, "ca-out", "", "with --ephemeral: file for the CA that devices must trust, written anew")
	f.StringVar(&o.connectionOut, "connection-out", "", "with --ephemeral: file for the owner's connection string, written anew")
	f.StringVar(&o.deviceCAOut, "device-ca-out", "", "with --ephemeral: directory for certificate and key of the CA of group "+certificateGroup+", written anew")
	f.StringArrayVar(&o.symmetricStamps, "stamp", nil, "with --ephemeral: directory, named as a registration ID, for the stamp of a device of group "+symmetricGroup+"; again for more")
	f.StringArrayVar(&o.certificateStamps, "stamp-x509", nil, "with --ephemeral: the same for a device of group "+certificateGroup)
	_ = c.MarkFlagDirname("device-ca-out")
	_ = c.MarkFlagDirname("stamp")
	_ = c.MarkFlagDirname("stamp-x509")
	_ = c.RegisterFlagCompletionFunc("fault", completeFault)
	c.MarkFlagsMutuallyExclusive("data", "ephemeral")
	c.MarkFlagsOneRequired("data", "ephemeral")
}

// completeFault completes the key that is being typed.
func completeFault(_ *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
	done := typed[:strings.LastIndexByte(typed, ',')+1]
	var out []string
	for _, k := range emulate.FaultKeys() {
		if strings.HasPrefix(k, typed[len(done):]) && !strings.Contains(","+done, ","+k) {
			out = append(out, done+k)
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}

// checkEmulator is wrong usage that shows before anything is done. It fills in what an emulator has by default.
func (o *serveOptions) checkEmulator(c *cobra.Command) error {
	changed := c.Flags().Changed
	o.seeded = changed("seed")
	if !o.ephemeral {
		for _, name := range emulatorOnly {
			if changed(name) {
				return hint(usageError{fmt.Errorf("--%s is for --ephemeral", name)}, "a service with --data is there for good: it is not played with")
			}
		}
		if o.data == "" {
			return usageError{errors.New("--data wants a directory")}
		}
		return nil
	}
	if o.seeded && o.seed == "" {
		return usageError{errors.New("--seed wants a text")}
	}
	if o.exposed && !o.seeded {
		return usageError{errors.New("--expose-test-keys is for --seed: without it nobody knows the keys")}
	}
	if len(o.enroll) > 0 {
		for name, asked := range map[string]bool{"stamp": len(o.symmetricStamps) > 0, "stamp-x509": len(o.certificateStamps) > 0, "device-ca-out": o.deviceCAOut != ""} {
			if asked {
				return usageError{fmt.Errorf("--%s is for the groups that are there without --enroll", name)}
			}
		}
	}
	for _, dir := range append(append([]string(nil), o.symmetricStamps...), o.certificateStamps...) {
		if err := dps.CheckRegistrationID(filepath.Base(dir)); err != nil {
			return usageError{fmt.Errorf("--stamp %s: its last part is to be the device's registration ID: %w", dir, err)}
		}
	}
	// Who names one door with a port that is free is one of several on this machine: the ports that SDKs have built in are for who
	// names none.
	doors := []struct {
		name, usual string
		at          *string
	}{{"https", emulatorHTTPS, &o.https}, {"mqtt", emulatorMQTT, &o.mqtt}, {"amqp", emulatorAMQP, &o.amqp}}
	free := false
	for _, d := range doors {
		_, port, err := net.SplitHostPort(*d.at)
		free = free || changed(d.name) && err == nil && port == "0"
	}
	for _, d := range doors {
		switch {
		case changed(d.name):
		case free:
			*d.at = emulatorFree
		default:
			*d.at = d.usual
		}
	}
	if !changed("rate-per-device") && !changed("rate-per-address") && !changed("rate-per-scope") {
		o.limits.off = true // a test's device may come as often as the test likes
	}
	if len(o.hubs) == 0 {
		o.hubs = []string{emulatorHub}
	}
	return nil
}

// faultList reads the faults of the command line.
func (o *emulatorOptions) faultList(seed emulate.Seed) (*emulate.Faults, error) {
	list := make([]emulate.Fault, len(o.faults))
	for i, text := range o.faults {
		if err := list[i].UnmarshalText([]byte(text)); err != nil {
			return nil, usageError{fmt.Errorf("--fault: %w", err)}
		}
	}
	faults := emulate.NewFaults(seed)
	if err := faults.Add(list...); err != nil {
		return nil, usageError{fmt.Errorf("--fault: %w", err)}
	}
	return faults, nil
}

// exposes says why a listener must not be opened: under a seed that anybody may know.
func (o *emulatorOptions) exposes(what, address string) error {
	if !o.seeded || o.exposed || address == "off" {
		return nil
	}
	host, _, err := net.SplitHostPort(address)
	if ip := net.ParseIP(host); err != nil || host == "localhost" || ip.IsLoopback() {
		return nil // what is no address is told where it is opened
	}
	return hint(usageError{fmt.Errorf("--%s %s is not loopback, and --seed makes keys that whoever knows its text has", what, address)},
		"leave out --seed, or say --expose-test-keys where nothing but tests can reach it")
}

// inMemory makes what a data directory would hold.
func (o *emulatorOptions) inMemory(d *serviceData) (err error) {
	if o.seeded {
		if d.seed, err = emulate.NewSeed(o.seed); err != nil {
			return err
		}
	}
	for _, f := range o.trust {
		pub, err := readPublicKey(f)
		if err != nil {
			return fmt.Errorf("--trust: %w", err)
		}
		d.stations = append(d.stations, pub)
	}
	return nil
}

// An emulator is what is only in a service that keeps nothing.
type emulator struct {
	o   *serveOptions
	d   *serviceData
	svc *registration.Service

	issuers   []string          // names of the CAs that sign operational certificates
	groupKey  []byte            // of the symmetric-key group that is there by default; nil with --enroll
	deviceCA  *x509.Certificate // of the other one
	deviceKey *ecdsa.PrivateKey
}

// enroll takes what was named, or makes a group for each attestation, so that a device registers without any configuration.
func (e *emulator) enroll(ctx context.Context) error {
	for _, file := range e.o.enroll {
		if err := e.enrollFile(ctx, file); err != nil {
			return fmt.Errorf("--enroll %s: %w", file, err)
		}
	}
	if len(e.o.enroll) > 0 {
		return nil
	}
	var err error
	e.groupKey = e.d.seed.Bytes("group "+symmetricGroup, 64)
	if e.deviceKey, err = e.d.seed.Key("device CA"); err != nil {
		return err
	}
	if e.deviceCA, err = e.d.authority("device CA", "touchmark devices "+e.d.scope, e.deviceKey); err != nil {
		return err
	}
	var policy *dps.ClientCertificateIssuancePolicy
	if names := e.issuers; len(names) == 1 { // which of several is meant nobody said
		policy = &dps.ClientCertificateIssuancePolicy{CertificateAuthorityName: names[0]}
	}
	for _, g := range []dps.EnrollmentGroup{
		{EnrollmentGroupID: symmetricGroup, Enrollment: dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationSymmetricKey, SymmetricKey: &dps.SymmetricKeyAttestation{
			PrimaryKey: base64.StdEncoding.EncodeToString(e.groupKey), SecondaryKey: base64.StdEncoding.EncodeToString(e.d.seed.Bytes("group "+symmetricGroup+", secondary", 64))}}}},
		{EnrollmentGroupID: certificateGroup, Enrollment: dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{
			SigningCertificates: &dps.X509Certificates{Primary: &dps.X509Certificate{Certificate: base64.StdEncoding.EncodeToString(e.deviceCA.Raw)}}}}}},
	} {
		g.ClientCertificateIssuancePolicy = policy
		doc, err := json.Marshal(g)
		if err != nil {
			return err
		}
		if _, err := e.svc.PutEnrollment(ctx, startActor, registration.Group, g.EnrollmentGroupID, doc, ""); err != nil {
			return fmt.Errorf("making group %s: %w", g.EnrollmentGroupID, err)
		}
	}
	return e.writeDevices()
}

func (e *emulator) enrollFile(ctx context.Context, file string) error {
	f, err := openFile(file)
	if err != nil {
		return err
	}
	defer f.Close()
	in := bufio.NewReader(f)
	begin, _ := in.Peek(512) // what cannot be read is told below
	if text := bytes.TrimLeft(begin, " \t\r\n"); len(text) > 0 && text[0] != '{' && text[0] != '[' {
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
		res, err := e.d.takeBundle(ctx, e.svc, f, serviceapi.ImportRequest{By: startActor})
		if err != nil {
			return err
		}
		for _, left := range [][]registration.ImportConflict{res.Conflicts, res.Refusals, res.StaleEntries} {
			if len(left) > 0 {
				return fmt.Errorf("%s is left out: %s", left[0].ID, left[0].Reason)
			}
		}
		return nil
	}
	b, err := io.ReadAll(io.LimitReader(in, emulate.MaxEnrollments+1))
	if err != nil {
		return err
	}
	list, err := emulate.ParseEnrollments(b)
	if err != nil {
		return usageError{err}
	}
	for _, x := range list {
		if _, err := e.svc.PutEnrollment(ctx, startActor, x.Kind, x.ID, x.Document, ""); err != nil {
			return usageError{fmt.Errorf("line %d: %s: %w", x.Line, x.ID, err)}
		}
	}
	return nil
}

// describe adds what a test needs to what the service says when it is ready. Secrets are in it: an emulator's are good for as
// long as it runs, or, under a seed, for nothing but tests, and there is no file to find them in. The table leaves them out.
func (e *emulator) describe(ready map[string]any, owner *registration.Policy, https string) error {
	o, d := e.o, e.d
	ready["ephemeral"], ready["hubs"] = true, o.hubs
	if d.caPEM != nil {
		ready["ca"] = string(d.caPEM)
		if o.caOut != "" {
			if err := writeFile(o.caOut, d.caPEM, 0o644, true); err != nil {
				return err
			}
			ready["caFile"] = o.caOut
		}
	}
	if https != "" {
		if text := connection(owner, https); o.connectionOut == "" {
			ready["connectionString"] = text
		} else {
			if err := writeFile(o.connectionOut, []byte(text+"\n"), 0o600, true); err != nil {
				return err
			}
			ready["connectionStringFile"] = o.connectionOut
		}
	}
	if e.groupKey != nil {
		ready["symmetricGroup"] = map[string]string{"id": symmetricGroup, "primaryKey": base64.StdEncoding.EncodeToString(e.groupKey)}
		group := map[string]string{"id": certificateGroup, "ca": string(ca.EncodeChain(e.deviceCA))}
		if e.o.deviceCAOut != "" {
			group["caFile"], group["caKeyFile"] = filepath.Join(e.o.deviceCAOut, deviceCAFile), filepath.Join(e.o.deviceCAOut, deviceCAKeyFile)
		}
		ready["x509Group"] = group
	}
	return nil
}

// tell says to a person how to go on.
func (e *emulator) tell(a *app) {
	if e.o.seeded {
		fmt.Fprintln(a.err, "touchmark: "+a.paint(a.err, "33", "WARNING")+": --seed: whoever knows its text has every key of this service. It is for tests, and for nothing else.")
	}
	if e.groupKey == nil {
		return
	}
	a.note("group %s admits every device with a key derived from the group's (--json shows it); --stamp sensor-1 makes one", symmetricGroup)
	a.note("group %s admits every device with a certificate of its CA (--device-ca-out DIR); --stamp-x509 sensor-2 makes one", certificateGroup)
}
