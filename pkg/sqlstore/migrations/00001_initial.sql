-- +goose Up
CREATE TABLE scopes (
	scope TEXT NOT NULL PRIMARY KEY,
	groups_revision BIGINT NOT NULL
);
CREATE TABLE records (
	scope TEXT NOT NULL,
	kind TEXT NOT NULL,
	id TEXT NOT NULL,          -- folded
	name TEXT NOT NULL,        -- as given
	document BYTEA NOT NULL,
	keys BYTEA,                -- encrypted
	"symmetric" BIGINT NOT NULL, -- 1: a group that attests by symmetric key. PostgreSQL reserves the word
	content BYTEA,
	PRIMARY KEY (scope, kind, id)
);
CREATE INDEX records_symmetric ON records (scope) WHERE "symmetric" = 1;
CREATE TABLE certificates (
	scope TEXT NOT NULL,
	fingerprint BYTEA NOT NULL,
	subject BYTEA NOT NULL,
	kind TEXT NOT NULL,
	id TEXT NOT NULL,
	PRIMARY KEY (scope, fingerprint)
);
CREATE INDEX certificates_owner ON certificates (scope, kind, id);
CREATE INDEX certificates_subject ON certificates (scope, subject) WHERE kind = 'group';
CREATE TABLE registrations (
	scope TEXT NOT NULL,
	id TEXT NOT NULL,
	group_id TEXT NOT NULL,
	version BIGINT NOT NULL,
	body BYTEA NOT NULL,
	PRIMARY KEY (scope, id)
);
CREATE INDEX registrations_group ON registrations (scope, group_id, id) WHERE group_id <> '';
CREATE TABLE devices (
	scope TEXT NOT NULL,
	id TEXT NOT NULL,
	group_id TEXT NOT NULL,
	serial TEXT NOT NULL,
	key_hash TEXT NOT NULL,
	PRIMARY KEY (scope, id)
);
CREATE TABLE policies (
	scope TEXT NOT NULL,
	name TEXT NOT NULL,
	rights TEXT NOT NULL,
	primary_key BYTEA NOT NULL,   -- encrypted
	secondary_key BYTEA NOT NULL, -- encrypted
	PRIMARY KEY (scope, name)
);

-- +goose Down
DROP TABLE policies;
DROP TABLE devices;
DROP TABLE registrations;
DROP TABLE certificates;
DROP TABLE records;
DROP TABLE scopes;
