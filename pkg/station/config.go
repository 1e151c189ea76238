package station

import (
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/fixture"
	"github.com/touchmark/touchmark/pkg/label"
	"github.com/touchmark/touchmark/pkg/settings"
)

// Config is station.toml, beside a line's touchmark.toml. Its comments are the manual. Commands are lists of words and never go
// through a shell; words may have fields in braces: {serial}, {registration-id}, {head}, {dir} (the directory of the unit's
// stamp), the columns of the unit, and the fields of its head. Secrets are in files of {dir} only.
type Config struct {
	// profile is what the station makes: a profile of the line. Required.
	Profile string `toml:"profile"`
	// heads is how many units are worked on at once; 1 by default. [[head]] says more of each.
	Heads int `toml:"heads"`
	// tries is how often one unit may fail before it goes to the rework bin, whatever the shift; 3 by default.
	Tries int `toml:"tries"`
	// disk-free is how many MiB must be free where the ledger and the stamps are, before a unit is started; 100 by default.
	DiskFree int64 `toml:"disk-free"`
	// language of the screen: en, de, es, vi, zh; the environment's by default.
	Language string `toml:"language"`
	// operators is the file that names the badges; touchmark operator writes it. Without it any badge will do.
	Operators string `toml:"operators"`
	// leads-only lists functions that need a lead's badge: "rework", "scrap", "reprint".
	LeadsOnly []string `toml:"leads-only"`
	// keep-stamps leaves the unit's directory after PASS. By default it is taken away once the device was flashed, so that its key is in
	// one place only; where nothing is flashed the directory is the device's storage and stays.
	KeepStamps bool `toml:"keep-stamps"`
	// warn-left lights a lamp when the order has fewer units left; 50 by default.
	WarnLeft int64 `toml:"warn-left"`
	// fields that every unit has, for columns which the profile names.
	Fields map[string]string `toml:"fields"`

	// probe asks the board what it is: the command prints JSON or key=value lines, which become fields.
	Probe struct {
		Tool
		// expect holds what the board must answer, by key: product = "pump-3". {product} is the order's.
		Expect map[string]string `toml:"expect"`
	} `toml:"probe"`
	// flash lists the commands that write the device, in their order.
	Flash []Tool `toml:"flash"`
	// readback lists the commands that read the device; what each prints, or writes to {readback}, must be a file of the stamp.
	ReadBack []struct {
		Tool
		// compare is the file of {dir} that must come back.
		Compare string `toml:"compare"`
	} `toml:"readback"`
	// challenge has the device sign with its new key: the message is on standard input and {nonce} in hex; the command prints the
	// signature in base64 or hex. Devices with symmetric keys answer with HMAC-SHA256.
	Challenge Tool `toml:"challenge"`
	// register tries the identity against a service on the line, as the device would. The key must be in {dir}.
	Register struct {
		Endpoint string `toml:"endpoint"` // host:port
		CA       string `toml:"ca"`       // PEM file
		Protocol string `toml:"protocol"` // "https" (default), "mqtt" or "amqp"
	} `toml:"register"`
	Label struct {
		// template of the label: "unit-50x25", "tiny-30x10", "traveller-100x50", or a file in the line's templates folder.
		Template string `toml:"template"`
		// printer is where labels go: "tcp:10.0.0.7:9100", "file:PATH", "dir:PATH", "serial:/dev/ttyUSB0", "command:lp -d zebra".
		Printer string `toml:"printer"`
		// format is "zpl" (default), "png" or "pdf".
		Format string `toml:"format"`
		// scan-back asks for the label to be scanned before PASS; within scan-seconds, 120 by default.
		ScanBack    bool `toml:"scan-back"`
		ScanSeconds int  `toml:"scan-seconds"`
	} `toml:"label"`
	Head []struct {
		// fields of the head, for commands and columns: port = "/dev/ttyUSB0".
		Fields map[string]string `toml:"fields"`
		// env lists environment variables for the head's commands: "NAME=value", or "NAME" to hand one on.
		Env []string `toml:"env"`
		// printer of the head, where it has its own.
		Printer string `toml:"printer"`
	} `toml:"head"`
	Hooks struct {
		// on-pass and on-fail are commands that are told of each verdict; the event is JSON on standard input.
		OnPass  []string `toml:"on-pass"`
		OnFail  []string `toml:"on-fail"`
		Webhook []struct {
			Name       string   `toml:"name"`        // lower-case letters, digits and -
			URL        string   `toml:"url"`         // https, or http to this machine
			SecretFile string   `toml:"secret-file"` // key of the signature
			CA         string   `toml:"ca"`          // PEM file, where the system's roots do not do
			Kinds      []string `toml:"kinds"`       // "pass", "fail", "rework", "scrap", "reprint", "shift"; all by default
		} `toml:"webhook"`
	} `toml:"hooks"`
	Metrics struct {
		// file gets the shift's numbers in OpenMetrics form, every few seconds.
		File string `toml:"file"`
		// listen serves them, and the shift's page: "127.0.0.1:9464".
		Listen string `toml:"listen"`
	} `toml:"metrics"`
	// golden is the file with the golden sample: what a reserved serial looks like on this line, accepted by an engineer
	// (touchmark station golden). Each shift starts by holding the line against it; empty means it does not.
	Golden string `toml:"golden"`

	heads []headSetup
	probe *fixture.Command
	flash []*fixture.Command
	back  []*fixture.Command
	prove *fixture.Command
}

