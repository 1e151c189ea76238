package registration

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
)

// broken is a rule that a proof broke.
type broken struct{ rule, text string }

func (b *broken) Error() string { return b.text }

// because refuses by a rule that has a name.
func because(rule, format string, args ...any) *dps.Error {
	return refuse(&broken{rule, fmt.Sprintf(format, args...)})
}

// ruleOf names the rule that a refusal is by; empty where it has no name.
func ruleOf(err error) string {
	if b := new(broken); errors.As(err, &b) {
		return b.rule
	}
	for _, r := range []struct {
		err  error
		rule string
	}{
		{attest.ErrNoCertificate, "no-proof"}, {attest.ErrCommonName, "common-name"}, {attest.ErrValidity, "validity"}, {attest.ErrChain, "chain"},
		{attest.ErrMalformed, "token-malformed"}, {attest.ErrExpired, "token-expired"}, {attest.ErrSignature, "signature"}, {attest.ErrResource, "audience"},
		{attest.ErrTPMKey, "tpm-key"}, {errPublicAccess, "network-off"}, {ErrAddress, "address"},
	} {
		if errors.Is(err, r.err) {
			return r.rule
		}
	}
	return ""
}

// adviceOn says what to do about a rule.
var adviceOn = map[string]string{
	"no-proof":        "The device sent neither a client certificate nor a token: its TLS library may hold the certificate back, or a proxy in between ends TLS (touchmark help proxies).",
	"common-name":     "The common name of the device's certificate must be its registration ID, in any case of letters: register under that name, or issue another certificate.",
	"validity":        "Look at the clock of the device and of this service, and at the dates of every certificate of the chain.",
	"chain":           "No enrollment or group here has a CA that the chain leads to: let the device send its intermediate certificates, enroll the group with the CA that signs it, or start the service with --intermediate.",
	"token-malformed": "A device's token is SharedAccessSignature sr=…&sig=…&se=…, its values URL-encoded.",
	"token-expired":   "The token was past its end when it came: look at the device's clock, and at how long its tokens are good for.",
	"signature":       "The token was signed with another key. For an individual enrollment it is the enrollment's primary or secondary key; for a group the HMAC-SHA256 of the folded registration ID under the group's key; for a TPM what the last challenge held. Keys are base64, and are decoded before use.",
	"audience":        "The token's sr must be IDSCOPE/registrations/REGISTRATION-ID of this very device.",
	"tpm-key":         "The TPM's keys are not ones that a challenge can be made for.",
	"public-key":      "The certificate's public key is of a kind that this service does not know: use one of ECDSA, RSA or Ed25519.",
	"ca-unverified":   "The CA is uploaded, and nobody has shown to have its key: touchmark certificate code, have the CA sign a certificate with that code as its common name, and touchmark certificate verify.",
	"ca-missing":      "No certificate of the scope vouches for the group's CA: upload it, or the root above it, with touchmark certificate create, and verify it. If it is there, let the device send its intermediate certificates too.",
	"address":         "An IP rule of the scope keeps the device's address out, or its address cannot be read: look at the rules, and at the proxies in between (touchmark help proxies).",
	"network-off":     "Public network access of the scope is disabled: only devices in the service's private networks are let in.",
	"no-enrollment":   "Enroll the device, or look whether its registration ID, its ID scope and the key that its group derives are spelt as they were in the factory.",
	"certificate":     "The enrollment names another certificate: put the new one into its secondary slot, or write the enrolled one into the device.",
	"kind":            "The enrollment attests in another way than the device does: an individual enrollment decides alone, and no group is asked any more.",
	"group-disabled":  "Enable the group to let its devices in.",
	"blocked":         "An operator disabled the enrollment with this certificate: the device is to stay out, under whatever name.",
	"ended":           "The identity with this key was scrapped, returned or replaced: its key never registers again. Mint the device anew.",
	"closed":          "The group lets in only devices that a bundle named: import the bundle with this device, or open the group.",
	"operational":     "The device showed the certificate that it was issued for its hub: it must register with its own.",
	"endorsement-key": "The enrollment is for another TPM.",
	"challenge":       "The TPM has to ask for a challenge first, and to answer it within an hour.",
	"scope":           "The device has the ID scope of another service, or of one that is being deleted.",
	"untried":         "Nothing is wrong with the name: no attempt of the device has come here. Look at its ID scope, its endpoint and its network.",
}

