//! `ALTER …`: pausing and resuming, options of a sink, intervals of the data plane. Nothing restarts.
//!
//! # Contract
//!
//! * What a statement has set holds for later starts: the options of a sink in its stored text, which
//!   SHOW CREATE shows; paused sinks and intervals as settings; paused views in the engine's own log.
//! * Only options that can change while the sink runs can be set; others are refused.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use millrace_dataflow::engine::alter::Changed;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::plan::RelationId;
use millrace_sql::catalog as sql;
use millrace_sql::parse::{
    Alter, AlterAction, ObjectKind, Options, SinkTarget, Statement, parse_one, with_options,
};
use tracing::info;

use super::facts::duration_option;
use super::world::Entry;
use super::{Coordinator, World};
use crate::catalog::{Kind, SqliteCatalog};
use crate::config::Config;
use crate::error::unknown_relation;
use crate::failures;
use crate::session::{Answer, Notice};

/// Where paused sinks are kept.
const PAUSED: &str = "paused_sinks";
/// Where the intervals are kept.
const INTERVALS: &str = "intervals";

/// What `ALTER SYSTEM SET (…)` leaves behind, in milliseconds.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
struct Intervals {
    checkpoint: Option<u64>,
    commit: Option<u64>,
    /// What the flags said then: a later start that says something else means it.
    flags: [Option<u64>; 2],
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn flags(config: &Config) -> [Option<u64>; 2] {
    config.interval_flags.map(|flag| flag.map(ms))
}

/// Puts the intervals that a statement has set in the place of those of the configuration.
pub(super) async fn restore_intervals(config: &mut Config, catalog: &SqliteCatalog) -> Result<()> {
    let text = catalog.setting(INTERVALS).await?;
    let Some(set) = text.and_then(|t| serde_json::from_str::<Intervals>(&t).ok()) else {
        return Ok(());
    };
    let now = flags(config);
    if let Some(checkpoint) = set.checkpoint.filter(|_| set.flags[0] == now[0]) {
        config.checkpoint_interval = Duration::from_millis(checkpoint);
    }
    if let Some(commit) = set.commit.filter(|_| set.flags[1] == now[1]) {
        config.commit_interval = Duration::from_millis(commit);
    }
    Ok(())
}

/// Sinks that are paused.
pub(super) async fn restore_paused(catalog: &SqliteCatalog) -> Result<BTreeSet<RelationId>> {
    let Some(text) = catalog.setting(PAUSED).await? else {
        return Ok(BTreeSet::new());
    };
    serde_json::from_str(&text).map_err(|e| {
        Error::new(
            ErrorKind::Corrupt,
            "metadata.db holds a damaged list of paused sinks",
        )
        .detail(e.to_string())
    })
}

/// What a statement alters.
struct Target<'a> {
    entry: &'a Entry,
    /// The part of the engine.
    id: RelationId,
}

/// The view or sink of that name; the sink of a published view has the name of the view.
fn target<'a>(world: &'a World, kind: ObjectKind, name: &str) -> Result<Target<'a>> {
    let entry = world
        .entries
        .get(name)
        .ok_or_else(|| unknown_relation(name))?;
    let object = &entry.object;
    let id = match (kind, object.kind) {
        (ObjectKind::Sink, Kind::Sink) | (ObjectKind::MaterializedView, Kind::MaterializedView) => {
            Some(object.id)
        }
        (ObjectKind::Sink, Kind::MaterializedView) => object.companion,
        _ => None,
    };
    let Some(id) = id else {
        let is = object.kind.as_str();
        let error = Error::invalid(format!("\"{name}\" is not a {}", kind.word())).code("42809");
        return Err(match object.kind {
            Kind::MaterializedView | Kind::Sink => error.hint(format!(
                "it is a {is}: use ALTER {} {name}",
                is.to_uppercase()
            )),
            Kind::View | Kind::Source => error.hint(format!("it is a {is}")),
        });
    };
    match &entry.failed {
        Some(why) => Err(why.clone()),
        None => Ok(Target { entry, id }),
    }
}

impl Coordinator {
    /// Runs under the writer's lock.
    pub(super) async fn alter(&self, world: &Arc<World>, alter: Alter) -> Result<Answer> {
        let Alter { kind, name, action } = alter;
        let target = target(world, kind, &name)?;
        let (changed, word) = match action {
            AlterAction::Set(options) => return self.set_options(world, target, &options).await,
            AlterAction::Pause => {
                let changed = self.0.engine.pause(target.id).await?;
                if kind == ObjectKind::Sink {
                    self.keep_paused(target.id, true).await?;
                }
                (changed, "paused already")
            }
            AlterAction::Resume => {
                failures::forget(&std::path::absolute(&self.0.config.data_dir)?, target.id)?;
                if self.0.engine.starts_anew(target.id) {
                    self.0.restart.notify_one();
                    return Ok(Answer::done().notice(Notice::remark(
                        "the service restarts with its state and tries again; requests wait for it",
                    )));
                }
                // First: a crash in between leaves a sink that goes on, as was asked for.
                if kind == ObjectKind::Sink {
                    self.keep_paused(target.id, false).await?;
                }
                (self.0.engine.resume(target.id).await?, "not paused")
            }
        };
        info!(target: "millrace", name, kind = kind.word(), ?changed, "altered");
        Ok(match changed {
            Changed::Yes => Answer::done(),
            Changed::No => {
                let notice = Notice::remark(format!("{} \"{name}\" is {word}", kind.word()));
                Answer::done().notice(notice)
            }
        })
    }

