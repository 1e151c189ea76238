package sqlstore

import (
	"context"
	"crypto/cipher"
	"crypto/rand"
	"database/sql"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/registration"
)

// What is sealed begins with this octet and the ID of its data key, four octets; the nonce and the rest follow. What was sealed
// before there were IDs begins with its nonce, and the data key that it is under is that with the ID 0.
const (
	sealedWithID = 1
	sealedHead   = 5
)

const (
	// sealBlock is how many seals a store counts at once, so that counting costs nothing.
	sealBlock = 1 << 16
	// maxSeals is after how many a data key is changed: random nonces are good for 2^32.
	maxSeals = 1 << 31
)

// dataKeys are those that the store has unwrapped.
type dataKeys struct {
	wrapping *WrappingKey

	mu   sync.Mutex
	aead map[int64]cipher.AEAD
	// Seals of one data key that are counted already.
	counted, left int64
}

// count reports whether one more seal of a key is counted already.
func (k *dataKeys) count(id int64) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.left--
	return k.counted == id && k.left >= 0
}

// committed says that a block of seals was counted.
func (k *dataKeys) committed(id int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.counted, k.left = id, sealBlock
}

func (k *dataKeys) get(id int64) cipher.AEAD {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.aead[id]
}

func (k *dataKeys) put(id int64, aead cipher.AEAD) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.aead[id] = aead
}

// keyStatements are those of data keys and of what is sealed under them.
type keyStatements struct {
	newestKey, keyWrapped, putKey, countSeals, keyPlace, putKeyPlace, dropKeys, keyRows, rewrapKey *sql.Stmt
	sealedRows, putSealed                                                                          [len(sealedColumns)]*sql.Stmt
}

func (st *keyStatements) all() []statement {
	all := []statement{
		{&st.newestKey, `SELECT COALESCE(MAX(id), -1) FROM data_keys`},
		{&st.keyWrapped, `SELECT wrapping, wrapped FROM data_keys WHERE id = $1`},
		{&st.putKey, `INSERT INTO data_keys (id, wrapping, wrapped, created, seals, place) VALUES ($1, $2, $3, $4, 0, '') ON CONFLICT (id) DO NOTHING`},
		{&st.countSeals, `UPDATE data_keys SET seals = seals + $2 WHERE id = $1`},
		{&st.keyPlace, `SELECT place, seals FROM data_keys WHERE id = $1`},
		{&st.putKeyPlace, `UPDATE data_keys SET place = $2 WHERE id = $1`},
		{&st.dropKeys, `DELETE FROM data_keys WHERE id < $1`},
		{&st.keyRows, `SELECT id, wrapping, wrapped, created, seals FROM data_keys ORDER BY id`},
		{&st.rewrapKey, `UPDATE data_keys SET wrapping = $2, wrapped = $3 WHERE id = $1`},
	}
	for i, c := range sealedColumns {
		all = append(all, statement{&st.sealedRows[i], c.rows()}, statement{&st.putSealed[i], c.put()})
	}
	return all
}

// A DataKey is one that secrets in the store are sealed under.
type DataKey struct {
	ID       int64     `json:"id"`
	Wrapping string    `json:"wrapping"` // the key that it is wrapped under
	Created  time.Time `json:"created"`
	// Seals is how often it was used at most. It is changed in time, before 2^32.
	Seals   int64  `json:"seals"`
	wrapped []byte // under the wrapping key
}

func scanKey(row scanner) (*DataKey, error) {
	k := &DataKey{}
	var created string
	if err := row.Scan(&k.ID, &k.Wrapping, &k.wrapped, &created, &k.Seals); err != nil {
		return nil, err
	}
	var err error
	k.Created, err = moment(created)
	return k, err
}

// DataKeys returns the store's data keys, oldest first. The newest one seals; while there are others, what is under them is
// being sealed anew.
func (s *Store) DataKeys(ctx context.Context) (keys []*DataKey, err error) {
	err = s.View(ctx, func(x registration.Tx) error {
		t := x.(*tx)
		keys, err = each(t, scanKey, t.st.keyRows)
		return err
	})
	return keys, err
}

// openKeys unwraps the data keys, or makes the first one. A store from before there were such keys has its secrets under legacy.
func (s *Store) openKeys(ctx context.Context, legacy []byte) error {
	var keys []*DataKey
	err := s.Update(ctx, func(x registration.Tx) (err error) {
		t := x.(*tx)
		if keys, err = each(t, scanKey, t.st.keyRows); err != nil || len(keys) > 0 {
			return err
		}
		value, labels, err := t.anySealed()
		if err != nil {
			return err
		}
		if value != nil {
			aead, err := newAEAD(legacy)
			if err != nil {
				return errors.New("the store's secrets are under a data key of 32 octets, which is needed once more")
			}
			if _, err := aead.Open(nil, nil, value, bind(labels)); err != nil {
				return ErrWrongKey
			}
			if err := t.addKey(0, legacy); err != nil {
				return err
			}
		}
		if err := t.addKey(1, newDataKey()); err != nil {
			return err
		}
		keys, err = each(t, scanKey, t.st.keyRows)
		return err
	})
	if err != nil {
		return err
	}
	for _, k := range keys {
		if err := s.unwrap(ctx, k.ID, k.Wrapping, k.wrapped); err != nil {
			return err
		}
	}
	if len(keys) > 1 {
		s.wakeResealer()
	}
	return nil
}

