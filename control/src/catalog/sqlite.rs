//! The catalog in SQLite, `<data-dir>/metadata.db`; Iceberg's catalog tables live beside ours in the
//! same file and belong to the crate `lake`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use millrace_dataflow::env;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::plan::RelationId;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
};
use sqlx::{Connection, Row, SqlitePool};

use super::{Kind, Object, migrations};
use crate::error::{duplicate_relation, fenced};

/// One server's hold on the metadata. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SqliteCatalog {
    pool: SqlitePool,
    incarnation: u64,
}

/// Anything SQLite reports that is not an answer: the disk, the lock, damage.
pub(super) fn failed(e: sqlx::Error) -> Error {
    if let sqlx::Error::Database(inner) = &e {
        // Primary result codes: 11 corrupt, 26 not a database, 13 full, 8 read-only.
        let code = inner
            .code()
            .and_then(|c| c.parse::<i64>().ok())
            .unwrap_or_default()
            & 0xff;
        let message = inner.message().to_string();
        return match code {
            11 | 26 => Error::new(
                ErrorKind::Corrupt,
                format!("metadata.db is damaged: {message}"),
            )
            .hint("restore the data directory from a copy"),
            13 => Error::unavailable("metadata.db cannot grow: the disk is full")
                .code("53100")
                .hint("free space on the disk of the data directory"),
            5 | 6 => Error::unavailable("metadata.db is in use by another process"),
            8 | 14 => Error::invalid(format!(
                "metadata.db cannot be opened for writing: {message}"
            ))
            .hint("check the permissions of the data directory"),
            _ => Error::unavailable(format!("metadata.db: {message}")),
        };
    }
    Error::unavailable(format!("metadata.db: {e}"))
}

impl SqliteCatalog {
    /// Opens or creates the metadata and takes the next incarnation, which fences older servers.
    pub async fn open(data_dir: &Path, holder: &str) -> Result<Self> {
        let path: PathBuf = data_dir.join("metadata.db");
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(Duration::from_secs(10));
        let pool = SqlitePoolOptions::new()
            .max_connections(4)
            // A COMMIT that fails, as on a full disk, may end the transaction in SQLite and not in the
            // connection, which then begins no other one: it is closed.
            .before_acquire(|connection, _| {
                let usable = !connection.is_in_transaction();
                Box::pin(async move { Ok(usable) })
            })
            .connect_with(options)
            .await
            .map_err(|e| failed(e).detail(format!("while opening {}", path.display())))?;
        migrations::migrate(&pool).await?;
        let incarnation = take_incarnation(&pool, holder).await?;
        Ok(Self { pool, incarnation })
    }

    pub(super) fn pool(&self) -> &SqlitePool {
        &self.pool
    }

    /// The number this server took; it goes into manifests, the remap log and commits.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Whether this server is still the newest.
    pub async fn is_newest(&self) -> Result<bool> {
        let newest: i64 = sqlx::query_scalar("SELECT incarnation FROM millrace_incarnation")
            .fetch_one(&self.pool)
            .await
            .map_err(failed)?;
        Ok(newest == self.incarnation as i64)
    }

