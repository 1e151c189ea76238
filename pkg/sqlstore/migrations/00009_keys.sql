-- +goose Up
-- What transactions are known again by whose answer to COMMIT was lost.
CREATE TABLE commits (
	token BYTEA NOT NULL PRIMARY KEY,
	at BIGINT NOT NULL -- in seconds, Unix
);

-- +goose Down
DROP TABLE commits;