func newDataKey() []byte {
	key := make([]byte, dataKeySize)
	_, _ = rand.Read(key) // crypto/rand.Read never fails
	return key
}

func (t *tx) addKey(id int64, key []byte) error {
	wrapped, err := t.s.keys.wrapping.wrap(t.ctx, key)
	if err != nil {
		return err
	}
	n, err := t.exec(t.st.putKey, id, t.s.keys.wrapping.name, wrapped, time.Now().UTC().Format(time.RFC3339))
	if err == nil && n == 0 {
		err = fmt.Errorf("there is a data key %d already", id)
	}
	return err
}

// unwrap makes a data key one that is at hand.
func (s *Store) unwrap(ctx context.Context, id int64, wrapping string, wrapped []byte) error {
	key, err := s.keys.wrapping.unwrap(ctx, wrapped)
	if errors.Is(err, ErrWrongKey) {
		return fmt.Errorf("%w: it is under %s, and this is %s", err, wrapping, s.keys.wrapping.name)
	}
	if err != nil {
		return err
	}
	defer clear(key)
	aead, err := newAEAD(key)
	if err != nil {
		return err
	}
	s.keys.put(id, aead)
	return nil
}

// errStale says that a data key is not there any more: the transaction sees the store as it was before the key was dropped, and
// is to begin anew; or what names the key is damaged, so that is tried a few times only.
var errStale = errors.New("it was dropped meanwhile")

const staleAttempts = 3

// key returns a data key that another process may have made since. It is read on a connection of its own: the transaction may be
// in the middle of an answer.
func (s *Store) key(ctx context.Context, id int64) (cipher.AEAD, error) {
	if k := s.keys.get(id); k != nil {
		return k, nil
	}
	var wrapping string
	var wrapped []byte
	err := s.side.QueryRowContext(ctx, `SELECT wrapping, wrapped FROM data_keys WHERE id = $1`, id).Scan(&wrapping, &wrapped)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("data key %d: %w", id, errStale)
	}
	if err != nil {
		return nil, fmt.Errorf("data key %d: %w", id, err)
	}
	if err := s.unwrap(ctx, id, wrapping, wrapped); err != nil {
		return nil, err
	}
	s.wakeResealer()
	return s.keys.get(id), nil
}

func bind(labels []string) []byte { return []byte(strings.Join(labels, "\x00")) }

// seal encrypts what is secret for its row, under the newest data key. An error becomes that of the next statement.
func (t *tx) seal(plain []byte, labels ...string) []byte {
	if t.sealer == nil {
		// The newest one in this transaction's eyes: a key that is there no more when it commits sealed nothing.
		err := t.row(t.st.newestKey).Scan(&t.sealerID)
		if err == nil {
			t.sealer, err = t.s.key(t.ctx, t.sealerID)
		}
		if err != nil {
			t.broken = err
			return nil
		}
	}
	if !t.s.keys.count(t.sealerID) && !t.counts {
		t.counts = true
		if _, err := t.exec(t.st.countSeals, t.sealerID, sealBlock); err != nil {
			return nil
		}
		var place string
		var seals int64
		if err := t.row(t.st.keyPlace, t.sealerID).Scan(&place, &seals); err == nil && seals > maxSeals {
			t.s.rotateSoon()
		}
	}
	head := binary.BigEndian.AppendUint32([]byte{sealedWithID}, uint32(t.sealerID))
	return t.sealer.Seal(head, nil, plain, bind(labels))
}

func (t *tx) unseal(sealed []byte, labels ...string) ([]byte, error) {
	if id := keyOf(sealed); id > 0 {
		k, err := t.s.key(t.ctx, id)
		if err == nil {
			var plain []byte
			if plain, err = k.Open(nil, nil, sealed[sealedHead:], bind(labels)); err == nil {
				return plain, nil
			}
		} else if !errors.Is(err, errStale) {
			return nil, err
		} else if t.s.keys.get(0) == nil {
			_ = t.said(err)
		}
	}
	if k := t.s.keys.get(0); k != nil { // a nonce of old may look like a head
		if plain, err := k.Open(nil, nil, sealed, bind(labels)); err == nil {
			return plain, nil
		}
	}
	return nil, fmt.Errorf("secret of %s in the store does not decrypt: it is damaged, or the data key is another one", strings.Join(labels, " "))
}

