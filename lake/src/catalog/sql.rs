//! The catalog in SQLite, in the layout of the JDBC catalog that PyIceberg and Java read too.
//!
//! `iceberg_tables` holds one row per table and `iceberg_namespace_properties` names the namespaces,
//! exactly as others create them, so whoever comes first makes the tables. `millrace_lake_fences` is
//! ours: the newest incarnation of each sink that writes to a table. A commit of an older one is
//! refused by the very statement that would move the pointer.
//!
//! # Contract
//!
//! * [`SqlCatalog::swap`] moves a pointer only from the location given. `Ok(false)` means that it
//!   certainly did not move; an error means that nobody knows.
//! * Every call is one statement, so a write waits for others (busy timeout) and never deadlocks.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arrow::datatypes::Schema as ArrowSchema;
use iceberg::io::FileIO;
use iceberg::spec::{
    FormatVersion, Manifest, ManifestFile, ManifestList, Snapshot, TableMetadata,
    TableMetadataBuilder,
};
use iceberg::{MetadataLocation, TableCreation};
use millrace_dataflow::env;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Row, SqlitePool};

use super::{TableName, TableVersion};
use crate::{error, schema, snapshot, storage};

/// The name under which other readers open the catalog.
pub const CATALOG_NAME: &str = "lake";

const TABLES: &str = "CREATE TABLE IF NOT EXISTS iceberg_tables (\
    catalog_name VARCHAR(255) NOT NULL, table_namespace VARCHAR(255) NOT NULL, \
    table_name VARCHAR(255) NOT NULL, metadata_location VARCHAR(1000), \
    previous_metadata_location VARCHAR(1000), iceberg_type VARCHAR(5), \
    PRIMARY KEY (catalog_name, table_namespace, table_name))";
const NAMESPACES: &str = "CREATE TABLE IF NOT EXISTS iceberg_namespace_properties (\
    catalog_name VARCHAR(255) NOT NULL, namespace VARCHAR(255) NOT NULL, \
    property_key VARCHAR(255) NOT NULL, property_value VARCHAR(1000) NOT NULL, \
    PRIMARY KEY (catalog_name, namespace, property_key))";
const FENCES: &str = "CREATE TABLE IF NOT EXISTS millrace_lake_fences (\
    table_uuid TEXT NOT NULL, sink_id TEXT NOT NULL, incarnation INTEGER NOT NULL, \
    PRIMARY KEY (table_uuid, sink_id))";

/// Rows of `iceberg_tables` that are tables, not views.
const IS_TABLE: &str = "(iceberg_type = 'TABLE' OR iceberg_type IS NULL)";

/// Manifests and metadata files kept in memory; both are immutable, so neither is ever stale.
const MANIFESTS_KEPT: usize = 1024;
const METADATA_KEPT: usize = 64;

/// A stream commits often, and every commit writes a metadata file: the older ones are deleted.
const DEFAULT_PROPERTIES: [(&str, &str); 2] = [
    (snapshot::DELETE_OLD_METADATA, "true"),
    ("write.metadata.previous-versions-max", "50"),
];

/// Who commits; an older incarnation than the newest known is refused.
#[derive(Debug, Clone, Copy)]
pub struct Writer<'a> {
    pub sink: &'a str,
    pub incarnation: u64,
}

/// Our catalog. Cheap to share.
pub struct SqlCatalog {
    pool: SqlitePool,
    warehouse: PathBuf,
    io: FileIO,
    metadata: Mutex<Recent<String, Arc<TableMetadata>>>,
    manifests: Mutex<Recent<String, Arc<Manifest>>>,
}

impl std::fmt::Debug for SqlCatalog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SqlCatalog")
            .field("warehouse", &self.warehouse)
            .finish_non_exhaustive()
    }
}

/// Opens the metadata database as commits need it: write-ahead log, and each commit on disk before it
/// is answered (a commit that a power cut takes back would be lost data).
pub async fn open_pool(path: &Path) -> Result<SqlitePool> {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(Duration::from_secs(10));
    SqlitePoolOptions::new()
        .max_connections(4)
        .connect_with(options)
        .await
        .map_err(|e| error::database(&format!("open \"{}\"", path.display()), e))
}

