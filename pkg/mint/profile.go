package mint

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/fixture"
	"github.com/touchmark/touchmark/pkg/pattern"
	"github.com/touchmark/touchmark/pkg/settings"
)

// A Profile says what identities of a kind look like: one TOML file per product. The fields' comments are its manual.
type Profile struct {
	// Name is the file's name without its ending.
	Name string `toml:"-"`

	// registration-id is the pattern of the registration ID: text with columns of the serial list in braces, such as
	// "pump-{serial}"; "{serial|lower}" folds the column to lower case. Required, but for attestation = "tpm": there it may be
	// left out, and is then what device SDKs derive from the endorsement key.
	RegistrationID string `toml:"registration-id"`
	// attestation is how devices prove themselves: "x509", "symmetric-key", or "tpm", by their TPM's endorsement key
	// (key.store says how the station reaches that). Required.
	Attestation string `toml:"attestation"`
	// enrollment is "group" (one enrollment group vouches for all) or "individual". Required.
	Enrollment string `toml:"enrollment"`
	// group is the enrollment group's ID; required for group enrollment.
	Group string `toml:"group"`
	// closed makes the group admit only devices that a bundle named, with the keys that it named: a group's convenience, with
	// control of each device. For group enrollment by certificates, whose group the bundle brings.
	Closed bool `toml:"closed"`

	Key struct {
		// in says where the private key of an x509 device is made: "memory" (then stamped and forgotten), "token" (in the
		// line's store, where it stays), "tpm" (in the device's TPM, which alone can use the blob that the stamp holds), or "csr"
		// (elsewhere: only a certificate signing request comes in).
		In string `toml:"in"`
		// csr names the file of a device's certificate signing request, PEM or DER, with columns of the serial list in braces:
		// "requests/{serial}.csr". Relative paths count from the working directory. For in = "csr", unless csr-command is there.
		CSR string `toml:"csr"`
		// csr-command is a program and its arguments that prints the request, with columns in braces: ["ssh", "{host}",
		// "make-csr"]. It is run without a shell, at most a minute, and sees PATH, HOME, LANG, TERM and SSH_AUTH_SOCK of
		// touchmark's environment.
		CSRCommand []string `toml:"csr-command"`
		// store is the key URI of the device's own store, with columns in braces. Where in = "token" makes the key in that one
		// and not in the line's: "pkcs11:token={serial}?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:pin"; where
		// in = "tpm", the device's TPM as the station reaches it: "tpm:?device=tcp:fixture-{head}:2321". Relative paths in it
		// count from the line's directory.
		Store string `toml:"store"`
		// uri is the key URI that the stamp names, with columns in braces, where the device reaches its key by another one than
		// the station did, or the key was made elsewhere; optional.
		URI string `toml:"uri"`
		// makers is a folder of the certificates of TPM manufacturers, in the line's directory. With it, a TPM whose endorsement
		// key none of them certified is refused. For keys in TPMs and attestation by TPM.
		Makers string `toml:"makers"`
		// algorithm of x509 keys: EC-P256 (default), EC-P384, EC-P521, RSA-2048, RSA-3072, RSA-4096, Ed25519.
		Algorithm string `toml:"algorithm"`
		// group-key is the name of the group key in the line's key store; default "group-key".
		GroupKey string `toml:"group-key"`
	} `toml:"key"`

	Certificate struct {
		// template is the certificate template: "device" (default), "device-san", or a file in the line's templates folder.
		Template string `toml:"template"`
		// validity of leaves, in days; default 3650.
		Days int `toml:"days"`
		// backdate by that many minutes, for devices whose clocks are behind; default 10.
		BackdateMinutes *int `toml:"backdate-minutes"`
	} `toml:"certificate"`

	Stamp struct {
		// token puts the stamp into the device's own token as well (key.store): the certificate beside the key, and each file of
		// the stamp that is no image as a data object of its name, application "touchmark".
		Token bool `toml:"token"`
		// nv is an index of the TPM's non-volatile memory (key.store) that gets the ID scope, global endpoint and registration ID
		// as well, as a JSON document, and is locked against writing: "0x01800001", one of the owner's. For keys in TPMs and
		// attestation by TPM.
		NV string `toml:"nv"`
		// file lists further files to render into each device's directory.
		File []StampFile `toml:"file"`
		// image lists images of device storage to make of them: [[stamp.image]], each with [[stamp.image.entry]].
		Image []StampImage `toml:"image"`
	} `toml:"stamp"`

	// device-information is free-form and never sent to the hub; individual enrollments only.
	DeviceInformation map[string]any `toml:"device-information"`
	Twin              struct {
		Tags    map[string]any `toml:"tags"`
		Desired map[string]any `toml:"desired"`
	} `toml:"twin"`
	Hubs struct {
		// names of hubs that devices may be assigned to; with an allocation policy. Empty means all linked hubs.
		Names      []string `toml:"names"`
		Allocation string   `toml:"allocation"` // hashed, geoLatency, static; empty means the service's own
		// reprovision on return: "migrate", "reset", "never"; empty means the service's default.
		Reprovision string `toml:"reprovision"`
		// edge marks the devices as IoT Edge devices.
		Edge bool `toml:"edge"`
	} `toml:"hubs"`

	pattern    pattern.Pattern
	csr        pattern.Pattern // of the file's name
	csrCommand *fixture.Command
	uri        pattern.Pattern
	store      pattern.Pattern
	nv         uint32
	images     []*StampImage // with the key partitions that follow from others, each after what it is made from
}

