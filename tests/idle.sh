#!/usr/bin/env bash
# CPU seconds that a server with ten views takes in a minute while its sources are quiet.
#   tests/idle.sh [MILLRACE]     IDLE_SECONDS (60), IDLE_LIMIT in CPU seconds per minute (1.2)
# Needs the broker of the tests (make services-start); without it the sources are files that have
# been read to their end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
millrace=${1:-target/release/millrace}
seconds=${IDLE_SECONDS:-60}
limit=${IDLE_LIMIT:-1.2}
dir=$(mktemp -d)
server=
finish() {
  if [ -n "$server" ]; then kill -TERM "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; fi
  rm -rf "$dir"
}
trap finish EXIT

for i in 1 2 3 4 5 6 7 8 9; do
  printf '{"k":%d,"v":%d,"at":"2024-01-01T00:00:0%dZ"}\n' $((i % 3)) "$i" "$i"
done >"$dir/rows.json"
"$millrace" serve --data-dir "$dir/data" --http 127.0.0.1:0 --workers 2 >"$dir/ready" 2>"$dir/log" &
server=$!
until grep -q 'http://' "$dir/ready"; do
  kill -0 "$server" || { cat "$dir/log"; exit 1; }
  sleep 0.1
done
address=$(sed -n 's|.*http://||p' "$dir/ready" | head -n 1)
sql() { "$millrace" sql --http "$address" "$@"; }

# A live source that gives an event a day, and one that has ended.
sql -c "CREATE SOURCE quiet WITH (connector = 'generator', kind = 'nexmark', table = 'bid', rate = '1', max_events = '5');
        CREATE SOURCE done (k BIGINT, v BIGINT, at TIMESTAMP) WITH (connector = 'files', format = 'json', path = '$dir/rows.json')" >/dev/null
topic=${IDLE_TOPIC:-}
live=done
if [ -n "$topic" ]; then
  sql -c "CREATE SOURCE live (k BIGINT, v BIGINT, at TIMESTAMP, WATERMARK FOR at AS at - INTERVAL '1' SECOND)
          WITH (connector = 'kafka', bootstrap_servers = '${MILLRACE_TEST_KAFKA:-127.0.0.1:9092}', topic = '$topic', format = 'json')" >/dev/null
  live=live
fi
for i in 1 2 3 4 5; do
  sql -c "CREATE MATERIALIZED VIEW a$i AS SELECT k, count(*) AS n, sum(v) AS s FROM $live GROUP BY k;
          CREATE MATERIALIZED VIEW b$i AS SELECT auction, count(*) AS n FROM quiet GROUP BY auction" >/dev/null
done
cpu() { # of the parent and its child, in clock ticks
  local pid total=0
  for pid in "$server" $(cat "/proc/$server/task/$server/children"); do
    total=$((total + $(sed 's/^.*) //' "/proc/$pid/stat" | awk '{ print $12 + $13 }')))
  done
  printf '%s\n' "$total"
}
echo "ten views are up on $address; settling for 15 s, then measuring for $seconds s"
sleep 15
before=$(cpu)
sleep "$seconds"
after=$(cpu)
awk -v t=$((after - before)) -v hz="$(getconf CLK_TCK)" -v s="$seconds" -v limit="$limit" 'BEGIN {
  used = t / hz * 60 / s
  printf "%.2f CPU-seconds per minute (limit %.1f)\n", used, limit
  exit used >= limit
}'