impl SqlCatalog {
    /// Opens the catalog in a database, with new tables below `warehouse` (an absolute path).
    pub async fn open(pool: SqlitePool, warehouse: impl Into<PathBuf>) -> Result<Arc<Self>> {
        let warehouse = warehouse.into();
        storage::location_of(&warehouse)?;
        storage::create_directory(warehouse.clone(), warehouse.clone()).await?;
        for statement in [TABLES, NAMESPACES, FENCES] {
            sqlx::query(statement)
                .execute(&pool)
                .await
                .map_err(|e| error::database("create the catalog's tables", e))?;
        }
        // A catalog of the layout's first version lacks the type column.
        let typed = sqlx::query(
            "SELECT 1 FROM pragma_table_info('iceberg_tables') WHERE name = 'iceberg_type'",
        )
        .fetch_optional(&pool)
        .await
        .map_err(|e| error::database("read the catalog's layout", e))?;
        if typed.is_none() {
            sqlx::query("ALTER TABLE iceberg_tables ADD COLUMN iceberg_type VARCHAR(5)")
                .execute(&pool)
                .await
                .map_err(|e| error::database("extend the catalog's layout", e))?;
        }
        Ok(Arc::new(Self {
            pool,
            warehouse,
            io: FileIO::new_with_fs(),
            metadata: Mutex::new(Recent::new(METADATA_KEPT)),
            manifests: Mutex::new(Recent::new(MANIFESTS_KEPT)),
        }))
    }

    pub fn io(&self) -> &FileIO {
        &self.io
    }

    /// Creates a namespace unless it exists.
    pub async fn create_namespace(&self, namespace: &str) -> Result<()> {
        TableName::new(namespace, "t")?;
        sqlx::query(
            "INSERT OR IGNORE INTO iceberg_namespace_properties \
             (catalog_name, namespace, property_key, property_value) VALUES (?, ?, 'exists', 'true')",
        )
        .bind(CATALOG_NAME)
        .bind(namespace)
        .execute(&self.pool)
        .await
        .map_err(|e| error::database(&format!("create namespace \"{namespace}\""), e))?;
        Ok(())
    }

    /// All namespaces, in order.
    pub async fn namespaces(&self) -> Result<Vec<String>> {
        let rows = sqlx::query(
            "SELECT namespace FROM iceberg_namespace_properties WHERE catalog_name = ? UNION \
             SELECT table_namespace FROM iceberg_tables WHERE catalog_name = ? ORDER BY 1",
        )
        .bind(CATALOG_NAME)
        .bind(CATALOG_NAME)
        .fetch_all(&self.pool)
        .await
        .map_err(|e| error::database("list namespaces", e))?;
        rows.iter().map(|row| text(row, 0)).collect()
    }

    /// All tables, or those of one namespace, in order.
    pub async fn tables(&self, namespace: Option<&str>) -> Result<Vec<TableName>> {
        let rows = sqlx::query(sqlx::AssertSqlSafe(format!(
            "SELECT table_namespace, table_name FROM iceberg_tables \
             WHERE catalog_name = ? AND (? IS NULL OR table_namespace = ?) AND {IS_TABLE} ORDER BY 1, 2"
        )))
        .bind(CATALOG_NAME)
        .bind(namespace)
        .bind(namespace)
        .fetch_all(&self.pool)
        .await
        .map_err(|e| error::database("list tables", e))?;
        rows.iter()
            .map(|row| {
                Ok(TableName {
                    namespace: text(row, 0)?,
                    name: text(row, 1)?,
                })
            })
            .collect()
    }

    pub async fn table_exists(&self, name: &TableName) -> Result<bool> {
        Ok(self.pointer(name).await?.is_some())
    }

