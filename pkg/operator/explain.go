package operator

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// A Finding is one thing that explains what a device met: in plain words, and what to do next.
type Finding struct {
	Cause string `json:"cause"` // a name that does not change
	Words string `json:"words"`
	Next  string `json:"next"`
	// Sure says that the service itself gave this as the reason. Otherwise it is what is likely.
	Sure bool `json:"sure"`
}

// A cause is a reason that a service logs, and what it means. The reason is looked for in what the service says, in lower case; the
// code narrows it down where it is not 0.
type cause struct {
	name   string
	code   dps.Code
	reason string
	words  string
	next   string
}

// rules are the names that touchmark gives to reasons, and the causes that they are.
var rules = map[string]string{
	"no-proof": "no-certificate", "common-name": "common-name", "validity": "validity", "chain": "chain", "token-malformed": "token-malformed", "token-expired": "token-expired",
	"signature": "signature", "audience": "token-resource", "tpm-key": "tpm-key", "no-enrollment": "no-derived-key", "certificate": "other-certificate", "kind": "other-kind",
	"group-disabled": "disabled", "blocked": "blocked", "ended": "ended", "closed": "not-named", "operational": "operational", "endorsement-key": "endorsement-key",
	"challenge": "tpm-unproven", "scope": "unknown-scope", "ca-unverified": "ca-unverified", "ca-missing": "ca-missing", "address": "address", "network-off": "network-off",
	"public-key": "public-key",
}

