//! The driver against a real catalog. Faults are failpoints, which a process reads from its
//! environment; a test that needs one runs itself again in a process of its own.

use std::collections::HashMap;
use std::sync::Arc;

use iceberg::spec::TableMetadata;
use millrace_dataflow::error::ErrorKind;

use crate::commit::{Progress, TableCommitter, token};
use crate::testing::{Place, data_file, live_paths, name, place, table};
use crate::{TableVersion, snapshot, storage};

fn committer(place: &Place, table: &TableVersion, incarnation: u64) -> TableCommitter {
    TableCommitter::new(Arc::clone(&place.catalog), table, "7", incarnation)
}

async fn metadata(place: &Place) -> Arc<TableMetadata> {
    place
        .catalog
        .load_table(&name())
        .await
        .expect("the table")
        .metadata
}

/// Runs the named test in another process with failpoints armed. True in the outer process.
fn rerun_with(test: &str, failpoints: &str) -> bool {
    if std::env::var("MILLRACE_TEST_INNER").is_ok() {
        return false;
    }
    let test = format!("commit::driver::tests::{test}");
    let output = std::process::Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", &test, "--nocapture"])
        .env("MILLRACE_TEST_INNER", "1")
        .env("MILLRACE_FAILPOINTS", failpoints)
        .output()
        .expect("a process");
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
    true
}

#[tokio::test]
async fn epochs_follow_each_other_and_the_token_goes_with_them() {
    let place = place().await;
    let table = table(&place.catalog).await;
    let mut sink = committer(&place, &table, 1);
    assert_eq!(sink.frontier().await.expect("a frontier"), None);
    sink.commit(0, 10, &[data_file(&table, "a", &[1, 2])])
        .await
        .expect("committed");
    sink.skip(10, 20).expect("nothing in it");
    let files = [data_file(&table, "b", &[3]), data_file(&table, "c", &[4])];
    sink.commit(20, 30, &files).await.expect("committed");

    let metadata = metadata(&place).await;
    let snapshot = metadata.current_snapshot().expect("a snapshot");
    let summary = &snapshot.summary().additional_properties;
    for (key, value) in [
        ("millrace.sink-id", "7"),
        // The empty ticks are covered: tokens follow each other.
        ("millrace.lower", "10"),
        ("millrace.frontier", "30"),
        ("millrace.incarnation", "1"),
        ("added-records", "2"),
        ("total-records", "4"),
        ("total-data-files", "3"),
    ] {
        assert_eq!(summary.get(key).map(String::as_str), Some(value), "{key}");
    }
    assert_eq!(metadata.properties()["millrace.sinks.7.frontier"], "30");
    assert_eq!(live_paths(&place.catalog).await.len(), 3);

    let mut again = committer(&place, &table, 2);
    assert_eq!(again.frontier().await.expect("a frontier"), Some(30));
    let other = TableCommitter::new(Arc::clone(&place.catalog), &table, "8", 1)
        .frontier()
        .await;
    assert_eq!(other.expect("another sink has its own progress"), None);
}

#[tokio::test]
async fn repeating_a_commit_changes_nothing() {
    let place = place().await;
    let table = table(&place.catalog).await;
    let file = data_file(&table, "a", &[1]);
    let mut sink = committer(&place, &table, 1);
    sink.commit(0, 10, std::slice::from_ref(&file))
        .await
        .expect("committed");
    sink.commit(0, 10, std::slice::from_ref(&file))
        .await
        .expect("already there");
    let mut restarted = committer(&place, &table, 2);
    restarted
        .commit(0, 10, &[file])
        .await
        .expect("already there");
    assert_eq!(live_paths(&place.catalog).await.len(), 1);
    let e = restarted.commit(15, 20, &[]).await.expect_err("a gap");
    assert_eq!(e.kind, ErrorKind::Internal);
}

