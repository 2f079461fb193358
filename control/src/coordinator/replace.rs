//! `CREATE OR REPLACE MATERIALIZED VIEW` of a view that exists.
//!
//! # Protocol
//!
//! 1. The new definition is noted in the catalog; the view's own row stays as it is.
//! 2. The engine prepares the new plan beside the old one and, with a checkpoint, puts it in its place.
//! 3. The new definition becomes the row.
//!
//! A crash between 2 and 3 is settled by the next start: the definition whose dataflow the checkpoint
//! holds is the valid one.

use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::SchemaRef;
use millrace_dataflow::engine::Item;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_sql::parse::{Options, Statement, parse_one};
use millrace_sql::sql_name;
use tracing::{error, info, warn};

use super::facts::Missing;
use super::prepare::{self, Draft};
use super::world::{Detail, Entry};
use super::{Coordinator, World, WriterLock};
use crate::catalog::{Kind, Replacement, Seen};
use crate::session::{Answer, Notice};

/// Between two tries to write down what the engine has done.
const PAUSE: Duration = Duration::from_millis(500);

impl Coordinator {
    /// Replaces a view. The writer's lock is not held while the engine reads history.
    pub(super) async fn replace(
        &self,
        lock: WriterLock,
        world: &Arc<World>,
        draft: Draft,
    ) -> Result<Answer> {
        let inner = &self.0;
        inner.busy.check_free([&draft.name].into_iter())?;
        let read = |name: &String| world.upstream(name);
        inner
            .busy
            .check_readable(&draft.depends_on.iter().flat_map(read).collect())?;
        let entry = world
            .entries
            .get(&draft.name)
            .ok_or_else(|| Error::internal("nothing to replace"))?;
        let mut answer = Answer::done();
        let Some(before) = check(world, entry, &draft)? else {
            return Ok(answer.notice(Notice::remark(format!(
                "materialized view \"{}\" is defined like that already, nothing changes",
                draft.name
            ))));
        };
        let mut object = entry.object.clone();
        object.dataflow = inner.catalog.take_ids(1).await?;
        object.text.clone_from(&draft.text);
        object.depends_on.clone_from(&draft.depends_on);
        object.fingerprint.clone_from(&draft.fingerprint);
        object.seen.clear();
        let new = Replacement {
            object: object.id,
            dataflow: object.dataflow,
            text: draft.text.clone(),
            depends_on: draft.depends_on.clone(),
            fingerprint: draft.fingerprint.clone(),
            before,
        };
        let notices = draft.notices.clone();
        let made = prepare::connect(draft, object, &inner.outside, Missing::Fail).await?;
        // The sink of a published view goes on as it is.
        let view = made.items.into_iter().find_map(|item| match item {
            Item::View(view) => Some(view),
            _ => None,
        });
        let view = view.ok_or_else(|| Error::internal("a view without a dataflow"))?;
        inner.catalog.insert_replacement(&new).await?;
        inner.engine.define(&made.entry.object.definition())?;
        let _claim = inner.busy.claim(&entry.object.name, true, &new.depends_on);
        drop(lock);
        let replaced = inner.engine.replace(view).await;
        let _lock = self.lock().await;
        if let Err(failed) = replaced {
            if failed.old_stays {
                // Worker processes forget the new definition with its dataflow.
                inner.engine.define(&entry.object.definition())?;
            }
            if failed.old_stays
                && let Err(error) = inner.catalog.forget_replacement(new.object).await
            {
                // The next start sees that no checkpoint holds it.
                warn!(target: "millrace", name = entry.object.name, %error, "row of a failed replacement stays");
            }
            return Err(failed.error);
        }
        while let Err(e) = inner.catalog.adopt_replacement(&new).await {
            // The engine has done it and a restart would see that: there is no way back.
            error!(target: "millrace", name = entry.object.name, error = %e, "a replacement cannot be written down");
            if e.kind != ErrorKind::Unavailable {
                return Err(e);
            }
            tokio::time::sleep(PAUSE).await;
        }
        info!(target: "millrace", name = entry.object.name, "replaced");
        self.publish(self.world().with(made.entry, Some(made.picture)));
        answer
            .notices
            .extend(notices.into_iter().map(Notice::remark));
        Ok(answer)
    }
}

