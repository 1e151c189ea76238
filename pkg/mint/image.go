package mint

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/pattern"
	"github.com/touchmark/touchmark/pkg/settings"
	"github.com/touchmark/touchmark/pkg/stamp"
	"github.com/touchmark/touchmark/pkg/stamp/fat"
	"github.com/touchmark/touchmark/pkg/stamp/ihex"
	"github.com/touchmark/touchmark/pkg/stamp/nvs"
	"github.com/touchmark/touchmark/pkg/stamp/raw"
	"github.com/touchmark/touchmark/pkg/stamp/ubootenv"
)

// A StampImage is an image of device storage: a file of the stamp, made from entries. It has mode 0600 when a key goes into it.
// Sizes and offsets are octets, with KiB or MiB behind the number or nothing.
type StampImage struct {
	// name of the file in the device's directory. Required.
	Name string `toml:"name"`
	// format: "nvs" (a partition of ESP-IDF's non-volatile storage), "nvs-keys" (the partition with the keys of an encrypted one:
	// fresh keys for each device), "uboot-env" (an environment of U-Boot), "fat" (a file system without a partition table), "raw"
	// (touchmark's own records for storage without a file system, in two slots; touchmark stamp reader prints a reader in C), or
	// "ihex" (another image as Intel HEX). Required.
	Format string `toml:"format"`
	// size of the whole image, for nvs, uboot-env, fat and raw. A slot of raw has half of it.
	Size string `toml:"size"`
	// encrypted with "random" encrypts an nvs partition with fresh keys for each device, which go into a file of their own beside
	// it; or it names an image of format nvs-keys that stands before this one, whose keys several partitions may share.
	Encrypted string `toml:"encrypted"`
	// keys-name is the file that the fresh keys go into; default: the name and ".keys".
	KeysName string `toml:"keys-name"`
	// redundant says that U-Boot keeps its environment twice (CONFIG_ENV_REDUNDANT). The image goes to both places, or to one.
	Redundant bool `toml:"redundant"`
	// big-endian is for uboot-env on CPUs of that order.
	BigEndian bool `toml:"big-endian"`
	// label is the volume's name in fat.
	Label string `toml:"label"`
	// page is how many octets the storage writes at once: of raw, the page of the EEPROM, which a write that is cut off may lose
	// whole; of fat, the sector (default 512).
	Page string `toml:"page"`
	// of names the image before this one that ihex holds, and address is where it begins there: 0x9000.
	Of      string `toml:"of"`
	Address int64  `toml:"address"`
	// device is storage that the image is written to as well, in place, before the unit counts as stamped: a block device, the
	// node of an EEPROM, or an image file, with fields in braces as in values: "/dev/disk/by-path/{head}". Their values are parts of
	// names, without "/" or "..". It must be there when its unit is begun. Of raw the older slot is written, and the other stays whole
	// until then; any other image takes the place of what was there, and one that is cut off in between is none.
	Device string `toml:"device"`
	// offset is where in the device the image begins; default 0.
	Offset string `toml:"offset"`
	// entry lists what goes into the image, for nvs, uboot-env, fat and raw.
	Entry []ImageEntry `toml:"entry"`

	size, offset int64
	page         int
	keys         string // file with the keys of an encrypted one
	device       pattern.Pattern
}

// An ImageEntry is one value in an image. It has one of value, file and symmetric.
type ImageEntry struct {
	// namespace of an nvs key: up to 15 characters.
	Namespace string `toml:"namespace"`
	// key is what the value is called: a key of nvs, a variable of uboot-env, a file of fat with its folders before it
	// ("certs/device.pem"), or a type of raw: "id-scope", "global-endpoint", "registration-id", "serial", "certificate-chain" (file
	// with as = "der"), "certificate-chain-pem", "private-key" (der), "symmetric-key" (raw), "key-uri", or one's own, "0x8000" to
	// "0xfffe". Required.
	Key string `toml:"key"`
	// type of an nvs value: "string" (default), "blob", "u8" to "u64", "i8" to "i64".
	Type string `toml:"type"`
	// value is text with fields in braces: serial, registration-id, id-scope, global-endpoint, attestation, key-uri, or else a
	// column of the serial list; "{serial|lower}" folds to lower case. What comes from the list is without control characters.
	// U-Boot may run what is in a variable: take no columns into such ones.
	Value string `toml:"value"`
	// file is another file of the stamp: "device-key.pem", "device-chain.pem", "provisioning.json", one of stamp.file, or an image
	// before this one.
	File string `toml:"file"`
	// as says in what form device-key.pem and device-chain.pem go in: "pem" (default, as they are), "der" (without PEM's armour:
	// PKCS #8, certificates one after another), or "leaf-der" (the device's certificate alone).
	As string `toml:"as"`
	// symmetric is the device's symmetric key: as "base64" text, or as "raw" octets.
	Symmetric string `toml:"symmetric"`

	value pattern.Pattern
	raw   raw.Type
}

