-- +goose Up
CREATE TABLE outbox (
	scope TEXT NOT NULL,
	id TEXT NOT NULL,
	version BIGINT NOT NULL,
	due BIGINT NOT NULL, -- milliseconds since 1970
	owner TEXT NOT NULL,
	hub TEXT NOT NULL,
	body BYTEA NOT NULL, -- encrypted
	PRIMARY KEY (scope, id)
);
CREATE INDEX outbox_due ON outbox (due);
CREATE TABLE orphans (
	scope TEXT NOT NULL,
	id TEXT NOT NULL,
	hub TEXT NOT NULL, -- folded
	device_id TEXT NOT NULL,
	body BYTEA NOT NULL,
	PRIMARY KEY (scope, id, hub, device_id)
);
CREATE TABLE kin (
	scope TEXT NOT NULL,
	id TEXT NOT NULL,
	parent TEXT NOT NULL,
	body BYTEA NOT NULL, -- encrypted
	PRIMARY KEY (scope, id)
);
CREATE INDEX kin_parent ON kin (scope, parent, id);
CREATE TABLE edges (
	scope TEXT NOT NULL,
	name TEXT NOT NULL,
	id TEXT NOT NULL,
	PRIMARY KEY (scope, name)
);

-- +goose Down
DROP TABLE edges;
DROP TABLE kin;
DROP TABLE orphans;
DROP TABLE outbox;
