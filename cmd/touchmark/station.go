package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/touchmark/touchmark/pkg/fixture"
	"github.com/touchmark/touchmark/pkg/hook"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
	"github.com/touchmark/touchmark/pkg/order"
	"github.com/touchmark/touchmark/pkg/station"
	"github.com/touchmark/touchmark/pkg/station/screen"
	"github.com/touchmark/touchmark/pkg/station/texts"
	"github.com/touchmark/touchmark/pkg/yield"
)

// The files of a station, in its line's directory.
const (
	stationConfigFile = "station.toml"
	unitsDir          = "units"
	hooksDir          = "hooks"
	stationLog        = "station.log" // what would have gone across the screen
)

type stationOptions struct {
	line, config, order, operator, out, socket, language string
	dryRun, ascii                                        bool
}

func newStation(a *app) *cobra.Command {
	o := &stationOptions{}
	c := &cobra.Command{
		Use:   "station --line DIR",
		Short: "Make units one by one, as a technician scans them",
		Long: `station is the technician's screen: badge, checks, then scan, wait, PASS or one code with one next action. A scanner is a
keyboard that ends with Enter; no other key is needed. What is done to a unit stands in station.toml of the line: probe, flash,
read back, challenge, label.

With --json it is the same station for a machine: requests on standard input, or on a Unix socket (--socket), one JSON object a
line, and answers likewise:

  {"id":"1","op":"make","serial":"SN00001","head":1}
  {"id":"2","op":"status"}
  {"id":"3","op":"end"}

Killed at any instant, it goes on when it is started again and the serial is scanned again. A unit never gets two identities.`,
		Example: `  touchmark station --line line-3 --order PO-1234
  echo '{"op":"make","serial":"SN00001"}' | touchmark station --line line-3 --order PO-1234 --json --operator robot-7`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.runStation(cmd.Context(), o) },
	}
	a.stationFlags(c, o)
	f := c.Flags()
	f.StringVar(&o.operator, "operator", "", "who works; for the ledger, where no badge is asked for")
	f.StringVar(&o.socket, "socket", "", "with --json: Unix socket to serve requests on, instead of standard input")
	f.StringVar(&o.language, "language", "", "language of the screen: "+strings.Join(texts.Languages(), ", "))
	f.BoolVar(&o.dryRun, "dry-run", false, "do all that can be undone: nothing is minted, flashed, printed or sealed")
	f.BoolVar(&o.ascii, "ascii", false, "for terminals that do not take UTF-8")
	_ = c.RegisterFlagCompletionFunc("language", cobra.FixedCompletions(texts.Languages(), cobra.ShellCompDirectiveNoFileComp))
	c.AddCommand(newStationGolden(a))
	return c
}

func (a *app) stationFlags(c *cobra.Command, o *stationOptions) {
	lineFlag(c, &o.line)
	f := c.Flags()
	f.StringVar(&o.config, "config", "", "what the station does (default: station.toml of the line)")
	f.StringVar(&o.order, "order", "", "the production order: its file, or its ID once it was taken (default: the one that is open)")
	f.StringVar(&o.out, "out", "", "directory that stamps go to (default: units in the line)")
	a.completeOrder(c, &o.line)
	_ = c.MarkFlagDirname("out")
}

// bench is what a station works with, read and checked.
type bench struct {
	a       *app
	o       *stationOptions
	line    *line
	cfg     *station.Config
	profile *mint.Profile
	hash    string
	setup   station.Setup
	floor   *floor // its keys are held for as long as the station runs, its ledger while a shift is open
	closers []func() error
}

func (b *bench) close() error {
	var errs []error
	for _, c := range slices.Backward(b.closers) {
		errs = append(errs, c())
	}
	return errors.Join(errs...)
}