// A Tool is a command of the fixture.
type Tool struct {
	// command is the program and its arguments.
	Command []string `toml:"command"`
	// timeout such as "90s"; a minute by default.
	Timeout string `toml:"timeout"`
	// env lists environment variables: "NAME=value", or "NAME" to hand one on.
	Env []string `toml:"env"`
}

type headSetup struct {
	fields  map[string]string
	env     []string
	printer *label.Printer
}

const (
	maxConfig = 256 << 10
	maxHeads  = 64
)

// ReadConfig reads station.toml strictly. The error names every fault, each with its line.
func ReadConfig(name string, r io.Reader) (*Config, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxConfig+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	if len(b) > maxConfig {
		return nil, fmt.Errorf("%s is larger than %d octets", name, maxConfig)
	}
	c := &Config{}
	faults := settings.Decode(name, b, c)
	c.check(faults)
	return c, faults.Err()
}

func (c *Config) check(f *settings.Faults) {
	if c.Profile == "" {
		f.Key("profile", "profile is missing: what does the station make?")
	}
	number := func(key string, v *int, min, otherwise, max int) {
		if *v == 0 {
			*v = otherwise
		}
		if *v < min || *v > max {
			f.Key(key, "%s is %d: want %d to %d", key, *v, min, max)
		}
	}
	number("heads", &c.Heads, 1, max(1, len(c.Head)), maxHeads)
	number("tries", &c.Tries, 1, 3, 100)
	number("label.scan-seconds", &c.Label.ScanSeconds, 1, 120, 3600)
	if c.DiskFree == 0 {
		c.DiskFree = 100
	}
	if c.WarnLeft == 0 {
		c.WarnLeft = 50
	}
	if len(c.Head) > c.Heads {
		f.Key("head", "there are %d tables [[head]] for %d heads", len(c.Head), c.Heads)
	}
	if c.LeadsOnly != nil && c.Operators == "" {
		f.Key("leads-only", "leads-only needs operators: without them every badge is a lead's")
	}
	for _, l := range c.LeadsOnly {
		if !slices.Contains([]Function{Rework, Scrap, Reprint}, Function(l)) {
			f.Key("leads-only", "leads-only: %q is no function: rework, scrap, reprint", l)
		}
	}
	tool := func(key string, t Tool) *fixture.Command {
		if t.Command == nil {
			return nil
		}
		cmd, err := fixture.Parse(t.Command, fixture.Names{Any: true, Secret: []string{"private-key", "symmetric-key"}})
		if err == nil {
			err = fixture.CheckEnv(t.Env)
		}
		if err != nil {
			f.Key(key, "%s: %v", key, err)
			return nil
		}
		cmd.Env = t.Env
		if t.Timeout != "" {
			if cmd.Timeout, err = time.ParseDuration(t.Timeout); err != nil || cmd.Timeout <= 0 || cmd.Timeout > time.Hour {
				f.Key(key, "%s: timeout %q: want a time such as \"90s\", an hour at most", key, t.Timeout)
			}
		}
		return cmd
	}
	c.probe = tool("probe", c.Probe.Tool)
	if c.probe == nil && c.Probe.Expect != nil {
		f.Key("probe.expect", "probe.expect needs probe.command")
	}
	for _, t := range c.Flash {
		c.flash = append(c.flash, tool("flash", t))
	}
	for _, t := range c.ReadBack {
		c.back = append(c.back, tool("readback", t.Tool))
		if t.Compare == "" || strings.ContainsAny(t.Compare, "/\x00") {
			f.Key("readback", "readback: compare names a file of the stamp")
		}
	}
	c.prove = tool("challenge", c.Challenge)
	if p := c.Register.Protocol; p == "" {
		c.Register.Protocol = "https"
	} else if p != "https" && p != "mqtt" && p != "amqp" {
		f.Key("register.protocol", "register.protocol is %q: want https, mqtt or amqp", p)
	}
	if c.Label.Format == "" {
		c.Label.Format = string(label.ZPL)
	}
	if !slices.Contains([]label.Format{label.ZPL, label.PNG, label.PDF}, label.Format(c.Label.Format)) {
		f.Key("label.format", "label.format is %q: want zpl, png or pdf", c.Label.Format)
	}
	if (c.Label.Template == "") != (c.Label.Printer == "") && len(c.Head) == 0 || c.Label.ScanBack && c.Label.Template == "" {
		f.Key("label.template", "a label needs label.template and label.printer")
	}
	c.setHeads(f)
	for i, w := range c.Hooks.Webhook {
		u, err := url.Parse(w.URL)
		if w.Name == "" || w.SecretFile == "" || err != nil || u.Host == "" {
			f.Key("hooks.webhook", "webhook %d: want a name, a url and a secret-file", i+1)
		}
	}
	if c.Metrics.Listen != "" && !strings.Contains(c.Metrics.Listen, ":") {
		f.Key("metrics.listen", "metrics.listen is %q: want host:port", c.Metrics.Listen)
	}
}