    /// The current version of a table.
    pub async fn load_table(&self, name: &TableName) -> Result<TableVersion> {
        let Some(location) = self.pointer(name).await? else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("lake table \"{name}\" does not exist"),
            )
            .code("42P01"));
        };
        let cached = self
            .metadata
            .lock()
            .ok()
            .and_then(|cache| cache.get(&location));
        let metadata = match cached {
            Some(metadata) => metadata,
            None => {
                let read = TableMetadata::read_from(&self.io, &location)
                    .await
                    .map_err(|e| error::iceberg(&format!("read the metadata of \"{name}\""), e))?;
                let read = Arc::new(read);
                self.remember(&location, &read);
                read
            }
        };
        Ok(TableVersion {
            name: name.clone(),
            location,
            metadata,
        })
    }

    /// Creates an unpartitioned table (format version 2) and its namespace. All columns are optional.
    pub async fn create_table(
        &self,
        name: &TableName,
        columns: &ArrowSchema,
        mut properties: HashMap<String, String>,
    ) -> Result<TableVersion> {
        let columns = schema::to_iceberg(columns)?;
        for (key, value) in DEFAULT_PROPERTIES {
            properties
                .entry(key.to_string())
                .or_insert_with(|| value.to_string());
        }
        if self.table_exists(name).await? {
            return Err(exists(name));
        }
        self.create_namespace(&name.namespace).await?;
        let directory = self.new_directory(name);
        storage::create_directory(self.warehouse.clone(), directory.join("metadata")).await?;
        storage::create_directory(self.warehouse.clone(), directory.join("data")).await?;
        let location = storage::location_of(&directory)?;
        let metadata = TableMetadataBuilder::from_table_creation(
            TableCreation::builder()
                .name(name.name.clone())
                .location(location.clone())
                .schema(columns)
                .properties(properties)
                .format_version(FormatVersion::V2)
                .build(),
        )
        .and_then(TableMetadataBuilder::build)
        .map_err(|e| error::iceberg(&format!("describe table \"{name}\""), e))?
        .metadata;
        let file = MetadataLocation::new_with_metadata(&location, &metadata);
        metadata
            .write_to(&self.io, &file)
            .await
            .map_err(|e| error::iceberg(&format!("write the metadata of \"{name}\""), e))?;
        let file = file.to_string();
        storage::sync(std::slice::from_ref(&file)).await?;
        let inserted = sqlx::query(
            "INSERT OR IGNORE INTO iceberg_tables (catalog_name, table_namespace, table_name, \
             metadata_location, previous_metadata_location, iceberg_type) VALUES (?, ?, ?, ?, NULL, 'TABLE')",
        )
        .bind(CATALOG_NAME)
        .bind(&name.namespace)
        .bind(&name.name)
        .bind(&file)
        .execute(&self.pool)
        .await
        .map_err(|e| error::database(&format!("create table \"{name}\""), e))?;
        if inserted.rows_affected() == 0 {
            return Err(exists(name));
        }
        let metadata = Arc::new(metadata);
        self.remember(&file, &metadata);
        Ok(TableVersion {
            name: name.clone(),
            location: file,
            metadata,
        })
    }

    /// Drops the pointer of a table; with `purge` also its files. False if there was no such table.
    pub async fn drop_table(&self, name: &TableName, purge: bool) -> Result<bool> {
        let location = match self.load_table(name).await {
            Ok(version) => Some(version.metadata.location().to_string()),
            Err(e) if e.kind == ErrorKind::NotFound => return Ok(false),
            // A table whose metadata cannot be read can still be dropped.
            Err(e) if e.kind == ErrorKind::Corrupt => None,
            Err(e) => return Err(e),
        };
        let dropped = sqlx::query(
            "DELETE FROM iceberg_tables WHERE catalog_name = ? AND table_namespace = ? AND table_name = ?",
        )
        .bind(CATALOG_NAME)
        .bind(&name.namespace)
        .bind(&name.name)
        .execute(&self.pool)
        .await
        .map_err(|e| error::database(&format!("drop table \"{name}\""), e))?;
        if purge && let Some(location) = location {
            let directory = storage::local_path(&location)?;
            // Only what we put there: a table may have been registered from anywhere.
            if directory.starts_with(&self.warehouse) && directory != self.warehouse {
                storage::blocking(move || match std::fs::remove_dir_all(&directory) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
                    _ => Ok(()),
                })
                .await?;
            }
        }
        Ok(dropped.rows_affected() == 1)
    }

    /// Moves a table from one version to the next. `Ok(false)`: it was not at `from` any more, or a
    /// newer incarnation of the sink has begun; nothing was changed. An error: nobody knows.
    pub async fn swap(
        &self,
        from: &TableVersion,
        to: &str,
        writer: Option<Writer<'_>>,
    ) -> Result<bool> {
        let moved = sqlx::query(
            "UPDATE iceberg_tables SET metadata_location = ?, previous_metadata_location = ? \
             WHERE catalog_name = ? AND table_namespace = ? AND table_name = ? AND metadata_location = ? \
             AND NOT EXISTS (SELECT 1 FROM millrace_lake_fences \
                 WHERE table_uuid = ? AND sink_id = ? AND incarnation > ?)",
        )
        .bind(to)
        .bind(&from.location)
        .bind(CATALOG_NAME)
        .bind(&from.name.namespace)
        .bind(&from.name.name)
        .bind(&from.location)
        .bind(from.metadata.uuid().to_string())
        .bind(writer.map_or("", |w| w.sink))
        .bind(writer.map_or(i64::MAX, |w| w.incarnation as i64))
        .execute(&self.pool)
        .await
        .map_err(|e| error::database(&format!("commit to \"{}\"", from.name), e))?;
        Ok(moved.rows_affected() == 1)
    }

    /// Declares an incarnation of a sink: older ones cannot commit from now on. The newest one known.
    pub async fn fence(&self, table: &TableVersion, writer: Writer<'_>) -> Result<u64> {
        let row = sqlx::query(
            "INSERT INTO millrace_lake_fences (table_uuid, sink_id, incarnation) VALUES (?, ?, ?) \
             ON CONFLICT (table_uuid, sink_id) DO UPDATE \
             SET incarnation = max(incarnation, excluded.incarnation) RETURNING incarnation",
        )
        .bind(table.metadata.uuid().to_string())
        .bind(writer.sink)
        .bind(writer.incarnation as i64)
        .fetch_one(&self.pool)
        .await
        .map_err(|e| error::database(&format!("fence \"{}\"", table.name), e))?;
        incarnation(&row)
    }

    /// The newest incarnation of a sink known for a table; 0 if none.
    pub async fn newest_incarnation(&self, table: &TableVersion, sink: &str) -> Result<u64> {
        let row = sqlx::query(
            "SELECT incarnation FROM millrace_lake_fences WHERE table_uuid = ? AND sink_id = ?",
        )
        .bind(table.metadata.uuid().to_string())
        .bind(sink)
        .fetch_optional(&self.pool)
        .await
        .map_err(|e| error::database(&format!("read the fence of \"{}\"", table.name), e))?;
        row.as_ref().map_or(Ok(0), incarnation)
    }

    /// The manifests of a snapshot.
    pub async fn manifest_list(
        &self,
        table: &TableMetadata,
        snapshot: &Snapshot,
    ) -> Result<ManifestList> {
        let read = async {
            let bytes = self.io.new_input(snapshot.manifest_list())?.read().await?;
            ManifestList::parse_with_version(&bytes, table.format_version())
        };
        read.await
            .map_err(|e| error::iceberg("read a manifest list", e))
    }

    /// A manifest, from memory if it was read before.
    pub async fn manifest(&self, file: &ManifestFile) -> Result<Arc<Manifest>> {
        let cached = self
            .manifests
            .lock()
            .ok()
            .and_then(|cache| cache.get(&file.manifest_path));
        if let Some(manifest) = cached {
            return Ok(manifest);
        }
        let manifest = file
            .load_manifest(&self.io)
            .await
            .map_err(|e| error::iceberg("read a manifest", e))?;
        let manifest = Arc::new(manifest);
        if let Ok(mut cache) = self.manifests.lock() {
            cache.put(file.manifest_path.clone(), Arc::clone(&manifest));
        }
        Ok(manifest)
    }

    /// Keeps the metadata that was just written or read.
    pub(crate) fn remember(&self, location: &str, metadata: &Arc<TableMetadata>) {
        if let Ok(mut cache) = self.metadata.lock() {
            cache.put(location.to_string(), Arc::clone(metadata));
        }
    }

    async fn pointer(&self, name: &TableName) -> Result<Option<String>> {
        let row = sqlx::query(sqlx::AssertSqlSafe(format!(
            "SELECT metadata_location FROM iceberg_tables WHERE catalog_name = ? \
             AND table_namespace = ? AND table_name = ? AND metadata_location IS NOT NULL AND {IS_TABLE}"
        )))
        .bind(CATALOG_NAME)
        .bind(&name.namespace)
        .bind(&name.name)
        .fetch_optional(&self.pool)
        .await
        .map_err(|e| error::database(&format!("look up table \"{name}\""), e))?;
        row.as_ref().map(|row| text(row, 0)).transpose()
    }

    /// `<warehouse>/<namespace>/<table>`; made unique when the name does not fit a path or files of a
    /// dropped table still lie there.
    fn new_directory(&self, name: &TableName) -> PathBuf {
        let (namespace, plain_namespace) = path_part(&name.namespace);
        let (table, plain_table) = path_part(&name.name);
        let directory = self.warehouse.join(namespace).join(&table);
        if plain_namespace && plain_table && !directory.exists() {
            return directory;
        }
        directory.with_file_name(format!("{table}-{}", env::random_id().simple()))
    }
}

