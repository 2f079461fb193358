//! Tables read through DataFusion.

use std::sync::Arc;

use arrow::util::pretty::pretty_format_batches;
use datafusion::physical_plan::displayable;
use datafusion::prelude::{SessionConfig, SessionContext};
use iceberg::spec::{DataContentType, DataFileBuilder, DataFileFormat, Struct};
use iceberg::{TableUpdate, spec};

use crate::commit::TableCommitter;
use crate::testing::{Place, columns, data_file, name, place, table};
use crate::{LakeTable, TableVersion, snapshot};

async fn commit(place: &Place, table: &TableVersion, tick: u64, ids: &[i64]) {
    let mut sink = TableCommitter::new(Arc::clone(&place.catalog), table, "7", 1);
    let file = data_file(table, &format!("f{tick}"), ids);
    sink.commit(tick, tick + 1, &[file])
        .await
        .expect("committed");
}

async fn context(place: &Place) -> SessionContext {
    let context = SessionContext::new_with_config(SessionConfig::new().with_target_partitions(4));
    let table = LakeTable::open(Arc::clone(&place.catalog), &name())
        .await
        .expect("the table");
    context.register_table("t", table).expect("registered");
    context
}

async fn query(context: &SessionContext, sql: &str) -> String {
    let batches = context
        .sql(sql)
        .await
        .expect("a plan")
        .collect()
        .await
        .expect("rows");
    pretty_format_batches(&batches).expect("text").to_string()
}

async fn plan(context: &SessionContext, sql: &str) -> String {
    let plan = context
        .sql(sql)
        .await
        .expect("sql")
        .create_physical_plan()
        .await
        .expect("a plan");
    displayable(plan.as_ref()).indent(false).to_string()
}

#[tokio::test]
async fn rows_come_back_from_a_pinned_snapshot() {
    let place = place().await;
    let table = table(&place.catalog).await;
    let empty = context(&place).await;
    assert!(
        query(&empty, "SELECT count(*) AS n FROM t")
            .await
            .contains("| 0 |")
    );
    commit(&place, &table, 0, &[1, 2, 3]).await;
    let early = context(&place).await;
    commit(&place, &table, 1, &[10, 20]).await;
    let late = context(&place).await;
    assert!(
        query(&early, "SELECT sum(id) AS n FROM t")
            .await
            .contains("| 6 |")
    );
    assert!(
        query(&late, "SELECT sum(id) AS n FROM t")
            .await
            .contains("| 36 |")
    );
    let text = query(
        &late,
        "SELECT text, id FROM t WHERE id > 2 ORDER BY id LIMIT 2",
    )
    .await;
    assert!(
        text.contains("| row 3  | 3  |") && text.contains("| row 10 | 10 |"),
        "{text}"
    );
    assert!(
        query(&late, "SELECT count(*) AS n FROM (SELECT * FROM t LIMIT 4)")
            .await
            .contains("| 4 |")
    );

    let version = place.catalog.load_table(&name()).await.expect("the table");
    let first = version.metadata.history()[0].snapshot_id;
    let past = LakeTable::open_at(Arc::clone(&place.catalog), &name(), first).await;
    assert_eq!(past.expect("kept").row_count().await.expect("rows"), 3);
}

#[tokio::test]
async fn counts_come_from_the_manifests() {
    let place = place().await;
    let table = table(&place.catalog).await;
    commit(&place, &table, 0, &[1, 2, 3]).await;
    let text = plan(&context(&place).await, "SELECT count(*), count(id) FROM t").await;
    assert!(
        !text.contains("DataSourceExec"),
        "answered without reading: {text}"
    );
}