// A StampFile is one rendered file of a stamp.
type StampFile struct {
	// name of the file in the device's directory.
	Name string `toml:"name"`
	// template is a built-in one ("iot-identity-service.toml" for Azure IoT Edge too, "node.env", "node.json", "python.env",
	// "device.h", "zephyr-settings.txt") or a file in the line's templates folder.
	Template string `toml:"template"`
	// secret files have mode 0600. Files that show a private or symmetric key must be.
	Secret bool `toml:"secret"`
}

// The words of a profile.
const (
	AttestationX509         = "x509"
	AttestationSymmetricKey = "symmetric-key"
	AttestationTPM          = "tpm"

	keyInMemory = "memory"
	keyInToken  = "token"
	keyInTPM    = "tpm"
	keyInCSR    = "csr"
	keyDerived  = "derived" // what symmetric-key groups do; not a word of profiles
)

// maxProfile bounds a profile's size.
const maxProfile = 256 << 10

// LoadProfile reads a profile strictly. The error names every fault, each with its line.
func LoadProfile(name string, r io.Reader) (*Profile, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxProfile+1))
	if err != nil {
		return nil, fmt.Errorf("reading profile %s: %w", name, err)
	}
	if len(b) > maxProfile {
		return nil, fmt.Errorf("profile %s is larger than %d octets", name, maxProfile)
	}
	p := &Profile{Name: name}
	faults := settings.Decode("profile "+name, b, p)
	p.check(faults)
	if err := faults.Err(); err != nil {
		return nil, err
	}
	return p, nil
}

