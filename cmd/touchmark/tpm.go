package main

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/tpm"
	"github.com/touchmark/touchmark/hsm/tpm/residency"
)

// tpmAuth names the files with the authorization values of a TPM's hierarchies; the environment names those that are empty.
type tpmAuth struct{ owner, endorsement, lockout string }

type tpmOptions struct {
	uri    string
	makers string
}

func newTPM(a *app) *cobra.Command {
	o := &tpmOptions{}
	show := &cobra.Command{
		Use: "show", Short: "Show what a TPM is, what is in it, and what state it is in", Args: cobra.NoArgs,
		Example: "  touchmark tpm show\n  touchmark tpm show --tpm tpm:?device=unix:/run/swtpm.sock --json",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runTPMShow(cmd.Context(), o) },
	}
	doctor := &cobra.Command{
		Use: "doctor", Short: "Check before a shift that a TPM can do its work", Args: cobra.NoArgs,
		Long: `doctor checks what usually goes wrong: whether the TPM answers, is locked or full, has what keys need, and makes, uses and
forgets a key. It leaves nothing behind. Each line that is not OK says what to do next; the exit code is 0 when all are.`,
		Example: "  touchmark tpm doctor --makers tpm-makers",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runTPMDoctor(cmd.Context(), o) },
	}
	makersFlag(doctor, &o.makers)
	c := parent("tpm", "TPM 2.0: identity, keys, memory and state",
		show, doctor, newTPMEK(a, o), newTPMSRK(a, o), newTPMKey(a, o), newTPMNV(a, o), newTPMCertify(a, o), newTPMVerify(a), newTPMLockout(a, o), newTPMFlush(a, o), newTPMClear(a, o))
	c.Long = `A TPM is named by a key URI: a device node (without one, ` + tpm.DefaultDevice + `), or the Unix socket or TCP port of a TPM elsewhere, so
that a fixture can lend its device's:

  tpm:?device=/dev/tpmrm0&keys=DIR
  tpm:?device=unix:PATH            tpm:?device=tcp:HOST:PORT            tpm:?device=mssim:HOST:PORT

Keys lie as encrypted blobs in DIR, for that TPM only, and are PEM files that OpenSSL's tpm2 provider takes too; or they live
at a persistent handle in the TPM and are called by it, 0x81000100 for instance.`
	f := c.PersistentFlags()
	f.StringVar(&o.uri, "tpm", "", "key URI of the TPM (default: $TOUCHMARK_TPM, else "+tpm.DefaultDevice+")")
	f.StringVar(&a.tpmAuth.owner, "owner-auth-file", "", "file with the owner's authorization value, if it has one")
	f.StringVar(&a.tpmAuth.endorsement, "endorsement-auth-file", "", "file with the endorsement hierarchy's")
	f.StringVar(&a.tpmAuth.lockout, "lockout-auth-file", "", "file with the lockout authorization")
	return c
}

func makersFlag(c *cobra.Command, dst *string) {
	c.Flags().StringVar(dst, "makers", "", "folder with the certificates of TPM manufacturers that are trusted")
	_ = c.MarkFlagDirname("makers")
}

