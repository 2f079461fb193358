#!/usr/bin/env bash
# PyIceberg in a virtual environment: the independent reader of what the lake holds.
#   PYICEBERG_VERSION (0.12.0)
# "install" makes it, "address" prints its python.
SVC=pyiceberg
SVC_VERSION=${PYICEBERG_VERSION:-0.12.0}
# shellcheck source=tests/services/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

svc_install() {
  need python3 "Python 3.10 or newer"
  rm -rf "$SVC_HOME/venv"
  python3 -m venv "$SVC_HOME/venv" || die "python3 -m venv failed (on Debian: apt-get install python3-venv)"
  "$SVC_HOME/venv/bin/pip" install -q --disable-pip-version-check --no-compile \
    "pyiceberg[sql-sqlite,pyarrow]==$SVC_VERSION" || die "pip could not install pyiceberg $SVC_VERSION"
  svc_mark_installed
}

svc_launch() { die "is not a server"; }
svc_ready() { true; }
svc_address() { printf '%s\n' "$SVC_HOME/venv/bin/python"; }

svc_main "$@"
