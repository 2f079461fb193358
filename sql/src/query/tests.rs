//! One-shot queries over tables in memory.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use datafusion::catalog::TableProvider;
use datafusion::common::ScalarValue;
use datafusion::datasource::MemTable;
use datafusion::physical_plan::collect;
use millrace_dataflow::error::{Error, Result};

use super::*;
use crate::testing::{bound, market};
use crate::{Bound, Policy, RelationRef, guard, relations_of};

/// `sales` of the market: id, x, y, f, name, at.
fn sales() -> RecordBatch {
    let crate::Item::Source(source) = &market().items["sales"] else {
        panic!("a source");
    };
    let seconds = |s: &[i64]| -> ArrayRef {
        Arc::new(TimestampMicrosecondArray::from(
            s.iter().map(|s| s * 1_000_000).collect::<Vec<_>>(),
        ))
    };
    let columns: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from(vec![1, 2, 3, 4])),
        Arc::new(Int64Array::from(vec![
            Some(0),
            Some(5),
            None,
            Some(i64::MAX),
        ])),
        Arc::new(Int64Array::from(vec![1, 1, 2, 2])),
        Arc::new(Float64Array::from(vec![1e16, 1.0, -1e16, 0.5])),
        Arc::new(StringArray::from(vec!["7", "b", "9", "d"])),
        seconds(&[1, 4, 11, 12]),
    ];
    RecordBatch::try_new(Arc::clone(&source.schema), columns).expect("fits")
}

fn provider(relation: &RelationRef) -> Result<Arc<dyn TableProvider>> {
    let RelationRef::Engine { name, schema, .. } = relation else {
        return Err(Error::internal("no tables here"));
    };
    let batch = match name.as_str() {
        "sales" => sales(),
        _ => RecordBatch::new_empty(Arc::clone(schema)),
    };
    let table =
        MemTable::try_new(Arc::clone(schema), vec![vec![batch]]).map_err(execution_error)?;
    Ok(Arc::new(table))
}

fn run_with(sql: &str, params: &[ScalarValue]) -> Result<String> {
    let Bound::Query(query) = bound(sql, params)? else {
        panic!("a query");
    };
    let executable = guard(query, &Policy)?.resolve(&provider)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let state = session_state(2);
    let batches = runtime.block_on(async {
        let plan = executable.physical(&state).await?;
        collect(plan, state.task_ctx())
            .await
            .map_err(execution_error)
    })?;
    let mut rows = Vec::new();
    for batch in &batches {
        let options = FormatOptions::default().with_null("null");
        let columns: Vec<ArrayFormatter<'_>> = batch
            .columns()
            .iter()
            .map(|c| ArrayFormatter::try_new(c, &options).expect("a format"))
            .collect();
        for row in 0..batch.num_rows() {
            let cells: Vec<String> = columns.iter().map(|c| c.value(row).to_string()).collect();
            rows.push(cells.join(" "));
        }
        assert!(
            batch
                .columns()
                .iter()
                .all(|c| !c.is_empty() || batch.num_rows() == 0)
        );
    }
    Ok(rows.join("; "))
}

fn run(sql: &str) -> String {
    match run_with(sql, &[]) {
        Ok(rows) => rows,
        Err(error) => {
            assert!(!error.message.contains("bug"), "{error:?}");
            format!("{} {}", error.code, error.message)
        }
    }
}