// openTPM opens a TPM. Relative paths in the URI count from base.
func (a *app) openTPM(ctx context.Context, uri hsm.URI, base string, pin func(context.Context) (hsm.Secret, error)) (*tpm.Store, error) {
	cfg := tpm.Config{URI: uri, Dir: under(base, uri.Keys), PIN: pin, Protect: uri.HasPIN()}
	if path, ok := strings.CutPrefix(uri.Device, "unix:"); ok { // relative like the directory
		cfg.Device = "unix:" + under(base, path)
	}
	for _, h := range []struct {
		file, env string
		auth      *hsm.Secret
	}{
		{a.tpmAuth.owner, "TOUCHMARK_TPM_OWNER_AUTH_FILE", &cfg.Owner},
		{a.tpmAuth.endorsement, "TOUCHMARK_TPM_ENDORSEMENT_AUTH_FILE", &cfg.Endorsement},
		{a.tpmAuth.lockout, "TOUCHMARK_TPM_LOCKOUT_AUTH_FILE", &cfg.Lockout},
	} {
		file := cmp.Or(h.file, a.getenv(h.env))
		if file == "" {
			continue
		}
		var err error
		if *h.auth, err = (hsm.URI{Scheme: hsm.SchemeTPM, PINSource: file}).ResolvePIN(ctx, hsm.PINConfig{}); err != nil {
			return nil, usageError{err}
		}
	}
	s, err := tpm.Open(ctx, cfg)
	if errors.Is(err, hsm.ErrLost) {
		err = hint(err, "is a TPM there, and may this user open it? Another is named with --tpm, or by the device in its key URI")
	}
	return s, err
}

// tpmURI is the key URI that the flags and the environment say.
func (a *app) tpmURI(o *tpmOptions) string { return cmp.Or(o.uri, a.getenv("TOUCHMARK_TPM"), "tpm:") }

// withTPM opens the TPM that the options name, and closes it after f.
func (a *app) withTPM(ctx context.Context, o *tpmOptions, f func(*tpm.Store) error) (err error) {
	if uri, err := hsm.ParseURI(a.tpmURI(o)); err == nil && uri.Scheme != hsm.SchemeTPM {
		return usageError{fmt.Errorf("%s names no TPM: want tpm:…", uri)}
	}
	wd, err := os.Getwd()
	if err != nil {
		return err
	}
	store, err := a.openStore(ctx, a.tpmURI(o), wd)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	return f(store.(*tpm.Store))
}

func (a *app) loadMakers(dir string) (*residency.Makers, error) {
	if dir == "" {
		return nil, nil
	}
	m, err := residency.LoadMakers(os.DirFS(dir))
	if err != nil {
		return nil, usageError{fmt.Errorf("--makers %s: %w", dir, err)}
	}
	return m, nil
}

func (a *app) runTPMShow(ctx context.Context, o *tpmOptions) error {
	return a.withTPM(ctx, o, func(s *tpm.Store) error {
		st, err := s.State(ctx)
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(st)
		}
		rows := [][]string{
			{"Device", st.Device},
			{"Manufacturer", strings.TrimSpace(st.Manufacturer + " " + st.Vendor)},
			{"Firmware", st.Firmware},
			{"TPM revision", st.Revision},
			{"Algorithms", fmt.Sprint(st.Algorithms)},
			{"Lockout", lockoutText(st.Lockout)},
			{"Authorization", fmt.Sprintf("owner %s, endorsement %s, lockout %s", setOrNot(st.OwnerAuth), setOrNot(st.EndorsementAuth), setOrNot(st.LockoutAuth))},
			{"Slots", fmt.Sprintf("%d, %d of them taken by others", st.Slots, len(st.Loaded))},
			{"Sessions of others", fmt.Sprint(st.Sessions)},
			{"Persistent", fmt.Sprintf("%s(room for %d more)", handles(st.Persistent), st.PersistentFree)},
		}
		for _, n := range st.NV {
			rows = append(rows, []string{"NV", nvText(n)})
		}
		return a.table(nil, rows)
	})
}

func setOrNot(b bool) string {
	if b {
		return "set"
	}
	return "not set"
}

func handles(list []uint32) string {
	var b strings.Builder
	for _, h := range list {
		fmt.Fprintf(&b, "0x%08x ", h)
	}
	return b.String()
}

func lockoutText(l tpm.Lockout) string {
	state := "no"
	if l.Locked {
		state = "LOCKED"
	}
	forgiven := "never forgiven"
	if l.Recovery > 0 {
		forgiven = "one forgiven every " + (time.Duration(l.Recovery) * time.Second).String()
	}
	return fmt.Sprintf("%s: %d of %d failures, %s", state, l.Failures, l.MaxFailures, forgiven)
}

