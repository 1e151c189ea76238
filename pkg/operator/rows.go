package operator

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/csv"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"iter"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/touchmark/touchmark/pkg/dps"
)

// A Row is one enrollment of a file: a Document, or what is wrong with this row alone, or a note why it is no enrollment.
type Row struct {
	Line     int // where it begins, from 1
	Document *Document
	Err      error
	ID       string // as far as it is known; untrusted
	Note     string // for whoever reads verdicts; with a document too
}

// RowsConfig says how to read a file.
type RowsConfig struct {
	// Kind is what rows of a CSV file are; rows of JSON say it themselves, and rows of another kind are wrong. Empty takes both, and no
	// CSV.
	Kind Kind
	// Files holds the certificates that a CSV file names; nil means that it may name none.
	Files fs.FS
	// Hubs renames hubs, by the folded name that stands in the file.
	Hubs map[string]string
}

// A Rows reads enrollments from a file: JSON objects of the wire, one after the other or in an array, or CSV (service API, section 8).
// It keeps one row at a time. The file is untrusted.
type Rows struct {
	cfg  RowsConfig
	in   *bufio.Reader
	hash hash.Hash
	line int
}

// MaxRow bounds a row, in octets. Azure's own bound on messages is 96 KiB.
const MaxRow = 1 << 20

// NewRows returns a reader of rows.
func NewRows(r io.Reader, cfg RowsConfig) *Rows {
	rows := &Rows{cfg: cfg, hash: sha256.New()}
	rows.in = bufio.NewReaderSize(r, 64<<10)
	return rows
}

// Digest returns a hash of the rows that were yielded so far: what tells whether a file begins with the same rows as another.
func (r *Rows) Digest() []byte { return r.hash.Sum(nil) }

// All yields the rows. What makes the rest of the file unreadable is an error and ends it.
func (r *Rows) All() iter.Seq2[Row, error] {
	return func(yield func(Row, error) bool) {
		r.line = 1
		first, err := r.first()
		if errors.Is(err, io.EOF) {
			return
		}
		if err == nil {
			switch first {
			case '[', '{':
				err = r.json(first == '[', yield)
			default:
				err = r.csv(yield)
			}
		}
		if err != nil && !errors.Is(err, errStopped) {
			yield(Row{Line: r.line}, err)
		}
	}
}

var errStopped = errors.New("stopped")

// first returns the first octet that is no space, and leaves it there. A byte order mark is passed over.
func (r *Rows) first() (byte, error) {
	if b, err := r.in.Peek(3); err == nil && bytes.Equal(b, []byte("\ufeff")) {
		_, _ = r.in.Discard(3)
	}
	for {
		b, err := r.in.ReadByte()
		if err != nil {
			return 0, err
		}
		switch b {
		case '\n':
			r.line++
		case ' ', '\t', '\r':
		default:
			return b, r.in.UnreadByte()
		}
	}
}

