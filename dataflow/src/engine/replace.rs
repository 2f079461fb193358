//! `CREATE OR REPLACE`: a new plan in the place of a running one.
//!
//! # Protocol
//!
//! 1. Whatever could not follow is asked first: a sink that only appends, a view that has kept less than
//!    it would need to take rows back.
//! 2. The new plan is hydrated beside the old one, which goes on serving. Nothing of it is shown.
//! 3. The minter mints tick R: the old plan is the relation below R, the new one from R on; what went
//!    out at R is the difference of their contents ([`crate::served::succeed`]). A checkpoint marks R,
//!    and has the new plan in the place of the old one.
//! 4. Nothing from R on is shown or committed before that checkpoint is durable.
//!
//! A crash before `latest` moves brings back the old plan, which replays what was bound, also at and
//! after R; afterwards the checkpoint holds the new plan and not the old one, and that decides.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::backfill::was_asked_for;
use super::hydrate::Hydration;
use super::install::{late_schema, wanted};
use super::minter::Request;
use super::{Engine, Running, ViewItem};
use crate::env;
use crate::error::{Error, ErrorKind, Result};
use crate::ingest::lock;
use crate::plan::RelationId;

/// Between two tries to take the checkpoint of a replacement.
const PAUSE: Duration = Duration::from_millis(500);

/// Why a view was not replaced.
#[derive(Debug)]
pub struct NotReplaced {
    pub error: Error,
    /// Nothing has changed. Otherwise this server ends, and what the last checkpoint holds decides.
    pub old_stays: bool,
}

impl Engine {
    /// Puts `item` in the place of the running view of the same relation: same ids, but for the
    /// dataflow. Returns once a checkpoint holds it. See the module.
    pub async fn replace(&self, item: ViewItem) -> Result<(), NotReplaced> {
        let stays = |error| NotReplaced {
            error,
            old_stays: true,
        };
        let item = Arc::new(item);
        let old = self.replaceable(&item).map_err(stays)?;
        let hydrated = self.hydrate_beside(&item).await;
        let hydration = match hydrated {
            Ok(hydration) => hydration,
            Err(e) => {
                if was_asked_for(&e) {
                    tracing::info!(view = %item.name, "{e}, the old one goes on");
                } else {
                    tracing::error!(view = %item.name, error = %e, "not replaced, the old one goes on");
                }
                lock(&self.inner.backfills).remove(&item.id);
                let _ = self.ask(Request::Drop([item.dataflow].into()));
                return Err(stays(e));
            }
        };
        let switched = self.switch(&old, &hydration, &item).await;
        lock(&self.inner.backfills).remove(&item.id);
        switched.map_err(|error| NotReplaced {
            error,
            old_stays: false,
        })
    }

    /// The running view, if all that reads it can follow.
    fn replaceable(&self, item: &ViewItem) -> Result<Arc<ViewItem>> {
        let items = lock(&self.inner.items);
        let old = match items.get(&item.id) {
            Some(Running::View { item, ready, .. }) if *ready.borrow() => Arc::clone(item),
            Some(Running::View { .. }) => {
                return Err(Error::new(
                    ErrorKind::Conflict,
                    format!("view \"{}\" still reads history", item.name),
                )
                .code("55000")
                .hint("wait until it runs, or drop it"));
            }
            _ => {
                return Err(Error::new(
                    ErrorKind::NotFound,
                    format!("view \"{}\" does not run", item.name),
                )
                .code("55000")
                .hint("drop it and create it again"));
            }
        };
        let refused =
            |what: String| Error::unsupported(format!("cannot replace \"{}\": {what}", item.name));
        let relations = [item.id, item.errors, item.late];
        let other_late = late_schema(&old.plan) != late_schema(&item.plan);
        let mut changing: Vec<RelationId> = relations.to_vec();
        let mut seen: BTreeSet<RelationId> = BTreeSet::from([item.id]);
        while let Some(relation) = changing.pop() {
            for running in items.values() {
                match running {
                    Running::Sink { item: sink, .. }
                        if sink.from == relation && relations.contains(&relation) =>
                    {
                        if !sink.sink.accepts_retractions() {
                            return Err(refused(format!("sink \"{}\" only appends", sink.name))
                                .detail("what the old definition gave cannot be taken back from its table")
                                .hint("drop the sink, or create it WITH (changelog = 'op'), then replace the view"));
                        }
                    }
                    Running::View { item: reader, .. } if reader.id != item.id => {
                        if !reader.plan.inputs().contains(&relation) {
                            continue;
                        }
                        if relation == item.late && other_late {
                            return Err(refused(format!(
                                "the columns of its late rows change, which \"{}\" reads",
                                reader.name
                            ))
                            .hint("drop the reader and create it again afterwards"));
                        }
                        if let Some(reason) = reader.plan.keeps_too_little_of(relation) {
                            return Err(refused(format!("view \"{}\" cannot follow", reader.name))
                                .detail(reason)
                                .hint(format!(
                                    "drop \"{}\" and create it again after the replacement",
                                    reader.name
                                )));
                        }
                        if seen.insert(reader.id) {
                            changing.push(reader.id);
                        }
                    }
                    _ => {}
                }
            }
        }
        Ok(old)
    }