func (a *app) runTPMDoctor(ctx context.Context, o *tpmOptions) error {
	makers, err := a.loadMakers(o.makers)
	if err != nil {
		return err
	}
	d := &doctor{}
	add := func(check string, ok bool, found, next string) {
		if ok {
			d.ok(check, "%s", found)
		} else {
			d.fail(check, next, errors.New(found))
		}
	}
	err = a.withTPM(ctx, o, func(s *tpm.Store) error {
		st, err := s.State(ctx)
		if err != nil {
			return err
		}
		add("answers", true, fmt.Sprintf("%s, %s firmware %s, TPM 2.0 revision %s", st.Device, strings.TrimSpace(st.Manufacturer+" "+st.Vendor), st.Firmware, st.Revision), "")
		add("not locked", !st.Lockout.Locked, lockoutText(st.Lockout), "wait, or reset it: touchmark tpm lockout --reset --lockout-auth-file FILE")
		add("hierarchies", st.StorageEnabled && st.EndorsementEnabled, fmt.Sprintf("storage %s, endorsement %s", onOff(st.StorageEnabled), onOff(st.EndorsementEnabled)), "enable them in the firmware's settings")
		add("free slots", len(st.Loaded) == 0, fmt.Sprintf("%d of %d", max(0, st.Slots-len(st.Loaded)), st.Slots), "use /dev/tpmrm0; or, when no other program is at work there: touchmark tpm flush")
		add("sessions", st.Sessions < 8, fmt.Sprintf("%d of other programs", st.Sessions), "when no other program is at work there: touchmark tpm flush")
		_, handle, err := s.SRK()
		srk := "the owner's primary (ECC P-256)"
		if handle != 0 {
			srk = hsm.TPMHandleName(handle)
		}
		add("storage root key", err == nil, cmp.Or(errText(err), srk), "give the owner's authorization with --owner-auth-file")
		took, err := tryKey(ctx, s)
		add("makes and uses a key", err == nil, cmp.Or(errText(err), took), "see the error; touchmark tpm show tells more")
		ek, err := s.EK(ctx, tpm.EKRSA)
		if err != nil {
			add("endorsement key", false, err.Error(), "give the endorsement authorization with --endorsement-auth-file, if it has one")
			return nil
		}
		add("endorsement key", true, "RSA 2048, registration ID "+ek.RegistrationID(), "")
		found, err := judgeEK(ek, makers)
		add("endorsement certificate", err == nil, cmp.Or(errText(err), found), "get the maker's root and put it into the folder of --makers; a TPM without a certificate proves less")
		return nil
	})
	if err != nil {
		if ctx.Err() != nil || len(d.findings) > 0 {
			return err
		}
		add("answers", false, err.Error(), "check the device, the rights to it and the key URI")
	}
	return a.reportFindings("TPM "+a.tpmURI(o), d)
}

func onOff(b bool) string {
	if b {
		return "enabled"
	}
	return "disabled"
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// tryKey makes a key that is kept nowhere, signs with it and checks the signature.
func tryKey(ctx context.Context, s *tpm.Store) (string, error) {
	begin := time.Now()
	k, err := s.Generate(ctx, hsm.Spec{Name: "doctor", Algorithm: hsm.ECP256, Ephemeral: true})
	if err != nil {
		return "", err
	}
	made := time.Since(begin)
	signer, err := hsm.SigningKeyOf(k)
	if err != nil {
		return "", err
	}
	digest := sha256.Sum256([]byte("doctor"))
	begin = time.Now()
	sig, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return "", err
	}
	if !ecdsa.VerifyASN1(signer.Public().(*ecdsa.PublicKey), digest[:], sig) {
		return "", errors.New("the TPM's signature does not verify")
	}
	return fmt.Sprintf("EC P-256 made in %v, signs in %v", made.Round(100*time.Microsecond), time.Since(begin).Round(100*time.Microsecond)), nil
}