// keyOf returns the ID of the data key that is named at the head of what is sealed; 0 for none.
func keyOf(sealed []byte) int64 {
	if len(sealed) < sealedHead || sealed[0] != sealedWithID {
		return 0
	}
	return int64(binary.BigEndian.Uint32(sealed[1:]))
}

// Rotate makes a new data key. Every write from then on is sealed under it, by this store and by others on the same database;
// what is there is sealed anew in the background, by every store that is open. [Store.Reseal] waits for that.
func (s *Store) Rotate(ctx context.Context) error {
	key := newDataKey()
	defer clear(key)
	if err := s.update(&update{ctx: ctx, done: make(chan error, 1), alone: true, f: func(x registration.Tx) error {
		t := x.(*tx)
		var newest int64
		if err := t.row(t.st.newestKey).Scan(&newest); err != nil {
			return err
		}
		if err := t.addKey(newest+1, key); err != nil || s.guard == nil {
			return err
		}
		// In memory there is nobody else who could make one, and no connection that could read it in the middle of an update.
		aead, err := newAEAD(key)
		if err == nil {
			s.keys.put(newest+1, aead)
		}
		return err
	}}); err != nil {
		return fmt.Errorf("making a new data key: %w", err)
	}
	s.wakeResealer()
	return nil
}

// rotateSoon has the data key changed that has sealed enough.
func (s *Store) rotateSoon() {
	select {
	case s.rotations <- struct{}{}:
	default:
	}
}

func (s *Store) wakeResealer() {
	select {
	case s.resealing <- struct{}{}:
	default:
	}
}

// resealer changes data keys that have sealed enough, and seals anew what is under old ones.
func (s *Store) resealer() {
	defer s.others.Done()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-s.stop:
			cancel()
		case <-ctx.Done():
		}
	}()
	for {
		var err error
		select {
		case <-s.stop:
			return
		case <-s.rotations:
			err = s.Rotate(ctx)
		case <-s.resealing:
			_, err = s.Reseal(ctx)
		}
		if err != nil && ctx.Err() == nil && s.log != nil {
			s.log.Error("sealing the store's secrets under a new data key", "error", err)
		}
	}
}