// causes are what touchmark's log of attempts says, most particular first. Reasons are those of packages attest and registration.
var causes = []cause{
	{"ca-unverified", 0, "is not verified", "The CA of the device's group is uploaded and not verified: nobody has shown to have its key, so it lets nobody in.",
		"touchmark certificate code gives a code; have the CA sign a certificate with it as the common name, and hand that to touchmark certificate verify. The reason below names the CA."},
	{"ca-missing", 0, "ca certificate not found", "No verified certificate of the scope vouches for the CA of the device's group.",
		"Upload the CA, or the root above it (touchmark certificate create), and verify it (touchmark certificate code, then verify). If that is done, have the device send its intermediate certificates too."},
	{"network-off", 0, "public network access is disabled", "Public network access is disabled in the scope, and the device came from a public network.",
		"Let it come by the private network, or touchmark scope update --public-network-access Enabled. Behind a proxy: touchmark help proxies."},
	{"address", 0, "address is not let in", "An IP rule keeps out the address that the device came from. What it proved itself with was not looked at.",
		"Compare the address under FROM with the scope's IP rules: touchmark scope show. Where all come from one address, a proxy hides theirs: touchmark help proxies."},
	{"token-expired", 0, "token has expired", "The device's token had expired when it came: its clock is wrong, or it uses a token again that it made long ago.",
		"Look at the device's clock first: many have none before they reach a time server."},
	{"token-resource", 0, "token is for another resource", "The device signed a token for another ID scope or another registration ID.",
		"Compare ID scope and registration ID in the device with those here, letter by letter."},
	{"token-malformed", 0, "token is malformed", "What the device sent as its token is none.", "Look at how its software makes the token; the vendor's SDK makes it right."},
	{"signature", 0, "signature does not verify", "The device's key is not the enrolled one, or not the one that its group's key derives.",
		"A device of a group needs the derived key, never the group's own. Letter case counts: the key must be derived from the registration ID as the device spells it."},
	{"no-derived-key", 0, "no group's key derives", "No enrollment has this registration ID, and no group's key derives the key that the device has.",
		"If it belongs to a group, its key was derived from another group's key or another spelling of its registration ID: derive it anew. Else make an enrollment for it."},
	{"not-symmetric", 0, "does not attest by symmetric key", "The device came with a key, and its enrollment wants something else.",
		"An individual enrollment beats every group. Delete or change it if the device should come in with its key."},
	{"not-certificate", 0, "does not attest by certificate", "The device came with a certificate, and its enrollment wants something else.",
		"An individual enrollment beats every group. Delete or change it if the device should come in with its certificate."},
	{"other-certificate", 0, "certificate is not the enrolled one", "The device's certificate is neither the primary nor the secondary one of its enrollment.",
		"Was the certificate renewed? touchmark enrollment update --secondary-certificate-path adds the new one beside the old."},
	{"common-name", 0, "common name is not the registration id", "The common name of the device's certificate is not the registration ID that it asks for.",
		"Set the registration ID in the device to the certificate's common name, or issue a certificate for it."},
	{"validity", 0, "a certificate is not valid now", "A certificate of the device's chain has expired, or is not valid yet.",
		"Renew what has expired: of the device, or of the CA above it. If none has, compare the clocks."},
	{"ambiguous-ca", 0, "key identifiers do not tell them apart", "More CAs here than can be tried have the issuer's name.", "Issue from CAs with different names, or with key identifiers."},
	{"chain", 0, "no path to a known ca", "No CA of any group here signed the device's certificate, by way of the certificates that the device sent.",
		"Have the device send its intermediate certificates too, and see that the group has the CA that signed. On Azure that CA must be verified, or its root be uploaded and verified as well."},
	{"no-certificate", 0, "no client certificate", "The device sent no certificate.", "Look at its TLS configuration. A proxy between that ends TLS takes the certificate away, too."},
	{"tpm-key", 0, "tpm key is not acceptable", "The TPM's keys are not those that can be used to attest.", "Read the endorsement key out of the device anew, and compare it with the enrollment's."},
	{"tpm-unproven", 0, "the tpm has yet to prove itself", "The TPM was asked to prove itself. This is how every registration with a TPM begins.", "Nothing, if the device came back. If it did not: it could not open the challenge, so its endorsement key is not the enrolled one."},
	{"ended", 0, "an identity that ended", "The device's key belonged to an identity that was scrapped, voided or reworked.", "It never registers again. Give the unit a new identity on the line."},
	{"not-named", 0, "no bundle named", "Its group is closed, and no imported bundle named this device.", "Import the bundle that it came out of the factory with, or touchmark group open the group."},
	{"other-revision", 0, "not the one of the device's revision", "Its group is closed, and the device has a key that no bundle named for it: that of an earlier identity of the unit, or a stranger's.", "Import the bundle that tells of the unit's rework."},
	{"public-key", 0, "public key: ", "The public key in the device's certificate is of a kind that is not known here.", "Issue a certificate for a key of ECDSA, RSA or Ed25519."},
	{"blocked", 0, "that of the disabled enrollment", "The device's certificate is that of an enrollment which is disabled: it stays out under whatever name.", "touchmark enrollment enable that one, if it should be let in."},
	{"operational", 0, "issued for its hub", "The device showed the certificate that it was issued for its hub.", "Have it register with its own."},
	{"endorsement-key", 0, "another endorsement key", "The enrollment is for another TPM.", "Compare the endorsement keys; a TPM that was exchanged needs an enrollment of its own."},
	{"other-kind", 0, "attests in another way", "The device proves itself in another way than its enrollment wants.", "An individual enrollment beats every group. Delete or change it."},
	{"unknown-scope", 0, "unknown id scope", "The device asked for another ID scope.", "Set the device's ID scope to this service's."},
	{"disabled", 0, "disabled", "The enrollment or the group that decides about this device is disabled.", "touchmark enrollment enable, or touchmark group enable, if it should be let in."},
	{"no-hub", dps.CodeNoHub, "", "No linked hub is one that the enrollment allows.", "Link a hub (touchmark hub link), or name one that is linked in the enrollment's iotHubs."},
	{"hub-refused", dps.CodeHubRefused, "", "The hub refused the device: its key for the service is wrong or gone, it is full, or it is out of reach.", "touchmark hub show tells with which key it is linked; link it again with a good one."},
	{"webhook", 400207, "", "The webhook that allocates hubs failed, or named a hub that is not linked.", "Look at the webhook's own log for the time of the attempt."},
	{"bad-csr", dps.CodeBadCSR, "", "The certificate signing request of the device was not accepted.", "touchmark help issuers tells what a request must be."},
	{"throttled", dps.CodeThrottled, "", "The device came more often than the limits allow, or too many did.", "It comes in by itself later. touchmark help limits tells how to allow more."},
	{"unauthorized", dps.CodeUnauthorized, "", "The device could not prove that it is one that an enrollment admits.", "The reason is in the service's log under the tracking ID."},
}

