//! Performs the effects of the commit core against the catalog.
//!
//! # Contract
//!
//! * Dropping a call half-way is like losing the answer: the next call looks at the table first.
//! * Only metadata is ever deleted here, and only after a definite answer: that of an attempt which
//!   failed, or old metadata files after one which succeeded. Data files are never deleted.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use iceberg::spec::DataFile;
use millrace_dataflow::env::failpoint;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::time::Tick;

use super::{Core, Effect, Event, Observed, Outcome, Token, token};
use crate::catalog::sql::Writer;
use crate::catalog::{SqlCatalog, TableName, TableVersion};
use crate::{error, snapshot};

/// Commits of one sink to one table. One per sink; [`Self::frontier`] comes first.
#[derive(Debug)]
pub struct TableCommitter {
    catalog: Arc<SqlCatalog>,
    table: TableName,
    sink: String,
    incarnation: u64,
    core: Core,
    /// The table this is about; another one under the same name is not it.
    uuid: uuid::Uuid,
    /// The version in which the token was looked up.
    looked_at: Option<TableVersion>,
    reloading: bool,
}

impl TableCommitter {
    /// For the table as it is now. `sink` and `incarnation` go into every token.
    pub fn new(
        catalog: Arc<SqlCatalog>,
        table: &TableVersion,
        sink: impl Into<String>,
        incarnation: u64,
    ) -> Self {
        let sink = sink.into();
        Self {
            catalog,
            table: table.name.clone(),
            core: Core::new(sink.clone(), incarnation),
            sink,
            incarnation,
            uuid: table.metadata.uuid(),
            looked_at: None,
            reloading: false,
        }
    }

    /// Shuts out older incarnations, then says how far the table is.
    pub async fn frontier(&mut self) -> Result<Option<Tick>> {
        self.run(Event::Recover, &[]).await
    }

    /// Publishes the files of `[lower, upper)` together with the sink's progress, exactly once. May be
    /// repeated with the same arguments after an error of kind `Unavailable`.
    pub async fn commit(&mut self, lower: Tick, upper: Tick, files: &[DataFile]) -> Result<()> {
        self.run(Event::Commit { lower, upper }, files)
            .await
            .map(|_| ())
    }

    /// Acknowledges ticks that held no rows, without a commit; the next one covers them.
    pub fn skip(&mut self, lower: Tick, upper: Tick) -> Result<()> {
        self.core
            .skip(lower, upper)
            .map_err(|f| f.into_error(&self.table.to_string()))
    }

    async fn run(&mut self, event: Event, files: &[DataFile]) -> Result<Option<Tick>> {
        let mut effects = VecDeque::from(self.core.step(event));
        while let Some(effect) = effects.pop_front() {
            let event = match effect {
                Effect::Done { frontier } => return Ok(frontier),
                Effect::Fail(failure) => return Err(failure.into_error(&self.table.to_string())),
                Effect::Sleep { attempt, ms } => {
                    tokio::time::sleep(Duration::from_millis(ms)).await;
                    Event::Timer { attempt }
                }
                Effect::Load { attempt, fence } => match self.load(fence).await {
                    Ok(seen) => Event::Loaded { attempt, seen },
                    Err(e) if e.kind == ErrorKind::Unavailable => Event::LoadFailed {
                        attempt,
                        reason: reason(e),
                    },
                    Err(e) => return self.abandon(e),
                },
                Effect::BuildAndCommit {
                    attempt,
                    base,
                    token,
                } => match self.build_and_commit(&base, &token, files).await {
                    Ok(outcome) => Event::Answer { attempt, outcome },
                    Err(e) => return self.abandon(e),
                },
                #[cfg(test)]
                Effect::CommitRebased { .. } | Effect::DeleteFiles => {
                    return self.abandon(Error::internal("a rule of the commit core is off"));
                }
            };
            effects.extend(self.core.step(event));
        }
        Err(Error::internal("the commit core stopped without an answer"))
    }

    fn abandon<T>(&mut self, e: Error) -> Result<T> {
        self.core.abandon();
        Err(e)
    }

    async fn load(&mut self, fence: bool) -> Result<Observed> {
        if std::mem::take(&mut self.reloading) && failpoint("sink.commit.conflict_reload") {
            return Err(Error::unavailable("failpoint sink.commit.conflict_reload"));
        }
        let writer = Writer {
            sink: &self.sink,
            incarnation: self.incarnation,
        };
        let mut version = self.load_version().await?;
        let fenced_by = if fence {
            let newest = self.catalog.fence(&version, writer).await?;
            // What an older incarnation committed before the fence stood must be seen.
            version = self.load_version().await?;
            newest
        } else {
            self.catalog
                .newest_incarnation(&version, &self.sink)
                .await?
        };
        let (progress, incarnation) = token::read(&version.metadata, &self.sink)?;
        let seen = Observed {
            version: version.location.clone(),
            progress,
            incarnation: incarnation.max(fenced_by),
        };
        self.looked_at = Some(version);
        Ok(seen)
    }

    async fn load_version(&self) -> Result<TableVersion> {
        let version = self.catalog.load_table(&self.table).await?;
        if version.metadata.uuid() != self.uuid {
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("lake table \"{}\" was dropped and created anew", self.table),
            )
            .hint("create the sink anew"));
        }
        Ok(version)
    }

    async fn build_and_commit(
        &mut self,
        base: &str,
        token: &Token,
        files: &[DataFile],
    ) -> Result<Outcome> {
        let Some(table) = self.looked_at.take().filter(|table| table.location == base) else {
            return Err(Error::internal(
                "a commit is based on a version that was not loaded",
            ));
        };
        let staged = match snapshot::append(
            &self.catalog,
            &table,
            files,
            token.summary(),
            token.properties(table.metadata.next_sequence_number()),
        )
        .await
        {
            Ok(staged) => staged,
            Err(e) if e.kind == ErrorKind::Unavailable => return Ok(Outcome::Failed(reason(e))),
            Err(e) => return Err(e),
        };
        if failpoint("sink.commit.before_send") {
            return Ok(Outcome::Failed(
                "failpoint sink.commit.before_send".to_string(),
            ));
        }
        let writer = Writer {
            sink: &self.sink,
            incarnation: self.incarnation,
        };
        let answer = self
            .catalog
            .swap(&table, &staged.location, Some(writer))
            .await;
        if failpoint("sink.commit.after_send_before_answer") {
            return Ok(Outcome::Unknown(
                "failpoint: the answer was lost".to_string(),
            ));
        }
        let outcome = match answer {
            Ok(true) => {
                self.catalog
                    .remember(&staged.location, &Arc::new(staged.metadata));
                self.delete(&staged.outdated).await;
                Outcome::Committed
            }
            Ok(false) => {
                self.reloading = true;
                self.delete(&staged.written).await;
                Outcome::Conflict
            }
            Err(e) => Outcome::Unknown(reason(e)),
        };
        if failpoint("sink.commit.after_answer") {
            return Ok(Outcome::Unknown(
                "failpoint sink.commit.after_answer".to_string(),
            ));
        }
        Ok(outcome)
    }

    /// Deletes metadata that nothing refers to. Left behind, it is garbage; that is all.
    async fn delete(&self, files: &[String]) {
        for file in files {
            if let Err(e) = self.catalog.io().delete(file).await {
                tracing::debug!(error = %error::iceberg("delete a file", e), "cleanup");
            }
        }
    }
}

fn reason(e: Error) -> String {
    match e.detail {
        Some(detail) => format!("{}: {detail}", e.message),
        None => e.message,
    }
}

#[cfg(test)]
mod tests;
