//! New definitions of views that are being prepared, and how they become the valid ones.

use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::plan::RelationId;
use sqlx::Row;

use super::sqlite::{failed, object};
use super::{Kind, Object, Replacement, SqliteCatalog};

/// What reads `name`, directly or through logical views, whose texts are part of their readers.
fn readers<'a>(objects: &'a [Object], name: &'a str) -> Vec<&'a Object> {
    let mut found: Vec<&Object> = Vec::new();
    let mut open = vec![name];
    while let Some(name) = open.pop() {
        for object in objects {
            let reads = object.depends_on.iter().any(|read| read == name);
            if reads && found.iter().all(|known| known.id != object.id) {
                found.push(object);
                if object.kind == Kind::View {
                    open.push(&object.name);
                }
            }
        }
    }
    found
}

fn damaged(e: serde_json::Error) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        "metadata.db holds a damaged replacement",
    )
    .detail(e.to_string())
}

impl SqliteCatalog {
    /// Notes what is to take the place of a view. The view goes on as it is.
    pub async fn insert_replacement(&self, new: &Replacement) -> Result<()> {
        let mut tx = self.begin().await?;
        sqlx::query(
            "INSERT INTO millrace_replacements \
             (object, dataflow, text, depends_on, fingerprint, before) VALUES (?, ?, ?, ?, ?, ?)",
        )
        .bind(new.object.0 as i64)
        .bind(new.dataflow.0 as i64)
        .bind(new.text.as_str())
        .bind(serde_json::to_string(&new.depends_on).expect("names serialize"))
        .bind(new.fingerprint.as_str())
        .bind(serde_json::to_string(&new.before).expect("numbers serialize"))
        .execute(&mut *tx)
        .await
        .map_err(failed)?;
        tx.commit().await.map_err(failed)
    }

    /// All that are being prepared.
    pub async fn replacements(&self) -> Result<Vec<Replacement>> {
        let rows = sqlx::query("SELECT * FROM millrace_replacements ORDER BY object")
            .fetch_all(self.pool())
            .await
            .map_err(failed)?;
        let read = |row: &sqlx::sqlite::SqliteRow| -> Result<Replacement> {
            let id = |name: &str| -> Result<RelationId> {
                let id: i64 = row.try_get(name).map_err(failed)?;
                Ok(RelationId(id as u64))
            };
            let text = |name: &str| -> Result<String> { row.try_get(name).map_err(failed) };
            Ok(Replacement {
                object: id("object")?,
                dataflow: id("dataflow")?,
                text: text("text")?,
                depends_on: serde_json::from_str(&text("depends_on")?).map_err(damaged)?,
                fingerprint: text("fingerprint")?,
                before: serde_json::from_str(&text("before")?).map_err(damaged)?,
            })
        };
        rows.iter().map(read).collect()
    }

    /// Forgets a replacement: the view stays what it was.
    pub async fn forget_replacement(&self, object: RelationId) -> Result<()> {
        let mut tx = self.begin().await?;
        sqlx::query("DELETE FROM millrace_replacements WHERE object = ?")
            .bind(object.0 as i64)
            .execute(&mut *tx)
            .await
            .map_err(failed)?;
        tx.commit().await.map_err(failed)
    }

    /// The replacement is the view from now on; its readers keep in mind what they knew of it.
    pub async fn adopt_replacement(&self, new: &Replacement) -> Result<()> {
        let mut tx = self.begin().await?;
        let name: String = sqlx::query_scalar(
            "UPDATE millrace_objects SET text = ?, depends_on = ?, fingerprint = ?, dataflow = ?, \
             seen = '{}' WHERE id = ? RETURNING name",
        )
        .bind(new.text.as_str())
        .bind(serde_json::to_string(&new.depends_on).expect("names serialize"))
        .bind(new.fingerprint.as_str())
        .bind(new.dataflow.0 as i64)
        .bind(new.object.0 as i64)
        .fetch_one(&mut *tx)
        .await
        .map_err(failed)?;
        let rows = sqlx::query("SELECT * FROM millrace_objects")
            .fetch_all(&mut *tx)
            .await
            .map_err(failed)?;
        let objects = rows.iter().map(object).collect::<Result<Vec<_>>>()?;
        for reader in readers(&objects, &name) {
            let mut seen = reader.seen.clone();
            // What a reader knew first is what it was planned for.
            if seen.contains_key(&name) {
                continue;
            }
            seen.insert(name.clone(), new.before.clone());
            sqlx::query("UPDATE millrace_objects SET seen = ? WHERE id = ?")
                .bind(serde_json::to_string(&seen).expect("numbers serialize"))
                .bind(reader.id.0 as i64)
                .execute(&mut *tx)
                .await
                .map_err(failed)?;
        }
        sqlx::query("DELETE FROM millrace_replacements WHERE object = ?")
            .bind(new.object.0 as i64)
            .execute(&mut *tx)
            .await
            .map_err(failed)?;
        tx.commit().await.map_err(failed)
    }
}
