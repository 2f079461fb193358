//! One-shot reads: what to read is decided here, how it runs in [`crate::query`].
//!
//! # Contract
//!
//! * All relations of the engine in a statement are read at one tick, which is answered.
//! * Lake tables are read at the snapshot that is current when the statement starts.
//! * A bounded source is read to its end; an unbounded one is refused, it never ends.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use datafusion::catalog::TableProvider;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::plan::RelationId;
use millrace_sql::bind::BoundQuery;
use millrace_sql::guard::{RelationRef, guard, relations_of};
use millrace_sql::query::Stop;

use super::prepare::base_name;
use super::world::Detail;
use super::{Coordinator, World};
use crate::query::{self, SourceTable, ViewTable};
use crate::session::{Answer, Notice};

/// Names the lake tables of a statement that met damage.
fn name_tables(error: Error, relations: &[RelationRef]) -> Error {
    if error.kind != ErrorKind::Corrupt {
        return error;
    }
    let name = |relation: &RelationRef| match relation {
        RelationRef::Lake { name, .. } => Some(format!("\"{name}\"")),
        _ => None,
    };
    let names: Vec<String> = relations.iter().filter_map(name).collect();
    let message = match names.as_slice() {
        [] => return error,
        [one] if error.message.contains("a lake table") => {
            let named = format!("lake table {one}");
            error.message.replacen("a lake table", &named, 1)
        }
        all => format!("{}; the statement reads {}", error.message, all.join(", ")),
    };
    Error { message, ..error }
}

impl Coordinator {
    pub(super) async fn select(&self, world: &World, bound: BoundQuery) -> Result<Answer> {
        let inner = &self.0;
        let guarded = guard(bound, &inner.policy)?;
        let relations = relations_of(&guarded);
        let mut providers: BTreeMap<String, Arc<dyn TableProvider>> = BTreeMap::new();
        let mut snapshots = BTreeMap::new();
        let mut sources = Vec::new();
        let mut views = BTreeSet::new();
        for relation in &relations {
            match relation {
                RelationRef::Lake { name, .. } => {
                    let (table, snapshot) = inner.outside.lake_reader(name).await?;
                    if let Some(snapshot) = snapshot {
                        snapshots.insert(name.to_string(), snapshot);
                    }
                    providers.insert(name.to_string(), table);
                }
                RelationRef::System { name, .. } => {
                    providers.insert(name.clone(), query::system::table(name, &inner.engine)?);
                }
                RelationRef::Engine {
                    name, source: true, ..
                } => {
                    let table = Arc::new(source_table(world, name)?);
                    sources.push((name.clone(), Arc::clone(&table)));
                    providers.insert(name.clone(), table);
                }
                RelationRef::Engine { name, .. } => {
                    views.insert(name.clone());
                }
            }
        }
        let (tick, mut notices) = self.read_views(world, &relations, &mut providers).await?;
        let executable = guarded.resolve(&|relation| {
            let name = match relation {
                RelationRef::Engine { name, .. } | RelationRef::System { name, .. } => name.clone(),
                RelationRef::Lake { name, .. } => name.to_string(),
            };
            providers
                .get(&name)
                .cloned()
                .ok_or_else(|| Error::internal(format!("relation \"{name}\" was not resolved")))
        })?;
        let state = query::session_state(inner.config.workers, &inner.query_env);
        let schema = executable.schema();
        let max_result = inner.config.max_result;
        let stop = Stop::default();
        let _wanted = stop.on_drop();
        let batches = query::within(inner.config.statement_timeout, async move {
            let plan = executable.physical_until(&state, &stop).await?;
            query::collect(plan, &state, max_result).await
        })
        .await
        .map_err(|e| name_tables(e, &relations))?;
        let batches = query::conform(&schema, batches)?;
        for (name, table) in sources {
            let rejected = table.rejected();
            if rejected > 0 {
                notices.push(
                    Notice::warning(format!(
                        "{rejected} {} of source \"{name}\" could not be read and left out",
                        if rejected == 1 { "record" } else { "records" }
                    ))
                    .hint(format!(
                        "SELECT * FROM \"{name}$rejected\" shows them, once a view reads the source"
                    )),
                );
            }
        }
        let mut answer = Answer::rows(schema, batches);
        answer.tick = tick;
        answer.snapshots = snapshots;
        answer.notices = notices;
        Ok(answer)
    }

