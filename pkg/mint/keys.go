package mint

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/tpm/residency"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/stamp"
)

func (r *run) makeX509(ctx context.Context, units []unit) error {
	fresh := only(units, 0)
	if err := r.inTheWay(ctx, fresh); err != nil {
		return err
	}
	in := r.Profile.Key.In
	for _, u := range fresh {
		if err := ctx.Err(); err != nil {
			return err
		}
		var err error
		if u.plan, err = r.Issuer.Plan(r.unitOf(u.row)); err != nil {
			return fmt.Errorf("serial %s: %w", u.row.Serial, err)
		}
		if in == keyInCSR {
			if err := r.readCSR(ctx, u); err != nil {
				return fmt.Errorf("serial %s: %w", u.row.Serial, err)
			}
		}
		if in == keyInTPM {
			if err := r.readEK(ctx, u); err != nil {
				return fmt.Errorf("serial %s: %w", u.row.Serial, err)
			}
		}
		if in != keyInMemory {
			continue
		}
		if u.signer, err = generate(r.alg, r.Rand); err != nil {
			return fmt.Errorf("serial %s: making its key: %w", u.row.Serial, err)
		}
		if err := u.setKey(); err != nil {
			return err
		}
		if err := r.out.Stage(u.row.RegistrationID, stamp.File{Name: keyFile, Data: u.keyPEM, Secret: true}); err != nil {
			return err
		}
	}
	if in == keyInMemory && len(fresh) > 0 {
		// The key is durable before the ledger says that it is this unit's.
		if err := r.out.Sync(); err != nil {
			return err
		}
	}
	if err := r.commit(ctx, fresh, ledger.Begun, func(u *unit, e *ledger.Event) { e.KeyHash, e.EKHash, e.Data = u.keyHash, u.ekHash, u.plan.Encode() }); err != nil {
		return r.unstage(fresh, err)
	}
	begun := only(units, ledger.Begun)
	for _, u := range begun {
		if err := ctx.Err(); err != nil {
			return err
		}
		if in == keyInToken || in == keyInTPM {
			if err := r.tokenKey(ctx, u); err != nil {
				return err
			}
		}
		var err error
		if u.cert, err = r.Issuer.Issue(u.plan, u.pub); err != nil {
			return fmt.Errorf("serial %s: %w", u.row.Serial, err)
		}
	}
	if in == keyInTPM && len(begun) > 0 {
		// The blobs that hold the keys are durable before the ledger says that their certificates are signed.
		if err := r.out.Sync(); err != nil {
			return err
		}
	}
	return r.commit(ctx, begun, ledger.Minted, func(u *unit, e *ledger.Event) {
		e.Data = append(bytes.Clone(u.cert), u.evidence...) // see splitCertificate
		if in == keyInToken || in == keyInTPM {
			e.KeyHash = u.keyHash
		}
	})
}

// keyName names a device's key in its store. A TPM's is a file of the stamp.
func (r *run) keyName(u *unit) string {
	if r.Profile.Key.In == keyInTPM {
		return strings.TrimSuffix(keyFile, ".pem")
	}
	return tokenKeyName(u.row.RegistrationID, u.revision)
}

// tokenKeyName names a device's key in the line's token. Each revision has its own: the key of the one before is deleted, and
// may still be there when a run that was to do that died.
func tokenKeyName(registrationID string, revision int64) string {
	if revision == 0 {
		return tokenKeyPrefix + dps.Fold(registrationID)
	}
	return fmt.Sprintf("device-r%d:%s", revision, dps.Fold(registrationID))
}

const tokenKeyPrefix = "device:"

