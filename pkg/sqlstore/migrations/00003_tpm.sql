-- +goose Up
ALTER TABLE registrations ADD COLUMN device_key BYTEA; -- encrypted
CREATE TABLE challenges (
	scope TEXT NOT NULL,
	id TEXT NOT NULL, -- folded registration ID
	body BYTEA NOT NULL, -- encrypted
	expires BIGINT NOT NULL, -- in seconds, Unix
	PRIMARY KEY (scope, id)
);
CREATE INDEX challenges_expires ON challenges (scope, expires);

-- +goose Down
DROP TABLE challenges;
ALTER TABLE registrations DROP COLUMN device_key;