// json reads objects. Each is cut out of the stream by its braces before anything of it is parsed, so that one that never ends takes
// no memory beyond a row's.
func (r *Rows) json(array bool, yield func(Row, error) bool) error {
	if array {
		_, _ = r.in.ReadByte()
	}
	for n := 0; ; n++ {
		b, err := r.first()
		switch {
		case errors.Is(err, io.EOF) && !array:
			return nil
		case err != nil:
			return fmt.Errorf("line %d: the list does not end: %w", r.line, noEOF(err))
		case array && b == ']':
			_, _ = r.in.ReadByte()
			if _, err := r.first(); !errors.Is(err, io.EOF) {
				return fmt.Errorf("line %d: something stands behind the list", r.line)
			}
			return nil
		case array && n > 0:
			if b != ',' {
				return fmt.Errorf("line %d: want a comma between two objects", r.line)
			}
			_, _ = r.in.ReadByte()
			if b, err = r.first(); err != nil {
				return fmt.Errorf("line %d: the list does not end: %w", r.line, noEOF(err))
			}
		}
		if b != '{' {
			return fmt.Errorf("line %d: want a JSON object", r.line)
		}
		at := r.line
		text, err := r.object()
		if err != nil {
			return fmt.Errorf("line %d: %w", at, err)
		}
		row := Row{Line: at}
		if row.Document, row.Err = ParseDocument(text); row.Err == nil {
			row.ID = clipID(row.Document.ID)
			row.Err = r.accept(row.Document)
		}
		if err := r.give(row, text, yield); err != nil {
			return err
		}
	}
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// object reads from one brace to the one that closes it.
func (r *Rows) object() ([]byte, error) {
	var text []byte
	depth, quoted, escaped := 0, false, false
	for {
		b, err := r.in.ReadByte()
		if err != nil {
			return nil, noEOF(err)
		}
		if text = append(text, b); len(text) > MaxRow {
			return nil, fmt.Errorf("an object of more than %d octets", MaxRow)
		}
		switch {
		case b == '\n':
			r.line++
		case escaped:
			escaped = false
		case quoted && b == '\\':
			escaped = true
		case b == '"':
			quoted = !quoted
		case quoted:
		case b == '{':
			depth++
		case b == '}':
			if depth--; depth == 0 {
				return text, nil
			}
		}
	}
}

// clipID bounds what is shown of an ID that may be anything.
func clipID(s string) string { return s[:min(len(s), dps.MaxRegistrationID)] }

// give yields a row and adds it to the digest.
func (r *Rows) give(row Row, text []byte, yield func(Row, error) bool) error {
	if row.Err != nil {
		row.Document = nil
	}
	r.hash.Write(strconv.AppendInt(nil, int64(len(text)), 10))
	r.hash.Write([]byte{':'})
	r.hash.Write(text)
	if !yield(row, nil) {
		return errStopped
	}
	return nil
}

// accept checks a document, and renames its hubs.
func (r *Rows) accept(d *Document) error {
	if r.cfg.Kind != "" && d.Kind != r.cfg.Kind {
		return fmt.Errorf("%s: want an %s", d, r.cfg.Kind.Name())
	}
	d.Portable()
	if err := d.Check(); err != nil {
		return err
	}
	return r.rename(d)
}

func (r *Rows) rename(d *Document) error {
	if len(r.cfg.Hubs) == 0 {
		return nil
	}
	e, err := d.Enrollment()
	if err != nil {
		return err
	}
	for i, h := range e.IoTHubs {
		if to, ok := r.cfg.Hubs[dps.Fold(h)]; ok {
			e.IoTHubs[i] = to
		}
	}
	if to, ok := r.cfg.Hubs[dps.Fold(e.IoTHubHostName)]; ok {
		err = d.Set("iotHubHostName", to)
	}
	if e.IoTHubs != nil {
		err = errors.Join(err, d.Set("iotHubs", e.IoTHubs))
	}
	return err
}

// The columns of a CSV file. A header names those that there are, in any order and letter case.
const (
	colID             = "registrationId"
	colGroupID        = "enrollmentGroupId"
	colDeviceID       = "deviceId"
	colAttestation    = "attestation"
	colEndorsementKey = "endorsementKey"
	colCertificate    = "certificate"
	colSecondary      = "secondaryCertificate"
	colCAName         = "caName"
	colSecondaryCA    = "secondaryCaName"
	colPrimaryKey     = "primaryKey"
	colSecondaryKey   = "secondaryKey"
	colStatus         = "status"
	colHubs           = "iotHubs"
	colAllocation     = "allocationPolicy"
	colReprovision    = "reprovision"
	colEdge           = "edge"
	colParent         = "parent"
	colTags           = "tags"
	colDesired        = "desired"
	colWebhook        = "webhookUrl"
	colWebhookVersion = "apiVersion"
)

var (
	individualColumns = []string{colID, colDeviceID, colAttestation, colEndorsementKey, colCertificate, colSecondary, colPrimaryKey, colSecondaryKey,
		colStatus, colHubs, colAllocation, colReprovision, colEdge, colParent, colTags, colDesired, colWebhook, colWebhookVersion}
	groupColumns = []string{colGroupID, colAttestation, colCertificate, colSecondary, colCAName, colSecondaryCA, colPrimaryKey, colSecondaryKey,
		colStatus, colHubs, colAllocation, colReprovision, colEdge, colParent, colTags, colDesired, colWebhook, colWebhookVersion}
)

// Columns returns the columns that a CSV file of a kind may have.
func Columns(k Kind) []string {
	if k == Group {
		return slices.Clone(groupColumns)
	}
	return slices.Clone(individualColumns)
}

// rowBound lets csv.Reader have no more than so much of one row.
type rowBound struct {
	r    io.Reader
	left int
}

var errLongRow = fmt.Errorf("a row of more than %d octets", MaxRow)

func (b *rowBound) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errLongRow
	}
	n, err := b.r.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}

