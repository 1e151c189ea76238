package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/device"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/load"
)

type loadOptions struct {
	connection, groupKeyFile, group string
	caCert, caKey                   string
	idScope, ca                     string
	https, mqtt, amqp               string
	protocols, attestations         string
	hubs                            []string
	devices, concurrency, sources   int
	rate                            float64
	ramp, duration, timeout         time.Duration
	reconnect, hostile, maxErrors   share
	resumeTLS, mine, force          bool
	watchPID                        int
	histogram                       string
}

// loadAttestations are what simulated devices can prove themselves by.
var loadAttestations = []string{"symmetric", "x509", "tpm"}

// share is a part of a whole, from 0 to 1, as a flag: 5% or 0.05.
type share float64

func (s *share) String() string { return strconv.FormatFloat(100*float64(*s), 'g', -1, 64) + "%" }
func (s *share) Type() string   { return "share" }
func (s *share) Set(text string) error {
	number, percent := strings.CutSuffix(text, "%")
	f, err := strconv.ParseFloat(number, 64)
	if percent {
		f /= 100
	}
	if err != nil || !(f >= 0 && f <= 1) {
		return errors.New("want a share, as 5% or 0.05")
	}
	*s = share(f)
	return nil
}

func newLoad(a *app) *cobra.Command {
	o := &loadOptions{reconnect: 0.2, maxErrors: 0.001}
	c := &cobra.Command{
		Use:   "load --connection FILE (--rate N | --concurrency N)",
		Short: "Put load on a registration service of one's own with simulated devices",
		Long: `load has many simulated devices register, checks every answer that they get, and measures how long they wait.

With --rate, devices call that often whatever the service makes of it, and their time counts from when they should have
called: a service that falls behind shows as latency. With --concurrency, so many are there at a time, which finds out how
many the service can take.

Devices need something to prove themselves by. With the owner's connection string, load makes enrollment groups of its own,
touchmark-load-…, and removes them with their registrations at the end. Or it is given the key of a symmetric-key group, or
the issuing CA of an X.509 group; then the registrations stay.

--hostile is the share of callers who mean harm: forged proofs, expired tokens, other scopes, other devices' operations, garbage,
silence, slowness, sizes. What each must be answered is checked, too. A wrong answer to anybody, or more errors than
--max-errors, is failure.

All callers come from one address, which a service takes for one caller: touchmark help limits tells what that means. TPMs are few,
since each is dear to make, and come again after four seconds: at high rates their share is smaller than their weight.

load calls nobody but this machine unless you say --i-own-this-server.`,
		Example: `  touchmark load --connection service/owner.connection --concurrency 20 --duration 30s
  touchmark load --connection service/owner.connection --rate 300 --duration 20m --protocols https=3,mqtt=5,mqtt-ws=2 --hostile 5%
  touchmark load --https localhost:8443 --mqtt localhost:8883 --ca service/ca.pem --id-scope 0ne00112233 --group-key-file pumps.key --rate 50`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.check(cmd.Flags().Changed); err != nil {
				return err
			}
			return a.runLoad(cmd.Context(), o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.connection, "connection", "", "file with the service's connection string, to make groups of its own with")
	f.StringVar(&o.groupKeyFile, "group-key-file", "", "file with the key of a symmetric-key group, in base64")
	f.StringVar(&o.group, "group", "", "name of that group, which the service must then tell devices")
	f.StringVar(&o.caCert, "ca-cert", "", "PEM file with the issuing CA of an X.509 group, and what goes behind it")
	f.StringVar(&o.caKey, "ca-key", "", "key URI of that CA's key")
	f.StringVar(&o.idScope, "id-scope", "", "ID scope of the service (default: with --connection, what the service says)")
	f.StringVar(&o.ca, "ca", "", "PEM file with the CA of the service's certificate (default: ca.pem beside --connection, else the system's)")
	f.StringVar(&o.https, "https", "", "HOST:PORT of HTTPS and of WebSockets (default: that of --connection)")
	f.StringVar(&o.mqtt, "mqtt", "", "HOST:PORT of MQTT (default: port 8883 beside HTTPS)")
	f.StringVar(&o.amqp, "amqp", "", "HOST:PORT of AMQP (default: port 5671 beside HTTPS)")
	f.StringVar(&o.protocols, "protocols", "https=1,mqtt=1", "protocols by weight: "+strings.Join(device.Protocols(), ", "))
	f.StringVar(&o.attestations, "attestations", "", "proofs by weight: "+strings.Join(loadAttestations, ", ")+" (default: all that there is something for)")
	f.StringArrayVar(&o.hubs, "hub", nil, "host name of a hub that may be assigned; again for more (default: any)")
	f.IntVar(&o.devices, "devices", 1000, "how many devices there are; they come again once all were there")
	f.Float64Var(&o.rate, "rate", 0, "how many call in a second")
	f.IntVar(&o.concurrency, "concurrency", 0, "how many are there at a time")
	f.DurationVar(&o.ramp, "ramp", 0, "how long it takes to come to that, at the beginning")
	f.DurationVar(&o.duration, "duration", time.Minute, "how long devices call")
	f.DurationVar(&o.timeout, "timeout", 30*time.Second, "how long a device waits")
	f.Var(&o.reconnect, "reconnect", "share of callers who were there before")
	f.Var(&o.hostile, "hostile", "share of callers who mean harm")
	f.Var(&o.maxErrors, "max-errors", "share of devices that may be left without an answer")
	f.BoolVar(&o.resumeTLS, "resume-tls", false, "devices that come again resume their TLS sessions, where the service lets them")
	f.IntVar(&o.sources, "sources", 0, "spread callers over so many addresses of 127.0.0.0/8, and hostile ones over others (Linux)")
	f.IntVar(&o.watchPID, "watch-pid", 0, "process of this machine, the service's, whose memory, files and processor time are watched (Linux)")
	f.StringVar(&o.histogram, "histogram", "", "file to write the latencies to, as CSV")
	f.BoolVar(&o.force, "force", false, "overwrite that file")
	f.BoolVar(&o.mine, "i-own-this-server", false, "the service may be elsewhere than on this machine: it is mine to put load on")
	c.MarkFlagsOneRequired("connection", "group-key-file", "ca-cert")
	c.MarkFlagsMutuallyExclusive("connection", "group-key-file")
	c.MarkFlagsMutuallyExclusive("connection", "ca-cert")
	c.MarkFlagsRequiredTogether("ca-cert", "ca-key")
	c.MarkFlagsOneRequired("rate", "concurrency")
	c.MarkFlagsMutuallyExclusive("rate", "concurrency")
	_ = c.RegisterFlagCompletionFunc("protocols", mixCompletions(device.Protocols()))
	_ = c.RegisterFlagCompletionFunc("attestations", mixCompletions(loadAttestations))
	return c
}

// check is wrong usage that shows before anything is done.
func (o *loadOptions) check(changed func(string) bool) error {
	switch {
	case changed("rate") && !(o.rate > 0 && o.rate <= 1e6):
		return usageError{fmt.Errorf("--rate %v: want how many call in a second, more than 0", o.rate)}
	case changed("concurrency") && o.concurrency < 1:
		return usageError{fmt.Errorf("--concurrency %d: want how many are there at a time, 1 at least", o.concurrency)}
	case o.devices < 1:
		return usageError{fmt.Errorf("--devices %d: want 1 at least", o.devices)}
	case o.duration <= 0 || o.ramp < 0 || o.ramp > o.duration:
		return usageError{fmt.Errorf("--duration %v, --ramp %v: want some time, and no longer ramp than that", o.duration, o.ramp)}
	case o.sources < 0 || o.sources > 250:
		return usageError{fmt.Errorf("--sources %d: want up to 250 addresses", o.sources)}
	}
	return nil
}

// mixCompletions completes the last name of a mix.
func mixCompletions(names []string) cobra.CompletionFunc {
	return func(_ *cobra.Command, _ []string, text string) ([]string, cobra.ShellCompDirective) {
		before := text[:strings.LastIndexByte(text, ',')+1]
		var all []string
		for _, n := range names {
			all = append(all, before+n)
		}
		return all, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	}
}

func (a *app) runLoad(ctx context.Context, o *loadOptions) (err error) {
	cfg := load.Config{Devices: o.devices, Rate: o.rate, Concurrency: o.concurrency, Ramp: o.ramp, Duration: o.duration, Timeout: o.timeout, Hubs: o.hubs,
		Reconnect: float64(o.reconnect), Hostile: float64(o.hostile), ResumeTLS: o.resumeTLS, Sources: o.sources, WatchPID: o.watchPID}
	if cfg.Protocols, err = load.ParseMix(o.protocols, device.Protocols()...); err != nil {
		return usageError{fmt.Errorf("--protocols: %w", err)}
	}
	if o.histogram != "" && !o.force && exists(o.histogram) {
		return usageError{fmt.Errorf("%s is there already: --force overwrites it", o.histogram)}
	}
	run := make([]byte, 4)
	if _, err := rand.Read(run); err != nil {
		return err
	}
	cfg.Prefix = "load-" + hex.EncodeToString(run)
	var svc *service
	if o.connection != "" {
		if svc, err = a.openService(o.connection, o.ca); err != nil {
			return err
		}
		if err := a.loopback(ctx, svc, o); err != nil {
			return err
		}
		cfg.RootCAs = svc.cfg.Roots
	} else if cfg.RootCAs, err = loadRoots(o.ca); err != nil {
		return err
	}
	if cfg.Endpoints, err = loadEndpoints(ctx, cfg.Protocols, o); err != nil {
		return err
	}
	own := &ownGroups{a: a, svc: svc, name: "touchmark-" + cfg.Prefix}
	if svc != nil {
		defer func() { err = errors.Join(err, own.remove(ctx)) }()
	}
	var closeKey func() error
	if cfg.Attestations, closeKey, err = a.loadCredentials(ctx, o, own); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeKey()) }()

	if n := cfg.Makes("tpm"); n > 0 {
		a.note("making %d TPMs, and an enrollment for each but %d that are not to be let in", n, load.Forgeries)
	}
	progress := a.newProgress("", 0)
	cfg.Progress = func(p load.Progress) {
		progress.say(func() string {
			return fmt.Sprintf("%v: %d devices, %.0f/s, %d waiting, p50 %v, p99 %v, %d errors, %d hostile, %d wrong answers", p.Elapsed.Round(time.Second), p.Done, p.Rate,
				p.Outstanding, p.P50.Round(100*time.Microsecond), p.P99.Round(100*time.Microsecond), p.Errors, p.Hostile, p.Wrong)
		})
	}
	rep, runErr := load.Run(ctx, cfg)
	progress.clear()
	if rep == nil {
		if ctx.Err() != nil {
			return runErr
		}
		return connectHint(runErr)
	}
	if err := a.printLoad(rep); err != nil {
		return err
	}
	if o.histogram != "" {
		if err := writeFile(o.histogram, histogramCSV(rep), 0o644, o.force); err != nil {
			return err
		}
	}
	if svc == nil {
		a.note("the registrations of %s-… stay at the service: nothing was given here that may remove them", cfg.Prefix)
	}
	help := loadHint(rep)
	switch {
	case runErr != nil:
		return runErr
	case rep.Wrong > 0:
		err = fmt.Errorf("%d answers were wrong", rep.Wrong)
	case rep.ErrorShare > float64(o.maxErrors):
		err = fmt.Errorf("%.3g%% of the devices were left without an answer, and --max-errors is %s", 100*rep.ErrorShare, o.maxErrors.String())
	case rep.Total.Count == 0:
		return errors.New("no device came to an end")
	}
	switch {
	case help == "":
	case err != nil:
		return hint(err, "%s", help)
	default:
		a.note("hint: %s", help)
	}
	return err
}

