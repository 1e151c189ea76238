-- +goose Up
CREATE TABLE secrets (
	scope TEXT NOT NULL,
	name TEXT NOT NULL,
	value BYTEA NOT NULL, -- encrypted
	PRIMARY KEY (scope, name)
);

-- +goose Down
DROP TABLE secrets;
