package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/pkcs11"
	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/hsm/tpm"
	"github.com/touchmark/touchmark/hsm/tpm/residency"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/device"
	"github.com/touchmark/touchmark/pkg/evidence"
	"github.com/touchmark/touchmark/pkg/filelock"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
	"github.com/touchmark/touchmark/pkg/order"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/settings"
	"github.com/touchmark/touchmark/pkg/sqlstore"
	"github.com/touchmark/touchmark/pkg/stamp"
	"github.com/touchmark/touchmark/pkg/station/screen"
)

// The exit codes. Scripts build on them: they never change their meaning.
const (
	exitDone        = 0
	exitFailed      = 1
	exitUsage       = 2
	exitPartial     = 3
	exitRefused     = 4
	exitUnverified  = 5
	exitInterrupted = 130
)

var exitCodesTopic = &cobra.Command{
	Use:   "exit-codes",
	Short: "What the exit codes mean",
	Long: `touchmark ends with one of these codes.

    0  done
    1  failed: nothing was done, or it is not known what was
    2  wrong usage or configuration
    3  done in part: the ledger or the output says what is left; the same command goes on from there
    4  refused: a PIN, a passphrase, a permission or a credential
    5  does not verify: a bundle, a ledger, a certificate
  130  interrupted`,
}

var environmentTopic = &cobra.Command{
	Use:   "environment",
	Short: "The environment variables that touchmark reads",
	Long: `touchmark reads these environment variables. Flags beat them, and they beat the configuration file.

  TOUCHMARK_PIN_FILE         file that holds the user PIN of a PKCS#11 token, or the authorization value of a TPM's key
  TOUCHMARK_PIN              the user PIN itself
  TOUCHMARK_PASSPHRASE_FILE  file that holds the passphrase of a key-file store
  TOUCHMARK_PASSPHRASE       the passphrase itself
  TOUCHMARK_PKCS11_MODULE    PKCS#11 module to load where a key URI names none
  TOUCHMARK_PKCS11_TIMEOUT   how long a PKCS#11 module in a process of its own (module-path=p11-kit:…) may be
                             silent before that process is killed and started again; 60s if unset
  TOUCHMARK_LINE             the line's directory, instead of --line
  TOUCHMARK_SERVICE          file with a registration service's connection string, instead of --service
  TOUCHMARK_MANAGEMENT       file that says where a management API is, instead of --management
  TOUCHMARK_TPM              key URI of the TPM, instead of --tpm
  TOUCHMARK_TPM_OWNER_AUTH_FILE, TOUCHMARK_TPM_ENDORSEMENT_AUTH_FILE, TOUCHMARK_TPM_LOCKOUT_AUTH_FILE
                             files that hold the authorization values of the TPM's hierarchies, where they have some
  TOUCHMARK_STORE_FILE       file that holds the address of the database that serve keeps its store in, instead of --store-file
  TOUCHMARK_STORE            the address itself; PGPASSFILE, PGPASSWORD and their like count as they do for psql
  NO_COLOR                   no colour, whatever its value

A PIN or passphrase is looked for in the key URI's pin-source first, then here, then asked for on the terminal.`,
}

// usageError is wrong usage or configuration.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// refusedError is a person or a service saying no.
type refusedError struct{ error }

func (e refusedError) Unwrap() error { return e.error }

// partialError is work that was done in part and can be taken up again.
type partialError struct {
	error
	done string // how far it came, if that is known
}

func (e partialError) Unwrap() error { return e.error }

// hintError adds what would help.
type hintError struct {
	error
	hint string
}

func (e hintError) Unwrap() error { return e.error }

func hint(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return hintError{err, fmt.Sprintf(format, args...)}
}

// report prints an error for the person and returns the exit code. It is the only place that chooses either.
func (a *app) report(ctx context.Context, err error) int {
	if err == nil {
		return exitDone
	}
	code, help := classify(ctx, err)
	text := err.Error()
	if code == exitInterrupted {
		text = "interrupted"
		var partial partialError
		if errors.As(err, &partial) && partial.done != "" {
			text += ": " + partial.done
		}
	}
	label := a.paint(a.err, "31", "error:")
	for _, line := range strings.Split(strings.TrimSpace(text), "\n") {
		fmt.Fprintf(a.err, "touchmark: %s %s\n", label, printable(line))
	}
	if help != "" {
		fmt.Fprintf(a.err, "touchmark: hint: %s\n", printable(help))
	}
	if a.json {
		_ = a.printJSON(map[string]any{"error": text, "exitCode": code})
	}
	return code
}

