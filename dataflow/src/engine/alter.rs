//! Changing what runs: pausing and resuming views and sinks, intervals.
//!
//! # Contract
//!
//! * A paused view keeps its contents as of the tick before the pause; the changes of its inputs wait in
//!   front of it (see [`crate::render`], the gate) and are part of checkpoints. That it is paused stands in
//!   the bindings of the ticks, so a crash repeats it. What it is resumed with comes in one tick.
//! * A paused sink goes on writing files, which are part of checkpoints, and commits none of them. What
//!   is being committed at that moment may still arrive.
//! * A relation that fails again and again is held as if it were paused, from the tick on whose
//!   application fails: nobody was shown anything of that tick. Resuming it tries again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::oneshot;

use super::minter::Request;
use super::shared::Settings;
use super::{Engine, Running};
use crate::error::{Error, ErrorKind, Result};
use crate::ingest::lock;
use crate::plan::RelationId;
use crate::tick::Hold;
use crate::time::Tick;

/// Whether an order changed anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Changed {
    Yes,
    /// It was so already.
    No,
}

enum Kind {
    View,
    Sink(Arc<super::sinks::SinkStatus>),
}

impl Engine {
    /// Pauses a view or a sink; durable when it returns for a view. The caller keeps what is paused of
    /// sinks.
    pub async fn pause(&self, id: RelationId) -> Result<Changed> {
        match self.pausable(id)? {
            Kind::View if self.is_held(id) => Ok(Changed::No),
            Kind::View => {
                self.hold(id, true).await?;
                Ok(Changed::Yes)
            }
            Kind::Sink(status) => match status.paused.swap(true, Ordering::SeqCst) {
                true => Ok(Changed::No),
                false => Ok(Changed::Yes),
            },
        }
    }

    /// Lets a view or a sink go on that was paused or has failed.
    pub async fn resume(&self, id: RelationId) -> Result<Changed> {
        let kind = self.pausable(id)?;
        let mut changed = Changed::No;
        lock(&self.inner.failed).remove(&id);
        if self.is_held(id) {
            self.hold(id, false).await?;
            changed = Changed::Yes;
        }
        if let Kind::Sink(status) = kind {
            let failed = status.failed.swap(false, Ordering::SeqCst);
            if status.paused.swap(false, Ordering::SeqCst) || failed {
                changed = Changed::Yes;
            }
            // What waits is committed with the next epoch.
            status.fresh.store(true, Ordering::SeqCst);
        }
        Ok(changed)
    }

    /// Whether only a start of the engine can try it again: it was not started at all, or is a sink whose
    /// destination is to be looked at again.
    pub fn starts_anew(&self, id: RelationId) -> bool {
        match lock(&self.inner.items).get(&id) {
            Some(Running::Failed { .. }) => true,
            Some(Running::Sink { .. }) => {
                let failed = lock(&self.inner.failed);
                failed
                    .get(&id)
                    .is_some_and(|e| e.kind != ErrorKind::Internal)
            }
            _ => false,
        }
    }

    /// Whether [`Self::set_commit_interval`] would be done at the moment.
    pub fn takes_commit_interval(&self, id: RelationId) -> Result<()> {
        self.commits(id).map(|_| ())
    }

    /// How often a sink commits; `None`: as often as the data plane says.
    pub fn set_commit_interval(&self, id: RelationId, interval: Option<Duration>) -> Result<()> {
        self.commits(id)?.interval.send_replace(interval);
        Ok(())
    }

    fn commits(&self, id: RelationId) -> Result<Arc<super::sinks::SinkStatus>> {
        match self.pausable(id)? {
            Kind::Sink(status) => Ok(status),
            Kind::View => Err(Error::internal("a view commits nothing")),
        }
    }

    /// How often checkpoints are taken and sinks commit that do not say it themselves.
    pub fn set_intervals(&self, checkpoint: Option<Duration>, commit: Option<Duration>) {
        self.inner.shared.settings.send_modify(|settings| {
            *settings = Settings {
                checkpoint_interval: checkpoint.unwrap_or(settings.checkpoint_interval),
                commit_interval: commit.unwrap_or(settings.commit_interval),
            };
        });
    }

    /// As they are now.
    pub fn intervals(&self) -> Settings {
        *self.inner.shared.settings.borrow()
    }

    /// Relations that are paused or have failed, as of the last tick.
    pub fn held(&self) -> Arc<BTreeMap<RelationId, Hold>> {
        Arc::clone(&lock(&self.inner.shared.held))
    }

    fn is_held(&self, id: RelationId) -> bool {
        self.held().contains_key(&id)
    }

    async fn hold(&self, relation: RelationId, hold: bool) -> Result<Tick> {
        let (done, held) = oneshot::channel();
        self.ask(Request::Hold {
            relation,
            hold,
            done,
        })?;
        let tick = held
            .await
            .map_err(|_| Error::unavailable("the engine has stopped"))??;
        self.wait_durable(tick).await?;
        Ok(tick)
    }

    fn pausable(&self, id: RelationId) -> Result<Kind> {
        let busy = || {
            Error::new(ErrorKind::Conflict, "it still reads its history")
                .code("55006")
                .hint("try again once it is running, or drop it")
        };
        match lock(&self.inner.items).get(&id) {
            Some(Running::View { ready, .. }) if *ready.borrow() => Ok(Kind::View),
            Some(Running::Sink {
                status, confirmed, ..
            }) if *confirmed.borrow() => Ok(Kind::Sink(Arc::clone(status))),
            Some(Running::View { .. } | Running::Sink { .. }) => Err(busy()),
            Some(Running::Failed { error, .. }) => Err(error.clone()),
            Some(Running::Source { .. }) | None => {
                Err(Error::new(ErrorKind::NotFound, "the relation does not run").code("42P01"))
            }
        }
    }
}
