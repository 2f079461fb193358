-- Views that are replaced.

-- What computes the view, when that is not the object's own id.
ALTER TABLE millrace_objects ADD COLUMN dataflow INTEGER;
-- Views it reads that were replaced since, as it knew them: a JSON object by name.
ALTER TABLE millrace_objects ADD COLUMN seen TEXT NOT NULL DEFAULT '{}';

-- New definitions that no checkpoint holds yet.
CREATE TABLE millrace_replacements (
    object       INTEGER PRIMARY KEY,
    dataflow     INTEGER NOT NULL,
    text         TEXT NOT NULL,
    depends_on   TEXT NOT NULL,
    fingerprint  TEXT NOT NULL,
    -- The view as its readers know it, JSON.
    before       TEXT NOT NULL
);
