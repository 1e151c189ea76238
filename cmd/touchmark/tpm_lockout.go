package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm/tpm"
)

type lockoutOptions struct {
	reset                     bool
	maxFailures               uint32
	recovery, lockoutRecovery time.Duration
}

func newTPMLockout(a *app, o *tpmOptions) *cobra.Command {
	l := &lockoutOptions{}
	c := &cobra.Command{
		Use: "lockout", Short: "Show, reset or set the TPM's protection against guessing", Args: cobra.NoArgs,
		Long: `lockout shows how many wrong authorization values the TPM has counted and when it locks. Keys that touchmark makes do not count;
those of other programs may. Resetting and setting take the lockout authorization, of which one wrong try locks itself.`,
		Example: "  touchmark tpm lockout\n  touchmark tpm lockout --reset --lockout-auth-file lockout.txt\n  touchmark tpm lockout --max-failures 32 --recovery 10m --lockout-recovery 1h",
		RunE: func(cmd *cobra.Command, _ []string) error {
			set := cmd.Flags().Changed("max-failures") || cmd.Flags().Changed("recovery") || cmd.Flags().Changed("lockout-recovery")
			return a.runTPMLockout(cmd.Context(), o, l, set)
		},
	}
	f := c.Flags()
	f.BoolVar(&l.reset, "reset", false, "set the count to zero and end a lockout")
	f.Uint32Var(&l.maxFailures, "max-failures", 0, "lock after that many failures (with the two below)")
	f.DurationVar(&l.recovery, "recovery", 0, "forgive one failure after this time")
	f.DurationVar(&l.lockoutRecovery, "lockout-recovery", 0, "let the lockout authorization be tried again after this time; 0 means after a restart")
	return c
}

func (a *app) runTPMLockout(ctx context.Context, o *tpmOptions, l *lockoutOptions, set bool) error {
	if set && (l.maxFailures == 0 || l.recovery < time.Second || l.lockoutRecovery < 0) {
		return usageError{errors.New("--max-failures and --recovery go together: 1 or more, and a second or more")}
	}
	return a.withTPM(ctx, o, func(s *tpm.Store) error {
		if set {
			if err := s.SetLockout(ctx, l.maxFailures, l.recovery, l.lockoutRecovery); err != nil {
				return err
			}
		}
		if l.reset {
			if err := s.ResetLockout(ctx); err != nil {
				return err
			}
		}
		st, err := s.State(ctx)
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(st.Lockout)
		}
		return a.table(nil, [][]string{
			{"Locked", yesNo(st.Lockout.Locked)},
			{"Failures", fmt.Sprintf("%d of %d", st.Lockout.Failures, st.Lockout.MaxFailures)},
			{"One forgiven every", (time.Duration(st.Lockout.Recovery) * time.Second).String()},
			{"Lockout authorization again after", (time.Duration(st.Lockout.LockoutRecovery) * time.Second).String()},
			{"Lockout authorization", setOrNot(st.LockoutAuth)},
		})
	})
}

func newTPMFlush(a *app, o *tpmOptions) *cobra.Command {
	var yes bool
	c := &cobra.Command{
		Use: "flush", Short: "Free the slots of a TPM that other programs left taken", Args: cobra.NoArgs,
		Long: `flush takes every loaded object and session out of a TPM that has no resource manager: what programs left that were killed. A
program that is at work there with some of them fails.`,
		Example: "  touchmark tpm flush --tpm 'tpm:?device=/dev/tpm0' --yes",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.confirm(cmd.Context(), yes, "flushing what other programs have loaded", "flush"); err != nil {
				return err
			}
			return a.withTPM(cmd.Context(), o, func(s *tpm.Store) error {
				n, err := s.Flush(cmd.Context())
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(map[string]any{"flushed": n})
				}
				_, err = fmt.Fprintf(a.out, "Flushed %d objects and sessions\n", n)
				return err
			})
		},
	}
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return c
}

func newTPMClear(a *app, o *tpmOptions) *cobra.Command {
	var yes bool
	c := &cobra.Command{
		Use: "clear", Short: "Make the TPM forget its owner, and with it every key of a device", Args: cobra.NoArgs,
		Long: `clear destroys every key under the storage root key, every persistent key and NV index of the owner's, and the hierarchies'
authorization values. The endorsement key stays. It takes the lockout authorization.`,
		Example: "  touchmark tpm clear --yes",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withTPM(cmd.Context(), o, func(s *tpm.Store) error {
				st, err := s.State(cmd.Context())
				if err != nil {
					return err
				}
				if err := a.confirm(cmd.Context(), yes, "clearing the TPM at "+st.Device, "clear"); err != nil {
					return err
				}
				if err := s.Clear(cmd.Context()); err != nil {
					return err
				}
				if a.json {
					return a.printJSON(map[string]any{"cleared": st.Device})
				}
				_, err = fmt.Fprintf(a.out, "Cleared the TPM at %s\n", st.Device)
				return err
			})
		},
	}
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return c
}