// The formats of images.
const (
	formatNVS   = "nvs"
	formatKeys  = "nvs-keys"
	formatUBoot = "uboot-env"
	formatFAT   = "fat"
	formatRaw   = "raw"
	formatHex   = "ihex"
)

const (
	encryptedRandom = "random"
	asPEM           = "pem"
	asDER           = "der"
	asLeaf          = "leaf-der"
	keysSize        = 4096
	maxImages       = 16
	symmetricSize   = 32
	maxImage        = 64 << 20
)

// settingsOf says which settings go with a format, beside name and format.
func settingsOf(format string) []string {
	switch format {
	case formatNVS:
		return []string{"size", "encrypted", "keys-name", "device", "offset", "entry"}
	case formatKeys:
		return []string{"device", "offset"}
	case formatUBoot:
		return []string{"size", "redundant", "big-endian", "device", "offset", "entry"}
	case formatFAT:
		return []string{"size", "page", "label", "device", "offset", "entry"}
	case formatRaw:
		return []string{"size", "page", "device", "offset", "entry"}
	case formatHex:
		return []string{"of", "address"}
	}
	return nil
}

// rawTypes are the types of raw by the names that profiles have for them.
func rawTypes() map[string]raw.Type {
	return map[string]raw.Type{"id-scope": raw.IDScope, "global-endpoint": raw.GlobalEndpoint, "registration-id": raw.RegistrationID, "serial": raw.Serial,
		"certificate-chain": raw.CertificateChain, "certificate-chain-pem": raw.CertificateChainPEM, "private-key": raw.PrivateKey,
		"symmetric-key": raw.SymmetricKey, "key-uri": raw.KeyURI}
}

// stampFields are the fields of values that are no columns.
var stampFields = [...]string{"serial", "registration-id", "id-scope", "global-endpoint", "attestation", "key-uri"}

// checkImages looks at the images of a stamp; files are the names that are taken, and whether that file is one of the stamp.
func (p *Profile) checkImages(f *settings.Faults, files map[string]bool) {
	if len(p.Stamp.Image) > maxImages {
		f.Key("stamp.image", "%d images, at most %d are made", len(p.Stamp.Image), maxImages)
		return
	}
	for i := range p.Stamp.Image {
		m := &p.Stamp.Image[i]
		good := true
		fault := func(key, format string, args ...any) {
			good = false
			at := fmt.Sprintf("stamp.image[%d]", i)
			if key != "" {
				at += "." + key
			}
			f.Key(at, "image %q: %s", m.Name, fmt.Sprintf(format, args...))
		}
		take := func(key, name string) {
			if _, taken := files[name]; !hsm.ValidName(name) {
				fault(key, "the name %q: want letters, digits and -._ without separators", name)
			} else if taken {
				fault(key, "the name %q is taken", name)
			}
		}
		take("name", m.Name)
		if !p.checkSettings(m, fault) {
			files[m.Name] = true
			continue
		}
		good = true
		switch m.Encrypted {
		case "":
			if m.KeysName != "" {
				fault("keys-name", "keys-name goes with encrypted = \"random\"")
			}
		case encryptedRandom:
			m.keys = m.KeysName
			if m.keys == "" {
				m.keys = m.Name + ".keys"
			}
			if m.keys == m.Name {
				fault("keys-name", "keys-name is the image's own name")
			}
			take("keys-name", m.keys)
			files[m.keys] = true
			p.images = append(p.images, &StampImage{Name: m.keys, Format: formatKeys, size: keysSize})
		default:
			m.keys = m.Encrypted
			if k := p.image(m.keys); k == nil || k.Format != formatKeys {
				fault("encrypted", "encrypted is %q: want \"random\", or an image of format nvs-keys that stands before this one", m.keys)
			}
		}
		if m.Format == formatHex {
			if of := p.image(m.Of); of == nil {
				fault("of", "of is %q: want an image that stands before this one", m.Of)
			} else if m.Address < 0 || m.Address > math.MaxUint32+1-of.size {
				fault("address", "%d octets at 0x%x reach beyond 32 bits of address", of.size, m.Address)
			}
		}
		sound := good
		for j := range m.Entry {
			p.checkEntry(m, j, files, fault)
		}
		if entries := m.Entry; sound {
			if !good {
				entries = nil
			}
			p.tryImage(m, entries, files, fault)
		}
		p.checkDevice(m, fault)
		files[m.Name] = true
		p.images = append(p.images, m)
	}
}