// openBench reads what a station needs. Nothing is opened yet that another could want.
func (a *app) openBench(ctx context.Context, o *stationOptions) (_ *bench, err error) {
	l, err := a.loadLine(o.line)
	if err != nil {
		return nil, err
	}
	b := &bench{a: a, o: o, line: l}
	path := o.config
	if path == "" {
		path = l.path(stationConfigFile)
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hint(usageError{fmt.Errorf("the station has no %s", path)}, "the shortest is one line: profile = \"x509-group\"")
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if b.cfg, err = station.ReadConfig(path, f); err != nil {
		return nil, err
	}
	if b.profile, b.hash, err = l.profile(b.cfg.Profile); err != nil {
		return nil, err
	}
	if b.profile.HasSecrets() && len(b.cfg.Flash) > 0 && !b.cfg.KeepStamps {
		return nil, hint(usageError{fmt.Errorf("profile %s makes a key for each device that the bundle must carry, and the station would take it away after PASS", b.profile.Name)},
			"set keep-stamps = true; once the bundle is exported, what is in %s may go", l.path(unitsDir))
	}
	if o.out == "" {
		o.out = l.path(unitsDir)
	}
	if o.out, err = filepath.Abs(o.out); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return nil, err
	}
	b.setup = station.Setup{Name: l.Name, Operator: o.operator, Out: o.out, DryRun: o.dryRun, Open: b.open}
	if err := b.describeOrder(ctx); err != nil {
		return nil, err
	}
	if t := b.cfg.Label.Template; t != "" {
		if b.setup.Label, err = loadLabel(t, l.templateFS()); err != nil {
			return nil, err
		}
	}
	if r := b.cfg.Register; r.Endpoint != "" {
		b.setup.Register = func(ctx context.Context, dir string) error {
			state, err := a.registerStamp(ctx, &registerOptions{stamp: dir, endpoint: r.Endpoint, ca: under(l.dir, r.CA), protocol: r.Protocol})
			if err != nil {
				return err
			}
			return notAssigned(state)
		}
	}
	return b, b.openHooks()
}

// describeOrder finds the order to work on, and what it says for the screen. It is verified when the line is opened.
func (b *bench) describeOrder(ctx context.Context) (err error) {
	led, err := ledger.View(ctx, b.line.path(ledgerFile))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, led.Close()) }()
	if b.o.order == "" && b.line.Orders.Required {
		all, err := led.Grants(ctx)
		if err != nil {
			return err
		}
		var open []string
		for _, g := range all {
			if !g.Closed && g.Ends.After(time.Now()) {
				open = append(open, g.ID)
			}
		}
		if len(open) != 1 {
			return hint(usageError{fmt.Errorf("line %s works by production orders, and %d are open: which one?", b.line.Name, len(open))},
				"name it with --order: its file, or its ID (touchmark order list --line %s)", b.line.dir)
		}
		b.o.order = open[0]
	}
	if b.o.order == "" {
		b.setup.Product = b.profile.Name
		return nil
	}
	document, err := readDocument(b.o.order)
	if errors.Is(err, fs.ErrNotExist) {
		g, gerr := led.Grant(ctx, b.o.order)
		if gerr != nil {
			return usageError{fmt.Errorf("order %q is no file, and is not in the ledger", b.o.order)}
		}
		document, err = g.Document, nil
	}
	if err != nil {
		return err
	}
	g, err := order.Describe(document)
	if err != nil {
		return fmt.Errorf("%s: %w", b.o.order, err)
	}
	b.setup.Product, b.setup.Order = g.Order.Product, g.ID()
	return nil
}