// A Diagnosis is what is known of a device, and why it was refused.
type Diagnosis struct {
	RegistrationID string                 `json:"registrationId"`
	Enrollment     *Enrolled              `json:"enrollment"`
	Registration   *dps.RegistrationState `json:"registration"`
	// Admitted is what let it in when it last registered; nil where that is not known.
	Admitted *Admitted `json:"admitted,omitempty"`
	// Task is what hubs have yet to be told about it, Parent the edge device that it is to be below; nil for none. Orphans is where it
	// stays although it has gone on.
	Task    *TaskReport `json:"task,omitempty"`
	Parent  *KinReport  `json:"parent,omitempty"`
	Orphans []*Orphan   `json:"orphans,omitempty"`
	// Attempts are the last ones, the newest at the end.
	Attempts []*Attempt `json:"attempts"`
	// Trial is what would become of the certificates that were handed in; nil without.
	Trial *Trial `json:"trial,omitempty"`
	// Explanation says the same in sentences.
	Explanation []string `json:"explanation"`
}

// Enrolled is the enrollment that decides about a device.
type Enrolled struct {
	Kind        Kind   `json:"kind"`
	ID          string `json:"id"`
	Status      string `json:"status"` // "enabled" or "disabled"
	Attestation string `json:"attestation"`
}

// A Trial is a decision without effect.
type Trial struct {
	Result string `json:"result"` // "admitted", "disabled" or "refused"
	Group  string `json:"group,omitempty"`
	Rule   string `json:"rule,omitempty"`
	Reason string `json:"reason,omitempty"`
}

