// Command touchmark gives devices their identity on the factory line, carries the news of it out in a signed bundle, and
// runs the registration service that welcomes them.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	// What is alive at once is small, a few megabytes of devices in work: looking for garbage at each doubling of that costs
	// some percent of the processor and saves no memory to speak of.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(200)
	}
	os.Exit(run(context.Background(), os.Args[1:], stdio{in: os.Stdin, out: os.Stdout, err: os.Stderr, env: os.LookupEnv}))
}

// version is set by release builds; otherwise the build information says what there is to say.
var version string

func versionText() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// run is the whole program: it returns the exit code.
func run(ctx context.Context, args []string, std stdio) int {
	// The first signal asks everything to stop; a second one, with the handler gone, ends the process at once.
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)

	app := &app{stdio: std}
	root := newRoot(app)
	root.SetArgs(args)
	root.SetIn(std.in)
	root.SetOut(std.out)
	root.SetErr(std.err)
	err := root.ExecuteContext(ctx)
	return app.report(ctx, err)
}

// app is what every command is given: the streams and the flags that all of them have.
type app struct {
	stdio
	json    bool
	quiet   bool
	noInput bool
	color   string
	tpmAuth tpmAuth
}

var colorModes = []string{"auto", "always", "never"}

func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "touchmark",
		Short: "Device identities: minted on the factory line, welcomed in the field",
		Long: `touchmark gives every device its identity on the factory line, carries the news of it out of the factory in one
signed bundle, and welcomes the device when it first powers on.

The journey:  init → mint → (bundle) → serve → import → register`,
		Example: `  touchmark init line-3 --id-scope 0ne00112233
  touchmark mint --line line-3 --profile x509-group --serials serials.csv --out stamps --bundle monday.tmb
  touchmark serve --data service --hub hub-a.example.net`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		DisableAutoGenTag: true,
		Version:           versionText(),
		Args:              noVerb,
		RunE:              func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if !slices.Contains(colorModes, a.color) {
				return usageError{fmt.Errorf("--color %s: want %s", a.color, strings.Join(colorModes, ", "))}
			}
			return nil
		},
	}
	root.SetVersionTemplate("touchmark {{.Version}}\n")
	f := root.PersistentFlags()
	f.BoolVar(&a.json, "json", false, "print one JSON object, or one per line for lists")
	f.BoolVar(&a.quiet, "quiet", false, "no progress on stderr")
	f.BoolVar(&a.noInput, "no-input", false, "never ask on the terminal")
	f.StringVar(&a.color, "color", colorModes[0], "colour on a terminal: "+strings.Join(colorModes, ", "))
	_ = root.RegisterFlagCompletionFunc("color", cobra.FixedCompletions(colorModes, cobra.ShellCompDirectiveNoFileComp))
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w\nusage: %s", err, cmd.UseLine())}
	})
	for _, g := range []struct {
		id, title string
		commands  []*cobra.Command
	}{
		{"journey", "The journey:", []*cobra.Command{newInit(a), newMint(a), newStation(a), newServe(a), newImport(a), newRegister(a)}},
		{"factory", "The factory's toolkit:", []*cobra.Command{newKey(a), newToken(a), newTPM(a), newCert(a), newData(a), newCA(a), newOrder(a), newUnit(a),
			newOperator(a), newLabel(a), newStamp(a), newLedger(a), newBundle(a)}},
		{"service", "Operators of a service:", []*cobra.Command{newEnrollment(a), newGroup(a), newRegistration(a), newExport(a), newDiagnose(a), newReconcile(a),
			newUsage(a), newAudit(a), newScope(a), newHub(a), newPolicy(a), newCertificate(a), newStore(a), newBackup(a), newRestore(a)}},
		{"developers", "Developers of devices:", []*cobra.Command{newFault(a), newLoad(a)}},
	} {
		root.AddGroup(&cobra.Group{ID: g.id, Title: g.title})
		for _, c := range g.commands {
			c.GroupID = g.id
			root.AddCommand(c)
		}
	}
	root.AddCommand(newVersion(a), newMan(a))
	root.AddCommand(exitCodesTopic, environmentTopic, hsmTopic, technicianTopic, lineTopic, ownerTopic) // pages of the factory
	root.AddCommand(issuersTopic, emulatorTopic, limitsTopic, proxiesTopic, monitoringTopic)            // of the doors
	root.AddCommand(
		operatingTopic, migrationTopic, managementTopic,
		allocationTopic, hubsTopic,
		accessTopic, scopesTopic,
		builtinHubTopic,
	)
	root.SetHelpCommand(newHelp(root))
	wrapUsage(root)
	root.SetUsageTemplate(usageTemplate(root))
	root.SetHelpFunc(printHelp)
	return root
}

// newHelp is cobra's, but that it does not pass over a page that there is not.
func newHelp(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use: "help [COMMAND | PAGE]", Short: "Help about a command, or one of the pages",
		ValidArgsFunction: func(_ *cobra.Command, args []string, typed string) (names []string, _ cobra.ShellCompDirective) {
			if c, _, err := root.Find(args); err == nil {
				for _, sub := range c.Commands() {
					if strings.HasPrefix(sub.Name(), typed) && !sub.Hidden {
						names = append(names, cobra.CompletionWithDesc(sub.Name(), sub.Short))
					}
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(_ *cobra.Command, args []string) error {
			c, rest, err := root.Find(args)
			if err != nil || len(rest) > 0 {
				return hint(usageError{fmt.Errorf("there is no page %q", strings.Join(args, " "))}, "touchmark --help lists commands and pages")
			}
			c.InitDefaultHelpFlag()
			c.InitDefaultVersionFlag()
			return c.Help()
		},
	}
}

// wrapUsage marks what cobra says about arguments as wrong usage.
func wrapUsage(c *cobra.Command) {
	if check := c.Args; check != nil {
		c.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return usageError{fmt.Errorf("%w\nusage: %s", err, cmd.UseLine())}
			}
			return nil
		}
	}
	for _, sub := range c.Commands() {
		wrapUsage(sub)
	}
}

func newVersion(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if a.json {
				return a.printJSON(map[string]any{"version": versionText(), "pkcs11": cgoBuild})
			}
			_, err := fmt.Fprintln(a.out, "touchmark", versionText())
			return err
		},
	}
}

// parent returns a command that only holds others.
func parent(use, short string, subs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use: use, Short: short, Args: noVerb,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return hint(usageError{fmt.Errorf("%s what? One of %s", cmd.CommandPath(), verbs(cmd))}, "%s --help tells more", cmd.CommandPath())
		},
	}
	c.AddCommand(subs...)
	return c
}

func verbs(c *cobra.Command) string {
	var names []string
	for _, s := range c.Commands() {
		names = append(names, s.Name())
	}
	return strings.Join(names, ", ")
}

// noVerb is cobra.NoArgs for a command that only holds others: who called for one that there is not is told of those that there are,
// or, of the many of the whole program, of those that are spelt like it.
func noVerb(c *cobra.Command, args []string) error {
	err := cobra.NoArgs(c, args)
	if err == nil || c.HasParent() {
		return hint(err, "there are %s", verbs(c))
	}
	c.SuggestionsMinimumDistance = 2
	if near := c.SuggestionsFor(args[0]); len(near) > 0 {
		return hint(err, "there is %s; touchmark --help shows all commands", strings.Join(near, ", "))
	}
	return hint(err, "touchmark --help shows the commands")
}
