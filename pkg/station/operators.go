package station

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/crypto/argon2"

	"github.com/touchmark/touchmark/pkg/settings"
)

// Operators are those who may work at a station: the file that Config.Operators names.
type Operators struct {
	Operator []Operator `toml:"operator"`
}

const maxOperator = 60

// An Operator is one of them. Badges and PINs are kept as hashes.
type Operator struct {
	// name is what the ledger says.
	Name string `toml:"name"`
	// badge is the hex SHA-256 of what the badge's code holds.
	Badge string `toml:"badge"`
	// lead marks those who may do what others may not.
	Lead bool `toml:"lead,omitempty"`
	// pin is the PIN's salt and hash; empty asks for none.
	PIN string `toml:"pin,omitempty"`
}

// ErrBadge and ErrPIN say that nobody has such a badge, or such a PIN.
var (
	ErrBadge = errors.New("badge is not known")
	ErrPIN   = errors.New("wrong PIN")
)

// ReadOperators reads the file strictly.
func ReadOperators(name string, r io.Reader) (*Operators, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxConfig+1))
	if err != nil || len(b) > maxConfig {
		return nil, errors.Join(fmt.Errorf("reading %s: at most %d octets", name, maxConfig), err)
	}
	o := &Operators{}
	f := settings.Decode(name, b, o)
	seen := make(map[string]bool)
	for _, p := range o.Operator {
		badge, err := hex.DecodeString(p.Badge)
		if p.Name == "" || len(p.Name) > maxOperator || err != nil || len(badge) != sha256.Size || seen[p.Badge] {
			f.Key("operator", "operator %.60q: want a name, and a badge that nobody else has", p.Name)
		}
		seen[p.Badge] = true
	}
	return o, f.Err()
}

// Encode returns the operators as the file has them.
func (o *Operators) Encode() ([]byte, error) { return toml.Marshal(o) }

// Add adds an operator, or replaces the one of that name.
func (o *Operators) Add(name, badge, pin string, lead bool) error {
	if strings.TrimSpace(badge) == "" || name == "" || len(name) > maxOperator {
		return fmt.Errorf("an operator needs a badge, and a name of at most %d octets", maxOperator)
	}
	p := Operator{Name: name, Badge: badgeHash(badge), Lead: lead}
	if pin != "" {
		salt := make([]byte, 16)
		_, _ = rand.Read(salt)
		p.PIN = hex.EncodeToString(salt) + "$" + hex.EncodeToString(pinHash(salt, pin))
	}
	for i, q := range o.Operator {
		if q.Badge == p.Badge && q.Name != name {
			return fmt.Errorf("%s has this badge", q.Name)
		}
		if q.Name == name {
			o.Operator[i] = p
			return nil
		}
	}
	o.Operator = append(o.Operator, p)
	return nil
}

// ByBadge returns whose badge it is; the error is ErrBadge.
func (o *Operators) ByBadge(badge string) (*Operator, error) {
	hash := badgeHash(badge)
	for i := range o.Operator {
		if o.Operator[i].Badge == hash {
			return &o.Operator[i], nil
		}
	}
	return nil, ErrBadge
}

// CheckPIN returns ErrPIN when that is not the operator's PIN.
func (p *Operator) CheckPIN(pin string) error {
	if p.PIN == "" {
		return nil
	}
	s, h, _ := strings.Cut(p.PIN, "$")
	salt, err1 := hex.DecodeString(s)
	want, err2 := hex.DecodeString(h)
	if err1 != nil || err2 != nil || len(want) == 0 || subtle.ConstantTimeCompare(pinHash(salt, pin), want) != 1 {
		return ErrPIN
	}
	return nil
}

func badgeHash(badge string) string {
	sum := sha256.Sum256([]byte("touchmark badge\x00" + strings.TrimSpace(badge)))
	return hex.EncodeToString(sum[:])
}

// pinHash makes guessing a short PIN from a copied file slow (Argon2id, RFC 9106 §4, second recommended option but for its memory,
// which a station shares with its work).
func pinHash(salt []byte, pin string) []byte {
	return argon2.IDKey([]byte(pin), salt, 3, 16<<10, 1, 32)
}

// A lockout keeps PINs from being guessed at the station.
type lockout struct {
	wrong int
	until time.Time
}

const (
	pinTries = 3
	pinWait  = 2 * time.Minute
)

func (l *lockout) locked(now time.Time) bool { return now.Before(l.until) }

func (l *lockout) miss(now time.Time) {
	if l.wrong++; l.wrong >= pinTries {
		l.wrong, l.until = 0, now.Add(pinWait)
	}
}