func (c *Config) setHeads(f *settings.Faults) {
	printer := func(key, target string) *label.Printer {
		if target == "" {
			return nil
		}
		p, err := label.ParsePrinter(target)
		if err != nil {
			f.Key(key, "%s: %v", key, err)
		}
		return p
	}
	shared := printer("label.printer", c.Label.Printer)
	for i := range min(c.Heads, maxHeads) {
		h := headSetup{printer: shared}
		if i < len(c.Head) {
			t := c.Head[i]
			h.fields, h.env = t.Fields, t.Env
			if err := fixture.CheckEnv(t.Env); err != nil {
				f.Key("head", "head %d: %v", i+1, err)
			}
			if t.Printer != "" {
				h.printer = printer("head", t.Printer)
			}
		}
		if h.printer == nil && c.Label.Template != "" {
			f.Key("label.printer", "head %d has no printer", i+1)
		}
		c.heads = append(c.heads, h)
	}
}

// Steps returns the steps that a unit goes through with this configuration.
func (c *Config) Steps() []Step {
	var steps []Step
	for _, s := range []struct {
		step Step
		on   bool
	}{
		{StepProbe, c.probe != nil}, {StepMint, true}, {StepFlash, c.flash != nil}, {StepReadBack, c.back != nil}, {StepChallenge, c.prove != nil},
		{StepRegister, c.Register.Endpoint != ""}, {StepLabel, c.Label.Template != ""}, {StepScan, c.Label.ScanBack}, {StepSeal, true},
	} {
		if s.on {
			steps = append(steps, s.step)
		}
	}
	return steps
}
