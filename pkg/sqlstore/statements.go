package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
)

// statements are prepared once per database.
type statements struct {
	revision, bumpRevision                                                   *sql.Stmt
	record, putRecord, deleteRecord, records, symmetric, bySubject           *sql.Stmt
	certificateOwner, putCertificate, deleteCertificates                     *sql.Stmt
	byAuthority, authorityOwners, putAuthority, deleteAuthorities            *sql.Stmt
	changedGroups, deletedGroups, putDeletedGroup, dropDeletedGroup          *sql.Stmt
	registration, insertRegistration, updateRegistration, deleteRegistration *sql.Stmt
	registrations, allRegistrations, device, putDevice, policy, putPolicy    *sql.Stmt
	deviceBySerial, devices, devicesUnseen                                   *sql.Stmt
	ending, putEnding, hasEndings, keyEnded                                  *sql.Stmt
	grant, grantDocument, putGrant, addToGrant, orders, leases               *sql.Stmt
	putRefusal, deleteRefusal, refusals                                      *sql.Stmt
	secret, putSecret                                                        *sql.Stmt
	planned, putIssued, keyTaken, keyIssued                                  *sql.Stmt
	challenge, putChallenge, forgetChallenges                                *sql.Stmt
	scopeStatements
	caStatements
	keyStatements
	freshStatements
	outboxStatements
	meterStatements
}

const (
	recordColumns = `SELECT kind, name, document, keys, "symmetric", content, id, closed FROM records `
	deviceColumns = `SELECT id, group_id, serial, key_hash, revision, ended, state, station, grant_id, moved, seen, disabled FROM devices `
	grantColumns  = `SELECT id, order_id, station, quantity, digest, used, imported, seen, refused, voided, reworked, scrapped, returned FROM grants `
)

type statement struct {
	dst  **sql.Stmt
	text string
}