// explainAttempt finds the cause of one refusal.
func explainAttempt(a *Attempt) (Finding, bool) {
	reason := strings.ToLower(a.Reason)
	for _, by := range []func(*cause) bool{
		func(c *cause) bool { return c.reason != "" && strings.Contains(reason, c.reason) },
		func(c *cause) bool { return rules[a.Rule] == c.name },
		func(c *cause) bool { return c.code != 0 && c.code == a.Code },
	} {
		for i := range causes {
			c := &causes[i]
			if !by(c) {
				continue
			}
			f := Finding{c.name, c.words, c.next, c.reason != ""}
			if reason := recorded(a); c.reason == "" && reason != "" { // the service's own words say more than any of ours
				f.Words, f.Sure = f.Words+" What the service wrote down: "+reason+".", true
			}
			return f, true
		}
	}
	return Finding{}, false
}

// recorded is a reason without the code before it.
func recorded(a *Attempt) string {
	reason := strings.TrimPrefix(a.Reason, fmt.Sprintf("%d ", int(a.Code)))
	return strings.TrimSuffix(strings.TrimPrefix(reason, "Unauthorized: "), ".")
}

// byItself are the rules by which an enrollment of the device's own refuses it.
var byItself = []string{"kind", "certificate", "signature", "endorsement-key", "challenge"}

// isGone reports whether the device had an enrollment of its own when it came last, and now nothing is enrolled for it.
func isGone(d *Diagnosis) bool {
	if !d.Told || d.Enrollment != nil || d.by != "" || len(d.Attempts) == 0 {
		return false
	}
	switch a := &d.Attempts[0]; {
	case a.Group != "" || a.Operation == "provision" || a.Result == "error":
		return false
	case a.Refused():
		return slices.Contains(byItself, a.Rule)
	}
	return true
}

// Explain says what a device met, and what to do: from the attempts, where the service tells of them, else from what can be seen. The most
// telling comes first. It always finds something to say.
func Explain(d *Diagnosis, group string) []Finding {
	var found []Finding
	add := func(f Finding) {
		if !slices.ContainsFunc(found, func(g Finding) bool { return g.Cause == f.Cause }) {
			found = append(found, f)
		}
	}
	if t := d.Trial; t != nil {
		switch f, ok := explainAttempt(&Attempt{Rule: t.Rule, Reason: t.Reason}); {
		case t.Result == "admitted":
			add(Finding{"trial-admitted", "With the certificates that were handed in it would be let in now.", "If the device is refused with these, it does not send them all, or has others.", true})
		case t.Result == "disabled":
			add(Finding{"disabled", "The certificates that were handed in are good, and who decides about them is disabled.", "touchmark group enable, or touchmark enrollment enable.", true})
		case ok:
			add(f)
		default:
			add(Finding{"trial-refused", "With the certificates that were handed in it would be refused: " + t.Reason + ".", "The service's own words below say more.", true})
		}
	}
	nothing := d.Enrollment == nil && d.Registration == nil && d.Kinds != nil && len(d.Kinds) == 0
	if nothing {
		explainGroups(d, group, add)
	} else if isGone(d) {
		add(Finding{"no-enrollment", "It has no enrollment now: the one of its own that it came by last was deleted since.",
			"touchmark enrollment create " + d.RegistrationID + " makes it anew; without one it can come in by a group alone.", true})
	}
	attempts := d.Attempts
	for i := range attempts {
		if !attempts[i].Refused() {
			break // what was before it is over
		}
		if f, ok := explainAttempt(&attempts[i]); ok {
			add(f)
		}
	}
	status := dps.EnrollmentEnabled
	if d.Enrollment != nil {
		if e, err := d.Enrollment.Enrollment(); err == nil {
			if e.ProvisioningStatus == dps.EnrollmentDisabled {
				status = e.ProvisioningStatus
				add(Finding{"disabled", "The device's own enrollment is disabled: that refuses it, whatever its group says.", "touchmark enrollment enable " + d.RegistrationID + ", or delete the enrollment to let it in by its group.", true})
			}
			for _, f := range explainCertificates(e) {
				add(f)
			}
		}
	}
	if st := d.Registration; st != nil {
		explainState(d, st, status, add)
	}
	explainHubs(d, add)
	if !nothing && d.Enrollment == nil && (d.Registration == nil || len(attempts) > 0 && attempts[0].Refused()) {
		explainGroups(d, group, add)
	}
	if len(found) == 0 && d.Registration == nil {
		words := "There is an enrollment for this device, enabled, and no registration: it has not come, or it could not prove itself."
		if d.Told {
			words = "There is an enrollment for this device, enabled, and it was not seen here."
		}
		add(Finding{"not-seen", words, "See that it has this service's ID scope and address, and reaches it: touchmark register does from anywhere what it should do.", false})
	}
	if len(found) == 0 {
		add(Finding{"nothing", "Nothing here says that the device is refused.", "If it says so itself: what tracking ID did it read? The service's log has the reason under it.", false})
	}
	return found
}

