//! `CREATE …`: the row first, then the engine; a change that the engine refuses leaves no row.

use std::sync::atomic::Ordering;

use millrace_dataflow::env;
use millrace_dataflow::error::{Error, Result};
use millrace_sql::parse::Statement;
use tracing::{info, warn};

use super::facts::Missing;
use super::prepare::{self, Draft};
use super::{Coordinator, World, WriterLock};
use crate::error::duplicate_relation;
use crate::session::{Answer, Notice};

/// What a statement says about an object of its name that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IfExists {
    Refuse,
    Skip,
    Replace,
}

/// The name a statement creates, and what it does if that is taken.
pub(super) fn name_of(statement: &Statement) -> Option<(String, IfExists)> {
    let (name, skip) = match statement {
        Statement::CreateSource(s) => (&s.name, s.if_not_exists),
        Statement::CreateView(s) => (&s.name, s.if_not_exists),
        Statement::CreateMaterializedView(s) if s.or_replace => {
            return Some((s.name.clone(), IfExists::Replace));
        }
        Statement::CreateMaterializedView(s) => (&s.name, s.if_not_exists),
        Statement::CreateSink(s) => (&s.name, s.if_not_exists),
        _ => return None,
    };
    let if_exists = if skip {
        IfExists::Skip
    } else {
        IfExists::Refuse
    };
    Some((name.clone(), if_exists))
}

/// Bytes of a name; of each part, where it has parts.
const LONGEST_NAME: usize = 128;

/// Refuses names that cannot be shown in a log, a metric or a path. Only those of new objects: what is
/// there stays.
pub(super) fn check_name(name: &str) -> Result<()> {
    let refused = |why: &str, hint: &str| {
        let shown: String = name.chars().take(40).collect();
        let shown = shown.escape_debug();
        Err(Error::invalid(format!("the name \"{shown}\" {why}"))
            .code("42622")
            .hint(hint))
    };
    let longest = match name.starts_with("lake.") {
        true => name.split('.').map(str::len).max().unwrap_or(0),
        false => name.len(),
    };
    if longest > LONGEST_NAME {
        return refused(
            &format!("… is {longest} bytes long"),
            &format!("a name, or a part of one, has at most {LONGEST_NAME} bytes"),
        );
    }
    if name.chars().any(char::is_control) {
        return refused(
            "holds control characters",
            "leave out line breaks, tabs and the like",
        );
    }
    Ok(())
}

/// Answers a statement whose object exists: an error, or with IF NOT EXISTS a notice.
pub(super) fn exists_already(
    world: &World,
    creates: Option<&(String, IfExists)>,
) -> Result<Option<Answer>> {
    match creates {
        Some((name, if_exists)) if world.entries.contains_key(name) => match if_exists {
            IfExists::Replace => Ok(None),
            IfExists::Skip => {
                let notice =
                    Notice::remark(format!("relation \"{name}\" already exists, skipping"));
                Ok(Some(Answer::done().notice(notice)))
            }
            IfExists::Refuse => Err(duplicate_relation(name)),
        },
        _ => Ok(None),
    }
}

impl Coordinator {
    /// Creates what was planned. The writer's lock is not held while the engine reads history.
    pub(super) async fn create(&self, lock: WriterLock, draft: Draft) -> Result<Answer> {
        let inner = &self.0;
        let table = draft.table().map(ToString::to_string);
        for name in [&draft.name].into_iter().chain(&table) {
            check_name(name)?;
        }
        let mut uses = draft.depends_on.clone();
        uses.extend(table.clone());
        inner
            .busy
            .check_free([&draft.name].into_iter().chain(&table))?;
        let read = |name: &String| self.world().upstream(name);
        inner
            .busy
            .check_readable(&draft.depends_on.iter().flat_map(read).collect())?;
        let notices = draft.notices.clone();
        prepare::validate(&draft, &inner.outside).await?;
        let first = inner.catalog.take_ids(prepare::ids_needed(&draft)).await?;
        let object = prepare::object(&draft, first, env::now_ms());
        let (mut made_table, mut appends) = (None, None);
        match table {
            Some(name) if inner.outside.table_exists(&name).await? => {
                appends = self.rows_before(&name).await;
            }
            name => made_table = name,
        }
        let made = prepare::connect(draft, object, &inner.outside, Missing::Create).await?;
        inner.catalog.insert(&made.entry.object).await?;
        env::failpoint("ddl.create.after_meta_before_dataflow");
        inner.engine.define(&made.entry.object.definition())?;
        let _claim = inner.busy.claim(&made.entry.object.name, false, &uses);
        drop(lock);
        let mut begun = Vec::new();
        let mut created = Ok(());
        for item in made.items {
            begun.push(item.id());
            created = inner.engine.create(item).await;
            if created.is_err() {
                begun.pop();
                break;
            }
        }
        let _lock = self.lock().await;
        if let Err(error) = created {
            // What a stop has interrupted is finished by the next start.
            if !inner.stopping.load(Ordering::SeqCst) {
                self.undo(&begun, &made.entry.object, made_table.as_deref())
                    .await;
            }
            return Err(error);
        }
        info!(target: "millrace", name = made.entry.object.name, kind = made.entry.object.kind.as_str(), "created");
        self.publish(self.world().with(made.entry, Some(made.picture)));
        let mut answer = Answer::done();
        answer
            .notices
            .extend(notices.into_iter().map(Notice::remark).chain(appends));
        Ok(answer)
    }

    /// Says that a table which a new sink writes into is not empty.
    async fn rows_before(&self, table: &str) -> Option<Notice> {
        let rows = self.0.outside.table_rows(table).await;
        // Whoever cannot read the table will hear of that from the sink.
        let rows = rows.ok().filter(|rows| *rows > 0)?;
        Some(
            Notice::warning(format!(
                "table \"{table}\" has {rows} rows of another sink; contents are appended behind them"
            ))
            .hint("DROP SINK and DROP TABLE first to begin anew"),
        )
    }

    /// Takes back a creation that the engine refused. What cannot be taken back now is gone after a
    /// restart at the latest, when only rows of the catalog are started.
    async fn undo(
        &self,
        begun: &[millrace_dataflow::plan::RelationId],
        object: &crate::catalog::Object,
        made_table: Option<&str>,
    ) {
        if let Err(error) = self.0.catalog.remove(&[object.id]).await {
            warn!(target: "millrace", name = object.name, %error, "row of a refused object stays");
            return;
        }
        // Nothing was committed to it: that takes a sink which a checkpoint holds.
        if let Some(table) = made_table
            && let Err(error) = self.0.outside.drop_table(table, true).await
        {
            warn!(target: "millrace", name = object.name, table, %error, "table of a refused object stays");
        }
        if !begun.is_empty()
            && let Err(error) = self.0.engine.drop_items(begun).await
        {
            warn!(target: "millrace", name = object.name, %error, "parts of a refused object stay");
        }
    }
}
