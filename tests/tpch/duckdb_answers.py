"""Compares views with DuckDB's answers to the same queries.

Arguments: a folder with the eight tables as table-0.csv, table-1.csv ..., and a file with the contents of
the views q1 ... q22 as {"q1": [[value, ...], ...]}. Exit 1 and a report when an answer differs, 3 when there
is no DuckDB. What DuckDB computes as DOUBLE (avg, quotients) may differ by a millionth.
"""

import json
import math
import sys
from pathlib import Path

try:
    import duckdb
except ImportError:
    sys.exit(3)

# Columns: i(nteger), m(oney), d(ate), s(tring).
TABLES = {
    "region": "r_regionkey i, r_name s, r_comment s",
    "nation": "n_nationkey i, n_name s, n_regionkey i, n_comment s",
    "supplier": "s_suppkey i, s_name s, s_address s, s_nationkey i, s_phone s, s_acctbal m, s_comment s",
    "customer": "c_custkey i, c_name s, c_address s, c_nationkey i, c_phone s, c_acctbal m, c_mktsegment s,"
    " c_comment s",
    "part": "p_partkey i, p_name s, p_mfgr s, p_brand s, p_type s, p_size i, p_container s, p_retailprice m,"
    " p_comment s",
    "partsupp": "ps_partkey i, ps_suppkey i, ps_availqty i, ps_supplycost m, ps_comment s",
    "orders": "o_orderkey i, o_custkey i, o_orderstatus s, o_totalprice m, o_orderdate d, o_orderpriority s,"
    " o_clerk s, o_shippriority i, o_comment s",
    "lineitem": "l_orderkey i, l_partkey i, l_suppkey i, l_linenumber i, l_quantity m, l_extendedprice m,"
    " l_discount m, l_tax m, l_returnflag s, l_linestatus s, l_shipdate d, l_commitdate d, l_receiptdate d,"
    " l_shipinstruct s, l_shipmode s, l_comment s",
}
TYPES = {"i": "BIGINT", "m": "DECIMAL(15,2)", "d": "DATE", "s": "VARCHAR"}


def value(cell):
    """Numbers as numbers; all else as text."""
    if cell is None:
        return None
    try:
        return float(cell)
    except (TypeError, ValueError):
        return str(cell)


def order(row):
    """By texts first: numbers that differ in the last digits only must not change the order."""
    texts = ["" if cell is None else cell for cell in row if not isinstance(cell, float)]
    numbers = [float(f"{cell:.5g}") for cell in row if isinstance(cell, float)]
    return texts, numbers


def same(one, other):
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6)
    return one == other


def main():
    tables, views = Path(sys.argv[1]), Path(sys.argv[2])
    contents = json.loads(views.read_text())
    database = duckdb.connect()
    for name, columns in TABLES.items():
        types = {column: TYPES[kind] for column, kind in (c.split() for c in columns.split(","))}
        database.execute(
            f"CREATE TABLE {name} AS SELECT * FROM read_csv(?, header = true, columns = {types})",
            [str(tables / f"{name}-*.csv")],
        )
    differ = 0
    compared = 0
    for number in range(1, 23):
        name = f"q{number}"
        if name not in contents:
            continue
        query = Path(__file__).with_name(f"{name}.sql").read_text()
        answer = database.execute(query).fetchall()
        theirs = sorted(([value(cell) for cell in row] for row in answer), key=order)
        ours = sorted(([value(cell) for cell in row] for row in contents[name]), key=order)
        compared += 1
        if len(ours) == len(theirs) and all(
            len(a) == len(b) and all(map(same, a, b)) for a, b in zip(ours, theirs)
        ):
            continue
        differ += 1
        pairs = [(a, b) for a, b in zip(ours, theirs) if not all(map(same, a, b))]
        print(f"{name}: {len(ours)} rows, DuckDB has {len(theirs)}; first difference {pairs[:1]}")
    print(f"{compared} views compared with DuckDB {duckdb.__version__}, {differ} differ")
    sys.exit(1 if differ else 0)


main()