// open opens the line for a shift.
func (b *bench) open(ctx context.Context, shift, operator string) (_ *station.Work, err error) {
	if b.floor == nil {
		if b.floor, err = b.a.openKeys(ctx, b.line); err != nil {
			b.floor = nil
			return nil, err
		}
		b.closers = append(b.closers, b.floor.Close)
	}
	f := b.floor
	if err := f.openLedger(ctx); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.closeLedger())
		}
	}()
	g, err := f.grant(ctx, b.o.order)
	if err != nil {
		return nil, err
	}
	if err := b.line.covers(g, b.profile, b.hash); err != nil {
		f.refuse(ctx, g, "", err)
		return nil, err
	}
	cfg, err := f.mintConfig(ctx, b.profile, mint.ShiftList(b.profile))
	if err != nil {
		return nil, err
	}
	cfg.Grant, cfg.Operator, cfg.Out, cfg.Shift = g, operator, b.o.out, shift
	run, err := mint.Begin(ctx, cfg)
	if err != nil {
		return nil, err
	}
	w := &station.Work{
		Run: run, Ledger: f.ledger,
		Retire: func(ctx context.Context, serial string, state ledger.State, why ledger.Ending) error {
			_, _, err := f.retire(ctx, serial, state, why)
			return err
		},
		Refuse: func(ctx context.Context, serial string, why error) {
			if !b.o.dryRun {
				f.refuse(ctx, g, serial, why)
			}
		},
		Close: func() error { return errors.Join(run.Close(), f.closeLedger()) },
	}
	if g != nil {
		w.Grant = g.ID()
		if w.Leased, err = f.leasedSerials(ctx, g.ID()); err != nil {
			return nil, errors.Join(err, run.Close())
		}
	}
	return w, nil
}

