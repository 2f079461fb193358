//! Rows in, a lake table out, read back through DataFusion.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, Decimal128Array, Float64Array, Int64Array, RecordBatch, StringViewArray,
    TimestampMicrosecondArray, UInt64Array,
};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use arrow::util::pretty::pretty_format_batches;
use datafusion::prelude::SessionContext;
use millrace_dataflow::delta::Diffs;
use millrace_dataflow::error::ErrorKind;
use millrace_dataflow::plan::RelationId;
use millrace_dataflow::sink::{Committable, Sink};
use millrace_lake::catalog::sql::open_pool;
use millrace_lake::{LakeTable, SqlCatalog, TableName};
use tempfile::TempDir;

use super::{IcebergOptions, IcebergSink};

struct Place {
    directory: TempDir,
    catalog: Arc<SqlCatalog>,
}

async fn place() -> Place {
    let directory = tempfile::tempdir().expect("a directory");
    let pool = open_pool(&directory.path().join("metadata.db"))
        .await
        .expect("a database");
    let catalog = SqlCatalog::open(pool, directory.path().join("warehouse"))
        .await
        .expect("opens");
    Place { directory, catalog }
}

fn name() -> TableName {
    TableName::new("shop", "orders").expect("a name")
}

fn columns() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("id", DataType::Int64, true),
        Field::new("item", DataType::Utf8View, true),
        Field::new("price", DataType::Float64, true),
        Field::new("total", DataType::Decimal128(38, 2), true),
        Field::new("big", DataType::UInt64, true),
        Field::new("at", DataType::Timestamp(TimeUnit::Microsecond, None), true),
    ]))
}

fn rows(ids: std::ops::Range<i64>) -> RecordBatch {
    let ids: Vec<i64> = ids.collect();
    let items: Vec<Option<String>> = ids
        .iter()
        .map(|id| (id % 7 != 0).then(|| format!("item {id} {}", "x".repeat(100))))
        .collect();
    let arrays: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from(ids.clone())),
        Arc::new(StringViewArray::from_iter(items)),
        Arc::new(Float64Array::from_iter_values(
            ids.iter()
                .map(|id| if *id == 3 { f64::NAN } else { *id as f64 / 2.0 }),
        )),
        Arc::new(
            Decimal128Array::from_iter_values(ids.iter().map(|id| i128::from(*id) * -150))
                .with_precision_and_scale(38, 2)
                .expect("fits"),
        ),
        Arc::new(UInt64Array::from_iter_values(
            ids.iter().map(|id| u64::MAX - *id as u64),
        )),
        Arc::new(TimestampMicrosecondArray::from_iter_values(
            ids.iter().map(|id| id * 1_000_000),
        )),
    ];
    RecordBatch::try_new(columns(), arrays).expect("a batch")
}

async fn sink(place: &Place, options: &[(&str, &str)]) -> Arc<IcebergSink> {
    let options: BTreeMap<String, String> = options
        .iter()
        .map(|(k, v)| ((*k).to_string(), (*v).to_string()))
        .collect();
    let options = IcebergOptions::parse(&options).expect("options");
    IcebergSink::create(
        Arc::clone(&place.catalog),
        &name(),
        RelationId(7),
        &columns(),
        options,
    )
    .await
    .expect("a sink")
}

async fn query(place: &Place, sql: &str) -> String {
    let context = SessionContext::new();
    let table = LakeTable::open(Arc::clone(&place.catalog), &name())
        .await
        .expect("the table");
    context.register_table("t", table).expect("registered");
    let batches = context
        .sql(sql)
        .await
        .expect("a plan")
        .collect()
        .await
        .expect("rows");
    pretty_format_batches(&batches).expect("text").to_string()
}

