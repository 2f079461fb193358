"""Checks what a run left in the lake, as PyIceberg reads it.

    ledger.py DATA_DIR rows TABLE ID_COLUMN COUNT
        every id from 0 to COUNT-1 is there once, nothing else is
    ledger.py DATA_DIR equal TABLE EXPECTED.json
        the table holds exactly these rows (a list of lists, any order)
    ledger.py DATA_DIR net TABLE EXPECTED.json
        a changelog (columns op and tick): at no tick a row is there less than never, and in the end
        exactly these rows are there once
    ledger.py DATA_DIR read TABLE
        prints the rows

Each of them first walks the snapshots of the table: the chain is unbroken, the tokens of a sink
follow each other without a gap or an overlap, no data file is live twice, and each one is there with
the size the manifest says. Exit 0 and a JSON report on the last line when all of it holds.
"""

import collections
import datetime
import decimal
import json
import os
import sys

import pyarrow.compute as pc
from pyiceberg.catalog.sql import SqlCatalog


def fail(text):
    print("LEDGER: " + text)
    sys.exit(1)


def load(data_dir, name):
    data_dir = os.path.abspath(data_dir)
    catalog = SqlCatalog("lake", uri=f"sqlite:///{data_dir}/metadata.db")
    return catalog.load_table(name)


def check_snapshots(table):
    by_id = {s.snapshot_id: s for s in table.metadata.snapshots}
    chain = []
    current = table.metadata.current_snapshot_id
    while current is not None:
        if current not in by_id:
            fail(f"snapshot {current} is missing from the chain")
        chain.append(by_id[current])
        current = by_id[current].parent_snapshot_id
    if len(chain) != len(by_id):
        fail(f"{len(by_id) - len(chain)} snapshots are not in the chain of {len(chain)}")
    chain.reverse()
    frontier = {}
    for snapshot in chain:
        summary = snapshot.summary.additional_properties
        sink = summary.get("millrace.sink-id")
        if sink is None:
            fail(f"snapshot {snapshot.snapshot_id} carries no token: {summary}")
        lower, upper = int(summary["millrace.lower"]), int(summary["millrace.frontier"])
        if sink in frontier and lower != frontier[sink]:
            fail(f"sink {sink}: a commit from {lower} follows one up to {frontier[sink]}")
        if upper <= lower:
            fail(f"sink {sink}: a commit from {lower} to {upper}")
        frontier[sink] = upper
    for sink, upper in frontier.items():
        stored = table.properties.get(f"millrace.sinks.{sink}.frontier")
        if stored is None or int(stored) != upper:
            fail(f"sink {sink}: property {stored}, last snapshot {upper}")
    return len(chain)


def check_files(table):
    paths = collections.Counter()
    for task in table.scan().plan_files():
        path = task.file.file_path
        paths[path] += 1
        local = path.removeprefix("file://")
        if not os.path.exists(local):
            fail(f"data file {path} is missing")
        if os.path.getsize(local) != task.file.file_size_in_bytes:
            fail(f"data file {path} has another size than its manifest says")
    twice = [path for path, count in paths.items() if count > 1]
    if twice:
        fail(f"data files are live twice: {twice[:3]}")
    return len(paths)


def plain(value):
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, datetime.datetime):
        return value.replace(tzinfo=None).isoformat(timespec="microseconds")
    if isinstance(value, (datetime.date, bytes)):
        return str(value)
    return value


def rows_of(table):
    arrow = table.scan().to_arrow()
    return [[plain(row[name]) for name in arrow.column_names] for row in arrow.to_pylist()]


def main():
    data_dir, command, name = sys.argv[1:4]
    table = load(data_dir, name)
    report = {"table": name, "snapshots": check_snapshots(table), "files": check_files(table)}
    if command == "rows":
        column, count = sys.argv[4], int(sys.argv[5])
        ids = table.scan(selected_fields=(column,)).to_arrow()[column]
        present = pc.count_distinct(ids).as_py()
        if len(ids) != present:
            fail(f"{len(ids)} rows, but {present} different ids: {len(ids) - present} are there twice")
        low, high = (pc.min(ids).as_py(), pc.max(ids).as_py()) if len(ids) else (0, -1)
        if present != count or low != 0 or high != count - 1 or ids.null_count:
            fail(f"{present} ids from {low} to {high}, wanted {count} from 0: {count - present} are missing")
        report["rows"] = present
    elif command == "equal":
        with open(sys.argv[4], encoding="utf-8") as file:
            wanted = collections.Counter(json.dumps(row) for row in json.load(file))
        found = collections.Counter(json.dumps(row) for row in rows_of(table))
        missing, extra = wanted - found, found - wanted
        if missing or extra:
            fail(
                f"{sum(missing.values())} rows are missing, as {list(missing)[:5]}; "
                f"{sum(extra.values())} are too many, as {list(extra)[:5]}"
            )
        report["rows"] = sum(found.values())
    elif command == "net":
        with open(sys.argv[4], encoding="utf-8") as file:
            wanted = collections.Counter(json.dumps(row) for row in json.load(file))
        names = table.scan().to_arrow().column_names
        op, tick = names.index("op"), names.index("tick")
        changes = sorted(rows_of(table), key=lambda row: row[tick])
        found, at = collections.Counter(), None
        for row in changes + [None]:
            if row is None or row[tick] != at:
                low = [r for r, n in found.items() if n < 0 or n > 1]
                if low:
                    fail(f"after tick {at} rows are there {found[low[0]]} times, as {low[:3]}")
                found = +found
            if row is not None:
                at = row[tick]
                rest = [v for i, v in enumerate(row) if i not in (op, tick)]
                found[json.dumps(rest)] += 1 if row[op] == "+" else -1
        missing, extra = wanted - found, found - wanted
        if missing or extra:
            fail(f"missing {list(missing)[:5]}, too many {list(extra)[:5]}")
        report["rows"], report["changes"] = sum(found.values()), len(changes)
    elif command == "read":
        report["rows"] = rows_of(table)
    else:
        fail(f"what is {command}?")
    print(json.dumps(report))


main()
