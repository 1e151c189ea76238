package mint

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/stamp"
	"github.com/touchmark/touchmark/pkg/stamp/nvs"
	"github.com/touchmark/touchmark/templates"
)

// stamp brings minted units to verified: into the device's own token where the profile says so, and into its directory.
func (r *run) stamp(ctx context.Context, units []unit) error {
	minted := only(units, ledger.Minted)
	if len(minted) == 0 {
		return nil
	}
	for _, u := range minted {
		if err := r.render(u); err != nil {
			return err
		}
		if r.Profile.Stamp.Token {
			if err := r.stampToken(ctx, u); err != nil {
				return fmt.Errorf("serial %s: %w", u.row.Serial, err)
			}
		}
	}
	for _, u := range minted {
		if r.Profile.nv == 0 {
			break
		}
		if err := r.stampNV(ctx, u); err != nil {
			return fmt.Errorf("serial %s: %w", u.row.Serial, err)
		}
	}
	if r.out != nil {
		if err := r.stampFiles(minted); err != nil {
			return err
		}
	}
	for _, u := range minted {
		if err := r.stampDevices(ctx, u); err != nil {
			return fmt.Errorf("serial %s: %w", u.row.Serial, err)
		}
	}
	return r.commit(ctx, minted, r.stamped, nil)
}

// stampNV puts the part of a unit's stamp that every device needs into its TPM's non-volatile memory.
func (r *run) stampNV(ctx context.Context, u *unit) error {
	document, err := json.Marshal(struct {
		IDScope        string `json:"idScope"`
		GlobalEndpoint string `json:"globalEndpoint"`
		RegistrationID string `json:"registrationId"`
	}{r.IDScope, r.GlobalEndpoint, u.row.RegistrationID})
	if err != nil {
		return err
	}
	return r.withKeys(ctx, u, func(store hsm.Store) error {
		tpm, ok := store.(stamp.NV)
		if !ok {
			return fmt.Errorf("stamping into %s: it has no NV indices: %w", store.URI(), hsm.ErrUnsupported)
		}
		return stamp.ToNV(ctx, tpm, r.Profile.nv, document)
	})
}

// stampToken puts a unit's stamp into the device's own token. What an earlier run put there is left when it is the same.
func (r *run) stampToken(ctx context.Context, u *unit) error {
	cert, err := x509.ParseCertificate(u.cert)
	if err != nil {
		return err
	}
	return r.withKeys(ctx, u, func(store hsm.Store) error {
		return stamp.ToToken(ctx, store, r.keyName(u), cert, u.files[:len(u.files)-len(r.Profile.images)])
	})
}

// stampFiles puts units' stamps into their directories: everything staged and flushed, one rename each, flushed, read back.
func (r *run) stampFiles(minted []*unit) error {
	for _, u := range minted {
		if u.published {
			continue
		}
		if u.found {
			if err := r.out.Replace(u.row.RegistrationID, u.files...); err != nil {
				return err
			}
			continue
		}
		if err := r.out.Stage(u.row.RegistrationID, r.unstaged(u)...); err != nil {
			return err
		}
	}
	if err := r.out.Sync(); err != nil {
		return err
	}
	for _, u := range minted {
		if u.published {
			continue
		}
		if err := r.out.Publish(u.row.RegistrationID); err != nil {
			return err
		}
	}
	if err := r.out.Sync(); err != nil {
		return err
	}
	for _, u := range minted {
		if err := r.out.ReadBack(u.row.RegistrationID, u.files...); err != nil {
			return fmt.Errorf("serial %s: %w", u.row.Serial, err)
		}
	}
	return nil
}

// unstaged returns the files that this run has not staged yet.
func (r *run) unstaged(u *unit) []stamp.File {
	if r.Profile.Attestation == AttestationX509 {
		if in := r.Profile.Key.In; in == keyInMemory || in == keyInTPM {
			return u.files[1:] // the key went first
		}
		return u.files
	}
	if r.Profile.Key.In == keyInMemory {
		return nil
	}
	return u.files
}