// Diagnose returns what is known of a device. With a chain, the leaf first, it also says what would become of a device that proved
// itself with it now; nothing is written. The log may be nil.
func (s *Service) Diagnose(ctx context.Context, registrationID string, log *Attempts, chain []*x509.Certificate) (*Diagnosis, error) {
	if err := dps.CheckRegistrationID(registrationID); err != nil {
		return nil, invalid("%v", err)
	}
	id := dps.Fold(registrationID)
	d := &Diagnosis{RegistrationID: registrationID, Attempts: []*Attempt{}}
	if log != nil {
		all, err := log.Of(ctx, s.scope, id)
		if err != nil {
			return nil, err
		}
		slices.Reverse(all)
		d.Attempts = append(d.Attempts, all...)
	}
	var device *Device
	err := s.cfg.Store.View(ctx, func(tx Tx) error {
		d.Enrollment, d.Registration = nil, nil
		r, err := found(tx.Registration(s.scope, id))
		if err != nil {
			return err
		}
		group := ""
		if r != nil {
			st := r.State
			st.TPM = nil // what only the device may open
			d.Registration, group = &st, r.Group
		}
		if d.Admitted, err = s.admitted(tx, r); err != nil {
			return err
		}
		if err := s.told(tx, id, d); err != nil {
			return err
		}
		if device, err = found(tx.Device(s.scope, id)); err != nil {
			return err
		}
		if device != nil && device.Group != "" {
			group = device.Group
		}
		record, err := found(tx.Record(s.scope, Individual, id))
		if record == nil && err == nil && group != "" {
			record, err = found(tx.Record(s.scope, Group, group))
		}
		if record == nil || err != nil {
			return err
		}
		doc, err := open(record)
		if err != nil {
			return err
		}
		b := doc.base()
		d.Enrollment = &Enrolled{Kind: record.Kind, ID: record.ID, Status: "enabled", Attestation: string(b.Attestation.Type)}
		if b.ProvisioningStatus == dps.EnrollmentDisabled {
			d.Enrollment.Status = "disabled"
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if chain != nil {
		if d.Trial, err = s.try(ctx, registrationID, chain); err != nil {
			return nil, err
		}
	}
	d.Explanation = d.explain(device)
	return d, nil
}

// told fills in what hubs have yet to be told of a device.
func (s *Service) told(tx Tx, id string, d *Diagnosis) error {
	d.Task, d.Parent, d.Orphans = nil, nil, nil
	t, err := found(tx.Task(s.scope, id))
	if err != nil {
		return err
	}
	if t != nil {
		r := t.report()
		d.Task = &r
	}
	k, err := found(tx.Kin(s.scope, id))
	if err != nil {
		return err
	}
	if k != nil {
		r := k.report()
		d.Parent = &r
	}
	orphans, err := tx.Orphans(s.scope, Orphan{ID: id}, 10)
	d.Orphans = slices.DeleteFunc(orphans, func(o *Orphan) bool { return o.ID != id })
	return err
}

// try judges a chain, and changes nothing.
func (s *Service) try(ctx context.Context, registrationID string, chain []*x509.Certificate) (*Trial, error) {
	req := &Request{IDScope: s.cfg.Scope, RegistrationID: registrationID, Proof: attest.Proof{Certificates: chain}}
	var v *verdict
	err := s.judging(ctx, req, func(tx Tx, req *Request) (err error) {
		v, err = s.judge(tx, req)
		return err
	})
	switch {
	case err != nil && dps.AsError(err).Code == dps.CodeUnauthorized:
		return &Trial{Result: "refused", Rule: ruleOf(err), Reason: cause(err)}, nil
	case err != nil:
		return nil, err
	case v.disabled:
		return &Trial{Result: "disabled", Group: v.group}, nil
	}
	return &Trial{Result: "admitted", Group: v.group}, nil
}

func cause(err error) string {
	if e := dps.AsError(err); e.Cause != nil {
		return e.Cause.Error()
	}
	return err.Error()
}

func (d *Diagnosis) explain(device *Device) (say []string) {
	add := func(format string, args ...any) { say = append(say, fmt.Sprintf(format, args...)) }
	switch e := d.Enrollment; {
	case e == nil:
		add("%s has no individual enrollment, and has not come in by a group.", d.RegistrationID)
	case e.Kind == Individual:
		add("It has an individual enrollment, which is %s and attests by %s.", e.Status, e.Attestation)
	default:
		add("It belongs to group %q, which is %s and attests by %s.", e.ID, e.Status, e.Attestation)
	}
	if d.Enrollment != nil && d.Enrollment.Status == "disabled" {
		add("An operator has to enable it before the device is let in.")
	}
	if device != nil && !device.Lives() {
		add("The factory said that this identity has ended (%s): %s", device.State, adviceOn["ended"])
	}
	if r := d.Registration; r != nil {
		switch r.Status {
		case dps.Assigned:
			add("It is registered: hub %s, device ID %s, since %s.", r.AssignedHub, r.DeviceID, r.LastUpdatedDateTimeUTC.UTC().Format(time.RFC3339))
		case dps.Failed:
			add("Its last registration failed: %s (%d).", r.ErrorMessage, r.ErrorCode)
		default:
			add("Its last registration is %q.", r.Status)
		}
		if t := d.Task; t != nil && t.State == "cleanup" {
			add("Hubs that it left have yet to forget it: %d attempts since %s.", t.Attempts, t.Begun.UTC().Format(time.RFC3339))
		} else if t != nil {
			add("Hub %s has yet to be told: %d attempts since %s.", t.Hub, t.Attempts, t.Begun.UTC().Format(time.RFC3339))
		}
		if k := d.Parent; k != nil && !k.Linked {
			add("It is not below its parent %q yet: %s.", k.Parent, k.Pending)
		}
	} else {
		add("It has never registered, or its registration was deleted.")
	}
	if a := d.Admitted; a != nil {
		add("%s", a.text())
	}
	if len(d.Attempts) == 0 {
		add("No attempt of it is on record.")
		if d.Registration == nil && d.Trial == nil {
			add("%s", adviceOn["untried"])
		}
	}
	if len(d.Attempts) > 0 {
		a := d.Attempts[len(d.Attempts)-1]
		at := fmt.Sprintf("%s over %s from %s", a.At.UTC().Format(time.RFC3339), a.Protocol, a.Remote)
		if a.Times > 1 {
			at += fmt.Sprintf(", %d times since %s", a.Times, a.First.UTC().Format(time.RFC3339))
		}
		switch {
		case a.Result == "refused" || a.Result == "error":
			why, told := strings.CutPrefix(a.Reason, strconv.Itoa(int(a.Code))+" ")
			if !told {
				why = a.Reason
			}
			add("Its last attempt was refused with %d: %s (%s).", int(a.Code), why, at)
			if text := adviceOn[a.Rule]; text != "" {
				add("%s", text)
			}
			for _, was := range slices.Backward(d.Attempts) {
				if was.proven() && was.Remote != "" {
					add("It last proved itself at %s, over %s from %s.", was.At.UTC().Format(time.RFC3339), was.Protocol, was.Remote)
					break
				}
			}
		case a.Operation == "provision" && a.Result == "failed":
			add("It was let in, and hub %s would not have it: %s.", a.Hub, a.Reason)
		case a.Operation == "provision":
			add("It was let in, and is known to hub %s since %s.", a.Hub, a.At.UTC().Format(time.RFC3339))
		case a.Result == "challenged":
			add("Its TPM was challenged and has not come back with a token (%s).", at)
			add("%s", adviceOn["challenge"])
		default:
			add("Its last attempt ended %q (%s).", a.Result, at)
		}
	}
	if t := d.Trial; t != nil {
		by := "by its individual enrollment"
		if t.Group != "" {
			by = fmt.Sprintf("by group %q", t.Group)
		}
		switch t.Result {
		case "admitted":
			add("With the certificates that were handed in it would be let in now, %s.", by)
		case "disabled":
			add("The certificates that were handed in are good, %s, which is disabled.", by)
		default:
			add("With the certificates that were handed in it would be refused: %s.", t.Reason)
			if text := adviceOn[t.Rule]; text != "" {
				add("%s", text)
			}
		}
	}
	return say
}