// loadHint says what a report is most likely about, when that is not the service's strength.
func loadHint(rep *load.Report) string {
	if rep.Total.Count > 0 && rep.Total.Wrongs[fmt.Sprintf("refused %d", int(dps.CodeUnauthorized))] == rep.Total.Count {
		return "every device was refused with 401002: is --id-scope the service's, and are the key or the CA those of a group of its?"
	}
	for kind := range rep.Total.Errors {
		if strings.HasPrefix(kind, "busy 429") {
			return "429 is the service's limits, not its strength: one device 1/s, one address 500/s. Start it with --no-limits or higher --rate-per-…, or spread callers with --sources (touchmark help limits)"
		}
	}
	return ""
}

// loopback makes sure that the service API is on this machine, and is called where it was looked up.
func (a *app) loopback(ctx context.Context, svc *service, o *loadOptions) error {
	address := svc.Host()
	if _, _, err := net.SplitHostPort(address); err != nil {
		address = net.JoinHostPort(address, "443")
	}
	e, err := resolve(ctx, address, o)
	if err != nil {
		return err
	}
	svc.dial(func(ctx context.Context, _, _ string) (net.Conn, error) { return e.Dial(ctx, nil) })
	if o.https == "" {
		o.https = address
	}
	return nil
}

func resolve(ctx context.Context, address string, o *loadOptions) (*load.Endpoint, error) {
	e, err := load.Resolve(ctx, address, o.mine)
	if errors.Is(err, load.ErrNotLoopback) {
		return nil, hint(usageError{err}, "put load on servers of your own only; if this one is yours, say --i-own-this-server")
	}
	var unknown *net.DNSError
	if errors.As(err, &unknown) {
		return nil, connectHint(err)
	}
	if err != nil {
		return nil, usageError{err}
	}
	return e, nil
}