// tryImage builds an image with entries that are as short as they ever are: what is wrong with it then always is.
func (p *Profile) tryImage(m *StampImage, entries []ImageEntry, files map[string]bool, fault faultFunc) {
	s, part := p.shortest(files), *m
	part.Entry = entries
	file, err := part.build(s)
	if m.Format == formatHex {
		m.size = int64(len(file.Data))
	}
	if err == nil {
		return
	}
	at := "size"
	if m.Format == formatHex {
		at = "of"
	}
	// The first entry that makes the difference.
	n := sort.Search(len(entries), func(n int) bool {
		part.Entry = entries[:n]
		_, partErr := part.build(s)
		if partErr != nil {
			err = partErr
		}
		return partErr != nil
	})
	if n > 0 && !isFull(err) {
		at = fmt.Sprintf("entry[%d].key", n-1)
	}
	fault(at, "%v", err)
}

// isFull reports whether an image is too small for its content.
func isFull(err error) bool {
	return errors.Is(err, nvs.ErrFull) || errors.Is(err, ubootenv.ErrFull) || errors.Is(err, fat.ErrFull) || errors.Is(err, raw.ErrFull)
}

// shortest returns stand-ins for what a unit's images are made from, none longer than the unit's own.
func (p *Profile) shortest(files map[string]bool) *source {
	s := &source{field: func(string) (string, error) { return "1", nil }, symmetric: make([]byte, symmetricSize), keys: standInKeys}
	for name, is := range files {
		f := stamp.File{Name: name, Data: []byte("1")}
		switch m := p.image(name); {
		case !is:
			continue
		case name == chainFile:
			f.Data = standIn("CERTIFICATE", 250)
		case name == keyFile:
			f.Data = standIn("PRIVATE KEY", p.keySize()-8)
			if p.Key.In == keyInTPM {
				f.Data = standIn("TSS2 PRIVATE KEY", 100)
			}
		case m != nil && m.Format == formatKeys:
			keys, _ := standInKeys("") // they are always the same
			f.Data = keys.Image()
		case m != nil:
			f.Data = make([]byte, m.size)
		}
		s.files = append(s.files, f)
	}
	return s
}

// standIn returns PEM of so many octets of DER.
func standIn(kind string, octets int) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: standInDER(octets)})
}

// standInDER returns so many octets of DER, or one more where no DER has that length: a sequence of zeros.
func standInDER(octets int) []byte {
	head := []byte{0x30, 0x82, byte((octets - 4) >> 8), byte(octets - 4)}
	switch {
	case octets < 130:
		head = []byte{0x30, byte(octets - 2)}
	case octets < 259:
		octets = max(octets, 131)
		head = []byte{0x30, 0x81, byte(octets - 3)}
	case octets == 259:
		return standInDER(260)
	}
	return append(head, make([]byte, octets-len(head))...)
}

func standInKeys(string) (*nvs.Keys, error) {
	octets := make([]byte, nvs.KeySize)
	octets[0] = 1 // two halves that are the same are none
	return nvs.NewKeys(octets)
}