/// Through a checkpoint and back.
fn stored(committables: &[Committable]) -> Vec<Committable> {
    let text = serde_json::to_vec(committables).expect("serializes");
    serde_json::from_slice(&text).expect("and back")
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_two_workers_become_one_snapshot() {
    let place = place().await;
    let sink = sink(&place, &[]).await;
    assert!(!sink.accepts_retractions());
    let mut committables = vec![];
    for worker in 0..2 {
        let mut writer = sink.writer(worker, 3).await.expect("a writer");
        let start = worker as i64 * 1000;
        for (tick, ids) in [(1, start..start + 10), (2, start + 10..start + 500)] {
            writer
                .write(tick, &rows(ids), &Diffs::Ones)
                .await
                .expect("written");
        }
        committables.extend(writer.close(0, 10).await.expect("closed"));
        assert!(
            writer.close(10, 20).await.expect("closed").is_empty(),
            "nothing since"
        );
    }
    assert_eq!(committables.iter().map(|c| c.rows).sum::<u64>(), 1000);
    let committables = stored(&committables);
    let mut committer = sink.committer(3).await.expect("a committer");
    assert_eq!(committer.frontier().await.expect("a frontier"), None);
    committer
        .commit(0, 10, &committables)
        .await
        .expect("committed");
    committer.commit(10, 20, &[]).await.expect("nothing to do");
    committer
        .commit(0, 10, &committables)
        .await
        .expect("already there");
    let e = committer
        .commit(20, 30, &committables)
        .await
        .expect_err("not of this epoch");
    assert_eq!(e.kind, ErrorKind::Internal);

    let sql = "SELECT count(*) AS n, count(item) AS items, sum(id) AS ids, min(total) AS low, \
        max(big) AS big, max(\"at\") AS last FROM t";
    let text = query(&place, sql).await;
    let ids = || (0..500).chain(1000..1500).filter(|id| id % 7 != 0);
    let above = ids()
        .filter(|id| format!("item {id} x").as_str() > "item 99")
        .count();
    let items = ids().count();
    for wanted in [
        "1000".to_string(),
        items.to_string(),
        ((0..500).sum::<i64>() + (1000..1500).sum::<i64>()).to_string(),
        "-2248.50".to_string(),
        u64::MAX.to_string(),
        "1970-01-01T00:24:59".to_string(),
    ] {
        assert!(text.contains(&wanted), "{wanted} in {text}");
    }
    for (filter, count) in [
        ("id >= 1499", 1),
        ("id < 0", 0),
        ("price > 749", 2),
        ("item = 'item 1 x'", 0),
        ("item > 'item 99'", above),
        ("total <= -2248.50", 1),
        ("\"at\" < '1970-01-01T00:00:02'", 2),
        ("item IS NULL", 1000 - items),
    ] {
        let text = query(
            &place,
            &format!("SELECT count(*) AS n FROM t WHERE {filter}"),
        )
        .await;
        assert!(text.contains(&format!("| {count} ")), "{filter}: {text}");
    }
    // NaN compares as the largest value and stands in no bound.
    let text = query(&place, "SELECT count(*) AS n FROM t WHERE price > 1e300").await;
    assert!(text.contains("| 1 "), "{text}");
    let text = query(&place, "SELECT id FROM t ORDER BY price DESC LIMIT 1").await;
    assert!(text.contains("| 3 "), "{text}");

    let files = std::fs::read_dir(place.directory.path().join("warehouse/shop/orders/data"));
    for file in files.expect("a directory") {
        let file = file
            .expect("an entry")
            .file_name()
            .into_string()
            .expect("UTF-8");
        assert!(
            file.starts_with("7-3-0-") || file.starts_with("7-3-1-"),
            "{file}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_roll_at_their_target_size() {
    let place = place().await;
    let sink = sink(&place, &[("target_file_size", "64 kB")]).await;
    let mut writer = sink.writer(0, 1).await.expect("a writer");
    for n in 0..20 {
        writer
            .write(
                n,
                &rows(n as i64 * 5000..n as i64 * 5000 + 5000),
                &Diffs::Ones,
            )
            .await
            .expect("written");
    }
    let committables = writer.close(0, 20).await.expect("closed");
    assert!(committables.len() > 3, "{} files", committables.len());
    let mut committer = sink.committer(1).await.expect("a committer");
    committer
        .commit(0, 20, &committables)
        .await
        .expect("committed");
    let text = query(&place, "SELECT count(*) AS n, sum(id) AS ids FROM t").await;
    assert!(
        text.contains("100000") && text.contains(&(0..100_000_i64).sum::<i64>().to_string()),
        "{text}"
    );
    let text = query(
        &place,
        "SELECT count(*) AS n FROM t WHERE id BETWEEN 4990 AND 5009",
    )
    .await;
    assert!(text.contains("| 20 "), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_are_written_and_retractions_refused() {
    let place = place().await;
    let sink = sink(&place, &[]).await;
    let mut writer = sink.writer(0, 1).await.expect("a writer");
    let diffs = Diffs::from_vec(vec![1, 200_000, 3]);
    writer.write(1, &rows(0..3), &diffs).await.expect("written");
    let committables = writer.close(0, 2).await.expect("closed");
    let mut committer = sink.committer(1).await.expect("a committer");
    committer
        .commit(0, 2, &committables)
        .await
        .expect("committed");
    let text = query(
        &place,
        "SELECT id, count(*) AS n FROM t GROUP BY id ORDER BY id",
    )
    .await;
    for line in ["| 0  | 1      |", "| 1  | 200000 |", "| 2  | 3      |"] {
        assert!(text.contains(line), "{text}");
    }
    let e = writer
        .write(2, &rows(0..2), &Diffs::from_vec(vec![1, -1]))
        .await
        .expect_err("refused");
    assert_eq!(e.kind, ErrorKind::Unsupported);
    assert!(e.hint.expect("a way out").contains("changelog"));
    let e = writer.close(2, 3).await.expect_err("of no more use");
    assert_eq!(e.kind, ErrorKind::Internal);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changelog_keeps_signs_and_ticks() {
    let place = place().await;
    let sink = sink(&place, &[("changelog", "op")]).await;
    assert!(sink.accepts_retractions());
    let mut writer = sink.writer(0, 1).await.expect("a writer");
    writer
        .write(5, &rows(1..3), &Diffs::Ones)
        .await
        .expect("written");
    writer
        .write(6, &rows(1..3), &Diffs::from_vec(vec![-1, 2]))
        .await
        .expect("written");
    let committables = writer.close(0, 7).await.expect("closed");
    let mut committer = sink.committer(1).await.expect("a committer");
    committer
        .commit(0, 7, &committables)
        .await
        .expect("committed");
    let text = query(
        &place,
        "SELECT id, op, tick, count(*) AS n FROM t GROUP BY 1, 2, 3 ORDER BY tick, id",
    )
    .await;
    let lines: Vec<&str> = text.lines().skip(3).take(4).collect();
    assert_eq!(
        lines,
        [
            "| 1  | +  | 5    | 1 |",
            "| 2  | +  | 5    | 1 |",
            "| 1  | -  | 6    | 1 |",
            "| 2  | +  | 6    | 2 |"
        ]
    );
}

#[tokio::test]
async fn an_incompatible_table_is_refused_at_creation() {
    let place = place().await;
    let other = Schema::new(vec![Field::new("id", DataType::Utf8, true)]);
    place
        .catalog
        .create_table(&name(), &other, Default::default())
        .await
        .expect("a table");
    let create = |columns: SchemaRef| {
        let catalog = Arc::clone(&place.catalog);
        async move {
            let options = IcebergOptions::default();
            IcebergSink::create(catalog, &name(), RelationId(7), &columns, options).await
        }
    };
    let e = create(columns()).await.expect_err("other columns");
    assert_eq!(e.kind, ErrorKind::Conflict);
    assert!(e.message.contains("\"id\""), "{}", e.message);
    let odd = Schema::new(vec![Field::new(
        "id",
        DataType::Duration(TimeUnit::Second),
        true,
    )]);
    assert_eq!(
        create(Arc::new(odd)).await.expect_err("no such type").kind,
        ErrorKind::Unsupported
    );
    create(Arc::new(other)).await.expect("the same columns fit");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_gone_is_not_committed() {
    let place = place().await;
    let sink = sink(&place, &[]).await;
    let mut writer = sink.writer(0, 1).await.expect("a writer");
    writer
        .write(1, &rows(0..3), &Diffs::Ones)
        .await
        .expect("written");
    let committables = writer.close(0, 2).await.expect("closed");
    let data = place.directory.path().join("warehouse/shop/orders/data");
    std::fs::remove_dir_all(&data).expect("removed");
    let mut committer = sink.committer(1).await.expect("a committer");
    let e = committer
        .commit(0, 2, &committables)
        .await
        .expect_err("gone");
    assert_eq!(e.kind, ErrorKind::Corrupt);
}

/// Trouble that comes before anything was written of the rows leaves the writer as it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_writer_goes_on_once_a_file_can_be_made() {
    let place = place().await;
    let sink = sink(&place, &[]).await;
    let mut writer = sink.writer(0, 1).await.expect("a writer");
    let data = place.directory.path().join("warehouse/shop/orders/data");
    std::fs::remove_dir_all(&data).expect("removed");
    std::fs::write(&data, "in the way").expect("written");
    for _ in 0..2 {
        let failed = writer.write(1, &rows(0..3), &Diffs::Ones).await;
        assert_eq!(failed.expect_err("no file").kind, ErrorKind::Unavailable);
    }
    std::fs::remove_file(&data).expect("removed");
    let written = writer.write(1, &rows(0..3), &Diffs::Ones).await;
    written.expect("taken");
    let closed = writer.close(0, 2).await.expect("closed");
    assert_eq!(closed.iter().map(|c| c.rows).sum::<u64>(), 3);
}

#[tokio::test]
async fn a_table_that_was_dropped_is_not_made_again() {
    let place = place().await;
    let (name, columns) = (name(), columns());
    let options = IcebergOptions::default();
    let open = IcebergSink::open(
        Arc::clone(&place.catalog),
        &name,
        RelationId(7),
        &columns,
        options,
    );
    let e = open.await.expect_err("no table");
    assert_eq!((e.kind, e.code), (ErrorKind::NotFound, "42P01"));
    assert!(!place.catalog.table_exists(&name).await.expect("asked"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unfinished_file_leaves_with_its_writer() {
    let place = place().await;
    let sink = sink(&place, &[]).await;
    let mut writer = sink.writer(0, 1).await.expect("a writer");
    writer
        .write(1, &rows(0..3), &Diffs::Ones)
        .await
        .expect("written");
    let data = place.directory.path().join("warehouse/shop/orders/data");
    assert_eq!(std::fs::read_dir(&data).expect("a directory").count(), 1);
    drop(writer);
    assert_eq!(std::fs::read_dir(&data).expect("a directory").count(), 0);
}
