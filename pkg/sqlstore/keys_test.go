package sqlstore_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/hsm/keyfile"
	"github.com/touchmark/touchmark/hsm/pkcs11"
	"github.com/touchmark/touchmark/hsm/tpm"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/sqlstore"
	"github.com/touchmark/touchmark/pkg/sqlstore/sqlstoretest"
)

// treasure is a secret in each place that the store seals, under a name of its own.
type treasure struct {
	name                                                              string
	keys, primary, secondary, secret, device, wrapped, hub, task, kin []byte
}

func newTreasure(name string) *treasure {
	x := &treasure{name: name}
	for _, p := range x.all() {
		*p = make([]byte, 48)
		_, _ = rand.Read(*p)
	}
	return x
}

func (x *treasure) all() []*[]byte {
	return []*[]byte{&x.keys, &x.primary, &x.secondary, &x.secret, &x.device, &x.wrapped, &x.hub, &x.task, &x.kin}
}

func (x *treasure) scope() string { return "scope-" + x.name }

func (x *treasure) put(tx registration.Tx) error {
	keys := fmt.Appendf(nil, `{"primaryKey":%q}`, base64.StdEncoding.EncodeToString(x.keys))
	return errors.Join(tx.PutRecord(x.scope(), &registration.Record{Kind: registration.Group, ID: "g", Document: []byte("{}"), Keys: keys, Symmetric: true}),
		tx.PutPolicy(x.scope(), &registration.Policy{Name: "owner", Primary: x.primary, Secondary: x.secondary}),
		tx.PutSecret(x.scope(), "hub", fmt.Appendf(nil, "HostName=hub.example.net;SharedAccessKey=%s", base64.StdEncoding.EncodeToString(x.secret))),
		tx.PutRegistration(x.scope(), &registration.Registration{ID: "d", DeviceKey: x.device}),
		tx.PutChallenge(x.scope(), &registration.PendingChallenge{ID: "d", Wrapped: registration.Wrapped{Key: x.wrapped}, Expires: time.Now()}, time.Now()),
		tx.PutTask(x.scope(), &registration.Task{ID: "d", Goal: &registration.Goal{Device: told(x.task)}}),
		tx.PutKin(x.scope(), &registration.Kin{ID: "d", Device: told(x.kin)}),
		tx.PutScope(&registration.Scope{ID: x.scope(), Name: x.scope(), Settings: registration.Settings{Hubs: []registration.LinkedHub{{Name: base64.StdEncoding.EncodeToString(x.hub)}}}}))
}

// told is a device as a hub is told it.
func told(key []byte) *registration.HubDevice {
	return &registration.HubDevice{Keys: &dps.SymmetricKeyAttestation{PrimaryKey: base64.StdEncoding.EncodeToString(key)}}
}

// check reads everything back.
func (x *treasure) check(tx registration.Tx) error {
	r, e1 := tx.Record(x.scope(), registration.Group, "g")
	p, e2 := tx.Policy(x.scope(), "owner")
	s, e3 := tx.Secret(x.scope(), "hub")
	d, e4 := tx.Registration(x.scope(), "d")
	c, e5 := tx.Challenge(x.scope(), "d")
	sc, e6 := tx.Scope(x.scope())
	k, e7 := tx.Task(x.scope(), "d")
	kin, e8 := tx.Kin(x.scope(), "d")
	if err := errors.Join(e1, e2, e3, e4, e5, e6, e7, e8); err != nil {
		return err
	}
	text := base64.StdEncoding.EncodeToString
	if !strings.Contains(string(r.Keys), text(x.keys)) || !bytes.Equal(p.Primary, x.primary) || !bytes.Equal(p.Secondary, x.secondary) || !strings.Contains(string(s), text(x.secret)) ||
		!bytes.Equal(d.DeviceKey, x.device) || !bytes.Equal(c.Key, x.wrapped) || sc.Hubs[0].Name != text(x.hub) ||
		k.Goal.Device.Keys.PrimaryKey != text(x.task) || kin.Device.Keys.PrimaryKey != text(x.kin) {
		return errors.New("something else came back")
	}
	return nil
}

func mustUpdate(t testing.TB, s *sqlstore.Store, f func(registration.Tx) error) {
	t.Helper()
	if err := s.Update(t.Context(), f); err != nil {
		t.Fatal(err)
	}
}

