-- What statements have set for the server as a whole.
CREATE TABLE millrace_settings (
  name TEXT PRIMARY KEY,
  value TEXT NOT NULL
);