// Rewrap wraps the data keys under another wrapping key: a row, usually. Whoever opens the store from now on needs the new one;
// stores that are open go on with the data keys that they have.
func (s *Store) Rewrap(ctx context.Context, to *WrappingKey) error {
	err := s.Update(ctx, func(x registration.Tx) error {
		t := x.(*tx)
		keys, err := each(t, scanKey, t.st.keyRows)
		if err != nil {
			return err
		}
		for _, k := range keys {
			key, err := s.keys.wrapping.unwrap(ctx, k.wrapped)
			if err != nil {
				return err
			}
			wrapped, err := to.wrap(ctx, key)
			clear(key)
			if err != nil {
				return err
			}
			if _, err := t.exec(t.st.rewrapKey, k.ID, to.name, wrapped); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("wrapping the store's data key anew: %w", err)
	}
	return nil
}

// A sealedColumn is one that secrets are in. A new one has its line in sealedColumns: what is not there is lost with the data key
// that it is under, once that is dropped.
type sealedColumn struct {
	table, column string
	key           []string // the columns behind scope that tell rows apart, all of them text
	labels        func(row []string) []string
	// mixed says that most rows hold what is plain, which never begins as what is sealed does.
	mixed bool
}

func as(kind ...string) func([]string) []string { // scope, kind, key, and what is behind it
	return func(row []string) []string {
		return append(append([]string{row[0], kind[0]}, row[1:]...), kind[1:]...)
	}
}

// sealedColumns are all that there are, with what their content is bound to.
var sealedColumns = [...]sealedColumn{
	{"records", "keys", []string{"kind", "id"}, func(row []string) []string { return row }, false},
	{"policies", "primary_key", []string{"name"}, as("policy", "primary"), false},
	{"policies", "secondary_key", []string{"name"}, as("policy", "secondary"), false},
	{"secrets", "value", []string{"name"}, as("secret"), false},
	{"registrations", "device_key", []string{"id"}, as("registration"), false},
	{"challenges", "body", []string{"id"}, as("challenge"), false},
	{"outbox", "body", []string{"id"}, as("task"), false},
	{"kin", "body", []string{"id"}, as("kin"), false},
	{"scopes", "document", nil, as("scope"), false},
	{"records", "document", []string{"kind", "id"}, func(row []string) []string { return append(row[:len(row):len(row)], "document") }, true},
}

func (c *sealedColumn) rows() string {
	columns, marks := "scope", "$1"
	for i, k := range c.key {
		columns += ", " + k
		marks += fmt.Sprintf(", $%d", i+2)
	}
	n := len(c.key) + 2
	return fmt.Sprintf(`SELECT %s, %s FROM %s WHERE (%s) > (%s) ORDER BY %s LIMIT $%d`, columns, c.column, c.table, columns, marks, columns, n)
}

func (c *sealedColumn) put() string {
	text := fmt.Sprintf(`UPDATE %s SET %s = $1 WHERE scope = $2`, c.table, c.column)
	for i, k := range c.key {
		text += fmt.Sprintf(" AND %s = $%d", k, i+3)
	}
	return text
}

// A sealedRow is what a row of a sealedColumn holds, nil for nothing.
type sealedRow struct {
	key   []string
	value []byte
}

func (t *tx) sealedRows(column int, after []string, limit int) ([]sealedRow, error) {
	args := make([]any, 0, 4)
	for _, a := range after {
		args = append(args, a)
	}
	return each(t, func(row scanner) (r sealedRow, err error) {
		r.key = make([]string, len(after))
		dst := make([]any, 0, 4)
		for i := range r.key {
			dst = append(dst, &r.key[i])
		}
		err = row.Scan(append(dst, &r.value)...)
		if sealedColumns[column].mixed && keyOf(r.value) == 0 {
			r.value = nil
		}
		return r, err
	}, t.st.keyStatements.sealedRows[column], append(args, limit)...)
}

// anySealed returns something that is sealed, and its labels; nil where there is nothing. What a running service has always is
// among the first rows of policies or secrets.
func (t *tx) anySealed() ([]byte, []string, error) {
	for i, c := range sealedColumns {
		after := make([]string, 1+len(c.key))
		for {
			rows, err := t.sealedRows(i, after, resealAtOnce)
			if err != nil {
				return nil, nil, err
			}
			for _, r := range rows {
				if after = r.key; r.value != nil {
					return r.value, c.labels(r.key), nil
				}
			}
			if len(rows) < resealAtOnce {
				break
			}
		}
	}
	return nil, nil, nil
}

// resealAtOnce is how many rows one transaction looks at, and seals anew where they need it.
const resealAtOnce = 1000

// A place is how far sealing anew has come.
type place struct {
	Column int      `json:"column"`
	After  []string `json:"after"`
}

// Reseal seals everything anew that is under old data keys, in small transactions, and then drops those keys. Any number of
// stores may do so at once, and share the work: where it goes on is in the store, beside the newest key. It returns how many
// secrets this one sealed.
//
// That one pass is enough follows from transactions being serializable: one that sealed under an old key did not see the new
// one, so it counts as before all that did, and this pass sees what it wrote.
func (s *Store) Reseal(ctx context.Context) (n int, err error) {
	for {
		done, some := false, 0
		if err := s.Update(ctx, func(x registration.Tx) (err error) {
			done, some, err = x.(*tx).reseal()
			return err
		}); err != nil {
			return n, fmt.Errorf("sealing the store's secrets under a new data key: %w", err)
		}
		if n += some; done {
			return n, nil
		}
	}
}

func (t *tx) reseal() (done bool, n int, err error) {
	keys, err := each(t, scanKey, t.st.keyRows)
	if err != nil || len(keys) < 2 {
		return true, 0, err
	}
	newest := keys[len(keys)-1].ID
	var text string
	var seals int64
	if err := t.row(t.st.keyPlace, newest).Scan(&text, &seals); err != nil {
		return false, 0, err
	}
	var p place
	if text != "" {
		if err := json.Unmarshal([]byte(text), &p); err != nil || p.Column < 0 {
			return false, 0, fmt.Errorf("how far sealing anew has come cannot be read: %w", err)
		}
	}
	if p.Column >= len(sealedColumns) {
		_, err := t.exec(t.st.dropKeys, newest)
		return true, 0, err
	}
	c := &sealedColumns[p.Column]
	if p.After == nil {
		p.After = make([]string, 1+len(c.key))
	}
	rows, err := t.sealedRows(p.Column, p.After, resealAtOnce)
	if err != nil {
		return false, 0, err
	}
	for _, r := range rows {
		p.After = r.key
		if r.value == nil || keyOf(r.value) == newest {
			continue
		}
		plain, err := t.unseal(r.value, c.labels(r.key)...)
		if err != nil {
			return false, 0, err
		}
		args := []any{t.seal(plain, c.labels(r.key)...)}
		clear(plain)
		for _, k := range r.key {
			args = append(args, k)
		}
		if _, err := t.exec(t.st.putSealed[p.Column], args...); err != nil {
			return false, 0, err
		}
		n++
	}
	if len(rows) < resealAtOnce {
		p = place{Column: p.Column + 1}
	}
	next, err := json.Marshal(p)
	if err == nil {
		_, err = t.exec(t.st.putKeyPlace, newest, string(next))
	}
	return false, n, err
}
