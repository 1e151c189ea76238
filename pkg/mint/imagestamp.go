package mint

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"math/big"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/stamp"
	"github.com/touchmark/touchmark/pkg/stamp/nvs"
	"github.com/touchmark/touchmark/pkg/stamp/raw"
)

// imageField returns the value of a field in an image.
func (r *run) imageField(row *Row, doc *provisioning, name string) (string, error) {
	switch name {
	case "serial":
		return row.Serial, nil
	case "registration-id":
		return row.RegistrationID, nil
	case "id-scope":
		return doc.IDScope, nil
	case "global-endpoint":
		return doc.GlobalEndpoint, nil
	case "attestation":
		return doc.Attestation, nil
	case "key-uri":
		return doc.KeyURI, nil
	}
	v := r.List.values(row.Fields)(name)
	if !utf8.ValidString(v) || strings.ContainsFunc(v, unicode.IsControl) {
		return "", fmt.Errorf("column %s: want UTF-8 without control characters", name)
	}
	return v, nil
}

// nvsKeys returns the keys of a unit's key partition. They are nowhere but there: one that an earlier run staged is taken up,
// unless it was cut off, when nothing outside can have been encrypted with it. One that was published must be there still, for a
// device may hold a partition that needs it.
func (r *run) nvsKeys(u *unit, name string) (*nvs.Keys, error) {
	if u.found {
		b, err := r.onDisk(u, name)
		if err == nil {
			var keys *nvs.Keys
			keys, err = nvs.ParseKeys(b)
			clear(b)
			if err == nil {
				return keys, nil
			}
		}
		if u.published {
			return nil, fmt.Errorf("%w: %s of %s: %w", ErrUnproven, name, r.out.Dir(u.row.RegistrationID), err)
		}
		if !errors.Is(err, errNoKey) && !errors.Is(err, nvs.ErrInvalid) {
			return nil, err
		}
	}
	octets := make([]byte, nvs.KeySize)
	defer clear(octets)
	if _, err := io.ReadFull(r.Rand, octets); err != nil {
		return nil, err
	}
	return nvs.NewKeys(octets)
}

// stampDevices writes a unit's images to its storage, where the profile names some. All of it is on disk and read back by then,
// so that a run which is killed in here writes the same again: the unit is not verified until the last of it was read back.
func (r *run) stampDevices(ctx context.Context, u *unit) error {
	files := u.files[len(u.files)-len(r.Profile.images):]
	for i, m := range r.Profile.images {
		if m.device == nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		path, err := r.devicePath(u.row, m)
		if err != nil {
			return err
		}
		if m.Format == formatRaw {
			var records []raw.Record
			if _, records, err = raw.Parse(files[i].Data); err == nil {
				err = stamp.ToSlots(path, m.slots(), records)
			}
		} else {
			err = stamp.ToDevice(path, m.offset, files[i].Data)
		}
		if err != nil {
			return fmt.Errorf("image %s: %w", m.Name, err)
		}
	}
	return nil
}

// devicePath returns the path of a unit's storage. What comes from outside is part of one name in it, and never climbs.
func (r *run) devicePath(row *Row, m *StampImage) (string, error) {
	s := source{field: func(name string) (string, error) {
		v, err := r.imageField(row, &provisioning{IDScope: r.IDScope, GlobalEndpoint: r.GlobalEndpoint}, name)
		if err == nil && (v == "" || strings.Contains(v, "/") || strings.Contains(v, "..")) {
			err = fmt.Errorf("{%s} in the device's path is %q: want part of a name, without \"/\" and \"..\"", name, v)
		}
		return v, err
	}}
	path, err := s.expand(m.device)
	if err != nil {
		return "", fmt.Errorf("image %s: %w", m.Name, err)
	}
	return path, nil
}

// checkImages holds the images against all rows of the list before any of them is begun.
func (r *run) checkImages() error {
	if len(r.Profile.images) == 0 || r.Profile.pattern == nil {
		return nil // or each is checked when its registration ID is known
	}
	faults := &ListError{}
	devices := make(map[string]*Row)
	for i := range r.List.Rows {
		row := &r.List.Rows[i]
		if err := r.foresee(row); err != nil {
			faults.add("line %d: serial %s: %v", row.Line, row.Serial, err)
			continue
		}
		for _, m := range r.Profile.images {
			if m.device == nil {
				continue
			}
			path, _ := r.devicePath(row, m) // foreseen
			if other := devices[path]; other != nil && other != row {
				faults.add("line %d: serial %s: image %s would be written to %s, which is that of serial %s on line %d", row.Line, row.Serial, m.Name, path, other.Serial, other.Line)
				break
			}
			devices[path] = row
		}
	}
	if len(faults.Faults) > 0 {
		return faults
	}
	return nil
}

