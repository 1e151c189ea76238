package hook

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/touchmark/touchmark/pkg/fixture"
)

// A Program runs a command for an event. The command's fields are the event's own, and those of [ProgramFields]; the event's
// JSON is on standard input. Exit code 0 means that it has arrived, 65 (EX_DATAERR in sysexits.h) that it is refused for good,
// as is an event without a field that the command names; after anything else the command is run again.
type Program struct {
	Command *fixture.Command
}

// ProgramFields returns the fields that every event has: "event-id", "kind", and "time" as RFC 3339 has it.
func ProgramFields() []string { return []string{"event-id", "kind", "time"} }

// exitDataErr is what a program says of news that it will never take.
const exitDataErr = 65

// Deliver runs the command.
func (p *Program) Deliver(ctx context.Context, e Event, body []byte) error {
	fields := maps.Clone(e.Fields)
	if fields == nil {
		fields = make(map[string]string, 3)
	}
	fields["event-id"], fields["kind"], fields["time"] = e.ID, e.Kind, e.Time.Format(time.RFC3339)
	_, err := p.Command.Run(ctx, fixture.Input{Fields: fields, Stdin: body})
	var exit *fixture.ExitError
	if errors.Is(err, fixture.ErrField) || errors.As(err, &exit) && exit.Code == exitDataErr {
		err = fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return err
}
