package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/emulate"
	"github.com/touchmark/touchmark/pkg/operator"
	"github.com/touchmark/touchmark/pkg/serviceapi"
)

type faultOptions struct {
	service, ca string
}

func newFault(a *app) *cobra.Command {
	command := func(use, short, long, example, method string, args cobra.PositionalArgs) *cobra.Command {
		o := &faultOptions{}
		c := &cobra.Command{
			Use: use + " --service FILE", Short: short, Long: long, Example: example, Args: args,
			RunE: func(cmd *cobra.Command, args []string) error { return a.runFault(cmd.Context(), o, method, args) },
		}
		if method == http.MethodPost || method == http.MethodPut {
			c.ValidArgsFunction = completeFault
		}
		c.Flags().StringVar(&o.service, "service", "", "file with the emulator's connection string: serve --connection-out (required)")
		c.Flags().StringVar(&o.ca, "ca", "", "PEM file with the CA of the service's certificate (default: ca.pem beside --service, else the system's)")
		_ = c.MarkFlagRequired("service")
		return c
	}
	return parent("fault", "What goes wrong in an emulator",
		command("list", "Show the faults and what became of them", "list shows the emulator's faults: how many requests each was for, and how many it happened to.",
			"  touchmark fault list --service emulator.connection", http.MethodGet, cobra.NoArgs),
		command("add FAULT...", "Have more go wrong", "add adds faults behind those that are there. touchmark help emulator has their words.",
			"  touchmark fault add 'rid=sensor-7,op=register,code=503,count=3' --service emulator.connection", http.MethodPost, cobra.MinimumNArgs(1)),
		command("set FAULT...", "Have other things go wrong", "set puts faults in the place of all that are there; their counts begin anew.",
			"  touchmark fault set 'drop=after,p=0.1' 'delay=2s' --service emulator.connection", http.MethodPut, cobra.MinimumNArgs(1)),
		command("clear", "Have nothing go wrong", "clear takes all faults away.",
			"  touchmark fault clear --service emulator.connection", http.MethodDelete, cobra.NoArgs))
}

func (a *app) runFault(ctx context.Context, o *faultOptions, method string, texts []string) error {
	faults := make([]emulate.Fault, len(texts))
	for i, text := range texts {
		if err := faults[i].UnmarshalText([]byte(text)); err != nil {
			return usageError{err}
		}
	}
	svc, err := a.openService(o.service, o.ca)
	if err != nil {
		return err
	}
	var res struct {
		Faults []emulate.FaultState `json:"faults"`
	}
	if err := svc.callJSON(ctx, method, "/touchmark/faults", faults, &res); err != nil {
		var answer *operator.Error
		if errors.As(err, &answer) && answer.Code == dps.CodeNotFound {
			return hint(err, "only an emulator has faults: touchmark serve --ephemeral")
		}
		return importError(err)
	}
	var rows [][]string
	for _, f := range res.Faults {
		if a.json {
			if err := a.printJSON(f); err != nil {
				return err
			}
			continue
		}
		rows = append(rows, []string{f.Fault.String(), fmt.Sprint(f.Matched), fmt.Sprint(f.Applied)})
	}
	if a.json {
		return nil
	}
	return a.table([]string{"FAULT", "MATCHED", "APPLIED"}, rows)
}

// faultCalls answers a test that changes the faults while the emulator runs.
func faultCalls(faults *emulate.Faults) serviceapi.Call {
	return func(_ context.Context, method string, body []byte) (any, error) {
		var list []emulate.Fault
		var err error
		switch method {
		case http.MethodGet:
		case http.MethodDelete:
			err = faults.Set()
		case http.MethodPut, http.MethodPost:
			if err = json.Unmarshal(body, &list); err != nil || list == nil {
				var wrong *emulate.FaultError
				if errors.As(err, &wrong) {
					return nil, dps.NewError(dps.CodeInvalidArgument, wrong.Error(), nil)
				}
				return nil, dps.NewError(dps.CodeInvalidArgument, `The body must be an array of faults: ["rid=sensor-*,code=429"]`, err)
			}
			change := faults.Add
			if method == http.MethodPut {
				change = faults.Set
			}
			err = change(list...)
		default:
			return nil, dps.NewError(dps.CodeMethodNotAllowed, "Method not allowed", nil)
		}
		if err != nil {
			return nil, dps.NewError(dps.CodeInvalidArgument, "There would be "+err.Error(), nil)
		}
		return map[string]any{"faults": faults.List()}, nil
	}
}