// foresee finds out before anything is made for a row whether its images can be: with stand-ins for keys and certificates, as
// long as they get. Rows whose values are as long as another's need no look at the sizes.
func (r *run) foresee(row *Row) error {
	sizes := fmt.Sprint(len(row.RegistrationID))
	for _, f := range row.Fields {
		sizes += fmt.Sprint(" ", len(f))
	}
	doc := &provisioning{IDScope: r.IDScope, GlobalEndpoint: r.GlobalEndpoint, Attestation: "-", KeyURI: "-"}
	s := &source{field: func(name string) (string, error) { return r.imageField(row, doc, name) }}
	for _, m := range r.Profile.images {
		if m.device != nil {
			if _, err := r.devicePath(row, m); err != nil {
				return err
			}
		}
		for i := range m.Entry {
			e := &m.Entry[i]
			if e.Value == "" {
				continue
			}
			b, _, err := s.octets(e)
			if err == nil && m.Format == formatNVS {
				_, err = nvsValue(e.Type, b)
			}
			if err != nil {
				return fmt.Errorf("image %s: entry %q: %w", m.Name, e.Key, err)
			}
		}
	}
	if _, known := r.foreseen.Load(sizes); known {
		return nil
	}
	u := &unit{row: row, symmetric: make(hsm.Secret, symmetricSize)}
	var key []byte
	if r.Profile.Attestation == AttestationX509 {
		if err := r.standFor(u); err != nil {
			return err
		}
		switch r.Profile.Key.In {
		case keyInMemory:
			u.keyPEM = standIn("PRIVATE KEY", r.Profile.keySize())
			key = u.keyPEM
		case keyInTPM:
			key = standIn("TSS2 PRIVATE KEY", 200+2*r.Profile.keySize()) // about
		}
	}
	if _, err := r.renderFiles(u, key, standInKeys); err != nil {
		return err
	}
	r.foreseen.Store(sizes, true)
	return nil
}

// standFor gives a unit a certificate and a key URI that are as long as its own will be at most; of the URI of a key in a token
// that is about.
func (r *run) standFor(u *unit) error {
	var pub crypto.PublicKey
	switch r.alg {
	case hsm.RSA2048, hsm.RSA3072, hsm.RSA4096:
		bits := map[hsm.Algorithm]uint{hsm.RSA2048: 2048, hsm.RSA3072: 3072, hsm.RSA4096: 4096}[r.alg]
		n := new(big.Int).Lsh(big.NewInt(1), bits)
		pub = &rsa.PublicKey{N: n.Sub(n, big.NewInt(1)), E: 65537}
	case hsm.Ed25519:
		pub = make(ed25519.PublicKey, ed25519.PublicKeySize)
	default:
		key, err := generate(r.alg, r.Rand)
		if err != nil {
			return err
		}
		pub = key.(*ecdsa.PrivateKey).Public()
	}
	size, err := r.Issuer.Size(r.unitOf(u.row), pub)
	if err != nil {
		return err
	}
	u.cert = standInDER(size)
	switch {
	case r.Profile.uri != nil:
		u.keyURI = r.Profile.uri.ExpandURI(r.List.values(u.row.Fields))
	case r.Profile.Key.In == keyInTPM:
		u.keyURI = hsm.URI{Scheme: hsm.SchemeTPM, Object: r.keyName(u), Keys: "."}.String()
	case r.Store != nil:
		u.keyURI = hsm.URI{Scheme: hsm.SchemePKCS11, Object: r.keyName(u)}.String() + r.Store.URI()
	default:
		u.keyURI = "-"
	}
	return nil
}

// readyImages refuses to begin a unit whose images cannot be made or whose storage is not there.
func (r *run) readyImages(u *unit) error {
	if len(r.Profile.images) == 0 {
		return nil
	}
	if err := r.foresee(u.row); err != nil {
		return err
	}
	for _, m := range r.Profile.images {
		if m.device == nil {
			continue
		}
		path, err := r.devicePath(u.row, m)
		if err != nil {
			return err
		}
		f, err := stamp.OpenDevice(path, m.offset+m.size)
		if err != nil {
			return fmt.Errorf("image %s: %w", m.Name, err)
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	return nil
}

// imageSize returns how many octets the images of a unit have.
func (p *Profile) imageSize() int {
	n := 0
	for _, m := range p.images {
		n += int(m.size)
	}
	return n
}