#[test]
fn queries_answer() {
    for (sql, expected) in [
        ("SELECT 1 + 1 AS two, 'a' || 'b'", "2 ab"),
        ("SELECT id FROM sales WHERE y = 2 ORDER BY id DESC", "4; 3"),
        (
            "SELECT y, count(*), count(x), min(x), max(name) FROM sales GROUP BY y ORDER BY y",
            "1 2 2 0 b; 2 2 1 9223372036854775807 d",
        ),
        (
            "SELECT sum(id), avg(id), mean(y) FROM sales",
            "10 2.500000 1.500000",
        ),
        (
            "SELECT sum(x) FROM (SELECT x FROM sales UNION ALL SELECT x FROM sales) t",
            "18446744073709551624",
        ),
        ("SELECT sum(f), avg(f) FROM sales", "1.5 0.375"),
        (
            "SELECT sum(DISTINCT y), avg(DISTINCT y), count(DISTINCT y) FROM sales",
            "3 1.500000 2",
        ),
        ("SELECT sum(id) FILTER (WHERE y = 2) FROM sales", "7"),
        ("SELECT sum(x), avg(f) FROM sales WHERE false", "null null"),
        (
            "SELECT id, sum(id) OVER (ORDER BY id) AS s FROM sales ORDER BY id",
            "1 1; 2 3; 3 6; 4 10",
        ),
        (
            "SELECT window_start, count(*) FROM TUMBLE(sales, at, INTERVAL '10' SECOND) GROUP BY window_start ORDER BY window_start",
            "1970-01-01T00:00:00 2; 1970-01-01T00:00:10 2",
        ),
        (
            "SELECT window_end, count(*) FROM HOP(sales, at, INTERVAL '5' SECOND, INTERVAL '10' SECOND) GROUP BY window_end ORDER BY window_end",
            "1970-01-01T00:00:05 2; 1970-01-01T00:00:10 2; 1970-01-01T00:00:15 2; 1970-01-01T00:00:20 2",
        ),
        (
            "SELECT a.id FROM sales a JOIN sales b ON a.id = b.id + 1 WHERE b.y = 1 ORDER BY a.id",
            "2; 3",
        ),
        (
            "SELECT id FROM sales EXCEPT SELECT id FROM sales WHERE id < 3 ORDER BY id",
            "3; 4",
        ),
        (
            "SELECT id FROM sales s WHERE EXISTS (SELECT 1 FROM sales t WHERE t.y = s.id) ORDER BY id",
            "1; 2",
        ),
        ("SELECT (SELECT max(id) FROM sales) AS m", "4"),
        (
            "WITH t AS (SELECT y, count(*) AS n FROM sales GROUP BY y) SELECT n FROM t WHERE y = 1",
            "2",
        ),
        (
            "SELECT DISTINCT ON (y) y, id FROM sales ORDER BY y, id DESC",
            "1 2; 2 4",
        ),
        (
            "SELECT CAST(at AS DATE), extract(second FROM at) FROM sales WHERE id = 2",
            "1970-01-01 4",
        ),
        (
            "SELECT ceiling(1.2), pow(2, 3), char_length('abc')",
            "2.0 8.0 3",
        ),
        ("SELECT auction FROM totals", ""),
    ] {
        assert_eq!(run(sql), expected, "{sql}");
    }
}

#[test]
fn arithmetic_fails_instead_of_wrapping() {
    for (sql, expected) in [
        ("SELECT x + 1 FROM sales", "22003 value out of range"),
        ("SELECT 9223372036854775807 + 1", "22003 value out of range"),
        (
            "SELECT id FROM sales WHERE x * 2 > 3",
            "22003 value out of range",
        ),
        ("SELECT sum(x * 2) FROM sales", "22003 value out of range"),
        (
            "SELECT id FROM sales ORDER BY x + 1",
            "22003 value out of range",
        ),
        (
            "SELECT -(-9223372036854775807 - 1)",
            "22003 value out of range",
        ),
        ("SELECT 10 / x FROM sales", "22012 division by zero"),
        ("SELECT 1 / 0", "22012 division by zero"),
        ("SELECT id % x FROM sales", "22012 division by zero"),
        (
            "SELECT CAST(x AS INT) FROM sales",
            "22003 value out of range",
        ),
        (
            "SELECT CAST(name AS BIGINT) FROM sales",
            "22P02 invalid input for type BIGINT",
        ),
        (
            "SELECT to_timestamp(name) FROM sales",
            "22007 invalid input for a date or time",
        ),
    ] {
        assert_eq!(run(sql), expected, "{sql}");
    }
}

#[test]
fn what_need_not_be_evaluated_does_not_fail() {
    for (sql, expected) in [
        ("SELECT id FROM sales WHERE x <> 0 AND 10 / x > 1", "2"),
        (
            "SELECT id FROM sales WHERE x = 0 OR 10 / x > 1 ORDER BY id",
            "1; 2",
        ),
        (
            "SELECT x <> 0 AND 10 / x > 1 FROM sales ORDER BY id",
            "false; true; null; false",
        ),
        (
            "SELECT id FROM (SELECT * FROM sales WHERE x <> 0) s WHERE 10 / x > 1",
            "2",
        ),
        (
            "SELECT CASE WHEN x = 0 THEN 0 ELSE 10 / x END FROM sales ORDER BY id",
            "0; 2; null; 0",
        ),
        (
            "SELECT a.id FROM sales a JOIN sales b ON a.id = b.id WHERE b.x <> 0 AND 10 / b.x > 1",
            "2",
        ),
        (
            "SELECT a.id FROM sales a JOIN (SELECT * FROM sales WHERE x <> 0) b ON a.id = b.id WHERE 10 / a.x > 1",
            "2",
        ),
        (
            "SELECT y, count(*) FROM sales WHERE x <> 0 GROUP BY y HAVING min(10 / x) >= 0 ORDER BY y",
            "1 1; 2 1",
        ),
    ] {
        assert_eq!(run(sql), expected, "{sql}");
    }
}