#[tokio::test]
async fn a_zombie_is_shut_out() {
    let place = place().await;
    let table = table(&place.catalog).await;
    let mut old = committer(&place, &table, 1);
    old.frontier().await.expect("begins");
    old.commit(0, 10, &[data_file(&table, "a", &[1])])
        .await
        .expect("committed");
    // The old one has looked at the table and prepared its commit when the new one begins.
    let looked_at = place.catalog.load_table(&name()).await.expect("the table");
    let mut new = committer(&place, &table, 2);
    assert_eq!(new.frontier().await.expect("begins"), Some(10));
    let staged = snapshot::append(
        &place.catalog,
        &looked_at,
        &[data_file(&table, "late", &[9])],
        HashMap::new(),
        HashMap::new(),
    )
    .await
    .expect("written");
    let writer = crate::catalog::sql::Writer {
        sink: "7",
        incarnation: 1,
    };
    let moved = place
        .catalog
        .swap(&looked_at, &staged.location, Some(writer))
        .await;
    assert!(
        !moved.expect("an answer"),
        "the fence is part of the compare-and-set"
    );

    let e = old
        .commit(10, 20, &[data_file(&table, "b", &[2])])
        .await
        .expect_err("fenced");
    assert_eq!(e.kind, ErrorKind::Conflict);
    assert!(e.message.contains("incarnation 2"), "{}", e.message);
    let e = committer(&place, &table, 1)
        .frontier()
        .await
        .expect_err("fenced");
    assert_eq!(e.kind, ErrorKind::Conflict);
    new.commit(10, 20, &[data_file(&table, "b2", &[2])])
        .await
        .expect("committed");
    assert_eq!(live_paths(&place.catalog).await.len(), 2);
}

#[tokio::test]
async fn a_stranger_in_between_is_a_conflict_that_passes() {
    let place = place().await;
    let table = table(&place.catalog).await;
    let mut sink = committer(&place, &table, 1);
    sink.commit(0, 10, &[data_file(&table, "a", &[1])])
        .await
        .expect("committed");
    let base = place.catalog.load_table(&name()).await.expect("the table");
    let stranger = snapshot::append(
        &place.catalog,
        &base,
        &[data_file(&table, "stranger", &[100])],
        HashMap::new(),
        HashMap::new(),
    )
    .await
    .expect("written");
    assert!(
        place
            .catalog
            .swap(&base, &stranger.location, None)
            .await
            .expect("an answer")
    );
    assert!(
        !place
            .catalog
            .swap(&base, &stranger.location, None)
            .await
            .expect("an answer")
    );
    // Its head carries no token; the walk passes over it.
    assert_eq!(
        committer(&place, &table, 1)
            .frontier()
            .await
            .expect("a frontier"),
        Some(10)
    );
    sink.commit(10, 20, &[data_file(&table, "b", &[2])])
        .await
        .expect("committed");
    assert_eq!(live_paths(&place.catalog).await.len(), 3);
}

/// Rewrites the table's metadata as a stranger would.
async fn rewrite(
    place: &Place,
    change: impl FnOnce(iceberg::spec::TableMetadataBuilder) -> iceberg::spec::TableMetadataBuilder,
) {
    let base = place.catalog.load_table(&name()).await.expect("the table");
    let builder = base
        .metadata
        .as_ref()
        .clone()
        .into_builder(Some(base.location.clone()));
    let metadata = change(builder).build().expect("metadata").metadata;
    let location: iceberg::MetadataLocation = base.location.parse().expect("a location");
    let location = location.with_next_version();
    metadata
        .write_to(place.catalog.io(), &location)
        .await
        .expect("written");
    let moved = place.catalog.swap(&base, &location.to_string(), None).await;
    assert!(moved.expect("an answer"));
}

#[tokio::test]
async fn the_token_outlives_its_snapshot_but_not_a_set_back() {
    let place = place().await;
    let table = table(&place.catalog).await;
    let mut sink = committer(&place, &table, 1);
    sink.commit(0, 10, &[data_file(&table, "a", &[1])])
        .await
        .expect("committed");
    sink.commit(10, 20, &[data_file(&table, "b", &[2])])
        .await
        .expect("committed");
    let before = metadata(&place).await;
    let head = before.current_snapshot().expect("a head");
    let (id, parent) = (
        head.snapshot_id(),
        head.parent_snapshot_id().expect("a parent"),
    );

    rewrite(&place, |builder| {
        let main = iceberg::spec::SnapshotReference::new(
            parent,
            iceberg::spec::SnapshotRetention::branch(None, None, None),
        );
        builder.set_ref("main", main).expect("a ref")
    })
    .await;
    let e = sink
        .commit(20, 30, &[data_file(&table, "c", &[3])])
        .await
        .expect_err("set back");
    assert_eq!(e.kind, ErrorKind::Conflict);
    assert!(e.message.contains("set back"), "{}", e.message);
    let current = metadata(&place).await;
    let seen = token::read(&current, "7").expect("a token").0;
    assert_eq!(
        seen,
        Progress::SetBack {
            known: 20,
            found: Some(10)
        }
    );

    // Put right again, with the older snapshot expired and the newer one's token out of reach.
    rewrite(&place, |builder| {
        let main = iceberg::spec::SnapshotReference::new(
            id,
            iceberg::spec::SnapshotRetention::branch(None, None, None),
        );
        builder.set_ref("main", main).expect("a ref")
    })
    .await;
    let base = place.catalog.load_table(&name()).await.expect("the table");
    let stranger = snapshot::append(&place.catalog, &base, &[], HashMap::new(), HashMap::new())
        .await
        .expect("written");
    assert!(
        place
            .catalog
            .swap(&base, &stranger.location, None)
            .await
            .expect("an answer")
    );
    rewrite(&place, |builder| builder.remove_snapshots(&[id, parent])).await;
    assert_eq!(
        committer(&place, &table, 2)
            .frontier()
            .await
            .expect("a frontier"),
        Some(20)
    );
}

