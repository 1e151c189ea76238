-- +goose Up
CREATE TABLE ca_certificates (
	scope TEXT NOT NULL,
	name TEXT NOT NULL, -- folded
	body BYTEA NOT NULL,
	PRIMARY KEY (scope, name)
);
-- Which groups refer to them, also to what is not there any more.
CREATE TABLE ca_references (
	scope TEXT NOT NULL,
	name TEXT NOT NULL, -- folded
	id TEXT NOT NULL,   -- of the group
	PRIMARY KEY (scope, name, id)
);
CREATE INDEX ca_references_group ON ca_references (scope, id);

-- +goose Down
DROP TABLE ca_references;
DROP TABLE ca_certificates;