/// The view as it is now, for its readers; `None` if the new definition says the same.
fn check(world: &World, entry: &Entry, draft: &Draft) -> Result<Option<Seen>> {
    let name = &entry.object.name;
    if !entry.is(Kind::MaterializedView) {
        let is = entry.object.kind.as_str();
        return Err(
            Error::invalid(format!("\"{name}\" is not a materialized view"))
                .code("42809")
                .hint(format!("it is a {is}: drop it, or choose another name")),
        );
    }
    let (Detail::MaterializedView { schema, .. }, Some(item), None) =
        (&entry.detail, world.picture.items.get(name), &entry.failed)
    else {
        return Err(Error::new(
            ErrorKind::Conflict,
            format!("materialized view \"{name}\" has failed, so there is nothing to go on from"),
        )
        .code("55000")
        .hint("drop it and create it again"));
    };
    let millrace_sql::catalog::Item::MaterializedView(known) = item else {
        return Err(Error::internal("a view that is none"));
    };
    for read in &draft.depends_on {
        if world.upstream(read).contains(name) {
            let error = Error::invalid(format!("materialized view \"{name}\" cannot read itself"))
                .code("42P17")
                .hint(
                    "give the new definition another name, or let it read what the old one reads",
                );
            return Err(match read == name {
                true => error,
                false => error.detail(format!("\"{read}\" is made from it")),
            });
        }
    }
    let columns = draft
        .columns()
        .ok_or_else(|| Error::internal("a view without columns"))?;
    if entry.object.companion.is_some() {
        published(name, &entry.object.text, draft, schema, columns)?;
    }
    if draft.fingerprint == entry.object.fingerprint && names(schema) == names(columns) {
        return Ok(None);
    }
    let readers: Vec<String> = world
        .readers(name)
        .iter()
        .map(|reader| format!("{} \"{}\"", reader.object.kind.as_str(), reader.object.name))
        .collect();
    if !readers.is_empty() {
        keeps_columns(name, schema, columns).map_err(|e| {
            e.detail(format!("{} read it", readers.join(", "))).hint(
                "columns that others read stay, new ones come behind them; or drop what reads it",
            )
        })?;
    }
    Ok(Some(Seen {
        columns: schema.fields().len(),
        append_only: known.append_only,
        event_time: known.event_time.clone(),
    }))
}

fn names(schema: &SchemaRef) -> Vec<&String> {
    schema.fields().iter().map(|f| f.name()).collect()
}

/// A view under a name of the lake is its table, too: that stays as it was made.
fn published(
    name: &str,
    old: &str,
    draft: &Draft,
    schema: &SchemaRef,
    columns: &SchemaRef,
) -> Result<()> {
    let of_table = |mut options: Options| {
        options.remove("on_error");
        options.remove("allowed_lateness");
        options
    };
    let before = match parse_one(old)?.statement {
        Statement::CreateMaterializedView(create) => of_table(create.options),
        _ => Options::new(),
    };
    let hint = "drop the view and create it again, into another table";
    if Some(&before) != draft.options() {
        return Err(
            Error::unsupported(format!("the options of table \"{name}\" cannot change"))
                .detail("a replacement changes what a view holds, not how its table is written")
                .hint(hint),
        );
    }
    keeps_columns(name, schema, columns)?;
    if columns.fields().len() != schema.fields().len() {
        return Err(
            Error::unsupported(format!("the columns of table \"{name}\" cannot change")).hint(hint),
        );
    }
    Ok(())
}

/// The first of the new columns are the old ones.
fn keeps_columns(name: &str, old: &SchemaRef, new: &SchemaRef) -> Result<()> {
    let invalid = |text: String| Error::invalid(text).code("42P16");
    for (i, was) in old.fields().iter().enumerate() {
        let Some(is) = new.fields().get(i) else {
            return Err(invalid(format!(
                "cannot drop column \"{}\" of view \"{name}\"",
                was.name()
            )));
        };
        if was.name() != is.name() {
            return Err(invalid(format!(
                "cannot change name of column \"{}\" of view \"{name}\" to \"{}\"",
                was.name(),
                is.name()
            )));
        }
        if was.data_type() != is.data_type() {
            return Err(invalid(format!(
                "cannot change type of column \"{}\" of view \"{name}\" from {} to {}",
                was.name(),
                sql_name(was.data_type()),
                sql_name(is.data_type())
            )));
        }
    }
    Ok(())
}