// keySize returns how many octets a private key has at most, as PKCS #8. EC and Ed25519 keys always have that many.
func (p *Profile) keySize() int {
	switch hsm.Algorithm(p.Key.Algorithm) {
	case hsm.Ed25519:
		return 48
	case hsm.ECP384:
		return 185
	case hsm.ECP521:
		return 241
	case hsm.RSA2048:
		return 1220
	case hsm.RSA3072:
		return 1796
	case hsm.RSA4096:
		return 2377
	}
	return 138
}

// image returns an image before the one that is being looked at.
func (p *Profile) image(name string) *StampImage {
	for _, m := range p.images {
		if m.Name == name {
			return m
		}
	}
	return nil
}

type faultFunc func(key, format string, args ...any)

// checkSettings looks at the settings that do not depend on other images, and whether it is worth going on.
func (p *Profile) checkSettings(m *StampImage, fault faultFunc) bool {
	words := []string{formatNVS, formatKeys, formatUBoot, formatFAT, formatRaw, formatHex}
	allowed := settingsOf(m.Format)
	if allowed == nil {
		fault("format", "format is %q: want one of %s", m.Format, strings.Join(words, ", "))
		return false
	}
	good := true
	for _, s := range []struct {
		name string
		set  bool
	}{{"size", m.Size != ""}, {"encrypted", m.Encrypted != ""}, {"keys-name", m.KeysName != ""}, {"redundant", m.Redundant}, {"big-endian", m.BigEndian},
		{"label", m.Label != ""}, {"page", m.Page != ""}, {"of", m.Of != ""}, {"address", m.Address != 0}, {"device", m.Device != ""}, {"offset", m.Offset != ""}, {"entry", len(m.Entry) > 0}} {
		switch goes := slices.Contains(allowed, s.name); {
		case s.set && !goes:
			fault(s.name, "%s does not go with format = %q", s.name, m.Format)
		case !s.set && goes && (s.name == "size" || s.name == "of" || s.name == "entry"):
			fault("", "format = %q needs %s", m.Format, s.name)
			good = false
		}
	}
	size := func(key, text string, most int64) int64 {
		if text == "" {
			return 0
		}
		n, err := parseSize(text)
		if err != nil || n > most {
			fault(key, "%s is %q: want octets, such as \"24576\" or \"24KiB\", at most %d", key, text, most)
			good = false
		}
		return n
	}
	m.size, m.page, m.offset = size("size", m.Size, maxImage), int(size("page", m.Page, 1<<20)), size("offset", m.Offset, 1<<50)
	if m.Format == formatKeys {
		m.size = keysSize
	}
	return good
}

// parseSize reads "24576", "24KiB" or "1MiB".
func parseSize(s string) (int64, error) {
	factor := int64(1)
	for unit, n := range map[string]int64{"KiB": 1 << 10, "MiB": 1 << 20} {
		if digits, ok := strings.CutSuffix(s, unit); ok {
			s, factor = digits, n
		}
	}
	n, err := strconv.ParseUint(s, 10, 63)
	if err == nil && n > math.MaxInt64/uint64(factor) {
		err = strconv.ErrRange
	}
	return int64(n) * factor, err
}