    async fn keep_paused(&self, sink: RelationId, paused: bool) -> Result<()> {
        let list = || self.0.paused.lock().expect("no panic while it is changed");
        let mut all = list().clone();
        let changed = match paused {
            true => all.insert(sink),
            false => all.remove(&sink),
        };
        if !changed {
            return Ok(());
        }
        let text = serde_json::to_string(&all).map_err(|e| Error::internal(e.to_string()))?;
        // First: what could not be written is written when the statement is said again. The writer's
        // lock keeps others away meanwhile.
        self.0.catalog.set_setting(PAUSED, &text).await?;
        *list() = all;
        Ok(())
    }

    /// Forgets that dropped sinks were paused.
    pub(super) async fn forget_paused(&self, dropped: &[RelationId]) -> Result<()> {
        for id in dropped {
            self.keep_paused(*id, false).await?;
        }
        Ok(())
    }

    /// `SET (…)` of a sink.
    async fn set_options(
        &self,
        world: &Arc<World>,
        target: Target<'_>,
        changes: &Options,
    ) -> Result<Answer> {
        let Target { entry, id } = target;
        let (mut options, target) = match parse_one(&entry.object.text)?.statement {
            Statement::CreateSink(sink) => (sink.options, Some(sink.target)),
            Statement::CreateMaterializedView(view) => {
                (view.options, view.lake.map(SinkTarget::Lake))
            }
            _ => (Options::new(), None),
        };
        let settable: &[&str] = match target {
            Some(SinkTarget::Lake(_)) => &["commit_interval"],
            Some(SinkTarget::Blackhole) | None => &[],
        };
        if let Some(key) = changes.keys().find(|key| !settable.contains(&key.as_str())) {
            let name = &entry.object.name;
            let error = Error::unsupported(format!(
                "option \"{key}\" of \"{name}\" cannot be set while it runs"
            ));
            return Err(match settable {
                [] => error.hint("it has no option that can be set"),
                some => error.hint(format!(
                    "what can be set: {}; for anything else drop it and create it again",
                    some.join(", ")
                )),
            });
        }
        let published = entry.object.companion.is_some();
        options.extend(changes.iter().map(|(k, v)| (k.clone(), v.clone())));
        let sink_options = match published {
            // Among the options of a published view are those of the view itself.
            true => changes.clone(),
            false => options.clone(),
        };
        let interval = self.0.outside.commit_interval(&sink_options)?;
        let text = with_options(&entry.object.text, &options)?;
        let sink = entry.object.companion.unwrap_or(id);
        self.0.engine.takes_commit_interval(sink)?;
        self.0.catalog.set_text(entry.object.id, &text).await?;
        self.0.engine.set_commit_interval(sink, interval)?;
        self.publish(with_text(world, entry, text));
        Ok(Answer::done())
    }

    /// `ALTER SYSTEM SET (…)`.
    pub(super) async fn set_system(&self, options: &Options) -> Result<Answer> {
        let (mut checkpoint, mut commit) = (None, None);
        for (key, value) in options {
            let slot = match key.as_str() {
                "checkpoint_interval" => &mut checkpoint,
                "commit_interval" => &mut commit,
                _ => {
                    return Err(Error::unsupported(format!("\"{key}\" cannot be set"))
                        .code("42704")
                        .hint("what can be set: checkpoint_interval, commit_interval; ALTER DATA PLANE SET WORKERS n"));
                }
            };
            *slot = Some(duration_option(key, value)?);
        }
        let text = self.0.catalog.setting(INTERVALS).await?;
        let mut kept: Intervals = text
            .and_then(|t| serde_json::from_str(&t).ok())
            .unwrap_or_default();
        let now = flags(&self.0.config);
        for (slot, flag, set) in [
            (&mut kept.checkpoint, 0, checkpoint),
            (&mut kept.commit, 1, commit),
        ] {
            if let Some(set) = set {
                *slot = Some(ms(set));
                kept.flags[flag] = now[flag];
            }
        }
        let text = serde_json::to_string(&kept).map_err(|e| Error::internal(e.to_string()))?;
        self.0.catalog.set_setting(INTERVALS, &text).await?;
        self.0.engine.set_intervals(checkpoint, commit);
        Ok(Answer::done())
    }
}

/// The world with another text of one object.
fn with_text(world: &World, entry: &Entry, text: String) -> World {
    let mut entry = entry.clone();
    let mut item = world.picture.items.get(&entry.object.name).cloned();
    match &mut item {
        Some(sql::Item::Sink(sink)) => sink.text.clone_from(&text),
        Some(sql::Item::MaterializedView(view)) => view.text.clone_from(&text),
        _ => {}
    }
    entry.object.text = text;
    world.with(entry, item)
}