func (r *Rows) csv(yield func(Row, error) bool) error {
	if r.cfg.Kind == "" {
		return errors.New("want JSON: in a CSV file nothing says of which kind a row is")
	}
	begun := r.line - 1 // lines before the header
	bound := &rowBound{r.in, MaxRow}
	in := csv.NewReader(bound)
	in.ReuseRecord = true
	header, err := in.Read()
	if err != nil {
		return fmt.Errorf("the CSV header: %w", err)
	}
	known := Columns(r.cfg.Kind)
	columns := make([]string, len(header))
	for i, h := range header {
		at := slices.IndexFunc(known, func(k string) bool { return strings.EqualFold(k, strings.TrimSpace(h)) })
		if at < 0 {
			return fmt.Errorf("the CSV header: there is no column %.100q; there are %s", h, strings.Join(known, ", "))
		}
		if slices.Contains(columns, known[at]) {
			return fmt.Errorf("the CSV header: %s stands there twice", known[at])
		}
		columns[i] = known[at]
	}
	if !slices.Contains(columns, r.cfg.Kind.Member()) {
		return fmt.Errorf("the CSV header: %s is missing", r.cfg.Kind.Member())
	}
	for {
		bound.left = MaxRow
		record, err := in.Read()
		if errors.Is(err, io.EOF) {
			return nil
		}
		var bad *csv.ParseError
		row := Row{}
		switch {
		case errors.As(err, &bad) && errors.Is(err, csv.ErrFieldCount):
			row.Line = begun + bad.StartLine
			row.Err = fmt.Errorf("it has %d columns, the header has %d", len(record), len(columns))
		case err != nil:
			return fmt.Errorf("the CSV file: %w", err)
		default:
			line, _ := in.FieldPos(0)
			row.Line = begun + line
			cells := make(map[string]string, len(columns))
			for i, c := range columns {
				cells[c] = strings.TrimSpace(record[i])
			}
			row.ID = clipID(cells[r.cfg.Kind.Member()])
			if row.Document, row.Err = r.fromCells(cells); row.Err == nil {
				row.Err = r.accept(row.Document)
			}
		}
		r.line = row.Line
		if err := r.give(row, []byte(strings.Join(record, "\x00")), yield); err != nil {
			return err
		}
	}
}