    /// A transaction in which this server is, and until its end stays, the newest.
    pub(super) async fn begin(&self) -> Result<sqlx::Transaction<'static, sqlx::Sqlite>> {
        let mut tx = self
            .pool
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(failed)?;
        let newest: i64 = sqlx::query_scalar("SELECT incarnation FROM millrace_incarnation")
            .fetch_one(&mut *tx)
            .await
            .map_err(failed)?;
        if newest != self.incarnation as i64 {
            return Err(fenced());
        }
        Ok(tx)
    }

    /// Takes `count` consecutive fresh ids and returns the first. They are spent even if nothing is
    /// created with them.
    pub async fn take_ids(&self, count: u64) -> Result<RelationId> {
        let mut tx = self.begin().await?;
        let next: i64 =
            sqlx::query_scalar("UPDATE millrace_ids SET next = next + ? RETURNING next")
                .bind(count as i64)
                .fetch_one(&mut *tx)
                .await
                .map_err(failed)?;
        tx.commit().await.map_err(failed)?;
        Ok(RelationId(next as u64 - count))
    }

    /// All objects in order of creation, so that each stands behind what it reads.
    pub async fn objects(&self) -> Result<Vec<Object>> {
        let rows = sqlx::query("SELECT * FROM millrace_objects ORDER BY id")
            .fetch_all(&self.pool)
            .await
            .map_err(failed)?;
        rows.iter().map(object).collect()
    }

    /// What a statement has set, as text.
    pub async fn setting(&self, name: &str) -> Result<Option<String>> {
        sqlx::query_scalar("SELECT value FROM millrace_settings WHERE name = ?")
            .bind(name)
            .fetch_optional(&self.pool)
            .await
            .map_err(failed)
    }

    /// Keeps a setting for later starts.
    pub async fn set_setting(&self, name: &str, value: &str) -> Result<()> {
        let mut tx = self.begin().await?;
        sqlx::query(
            "INSERT INTO millrace_settings (name, value) VALUES (?, ?) \
             ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        )
        .bind(name)
        .bind(value)
        .execute(&mut *tx)
        .await
        .map_err(failed)?;
        tx.commit().await.map_err(failed)
    }

    /// Stores a created object; its name must be free.
    pub async fn insert(&self, object: &Object) -> Result<()> {
        let id = |id: Option<RelationId>| id.map(|id| id.0 as i64);
        let mut tx = self.begin().await?;
        sqlx::query(
            "INSERT INTO millrace_objects \
             (id, kind, name, text, rejected, errors, late, companion, depends_on, \
             fingerprint, created_ms, dataflow, seen) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(object.id.0 as i64)
        .bind(object.kind.as_str())
        .bind(object.name.as_str())
        .bind(object.text.as_str())
        .bind(id(object.rejected))
        .bind(id(object.errors))
        .bind(id(object.late))
        .bind(id(object.companion))
        .bind(serde_json::to_string(&object.depends_on).expect("names serialize"))
        .bind(object.fingerprint.as_str())
        .bind(object.created_ms as i64)
        .bind(object.dataflow.0 as i64)
        .bind(serde_json::to_string(&object.seen).expect("numbers serialize"))
        .execute(&mut *tx)
        .await
        .map_err(|e| match &e {
            sqlx::Error::Database(inner) if inner.is_unique_violation() => {
                duplicate_relation(&object.name)
            }
            _ => failed(e),
        })?;
        tx.commit().await.map_err(failed)
    }

    /// Stores another text of an object.
    pub async fn set_text(&self, id: RelationId, text: &str) -> Result<()> {
        let mut tx = self.begin().await?;
        sqlx::query("UPDATE millrace_objects SET text = ? WHERE id = ?")
            .bind(text)
            .bind(id.0 as i64)
            .execute(&mut *tx)
            .await
            .map_err(failed)?;
        tx.commit().await.map_err(failed)
    }

    /// Removes objects, all or none.
    pub async fn remove(&self, ids: &[RelationId]) -> Result<()> {
        let mut tx = self.begin().await?;
        for id in ids {
            sqlx::query("DELETE FROM millrace_objects WHERE id = ?")
                .bind(id.0 as i64)
                .execute(&mut *tx)
                .await
                .map_err(failed)?;
            sqlx::query("DELETE FROM millrace_replacements WHERE object = ?")
                .bind(id.0 as i64)
                .execute(&mut *tx)
                .await
                .map_err(failed)?;
        }
        tx.commit().await.map_err(failed)
    }

    /// The checkpoint a restart begins at.
    pub async fn latest_checkpoint(&self) -> Result<Option<u64>> {
        let id: Option<i64> = sqlx::query_scalar("SELECT checkpoint FROM millrace_checkpoint")
            .fetch_one(&self.pool)
            .await
            .map_err(failed)?;
        Ok(id.map(|id| id as u64))
    }

    /// Moves the pointer if it is `expected` and `incarnation` is still the newest.
    pub async fn move_latest_checkpoint(
        &self,
        incarnation: u64,
        expected: Option<u64>,
        id: u64,
    ) -> Result<bool> {
        // One statement, so one transaction: nobody can take over between the look and the move.
        let moved = sqlx::query(
            "UPDATE millrace_checkpoint SET checkpoint = ? WHERE checkpoint IS ? \
             AND (SELECT incarnation FROM millrace_incarnation) = ?",
        )
        .bind(id as i64)
        .bind(expected.map(|id| id as i64))
        .bind(incarnation as i64)
        .execute(&self.pool)
        .await
        .map_err(failed)?;
        Ok(moved.rows_affected() == 1)
    }

    /// Waits until everything is on disk and lets go of the file.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

/// The next number, by compare-and-set: two servers starting at once get different ones.
async fn take_incarnation(pool: &SqlitePool, holder: &str) -> Result<u64> {
    loop {
        let seen: i64 = sqlx::query_scalar("SELECT incarnation FROM millrace_incarnation")
            .fetch_one(pool)
            .await
            .map_err(failed)?;
        let moved = sqlx::query(
            "UPDATE millrace_incarnation SET incarnation = ?, holder = ?, started_ms = ? \
             WHERE incarnation = ?",
        )
        .bind(seen + 1)
        .bind(holder)
        .bind(env::now_ms() as i64)
        .bind(seen)
        .execute(pool)
        .await
        .map_err(failed)?;
        if moved.rows_affected() == 1 {
            return Ok(seen as u64 + 1);
        }
    }
}

pub(super) fn object(row: &SqliteRow) -> Result<Object> {
    let id = |name: &str| -> Result<Option<RelationId>> {
        let value: Option<i64> = row.try_get(name).map_err(failed)?;
        Ok(value.map(|id| RelationId(id as u64)))
    };
    let text = |name: &str| -> Result<String> { row.try_get(name).map_err(failed) };
    let damaged = |e: serde_json::Error| {
        Error::new(ErrorKind::Corrupt, "metadata.db holds a damaged object").detail(e.to_string())
    };
    let own = id("id")?.unwrap_or(RelationId(0));
    Ok(Object {
        id: own,
        dataflow: id("dataflow")?.unwrap_or(own),
        seen: serde_json::from_str(&text("seen")?).map_err(damaged)?,
        kind: Kind::parse(&text("kind")?)?,
        name: text("name")?,
        text: text("text")?,
        rejected: id("rejected")?,
        errors: id("errors")?,
        late: id("late")?,
        companion: id("companion")?,
        depends_on: serde_json::from_str(&text("depends_on")?).map_err(damaged)?,
        fingerprint: text("fingerprint")?,
        created_ms: row.try_get::<i64, _>("created_ms").map_err(failed)? as u64,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::catalog::{Replacement, Seen};

    fn view(id: RelationId, name: &str) -> Object {
        Object {
            id,
            kind: Kind::MaterializedView,
            name: name.to_string(),
            text: format!("CREATE MATERIALIZED VIEW {name} AS SELECT 1"),
            rejected: None,
            errors: Some(RelationId(id.0 + 1)),
            late: Some(RelationId(id.0 + 2)),
            companion: None,
            depends_on: vec!["bids".to_string()],
            fingerprint: "f".to_string(),
            created_ms: 7,
            dataflow: id,
            seen: BTreeMap::new(),
        }
    }

    #[tokio::test]
    async fn objects_and_ids_survive_a_reopening() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let first = SqliteCatalog::open(dir.path(), "a").await.expect("opens");
        let id = first.take_ids(3).await.expect("ids");
        let object = view(id, "v");
        first.insert(&object).await.expect("inserted");
        let clash = first
            .insert(&view(RelationId(99), "v"))
            .await
            .expect_err("name taken");
        assert_eq!(clash.code, "42P07");
        first.close().await;

        let second = SqliteCatalog::open(dir.path(), "b")
            .await
            .expect("opens again");
        assert_eq!(second.incarnation(), first.incarnation() + 1);
        assert_eq!(second.objects().await.expect("read"), vec![object]);
        assert_eq!(second.take_ids(1).await.expect("ids"), RelationId(id.0 + 3));
        second.remove(&[id]).await.expect("removed");
        assert!(second.objects().await.expect("read").is_empty());
        assert_eq!(
            second.take_ids(1).await.expect("ids"),
            RelationId(id.0 + 4),
            "never reused"
        );
    }

    #[tokio::test]
    async fn a_transaction_that_sqlite_has_ended_costs_its_connection_only() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let catalog = SqliteCatalog::open(dir.path(), "a").await.expect("opens");
        // More often than there are connections.
        for _ in 0..6 {
            let mut tx = catalog.begin().await.expect("begins");
            // What a full disk does at a COMMIT.
            sqlx::query("ROLLBACK")
                .execute(&mut *tx)
                .await
                .expect("ended");
            tx.commit().await.expect_err("no transaction is active");
            catalog.take_ids(1).await.expect("another connection");
        }
    }

    #[tokio::test]
    async fn a_replacement_counts_once_it_is_adopted() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let catalog = SqliteCatalog::open(dir.path(), "a").await.expect("opens");
        let seen = |columns| Seen {
            columns,
            append_only: false,
            event_time: vec![None],
        };
        let (v, mut reader) = (view(RelationId(1), "v"), view(RelationId(5), "reader"));
        reader.depends_on = vec!["spelled".to_string()];
        let mut spelled = view(RelationId(8), "spelled");
        (spelled.kind, spelled.depends_on) = (Kind::View, vec!["v".to_string()]);
        for object in [&v, &reader, &spelled] {
            catalog.insert(object).await.expect("inserted");
        }
        let new = |dataflow, columns| Replacement {
            object: v.id,
            dataflow: RelationId(dataflow),
            text: format!("new {dataflow}"),
            depends_on: vec!["other".to_string()],
            fingerprint: "g".to_string(),
            before: seen(columns),
        };
        catalog.insert_replacement(&new(9, 1)).await.expect("noted");
        let before = vec![v.clone(), reader.clone(), spelled.clone()];
        assert_eq!(catalog.objects().await.expect("read"), before);
        let noted = catalog.replacements().await.expect("read");
        assert_eq!(noted, [new(9, 1)]);
        catalog.forget_replacement(v.id).await.expect("forgotten");
        assert!(catalog.replacements().await.expect("read").is_empty());

        for (dataflow, columns) in [(10, 1), (11, 2)] {
            let new = new(dataflow, columns);
            catalog.insert_replacement(&new).await.expect("noted");
            catalog.adopt_replacement(&new).await.expect("adopted");
        }
        let objects = catalog.objects().await.expect("read");
        assert_eq!(
            (objects[0].dataflow, objects[0].text.as_str()),
            (RelationId(11), "new 11")
        );
        assert_eq!(objects[0].depends_on, ["other"]);
        // The reader was made for what was there first.
        for reader in &objects[1..] {
            assert_eq!(reader.seen, BTreeMap::from([("v".to_string(), seen(1))]));
        }
        assert!(catalog.replacements().await.expect("read").is_empty());
    }

    #[tokio::test]
    async fn an_older_server_is_fenced_from_every_write() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let old = SqliteCatalog::open(dir.path(), "old").await.expect("opens");
        assert!(old.is_newest().await.expect("asked"));
        let new = SqliteCatalog::open(dir.path(), "new").await.expect("opens");
        assert!(!old.is_newest().await.expect("asked"));
        assert_eq!(old.take_ids(1).await.expect_err("fenced").code, "57P01");
        assert_eq!(
            old.insert(&view(RelationId(1), "v"))
                .await
                .expect_err("fenced")
                .code,
            "57P01"
        );
        assert_eq!(
            old.remove(&[RelationId(1)]).await.expect_err("fenced").code,
            "57P01"
        );
        assert!(
            !old.move_latest_checkpoint(old.incarnation(), None, 1)
                .await
                .expect("asked")
        );
        assert!(
            new.move_latest_checkpoint(new.incarnation(), None, 1)
                .await
                .expect("asked")
        );
    }

    #[tokio::test]
    async fn the_checkpoint_moves_only_from_what_was_expected() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let catalog = SqliteCatalog::open(dir.path(), "a").await.expect("opens");
        let me = catalog.incarnation();
        assert_eq!(catalog.latest_checkpoint().await.expect("read"), None);
        assert!(
            !catalog
                .move_latest_checkpoint(me, Some(3), 4)
                .await
                .expect("asked")
        );
        assert!(
            catalog
                .move_latest_checkpoint(me, None, 4)
                .await
                .expect("asked")
        );
        assert!(
            !catalog
                .move_latest_checkpoint(me, None, 5)
                .await
                .expect("asked")
        );
        assert!(
            catalog
                .move_latest_checkpoint(me, Some(4), 5)
                .await
                .expect("asked")
        );
        assert_eq!(catalog.latest_checkpoint().await.expect("read"), Some(5));
    }

    #[tokio::test]
    async fn a_newer_or_broken_database_is_refused_unread() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let catalog = SqliteCatalog::open(dir.path(), "a").await.expect("opens");
        sqlx::query("INSERT INTO millrace_migrations VALUES (99, 0)")
            .execute(&catalog.pool)
            .await
            .expect("written");
        catalog.close().await;
        let newer = SqliteCatalog::open(dir.path(), "b")
            .await
            .expect_err("refused");
        assert_eq!(newer.kind, ErrorKind::Corrupt);

        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::write(dir.path().join("metadata.db"), vec![b'x'; 8192]).expect("written");
        let broken = SqliteCatalog::open(dir.path(), "a")
            .await
            .expect_err("refused");
        assert_eq!(broken.kind, ErrorKind::Corrupt);
    }
}