func (p *Profile) check(f *settings.Faults) {
	oneOf := func(key, value string, words ...string) bool {
		if !slices.Contains(words, value) {
			if value == "" {
				f.Key(key, "%s is missing: one of %s", key, strings.Join(words, ", "))
			} else {
				f.Key(key, "%s is %q: want one of %s", key, value, strings.Join(words, ", "))
			}
			return false
		}
		return true
	}
	var err error
	if p.RegistrationID == "" && p.Attestation == AttestationTPM {
		// from the endorsement key
	} else if p.RegistrationID == "" {
		f.Key("registration-id", `registration-id is missing, for instance "pump-{serial}"`)
	} else if p.pattern, err = parsePattern(p.RegistrationID); err != nil {
		f.Key("registration-id", "registration-id: %v", err)
	}
	x509 := p.Attestation == AttestationX509
	if p.Stamp.NV != "" {
		n, err := strconv.ParseUint(p.Stamp.NV, 0, 32)
		if err != nil || n < 0x01800000 || n > 0x01bfffff {
			f.Key("stamp.nv", "stamp.nv is %q: want an NV index of the owner's, 0x01800000 to 0x01bfffff", p.Stamp.NV)
		} else if p.Attestation != AttestationTPM && p.Key.In != keyInTPM {
			f.Key("stamp.nv", "stamp.nv goes with key.in = \"tpm\" and attestation = \"tpm\"")
		}
		p.nv = uint32(n)
	}
	if p.Key.Makers != "" && p.Attestation != AttestationTPM && p.Key.In != keyInTPM {
		f.Key("key.makers", "key.makers goes with key.in = \"tpm\" and attestation = \"tpm\"")
	}
	if p.Stamp.Token && !x509 {
		f.Key("stamp.token", "stamp.token goes with x509 only")
	}
	known := oneOf("attestation", p.Attestation, AttestationX509, AttestationSymmetricKey, AttestationTPM)
	oneOf("enrollment", p.Enrollment, "group", "individual")
	group := p.Enrollment == "group"
	switch {
	case group && p.Group == "":
		f.Key("enrollment", "a group enrollment needs the group's ID: group")
	case group:
		if err := dps.CheckGroupID(p.Group); err != nil {
			f.Key("group", "group: %v", err)
		}
	case p.Closed:
		f.Key("closed", "closed goes with enrollment = \"group\" only")
	case p.Group != "":
		f.Key("group", "group goes with enrollment = \"group\" only")
	}
	switch {
	case !known:
	case p.Attestation == AttestationTPM:
		p.checkTPM(f, group)
	case x509:
		if p.Key.In == "" {
			p.Key.In = keyInMemory
		}
		oneOf("key.in", p.Key.In, keyInMemory, keyInToken, keyInTPM, keyInCSR)
		if p.Key.Algorithm == "" {
			p.Key.Algorithm = string(hsm.ECP256)
		}
		if !slices.Contains(hsm.KeyPairs(), hsm.Algorithm(p.Key.Algorithm)) {
			f.Key("key.algorithm", "key.algorithm %q is not one for certificates: one of %v", p.Key.Algorithm, hsm.KeyPairs())
		}
		if p.Key.GroupKey != "" {
			f.Key("key.group-key", "key.group-key goes with symmetric-key groups only")
		}
		p.checkCSR(f)
		p.checkStore(f)
	default:
		if p.Key.CSR != "" || p.Key.CSRCommand != nil || p.Key.URI != "" || p.Key.Store != "" {
			f.Key("key.in", "key.csr, key.csr-command, key.store and key.uri go with x509 only")
		}
		if p.Key.In != "" {
			f.Key("key.in", "key.in goes with x509 only")
		}
		p.Key.In = keyDerived
		if !group {
			p.Key.In = keyInMemory
		}
		if p.Key.Algorithm != "" {
			f.Key("key.algorithm", "key.algorithm goes with x509 only")
		}
		if p.Key.GroupKey == "" {
			p.Key.GroupKey = "group-key"
		} else if !group {
			f.Key("key.group-key", "key.group-key goes with symmetric-key groups only")
		}
	}
	if p.Certificate.Template == "" {
		p.Certificate.Template = "device"
	}
	if p.Certificate.Days == 0 {
		p.Certificate.Days = 3650
	}
	if p.Certificate.Days < 0 || p.Certificate.Days > 100*366 {
		f.Key("certificate.days", "certificate.days is %d: want 1 to 36600", p.Certificate.Days)
	}
	if p.Certificate.BackdateMinutes == nil {
		ten := 10
		p.Certificate.BackdateMinutes = &ten
	}
	if b := *p.Certificate.BackdateMinutes; b < 0 || b > 7*24*60 {
		f.Key("certificate.backdate-minutes", "certificate.backdate-minutes is %d: want 0 to 10080", b)
	}
	keyThere := x509 && (p.Key.In == keyInMemory || p.Key.In == keyInTPM)
	seen := map[string]bool{chainFile: x509, keyFile: keyThere, stampFile: true, "assignment.json": false} // whether it is one of the stamp
	for _, s := range p.Stamp.File {
		_, taken := seen[s.Name]
		switch {
		case s.Name == "" || s.Template == "":
			f.Key("stamp.file", "each stamp.file needs a name and a template")
		case !hsm.ValidName(s.Name):
			f.Key("stamp.file", "stamp.file name %q: want letters, digits and -._ without separators", s.Name)
		case taken:
			f.Key("stamp.file", "stamp.file name %q is taken", s.Name)
		}
		seen[s.Name] = true
	}
	if known {
		p.checkImages(f, seen)
	}
	if p.Hubs.Allocation != "" {
		oneOf("hubs.allocation", p.Hubs.Allocation, "hashed", "geoLatency", "static")
	} else if len(p.Hubs.Names) > 0 {
		f.Key("hubs.names", "hubs.names needs hubs.allocation beside it")
	}
	if p.Hubs.Reprovision != "" {
		oneOf("hubs.reprovision", p.Hubs.Reprovision, "migrate", "reset", "never")
	}
	if group && p.DeviceInformation != nil {
		f.Key("device-information", "device-information goes with individual enrollments only")
	}
}

