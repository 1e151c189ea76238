-- +goose Up
ALTER TABLE records ADD COLUMN closed BIGINT NOT NULL DEFAULT 0; -- 1: a group that admits only devices that a bundle named
ALTER TABLE devices ADD COLUMN revision BIGINT NOT NULL DEFAULT 0;
ALTER TABLE devices ADD COLUMN ended BIGINT NOT NULL DEFAULT 0;    -- revisions below it have ended
ALTER TABLE devices ADD COLUMN state TEXT NOT NULL DEFAULT '';     -- how the newest of them did
ALTER TABLE devices ADD COLUMN station TEXT NOT NULL DEFAULT '';
ALTER TABLE devices ADD COLUMN order_id TEXT NOT NULL DEFAULT '';
ALTER TABLE devices ADD COLUMN grant_id TEXT NOT NULL DEFAULT '';
ALTER TABLE devices ADD COLUMN moved BIGINT NOT NULL DEFAULT 0;    -- 1: its serial has another registration ID now
ALTER TABLE devices ADD COLUMN seen BIGINT NOT NULL DEFAULT 0;     -- 1: it has registered
ALTER TABLE devices ADD COLUMN disabled BIGINT NOT NULL DEFAULT 0; -- 1: its end disabled its enrollment
CREATE UNIQUE INDEX devices_serial ON devices (scope, serial) WHERE order_id <> '' AND moved = 0;
CREATE INDEX devices_order ON devices (scope, order_id, id) WHERE order_id <> '';
CREATE INDEX devices_unseen ON devices (scope, order_id, id) WHERE order_id <> '' AND seen = 0 AND revision >= ended;
CREATE TABLE endings (
	scope TEXT NOT NULL,
	id TEXT NOT NULL, -- folded registration ID
	revision BIGINT NOT NULL,
	key_hash TEXT NOT NULL,
	state TEXT NOT NULL,
	reason TEXT NOT NULL,
	at TEXT NOT NULL,
	station TEXT NOT NULL,
	PRIMARY KEY (scope, id, revision, key_hash)
);
CREATE INDEX endings_key ON endings (scope, key_hash) WHERE key_hash <> '';
CREATE TABLE grants (
	scope TEXT NOT NULL,
	id TEXT NOT NULL,
	order_id TEXT NOT NULL, -- its own, or that of the order that a lease was cut from
	station TEXT NOT NULL,
	quantity BIGINT NOT NULL,
	digest TEXT NOT NULL,
	document BYTEA NOT NULL,
	used BIGINT NOT NULL DEFAULT 0,
	imported BIGINT NOT NULL DEFAULT 0,
	seen BIGINT NOT NULL DEFAULT 0,
	refused BIGINT NOT NULL DEFAULT 0,
	voided BIGINT NOT NULL DEFAULT 0,
	reworked BIGINT NOT NULL DEFAULT 0,
	scrapped BIGINT NOT NULL DEFAULT 0,
	returned BIGINT NOT NULL DEFAULT 0,
	PRIMARY KEY (scope, id)
);
CREATE INDEX grants_order ON grants (scope, order_id, id);
CREATE TABLE refusals (
	scope TEXT NOT NULL,
	order_id TEXT NOT NULL,
	id TEXT NOT NULL, -- folded registration ID, or a group's
	serial TEXT NOT NULL,
	station TEXT NOT NULL,
	reason TEXT NOT NULL,
	at TEXT NOT NULL,
	PRIMARY KEY (scope, order_id, id)
);

-- +goose Down
DROP TABLE refusals;
DROP TABLE grants;
DROP TABLE endings;
DROP INDEX devices_unseen;
DROP INDEX devices_order;
DROP INDEX devices_serial;
ALTER TABLE devices DROP COLUMN disabled;
ALTER TABLE devices DROP COLUMN seen;
ALTER TABLE devices DROP COLUMN moved;
ALTER TABLE devices DROP COLUMN grant_id;
ALTER TABLE devices DROP COLUMN order_id;
ALTER TABLE devices DROP COLUMN station;
ALTER TABLE devices DROP COLUMN state;
ALTER TABLE devices DROP COLUMN ended;
ALTER TABLE devices DROP COLUMN revision;
ALTER TABLE records DROP COLUMN closed;