// fromCells makes an enrollment of a row. Its errors name columns, and not what stands in those with keys.
func (r *Rows) fromCells(cells map[string]string) (*Document, error) {
	k := r.cfg.Kind
	e := dps.Enrollment{IoTHubs: strings.Fields(cells[colHubs]), Parent: cells[colParent]}
	var err error
	if e.Attestation, err = r.attestation(cells); err != nil {
		return nil, err
	}
	for col, v := range map[string]json.Unmarshaler{colStatus: &e.ProvisioningStatus, colAllocation: &e.AllocationPolicy} {
		if cells[col] != "" {
			quoted, _ := json.Marshal(cells[col]) // strings always marshal
			if err := v.UnmarshalJSON(quoted); err != nil {
				return nil, fmt.Errorf("%s: %w", col, err)
			}
		}
	}
	if e.ReprovisionPolicy, err = ParseReprovision(cells[colReprovision]); err != nil {
		return nil, fmt.Errorf("%s: %w", colReprovision, err)
	}
	if text := cells[colEdge]; text != "" {
		edge, err := strconv.ParseBool(text)
		if err != nil {
			return nil, fmt.Errorf("%s: want true or false", colEdge)
		}
		e.Capabilities = &dps.Capabilities{IoTEdge: edge}
	}
	if e.InitialTwin, err = Twin([]byte(cells[colTags]), []byte(cells[colDesired])); err != nil {
		return nil, err
	}
	if url := cells[colWebhook]; url != "" {
		e.CustomAllocationDefinition = &dps.CustomAllocationDefinition{WebhookURL: url, APIVersion: cells[colWebhookVersion]}
	}
	if k == Individual {
		return NewDocument(&dps.IndividualEnrollment{RegistrationID: cells[colID], DeviceID: cells[colDeviceID], Enrollment: e})
	}
	return NewDocument(&dps.EnrollmentGroup{EnrollmentGroupID: cells[colGroupID], Enrollment: e})
}

// attestation reads how a row attests. What it has says of which type it is; a type that it names must be that one.
func (r *Rows) attestation(cells map[string]string) (*dps.Attestation, error) {
	var named dps.AttestationType
	if text := cells[colAttestation]; text != "" {
		quoted, _ := json.Marshal(text)
		if err := named.UnmarshalJSON(quoted); err != nil {
			return nil, fmt.Errorf("%s: %w", colAttestation, err)
		}
	}
	found := named
	for col, t := range map[string]dps.AttestationType{colEndorsementKey: dps.AttestationTPM, colCertificate: dps.AttestationX509, colSecondary: dps.AttestationX509,
		colCAName: dps.AttestationX509, colSecondaryCA: dps.AttestationX509, colPrimaryKey: dps.AttestationSymmetricKey, colSecondaryKey: dps.AttestationSymmetricKey} {
		if cells[col] == "" {
			continue
		}
		if found != "" && found != t {
			return nil, fmt.Errorf("%s does not go with an attestation by %s", col, found)
		}
		found = t
	}
	a := &dps.Attestation{Type: found}
	switch found {
	case dps.AttestationSymmetricKey:
		if p, s := cells[colPrimaryKey], cells[colSecondaryKey]; p != "" || s != "" {
			a.SymmetricKey = &dps.SymmetricKeyAttestation{PrimaryKey: p, SecondaryKey: s}
		}
	case dps.AttestationTPM:
		a.TPM = &dps.TPMAttestation{EndorsementKey: cells[colEndorsementKey]}
	case dps.AttestationX509:
		a.X509 = &dps.X509Attestation{}
		if cells[colCAName] != "" || cells[colSecondaryCA] != "" {
			a.X509.CAReferences = &dps.CAReferences{Primary: cells[colCAName], Secondary: cells[colSecondaryCA]}
			if cells[colCertificate] != "" || cells[colSecondary] != "" {
				return nil, errors.New("want a certificate, or the name of one that the service has")
			}
			return a, nil
		}
		certs := &dps.X509Certificates{}
		for _, slot := range []struct {
			col string
			to  **dps.X509Certificate
		}{{colCertificate, &certs.Primary}, {colSecondary, &certs.Secondary}} {
			if name := cells[slot.col]; name != "" {
				c, err := r.certificate(name)
				if err != nil {
					return nil, fmt.Errorf("%s: %w", slot.col, err)
				}
				*slot.to = c
			}
		}
		if *certs == (dps.X509Certificates{}) {
			return nil, errors.New("an attestation by x509 needs a certificate")
		}
		if r.cfg.Kind == Group {
			a.X509.SigningCertificates = certs
		} else {
			a.X509.ClientCertificates = certs
		}
	default:
		return nil, errors.New("nothing says how it attests")
	}
	return a, nil
}