// provisioning is the document provisioning.json.
type provisioning struct {
	IDScope          string `json:"idScope"`
	GlobalEndpoint   string `json:"globalEndpoint"`
	RegistrationID   string `json:"registrationId"`
	Attestation      string `json:"attestation"`
	CertificateChain string `json:"certificateChain,omitempty"`
	PrivateKey       string `json:"privateKey,omitempty"`
	KeyURI           string `json:"keyUri,omitempty"`
	SymmetricKey     string `json:"symmetricKey,omitempty"`
}

// render makes the files of a unit's stamp: the key file of a key in memory first, images last.
func (r *run) render(u *unit) (err error) {
	if u.files != nil {
		return nil
	}
	key := u.keyPEM
	if r.Profile.Key.In == keyInTPM && r.Profile.Attestation == AttestationX509 {
		if key, err = r.onDisk(u, keyFile); err != nil {
			return fmt.Errorf("serial %s: its key: %w", u.row.Serial, err)
		}
	}
	if u.files, err = r.renderFiles(u, key, func(name string) (*nvs.Keys, error) { return r.nvsKeys(u, name) }); err != nil {
		u.files = nil
		return fmt.Errorf("serial %s: %w", u.row.Serial, err)
	}
	return nil
}

// renderFiles makes the files of a unit's stamp, with the content of its key file, if it has one.
func (r *run) renderFiles(u *unit, key []byte, keys func(string) (*nvs.Keys, error)) ([]stamp.File, error) {
	doc := provisioning{IDScope: r.IDScope, GlobalEndpoint: r.GlobalEndpoint, RegistrationID: u.row.RegistrationID}
	files := make([]stamp.File, 0, 3+len(r.Templates)+len(r.Profile.images))
	var chain []byte
	if r.Profile.Attestation == AttestationX509 {
		doc.Attestation, doc.CertificateChain = "x509", chainFile
		if key != nil {
			files = append(files, stamp.File{Name: keyFile, Data: key, Secret: true})
		}
		switch r.Profile.Key.In {
		case keyInMemory:
			doc.PrivateKey = keyFile
		case keyInCSR:
			doc.KeyURI = r.Profile.uri.ExpandURI(r.List.values(u.row.Fields))
		default:
			doc.KeyURI = u.keyURI
		}
		chain = append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: u.cert}), r.chain...)
		files = append(files, stamp.File{Name: chainFile, Data: chain})
	} else if r.Profile.Attestation == AttestationTPM {
		doc.Attestation = "tpm"
	} else {
		doc.Attestation, doc.SymmetricKey = "symmetricKey", base64.StdEncoding.EncodeToString(u.symmetric)
	}
	b, err := json.Marshal(doc)
	if err != nil {
		return nil, err
	}
	files = append(files, stamp.File{Name: stampFile, Data: append(b, '\n'), Secret: doc.SymmetricKey != ""})
	for i, t := range r.Templates {
		s := r.Profile.Stamp.File[i]
		device := templates.Device{
			IDScope: doc.IDScope, GlobalEndpoint: doc.GlobalEndpoint, RegistrationID: doc.RegistrationID, Serial: u.row.Serial,
			Attestation: doc.Attestation, CertificateChainFile: doc.CertificateChain, PrivateKeyFile: doc.PrivateKey,
			KeyURI: doc.KeyURI, CertificateChain: string(chain), PrivateKey: string(u.keyPEM),
			SymmetricKey: doc.SymmetricKey, Columns: r.fields(u.row),
		}
		out, err := t.Render(nil, device)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.Name, err)
		}
		if !s.Secret {
			shows, err := t.ShowsSecret(out, device)
			if shows || err != nil {
				return nil, errors.Join(err, fmt.Errorf("%s would show the device's key to everybody: set secret = true for it in profile %s", s.Name, r.Profile.Name))
			}
		}
		files = append(files, stamp.File{Name: s.Name, Data: out, Secret: s.Secret})
	}
	for _, m := range r.Profile.images {
		f, err := m.build(&source{files: files, symmetric: u.symmetric, keys: keys, field: func(name string) (string, error) { return r.imageField(u.row, &doc, name) }})
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", m.Name, err)
		}
		files = append(files, f)
	}
	return files, nil
}

func (r *run) fields(row *Row) map[string]string {
	if len(r.List.Columns) == 1 && len(r.Templates) == 0 {
		return nil
	}
	return r.List.fields(row)
}
