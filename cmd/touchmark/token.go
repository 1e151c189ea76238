package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/pkcs11"
)

type tokenOptions struct {
	keyOptions // --line, or the URI in its store
	module     string
	soPIN      string
	serial     string
	seconds    float64
	sessions   []int
}

func newToken(a *app) *cobra.Command {
	list, show, initialize, doctor, bench := &tokenOptions{}, &tokenOptions{}, &tokenOptions{}, &tokenOptions{}, &tokenOptions{}
	listCmd := &cobra.Command{
		Use: "list", Short: "List the tokens that a PKCS#11 module reaches; nobody logs in", Args: cobra.NoArgs,
		Example: "  touchmark token list --module /usr/lib/softhsm/libsofthsm2.so",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runTokenList(cmd.Context(), list) },
	}
	listCmd.Flags().StringVar(&list.module, "module", "", "the PKCS#11 module (default: $TOUCHMARK_PKCS11_MODULE)")
	showCmd := &cobra.Command{
		Use: "show [URI]", Short: "Show what a token is and what it can do", Args: cobra.MaximumNArgs(1),
		Example: "  touchmark token show 'pkcs11:token=line-3?module-path=/usr/lib/softhsm/libsofthsm2.so'\n  touchmark token show --line line-3",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.runTokenShow(cmd.Context(), show.at(args))
		},
	}
	lineFlag(showCmd, &show.line)
	initCmd := &cobra.Command{
		Use: "init URI", Short: "Make a blank token ready: label, SO PIN, user PIN", Args: cobra.ExactArgs(1),
		Long: `init gives a blank token the label that the URI names, a PIN for its security officer, and the user PIN that touchmark works
with. No other token may have the label. The user PIN comes from the URI's pin-source, TOUCHMARK_PIN_FILE or the terminal; the
SO PIN from --so-pin-source, TOUCHMARK_SO_PIN_FILE or the terminal. A token that is in use is never initialized again.`,
		Example: `  touchmark token init 'pkcs11:token=line-3?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/run/secrets/pin' \
      --so-pin-source /run/secrets/so-pin`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.runTokenInit(cmd.Context(), initialize.at(args))
		},
	}
	initCmd.Flags().StringVar(&initialize.soPIN, "so-pin-source", "", "file that holds the SO PIN")
	initCmd.Flags().StringVar(&initialize.serial, "serial", "", "serial of the blank token, where there are several")
	doctorCmd := &cobra.Command{
		Use: "doctor [URI]", Short: "Check everything about a token before a shift", Args: cobra.MaximumNArgs(1),
		Long: `doctor looks at the module, the token and its PINs before it logs in, then at what the token can do, its room, and a key that
it makes, uses, reads back and destroys. With --line it knows what the line's profiles need. Each line is ok, warn or FAIL; a
line that is not ok says what to do next. It ends with exit code 1 when something failed.`,
		Example: "  touchmark token doctor --line line-3\n  touchmark token doctor 'pkcs11:token=line-3?module-path=/usr/lib/softhsm/libsofthsm2.so'",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.runTokenDoctor(cmd.Context(), doctor.at(args))
		},
	}
	lineFlag(doctorCmd, &doctor.line)
	benchCmd := &cobra.Command{
		Use: "bench [URI]", Short: "Measure a token: signatures, HMACs and keys per second", Args: cobra.MaximumNArgs(1),
		Long: `bench makes keys that live as long as their session and counts what the token does with them, with one session and with
several. Nothing is left on the token.`,
		Example: "  touchmark token bench --line line-3 --sessions 1,4",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.runTokenBench(cmd.Context(), bench.at(args))
		},
	}
	lineFlag(benchCmd, &bench.line)
	benchCmd.Flags().Float64Var(&bench.seconds, "seconds", 2, "how long each measurement takes")
	benchCmd.Flags().IntSliceVar(&bench.sessions, "sessions", []int{1, 2, 4, 8}, "numbers of sessions to measure with")
	return parent("token", "PKCS#11 tokens", listCmd, showCmd, initCmd, doctorCmd, benchCmd, newCounter(a))
}

// at takes the URI that stands behind a command.
func (o *tokenOptions) at(args []string) *tokenOptions {
	if len(args) > 0 {
		o.store = args[0]
	}
	return o
}

// tokenURI returns the token's key URI and the directory that relative paths in it count from.
func (a *app) tokenURI(o *tokenOptions) (hsm.URI, string, *line, error) {
	var none hsm.URI
	raw, base := o.store, ""
	var l *line
	var err error
	switch {
	case raw != "" && o.line != "":
		return none, "", nil, usageError{errors.New("--line and a URI exclude each other")}
	case raw != "":
		if base, err = os.Getwd(); err != nil {
			return none, "", nil, err
		}
	default:
		if l, err = a.loadLine(o.line); err != nil {
			return none, "", nil, err
		}
		raw, base = l.Store, l.dir
		o.store = raw
	}
	uri, err := hsm.ParseURI(raw)
	if err != nil {
		return none, "", nil, usageError{err}
	}
	for _, w := range uri.Warnings() {
		a.note("warning: %s", w)
	}
	if uri.Scheme != hsm.SchemePKCS11 {
		return none, "", nil, hint(usageError{fmt.Errorf("%s is no PKCS#11 token", uri)}, "touchmark key list shows the keys of other stores")
	}
	return uri, base, l, nil
}

