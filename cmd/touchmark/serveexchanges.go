package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/touchmark/touchmark/pkg/emulate"
)

// exchangePatience is how long a stopping service waits for whoever reads its exchanges.
const exchangePatience = 2 * time.Second

// openExchanges opens where exchanges are written to; an empty path is nowhere. Nothing is written before ready is closed: on
// standard output the first line is another one. The caller closes what it returns.
func (a *app) openExchanges(path string, ready <-chan struct{}, log *slog.Logger) (*emulate.Exchanges, func() error, error) {
	if path == "" {
		return nil, func() error { return nil }, nil
	}
	var w io.Writer = a.out
	closeFile := func() error { return nil }
	if path == "-" {
		signal.Ignore(syscall.SIGPIPE) // a reader that goes away costs lines, not the service
	} else {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
		if err != nil {
			return nil, nil, usageError{fmt.Errorf("--exchanges: %w", err)}
		}
		w, closeFile = f, f.Close
	}
	x := emulate.NewExchanges(gate{w, ready}, log)
	return x, func() error {
		x.Close(exchangePatience)
		return closeFile()
	}, nil
}

// A gate holds back what is written until it opens.
type gate struct {
	io.Writer
	open <-chan struct{}
}

func (g gate) Write(b []byte) (int, error) {
	<-g.open
	return g.Writer.Write(b)
}
