"""The second opinion: DuckDB on the contents of a schedule, which shares no code with the engine.

Reads {"tables": [{"name", "types"}], "steps": [[rows of each table]], "queries": [sql]} from stdin and
prints {"steps": [[answer of each query]]}; an answer is {"rows": …} or {"error": …}. Integers and decimals
are texts.
"""

import datetime
import decimal
import json
import math
import sys

import duckdb


def plain(value):
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, decimal.Decimal)):
        return format(value, "f") if isinstance(value, decimal.Decimal) else str(value)
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return value
    if isinstance(value, (datetime.datetime, datetime.date)):
        return value.isoformat()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value)


def answer(db, query):
    try:
        rows = db.execute(query).fetchall()
        return {"rows": [[plain(value) for value in row] for row in rows]}
    except Exception as error:  # what it refuses is counted, not hidden
        return {"error": str(error)[:400]}


def main():
    work = json.load(sys.stdin)
    db = duckdb.connect()
    db.execute("SET threads = 1")
    for table in work["tables"]:
        columns = ", ".join(f"c{i} {ty}" for i, ty in enumerate(table["types"]))
        db.execute(f"CREATE TABLE {table['name']} ({columns})")
    steps = []
    for contents in work["steps"]:
        for table, rows in zip(work["tables"], contents):
            db.execute(f"DELETE FROM {table['name']}")
            if rows:
                casts = ", ".join(f"CAST(? AS {ty})" for ty in table["types"])
                db.executemany(f"INSERT INTO {table['name']} VALUES ({casts})", rows)
        steps.append([answer(db, query) for query in work["queries"]])
    json.dump({"steps": steps}, sys.stdout)


main()