func mustView(t testing.TB, s *sqlstore.Store, f func(registration.Tx) error) {
	t.Helper()
	if err := s.View(t.Context(), f); err != nil {
		t.Fatal(err)
	}
}

// spellings are the ways in which a secret could be in a file.
func spellings(secret []byte) (all [][]byte) {
	all = append(all, secret, []byte(hex.EncodeToString(secret)), []byte(strings.ToUpper(hex.EncodeToString(secret))))
	for shift := range 3 { // base64 of something that it is in
		for _, e := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
			text := e.EncodeToString(append(make([]byte, shift), secret...))
			all = append(all, []byte(text[4:len(text)-4]))
		}
	}
	return all
}

// Invariant 5: who takes the database away, with what is in its write-ahead log, has no secret, and neither has who reads on after
// the data key was changed. The files are copied while the store is open.
func TestStolenFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s.db")
	s := open(t, path)
	x := newTreasure("one")
	marker := []byte("a document, which is no secret")
	mustUpdate(t, s, func(tx registration.Tx) error {
		return errors.Join(x.put(tx), tx.PutRecord("scope", &registration.Record{Kind: registration.Individual, ID: "d", Document: marker}))
	})
	search := func(when string) {
		t.Helper()
		files, _ := filepath.Glob(path + "*")
		var stolen []byte
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			stolen = append(stolen, b...)
		}
		if len(files) < 2 || !bytes.Contains(stolen, marker) {
			t.Fatalf("%s: %v do not hold what was written", when, files)
		}
		for i, p := range append(x.all(), &key) {
			for k, text := range spellings(*p) {
				if bytes.Contains(stolen, text) {
					t.Errorf("%s: secret %d is there, in spelling %d", when, i, k)
				}
			}
		}
	}
	search("as written")
	if err := s.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Reseal(t.Context()); err != nil {
		t.Fatal(err)
	}
	search("sealed anew")
}

// The files are the service's alone, also in a directory that others may look into.
func TestFileModes(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s := open(t, filepath.Join(dir, "s.db"))
	mustUpdate(t, s, newTreasure("one").put)
	files, err := os.ReadDir(dir)
	if err != nil || len(files) < 2 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		if info, err := f.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f.Name(), info.Mode(), err)
		}
	}
}

// The key of a webhook stands in its address, in an enrollment's document.
func TestStolenWebhook(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	s := open(t, path)
	const code = "a-function-key-that-nobody-is-to-find"
	document := []byte(`{"registrationId":"d","customAllocationDefinition":{"webhookUrl":"https://f.example.net/a?code=` + code + `"}}`)
	record := func(id string) *registration.Record {
		return &registration.Record{Kind: registration.Individual, ID: id, Document: document}
	}
	mustUpdate(t, s, func(tx registration.Tx) error {
		return errors.Join(tx.PutRecord("one", record("d")), tx.PutFresh("one", []*registration.Record{record("e")}, nil),
			tx.PutRecord("one", &registration.Record{Kind: registration.Group, ID: "g", Document: document}), tx.PutRecord("one", &registration.Record{Kind: registration.Individual, ID: "plain", Document: []byte("{}")}))
	})
	check := func(when string) {
		t.Helper()
		files, _ := filepath.Glob(path + "*")
		for _, f := range files {
			if b, err := os.ReadFile(f); err != nil || bytes.Contains(b, []byte(code)) {
				t.Errorf("%s: %s holds the key, %v", when, f, err)
			}
		}
		mustView(t, s, func(tx registration.Tx) error {
			all, err := tx.Records("one", registration.Individual, "", 10)
			if err != nil || len(all) != 3 || !bytes.Equal(all[0].Document, document) || !bytes.Equal(all[1].Document, document) || string(all[2].Document) != "{}" {
				t.Errorf("%s: %d, %v", when, len(all), err)
			}
			g, err := tx.Record("one", registration.Group, "g")
			if err != nil || !bytes.Equal(g.Document, document) {
				t.Errorf("%s: %v", when, err)
			}
			return nil
		})
	}
	check("as written")
	if err := s.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Reseal(t.Context()); err != nil || n > 3 {
		t.Fatal(n, err)
	}
	if keys, err := s.DataKeys(t.Context()); err != nil || len(keys) != 1 {
		t.Fatal(keys, err)
	}
	check("sealed anew")
}