func explainState(d *Diagnosis, st *dps.RegistrationState, enrollment dps.ProvisioningStatus, add func(Finding)) {
	switch st.Status {
	case dps.Assigned:
		words := fmt.Sprintf("It is registered: device %s at hub %s.", st.DeviceID, st.AssignedHub)
		next := "If the device cannot connect, look at the hub: is it enabled there, does it use the same key or certificate?"
		if enrollment == dps.EnrollmentDisabled {
			next = "It keeps that hub until it is disabled or deleted there too."
		}
		add(Finding{"assigned", words, next, true})
	case dps.Failed:
		if f, ok := explainAttempt(&Attempt{Code: dps.Code(st.ErrorCode), Reason: st.ErrorMessage}); ok {
			f.Sure = true
			add(f)
			return
		}
		add(Finding{"failed", fmt.Sprintf("It proved itself, and then its registration failed: %d %s.", st.ErrorCode, st.ErrorMessage),
			"Look at the linked hubs and at the allocation policy: nothing is wrong with the device.", true})
	case dps.Disabled:
		add(Finding{"disabled", "The enrollment or the group that decides about this device was disabled when it came.", "touchmark enrollment enable, or touchmark group enable, if it should be let in.", true})
	case dps.Assigning:
		if t := d.Task; t != nil && t.State != "cleanup" {
			add(Finding{"assigning", fmt.Sprintf("Its registration waits for hub %s, which has yet to be told about it%s.", t.Hub, tried(t)),
				"It is tried again by itself, and fails after a time that serve --hub-give-up sets. Look at that hub; touchmark hub outbox shows who else waits.", true})
			return
		}
		add(Finding{"assigning", "Its registration is under way.", "If it stays so for minutes, its hub does not answer: touchmark hub outbox shows who waits for which, where the service is touchmark's.", true})
	case dps.Unassigned:
	}
}

// tried says how often a task was, and how that ended.
func tried(t *Task) string {
	if t.Attempts == 0 {
		return ""
	}
	text := fmt.Sprintf(": %d attempts since %s UTC", t.Attempts, t.Begun.UTC().Format(time.DateTime))
	if t.LastError != "" {
		text += ", the last failed with: " + t.LastError
	}
	return text
}

