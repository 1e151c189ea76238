package sqlstore

import (
	"errors"
	"time"

	"github.com/touchmark/touchmark/pkg/registration"
)

// Timestamps are text of one length in UTC, which sorts as time does.
const issuedTime = "2006-01-02T15:04:05.000000000Z"

func (t *tx) Planned(scope, id, keyHash string) (*registration.Issued, error) {
	c := &registration.Issued{ID: id, KeyHash: keyHash}
	var notAfter, planned string
	err := t.row(t.st.planned, scope, keyHash, id).Scan(&c.SerialNumber, &c.Name, &c.Issuer, &notAfter, &planned, &c.Plan)
	if err != nil {
		return nil, absent(err)
	}
	var errs [2]error
	c.NotAfter, errs[0] = time.Parse(issuedTime, notAfter)
	c.Planned, errs[1] = time.Parse(issuedTime, planned)
	return c, errors.Join(errs[:]...)
}

func (t *tx) PutIssued(scope string, c *registration.Issued) error {
	_, err := t.exec(t.st.putIssued, scope, c.SerialNumber, c.ID, c.Name, c.Issuer, c.KeyHash, c.NotAfter.UTC().Format(issuedTime), c.Planned.UTC().Format(issuedTime), c.Plan, c.Thumbprint)
	return err
}

func (t *tx) KeyIssued(scope, keyHash, id string) (issued bool, err error) {
	err = t.row(t.st.keyIssued, scope, keyHash, id).Scan(&issued)
	return issued, err
}

func (t *tx) KeyTaken(scope, keyHash, id string) (taken bool, err error) {
	err = t.row(t.st.keyTaken, scope, keyHash, id).Scan(&taken)
	return taken, err
}