#[test]
fn parameters_are_values() {
    let answer = run_with(
        "SELECT id FROM sales WHERE id >= $1 AND name = $2 LIMIT $3",
        &[
            ScalarValue::Int64(Some(2)),
            ScalarValue::Utf8(Some("b".into())),
            ScalarValue::Int64(Some(5)),
        ],
    );
    assert_eq!(answer.expect("rows"), "2");
    let error = run_with(
        "SELECT id FROM sales WHERE id = $2",
        &[ScalarValue::Int64(Some(2))],
    );
    assert_eq!(error.expect_err("one is missing").code, "08P01");
}

#[test]
fn relations_are_listed_once_and_their_columns_are_checked() {
    let Bound::Query(query) =
        bound("SELECT a.id FROM sales a JOIN sales b ON a.id = b.id JOIN lake.market.prices p ON p.auction = a.id JOIN totals t ON t.auction = a.id", &[]).expect("binds")
    else {
        panic!("a query");
    };
    let guarded = guard(query, &Policy).expect("allowed");
    let names: Vec<String> = relations_of(&guarded)
        .into_iter()
        .map(|r| match r {
            RelationRef::Engine { name, .. } => name,
            RelationRef::Lake { name, .. } => name.to_string(),
            RelationRef::System { name, .. } => name,
        })
        .collect();
    let mut sorted = names.clone();
    sorted.sort();
    assert_eq!(sorted, ["lake.market.prices", "sales", "totals"]);
    let other = crate::testing::schema(&[("id", arrow::datatypes::DataType::Utf8)]);
    let wrong = guarded.resolve(&|_| {
        Ok(Arc::new(
            MemTable::try_new(Arc::clone(&other), vec![vec![]]).map_err(execution_error)?,
        ))
    });
    assert!(
        wrong
            .expect_err("columns differ")
            .message
            .contains("have changed")
    );
}