func classify(ctx context.Context, err error) (code int, help string) {
	var h hintError
	if errors.As(err, &h) {
		help = h.hint
	}
	suggest := func(s string) {
		if help == "" {
			help = s
		}
	}
	var usage usageError
	var partial partialError
	var refused refusedError
	var denied *device.RefusedError
	var faults *settings.Error
	var list *mint.ListError
	var answer *tpm.Error
	var granted *ledger.GrantError
	switch {
	case errors.As(err, &partial):
		if ctx.Err() != nil && errors.Is(err, context.Canceled) {
			suggest("run the same command again: it goes on where this one stopped")
			return exitInterrupted, help
		}
		suggest("run the same command again once the cause is mended: it goes on where this one stopped")
		return exitPartial, help
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		return exitInterrupted, help
	case errors.Is(err, screen.ErrInterrupted):
		suggest("units that were in work go on where they stopped when they are scanned again")
		return exitInterrupted, help
	case errors.Is(err, fs.ErrPermission):
		return exitRefused, help
	case errors.Is(err, registration.ErrOrder):
		suggest("the bundle must hold an order that an owner signed whom the service knows (serve --owner), for the station that made the bundle; a lease needs its holder's key too (--holder)")
		return exitUnverified, help
	case errors.As(err, &usage), errors.As(err, &faults), errors.As(err, &list), errors.Is(err, mint.ErrNeedsOut), errors.Is(err, hsm.ErrNoPIN),
		errors.Is(err, hsm.ErrNoModule), strings.HasPrefix(err.Error(), "if any flags in the group"),
		strings.HasPrefix(err.Error(), "at least one of the flags in the group"):
		return exitUsage, help
	case strings.HasPrefix(err.Error(), "required flag"):
		suggest("the same command with --help shows its flags")
		return exitUsage, help
	case strings.HasPrefix(err.Error(), "unknown command"):
		suggest("touchmark --help shows the commands")
		return exitUsage, help
	case errors.Is(err, hsm.ErrPINIncorrect):
		suggest("it was tried once and will not be tried again by itself; check the file that pin-source or the environment names (touchmark help environment), or unset it to be asked")
		return exitRefused, help
	case errors.Is(err, hsm.ErrPINLocked) && errors.As(err, &answer):
		return exitRefused, help // the TPM's error says what to do
	case errors.Is(err, hsm.ErrPINLocked):
		suggest("one more wrong PIN would lock the token, so none was tried; the token's tool can tell and reset the count")
		return exitRefused, help
	case errors.As(err, &refused), errors.As(err, &denied):
		return exitRefused, help
	case errors.As(err, &granted), errors.Is(err, order.ErrStation), errors.Is(err, order.ErrProduct), errors.Is(err, order.ErrCounter), errors.Is(err, order.ErrSerial), errors.Is(err, ledger.ErrScrapped):
		suggest("touchmark order list shows what may be made here; the owner signs what is missing")
		return exitRefused, help
	case errors.Is(err, ledger.ErrRolledBack):
		suggest("what was made since the copy was taken is not in it: bring the newest ledger back, and ask the line's engineer where the copy came from")
		return exitUnverified, help
	case errors.Is(err, hsm.ErrClaimed):
		suggest("another touchmark, or one with a copy of this ledger, is at work: stop it; touchmark token counter show tells who holds it, and token counter takeover frees it from one that is gone for good")
		return exitRefused, help
	case errors.Is(err, order.ErrInvalid):
		return exitUnverified, help
	case errors.Is(err, signed.ErrUntrusted):
		suggest("name the station's public key with --trust station.pem, if it is one that you trust")
		return exitUnverified, help
	case errors.Is(err, evidence.ErrResidency):
		suggest("mint with a profile whose keys are made in a token or TPM, or take the bundle without --require-residency")
		return exitUnverified, help
	case errors.Is(err, signed.ErrCorrupt), errors.Is(err, errNoImage), errors.Is(err, sqlstore.ErrDamaged):
		return exitUnverified, help
	case errors.Is(err, ledger.ErrStation):
		suggest("name the public key of the station that keeps this ledger with --trust")
		return exitUnverified, help
	case errors.Is(err, ledger.ErrForked):
		suggest("two copies of it were worked with, or it was made up: stop the line and keep both; touchmark ledger export shows what each has from that entry on")
		return exitUnverified, help
	case errors.Is(err, ledger.ErrDamaged):
		suggest("keep the file as it is for whoever looks into it; go on with a backup only if touchmark ledger verify and ledger compare find nothing missing in it")
		return exitUnverified, help
	case errors.Is(err, ledger.ErrUnseen):
		suggest("give it what touchmark ledger checkpoint --since wrote, from the last checkpoint that this witness cosigned; --first is for a ledger that is new to the witness")
		return exitUnverified, help
	case errors.Is(err, bundle.ErrCorrupt), errors.Is(err, ledger.ErrProof), errors.Is(err, ledger.ErrOrigin), errors.Is(err, residency.ErrNotProven):
		return exitUnverified, help
	case errors.Is(err, ledger.ErrFull), errors.Is(err, stamp.ErrFull), errors.Is(err, mint.ErrNoSpace):
		suggest("make room on the disk and run the same command again")
	case errors.Is(err, filelock.ErrLocked):
		suggest("another touchmark is at work there: wait for it, or stop it")
	case errors.Is(err, hsm.ErrFull) && !errors.As(err, &answer):
		suggest("the token has no room for more keys: delete some, or make device keys in memory")
	}
	if _, try, ok := pkcs11.Explain(err); ok {
		suggest(try)
	}
	return exitFailed, help
}
