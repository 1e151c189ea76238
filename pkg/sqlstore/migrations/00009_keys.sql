-- +goose Up
-- What transactions are known again by whose answer to COMMIT was lost.
CREATE TABLE commits (
	token BYTEA NOT NULL PRIMARY KEY,
	at BIGINT NOT NULL -- in seconds, Unix
);
-- What secrets are sealed under. The newest one seals.
CREATE TABLE data_keys (
	id BIGINT NOT NULL PRIMARY KEY, -- 0: what secrets are under that name no key
	wrapping TEXT NOT NULL,         -- the key that it is wrapped under
	wrapped BYTEA NOT NULL,
	created TEXT NOT NULL,
	seals BIGINT NOT NULL,
	place TEXT NOT NULL             -- how far sealing anew under it has come
);

-- +goose Down
DROP TABLE data_keys;
DROP TABLE commits;