#[tokio::test]
async fn a_table_created_anew_is_not_the_same_table() {
    let place = place().await;
    let old = table(&place.catalog).await;
    let mut sink = committer(&place, &old, 1);
    sink.commit(0, 10, &[]).await.expect("an empty snapshot");
    assert!(
        place
            .catalog
            .drop_table(&name(), false)
            .await
            .expect("dropped")
    );
    let e = sink.commit(10, 20, &[]).await.expect_err("no table");
    assert_eq!(e.kind, ErrorKind::NotFound);
    table(&place.catalog).await;
    let e = sink.commit(10, 20, &[]).await.expect_err("another table");
    assert_eq!(e.kind, ErrorKind::Conflict);
}

#[tokio::test]
async fn a_lost_answer_is_found_in_the_table() {
    if rerun_with(
        "a_lost_answer_is_found_in_the_table",
        "sink.commit.after_send_before_answer=error;sink.commit.after_answer=error:2",
    ) {
        return;
    }
    let place = place().await;
    let table = table(&place.catalog).await;
    let mut sink = committer(&place, &table, 1);
    sink.commit(0, 10, &[data_file(&table, "a", &[1])])
        .await
        .expect("landed");
    assert_eq!(metadata(&place).await.snapshots().len(), 1);
    sink.commit(10, 20, &[data_file(&table, "b", &[2])])
        .await
        .expect("committed");
    sink.commit(20, 30, &[data_file(&table, "c", &[3])])
        .await
        .expect("landed");
    assert_eq!(metadata(&place).await.snapshots().len(), 3);
    assert_eq!(live_paths(&place.catalog).await.len(), 3);
}

#[tokio::test]
async fn what_was_not_sent_is_sent_again() {
    if rerun_with(
        "what_was_not_sent_is_sent_again",
        "sink.manifest.after_write=error;sink.commit.before_send=error:2",
    ) {
        return;
    }
    let place = place().await;
    let table = table(&place.catalog).await;
    let mut sink = committer(&place, &table, 1);
    sink.commit(0, 10, &[data_file(&table, "a", &[1])])
        .await
        .expect("at the second try");
    sink.commit(10, 20, &[data_file(&table, "b", &[2])])
        .await
        .expect("at the second try");
    assert_eq!(metadata(&place).await.snapshots().len(), 2);
    assert_eq!(live_paths(&place.catalog).await.len(), 2);
}

#[tokio::test]
async fn many_commits_keep_the_list_of_manifests_short() {
    let place = place().await;
    let table = table(&place.catalog).await;
    let mut sink = committer(&place, &table, 1);
    for n in 0..105_u64 {
        let file = data_file(&table, &format!("f{n}"), &[n as i64]);
        sink.commit(n, n + 1, &[file]).await.expect("committed");
    }
    let metadata = metadata(&place).await;
    let snapshot = metadata.current_snapshot().expect("a snapshot");
    let list = place
        .catalog
        .manifest_list(&metadata, snapshot)
        .await
        .expect("a list");
    assert!(
        list.entries().len() < 10,
        "{} manifests",
        list.entries().len()
    );
    let mut paths = live_paths(&place.catalog).await;
    paths.sort();
    paths.dedup();
    assert_eq!(paths.len(), 105, "each file once");
    let directory = storage::local_path(metadata.location())
        .expect("local")
        .join("metadata");
    let names = std::fs::read_dir(directory)
        .expect("a directory")
        .map(|f| f.expect("an entry"));
    let versions = names.filter(|f| f.file_name().to_string_lossy().ends_with(".metadata.json"));
    assert_eq!(versions.count(), 51, "the current one and those it lists");
    for path in paths {
        assert!(storage::local_path(&path).expect("local").exists());
    }
}