// loadEndpoints says where each protocol is spoken.
func loadEndpoints(ctx context.Context, protocols load.Mix, o *loadOptions) (map[string]*load.Endpoint, error) {
	beside := func(address, port string) string {
		if host, _, err := net.SplitHostPort(o.https); address == "" && err == nil {
			return net.JoinHostPort(host, port)
		}
		return address
	}
	at := map[string]string{"https": o.https, "mqtt": beside(o.mqtt, "8883"), "amqp": beside(o.amqp, "5671"), "mqtt-ws": o.https, "amqp-ws": o.https}
	all := make(map[string]*load.Endpoint)
	for _, p := range protocols {
		if at[p.Name] == "" {
			return nil, usageError{fmt.Errorf("nobody said where %s is spoken: name it with --https, --mqtt or --amqp", p.Name)}
		}
		var err error
		if all[p.Name], err = resolve(ctx, at[p.Name], o); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// loadCredentials returns how devices prove themselves.
func (a *app) loadCredentials(ctx context.Context, o *loadOptions, own *ownGroups) (all []load.Attestation, closeKey func() error, err error) {
	closeKey = func() error { return nil }
	have := loadAttestations
	switch {
	case o.connection != "":
	case o.caCert == "":
		have = []string{"symmetric"}
	case o.groupKeyFile == "":
		have = []string{"x509"}
	}
	if o.attestations == "" {
		o.attestations = strings.Join(have, ",")
	}
	mix, err := load.ParseMix(o.attestations, have...)
	if err != nil {
		return nil, closeKey, usageError{fmt.Errorf("--attestations: %w", err)}
	}
	if o.connection != "" {
		all, err = own.make(ctx, mix, o)
		return all, closeKey, err
	}
	if o.idScope == "" {
		return nil, closeKey, usageError{errors.New("--id-scope is needed where no --connection says which service it is")}
	}
	if err := dps.CheckIDScope(o.idScope); err != nil {
		return nil, closeKey, usageError{err}
	}
	for _, w := range mix {
		switch w.Name {
		case "symmetric":
			key, err := readGroupKey(o.groupKeyFile)
			if err != nil {
				return nil, closeKey, err
			}
			all = append(all, load.Symmetric(o.idScope, o.group, w.Weight, key))
		case "x509":
			b, err := readSmall(o.caCert)
			if err != nil {
				return nil, closeKey, usageError{err}
			}
			chain, err := ca.ParseChain(b)
			if err != nil {
				return nil, closeKey, usageError{fmt.Errorf("%s: %w", o.caCert, err)}
			}
			key, done, err := a.openKeyURI(ctx, o.caKey, ".")
			if err != nil {
				return nil, closeKey, err
			}
			closeKey = done
			signer, err := hsm.SigningKeyOf(key)
			if err != nil {
				return nil, closeKey, errors.Join(err, done())
			}
			all = append(all, load.X509(o.idScope, w.Weight, chain, signer))
		}
	}
	return all, closeKey, nil
}

// readGroupKey reads a group's key as Azure's tools write it.
func readGroupKey(path string) ([]byte, error) {
	b, err := readSmall(path)
	if err != nil {
		return nil, usageError{fmt.Errorf("reading the group's key: %w", err)}
	}
	defer clear(b)
	key := make([]byte, base64.StdEncoding.DecodedLen(len(b)))
	n, err := base64.StdEncoding.Decode(key, bytes.TrimSpace(b))
	if err != nil || n < 16 || n > 64 {
		return nil, usageError{fmt.Errorf("%s is not a key of 16 to 64 octets in base64", path)}
	}
	return key[:n], nil
}

func histogramCSV(rep *load.Report) []byte {
	b := []byte("protocol,attestation,from_us,to_us,count\n")
	for _, l := range rep.Lines {
		l.Histogram.Buckets(func(from, to time.Duration, n uint64) bool {
			b = fmt.Appendf(b, "%s,%s,%d,%d,%d\n", l.Protocol, l.Attestation, from.Microseconds(), to.Microseconds(), n)
			return true
		})
	}
	return b
}

func sum(kinds map[string]uint64) (n uint64) {
	for _, k := range kinds {
		n += k
	}
	return n
}

func (a *app) printLoad(rep *load.Report) error {
	if a.json {
		return a.printJSON(rep)
	}
	ms := func(v float64) string { return strconv.FormatFloat(v, 'f', 1, 64) }
	latency := func(l load.Latency) []string { return []string{ms(l.P50), ms(l.P90), ms(l.P99), ms(l.P999), ms(l.Max)} }
	var rows [][]string
	for _, l := range append(slices.Clone(rep.Lines), rep.Total) {
		if l.Protocol == "" {
			l.Protocol = "all"
		}
		row := append([]string{l.Protocol, l.Attestation, fmt.Sprint(l.Count), ms(l.Rate)}, latency(l.Latency)...)
		rows = append(rows, append(row, fmt.Sprint(sum(l.Errors)), fmt.Sprint(l.Wrong), fmt.Sprint(l.In>>10), fmt.Sprint(l.Out>>10)))
	}
	if err := a.table([]string{"PROTOCOL", "PROOF", "DEVICES", "RATE/s", "P50 ms", "P90", "P99", "P99.9", "MAX", "ERRORS", "WRONG", "KiB IN", "OUT"}, rows); err != nil {
		return err
	}
	section := func(header []string, rows [][]string) error {
		if len(rows) == 0 {
			return nil
		}
		fmt.Fprintln(a.out)
		return a.table(header, rows)
	}
	rows = nil
	for _, p := range rep.Phases {
		rows = append(rows, append([]string{p.Protocol, p.Name, fmt.Sprint(p.Count)}, latency(p.Latency)...))
	}
	if err := section([]string{"PROTOCOL", "STEP", "COUNT", "P50 ms", "P90", "P99", "P99.9", "MAX"}, rows); err != nil {
		return err
	}
	rows = nil
	for _, kind := range rep.Total.ErrorKinds() {
		rows = append(rows, []string{kind, fmt.Sprint(rep.Total.Errors[kind])})
	}
	if err := section([]string{"ERROR", "DEVICES"}, rows); err != nil {
		return err
	}
	rows = nil
	for _, h := range rep.Hostile {
		rows = append(rows, []string{h.Kind, fmt.Sprint(h.Count), fmt.Sprint(sum(h.Errors)), fmt.Sprint(h.Wrong)})
	}
	if err := section([]string{"HOSTILE", "CALLERS", "ERRORS", "WRONG"}, rows); err != nil {
		return err
	}
	rows = nil
	for _, w := range rep.Wrongs {
		rows = append(rows, []string{w})
	}
	if err := section([]string{"WRONG ANSWERS"}, rows); err != nil {
		return err
	}
	rows = [][]string{{"This client", fmt.Sprintf("%.2f of %d processors, callers sent off up to %s ms late (p99 %s), %d had to wait for a place", rep.Client.CPUs, rep.Client.Cores,
		ms(rep.Client.Late.Max), ms(rep.Client.Late.P99), rep.Client.Full)}}
	if w := rep.Watch; w != nil {
		rows = append(rows, []string{fmt.Sprintf("Process %d", w.PID), fmt.Sprintf("%.2f processors, memory %.1f MiB at first and %.1f at last (%+.1f%%), files %d and %d", w.CPU,
			float64(w.First.RSS)/(1<<20), float64(w.Last.RSS)/(1<<20), 100*w.Growth, w.First.Files, w.Last.Files)})
		if w.Err != "" {
			rows = append(rows, []string{"", "not seen to the end: " + w.Err})
		}
	}
	return section(nil, rows)
}