// What is sealed serves in its own row only.
func TestSealedRows(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	s := open(t, path)
	one, two := newTreasure("one"), newTreasure("two")
	mustUpdate(t, s, func(tx registration.Tx) error { return errors.Join(one.put(tx), two.put(tx)) })
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for table, column := range map[string]string{"records": "keys", "secrets": "value", "registrations": "device_key", "challenges": "body", "scopes": "document", "policies": "primary_key"} {
		if _, err := db.Exec(fmt.Sprintf(`UPDATE %s SET %s = (SELECT %s FROM %s WHERE scope = 'scope-one') WHERE scope = 'scope-two'`, table, column, column, table)); err != nil {
			t.Fatal(err)
		}
	}
	mustView(t, s, one.check)
	for what, read := range map[string]func(registration.Tx) error{
		"record":       func(tx registration.Tx) error { _, err := tx.Record("scope-two", registration.Group, "g"); return err },
		"policy":       func(tx registration.Tx) error { _, err := tx.Policy("scope-two", "owner"); return err },
		"secret":       func(tx registration.Tx) error { _, err := tx.Secret("scope-two", "hub"); return err },
		"registration": func(tx registration.Tx) error { _, err := tx.Registration("scope-two", "d"); return err },
		"challenge":    func(tx registration.Tx) error { _, err := tx.Challenge("scope-two", "d"); return err },
		"scope":        func(tx registration.Tx) error { _, err := tx.Scope("scope-two"); return err },
	} {
		if err := s.View(t.Context(), read); err == nil || !strings.Contains(err.Error(), "does not decrypt") {
			t.Errorf("%s of another scope: %v", what, err)
		}
	}
}

// Every column of octets is either sealed anew when the data key is changed, or is known to hold nothing sealed. Whoever adds one
// says here, or in sealedColumns, which it is: what is sealed and not on that list is lost when the old key is dropped.
func TestSealedColumns(t *testing.T) {
	plain := []string{"records.content", "certificates.fingerprint", "certificates.subject", "authorities.subject", "authorities.key_id",
		"registrations.body", "grants.document", "issued.plan", "audit.body", "orphans.body", "attempts.body", "ca_certificates.body", "commits.token", "data_keys.wrapped"}
	path := filepath.Join(t.TempDir(), "s.db")
	open(t, path)
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	rows, err := db.Query(`SELECT m.name, c.name FROM sqlite_schema AS m, pragma_table_info(m.name) AS c WHERE m.type = 'table' AND c.type IN ('BYTEA', 'BLOB')`)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for rows.Next() {
		var table, column string
		if err := rows.Scan(&table, &column); err != nil {
			t.Fatal(err)
		}
		found++
		if name := table + "." + column; sqlstore.Sealed(table, column) == slices.Contains(plain, name) {
			t.Errorf("%s is sealed and plain, or neither", name)
		}
	}
	if err := rows.Err(); err != nil || found < len(plain) {
		t.Fatal(found, err)
	}
}

func newestKey(t testing.TB, s *sqlstore.Store) (newest *sqlstore.DataKey, n int) {
	t.Helper()
	keys, err := s.DataKeys(t.Context())
	if err != nil || len(keys) == 0 {
		t.Fatal(keys, err)
	}
	return keys[len(keys)-1], len(keys)
}

// The data key is changed, twice, while others write and read: nothing is lost, and in the end there is one key, which everything
// is under. On a database another store takes part that learns of it by itself.
func TestRotate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	dsn := sqlstoretest.Start(t).Database(t)
	for name, stores := range map[string][]*sqlstore.Store{
		"memory":     {open(t, "")},
		"one file":   {open(t, path), open(t, path)}, // as a command does beside the service
		"PostgreSQL": {openDSN(t, dsn), openDSN(t, dsn)},
	} {
		t.Run(name, func(t *testing.T) {
			const writers, rounds = 3, 12
			var all []*treasure
			for i := range writers * rounds {
				all = append(all, newTreasure(fmt.Sprint(i)))
			}
			before := newTreasure("before")
			mustUpdate(t, stores[0], before.put)
			mustUpdate(t, stores[0], func(tx registration.Tx) error { // more than one transaction takes
				for i := range 1500 {
					if err := tx.PutSecret("many", fmt.Sprint(i), fmt.Append(nil, "secret ", i)); err != nil {
						return err
					}
				}
				return nil
			})
			var eg errgroup.Group
			for w := range writers {
				eg.Go(func() error {
					for i := range rounds {
						s := stores[i%len(stores)]
						x := all[w*rounds+i]
						if err := s.Update(t.Context(), x.put); err != nil {
							return err
						}
						if err := stores[(i+1)%len(stores)].View(t.Context(), x.check); err != nil {
							return err
						}
					}
					return nil
				})
			}
			eg.Go(func() error {
				for range 2 {
					if err := stores[0].Rotate(t.Context()); err != nil {
						return err
					}
					if _, err := stores[0].Reseal(t.Context()); err != nil {
						return err
					}
				}
				return nil
			})
			if err := eg.Wait(); err != nil {
				t.Fatal(err)
			}
			if _, err := stores[0].Reseal(t.Context()); err != nil {
				t.Fatal(err)
			}
			if k, n := newestKey(t, stores[0]); n != 1 || k.ID != 3 || k.Seals == 0 {
				t.Errorf("%d keys, the newest of them %+v", n, k)
			}
			for _, s := range stores {
				for _, x := range append(all, before) {
					mustView(t, s, x.check)
				}
				mustView(t, s, func(tx registration.Tx) error {
					for i := range 1500 {
						if b, err := tx.Secret("many", fmt.Sprint(i)); err != nil || string(b) != fmt.Sprint("secret ", i) {
							return fmt.Errorf("%d: %q, %w", i, b, err)
						}
					}
					return nil
				})
			}
		})
	}
}

