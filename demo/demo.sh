#!/usr/bin/env bash
# A pipeline over the Nexmark auction: three generated sources, a window per auction published to
# Iceberg, a ranking kept up to date. Shows a live table until Ctrl-C; everything stops with it.
#
#   demo/demo.sh [MILLRACE]        the binary (default target/release/millrace)
#   DEMO_DIR      data directory, emptied first     (./demo-data)
#   DEMO_HTTP     address                           (127.0.0.1:8080)
#   DEMO_RATE     events per second                 (10000)
#   DEMO_SECONDS  ends by itself after so long; 0 is never
#
# Uses the binary and the shell only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

millrace=${1:-target/release/millrace}
dir=${DEMO_DIR:-./demo-data}
address=${DEMO_HTTP:-127.0.0.1:8080}
rate=${DEMO_RATE:-10000}
seconds=${DEMO_SECONDS:-0}

die() { printf 'demo: %s\n' "$*" >&2; exit 1; }
[ -x "$millrace" ] || die "$millrace is missing: run make build"

# Only what a demo has made is removed.
if [ -e "$dir" ] && [ -n "$(ls -A "$dir" 2>/dev/null)" ]; then
  [ -e "$dir/.millrace-demo" ] || die "$dir is not empty and no demo made it; set DEMO_DIR"
  rm -rf "$dir"
fi
mkdir -p "$dir"
touch "$dir/.millrace-demo"
dir=$(cd "$dir" && pwd)

server=
finish() {
  local status=$?
  trap - EXIT INT TERM
  if [ -n "$server" ] && kill -0 "$server" 2>/dev/null; then
    printf '\nstopping …\n'
    kill -TERM "$server" 2>/dev/null || true
    wait "$server" || status=$?
  fi
  if [ "$status" = 0 ]; then
    cat <<END

The data stays in $dir. Any reader of Iceberg opens the table, for example PyIceberg
(pip install 'pyiceberg[sql-sqlite,pyarrow]'):

  from pyiceberg.catalog.sql import SqlCatalog
  lake = SqlCatalog("lake", uri="sqlite:///$dir/data/metadata.db")
  print(lake.load_table("nexmark.hot_items").scan().to_arrow())
END
  fi
  exit "$status"
}
trap finish EXIT
# Ctrl-C is how a demo ends: no failure.
trap 'exit 0' INT TERM

printf 'starting millrace …\n'
# In a session of its own: Ctrl-C reaches this script, which then stops the server in order.
own_session=$(command -v setsid || true)
$own_session "$millrace" serve --data-dir "$dir/data" --http "$address" --commit-interval 2s \
  >"$dir/ready" 2>"$dir/server.log" &
server=$!
until grep -q 'http://' "$dir/ready" 2>/dev/null; do
  kill -0 "$server" 2>/dev/null || { cat "$dir/server.log" >&2; die "the server did not start"; }
  sleep 0.1
done
address=$(sed -n 's|.*http://||p' "$dir/ready" | head -n 1)
sql() { "$millrace" sql --http "$address" "$@"; }

printf 'creating the pipeline …\n'
sed "s/@RATE@/$rate/" demo/nexmark.sql | sql -f - >/dev/null || die "the pipeline could not be created"

live=
[ ! -t 1 ] || live=yes
started=$SECONDS
shown=0
while :; do
  kill -0 "$server" 2>/dev/null || { tail -n 20 "$dir/server.log" >&2; die "the server has ended"; }
  table=$(sql -c "SELECT auction, item, bids, best_price FROM ranking ORDER BY bids DESC, auction LIMIT 10")
  counts=$(sql -c "SELECT (SELECT bids FROM totals) AS bids_so_far, (SELECT count(*) FROM lake.nexmark.hot_items) AS rows_in_iceberg")
  [ -z "$live" ] || printf '\033[H\033[2J'
  cat <<END
Nexmark at $rate events per second · most bids so far · $((SECONDS - started)) s

$table

$counts

Open   http://$address/
Query  $millrace sql --http $address -c "SELECT * FROM lake.nexmark.hot_items ORDER BY bids DESC LIMIT 5"
Iceberg table lake.nexmark.hot_items, catalog $dir/data/metadata.db · Ctrl-C ends the demo
END
  shown=$((shown + 1))
  if [ "$seconds" -gt 0 ] && [ $((SECONDS - started)) -ge "$seconds" ]; then break; fi
  sleep 1
done

# A run that ends by itself is a test: the windows must have arrived in the table.
rows=$(sql -c "SELECT count(*) AS n FROM lake.nexmark.hot_items" | sed -n 3p | tr -d ' ')
[ "${rows:-0}" -gt 0 ] || die "the Iceberg table is still empty after $seconds s"
printf '\n%s rows in lake.nexmark.hot_items\n' "$rows"