#[tokio::test]
async fn bounds_leave_out_files_and_partitions_share_the_rest() {
    let place = place().await;
    let table = table(&place.catalog).await;
    for tick in 0..6 {
        commit(
            &place,
            &table,
            tick,
            &[tick as i64 * 10, tick as i64 * 10 + 9],
        )
        .await;
    }
    let context = context(&place).await;
    let all = plan(&context, "SELECT id FROM t").await;
    assert!(all.contains("file_groups={4 groups"), "{all}");
    let some = plan(&context, "SELECT text FROM t WHERE id >= 45").await;
    assert!(
        some.contains("f4.parquet") && some.contains("f5.parquet"),
        "{some}"
    );
    assert!(!some.contains("f3.parquet"), "{some}");
    let none = query(
        &context,
        "SELECT count(*) AS n FROM t WHERE id = 35 OR id > 1000",
    )
    .await;
    assert!(none.contains("| 0 |"), "{none}");
    let text = query(
        &context,
        "SELECT count(*) AS n FROM t WHERE id BETWEEN 9 AND 30",
    )
    .await;
    assert!(text.contains("| 6 |"), "{text}");
}

#[tokio::test]
async fn a_renamed_column_still_reads_its_old_files() {
    let place = place().await;
    let table = table(&place.catalog).await;
    commit(&place, &table, 0, &[1, 2]).await;
    // Names change places, a column is added; ids stay.
    let base = place.catalog.load_table(&name()).await.expect("the table");
    let string = || spec::Type::Primitive(spec::PrimitiveType::String);
    let long = || spec::Type::Primitive(spec::PrimitiveType::Long);
    let changed = spec::Schema::builder()
        .with_schema_id(1)
        .with_fields(vec![
            Arc::new(spec::NestedField::optional(2, "id", string())),
            Arc::new(spec::NestedField::optional(1, "number", long())),
            Arc::new(spec::NestedField::optional(3, "text", string())),
        ])
        .build()
        .expect("a schema");
    let mut builder = base
        .metadata
        .as_ref()
        .clone()
        .into_builder(Some(base.location.clone()));
    for update in [
        TableUpdate::AddSchema { schema: changed },
        TableUpdate::SetCurrentSchema { schema_id: -1 },
    ] {
        builder = update.apply(builder).expect("applies");
    }
    let metadata = builder.build().expect("metadata").metadata;
    let location: iceberg::MetadataLocation = base.location.parse().expect("a location");
    let location = location.with_next_version();
    metadata
        .write_to(place.catalog.io(), &location)
        .await
        .expect("written");
    assert!(
        place
            .catalog
            .swap(&base, &location.to_string(), None)
            .await
            .expect("an answer")
    );

    let context = context(&place).await;
    let text = query(&context, "SELECT id, number, text FROM t WHERE number >= 2").await;
    assert!(text.contains("| row 2 | 2      |      |"), "{text}");
    let text = query(&context, "SELECT count(*) AS n FROM t WHERE id = 'row 1'").await;
    assert!(text.contains("| 1 |"), "{text}");
}

#[tokio::test]
async fn row_level_deletes_of_others_are_refused() {
    let place = place().await;
    let table = table(&place.catalog).await;
    commit(&place, &table, 0, &[1, 2]).await;
    let base = place.catalog.load_table(&name()).await.expect("the table");
    let deletes = DataFileBuilder::default()
        .content(DataContentType::PositionDeletes)
        .file_path(format!("{}/data/deletes.parquet", base.metadata.location()))
        .file_format(DataFileFormat::Parquet)
        .partition(Struct::empty())
        .record_count(1)
        .file_size_in_bytes(100)
        .build()
        .expect("a file");
    // `append` writes data manifests only, so this one is made by hand.
    let staged = snapshot::tests::append_deletes(&place.catalog, &base, deletes).await;
    assert!(
        place
            .catalog
            .swap(&base, &staged, None)
            .await
            .expect("an answer")
    );
    let table = LakeTable::open(Arc::clone(&place.catalog), &name())
        .await
        .expect("opens");
    let e = table.row_count().await.expect_err("refused");
    assert_eq!(e.kind, millrace_dataflow::error::ErrorKind::Unsupported);
    assert!(e.message.contains("position deletes"), "{}", e.message);
}

#[tokio::test]
async fn a_table_shows_plain_columns() {
    let place = place().await;
    table(&place.catalog).await;
    let table = LakeTable::open(Arc::clone(&place.catalog), &name())
        .await
        .expect("the table");
    assert_eq!(
        datafusion::catalog::TableProvider::schema(table.as_ref()),
        columns()
    );
}
