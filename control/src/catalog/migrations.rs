//! Numbered migrations of the metadata, forward only.
//!
//! # Contract
//!
//! A database is brought to the newest form in one transaction per migration. One that is newer than
//! this binary is refused unread: guessing at an unknown form could lose what it holds.

use millrace_dataflow::env;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use sqlx::SqlitePool;

use super::sqlite::failed;

/// All migrations, oldest first; the number is the position, counted from 1.
const MIGRATIONS: &[&str] = &[
    include_str!("migrations/0001.sql"),
    include_str!("migrations/0002.sql"),
];

/// Applies what is missing.
pub async fn migrate(pool: &SqlitePool) -> Result<()> {
    sqlx::query(
        "CREATE TABLE IF NOT EXISTS millrace_migrations \
         (version INTEGER PRIMARY KEY, applied_ms INTEGER NOT NULL)",
    )
    .execute(pool)
    .await
    .map_err(failed)?;
    loop {
        // Immediate, so that two servers starting at once do not apply the same migration twice.
        let mut tx = pool.begin_with("BEGIN IMMEDIATE").await.map_err(failed)?;
        let applied: i64 =
            sqlx::query_scalar("SELECT coalesce(max(version), 0) FROM millrace_migrations")
                .fetch_one(&mut *tx)
                .await
                .map_err(failed)?;
        let applied = usize::try_from(applied).unwrap_or(usize::MAX);
        if applied > MIGRATIONS.len() {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "the metadata has version {applied}, this server knows {} at most",
                    MIGRATIONS.len()
                ),
            )
            .hint(
                "start the version of millrace that last wrote this data directory, or a newer one",
            ));
        }
        let Some(next) = MIGRATIONS.get(applied) else {
            return Ok(());
        };
        sqlx::raw_sql(*next)
            .execute(&mut *tx)
            .await
            .map_err(failed)?;
        sqlx::query("INSERT INTO millrace_migrations (version, applied_ms) VALUES (?, ?)")
            .bind(applied as i64 + 1)
            .bind(env::now_ms() as i64)
            .execute(&mut *tx)
            .await
            .map_err(failed)?;
        tx.commit().await.map_err(failed)?;
    }
}
