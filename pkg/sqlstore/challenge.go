package sqlstore

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/touchmark/touchmark/pkg/registration"
)

// forget is how many challenges that have expired are removed with each new one: more than one, so that they become fewer.
const forget = 4

func (t *tx) Challenge(scope, id string) (*registration.PendingChallenge, error) {
	var sealed []byte
	if err := t.row(t.st.challenge, scope, id).Scan(&sealed); err != nil {
		return nil, absent(err)
	}
	body, err := t.unseal(sealed, scope, "challenge", id)
	if err != nil {
		return nil, err
	}
	defer clear(body)
	c := &registration.PendingChallenge{}
	if json.Unmarshal(body, c) != nil {
		return nil, fmt.Errorf("challenge of %q in the store cannot be read", id) // its text stays out of the error
	}
	return c, nil
}

func (t *tx) PutChallenge(scope string, c *registration.PendingChallenge, now time.Time) error {
	body, err := json.Marshal(c)
	if err != nil {
		return err
	}
	defer clear(body)
	if _, err := t.exec(t.st.forgetChallenges, scope, now.Unix(), forget); err != nil {
		return err
	}
	_, err = t.exec(t.st.putChallenge, scope, c.ID, t.seal(body, scope, "challenge", c.ID), c.Expires.Unix())
	return err
}
