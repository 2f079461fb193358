//! `DROP … [CASCADE]`: what others read stays, unless they go too.

use std::collections::BTreeSet;
use std::sync::Arc;

use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::plan::RelationId;
use millrace_sql::parse::{Drop, ObjectKind};
use tracing::info;

use super::world::{Detail, in_order};
use super::{Coordinator, World};
use crate::catalog::Kind;
use crate::error::unknown_relation;
use crate::session::{Answer, Notice};

impl Coordinator {
    /// Drops objects, all or none. Runs under the writer's lock.
    ///
    /// Of the names in `gone` nothing is left already.
    pub(super) async fn drop_objects(
        &self,
        world: &Arc<World>,
        statement: Drop,
        gone: &[String],
    ) -> Result<Answer> {
        self.0.busy.check_free(statement.names.iter())?;
        if statement.kind == ObjectKind::Table {
            return self.drop_tables(world, statement).await;
        }
        let mut answer = Answer::done();
        let mut doomed = BTreeSet::new();
        for name in &statement.names {
            match find(world, name, statement.kind) {
                Ok(()) => {
                    doomed.insert(name.clone());
                }
                Err(e) if e.kind == ErrorKind::NotFound && gone.contains(name) => {
                    let text = format!("the creation of \"{name}\" was cancelled");
                    answer.notices.push(Notice::remark(text));
                }
                Err(e) if e.kind == ErrorKind::NotFound && statement.if_exists => {
                    answer.notices.push(missing(name));
                }
                Err(e) => return Err(e),
            }
        }
        let others = dependents(world, &doomed);
        if !others.is_empty() && !statement.cascade {
            return Err(still_used(world, &statement.names.join("\", \""), &others));
        }
        doomed.extend(others);
        self.remove(world, &doomed, &mut answer).await?;
        Ok(answer)
    }

    /// Removes rows, then parts in the engine, readers first.
    async fn remove(
        &self,
        world: &Arc<World>,
        doomed: &BTreeSet<String>,
        answer: &mut Answer,
    ) -> Result<()> {
        self.0.busy.check_free(doomed.iter())?;
        let objects = doomed.iter().filter_map(|n| world.entries.get(n));
        let objects = in_order(objects.map(|entry| entry.object.clone()).collect());
        let entries: Vec<_> = (objects.iter().rev())
            .filter_map(|object| world.entries.get(&object.name))
            .collect();
        let rows: Vec<RelationId> = entries.iter().map(|entry| entry.object.id).collect();
        if rows.is_empty() {
            return Ok(());
        }
        self.0.catalog.remove(&rows).await?;
        let mut parts = Vec::new();
        for entry in &entries {
            if entry.failed.is_none() {
                parts.extend(entry.object.companion);
                if entry.object.kind != Kind::View {
                    parts.push(entry.object.id);
                }
            }
        }
        // From here on the objects are gone, whatever the engine says.
        self.publish(world.without(doomed));
        if !parts.is_empty() {
            self.0.engine.drop_items(&parts).await?;
        }
        self.forget_paused(&parts).await?;
        for entry in &entries {
            let object = &entry.object;
            info!(target: "millrace", name = object.name, kind = object.kind.as_str(), "dropped");
            if object.companion.is_some() {
                // The table is the view under its name; its files stay until upkeep removes them.
                self.0.outside.drop_table(&object.name, false).await?;
                answer.notices.push(Notice::remark(format!(
                    "table \"{}\" was taken from the lake's catalog, its files stay in the warehouse",
                    object.name
                )));
            }
        }
        Ok(())
    }

    async fn drop_tables(&self, world: &Arc<World>, statement: Drop) -> Result<Answer> {
        let mut answer = Answer::done();
        let mut writers = BTreeSet::new();
        for name in &statement.names {
            if world.entries.contains_key(name) {
                return Err(wrong_kind(world, name, "table"));
            }
            for entry in world.entries.values() {
                if matches!(&entry.detail, Detail::Sink { into, .. } if into == name) {
                    writers.insert(entry.object.name.clone());
                }
            }
        }
        if !writers.is_empty() && !statement.cascade {
            return Err(still_used(world, &statement.names.join("\", \""), &writers));
        }
        for name in &statement.names {
            if !self.0.outside.table_exists(name).await? {
                if !statement.if_exists {
                    return Err(
                        unknown_relation(name).hint("SHOW TABLES lists the tables of the lake")
                    );
                }
                answer.notices.push(missing(name));
            }
        }
        self.remove(world, &writers, &mut answer).await?;
        for name in &statement.names {
            self.0.outside.drop_table(name, true).await?;
        }
        Ok(answer)
    }
}

fn missing(name: &str) -> Notice {
    Notice::remark(format!("relation \"{name}\" does not exist, skipping"))
}

/// Checks that `name` exists and is of the kind that the statement says.
fn find(world: &World, name: &str, kind: ObjectKind) -> Result<()> {
    let entry = world
        .entries
        .get(name)
        .ok_or_else(|| unknown_relation(name))?;
    let fits = match kind {
        ObjectKind::Source => entry.is(Kind::Source),
        ObjectKind::View => entry.is(Kind::View),
        ObjectKind::MaterializedView => entry.is(Kind::MaterializedView),
        ObjectKind::Sink => entry.is(Kind::Sink),
        ObjectKind::Table => false,
    };
    if fits {
        Ok(())
    } else {
        Err(wrong_kind(world, name, kind.word()))
    }
}

fn wrong_kind(world: &World, name: &str, wanted: &str) -> Error {
    let is = world
        .entries
        .get(name)
        .map_or("something else", |e| e.object.kind.as_str());
    Error::invalid(format!("\"{name}\" is not a {wanted}"))
        .code("42809")
        .hint(format!(
            "it is a {is}: use DROP {} \"{name}\"",
            is.to_uppercase()
        ))
}

/// Everything that reads the doomed, directly or not.
fn dependents(world: &World, doomed: &BTreeSet<String>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open: Vec<String> = doomed.iter().cloned().collect();
    while let Some(name) = open.pop() {
        for reader in world.readers(&name) {
            let reader = &reader.object.name;
            if !doomed.contains(reader) && found.insert(reader.clone()) {
                open.push(reader.clone());
            }
        }
    }
    found
}

fn still_used(world: &World, names: &str, others: &BTreeSet<String>) -> Error {
    let list: Vec<String> = others
        .iter()
        .map(|name| {
            let kind = world
                .entries
                .get(name)
                .map_or("object", |e| e.object.kind.as_str());
            format!("{kind} \"{name}\"")
        })
        .collect();
    Error::new(
        ErrorKind::Conflict,
        format!("cannot drop \"{names}\": other objects depend on it"),
    )
    .code("2BP01")
    .detail(format!("dependent objects: {}", list.join(", ")))
    .hint("use DROP … CASCADE to drop the dependent objects too")
}
