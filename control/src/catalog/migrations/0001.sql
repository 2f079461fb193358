-- The first form of the metadata. Forward only: a change is a new file with the next number.

CREATE TABLE millrace_ids (
    one   INTEGER PRIMARY KEY CHECK (one = 1),
    next  INTEGER NOT NULL
);
INSERT INTO millrace_ids (one, next) VALUES (1, 1);

-- The server that may write. Each start takes the next number by compare-and-set.
CREATE TABLE millrace_incarnation (
    one          INTEGER PRIMARY KEY CHECK (one = 1),
    incarnation  INTEGER NOT NULL,
    holder       TEXT NOT NULL,
    started_ms   INTEGER NOT NULL
);
INSERT INTO millrace_incarnation (one, incarnation, holder, started_ms) VALUES (1, 0, '', 0);

-- The checkpoint a restart begins at.
CREATE TABLE millrace_checkpoint (
    one         INTEGER PRIMARY KEY CHECK (one = 1),
    checkpoint  INTEGER
);
INSERT INTO millrace_checkpoint (one, checkpoint) VALUES (1, NULL);

CREATE TABLE millrace_objects (
    id           INTEGER PRIMARY KEY,
    kind         TEXT NOT NULL,
    name         TEXT NOT NULL UNIQUE,
    text         TEXT NOT NULL,
    rejected     INTEGER,
    errors       INTEGER,
    late         INTEGER,
    companion    INTEGER,
    -- Names of the objects it reads, as a JSON list.
    depends_on   TEXT NOT NULL,
    fingerprint  TEXT NOT NULL,
    created_ms   INTEGER NOT NULL
);

CREATE TABLE millrace_settings (
    name   TEXT PRIMARY KEY,
    value  TEXT NOT NULL
);
