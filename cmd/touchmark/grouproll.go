package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/operator"
)

type rollOptions struct {
	serviceOptions
	key, certificate, caName string
	dryRun, yes              bool
}

const rollText = ` has three states, and the service itself says which one it is in, so the same command can be run at any time, after any interruption:

  fresh     the new one is not there. The first run puts it into the secondary slot: from then on the group admits devices with the
            old one and devices with the new one. Where another one was in that slot, it goes: devices that came in with it are shown, and
            nothing is done; of unknown ones it is taken that they use the primary.
  waiting   devices are being moved. Each run shows which ones came in with the old one last, and does nothing as long as there are some,
            or some of which nobody knows.
  done      the new one has taken the place of the old one, which admits nobody any more.

touchmark keeps with each registration what let the device in, for as long as there is the registration. It says of each device by
which slot that is now: primary, secondary, both where it makes no difference, or former for what was taken away before. It is unknown
of a device that registered before touchmark kept this, until it registers again. Azure keeps nothing of it: all devices are unknown
there, so make sure otherwise that all have the new one, and say --yes. Devices that have not registered yet are on no list: those
that wait somewhere with the old one are shut out too.

--yes goes on regardless of devices that use what goes: they are shut out until they are moved. --dry-run shows the plan.`

func newGroupRoll(a *app, ca bool) *cobra.Command {
	o := &rollOptions{}
	c := &cobra.Command{
		Use: "roll-key NAME --new-key FILE --service FILE", Short: "Roll a group's symmetric key over to a new one, step by step", Args: cobra.ExactArgs(1),
		Long: "A roll-over of a key" + rollText + `

The new key is in the file that --new-key names, base64; the first run makes it there (mode 0600). Give it to the line that derives devices'
keys, and delete the file in the end.`,
		Example: "  touchmark group roll-key pumps --new-key pumps-2027.key --service service/owner.connection --dry-run\n  touchmark group roll-key pumps --new-key pumps-2027.key --service service/owner.connection",
	}
	f := c.Flags()
	if ca {
		c.Use, c.Short = "roll-ca NAME (--certificate FILE | --ca-name NAME) --service FILE", "Roll a group's CA over to a new one, step by step"
		c.Long = "A roll-over of a CA" + rollText + `

The certificate is that of the new CA, PEM or DER. On Azure it has to be verified there first. A device below an intermediate uses the
CA that its chain led to. A CA that was renewed, with the same name and key, is the same one as soon as the new certificate counts: nobody
has to be moved.

A group that names its CAs among the certificates of the service (group create --ca-name) is rolled over to another name: put the
certificate there first (touchmark certificate create), verify it, and say --ca-name.`
		c.Example = "  touchmark group roll-ca pumps --certificate issuing-2027.pem --service service/owner.connection\n  touchmark group roll-ca pumps --ca-name issuing-2027 --service service/owner.connection"
		f.StringVar(&o.certificate, "certificate", "", "certificate of the new CA")
		f.StringVar(&o.caName, "ca-name", "", "name of the new CA's certificate at the service, for a group that names its CAs")
		c.MarkFlagsMutuallyExclusive("certificate", "ca-name")
		c.MarkFlagsOneRequired("certificate", "ca-name")
	} else {
		f.StringVar(&o.key, "new-key", "", "file with the new key; made if it is not there (required)")
		_ = c.MarkFlagRequired("new-key")
	}
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkID(operator.Group, args[0]); err != nil {
			return err
		}
		return a.onService(cmd.Context(), &o.serviceOptions, func(ctx context.Context, svc *service) error { return a.runGroupRoll(ctx, svc, args[0], o) })
	}
	o.serviceOptions.flags(c)
	f.BoolVar(&o.dryRun, "dry-run", false, "show the plan and who uses what, and change nothing")
	f.BoolVar(&o.yes, "yes", false, "go on although devices are shut out by it")
	return c
}

// A rollReport is what a run of a roll-over did and found.
type rollReport struct {
	Group  string             `json:"group"`
	Before operator.RollState `json:"before"`
	State  operator.RollState `json:"state"`
	// Devices counts what the group's devices came in with last, before the step; Told says whether the service tells that. Shut are the
	// first of those that need what the step takes away.
	Devices map[string]int `json:"devices"`
	Told    bool           `json:"told,omitempty"`
	Shut    []operator.Use `json:"shut,omitempty"`
	DryRun  bool           `json:"dryRun"`
}