// Sealing anew that is killed goes on where it was. The child seals anew and is killed when it has begun.
func TestRotateKilled(t *testing.T) {
	if path := os.Getenv("SQLSTORE_TEST_ROTATE"); path != "" {
		s, err := sqlstore.Open(context.Background(), sqlstore.Config{Path: path, DataKey: key})
		if err != nil {
			panic(err)
		}
		fmt.Println("open")
		if err := s.Rotate(context.Background()); err != nil {
			panic(err)
		}
		for {
			keys, err := s.DataKeys(context.Background())
			if err != nil {
				panic(err)
			}
			fmt.Println(len(keys))
		}
	}
	path := filepath.Join(t.TempDir(), "s.db")
	s := open(t, path)
	x := newTreasure("one")
	mustUpdate(t, s, x.put)
	for chunk := range 20 {
		mustUpdate(t, s, func(tx registration.Tx) error {
			for i := range 1000 {
				if err := tx.PutSecret("many", fmt.Sprint(chunk, " ", i), []byte("secret")); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	cut := 0
	for range 4 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestRotateKilled$")
		cmd.Env = append(os.Environ(), "SQLSTORE_TEST_ROTATE="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		in := bufio.NewScanner(out)
		for n := 0; in.Scan(); n++ {
			if in.Text() != "open" && in.Text() != "1" && n > 3 {
				_ = cmd.Process.Kill()
			}
		}
		_ = cmd.Wait()
		s := open(t, path)
		if _, n := newestKey(t, s); n > 1 {
			cut++
		}
		if _, err := s.Reseal(t.Context()); err != nil {
			t.Fatal(err)
		}
		if k, n := newestKey(t, s); n != 1 {
			t.Errorf("%d keys are left, the newest of them %d", n, k.ID)
		}
		mustView(t, s, x.check)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if cut == 0 {
		t.Error("no child was killed in time")
	}
}

// A store whose secrets are under the key of the file itself opens with that key, and no other one, and is then as all are.
func TestOlderSecrets(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	s := open(t, path)
	x := newTreasure("one")
	mustUpdate(t, s, x.put)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := sqlstore.Legacy(t.Context(), path, key); err != nil {
		t.Fatal(err)
	}
	if _, err := sqlstore.Open(t.Context(), sqlstore.Config{Path: path, DataKey: bytes.Repeat([]byte{9}, 32)}); !errors.Is(err, sqlstore.ErrWrongKey) {
		t.Errorf("with another key: %v", err)
	}
	s = open(t, path)
	mustView(t, s, x.check)
	if _, err := s.Reseal(t.Context()); err != nil {
		t.Fatal(err)
	}
	if k, n := newestKey(t, s); n != 1 || k.ID != 1 {
		t.Errorf("%d keys, the newest of them %d", n, k.ID)
	}
	mustView(t, s, x.check)
}

// A data key that has sealed enough is changed.
func TestSealsAreCounted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	s := open(t, path)
	x := newTreasure("one")
	mustUpdate(t, s, x.put)
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(`UPDATE data_keys SET seals = 1 << 31`); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil { // what it has counted ahead goes with it
		t.Fatal(err)
	}
	s = open(t, path)
	for k, _ := newestKey(t, s); k.ID < 2; k, _ = newestKey(t, s) {
		mustUpdate(t, s, x.putSecretAgain)
	}
	mustView(t, s, x.check)
}

func (x *treasure) putSecretAgain(tx registration.Tx) error {
	b, err := tx.Secret(x.scope(), "hub")
	if err != nil {
		return err
	}
	return tx.PutSecret(x.scope(), "hub", b)
}

// Data keys are wrapped under keys of every kind that can, and go from one to another; the old one opens nothing then.
func TestWrapping(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	x := newTreasure("one")
	var ways []*sqlstore.WrappingKey
	file := func(b byte) *sqlstore.WrappingKey {
		w, err := sqlstore.KeyFile(bytes.Repeat([]byte{b}, 32))
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	token := func(store hsm.Store, err error, alg hsm.Algorithm) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		k, err := store.Generate(t.Context(), hsm.Spec{Name: "wrapping-" + strings.ToLower(string(alg)), Algorithm: alg})
		if err != nil {
			t.Fatal(err)
		}
		w, err := sqlstore.TokenKey(store, k)
		if err != nil {
			t.Fatal(err)
		}
		ways = append(ways, w)
	}
	ways = append(ways, file(7))
	soft, err := pkcs11.Open(t.Context(), pkcs11.Config{URI: hsmtest.SoftHSM(t, "store"), PIN: func(context.Context) (hsm.Secret, error) { return hsm.Secret(hsmtest.PIN), nil }})
	if cgo {
		token(soft, err, hsm.AES256)
		token(soft, err, hsm.HMACSHA256)
		t.Cleanup(func() { _ = soft.Close() })
	} else if !errors.Is(err, hsm.ErrUnsupported) {
		t.Fatalf("a module without cgo: %v", err)
	}
	chip, err := tpm.Open(t.Context(), tpm.Config{URI: hsmtest.SWTPM(t).URI()})
	token(chip, err, hsm.HMACSHA256)
	t.Cleanup(func() { _ = chip.Close() })
	keyfile.TestWorkFactor(10)
	dir := filepath.Join(t.TempDir(), "keys")
	if err := keyfile.Create(dir, hsm.Secret("words")); err != nil {
		t.Fatal(err)
	}
	files, err := keyfile.Open(t.Context(), keyfile.Config{Dir: dir, Passphrase: func(context.Context) (hsm.Secret, error) { return hsm.Secret("words"), nil }})
	token(files, err, hsm.HMACSHA256)
	t.Cleanup(func() { _ = files.Close() })
	ways = append(ways, file(8))

	with := func(w *sqlstore.WrappingKey) (*sqlstore.Store, error) {
		return sqlstore.Open(t.Context(), sqlstore.Config{Path: path, Wrapping: w})
	}
	for i, w := range ways {
		s, err := with(w)
		if err != nil {
			t.Fatalf("%s: %v", w.Name(), err)
		}
		if i == 0 {
			mustUpdate(t, s, x.put)
		}
		mustView(t, s, x.check)
		if err := s.Rotate(t.Context()); err != nil {
			t.Fatalf("%s: %v", w.Name(), err)
		}
		if _, err := s.Reseal(t.Context()); err != nil {
			t.Fatalf("%s: %v", w.Name(), err)
		}
		if i < len(ways)-1 {
			if err := s.Rewrap(t.Context(), ways[i+1]); err != nil {
				t.Fatalf("from %s to %s: %v", w.Name(), ways[i+1].Name(), err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, w := range ways[:len(ways)-1] {
		if s, err := with(w); err == nil {
			_ = s.Close()
			t.Errorf("%s still opens the store", w.Name())
		} else if strings.HasPrefix(w.Name(), "key file") && !errors.Is(err, sqlstore.ErrWrongKey) {
			t.Errorf("%s: %v", w.Name(), err)
		}
	}
	if names := []string{ways[0].Name(), ways[1].Name()}; slices.Contains(names, "") || strings.Contains(names[1], hsmtest.PIN) {
		t.Errorf("names %q", names)
	}
	signing, err := files.Generate(t.Context(), hsm.Spec{Name: "signs", Algorithm: hsm.ECP256})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sqlstore.TokenKey(files, signing); !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("a signing key: %v", err)
	}
	if _, err := sqlstore.KeyFile(key[1:]); err == nil {
		t.Error("a short key")
	}
}