/// The text with what may disturb a path or a URL replaced, and whether nothing was.
fn path_part(text: &str) -> (String, bool) {
    let fits = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.');
    let part: String = text
        .chars()
        .map(|c| if fits(c) { c } else { '_' })
        .collect();
    let part = if part.starts_with('.') {
        format!("_{part}")
    } else {
        part
    };
    let same = part == text;
    (part, same)
}

fn exists(name: &TableName) -> Error {
    Error::new(
        ErrorKind::Conflict,
        format!("lake table \"{name}\" already exists"),
    )
    .code("42P07")
}

fn text(row: &sqlx::sqlite::SqliteRow, column: usize) -> Result<String> {
    row.try_get(column)
        .map_err(|e| error::database("read the catalog", e))
}

fn incarnation(row: &sqlx::sqlite::SqliteRow) -> Result<u64> {
    let value: i64 = row
        .try_get(0)
        .map_err(|e| error::database("read a fence", e))?;
    Ok(value as u64)
}

/// The values used last, up to a bound; when it is reached, those put in first go.
struct Recent<K, V> {
    bound: usize,
    values: HashMap<K, V>,
    order: VecDeque<K>,
}

impl<K: Hash + Eq + Clone, V: Clone> Recent<K, V> {
    fn new(bound: usize) -> Self {
        Self {
            bound,
            values: HashMap::new(),
            order: VecDeque::new(),
        }
    }
    fn get(&self, key: &K) -> Option<V> {
        self.values.get(key).cloned()
    }
    fn put(&mut self, key: K, value: V) {
        if self.values.insert(key.clone(), value).is_none() {
            self.order.push_back(key);
        }
        while self.order.len() > self.bound {
            if let Some(oldest) = self.order.pop_front() {
                self.values.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{columns, name, place, table};

    #[tokio::test]
    async fn tables_come_and_go() {
        let place = place().await;
        let catalog = &place.catalog;
        let created = table(catalog).await;
        assert!(catalog.table_exists(&name()).await.expect("an answer"));
        let loaded = catalog.load_table(&name()).await.expect("the table");
        assert_eq!(loaded.location, created.location);
        assert_eq!(loaded.metadata, created.metadata);
        assert_eq!(catalog.namespaces().await.expect("names"), ["ns"]);
        assert_eq!(catalog.tables(None).await.expect("names"), [name()]);
        assert_eq!(catalog.tables(Some("other")).await.expect("names"), []);

        let e = catalog
            .create_table(&name(), &columns(), HashMap::new())
            .await
            .expect_err("twice");
        assert_eq!((e.kind, e.code), (ErrorKind::Conflict, "42P07"));

        assert!(catalog.drop_table(&name(), false).await.expect("dropped"));
        assert!(!catalog.drop_table(&name(), false).await.expect("not there"));
        let e = catalog.load_table(&name()).await.expect_err("not there");
        assert_eq!((e.kind, e.code), (ErrorKind::NotFound, "42P01"));
        let kept = storage::local_path(&created.location).expect("local");
        assert!(kept.exists(), "files stay");

        let again = table(catalog).await;
        assert_ne!(
            again.metadata.location(),
            created.metadata.location(),
            "not among old files"
        );
        assert!(catalog.drop_table(&name(), true).await.expect("dropped"));
        assert!(
            !storage::local_path(&again.location)
                .expect("local")
                .exists(),
            "purged"
        );
        assert!(kept.exists(), "but nothing else");
    }

    #[tokio::test]
    async fn another_process_reads_what_one_wrote() {
        let place = place().await;
        let created = table(&place.catalog).await;
        let pool = open_pool(&place.directory.path().join("metadata.db"))
            .await
            .expect("opens");
        let other = SqlCatalog::open(pool, place.directory.path().join("ware house")).await;
        let read = other
            .expect("opens")
            .load_table(&name())
            .await
            .expect("the table");
        assert_eq!(read.metadata, created.metadata);
    }

    #[test]
    fn names_that_leave_the_warehouse_do_not() {
        for (namespace, table) in [
            ("", "t"),
            ("a..b", "t"),
            ("ns", "../t"),
            ("ns", "a.b"),
            ("a/b", "t"),
        ] {
            assert!(
                TableName::new(namespace, table).is_err(),
                "{namespace} {table}"
            );
        }
        assert_eq!(path_part("..").0, "_..");
        assert_eq!(path_part("a b?#").0, "a_b__");
        assert!(TableName::new("a.b", "größe").is_ok());
    }
}