#[test]
fn without_the_guard_nothing_can_be_read() {
    let Bound::Query(query) = bound("SELECT id FROM sales", &[]).expect("binds") else {
        panic!("a query");
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let outcome = runtime.block_on(Executable::new(query.plan).physical(&session_state(1)));
    assert!(outcome.is_err());
}

#[test]
fn hundreds_of_terms_are_planned_and_run_on_a_small_stack() {
    let terms: Vec<String> = (0..1_500)
        .map(|i| format!("(id = {i} AND 10 / y > {i})"))
        .collect();
    let sql = format!(
        "SELECT id FROM sales WHERE {} ORDER BY id",
        terms.join(" OR ")
    );
    assert_eq!(run(&sql), "1; 2; 3; 4");
}

#[test]
fn a_statement_has_one_moment() {
    assert_eq!(
        run(
            "SELECT now() = now() AS a, current_timestamp = now() AS b, current_date = CAST(now() AS DATE) AS c, now() > TIMESTAMP '2024-01-01' AS d, localtimestamp = CAST(now() AS TIMESTAMP) AS e, count(*) AS n FROM sales WHERE at < now()"
        ),
        "true true true true true 4"
    );
}

/// Names of the answer's columns.
fn columns(sql: &str) -> String {
    let Bound::Query(query) = bound(sql, &[]).expect("binds") else {
        panic!("a query");
    };
    let schema = query.schema();
    let names: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
    names.join(" ")
}

#[test]
fn columns_are_named_as_postgres_names_them() {
    for (sql, expected) in [
        (
            "SELECT 1, 1.5, 'a', NULL, true, -1, 1 + 1, id = 1, name IS NULL, NOT true FROM sales",
            "?column? ?column? ?column? ?column? ?column? ?column? ?column? ?column? ?column? ?column?",
        ),
        (
            "SELECT count(*), count(x), sum(x), upper(name), now(), current_date FROM sales GROUP BY name",
            "count count sum upper now current_date",
        ),
        (
            "SELECT CAST(id AS TEXT), name::varchar(2), (id), CAST(1 AS BIGINT), '1'::numeric, DATE '2024-01-01', INTERVAL '1 day' FROM sales",
            "id name id int8 numeric date interval",
        ),
        (
            "SELECT CASE WHEN id = 1 THEN 1 END, CASE WHEN id = 1 THEN 1 ELSE y END, coalesce(x, 0), extract(YEAR FROM at), substring(name from 1 for 2), trim(name), position('a' IN name) FROM sales",
            "case y coalesce extract substring btrim position",
        ),
        (
            "SELECT (SELECT max(id) FROM sales), EXISTS (SELECT 1 FROM sales), ARRAY[1, 2], (ARRAY[1, 2])[1]",
            "max exists array array",
        ),
        (
            "SELECT id, id, *, sales.id FROM sales",
            "id id id x y f name at id",
        ),
        (
            "SELECT a.id, b.id, a.id, a.id + 1 AS id FROM sales a JOIN sales b ON a.id = b.id",
            "id id id id",
        ),
        ("SELECT 1 AS a, 2 AS a UNION ALL SELECT 3, 3", "a a"),
        (
            "SELECT * FROM (SELECT 1 AS a, 2 AS b UNION ALL SELECT 3, 4) t",
            "a b",
        ),
        ("SELECT count FROM (SELECT count(*) FROM sales) t", "count"),
    ] {
        assert_eq!(columns(sql), expected, "{sql}");
    }
    assert_eq!(
        run("SELECT id, id, count(*), count(*) FROM sales GROUP BY id ORDER BY id LIMIT 1"),
        "1 1 1 1"
    );
    assert_eq!(
        run("SELECT id, * FROM sales ORDER BY id LIMIT 1"),
        "1 1 0 1 1e16 7 1970-01-01T00:00:01"
    );
    assert_eq!(
        run("SELECT DISTINCT id, id FROM sales ORDER BY id DESC LIMIT 1"),
        "4 4"
    );
    assert_eq!(
        run("SELECT upper(name) FROM sales GROUP BY upper(name) ORDER BY upper(name) LIMIT 1"),
        "7"
    );
    assert_eq!(
        run("SELECT count FROM (SELECT y, count(*) FROM sales GROUP BY y ORDER BY count(*)) t"),
        "2; 2"
    );
    let refused = bound(
        "CREATE MATERIALIZED VIEW v AS SELECT id, id FROM sales",
        &[],
    );
    let error = refused.expect_err("a relation's columns differ");
    assert_eq!(
        (error.code, error.message.as_str()),
        ("42701", "column \"id\" is specified more than once")
    );
    let refused = bound(
        "CREATE MATERIALIZED VIEW v AS SELECT count(*), count(x) FROM sales",
        &[],
    );
    assert_eq!(
        refused.expect_err("as above").message,
        "column \"count\" is specified more than once"
    );
}

#[test]
fn a_text_literal_takes_the_type_of_the_other_side() {
    for (sql, expected) in [
        ("SELECT id FROM sales WHERE id > '10'", ""),
        (
            "SELECT id FROM sales WHERE id IN ('3', '04') ORDER BY id",
            "3; 4",
        ),
        (
            "SELECT id FROM sales WHERE id BETWEEN '2' AND '10' ORDER BY id",
            "2; 3; 4",
        ),
        (
            "SELECT CASE id WHEN '1' THEN 'one' END AS c FROM sales ORDER BY id LIMIT 1",
            "one",
        ),
        (
            "SELECT count(*) FROM sales WHERE CAST(id AS DECIMAL(10,2)) = '1.004'",
            "0",
        ),
        (
            "SELECT id FROM sales WHERE id = 'x'",
            "22P02 invalid input for type BIGINT",
        ),
        (
            "SELECT id FROM sales WHERE id = name",
            "42883 operator does not exist: BIGINT = TEXT",
        ),
        ("SELECT id FROM sales WHERE (id > 1) = 'false'", "1"),
    ] {
        assert_eq!(run(sql), expected, "{sql}");
    }
}

#[test]
fn numbers_with_a_point_are_exact() {
    for (sql, expected) in [
        (
            "SELECT 1.1 + 2.2 AS a, 1.5 * 1.5 AS b, 0.1 + 0.2 = 0.3 AS c",
            "3.3 2.25 true",
        ),
        (
            "SELECT 10 / 4.0 AS a, 2 / 3.0 AS b",
            "2.5000000000000000 0.6666666666666666",
        ),
        (
            "SELECT 1e3 AS a, 1.5e-3 AS b, -1E2 AS c",
            "1000.0 0.0015 -100.0",
        ),
        (
            "SELECT sum(v), avg(v), min(v) FROM (VALUES (0.1), (0.2), (0.4)) t(v)",
            "0.7 0.233333 0.1",
        ),
        (
            "SELECT f > 0.5 AS a, f = 0.5 AS b, f + 0.25 AS c FROM sales WHERE id = 4",
            "false true 0.75",
        ),
        (
            "SELECT 99999999999999999999 AS a, 12345678901234567890123456789.5 AS b",
            "99999999999999999999 12345678901234567890123456789.5",
        ),
        ("SELECT 1.0 / 0", "22012 division by zero"),
        (
            "SELECT sqrt(2.25) AS a, power(2, 0.5) > 1.41 AS b, round(1.567, 2) AS c, ln(1.0) AS d",
            "1.5 true 1.57 0.0",
        ),
        (
            "SELECT coalesce(f, 0.0) AS a, CASE WHEN id = 4 THEN 1.5 ELSE f END AS b FROM sales WHERE id = 4",
            "0.5 1.5",
        ),
    ] {
        assert_eq!(run(sql), expected, "{sql}");
    }
}

#[test]
fn types_of_postgres_are_known() {
    for (sql, expected) in [
        (
            "SELECT CAST('abcdef' AS VARCHAR(3)) AS a, 'näher'::varchar(2) AS b, CAST(NULL AS VARCHAR(2)) AS c, CAST(12345 AS CHARACTER VARYING(3)) AS d",
            "abc nä null 123",
        ),
        (
            "SELECT CAST(1.55 AS NUMERIC(10,1)) AS a, '2'::int8 AS b, 3::int4 AS c, 4::int2 AS d, 5::float8 AS e, 6::double precision AS f, 't'::bool AS g, 1::text AS h",
            "1.6 2 3 4 5.0 6.0 true 1",
        ),
        (
            "SELECT CAST('x' AS CHAR(2))",
            "0A000 type CHAR is not supported: its values are padded with blanks",
        ),
        (
            "SELECT CAST('x' AS VARCHAR(0))",
            "22023 the length of a VARCHAR lies between 1 and 10485760",
        ),
        (
            "SELECT mod(7, 4) AS a, mod(id, 2) AS b FROM sales WHERE id = 3",
            "3 1",
        ),
        ("SELECT U&'\\00e4' AS a", "ä"),
        (
            "SELECT to_char(at, 'YYYY-MM-DD HH24:MI:SS') AS a, to_char(at, '%Y') AS b FROM sales WHERE id = 1",
            "1970-01-01 00:00:01 1970",
        ),
        (
            "SELECT row_number() OVER (ORDER BY id) AS a FROM sales WHERE id = 1",
            "1",
        ),
        (
            "SELECT upper(5)",
            "42883 function upper(BIGINT) does not exist",
        ),
        (
            "SELECT x.* FROM sales",
            "42P01 missing FROM-clause entry for table \"x\"",
        ),
        (
            "SELECT id FROM sales ORDER BY 5",
            "42P10 ORDER BY position 5 is not in the select list",
        ),
        (
            "SELECT id FROM sales LIMIT -1",
            "2201W LIMIT and OFFSET must not be negative",
        ),
    ] {
        assert_eq!(run(sql), expected, "{sql}");
    }
}

#[test]
fn results_have_a_bound() {
    for sql in [
        "SELECT repeat('x', 2000000000)",
        "SELECT length(repeat(name, 2000000000)) FROM sales",
        "SELECT length(lpad(name, 2000000000, 'x')) FROM sales",
        "SELECT length(replace(repeat(name, 4000), name, repeat('y', 10000))) FROM sales",
        "SELECT length(regexp_replace(repeat(name, 8000000), '.', repeat('y', 8000), 'g')) FROM sales",
        "SELECT length(repeat(name, 9000000) || repeat(name, 9000000)) FROM sales",
        "SELECT length(concat(repeat(name, 9000000), repeat(name, 9000000))) FROM sales",
        "SELECT length(array_to_string(generate_series(1, 1000000), repeat(name, 100))) FROM sales",
        "SELECT array_length(generate_series(1, 10000000000)) FROM sales",
        "SELECT array_length(generate_series(TIMESTAMP '2000-01-01', TIMESTAMP '2024-01-01', INTERVAL '1 microsecond'))",
        "SELECT array_length(array_repeat(id, 1000000000)) FROM sales",
        "SELECT levenshtein(repeat('x', 100000), repeat('y', 100000))",
        "SELECT repeat('x', 100000) FROM sales",
    ] {
        assert!(run(sql).starts_with("54000 "), "{sql}: {}", run(sql));
    }
    for (sql, expected) in [
        ("SELECT length(repeat('x', 10000000)) AS a", "10000000"),
        (
            "SELECT length(repeat(name, 1000)) AS a FROM sales WHERE id = 1",
            "1000",
        ),
        (
            "SELECT replace('banana', 'an', '--') AS a, concat('a', NULL, 1) AS b, concat_ws('-', 'a', 'b') AS c, 'a' || NULL AS d",
            "b----a a1 a-b null",
        ),
        (
            "SELECT regexp_replace(name, '[0-9]', '#') AS a FROM sales ORDER BY id LIMIT 2",
            "#; b",
        ),
        (
            "SELECT array_to_string(generate_series(1, 3), ',') AS a",
            "1,2,3",
        ),
    ] {
        assert_eq!(run(sql), expected, "{sql}");
    }
}

#[test]
fn decimals_mean_the_same_wherever_they_stand() {
    for (sql, expected) in [
        (
            "SELECT id FROM sales WHERE f > 0.5 AND f <> 1.0 AND f NOT IN (2.5, 3.5)",
            "1",
        ),
        (
            "SELECT f FROM sales WHERE id = 1 UNION ALL SELECT 0.5",
            "1e16; 0.5",
        ),
        (
            "SELECT greatest(f, 0.5) AS a, CASE f WHEN 1e16 THEN 1.5 ELSE f END AS b FROM sales WHERE id = 1",
            "1e16 1.5",
        ),
        (
            "SELECT power(2.5, 2) AS a, power(2.0, 0.5) > 1.414 AS b",
            "6.25 true",
        ),
        (
            "SELECT id / 3.0 = 1 AS a, coalesce(id / 3.0, 0.5) AS b FROM sales WHERE id = 3",
            "true 1.0000000000000000",
        ),
        (
            "SELECT q FROM (SELECT id / 4.0 AS q FROM sales WHERE id = 1 UNION ALL SELECT 1.5) t ORDER BY q",
            "0.2500000000000000; 1.5000000000000000",
        ),
        (
            "SELECT sum(id / 4.0) AS a, avg(id / 4.0) AS b FROM sales",
            "2.5000000000000000 0.6250000000000000",
        ),
        (
            "SELECT CASE WHEN id = 1 THEN id / 4.0 ELSE 0.1 END AS a FROM sales ORDER BY id LIMIT 2",
            "0.2500000000000000; 0.1000000000000000",
        ),
        (
            "SELECT 9223372036854775808 AS a, -9223372036854775808 AS b, 18446744073709551615 AS c, 1_000 AS d",
            "9223372036854775808 -9223372036854775808 18446744073709551615 1000",
        ),
        (
            "SELECT id::text FROM sales ORDER BY id + 0 DESC LIMIT 1",
            "4",
        ),
        (
            "SELECT sign(-2) AS a, encode('\\x41ff'::bytea, 'hex') AS b",
            "-1.0 41ff",
        ),
        (
            "SELECT id + name FROM sales",
            "42883 operator does not exist: BIGINT + TEXT",
        ),
        (
            "SELECT id FROM sales WHERE at > 5",
            "42883 operator does not exist: TIMESTAMP > BIGINT",
        ),
        (
            "SELECT id FROM sales WHERE id",
            "42804 a condition is BOOLEAN, this one is BIGINT",
        ),
        (
            "SELECT CAST(12345.678 AS NUMERIC(5,2))",
            "22003 value out of range",
        ),
    ] {
        assert_eq!(run(sql), expected, "{sql}");
    }
    let refused = bound("SELECT * FROM sales a NATURAL FULL JOIN sales b", &[]);
    assert_eq!(refused.expect_err("a null id").code, "0A000");
}

#[test]
fn a_join_ends_when_nobody_waits() {
    let Bound::Query(query) = bound(
        "SELECT count(*) FROM sales a JOIN sales b ON a.id <> b.id AND a.x + b.x < 0",
        &[],
    )
    .expect("binds") else {
        panic!("a query");
    };
    let executable = guard(query, &Policy)
        .and_then(|g| g.resolve(&provider))
        .expect("resolves");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let state = session_state(1);
    let stop = Stop::default();
    let outcome = runtime.block_on(async {
        let plan = executable.physical_until(&state, &stop).await?;
        drop(stop.on_drop());
        collect(plan, state.task_ctx())
            .await
            .map_err(execution_error)
    });
    assert_eq!(outcome.expect_err("ended").code, "57014");
}