func (a *app) runTokenList(ctx context.Context, o *tokenOptions) error {
	m, err := pkcs11.Inspect(ctx, hsm.URI{Scheme: hsm.SchemePKCS11, ModulePath: o.module})
	if err != nil {
		return err
	}
	if a.json {
		for _, t := range m.Tokens {
			if err := a.printJSON(struct {
				pkcs11.Token
				URI string `json:"uri,omitempty"`
			}{t, tokenURIText(t, m.Path)}); err != nil {
				return err
			}
		}
		return nil
	}
	var rows [][]string
	for _, t := range m.Tokens {
		label := t.Label
		if !t.Initialized {
			label = "(blank)"
		}
		rows = append(rows, []string{label, t.Serial, t.Manufacturer, t.Model, t.Firmware, string(t.UserPIN)})
	}
	if err := a.table([]string{"LABEL", "SERIAL", "MANUFACTURER", "MODEL", "FIRMWARE", "USER PIN"}, rows); err != nil {
		return err
	}
	a.note("%s, %s", m.Description, m.Version)
	return nil
}

func tokenURIText(t pkcs11.Token, module string) string {
	if !t.Initialized {
		return ""
	}
	return t.URI(module).String()
}

func (a *app) runTokenShow(ctx context.Context, o *tokenOptions) error {
	uri, _, _, err := a.tokenURI(o)
	if err != nil {
		return err
	}
	m, t, can, err := pkcs11.Examine(ctx, uri)
	if err != nil {
		return err
	}
	if a.json {
		m.Tokens = nil
		return a.printJSON(map[string]any{"module": m, "token": t, "uri": t.URI(m.Path).String(), "capabilities": can})
	}
	rows := [][]string{
		{"Token", t.Label}, {"  serial", t.Serial}, {"  maker", t.Manufacturer + ", " + t.Model}, {"  firmware", t.Firmware},
		{"  user PIN", string(t.UserPIN)}, {"  SO PIN", string(t.SOPIN)}, {"  sessions", sessionsText(t)}, {"  free memory", octetsText(t.FreeMemory)},
		{"Module", m.Path}, {"  maker", m.Manufacturer}, {"  description", m.Description}, {"  version", m.Version + " (PKCS#11 " + m.Cryptoki + ")"},
		{"Key URI", t.URI(m.Path).String()},
	}
	if err := a.table(nil, rows); err != nil {
		return err
	}
	fmt.Fprintln(a.out)
	rows = nil
	for _, c := range can {
		rows = append(rows, []string{string(c.Algorithm), c.Operation, yesNo(c.Can), strings.Join(c.Mechanisms, ", "), c.Fallback})
	}
	return a.table([]string{"KEYS", "OPERATION", "CAN", "MECHANISMS", "WORKED AROUND BY"}, rows)
}

func sessionsText(t *pkcs11.Token) string {
	switch {
	case t.MaxSessions == nil:
		return "it does not say"
	case *t.MaxSessions == 0:
		return "no limit"
	}
	return fmt.Sprintf("at most %d", *t.MaxSessions)
}

func octetsText(n *uint) string {
	if n == nil {
		return "it does not say"
	}
	return fmt.Sprintf("%d octets", *n)
}

func (a *app) runTokenInit(ctx context.Context, o *tokenOptions) error {
	uri, base, _, err := a.tokenURI(o)
	if err != nil {
		return err
	}
	if uri.Token == "" {
		return usageError{errors.New("the URI names no label for the token: want pkcs11:token=LABEL")}
	}
	cfg := hsm.PINConfig{Base: base, Env: a.env, Prompt: func(ctx context.Context, what string) (hsm.Secret, error) { return a.askNew(ctx, what) }}
	t, err := pkcs11.Init(ctx, pkcs11.InitConfig{URI: uri, Serial: o.serial,
		SOPIN:   func(ctx context.Context) (hsm.Secret, error) { return uri.ResolveSOPIN(ctx, o.soPIN, cfg) },
		UserPIN: func(ctx context.Context) (hsm.Secret, error) { return uri.ResolvePIN(ctx, cfg) }})
	if errors.Is(err, hsm.ErrExists) {
		return hint(err, "touchmark never erases a token: choose another label, or use the maker's tool")
	}
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(map[string]any{"token": t, "uri": t.URI(uri.ModulePath).String()})
	}
	fmt.Fprintf(a.out, "Token %s is ready (serial %s)\n%s\n", t.Label, t.Serial, t.URI(uri.ModulePath))
	return nil
}
