#!/usr/bin/env bash
# How long from kill -9 of the service to the first answer, by size of state. One line per size.
#
#   tests/recovery.sh BINARY [EVENTS …]      events of the generator; a bid keeps about 250 bytes of state
set -euo pipefail
binary=$1
shift
[ $# -gt 0 ] || set -- 50000 500000 4500000
KILLS=${KILLS:-7}

sql() {
  curl -s --max-time 300 -H 'content-type: application/json' -d "{\"sql\": \"$1\"}" "$url/api/v1/sql"
}

for events in "$@"; do
  dir=$(mktemp -d)
  "$binary" serve --data-dir "$dir/data" --http 127.0.0.1:0 --checkpoint-interval 2s >"$dir/out" 2>"$dir/log" &
  server=$!
  trap 'kill $server 2>/dev/null || true; rm -rf "$dir"' EXIT
  until url=$(grep -o 'http://[0-9.:]*' "$dir/out"); do sleep 0.05; done
  sql "CREATE SOURCE bid WITH (connector = 'generator', kind = 'nexmark', table = 'bid', seed = 1, max_events = $events)" >/dev/null
  sql "CREATE MATERIALIZED VIEW g AS SELECT auction, bidder, date_time, count(*) AS n, max(price) AS price FROM bid GROUP BY auction, bidder, date_time" >/dev/null
  until curl -s "$url/api/v1/sources" | grep -q '"state":"finished"'; do sleep 0.5; done
  sql 'SELECT count(*) FROM g' >/dev/null
  sleep 6 # the last rows are in a checkpoint
  bytes=$(curl -s "$url/metrics" | awk '/^millrace_state_bytes/ { sum += $2 } END { printf "%d", sum / 1048576 }')
  times=()
  for _ in $(seq "$KILLS"); do
    child=$(cat "/proc/$server/task/$server/children")
    begin=$(date +%s%3N)
    kill -9 $child
    until sql 'SELECT n FROM g WHERE auction = 1000 LIMIT 1' | grep -q '"rows"'; do sleep 0.01; done
    times+=($(($(date +%s%3N) - begin)))
    sleep 3
  done
  sorted=($(printf '%s\n' "${times[@]}" | sort -n))
  echo "{\"suite\":\"recovery\",\"state_mib\":$bytes,\"kills\":$KILLS,\"p50_ms\":${sorted[$((KILLS / 2))]},\"max_ms\":${sorted[-1]}}"
  kill "$server"
  wait "$server" || true
  rm -rf "$dir"
  trap - EXIT
done