// certificate reads one that a row names: a file below the folder of certificates, and nowhere else.
func (r *Rows) certificate(name string) (*dps.X509Certificate, error) {
	if cert, err := ParseCertificate(name); err == nil { // the certificate itself, as an export has it
		return &dps.X509Certificate{Certificate: base64.StdEncoding.EncodeToString(cert.Raw)}, nil
	}
	name = path.Clean(strings.ReplaceAll(name, `\`, "/"))
	if r.cfg.Files == nil || !fs.ValidPath(name) {
		return nil, fmt.Errorf("%.200q is not a file in the folder of certificates", name)
	}
	f, err := r.cfg.Files.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%.200q is no file", name)
	}
	b, err := io.ReadAll(io.LimitReader(f, MaxRow))
	if err != nil {
		return nil, err
	}
	return Certificate(b)
}

// Certificate makes the wire's form of a certificate in a file: PEM, of which the first certificate counts, or DER.
func Certificate(b []byte) (*dps.X509Certificate, error) {
	text := base64.StdEncoding.EncodeToString(b)
	if block, _ := pem.Decode(b); block != nil {
		if block.Type != "CERTIFICATE" {
			return nil, errors.New("it holds no certificate")
		}
		text = base64.StdEncoding.EncodeToString(block.Bytes)
	}
	if _, err := ParseCertificate(text); err != nil {
		return nil, errors.New("it holds no certificate")
	}
	return &dps.X509Certificate{Certificate: text}, nil
}

// The names of the reprovision policies (service API, section 4.5).
const (
	ReprovisionMigrate = "reprovisionandmigratedata"
	ReprovisionReset   = "reprovisionandresetdata"
	ReprovisionNever   = "never"
)

// ParseReprovision reads the name of a reprovision policy, in any letter case and in short too: migrate, reset, never. It returns nil
// for none.
func ParseReprovision(name string) (*dps.ReprovisionPolicy, error) {
	switch strings.ToLower(name) {
	case "":
		return nil, nil
	case ReprovisionMigrate, "migrate":
		return &dps.ReprovisionPolicy{UpdateHubAssignment: true, MigrateDeviceData: true}, nil
	case ReprovisionReset, "reset":
		return &dps.ReprovisionPolicy{UpdateHubAssignment: true}, nil
	case ReprovisionNever:
		return &dps.ReprovisionPolicy{}, nil
	}
	return nil, fmt.Errorf("%.50q is not one of %s, %s and %s", name, ReprovisionMigrate, ReprovisionReset, ReprovisionNever)
}

// FormatReprovision returns the short name of a policy; "" for none.
func FormatReprovision(p *dps.ReprovisionPolicy) string {
	switch {
	case p == nil:
		return ""
	case p.UpdateHubAssignment && p.MigrateDeviceData:
		return "migrate"
	case p.UpdateHubAssignment:
		return "reset"
	}
	return "never"
}

// Twin makes an initial twin of JSON objects; an empty one is none. It returns nil where there is neither.
func Twin(tags, desired []byte) (*dps.InitialTwin, error) {
	t := &dps.InitialTwin{}
	for _, part := range []struct {
		name string
		text []byte
		to   *json.RawMessage
	}{{colTags, tags, &t.Tags}, {colDesired, desired, nil}} {
		if len(bytes.TrimSpace(part.text)) == 0 {
			continue
		}
		var object map[string]json.RawMessage
		if err := json.Unmarshal(part.text, &object); err != nil || object == nil {
			return nil, fmt.Errorf("%s: want a JSON object", part.name)
		}
		if part.to == nil {
			t.Properties = &dps.TwinProperties{}
			part.to = &t.Properties.Desired
		}
		*part.to = bytes.Clone(part.text)
	}
	if t.Tags == nil && t.Properties == nil {
		return nil, nil
	}
	return t, nil
}