// tokenKey makes the unit's key in the token. The name is in the ledger already, so a run that dies right here finds the
// key by it and makes no second one.
func (r *run) tokenKey(ctx context.Context, u *unit) error {
	name := r.keyName(u)
	err := r.withKeys(ctx, u, func(store hsm.Store) error {
		var k hsm.Key
		err := hsm.ErrNotFound
		if u.found {
			k, err = r.keyInToken(ctx, store, name)
		}
		fresh := errors.Is(err, hsm.ErrNotFound)
		if fresh {
			k, err = store.Generate(ctx, hsm.Spec{Name: name, Algorithm: r.alg})
		}
		if err != nil {
			return err
		}
		if err = r.setTokenKey(u, k); err == nil {
			err = r.staysInside(ctx, u, store, k)
		}
		if err != nil && fresh {
			err = errors.Join(err, store.Delete(context.WithoutCancel(ctx), name))
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("serial %s: %w", u.row.Serial, err)
	}
	return nil
}

// withKeys calls f with the store that a unit's key is in: the line's, or the device's own, opened for the call alone.
func (r *run) withKeys(ctx context.Context, u *unit, f func(hsm.Store) error) (err error) {
	if r.Profile.store == nil {
		return f(r.Store)
	}
	uri := r.Profile.store.ExpandURI(r.List.values(u.row.Fields))
	if r.Profile.Key.In == keyInTPM && r.Profile.Attestation == AttestationX509 {
		if uri, err = r.withBlobs(uri, u); err != nil {
			return err
		}
	}
	store, err := r.openPatiently(ctx, uri)
	if err != nil {
		return fmt.Errorf("opening the device's store: %w", err)
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	return f(store)
}

// A device's token or TPM that went away is waited for: the unit is not at fault, and somebody may be putting it back.
const (
	patience = 15 * time.Second
	pause    = 200 * time.Millisecond
)

func (r *run) openPatiently(ctx context.Context, uri string) (hsm.Store, error) {
	for deadline := time.Now().Add(patience); ; {
		store, err := r.OpenStore(ctx, uri)
		if !errors.Is(err, hsm.ErrLost) || time.Now().After(deadline) {
			return store, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err())
		}
	}
}

// readEK reads the endorsement key of the unit's TPM. The ledger refuses a second device with it before anything is made.
func (r *run) readEK(ctx context.Context, u *unit) error {
	return r.withKeys(ctx, u, func(store hsm.Store) error {
		ek, _, err := r.Endorsement(ctx, store)
		if err != nil {
			return err
		}
		u.ekHash, err = ekHash(ek)
		return err
	})
}

// ekHash names a TPM by its endorsement key: by the key alone, because that is what a maker certifies. The rest of the public
// area could be written otherwise.
func ekHash(public []byte) ([]byte, error) {
	area, err := residency.ParsePublic(public)
	if err != nil {
		return nil, fmt.Errorf("endorsement key: %w", err)
	}
	hash, err := residency.KeyHash(area)
	if err != nil {
		return nil, fmt.Errorf("endorsement key: %w", err)
	}
	return hex.DecodeString(hash)
}

// withBlobs names the unit's own directory as the place of a TPM's key blobs.
func (r *run) withBlobs(raw string, u *unit) (string, error) {
	uri, err := hsm.ParseURI(raw)
	if err != nil {
		return "", err
	}
	if uri.Scheme != hsm.SchemeTPM || uri.Keys != "" {
		return "", fmt.Errorf("key.store %s: want tpm:?device=… and no keys: the stamp is where they are kept", uri)
	}
	if u.published {
		uri.Keys = r.out.Dir(u.row.RegistrationID)
	} else {
		if err := r.out.Stage(u.row.RegistrationID); err != nil {
			return "", err
		}
		uri.Keys = r.out.StagedDir(u.row.RegistrationID)
	}
	if uri.Keys, err = filepath.Abs(uri.Keys); err != nil {
		return "", err
	}
	return uri.String(), nil
}

// staysInside asks the token what it made: some do not do what a template says. What a token vouches for is the unit's
// evidence.
func (r *run) staysInside(ctx context.Context, u *unit, store hsm.Store, k hsm.Key) error {
	if r.Profile.Key.In == keyInTPM {
		e, err := r.Attest(ctx, store, k.Name(), u.row.RegistrationID)
		if err != nil {
			return err
		}
		if err := e.Check(evidence.TPM, u.row.RegistrationID, hex.EncodeToString(u.keyHash)); err != nil {
			return fmt.Errorf("key %q: %w", k.Name(), err)
		}
		if hash, err := ekHash(e.TPM.EK); err != nil || !bytes.Equal(hash, u.ekHash) {
			return errors.New("another TPM answers than the one that the unit was begun with: is it another device?")
		}
		return r.keepEvidence(u, e)
	}
	signing, err := hsm.SigningKeyOf(k)
	if err != nil {
		return err
	}
	identifier, vouches := store.(hsm.Identifier)
	var id hsm.Identity
	switch {
	case vouches && store == r.Store: // asked once, not for each device
		r.identityOnce.Do(func() { r.identity, r.identityErr = identifier.Identity(ctx) })
		id, err = r.identity, r.identityErr
	case vouches:
		id, err = identifier.Identity(ctx)
	}
	if err != nil {
		return err
	}
	e, err := evidence.OfToken(ctx, signing, id)
	if err != nil {
		return err
	}
	if a := e.Attributes; a.Extractable || !a.Sensitive {
		return fmt.Errorf("key %q can leave its token, although it was not asked to: %+v", k.Name(), *a)
	}
	if !vouches || e.Check(evidence.Token, u.row.RegistrationID, e.KeyHash) != nil {
		return nil // key files are copied by whoever has the passphrase, and some tokens do not say where a key was made
	}
	u.evidence, err = json.Marshal(e)
	return err
}

// keepEvidence keeps what a TPM proved, once its maker is known where that is asked for.
func (r *run) keepEvidence(u *unit, e *evidence.Evidence) (err error) {
	if r.Makers != nil {
		if e.Maker, err = e.Genuine(r.Makers); err != nil {
			return err
		}
	}
	u.evidence, err = json.Marshal(e)
	return err
}

// splitCertificate takes apart what the ledger keeps of a minted unit: its certificate, which says itself how long it is,
// and the evidence behind it, if there is any.
func splitCertificate(data []byte) (cert, evidence []byte, err error) {
	var der asn1.RawValue
	rest, err := asn1.Unmarshal(data, &der)
	if err != nil {
		return nil, nil, fmt.Errorf("the certificate in the ledger: %w", err)
	}
	return der.FullBytes, rest, nil
}

// keyInToken finds a key that an earlier run made. All of them are listed once: a search for each would cost the square of
// their number.
func (r *run) keyInToken(ctx context.Context, store hsm.Store, name string) (hsm.Key, error) {
	if store != r.Store || r.Shift != "" || !strings.HasPrefix(name, tokenKeyPrefix) {
		return store.Open(ctx, name)
	}
	r.listOnce.Do(func() {
		lister, ok := r.Store.(hsm.Lister)
		if !ok {
			return // then each is searched for
		}
		var keys []hsm.Key
		if keys, r.listErr = lister.List(ctx, tokenKeyPrefix); r.listErr != nil {
			return
		}
		r.inToken = make(map[string]hsm.Key, len(keys))
		for _, k := range keys {
			r.inToken[k.Name()] = k
		}
	})
	switch {
	case r.listErr != nil:
		return nil, r.listErr
	case r.inToken == nil:
		return r.Store.Open(ctx, name)
	}
	if k, ok := r.inToken[name]; ok {
		return k, nil
	}
	return nil, fmt.Errorf("key %q: %w", name, hsm.ErrNotFound)
}

func (r *run) setTokenKey(u *unit, k hsm.Key) error {
	signing, err := hsm.SigningKeyOf(k)
	if err != nil {
		return err
	}
	u.pub, u.keyURI = signing.Public(), k.URI()
	switch {
	case r.Profile.uri != nil:
		u.keyURI = r.Profile.uri.ExpandURI(r.List.values(u.row.Fields))
	case r.Profile.Key.In == keyInTPM:
		// As the device finds it: its own TPM, and the blob beside the stamp.
		u.keyURI = hsm.URI{Scheme: hsm.SchemeTPM, Object: k.Name(), Keys: "."}.String()
	}
	u.keyHash, err = publicKeyHash(u.pub)
	return err
}

// setKey fills in what follows from the signer: its PEM, its public half and that one's hash.
func (u *unit) setKey() error {
	der, err := marshalPKCS8(u.signer)
	if err != nil {
		return err
	}
	u.keyPEM = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	clear(der)
	u.pub = u.signer.Public()
	u.keyHash, err = publicKeyHash(u.pub)
	return err
}

func publicKeyHash(pub crypto.PublicKey) ([]byte, error) {
	spki, err := marshalPKIX(pub)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(spki)
	return sum[:], nil
}

// generate makes a key pair in memory.
func generate(alg hsm.Algorithm, random io.Reader) (crypto.Signer, error) {
	switch alg {
	case hsm.ECP256:
		return ecdsa.GenerateKey(elliptic.P256(), random)
	case hsm.ECP384:
		return ecdsa.GenerateKey(elliptic.P384(), random)
	case hsm.ECP521:
		return ecdsa.GenerateKey(elliptic.P521(), random)
	case hsm.RSA2048:
		return rsa.GenerateKey(random, 2048)
	case hsm.RSA3072:
		return rsa.GenerateKey(random, 3072)
	case hsm.RSA4096:
		return rsa.GenerateKey(random, 4096)
	case hsm.Ed25519:
		_, priv, err := ed25519.GenerateKey(random)
		return priv, err
	}
	return nil, fmt.Errorf("key pairs of algorithm %q: %w", alg, hsm.ErrUnsupported)
}

// symmetricKeyHash names a symmetric key without telling it: SHA-256 over a label and the key, which has 256 bits of
// entropy.
func symmetricKeyHash(key hsm.Secret) []byte {
	h := sha256.New()
	h.Write([]byte("touchmark symmetric key\x00"))
	h.Write(key)
	return h.Sum(nil)
}

// makeDerived derives each device's key from the group key: base64(HMAC-SHA256(group key, registration ID)). It comes out
// the same every time, so nothing has to be durable before the unit is minted.
func (r *run) makeDerived(ctx context.Context, units []unit) error {
	fresh := only(units, 0)
	if err := r.inTheWay(ctx, fresh); err != nil {
		return err
	}
	for i := range units {
		u := &units[i]
		if u.state > ledger.Minted || u.state == ledger.Minted && r.out == nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		key, err := r.GroupKey.MAC(ctx, make([]byte, 0, sha256.Size), []byte(u.row.RegistrationID))
		if err != nil {
			return fmt.Errorf("serial %s: deriving its key: %w", u.row.Serial, err)
		}
		u.symmetric = key
		hash := symmetricKeyHash(key)
		if u.state == ledger.Minted && !bytes.Equal(hash, u.keyHash) {
			return fmt.Errorf("serial %s: %w: the group key derives another key than it did when the unit was minted", u.row.Serial, ErrUnproven)
		}
		u.keyHash = hash
	}
	return r.commit(ctx, fresh, ledger.Minted, func(u *unit, e *ledger.Event) { e.KeyHash = u.keyHash })
}

// makeRandom gives each device a key of its own. The staged stamp is where it lives until the device has it.
func (r *run) makeRandom(ctx context.Context, units []unit) error {
	fresh := only(units, 0)
	if err := r.inTheWay(ctx, fresh); err != nil {
		return err
	}
	for _, u := range fresh {
		u.symmetric = make(hsm.Secret, symmetricSize)
		if _, err := io.ReadFull(r.Rand, u.symmetric); err != nil {
			return err
		}
		u.keyHash = symmetricKeyHash(u.symmetric)
		if err := r.render(u); err != nil {
			return err
		}
		if err := r.out.Stage(u.row.RegistrationID, u.files...); err != nil {
			return err
		}
	}
	if len(fresh) > 0 {
		if err := r.out.Sync(); err != nil {
			return err
		}
	}
	if err := r.commit(ctx, fresh, ledger.Minted, func(u *unit, e *ledger.Event) { e.KeyHash = u.keyHash }); err != nil {
		return r.unstage(fresh, err)
	}
	return nil
}

// unstage throws away what was staged for units that the ledger refused. Where it is not known that it refused, the staged
// keys stay for the next run to look at.
func (r *run) unstage(units []*unit, cause error) error {
	var dup *ledger.DuplicateError
	if r.out == nil || !errors.As(cause, &dup) {
		return cause
	}
	for _, u := range units {
		if err := r.out.Discard(u.row.RegistrationID); err != nil {
			return errors.Join(cause, err)
		}
	}
	return cause
}