// openHooks opens what tells the factory's system.
func (b *bench) openHooks() error {
	h := b.cfg.Hooks
	var to []hook.Destination
	program := func(name string, words []string, kinds ...string) error {
		if words == nil {
			return nil
		}
		cmd, err := fixture.Parse(words, fixture.Names{Known: append(hook.ProgramFields(), station.EventFields...)})
		if err != nil {
			return usageError{fmt.Errorf("hooks.%s: %w", name, err)}
		}
		to = append(to, hook.Destination{Name: name, Kinds: kinds, To: &hook.Program{Command: cmd}})
		return nil
	}
	if err := errors.Join(program("on-pass", h.OnPass, "pass"), program("on-fail", h.OnFail, "fail")); err != nil {
		return err
	}
	for _, w := range h.Webhook {
		ca := w.CA
		if ca != "" {
			ca = under(b.line.dir, ca)
		}
		webhook, err := hook.NewWebhook(hook.WebhookConfig{URL: w.URL, SecretFile: under(b.line.dir, w.SecretFile), CAFile: ca})
		if err != nil {
			return usageError{fmt.Errorf("hooks.webhook %s: %w", w.Name, err)}
		}
		to = append(to, hook.Destination{Name: w.Name, Kinds: w.Kinds, To: webhook})
	}
	if to == nil || b.o.dryRun {
		return nil
	}
	if err := os.MkdirAll(b.line.path(hooksDir), 0o700); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(b.line.path(hooksDir), "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	b.closers = append(b.closers, log.Close)
	spool, err := hook.Open(hook.Config{Dir: b.line.path(hooksDir), Destinations: to, Log: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		return fmt.Errorf("opening the spool of hooks: %w", err)
	}
	b.setup.Spool = spool
	b.closers = append(b.closers, spool.Close)
	return nil
}

func (a *app) runStation(ctx context.Context, o *stationOptions) (err error) {
	b, err := a.openBench(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	st := station.New(b.cfg, b.setup)
	eg, beside := errgroup.WithContext(context.WithoutCancel(ctx))
	beside, stop := context.WithCancel(beside)
	if b.setup.Spool != nil {
		eg.Go(func() error { return unlessCanceled(b.setup.Spool.Run(beside)) })
	}
	if err := b.serveNumbers(beside, eg, st.Tally()); err != nil {
		stop()
		return errors.Join(err, eg.Wait())
	}
	if a.json {
		err = a.stationJSON(ctx, o, st)
	} else {
		err = a.stationScreen(ctx, b, st)
	}
	stop()
	err = errors.Join(err, st.Close(), eg.Wait())
	if b.cfg.Metrics.File != "" {
		err = errors.Join(err, st.Tally().WriteFile(under(b.line.dir, b.cfg.Metrics.File)))
	}
	return err
}

func unlessCanceled(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// serveNumbers writes the shift's numbers to a file now and then, and serves them.
func (b *bench) serveNumbers(ctx context.Context, eg *errgroup.Group, t *yield.Tally) error {
	if m := b.cfg.Metrics.File; m != "" {
		eg.Go(func() error {
			for {
				if err := t.WriteFile(under(b.line.dir, m)); err != nil {
					b.a.note("writing the shift's numbers: %v", err) // the line goes on without
				}
				select {
				case <-time.After(5 * time.Second):
				case <-ctx.Done():
					return nil
				}
			}
		})
	}
	if b.cfg.Metrics.Listen == "" {
		return nil
	}
	ln, err := net.Listen("tcp", b.cfg.Metrics.Listen)
	if err != nil {
		return fmt.Errorf("metrics.listen: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", t.Handler())
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
		_ = t.Report().WriteHTML(w) // the other side went away
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	eg.Go(func() error {
		if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	context.AfterFunc(ctx, func() { _ = srv.Close() })
	return nil
}

// maxConversations is how many machines may talk to a station at once; further ones wait.
const maxConversations = 32

// stationJSON serves a machine.
func (a *app) stationJSON(ctx context.Context, o *stationOptions, st *station.Station) error {
	if o.operator == "" {
		return usageError{errors.New("--json asks nobody for a badge: say who works with --operator")}
	}
	// Whoever reads the answers may go away: their units go on.
	signal.Ignore(syscall.SIGPIPE)
	if err := st.Ready(ctx, o.operator); err != nil {
		return err
	}
	if o.socket == "" {
		return st.Serve(ctx, a.in, a.out)
	}
	// What a station that was killed left there is in the way; a live one holds the ledger, so it is not here.
	if st, err := os.Lstat(o.socket); err == nil {
		if st.Mode()&fs.ModeSocket == 0 {
			return usageError{fmt.Errorf("--socket %s is there, and is no socket", o.socket)}
		}
		if err := os.Remove(o.socket); err != nil {
			return err
		}
	}
	ln, err := net.Listen("unix", o.socket)
	if err != nil {
		return err
	}
	if err := os.Chmod(o.socket, 0o660); err != nil {
		return errors.Join(err, ln.Close())
	}
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
	if err := a.printJSON(map[string]any{"event": "ready", "socket": o.socket}); err != nil {
		return err
	}
	var eg errgroup.Group
	eg.SetLimit(maxConversations)
	for {
		conn, err := ln.Accept()
		if err != nil {
			_ = eg.Wait()
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return err
		}
		eg.Go(func() error {
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now().Add(time.Second)) })()
			return st.Serve(ctx, conn, conn)
		})
	}
}

// quietScreen has standard error go to a file of the line until restore is called: vendors' modules write there when they please, across
// the screen. Without a terminal on it there is nothing to do.
func (b *bench) quietScreen() (restore func() error, err error) {
	const stderr = 2
	if !isTerminal(os.Stderr) {
		return func() error { return nil }, nil
	}
	log, err := os.OpenFile(b.line.path(stationLog), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	kept, err := unix.FcntlInt(stderr, unix.F_DUPFD_CLOEXEC, stderr+1)
	if err != nil {
		return nil, err
	}
	restore = func() error { return errors.Join(unix.Dup3(kept, stderr, 0), unix.Close(kept)) }
	return restore, unix.Dup3(int(log.Fd()), stderr, 0)
}

// stationScreen serves a person.
func (a *app) stationScreen(ctx context.Context, b *bench, st *station.Station) (err error) {
	in, ok := a.in.(*os.File)
	if !ok || !isTerminal(a.in) || !isTerminal(a.out) {
		return hint(usageError{errors.New("the station's screen needs a terminal")}, "touchmark station --json is for machines")
	}
	var operators *station.Operators
	if file := b.cfg.Operators; file != "" {
		f, err := os.Open(under(b.line.dir, file))
		if err != nil {
			return usageError{fmt.Errorf("reading the operators: %w", err)}
		}
		operators, err = station.ReadOperators(file, f)
		_ = f.Close()
		if err != nil {
			return err
		}
	}
	var golden func(context.Context) error
	if b.cfg.Golden != "" {
		golden = func(ctx context.Context) error {
			return st.WithRun(func(r *mint.Run) error { return b.checkGolden(ctx, r) })
		}
	}
	lang := b.o.language
	if lang == "" {
		lang = b.cfg.Language
	}
	if lang == "" {
		lang = firstOf(a.getenv("LC_ALL"), a.getenv("LC_MESSAGES"), a.getenv("LANG"))
	}
	words, err := texts.Load(lang)
	if err != nil {
		words, err = texts.Load("en")
	}
	if err != nil {
		return err
	}
	locale := strings.ToUpper(firstOf(a.getenv("LC_ALL"), a.getenv("LC_CTYPE"), a.getenv("LANG")))
	restore, err := b.quietScreen()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, restore()) }()
	desk := station.NewDesk(context.WithoutCancel(ctx), st, operators, golden)
	err = screen.Run(ctx, screen.Config{
		Station: desk, Texts: words, In: in, Out: a.out, Term: a.getenv("TERM"), Color: a.colored(a.out),
		ASCII: b.o.ascii || !strings.Contains(locale, "UTF-8") && !strings.Contains(locale, "UTF8"),
	})
	return errors.Join(err, desk.Finish())
}

func firstOf(words ...string) string {
	for _, w := range words {
		if w != "" {
			return w
		}
	}
	return ""
}

func newStationGolden(a *app) *cobra.Command {
	o := &stationOptions{}
	var accept bool
	c := &cobra.Command{
		Use: "golden --line DIR", Short: "Hold a line against its golden sample, or accept a new one", Args: cobra.NoArgs,
		Long: `golden renders what a reserved serial would be stamped with, and holds it against what an engineer accepted, which is in the file
that golden of station.toml names. Nothing is minted. --accept takes what there is now for right.`,
		Example: "  touchmark station golden --line line-3 --accept\n  touchmark station golden --line line-3",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runGolden(cmd.Context(), o, accept) },
	}
	a.stationFlags(c, o)
	c.Flags().BoolVar(&accept, "accept", false, "take what the line makes now for right")
	return c
}

func (a *app) runGolden(ctx context.Context, o *stationOptions, accept bool) (err error) {
	o.dryRun = true
	b, err := a.openBench(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	if b.cfg.Golden == "" {
		return hint(usageError{errors.New("station.toml names no golden sample")}, "add golden = \"golden.json\"")
	}
	st := station.New(b.cfg, b.setup)
	if err := st.Ready(ctx, firstOf(o.operator, "golden")); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	return st.WithRun(func(r *mint.Run) error {
		if !accept {
			if err := b.checkGolden(ctx, r); err != nil {
				return err
			}
			a.note("the line makes what was accepted")
			return nil
		}
		sums, err := r.Golden(ctx, b.cfg.Fields)
		if err != nil {
			return err
		}
		text, err := json.MarshalIndent(sums, "", "  ")
		if err != nil {
			return err
		}
		return writeFile(under(b.line.dir, b.cfg.Golden), append(text, '\n'), 0o644, true)
	})
}

var errGolden = errors.New("the golden sample comes out differently")

func (b *bench) checkGolden(ctx context.Context, r *mint.Run) error {
	text, err := readSmall(under(b.line.dir, b.cfg.Golden))
	if err != nil {
		return hint(err, "touchmark station golden --accept makes it")
	}
	var want map[string]string
	if err := json.Unmarshal(text, &want); err != nil {
		return fmt.Errorf("%s: %w", b.cfg.Golden, err)
	}
	got, err := r.Golden(ctx, b.cfg.Fields)
	if err != nil {
		return err
	}
	if maps.Equal(got, want) {
		return nil
	}
	var differ []string
	for name := range got {
		if got[name] != want[name] {
			differ = append(differ, name)
		}
	}
	for name := range want {
		if _, ok := got[name]; !ok {
			differ = append(differ, name)
		}
	}
	slices.Sort(differ)
	return fmt.Errorf("%w: %s", errGolden, strings.Join(differ, ", "))
}