// checkCSR looks at what says where certificate signing requests come from.
func (p *Profile) checkCSR(f *settings.Faults) {
	command := p.Key.CSRCommand != nil
	if p.Key.In != keyInCSR {
		if p.Key.CSR != "" || command {
			f.Key("key.csr", "key.csr and key.csr-command go with key.in = \"csr\" only")
		}
		return
	}
	key, columns := "key.csr", []string(nil)
	switch {
	case command && p.Key.CSR != "":
		f.Key(key, "key.csr and key.csr-command exclude each other")
		return
	case command:
		key = "key.csr-command"
		cmd, err := fixture.Parse(p.Key.CSRCommand, fixture.Names{Any: true}) // the list's header is held against them
		if err != nil {
			f.Key(key, "key.csr-command: %v", err)
			return
		}
		cmd.Env = []string{"SSH_AUTH_SOCK"}
		p.csrCommand, columns = cmd, cmd.Fields()
	case p.Key.CSR == "":
		f.Key("key.in", "key.in = \"csr\" needs key.csr or key.csr-command")
		return
	default:
		var err error
		if p.csr, err = pattern.Parse(p.Key.CSR); err != nil {
			f.Key(key, "key.csr: %v", err)
			return
		}
		columns = p.csr.Fields()
	}
	if len(columns) == 0 {
		f.Key(key, "%s has no column in braces, so every device would get the same request", key)
	}
}

// sameTPM is what is wrong with a key.store of devices with TPMs that is the same for all.
const sameTPM = "names the same TPM for every device: put a column of the serial list in it, as {tpm}"

// checkTPM looks at what goes with attestation by a TPM.
func (p *Profile) checkTPM(f *settings.Faults, group bool) {
	if group {
		f.Key("enrollment", "attestation = \"tpm\" goes with enrollment = \"individual\": each TPM is one device's")
	}
	if k := p.Key; k.In != "" || k.Algorithm != "" || k.GroupKey != "" || k.CSR != "" || k.CSRCommand != nil || k.URI != "" {
		f.Key("key.in", "attestation = \"tpm\" makes no key: of [key], store alone goes with it")
	}
	p.Key.In = keyInTPM
	var err error
	switch p.store, err = pattern.Parse(p.Key.Store); {
	case err != nil:
		f.Key("key.store", "key.store: %v", err)
	case p.Key.Store != "" && p.store.Fixed():
		f.Key("key.store", "key.store %s", sameTPM)
	case p.Key.Store == "":
		f.Key("key.store", "key.store is the device's TPM, with columns in braces: \"tpm:?device=tcp:fixture-{head}:2321\"")
	}
}

