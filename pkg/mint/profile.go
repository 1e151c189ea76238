package mint

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/settings"
)

// A Profile says what identities of a kind look like: one TOML file per product. The fields' comments are its manual.
type Profile struct {
	// Name is the file's name without its ending.
	Name string `toml:"-"`

	// registration-id is the pattern of the registration ID: text with columns of the serial list in braces, such as
	// "pump-{serial}"; "{serial|lower}" folds the column to lower case. Required.
	RegistrationID string `toml:"registration-id"`
	// attestation is how devices prove themselves: "x509" or "symmetric-key". Required.
	Attestation string `toml:"attestation"`
	// enrollment is "group" (one enrollment group vouches for all) or "individual". Required.
	Enrollment string `toml:"enrollment"`
	// group is the enrollment group's ID; required for group enrollment.
	Group string `toml:"group"`

	Key struct {
		// made says where the device's key is made: "memory" (then stamped and forgotten), "token" (and stays there; x509
		// only), or "derived" from the group key (symmetric-key groups, their only choice).
		Made string `toml:"made"`
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
		// file lists further files to render into each device's directory.
		File []StampFile `toml:"file"`
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

	pattern []segment
}

// A StampFile is one rendered file of a stamp.
type StampFile struct {
	// name of the file in the device's directory.
	Name string `toml:"name"`
	// template is a built-in one ("iot-identity-service.toml") or a file in the line's templates folder.
	Template string `toml:"template"`
	// secret files have mode 0600. Files that show a symmetric key must be.
	Secret bool `toml:"secret"`
}

// The words of a profile.
const (
	AttestationX509         = "x509"
	AttestationSymmetricKey = "symmetric-key"

	madeMemory  = "memory"
	madeToken   = "token"
	madeDerived = "derived"
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
	if p.RegistrationID == "" {
		f.Key("registration-id", `registration-id is missing, for instance "pump-{serial}"`)
	} else if p.pattern, err = parsePattern(p.RegistrationID); err != nil {
		f.Key("registration-id", "registration-id: %v", err)
	}
	x509 := p.Attestation == AttestationX509
	known := oneOf("attestation", p.Attestation, AttestationX509, AttestationSymmetricKey)
	oneOf("enrollment", p.Enrollment, "group", "individual")
	group := p.Enrollment == "group"
	switch {
	case group && p.Group == "":
		f.Key("enrollment", "a group enrollment needs the group's ID: group")
	case group:
		if err := dps.CheckGroupID(p.Group); err != nil {
			f.Key("group", "group: %v", err)
		}
	case p.Group != "":
		f.Key("group", "group goes with enrollment = \"group\" only")
	}
	switch {
	case !known:
	case x509:
		if p.Key.Made == "" {
			p.Key.Made = madeMemory
		}
		oneOf("key.made", p.Key.Made, madeMemory, madeToken)
		if p.Key.Algorithm == "" {
			p.Key.Algorithm = string(hsm.ECP256)
		}
		if !slices.Contains(hsm.KeyPairs(), hsm.Algorithm(p.Key.Algorithm)) {
			f.Key("key.algorithm", "key.algorithm %q is not one for certificates: one of %v", p.Key.Algorithm, hsm.KeyPairs())
		}
		if p.Key.GroupKey != "" {
			f.Key("key.group-key", "key.group-key goes with symmetric-key groups only")
		}
	default:
		want := madeDerived
		if !group {
			want = madeMemory
		}
		if p.Key.Made == "" {
			p.Key.Made = want
		}
		oneOf("key.made", p.Key.Made, want)
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
	seen := map[string]bool{chainFile: true, keyFile: true, stampFile: true, "assignment.json": true}
	for _, s := range p.Stamp.File {
		switch {
		case s.Name == "" || s.Template == "":
			f.Key("stamp.file", "each stamp.file needs a name and a template")
		case !hsm.ValidName(s.Name):
			f.Key("stamp.file", "stamp.file name %q: want letters, digits and -._ without separators", s.Name)
		case seen[s.Name]:
			f.Key("stamp.file", "stamp.file name %q is taken", s.Name)
		}
		seen[s.Name] = true
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

// A segment is a piece of a registration ID pattern: literal text, or a column.
type segment struct {
	text, column string
	lower        bool
}

func parsePattern(s string) ([]segment, error) {
	var out []segment
	for s != "" {
		text, rest, brace := strings.Cut(s, "{")
		if strings.Contains(text, "}") {
			return nil, errors.New("} without {")
		}
		if text != "" {
			out = append(out, segment{text: text})
		}
		if !brace {
			break
		}
		column, after, closed := strings.Cut(rest, "}")
		if !closed || column == "" || strings.Contains(column, "{") {
			return nil, errors.New("{ without a column name and }")
		}
		column, lower := strings.CutSuffix(column, "|lower")
		if strings.Contains(column, "|") {
			return nil, fmt.Errorf("{%s}: the only change of a column is |lower", column)
		}
		out = append(out, segment{column: column, lower: lower})
		s = after
	}
	if !slices.ContainsFunc(out, func(g segment) bool { return g.column != "" }) {
		return nil, errors.New("the pattern has no column, so every device would get the same ID")
	}
	return out, nil
}
