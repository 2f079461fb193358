#!/usr/bin/env bash
# PyIceberg in a virtual environment, the independent reader of what the lake holds; and DuckDB, whose
# answers are compared with ours.
#   PYICEBERG_VERSION (0.12.0)  DUCKDB_VERSION (2.0.0)
# "install" makes it, "address" prints its python.
SVC=pyiceberg
PYICEBERG_VERSION=${PYICEBERG_VERSION:-0.12.0}
DUCKDB_VERSION=${DUCKDB_VERSION:-2.0.0}
# The mark of an installation names both: one that was made without DuckDB is made anew.
SVC_VERSION="$PYICEBERG_VERSION duckdb-$DUCKDB_VERSION"
# shellcheck source=tests/services/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

svc_install() {
  need python3 "Python 3.10 or newer"
  rm -rf "$SVC_HOME/venv"
  python3 -m venv "$SVC_HOME/venv" || die "python3 -m venv failed (on Debian: apt-get install python3-venv)"
  "$SVC_HOME/venv/bin/pip" install -q --disable-pip-version-check --no-compile \
    "pyiceberg[sql-sqlite,pyarrow]==$PYICEBERG_VERSION" "duckdb==$DUCKDB_VERSION" ||
    die "pip could not install pyiceberg $PYICEBERG_VERSION and duckdb $DUCKDB_VERSION"
  svc_mark_installed
}

svc_launch() { die "is not a server"; }
svc_ready() { true; }
svc_address() { printf '%s\n' "$SVC_HOME/venv/bin/python"; }

svc_main "$@"
