#!/usr/bin/env bash
# Everything that CI runs, in order, with a heading and the time for each step. What it starts it
# stops; a broker that was running before stays.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
services=tests/services
target=${CARGO_TARGET_DIR:-target}

step() { printf '\n==== %s (%d s so far)\n' "$*" "$SECONDS"; }

started_kafka=
finish() {
  local status=$?
  [ -z "$started_kafka" ] || "$services/kafka.sh" stop || true
  if [ "$status" = 0 ]; then
    printf '\n==== everything passed, in %d s\n' "$SECONDS"
  else
    printf '\n==== FAILED with status %d, after %d s\n' "$status" "$SECONDS"
  fi
}
trap finish EXIT
trap 'exit 130' INT TERM

step "services"
"$services/pyiceberg.sh" install
"$services/kafka.sh" install
if ! "$services/kafka.sh" status >/dev/null 2>&1; then
  started_kafka=yes
  "$services/kafka.sh" start
fi
# From here on a missing service is a failure, not a reason to skip.
MILLRACE_TEST_KAFKA=$("$services/kafka.sh" address)
MILLRACE_TEST_PYTHON=$("$services/pyiceberg.sh" address)
export MILLRACE_TEST_KAFKA MILLRACE_TEST_PYTHON

step "format"
cargo fmt --all --check

step "build (two cores, from nothing: about half an hour; later: our own crates only)"
cargo build --workspace --all-targets

step "tests"
# The large tests bring processes of their own: two at a time are enough for two cores.
cargo test --workspace --no-fail-fast -- --test-threads "${MILLRACE_TEST_THREADS:-2}"

step "demo"
DEMO_SECONDS=${DEMO_SECONDS:-15} DEMO_DIR=$(mktemp -d) DEMO_HTTP=127.0.0.1:0 demo/demo.sh "$target/debug/millrace"