func (a *app) runGroupRoll(ctx context.Context, svc *service, name string, o *rollOptions) error {
	roll, err := a.openRoll(ctx, svc, name, o)
	if err != nil {
		return err
	}
	r := &rollReport{Group: roll.Group, Before: roll.State, State: roll.State, Devices: make(map[string]int), DryRun: o.dryRun}
	if roll.State != operator.RollDone {
		progress, n := a.newProgress("", 0), 0
		var err error
		r.Told, err = roll.Uses(ctx, func(u operator.Use) error {
			r.Devices[u.Slot]++
			n++
			progress.say(func() string { return fmt.Sprintf("looking at devices: %d", n) })
			// Before the first step nothing is known to be in the secondary slot, unless the service says so.
			if (u.Slot == roll.Slot() || u.Slot == operator.SlotUnknown && roll.State == operator.RollWaiting) && len(r.Shut) < maxNamed {
				r.Shut = append(r.Shut, u)
			}
			return nil
		})
		progress.clear()
		if err != nil {
			return err
		}
	}
	stop := len(r.Shut) > 0 && !o.yes
	if !o.dryRun && !stop {
		if err := roll.Next(ctx); err != nil {
			if errors.Is(err, operator.ErrChanged) {
				return hint(err, "somebody else changed the group just now: look at it, and run the same command again")
			}
			return err
		}
		r.State = roll.State
	}
	if err := a.printRoll(r, roll, stop); err != nil || o.dryRun {
		return err
	}
	switch {
	case stop && !r.Told:
		return hint(partialError{error: fmt.Errorf("this service does not tell which devices of group %s still use what this step takes away", name)},
			"make sure in another way that all of them have the new one, then run the same command again with --yes")
	case stop && r.Devices[roll.Slot()] == 0:
		return hint(partialError{error: fmt.Errorf("nobody knows whether devices of group %s still use what this step takes away: they registered before the service kept that", name)},
			"have them register and run the same command again; --yes shuts out those that use it")
	case stop:
		return hint(partialError{error: fmt.Errorf("devices of group %s still use what this step takes away", name)}, "move them and run the same command again; --yes shuts them out")
	case r.State == operator.RollWaiting:
		a.note("now move the devices, then run the same command again")
	}
	return nil
}

func (a *app) openRoll(ctx context.Context, svc *service, name string, o *rollOptions) (*operator.Roll, error) {
	if o.certificate != "" {
		b, err := readSmall(o.certificate)
		if err != nil {
			return nil, usageError{fmt.Errorf("reading the new certificate: %w", err)}
		}
		cert, err := operator.Certificate(b)
		if err != nil {
			return nil, usageError{fmt.Errorf("%s: %w", o.certificate, err)}
		}
		roll, err := svc.RollCA(ctx, name, cert)
		if errors.Is(err, operator.ErrCAByName) {
			err = hint(err, "put the new CA's certificate into the service (touchmark certificate create NAME), verify it, and say --ca-name NAME instead of --certificate")
		}
		return roll, err
	}
	if o.caName != "" {
		roll, err := svc.RollCAName(ctx, name, o.caName)
		if errors.Is(err, operator.ErrCAByCertificate) {
			err = hint(err, "say --certificate FILE with the certificate of the new CA instead of --ca-name")
		}
		return roll, err
	}
	if _, err := os.Stat(o.key); errors.Is(err, fs.ErrNotExist) {
		b := make([]byte, 64)
		_, _ = rand.Read(b) // crypto/rand.Read never fails
		text := base64.StdEncoding.EncodeToString(b)
		if roll, err := svc.RollKey(ctx, name, text); o.dryRun || err != nil {
			return roll, err // no file where there is nothing to roll
		}
		if err := writeFile(o.key, []byte(text+"\n"), 0o600, false); err != nil {
			return nil, err
		}
		a.note("made a new key in %s", o.key)
	}
	key, err := a.readKeyFile("--new-key", o.key)
	if err != nil {
		return nil, err
	}
	return svc.RollKey(ctx, name, key)
}

func (a *app) printRoll(r *rollReport, roll *operator.Roll, stop bool) error {
	if a.json {
		return a.printJSON(r)
	}
	plan := map[operator.RollState]string{
		operator.RollFresh:   "put the new one beside the old one, into the secondary slot",
		operator.RollWaiting: "put the new one into the primary slot too: the old one admits nobody any more",
		operator.RollDone:    "nothing is left to do",
	}
	rows := [][]string{{"Group", r.Group}, {"  state", string(r.State)}}
	if r.DryRun || stop {
		rows = append(rows, []string{"  next step", plan[r.State]})
	}
	for _, by := range [][2]string{{operator.SlotPrimary, "by the primary"}, {operator.SlotSecondary, "by the secondary"}, {operator.SlotBoth, "by both"},
		{operator.SlotFormer, "by a former one"}, {operator.SlotUnknown, "unknown"}} {
		if n := r.Devices[by[0]]; n > 0 {
			rows = append(rows, []string{"  devices " + by[1], fmt.Sprint(n)})
		}
	}
	if err := a.table(nil, rows); err != nil || len(r.Shut) == 0 {
		return err
	}
	rows = nil
	for _, u := range r.Shut {
		rows = append(rows, []string{u.RegistrationID, u.Slot, shortTime(u.LastSeen)})
	}
	fmt.Fprintln(a.out)
	return a.table([]string{"DEVICE", "CAME IN BY", "LAST SEEN"}, rows)
}
