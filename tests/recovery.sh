#!/usr/bin/env bash
# How long from kill -9 of the whole server to the first answer at a new tick, by size of state: the server
# is started again at once, restores, replays and answers a query over the view. One line per size.
#
#   tests/recovery.sh BINARY [EVENTS …]      events of the generator; a bid keeps about 85 bytes of state
set -euo pipefail
binary=$1
shift
[ $# -gt 0 ] || set -- 120000 1200000 12500000
KILLS=${KILLS:-20}

sql() {
  curl -s --max-time 300 -H 'content-type: application/json' -d "{\"sql\": \"$1\"}" "$url/api/v1/sql"
}

checkpoints() {
  curl -s "$url/metrics" | awk '/^millrace_checkpoints_total/ { print $2 }'
}

start() {
  "$binary" serve --data-dir "$dir/data" --http "$1" --checkpoint-interval 2s >"$dir/out" 2>>"$dir/log" &
  server=$!
}

for events in "$@"; do
  dir=$(mktemp -d)
  trap 'kill $server 2>/dev/null || true; rm -rf "$dir"' EXIT
  start 127.0.0.1:0
  until url=$(grep -o 'http://[0-9.:]*' "$dir/out"); do sleep 0.05; done
  sql "CREATE SOURCE bid WITH (connector = 'generator', kind = 'nexmark', table = 'bid', seed = 1, max_events = $events)" >/dev/null
  sql "CREATE MATERIALIZED VIEW g AS SELECT auction, bidder, date_time, count(*) AS n, max(price) AS price FROM bid GROUP BY auction, bidder, date_time" >/dev/null
  until curl -s "$url/api/v1/sources" | grep -q '"state":"finished"'; do sleep 0.5; done
  # The last rows are in a checkpoint: nothing but the state is to be restored. Each query is a new tick,
  # so that there is something to take a checkpoint of.
  for _ in 1 2; do
    sql 'SELECT count(*) FROM g' >/dev/null
    last=$(checkpoints)
    until [ "$(checkpoints)" -gt "$last" ]; do sleep 0.2; done
  done
  bytes=$(curl -s "$url/metrics" | awk '/^millrace_state_bytes/ { sum += $2 } END { printf "%d", sum / 1048576 }')
  times=()
  for _ in $(seq "$KILLS"); do
    child=$(cat "/proc/$server/task/$server/children")
    begin=$(date +%s%3N)
    # shellcheck disable=SC2086
    kill -9 $server $child
    wait "$server" 2>/dev/null || true
    start "${url#http://}"
    until sql 'SELECT n FROM g WHERE auction = 1000 LIMIT 1' | grep -q '"rows"'; do sleep 0.01; done
    times+=($(($(date +%s%3N) - begin)))
    sleep 1
  done
  sorted=($(printf '%s\n' "${times[@]}" | sort -n))
  p99=$(((KILLS * 99 + 99) / 100 - 1))
  echo "{\"suite\":\"recovery\",\"state_mib\":$bytes,\"kills\":$KILLS,\"p50_ms\":${sorted[$(((KILLS - 1) / 2))]},\"p99_ms\":${sorted[$p99]},\"max_ms\":${sorted[-1]}}"
  kill "$server"
  wait "$server" || true
  rm -rf "$dir"
  trap - EXIT
done
