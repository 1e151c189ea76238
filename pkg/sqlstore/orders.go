package sqlstore

import (
	"fmt"
	"time"

	"github.com/touchmark/touchmark/pkg/registration"
)

func scanDevice(row scanner) (*registration.Device, error) {
	d := &registration.Device{}
	var moved, seen, disabled int64
	if err := row.Scan(&d.ID, &d.Group, &d.Serial, &d.KeyHash, &d.Revision, &d.Ended, &d.State, &d.Station, &d.Grant, &moved, &seen, &disabled); err != nil {
		return nil, absent(err)
	}
	d.Moved, d.Seen, d.Disabled = moved != 0, seen != 0, disabled != 0
	return d, nil
}

func (t *tx) Device(scope, id string) (*registration.Device, error) {
	return scanDevice(t.row(t.st.device, scope, id))
}

func (t *tx) DeviceBySerial(scope, serial string) (*registration.Device, error) {
	return scanDevice(t.row(t.st.deviceBySerial, scope, serial))
}

func (t *tx) PutDevice(scope string, d *registration.Device) error {
	_, err := t.exec(t.st.putDevice, scope, d.ID, d.Group, d.Serial, d.KeyHash, d.Revision, d.Ended, string(d.State), d.Station, d.Order(), d.Grant,
		bit(d.Moved), bit(d.Seen), bit(d.Disabled))
	if taken(err) {
		return registration.ErrConflict
	}
	return err
}

func (t *tx) Devices(scope, order string, unseen bool, after string, limit int) ([]*registration.Device, error) {
	st := t.st.devices
	if unseen {
		st = t.st.devicesUnseen
	}
	return each(t, scanDevice, st, scope, order, after, limit)
}

func (t *tx) Ending(scope, id string, revision int64, keyHash string) (*registration.Ending, error) {
	e := &registration.Ending{}
	var at string
	if err := t.row(t.st.ending, scope, id, revision, keyHash).Scan(&e.ID, &e.Revision, &e.KeyHash, &e.State, &e.Reason, &at, &e.Station); err != nil {
		return nil, absent(err)
	}
	var err error
	e.At, err = moment(at)
	return e, err
}

func moment(text string) (time.Time, error) {
	at, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		err = fmt.Errorf("a time in the store: %w", err)
	}
	return at, err
}

func (t *tx) PutEnding(scope string, e *registration.Ending) error {
	_, err := t.exec(t.st.putEnding, scope, e.ID, e.Revision, e.KeyHash, string(e.State), e.Reason, e.At.UTC().Format(time.RFC3339Nano), e.Station)
	return err
}

func (t *tx) HasEndings(scope string) (bool, error) {
	var any bool
	err := t.row(t.st.hasEndings, scope).Scan(&any)
	return any, err
}

func (t *tx) KeyEnded(scope, keyHash string) (bool, error) {
	var any bool
	err := t.row(t.st.keyEnded, scope, keyHash).Scan(&any)
	return any, err
}

func scanGrant(row scanner) (*registration.Grant, error) {
	g := &registration.Grant{}
	err := row.Scan(&g.ID, &g.Order, &g.Station, &g.Quantity, &g.Digest, &g.Used, &g.Imported, &g.Seen, &g.Refused, &g.Voided, &g.Reworked, &g.Scrapped, &g.Returned)
	if err != nil {
		return nil, absent(err)
	}
	return g, nil
}

func (t *tx) Grant(scope, id string) (*registration.Grant, error) {
	return scanGrant(t.row(t.st.grant, scope, id))
}

func (t *tx) GrantDocument(scope, id string) (document []byte, err error) {
	err = t.row(t.st.grantDocument, scope, id).Scan(&document)
	return document, absent(err)
}

func (t *tx) PutGrant(scope string, g *registration.Grant) error {
	_, err := t.exec(t.st.putGrant, scope, g.ID, g.Order, g.Station, g.Quantity, g.Digest, g.Document)
	return err
}

func (t *tx) AddToGrant(scope, id string, a registration.Tally) error {
	n, err := t.exec(t.st.addToGrant, scope, id, a.Used, a.Imported, a.Seen, a.Refused, a.Voided, a.Reworked, a.Scrapped, a.Returned)
	if err == nil && n == 0 {
		return registration.ErrNotFound
	}
	return err
}

func (t *tx) Orders(scope, after string, limit int) ([]*registration.Grant, error) {
	return each(t, scanGrant, t.st.orders, scope, after, limit)
}

func (t *tx) Leases(scope, order, after string, limit int) ([]*registration.Grant, error) {
	return each(t, scanGrant, t.st.leases, scope, order, after, limit)
}

func (t *tx) PutRefusal(scope string, r *registration.Refusal) (bool, error) {
	n, err := t.exec(t.st.putRefusal, scope, r.Order, r.ID, r.Serial, r.Station, r.Reason, r.At.UTC().Format(time.RFC3339Nano))
	return n > 0, err
}

func (t *tx) DeleteRefusal(scope, order, id, station string) (bool, error) {
	n, err := t.exec(t.st.deleteRefusal, scope, order, id, station)
	return n > 0, err
}

func (t *tx) Refusals(scope, order, after string, limit int) ([]*registration.Refusal, error) {
	return each(t, func(row scanner) (*registration.Refusal, error) {
		r := &registration.Refusal{}
		var at string
		if err := row.Scan(&r.Order, &r.ID, &r.Serial, &r.Station, &r.Reason, &at); err != nil {
			return nil, err
		}
		var err error
		r.At, err = moment(at)
		return r, err
	}, t.st.refusals, scope, order, after, limit)
}
