package station

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strconv"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/hsm/tpm/residency"
	"github.com/touchmark/touchmark/pkg/filelock"
	"github.com/touchmark/touchmark/pkg/fixture"
	"github.com/touchmark/touchmark/pkg/label"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
	"github.com/touchmark/touchmark/pkg/order"
	"github.com/touchmark/touchmark/pkg/stamp"
)

type failure struct {
	code   Code
	fields map[string]string
	err    error
}

func (f *failure) Error() string { return string(f.code) + ": " + f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

func fail(code Code, fields map[string]string, err error) error {
	if err == nil {
		err = errors.New(string(code))
	}
	return &failure{code, fields, err}
}

func refusable(c Code) bool {
	return c[:3] == "E-2" || slices.Contains([]Code{CodeMade, CodeNotInOrder, CodeProduct, CodeScrapped, CodeElsewhere, CodeTwice, CodeAnchor, CodeLocked}, c)
}

func (s *Station) explain(ctx context.Context, code Code, serial string, err error) map[string]string {
	const minutes = "2006-01-02 15:04"
	fields := map[string]string{"serial": serial, "order": orDash(s.setup.Order), "scan": serial}
	var f *failure
	if errors.As(err, &f) {
		maps.Copy(fields, f.fields)
	}
	var dup *ledger.DuplicateError
	var granted *ledger.GrantError
	var locked *filelock.LockedError
	var claimed *hsm.ClaimedError
	switch {
	case errors.As(err, &dup):
		fields["serial"], fields["when"] = dup.Unit.Serial, dup.Unit.At.Local().Format(minutes)
		fields["operator"], fields["station"] = orDash(dup.Job.Operator), s.setup.Name
	case errors.As(err, &granted):
		fields["order"], fields["quantity"] = granted.Grant.ID, strconv.FormatInt(granted.Grant.Quantity, 10)
		fields["from"], fields["until"] = granted.Grant.Opens.Format(minutes), granted.Grant.Ends.Format(minutes)
	case errors.As(err, &claimed):
		fields["owner"] = fmt.Sprintf("%s, process %d", claimed.Claim.Host, claimed.Claim.PID)
	case errors.As(err, &locked):
		fields["owner"] = "process " + locked.Process
	case code == CodeDisk && fields["where"] == "":
		fields["where"] = s.setup.Out
		if errors.Is(err, ledger.ErrFull) {
			_, _ = s.try(func(w *Work, _ int) error { fields["where"] = w.Ledger.Path(); return nil })
		}
	case code == CodeElsewhere:
		_, _ = s.try(func(w *Work, _ int) error {
			u, err := w.Ledger.Find(ctx, serial)
			fields["when"] = u.At.Local().Format(minutes)
			return err
		})
	case code == CodeScrapped:
		_, _ = s.try(func(w *Work, _ int) error {
			for u, err := range w.Ledger.Retired(ctx, serial) {
				if err != nil {
					return err
				}
				fields["when"], fields["operator"] = u.Ended.Local().Format(minutes), orDash(u.Ending.Operator)
			}
			return nil
		})
	}
	return fields
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func codeOf(step Step, err error) Code {
	var f *failure
	if errors.As(err, &f) {
		return f.code
	}
	var dup *ledger.DuplicateError
	if errors.As(err, &dup) {
		if dup.Field == "serial" || dup.Field == "registration ID" {
			return CodeMade
		}
		return CodeTwice
	}
	var claimed *hsm.ClaimedError
	if errors.As(err, &claimed) && claimed.Claim.ID == "" {
		return CodeAnchor // somebody took the counter over
	}
	for _, c := range []struct {
		is   error
		code Code
	}{
		{ledger.ErrSpent, CodeOrderSpent}, {ledger.ErrNotOpen, CodeOrderEarly}, {ledger.ErrExpired, CodeOrderExpired}, {ledger.ErrClosed, CodeOrderClosed},
		{ledger.ErrNoGrant, CodeNoOrder}, {ledger.ErrOtherGrant, CodeOrderProfile}, {order.ErrSerial, CodeNotInOrder}, {order.ErrStation, CodeOrderStation},
		{order.ErrProduct, CodeOrderProfile}, {order.ErrInvalid, CodeOrderForged}, {signed.ErrCorrupt, CodeOrderForged}, {signed.ErrUntrusted, CodeOrderForged},
		{ledger.ErrScrapped, CodeScrapped}, {mint.ErrElsewhere, CodeElsewhere},
		{hsm.ErrClaimed, CodeLocked}, {filelock.ErrLocked, CodeLocked}, {hsm.ErrLost, CodeToken},
		{ledger.ErrClock, CodeClock}, {ledger.ErrRolledBack, CodeAnchor}, {ledger.ErrAnchor, CodeAnchor},
		{ledger.ErrFull, CodeDisk}, {stamp.ErrFull, CodeDisk}, {mint.ErrNoSpace, CodeDisk},
		{hsm.ErrPINIncorrect, CodeTokenPIN}, {hsm.ErrPINLocked, CodeTokenPIN}, {ledger.ErrBroken, CodeLedger}, {ledger.ErrDamaged, CodeLedger},
		{residency.ErrNotProven, CodeGenuine},
		{fixture.ErrMismatch, CodeReadBack}, {fixture.ErrSignature, CodeChallenge},
		{label.ErrPaper, CodePaper}, {label.ErrPrinter, CodePrinter},
		{stamp.ErrMismatch, CodeStamp}, {stamp.ErrExists, CodeStamp}, {hsm.ErrNotFound, CodeToken},
	} {
		if errors.Is(err, c.is) {
			return c.code
		}
	}
	timeout := errors.Is(err, fixture.ErrTimeout)
	switch step {
	case StepProbe:
		if timeout {
			return CodeProbeTimeout
		}
		return CodeProbe
	case StepFlash:
		if timeout {
			return CodeFlashTimeout
		}
		return CodeFlash
	case StepReadBack:
		return CodeReadBackFailed
	case StepChallenge:
		return CodeNoChallenge
	case StepLabel:
		return CodePrint
	case StepMint, StepSeal:
		if errors.Is(err, fs.ErrPermission) {
			return CodeStamp
		}
		return CodeMint
	}
	return CodeInternal
}
