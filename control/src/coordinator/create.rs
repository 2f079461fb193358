//! `CREATE …`: the row first, then the engine; a change that the engine refuses leaves no row.

use std::sync::Arc;

use millrace_dataflow::env;
use millrace_dataflow::error::Result;
use millrace_sql::parse::Statement;
use tracing::{info, warn};

use super::prepare::{self, Draft};
use super::{Coordinator, World};
use crate::error::duplicate_relation;
use crate::session::{Answer, Notice};

/// The name a statement creates, and whether it says IF NOT EXISTS.
pub(super) fn name_of(statement: &Statement) -> Option<(String, bool)> {
    match statement {
        Statement::CreateSource(s) => Some((s.name.clone(), s.if_not_exists)),
        Statement::CreateView(s) => Some((s.name.clone(), s.if_not_exists)),
        Statement::CreateMaterializedView(s) => Some((s.name.clone(), s.if_not_exists)),
        Statement::CreateSink(s) => Some((s.name.clone(), s.if_not_exists)),
        _ => None,
    }
}

/// Answers a statement whose object exists: an error, or with IF NOT EXISTS a notice.
pub(super) fn exists_already(
    world: &World,
    creates: Option<&(String, bool)>,
) -> Result<Option<Answer>> {
    match creates {
        Some((name, if_not_exists)) if world.entries.contains_key(name) => {
            if *if_not_exists {
                let notice =
                    Notice::remark(format!("relation \"{name}\" already exists, skipping"));
                Ok(Some(Answer::done().notice(notice)))
            } else {
                Err(duplicate_relation(name))
            }
        }
        _ => Ok(None),
    }
}

impl Coordinator {
    /// Creates what was planned. Runs under the writer's lock.
    pub(super) async fn create(&self, world: &Arc<World>, draft: Draft) -> Result<Answer> {
        let inner = &self.0;
        let notices = draft.notices.clone();
        prepare::validate(&draft, &inner.outside).await?;
        let first = inner.catalog.take_ids(prepare::ids_needed(&draft)).await?;
        let object = prepare::object(&draft, first, env::now_ms());
        let made = prepare::connect(draft, object, &inner.outside).await?;
        inner.catalog.insert(&made.entry.object).await?;
        let mut begun = Vec::new();
        for item in made.items {
            let id = item.id();
            if let Err(error) = inner.engine.create(item).await {
                self.undo(&begun, &made.entry.object).await;
                return Err(error);
            }
            begun.push(id);
        }
        info!(target: "millrace", name = made.entry.object.name, kind = made.entry.object.kind.as_str(), "created");
        self.publish(world.with(made.entry, Some(made.picture)));
        let mut answer = Answer::done();
        answer
            .notices
            .extend(notices.into_iter().map(Notice::remark));
        Ok(answer)
    }

    /// Takes back a creation that the engine refused. What cannot be taken back now is gone after a
    /// restart at the latest, when only rows of the catalog are started.
    async fn undo(
        &self,
        begun: &[millrace_dataflow::plan::RelationId],
        object: &crate::catalog::Object,
    ) {
        if let Err(error) = self.0.catalog.remove(&[object.id]).await {
            warn!(target: "millrace", name = object.name, %error, "row of a refused object stays");
        }
        if !begun.is_empty()
            && let Err(error) = self.0.engine.drop_items(begun).await
        {
            warn!(target: "millrace", name = object.name, %error, "parts of a refused object stay");
        }
    }
}
