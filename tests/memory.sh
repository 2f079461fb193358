#!/usr/bin/env bash
# State larger than memory: the same run without a budget and with one; one JSON line per run.
#
#   tests/memory.sh BINARY [KEYS …]     KEYS: local, zipf or uniform
#
# EVENTS (default 20000000) bids are grouped by a key that is made from the number of the event: each key
# comes four times within a moment (local), as often as its rank says (zipf, exponent 1), or any key at any
# time (uniform). BUDGET (default 1GB) is what `--memory` says in the second run. Peak memory is the
# high-water mark of resident memory of the service, its rate is events per CPU-second of the service, and
# the answer is a checksum over the view.
set -euo pipefail
binary=$1
shift
[ $# -gt 0 ] || set -- local zipf uniform
EVENTS=${EVENTS:-20000000}
BUDGET=${BUDGET:-1GB}
MEMORY=${MEMORY:-none $BUDGET}
ROOT=${ROOT:-${TMPDIR:-/tmp}}

sql() {
  curl -s --max-time 3000 -H 'content-type: application/json' -d "{\"sql\": \"$1\"}" "$url/api/v1/sql"
}

# The number of the event, from its time: ten thousand a second.
number="(cast(arrow_cast(date_time, 'Int64') / 100 as bigint) % 2147483648)"
scattered="(($number * 2654435761) % 4294967296)"
for keys in "$@"; do
  case $keys in
    local) key="$number / 4" ;;
    zipf) key="cast(exp(18.0 * $scattered / 4294967296.0) as bigint)" ;;
    uniform) key="$scattered % ($EVENTS / 4)" ;;
    *) echo "no such keys: $keys" >&2 && exit 2 ;;
  esac
  for memory in $MEMORY; do
    dir=$(mktemp -d "$ROOT/millrace-memory-XXXXXX")
    budget=()
    [ "$memory" = none ] || budget=(--memory "$memory")
    "$binary" serve --data-dir "$dir/data" --http 127.0.0.1:0 "${budget[@]}" ${FLAGS:-} >"$dir/out" 2>"$dir/log" &
    server=$!
    trap 'kill $server 2>/dev/null || true; rm -rf "$dir"' EXIT
    until url=$(grep -o 'http://[0-9.:]*' "$dir/out"); do sleep 0.05; done
    begin=$(date +%s%3N)
    sql "CREATE SOURCE bid WITH (connector = 'generator', kind = 'nexmark', table = 'bid', seed = 1, max_events = $EVENTS)" >/dev/null
    sql "CREATE MATERIALIZED VIEW g AS SELECT $key AS k, count(*) AS n, sum(price) AS price, max(date_time) AS last, min(bidder) AS bidder FROM bid GROUP BY 1" >"$dir/view"
    grep -q '"error"' "$dir/view" && cat "$dir/view" && exit 1
    peak_state=0
    until curl -s "$url/api/v1/sources" | grep -q '"state":"finished"'; do sleep 0.5; done
    sql 'SELECT 1 FROM g LIMIT 1' >/dev/null
    ended=$(date +%s%3N)
    child=$(cat "/proc/$server/task/$server/children" | tr -d ' ')
    ticks=$(awk '{ print $14 + $15 }' "/proc/$child/stat")
    metrics=$(curl -s "$url/metrics")
    value() { awk -v name="$1" '$1 ~ "^" name "({|$)" { sum += $2 } END { printf "%.0f", sum }' <<<"$metrics"; }
    answer=$(sql 'SELECT count(*), sum(n), sum(price), min(last), max(k % 1000003 * (n + 7)), sum(k % 9973 * (n + bidder % 17)) FROM g' | grep -o '"rows":.*\]\]' || true)
    peak=$(awk '/VmHWM/ { print int($2 / 1024) }' "/proc/$child/status")
    echo "{\"suite\":\"memory\",\"keys\":\"$keys\",\"memory\":\"$memory\",\"events\":$EVENTS,\"seconds\":$(((ended - begin) / 1000)),\"cpu_seconds\":$((ticks / 100)),\"events_per_cpu_second\":$((EVENTS * 100 / (ticks + 1))),\"peak_mib\":$peak,\"state_mib\":$(($(value millrace_state_bytes) >> 20)),\"swapped_mib\":$(($(value millrace_state_swapped_bytes) >> 20)),\"pages_written\":$(value millrace_swap_pages_written_total),\"pages_read\":$(value millrace_swap_pages_read_total),\"answer\":\"$(md5sum <<<"$answer" | cut -c1-12)\"}"
    [ -n "$answer" ] || { echo "no answer" >&2; tail -5 "$dir/log" >&2; exit 1; }
    kill "$server"
    wait "$server" || true
    rm -rf "$dir"
    trap - EXIT
  done
done