    /// Step 2.
    async fn hydrate_beside(&self, item: &Arc<ViewItem>) -> Result<Hydration> {
        let (hydration, histories) = {
            let _one = self.inner.creating.lock().await;
            crate::render::check::check(&item.plan)?;
            let install = self.view_install(item, true, None)?;
            let backfill = self.backfill(&item.name, "view", true, true, &install);
            self.note_backfill(item.id, &backfill);
            let hydration = Hydration {
                id: item.id,
                install,
                backfill,
                wanted: wanted(&item.plan),
                fingerprint: item.plan.fingerprint,
            };
            let histories = self.begin(&hydration).await?;
            (hydration, histories)
        };
        self.level(&hydration, histories).await?;
        env::failpoint("replace.before_switch");
        hydration.backfill.seal()?;
        Ok(hydration)
    }

    /// Steps 3 and 4. An error after R means that this server ends: the next start decides.
    async fn switch(
        &self,
        old: &ViewItem,
        hydration: &Hydration,
        item: &Arc<ViewItem>,
    ) -> Result<()> {
        // To the end: what is held back is that of one replacement.
        let _one = self.inner.checkpointing.lock().await;
        let replace = |checkpoint, done| Request::Replace {
            old: old.dataflow,
            new: item.dataflow,
            checkpoint,
            done,
        };
        let mut result = self.checkpoint_by(replace).await;
        while let Err(e) = result {
            let held = self.inner.shared.held_from.borrow().is_some();
            if !held || e.kind == ErrorKind::Conflict || *self.inner.stopped.borrow() {
                return Err(e);
            }
            tracing::error!(view = %item.name, error = %e, "replaced, but no checkpoint holds it yet");
            tokio::time::sleep(PAUSE).await;
            let again = |id, done| Request::Checkpoint { id, done };
            result = self.checkpoint_by(again).await;
        }
        env::failpoint("replace.checkpoint.after");
        self.register_view(item, &hydration.install.inputs);
        lock(&self.inner.items).insert(
            item.id,
            Running::View {
                item: Arc::clone(item),
                progress: Arc::clone(&hydration.install.progress),
                ready: watch::channel(true).1,
            },
        );
        self.pass_on_sources();
        self.inner.shared.held_from.send_replace(None);
        self.ask(Request::Drop([old.dataflow].into()))
    }

    /// What is created later over a reader of a replaced view follows the watermarks of its new sources.
    fn pass_on_sources(&self) {
        let items = lock(&self.inner.items);
        let mut offers = lock(&self.inner.offers);
        loop {
            let mut changed = false;
            for running in items.values() {
                let Running::View { item, .. } = running else {
                    continue;
                };
                let sources: BTreeSet<RelationId> = (item.plan.inputs().iter())
                    .filter_map(|input| offers.get(input))
                    .flat_map(|offer| offer.sources.iter().copied())
                    .collect();
                let sources: Vec<RelationId> = sources.into_iter().collect();
                for relation in [item.id, item.errors, item.late] {
                    if let Some(offer) = offers.get_mut(&relation)
                        && offer.sources != sources
                    {
                        offer.sources.clone_from(&sources);
                        changed = true;
                    }
                }
            }
            if !changed {
                return;
            }
        }
    }
}
