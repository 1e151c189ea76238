-- +goose Up
-- groups_revision is of the scope's row as well as of its groups.
ALTER TABLE scopes ADD COLUMN name TEXT NOT NULL DEFAULT '';     -- folded; empty: a scope without settings, or one that was deleted
ALTER TABLE scopes ADD COLUMN document BYTEA;                    -- encrypted
ALTER TABLE scopes ADD COLUMN version BIGINT NOT NULL DEFAULT 0; -- of the document
CREATE UNIQUE INDEX scopes_name ON scopes (name) WHERE name <> '';
CREATE TABLE audit (
	scope TEXT NOT NULL,
	id TEXT NOT NULL, -- rises with time
	body BYTEA NOT NULL,
	PRIMARY KEY (scope, id)
);

-- +goose Down
DROP TABLE audit;
DROP INDEX scopes_name;
ALTER TABLE scopes DROP COLUMN version;
ALTER TABLE scopes DROP COLUMN document;
ALTER TABLE scopes DROP COLUMN name;