func (st *statements) all() []statement {
	return slices.Concat(st.scopeStatements.all(), st.keyStatements.all(), st.outboxStatements.all(), st.freshStatements.all(), st.caStatements.all(), st.meterStatements.all(), []statement{
		{&st.revision, `SELECT groups_revision FROM scopes WHERE scope = $1`},
		{&st.bumpRevision, `INSERT INTO scopes (scope, groups_revision) VALUES ($1, 1) ON CONFLICT (scope) DO UPDATE SET groups_revision = scopes.groups_revision + 1`},
		{&st.record, recordColumns + `WHERE scope = $1 AND kind = $2 AND id = $3`},
		{&st.putRecord, `INSERT INTO records (scope, kind, id, name, document, keys, "symmetric", content, closed, revision) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9,
			CASE WHEN $2 = 'group' THEN (SELECT groups_revision FROM scopes WHERE scope = $1) ELSE 0 END)
			ON CONFLICT (scope, kind, id) DO UPDATE SET name = excluded.name, document = excluded.document, keys = excluded.keys,
			"symmetric" = excluded."symmetric", content = excluded.content, closed = excluded.closed, revision = excluded.revision`},
		{&st.deleteRecord, `DELETE FROM records WHERE scope = $1 AND kind = $2 AND id = $3`},
		{&st.records, recordColumns + `WHERE scope = $1 AND kind = $2 AND id > $3 ORDER BY id LIMIT $4`},
		{&st.symmetric, recordColumns + `WHERE scope = $1 AND "symmetric" = 1 ORDER BY id`},
		// A group has two certificates at most, so twice as many rows are enough, and the thousands behind them are not read.
		{&st.bySubject, `SELECT DISTINCT id FROM (SELECT id FROM certificates WHERE scope = $1 AND subject = $2 AND kind = 'group' LIMIT 2 * $3) AS found ORDER BY id LIMIT $3`},
		{&st.byAuthority, `SELECT r.kind, r.name, r.document, r.keys, r."symmetric", r.content, r.id, r.closed FROM authorities AS a
			JOIN records AS r ON r.scope = a.scope AND r.kind = 'group' AND r.id = a.id WHERE a.scope = $1 AND a.subject = $2 AND a.key_id = $3 ORDER BY a.id LIMIT $4`},
		{&st.authorityOwners, `SELECT COUNT(*), COALESCE(SUM(CASE WHEN id = $4 THEN 1 ELSE 0 END), 0), COALESCE(MIN(CASE WHEN id <> $4 THEN id END), '') FROM authorities WHERE scope = $1 AND subject = $2 AND key_id = $3`},
		{&st.putAuthority, putAuthority},
		{&st.deleteAuthorities, `DELETE FROM authorities WHERE scope = $1 AND id = $2`},
		{&st.changedGroups, recordColumns + `WHERE scope = $1 AND kind = 'group' AND revision > $2 ORDER BY id`},
		{&st.deletedGroups, `SELECT id FROM deleted_groups WHERE scope = $1 AND revision > $2 ORDER BY id`},
		{&st.putDeletedGroup, `INSERT INTO deleted_groups (scope, id, revision) SELECT scope, $2, groups_revision FROM scopes WHERE scope = $1
			ON CONFLICT (scope, id) DO UPDATE SET revision = excluded.revision`},
		{&st.dropDeletedGroup, `DELETE FROM deleted_groups WHERE scope = $1 AND id = $2`},
		{&st.certificateOwner, `SELECT kind, id FROM certificates WHERE scope = $1 AND fingerprint = $2`},
		{&st.putCertificate, `INSERT INTO certificates (scope, fingerprint, subject, kind, id) VALUES ($1, $2, $3, $4, $5) ON CONFLICT (scope, fingerprint) DO NOTHING`},
		{&st.deleteCertificates, `DELETE FROM certificates WHERE scope = $1 AND kind = $2 AND id = $3`},
		{&st.registration, `SELECT version, body, device_key FROM registrations WHERE scope = $1 AND id = $2`},
		{&st.insertRegistration, `INSERT INTO registrations (scope, id, group_id, version, body, device_key) VALUES ($1, $2, $3, 1, $4, $5) ON CONFLICT (scope, id) DO NOTHING`},
		{&st.updateRegistration, `UPDATE registrations SET group_id = $3, version = version + 1, body = $4, device_key = $5 WHERE scope = $1 AND id = $2 AND version = $6`},
		{&st.deleteRegistration, `DELETE FROM registrations WHERE scope = $1 AND id = $2`},
		{&st.registrations, `SELECT version, body, device_key FROM registrations WHERE scope = $1 AND group_id = $2 AND group_id <> '' AND id > $3 ORDER BY id LIMIT $4`},
		{&st.allRegistrations, `SELECT version, body, device_key FROM registrations WHERE scope = $1 AND id > $2 ORDER BY id LIMIT $3`},
		{&st.device, deviceColumns + `WHERE scope = $1 AND id = $2`},
		{&st.putDevice, `INSERT INTO devices (scope, id, group_id, serial, key_hash, revision, ended, state, station, order_id, grant_id, moved, seen, disabled)
			VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
			ON CONFLICT (scope, id) DO UPDATE SET group_id = excluded.group_id, serial = excluded.serial, key_hash = excluded.key_hash,
			revision = excluded.revision, ended = excluded.ended, state = excluded.state, station = excluded.station, order_id = excluded.order_id,
			grant_id = excluded.grant_id, moved = excluded.moved, seen = excluded.seen, disabled = excluded.disabled`},
		{&st.deviceBySerial, deviceColumns + `WHERE scope = $1 AND serial = $2 AND order_id <> '' AND moved = 0`},
		{&st.devices, deviceColumns + `WHERE scope = $1 AND order_id = $2 AND order_id <> '' AND id > $3 ORDER BY id LIMIT $4`},
		{&st.devicesUnseen, deviceColumns + `WHERE scope = $1 AND order_id = $2 AND order_id <> '' AND seen = 0 AND revision >= ended AND id > $3 ORDER BY id LIMIT $4`},
		{&st.ending, `SELECT id, revision, key_hash, state, reason, at, station FROM endings WHERE scope = $1 AND id = $2 AND revision = $3 AND key_hash = $4`},
		{&st.putEnding, `INSERT INTO endings (scope, id, revision, key_hash, state, reason, at, station) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
			ON CONFLICT (scope, id, revision, key_hash) DO UPDATE SET state = excluded.state, reason = excluded.reason, at = excluded.at, station = excluded.station`},
		{&st.hasEndings, `SELECT EXISTS (SELECT 1 FROM endings WHERE scope = $1)`},
		{&st.keyEnded, `SELECT EXISTS (SELECT 1 FROM endings WHERE scope = $1 AND key_hash = $2 AND key_hash <> '')`},
		{&st.grant, grantColumns + `WHERE scope = $1 AND id = $2`},
		{&st.grantDocument, `SELECT document FROM grants WHERE scope = $1 AND id = $2`},
		{&st.putGrant, `INSERT INTO grants (scope, id, order_id, station, quantity, digest, document) VALUES ($1, $2, $3, $4, $5, $6, $7)`},
		{&st.addToGrant, `UPDATE grants SET used = used + $3, imported = imported + $4, seen = seen + $5, refused = refused + $6, voided = voided + $7,
			reworked = reworked + $8, scrapped = scrapped + $9, returned = returned + $10 WHERE scope = $1 AND id = $2`},
		{&st.orders, grantColumns + `WHERE scope = $1 AND id = order_id AND id > $2 ORDER BY id LIMIT $3`},
		{&st.leases, grantColumns + `WHERE scope = $1 AND order_id = $2 AND id <> order_id AND id > $3 ORDER BY id LIMIT $4`},
		{&st.putRefusal, `INSERT INTO refusals (scope, order_id, id, serial, station, reason, at) VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (scope, order_id, id) DO NOTHING`},
		{&st.deleteRefusal, `DELETE FROM refusals WHERE scope = $1 AND order_id = $2 AND id = $3 AND station = $4`},
		{&st.refusals, `SELECT order_id, id, serial, station, reason, at FROM refusals WHERE scope = $1 AND order_id = $2 AND id > $3 ORDER BY id LIMIT $4`},
		{&st.planned, `SELECT serial_number, name, issuer, not_after, planned, plan FROM issued
			WHERE scope = $1 AND key_hash = $2 AND id = $3 AND thumbprint = '' ORDER BY planned DESC LIMIT 1`},
		{&st.putIssued, `INSERT INTO issued (scope, serial_number, id, name, issuer, key_hash, not_after, planned, plan, thumbprint)
			VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT (scope, serial_number) DO UPDATE SET thumbprint = excluded.thumbprint`},
		{&st.keyTaken, `SELECT EXISTS (SELECT 1 FROM issued WHERE scope = $1 AND key_hash = $2 AND id <> $3)
			OR EXISTS (SELECT 1 FROM devices WHERE scope = $1 AND key_hash = $2 AND key_hash <> '' AND id <> $3 AND revision >= ended)`},
		{&st.keyIssued, `SELECT EXISTS (SELECT 1 FROM issued WHERE scope = $1 AND key_hash = $2 AND id <> $3)`},
		{&st.policy, `SELECT name, rights, primary_key, secondary_key FROM policies WHERE scope = $1 AND name = $2`},
		{&st.putPolicy, `INSERT INTO policies (scope, name, rights, primary_key, secondary_key) VALUES ($1, $2, $3, $4, $5)
			ON CONFLICT (scope, name) DO UPDATE SET rights = excluded.rights, primary_key = excluded.primary_key, secondary_key = excluded.secondary_key`},
		{&st.secret, `SELECT value FROM secrets WHERE scope = $1 AND name = $2`},
		{&st.putSecret, `INSERT INTO secrets (scope, name, value) VALUES ($1, $2, $3) ON CONFLICT (scope, name) DO UPDATE SET value = excluded.value`},
		{&st.challenge, `SELECT body FROM challenges WHERE scope = $1 AND id = $2`},
		{&st.putChallenge, `INSERT INTO challenges (scope, id, body, expires) VALUES ($1, $2, $3, $4)
			ON CONFLICT (scope, id) DO UPDATE SET body = excluded.body, expires = excluded.expires`},
		{&st.forgetChallenges, `DELETE FROM challenges WHERE scope = $1 AND id IN (SELECT id FROM challenges WHERE scope = $1 AND expires < $2 ORDER BY expires LIMIT $3)`},
	})
}

func prepare(ctx context.Context, db *sql.DB) (*statements, error) {
	var st statements
	var errs []error
	for _, p := range st.all() {
		var err error
		if *p.dst, err = db.PrepareContext(ctx, p.text); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", p.text, err))
		}
	}
	return &st, errors.Join(errs...)
}