func (p *Profile) checkEntry(m *StampImage, j int, files map[string]bool, fault faultFunc) {
	e := &m.Entry[j]
	at := func(key string) string { return fmt.Sprintf("entry[%d].%s", j, key) }
	var err error
	if e.value, err = pattern.Parse(e.Value); err != nil {
		fault(at("value"), "value: %v", err)
	}
	if e.Key == "" {
		fault(at("key"), "each entry needs a key")
	}
	nvsOnly := e.Namespace != "" || e.Type != ""
	switch m.Format {
	case formatNVS:
		if e.Namespace == "" {
			fault(at("namespace"), "each entry of nvs needs a namespace")
		}
		if types := nvsTypes(); e.Type == "" {
			e.Type = "string"
		} else if !slices.Contains(types, e.Type) {
			fault(at("type"), "type is %q: want one of %s", e.Type, strings.Join(types, ", "))
		}
		if e.Value == "" && e.Type != "blob" && (e.Type != "string" || e.As == asDER || e.As == asLeaf || e.Symmetric == "raw") {
			fault(at("type"), "octets go with type = \"blob\"")
		}
	case formatRaw:
		known := rawTypes()
		if e.raw = known[e.Key]; e.raw == 0 {
			n, err := strconv.ParseUint(strings.TrimPrefix(e.Key, "0x"), 16, 16)
			if e.raw = raw.Type(n); err != nil || e.raw < raw.FirstUser || e.raw > raw.LastUser || fmt.Sprintf("0x%04x", n) != e.Key {
				fault(at("key"), "key is %q: want one of %s, or one's own type, \"0x8000\" to \"0xfffe\"", e.Key, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
			}
		}
	}
	if nvsOnly && m.Format != formatNVS {
		fault(at("key"), "namespace and type go with format = \"nvs\"")
	}
	sources := 0
	for _, s := range []string{e.Value, e.File, e.Symmetric} {
		if s != "" {
			sources++
		}
	}
	switch isFile, there := files[e.File]; {
	case sources != 1:
		fault(at("key"), "entry %q: want one of value, file and symmetric", e.Key)
	case e.Symmetric != "" && p.Attestation != AttestationSymmetricKey:
		fault(at("symmetric"), "symmetric goes with attestation = \"symmetric-key\"")
	case e.Symmetric != "" && e.Symmetric != "base64" && e.Symmetric != "raw":
		fault(at("symmetric"), "symmetric is %q: want base64 or raw", e.Symmetric)
	case e.File != "" && (!there || !isFile):
		fault(at("file"), "file is %q, which is no file of this stamp, or comes later: there are %s", e.File, strings.Join(stamped(files), ", "))
	case e.As == "":
	case e.File != keyFile && e.File != chainFile:
		fault(at("as"), "as goes with file = %q and %q", keyFile, chainFile)
	case e.As != asPEM && e.As != asDER && e.As != asLeaf:
		fault(at("as"), "as is %q: want pem, der or leaf-der", e.As)
	case e.As == asLeaf && e.File == keyFile:
		fault(at("as"), "as = \"leaf-der\" goes with file = %q", chainFile)
	}
	if named := p.Key.In == keyInToken || p.Key.In == keyInTPM || p.Key.URI != ""; slices.Contains(e.value.Fields(), "key-uri") && (!named || p.Attestation != AttestationX509) {
		fault(at("value"), "{key-uri}: devices of this profile have none")
	}
}

// stamped names the files of a stamp.
func stamped(files map[string]bool) []string {
	var names []string
	for name, is := range files {
		if is {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func (p *Profile) checkDevice(m *StampImage, fault faultFunc) {
	if m.Device == "" {
		if m.Offset != "" {
			fault("offset", "offset goes with device")
		}
		return
	}
	var err error
	if m.device, err = pattern.Parse(m.Device); err != nil {
		fault("device", "device: %v", err)
	}
	if m.Device[0] != '/' {
		fault("device", "device is %q: want a path from the root", m.Device)
	}
	for _, other := range p.images {
		if other.Device == m.Device && m.offset < other.offset+other.size && other.offset < m.offset+m.size {
			fault("device", "it would be written over %s", other.Name)
		}
	}
}

// imageColumns returns the columns that images need.
func (p *Profile) imageColumns() []string {
	var all []string
	for _, m := range p.images {
		all = append(all, m.device.Fields()...)
		for i := range m.Entry {
			all = append(all, m.Entry[i].value.Fields()...)
		}
	}
	return slices.DeleteFunc(all, func(name string) bool { return slices.Contains(stampFields[:], name) })
}

// A source is what the images of one unit are made from.
type source struct {
	// field returns the value of a field, or an error where it cannot stand in an image.
	field func(name string) (string, error)
	// files are those of the stamp so far.
	files     []stamp.File
	symmetric []byte
	// keys returns the keys of the key partition of that name: those that the unit has already, or fresh ones.
	keys func(name string) (*nvs.Keys, error)
}

// expand fills a pattern.
func (s *source) expand(p pattern.Pattern) (string, error) {
	var bad error
	text := p.Expand(func(name string) string {
		v, err := s.field(name)
		bad = errors.Join(bad, err)
		return v
	})
	return text, bad
}

func (s *source) file(name string) (*stamp.File, error) {
	for i := range s.files {
		if s.files[i].Name == name {
			return &s.files[i], nil
		}
	}
	return nil, fmt.Errorf("the stamp has no %s", name)
}

// octets returns what an entry holds, and whether that is secret. It may share memory with the source.
func (s *source) octets(e *ImageEntry) ([]byte, bool, error) {
	switch e.Symmetric {
	case "raw":
		return s.symmetric, true, nil
	case "base64":
		return base64.StdEncoding.AppendEncode(nil, s.symmetric), true, nil
	}
	if e.File == "" {
		text, err := s.expand(e.value)
		if err == nil && text == "" {
			err = errors.New("the value is empty")
		}
		return []byte(text), false, err
	}
	f, err := s.file(e.File)
	if err != nil {
		return nil, false, err
	}
	if e.As == "" || e.As == asPEM {
		return f.Data, f.Secret, nil
	}
	var der []byte
	for block, rest := pem.Decode(f.Data); block != nil; block, rest = pem.Decode(rest) {
		der = append(der, block.Bytes...)
		if e.As == asLeaf {
			break
		}
	}
	return der, f.Secret, nil
}

// build makes an image, and reads it with its format's own parser: what that finds is what was meant, or it is an error.
func (m *StampImage) build(s *source) (stamp.File, error) {
	file := stamp.File{Name: m.Name}
	values := make([][]byte, len(m.Entry))
	for i := range m.Entry {
		b, secret, err := s.octets(&m.Entry[i])
		if err != nil {
			return file, fmt.Errorf("entry %q: %w", m.Entry[i].Key, err)
		}
		values[i], file.Secret = b, file.Secret || secret
	}
	var same bool
	var err error
	switch m.Format {
	case formatNVS:
		same, err = m.buildNVS(s, &file, values)
	case formatKeys:
		file.Secret = true
		var keys *nvs.Keys
		if keys, err = s.keys(m.Name); err == nil {
			file.Data = keys.Image()
			_, err = nvs.ParseKeys(file.Data)
			same = true
		}
	case formatUBoot:
		same, err = m.buildUBoot(&file, values)
	case formatFAT:
		same, err = m.buildFAT(s, &file, values)
	case formatRaw:
		same, err = m.buildRaw(&file, values)
	case formatHex:
		same, err = m.buildHex(s, &file)
	}
	if err == nil && !same {
		err = stamp.ErrMismatch
	}
	return file, err
}

func (m *StampImage) buildNVS(s *source, file *stamp.File, values [][]byte) (bool, error) {
	var keys *nvs.Keys
	if m.keys != "" {
		f, err := s.file(m.keys)
		if err != nil {
			return false, err
		}
		if keys, err = nvs.ParseKeys(f.Data); err != nil {
			return false, err
		}
	}
	entries := make([]nvs.Entry, len(values))
	for i, b := range values {
		e := &m.Entry[i]
		v, err := nvsValue(e.Type, b)
		if err != nil {
			return false, fmt.Errorf("entry %q: %w", e.Key, err)
		}
		entries[i] = nvs.Entry{Namespace: e.Namespace, Key: e.Key, Value: v}
	}
	var err error
	if file.Data, err = nvs.Build(nil, int(m.size), entries, keys); err != nil {
		return false, err
	}
	back, err := nvs.Parse(file.Data, keys)
	return reflect.DeepEqual(back, entries), err
}

func nvsTypes() []string {
	return []string{"string", "blob", "u8", "u16", "u32", "u64", "i8", "i16", "i32", "i64"}
}

// nvsValue makes a value of its text. The errors of what it calls would show it.
func nvsValue(kind string, text []byte) (v any, err error) {
	switch kind {
	case "string":
		return string(text), nil
	case "blob":
		return text, nil
	}
	bits, _ := strconv.Atoi(kind[1:])
	if kind[0] == 'u' {
		var n uint64
		n, err = strconv.ParseUint(string(text), 10, bits)
		v = map[int]any{8: uint8(n), 16: uint16(n), 32: uint32(n), 64: n}[bits]
	} else {
		var n int64
		n, err = strconv.ParseInt(string(text), 10, bits)
		v = map[int]any{8: int8(n), 16: int16(n), 32: int32(n), 64: n}[bits]
	}
	if err != nil {
		return nil, fmt.Errorf("not a decimal number that fits into %s", kind)
	}
	return v, nil
}

func (m *StampImage) buildUBoot(file *stamp.File, values [][]byte) (bool, error) {
	layout := ubootenv.Layout{Size: int(m.size), Redundant: m.Redundant, BigEndian: m.BigEndian}
	vars, flag := make([]ubootenv.Var, len(values)), byte(0)
	for i, b := range values {
		vars[i] = ubootenv.Var{Name: m.Entry[i].Key, Value: string(b)}
	}
	if m.Redundant {
		flag = 1 // as mkenvimage has it
	}
	var err error
	if file.Data, err = layout.Build(vars, flag); err != nil {
		return false, err
	}
	back, backFlag, err := layout.Parse(file.Data)
	return slices.Equal(back, vars) && backFlag == flag, err
}

func (m *StampImage) buildFAT(s *source, file *stamp.File, values [][]byte) (bool, error) {
	id, err := s.field("registration-id")
	if err != nil {
		return false, err
	}
	sum := sha256.Sum256([]byte(id)) // each device's volume has an ID of its own, and the same every time
	v := fat.Volume{Size: m.size, SectorSize: m.page, Label: m.Label, ID: binary.BigEndian.Uint32(sum[:])}
	files := make([]fat.File, len(values))
	for i, b := range values {
		files[i] = fat.File{Name: m.Entry[i].Key, Data: b}
	}
	if file.Data, err = v.Build(files); err != nil {
		return false, err
	}
	back, err := fat.Parse(file.Data)
	if err != nil {
		return false, err
	}
	byName := func(a, b fat.File) int { return strings.Compare(a.Name, b.Name) }
	slices.SortFunc(files, byName)
	slices.SortFunc(back.Files, byName)
	return back.ID == v.ID && back.Label == v.Label && slices.EqualFunc(back.Files, files, func(a, b fat.File) bool {
		return a.Name == b.Name && bytes.Equal(a.Data, b.Data)
	}), nil
}

// slots are those of an image of format raw, where it is written.
func (m *StampImage) slots() raw.Slots {
	return raw.Slots{Offset: m.offset, Size: int(m.size / 2), Page: m.page}
}

func (m *StampImage) buildRaw(file *stamp.File, values [][]byte) (bool, error) {
	if m.size%2 != 0 || m.page > 0 && (m.size/2%int64(m.page) != 0 || m.offset%int64(m.page) != 0) {
		return false, fmt.Errorf("two slots of pages of %d octets in %d octets at %d: they do not come out even", m.page, m.size, m.offset)
	}
	records := make([]raw.Record, len(values))
	for i, b := range values {
		records[i] = raw.Record{Type: m.Entry[i].raw, Value: b}
	}
	b, err := raw.Encode(1, records)
	if err != nil {
		return false, err
	}
	if int64(len(b)) > m.size/2 {
		return false, fmt.Errorf("%d octets in a slot of %d: %w", len(b), m.size/2, raw.ErrFull)
	}
	file.Data = append(b, bytes.Repeat([]byte{0xff}, int(m.size)-len(b))...)
	_, back, err := raw.Read(bytes.NewReader(file.Data), raw.Slots{Size: int(m.size / 2)})
	slices.SortFunc(records, func(a, b raw.Record) int { return int(a.Type) - int(b.Type) })
	return slices.EqualFunc(back, records, func(a, b raw.Record) bool { return a.Type == b.Type && bytes.Equal(a.Value, b.Value) }), err
}

func (m *StampImage) buildHex(s *source, file *stamp.File) (bool, error) {
	of, err := s.file(m.Of)
	if err != nil {
		return false, err
	}
	file.Secret = of.Secret
	if file.Data, err = ihex.Build(uint32(m.Address), of.Data, 16); err != nil {
		return false, err
	}
	back, err := ihex.Parse(file.Data)
	return len(back) == 1 && back[0].Address == uint32(m.Address) && bytes.Equal(back[0].Data, of.Data), err
}