// explainHubs is what hubs have yet to be told, of a device that is where it should be.
func explainHubs(d *Diagnosis, add func(Finding)) {
	t := d.Task
	if p := d.Parent; p != nil && !p.Linked {
		words := fmt.Sprintf("It is not below its parent %s yet: %s", p.Parent, p.Pending)
		if t != nil && t.State == "linking" {
			words += tried(t)
		}
		add(Finding{"parent-pending", words + ".",
			"It is put there by itself when the parent registers at the same hub: touchmark diagnose " + p.Parent + ". touchmark hub children " + p.Parent + " shows all that wait.", true})
	}
	if t != nil && t.State == "cleanup" {
		add(Finding{"cleanup", fmt.Sprintf("It has gone on, and hub %s has yet to forget it%s.", t.Left(), tried(t)), "That is tried again for a week. Look at that hub.", true})
	}
	for _, o := range d.Orphans {
		add(Finding{"orphan", fmt.Sprintf("Hub %s still has it as device %s, and cannot be asked to forget it: %s.", o.Hub, o.DeviceID, o.Reason),
			"Remove it there, then touchmark hub orphans forget.", true})
	}
}

// explainGroups is for a device without an enrollment of its own.
func explainGroups(d *Diagnosis, group string, add func(Finding)) {
	n := 0
	for _, k := range d.Kinds {
		n += k
	}
	switch {
	case n == 0:
		add(Finding{"nothing-enrolled", "No enrollment has this registration ID, and there is no group that it could come in by.",
			"Make an enrollment for it (touchmark enrollment create), or a group, or import its bundle. Is this the right service?", true})
		return
	case group != "" && d.Group == nil:
		add(Finding{"no-group", "There is no group " + group + ".", "touchmark group list shows those that there are.", true})
	case d.Group != nil:
		if e, err := d.Group.Enrollment(); err == nil {
			if e.ProvisioningStatus == dps.EnrollmentDisabled {
				add(Finding{"disabled", "Group " + d.Group.ID + " is disabled: it refuses all its devices.", "touchmark group enable " + d.Group.ID + ", if they should be let in.", true})
			}
			for _, f := range explainCertificates(e) {
				add(f)
			}
		}
	}
	if len(d.Disabled) > 0 && d.Group == nil {
		add(Finding{"group-disabled", "No enrollment has this registration ID. If it belongs to one of these groups, that is disabled: " + strings.Join(d.Disabled, ", ") + ".",
			"touchmark group enable, if its devices should be let in.", false})
	}
	if d.Told && len(d.Attempts) > 0 {
		return // the attempts say it better
	}
	var can []string
	if d.Kinds[dps.AttestationX509] > 0 {
		can = append(can, "a certificate below a group's CA, whose common name is its registration ID")
	}
	if d.Kinds[dps.AttestationSymmetricKey] > 0 {
		can = append(can, "a key that a group's key derives from its registration ID")
	}
	add(Finding{"by-group", "No enrollment has this registration ID. It can come in by a group, with " + strings.Join(can, ", or ") + ".",
		"Compare its ID scope, its registration ID and what it proves itself with; see that it sends its intermediate certificates. --group looks at one group.", false})
}

// explainCertificates says which certificates of an enrollment are out of date.
func explainCertificates(e *dps.Enrollment) (found []Finding) {
	if e.Attestation == nil || e.Attestation.X509 == nil {
		return nil
	}
	for _, certs := range []*dps.X509Certificates{e.Attestation.X509.ClientCertificates, e.Attestation.X509.SigningCertificates} {
		if certs == nil {
			continue
		}
		for _, c := range []*dps.X509Certificate{certs.Primary, certs.Secondary} {
			if c == nil || c.Info == nil {
				continue
			}
			if until, err := time.Parse(time.RFC3339, c.Info.NotAfterUTC); err == nil && time.Now().After(until) {
				found = append(found, Finding{"enrolled-expired", "The enrolled certificate " + c.Info.SubjectName + " expired on " + until.Format(time.DateOnly) + ".",
					"Put a new one in its place: touchmark enrollment update, or touchmark group roll-ca.", true})
			}
		}
	}
	return found
}