// checkStore looks at where keys of devices are, for us and for them.
func (p *Profile) checkStore(f *settings.Faults) {
	var err error
	if p.uri, err = pattern.Parse(p.Key.URI); err != nil {
		f.Key("key.uri", "key.uri: %v", err)
	}
	if p.Key.URI != "" && p.Key.In == keyInMemory {
		f.Key("key.uri", "key.uri does not go with key.in = \"memory\": the key is in the stamp")
	}
	if p.store, err = pattern.Parse(p.Key.Store); err != nil {
		f.Key("key.store", "key.store: %v", err)
	} else if p.Key.Store != "" && p.Key.In != keyInToken && p.Key.In != keyInTPM {
		f.Key("key.store", "key.store goes with key.in = \"token\" or \"tpm\" only")
	} else if p.Key.Store == "" && p.Key.In == keyInTPM {
		f.Key("key.in", "key.in = \"tpm\" needs key.store: the device's TPM, as the station reaches it")
	} else if p.Key.Store != "" && p.store.Fixed() && p.Key.In == keyInTPM {
		f.Key("key.store", "key.store %s", sameTPM)
	} else if p.Key.Store != "" && p.store.Fixed() {
		f.Key("key.store", "key.store has no column in braces: name the line's own store in touchmark.toml")
	}
	if p.Stamp.Token && (p.Key.Store == "" || p.Key.In != keyInToken) {
		f.Key("stamp.token", "stamp.token needs key.in = \"token\" and key.store: the device's own token")
	}
}

// CertificateProfile returns what leaves look like, given the text of the certificate template and the columns of the list.
func (p *Profile) CertificateProfile(template string, columns []string) ca.Profile {
	return ca.Profile{Template: template, Columns: columns,
		Validity: time.Duration(p.Certificate.Days) * 24 * time.Hour, Backdate: time.Duration(*p.Certificate.BackdateMinutes) * time.Minute}
}

// HasSecrets reports whether the profile's bundles carry keys that must be sealed.
func (p *Profile) HasSecrets() bool {
	return p.Attestation == AttestationSymmetricKey && p.Enrollment == "individual"
}

// enrollmentBase returns what every enrollment of the profile has in common, without its attestation.
func (p *Profile) enrollmentBase() (dps.Enrollment, error) {
	e := dps.Enrollment{IoTHubs: p.Hubs.Names, AllocationPolicy: dps.AllocationPolicy(p.Hubs.Allocation), ProvisioningStatus: dps.EnrollmentEnabled}
	if p.Hubs.Edge {
		e.Capabilities = &dps.Capabilities{IoTEdge: true}
	}
	switch p.Hubs.Reprovision {
	case "migrate":
		e.ReprovisionPolicy = &dps.ReprovisionPolicy{UpdateHubAssignment: true, MigrateDeviceData: true}
	case "reset":
		e.ReprovisionPolicy = &dps.ReprovisionPolicy{UpdateHubAssignment: true}
	case "never":
		e.ReprovisionPolicy = &dps.ReprovisionPolicy{}
	}
	if p.Twin.Tags != nil || p.Twin.Desired != nil {
		e.InitialTwin = &dps.InitialTwin{}
		var err error
		if p.Twin.Tags != nil {
			if e.InitialTwin.Tags, err = json.Marshal(p.Twin.Tags); err != nil {
				return e, fmt.Errorf("profile %s: twin.tags: %w", p.Name, err)
			}
		}
		if p.Twin.Desired != nil {
			e.InitialTwin.Properties = &dps.TwinProperties{}
			if e.InitialTwin.Properties.Desired, err = json.Marshal(p.Twin.Desired); err != nil {
				return e, fmt.Errorf("profile %s: twin.desired: %w", p.Name, err)
			}
		}
	}
	return e, nil
}

// parsePattern parses the pattern of a registration ID.
func parsePattern(s string) (pattern.Pattern, error) {
	out, err := pattern.Parse(s)
	if err == nil && out.Fixed() {
		err = errors.New("the pattern has no column, so every device would get the same ID")
	}
	return out, err
}