    /// Reads all views of a statement at one tick, and how many row errors they rest on.
    async fn read_views(
        &self,
        world: &World,
        relations: &[RelationRef],
        providers: &mut BTreeMap<String, Arc<dyn TableProvider>>,
    ) -> Result<(Option<u64>, Vec<Notice>)> {
        let mut ids = BTreeSet::new();
        let mut errors = BTreeMap::new();
        let mut upstreams = BTreeSet::new();
        for relation in relations {
            if let RelationRef::Engine {
                id,
                name,
                source: false,
                ..
            } = relation
            {
                ids.insert(*id);
                // System relations are read for themselves; errors behind a view concern its rows.
                if base_name(name) == name {
                    for upstream in world.upstream(name) {
                        upstreams.insert(upstream.clone());
                        if let Some(id) = world.entries.get(&upstream).and_then(|e| e.object.errors)
                        {
                            errors.insert(id, upstream);
                        }
                    }
                }
            }
        }
        if ids.is_empty() {
            return Ok((None, Vec::new()));
        }
        let all: Vec<RelationId> = ids.iter().copied().chain(errors.keys().copied()).collect();
        let read = self.0.engine.read(&all).await?;
        for relation in relations {
            if let RelationRef::Engine {
                id,
                name,
                schema,
                source: false,
            } = relation
            {
                let pieces = read.relations.get(id).cloned().unwrap_or_default();
                let table = ViewTable::new(schema, pieces, self.0.config.workers);
                providers.insert(name.clone(), Arc::new(table));
            }
        }
        let mut notices = self.held(world, &upstreams);
        for (id, view) in errors {
            let rows = read.rows(id);
            if rows > 0 {
                let noun = if rows == 1 { "row error" } else { "row errors" };
                notices.push(
                    Notice::warning(format!("view \"{view}\" holds {rows} {noun}"))
                        .hint(format!("SELECT * FROM \"{view}$errors\" shows them")),
                );
            }
        }
        Ok((Some(read.tick), notices))
    }
}

impl Coordinator {
    /// Says which of these views stand still.
    fn held(&self, world: &World, names: &BTreeSet<String>) -> Vec<Notice> {
        let held = self.0.engine.held();
        let notice = |name: &String| {
            let hold = held.get(&world.entries.get(name)?.object.id)?;
            let (word, cause) = match hold.failed {
                true => ("has failed", "SHOW VIEWS says why"),
                false => ("is paused", "it catches up once it is resumed"),
            };
            let notice = Notice::warning(format!(
                "view \"{name}\" {word}: it stands as of the tick before {}",
                hold.since
            ));
            Some(notice.hint(format!(
                "{cause}; ALTER MATERIALIZED VIEW {name} RESUME lets it go on"
            )))
        };
        names.iter().filter_map(notice).collect()
    }
}

/// A reader of a bounded source.
fn source_table(world: &World, name: &str) -> Result<SourceTable> {
    let entry = world.entries.get(name).map(|entry| &entry.detail);
    let Some(Detail::Source { plan, source, .. }) = entry else {
        return Err(crate::error::unknown_relation(name));
    };
    if !source.bounded() {
        return Err(Error::unsupported(format!("source \"{name}\" never ends, so it cannot be queried"))
            .hint(format!(
                "create a view over it and query that: CREATE MATERIALIZED VIEW … AS SELECT … FROM {name}"
            )));
    }
    Ok(SourceTable::new(plan.clone(), Arc::clone(source)))
}
