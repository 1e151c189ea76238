-- +goose Up
CREATE TABLE usage (
	scope TEXT NOT NULL,
	day TEXT NOT NULL, -- 2026-11-21, UTC
	api TEXT NOT NULL,
	operation TEXT NOT NULL,
	result TEXT NOT NULL,
	calls BIGINT NOT NULL,
	PRIMARY KEY (scope, day, api, operation, result)
);
CREATE TABLE attempts (
	scope TEXT NOT NULL,
	device TEXT NOT NULL, -- folded registration ID, of an enrollment or not
	id TEXT NOT NULL,     -- rises with time
	class BIGINT NOT NULL,
	tracking TEXT NOT NULL,
	body BYTEA NOT NULL,
	PRIMARY KEY (scope, device, id)
);
CREATE INDEX attempts_age ON attempts (scope, class, id);
CREATE INDEX attempts_tracking ON attempts (scope, tracking) WHERE tracking <> '';

-- +goose Down
DROP TABLE attempts;
DROP TABLE usage;
