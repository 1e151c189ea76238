-- +goose Up
CREATE TABLE issued (
	scope TEXT NOT NULL,
	serial_number TEXT NOT NULL, -- hex
	id TEXT NOT NULL,            -- folded registration ID
	name TEXT NOT NULL,
	issuer TEXT NOT NULL,
	key_hash TEXT NOT NULL,
	not_after TEXT NOT NULL,
	planned TEXT NOT NULL,
	plan BYTEA NOT NULL,
	thumbprint TEXT NOT NULL,    -- empty: planned
	PRIMARY KEY (scope, serial_number)
);
CREATE INDEX issued_key ON issued (scope, key_hash, id);
CREATE INDEX devices_key ON devices (scope, key_hash) WHERE key_hash <> '';

-- +goose Down
DROP INDEX devices_key;
DROP TABLE issued;
