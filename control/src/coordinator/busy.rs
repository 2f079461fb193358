//! Objects whose history is being read. Their statements do not hold the writer's lock meanwhile, which
//! may be long.
//!
//! # Contract
//!
//! * Claims are made, and what they say is checked, under the writer's lock.
//! * Nobody else creates, replaces or drops what is claimed, and what a claim reads is neither dropped nor
//!   replaced. What is being replaced gets no new readers: whether all of them can follow was asked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use millrace_dataflow::error::{Error, ErrorKind, Result};
use tokio::sync::watch;

/// All claims. See the module.
#[derive(Debug)]
pub(super) struct Busy {
    claims: Mutex<BTreeMap<String, Work>>,
    changed: watch::Sender<()>,
}

#[derive(Debug)]
struct Work {
    replaces: bool,
    reads: BTreeSet<String>,
}

/// A name is claimed until this is dropped.
#[derive(Debug)]
pub(super) struct Claim {
    busy: Arc<Busy>,
    name: String,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.busy.claims().remove(&self.name);
        self.busy.changed.send_replace(());
    }
}

impl Work {
    fn verb(&self) -> &'static str {
        if self.replaces { "replaced" } else { "created" }
    }
}

/// PostgreSQL's `object_in_use`.
fn in_use(text: String, name: &str) -> Error {
    Error::new(ErrorKind::Conflict, text)
        .code("55006")
        .hint(format!(
            "wait for it; SHOW BACKFILLS tells how far it is, and while it reads or follows, \
             CANCEL BACKFILL \"{name}\" calls it off"
        ))
}

impl Default for Busy {
    fn default() -> Self {
        Self {
            claims: Mutex::default(),
            changed: watch::channel(()).0,
        }
    }
}

impl Busy {
    fn claims(&self) -> MutexGuard<'_, BTreeMap<String, Work>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims `name`, which is free.
    pub(super) fn claim(self: &Arc<Self>, name: &str, replaces: bool, reads: &[String]) -> Claim {
        let work = Work {
            replaces,
            reads: reads.iter().cloned().collect(),
        };
        self.claims().insert(name.to_string(), work);
        Claim {
            busy: Arc::clone(self),
            name: name.to_string(),
        }
    }

    /// Refuses to change what is claimed, or what a claim reads.
    pub(super) fn check_free<'a>(&self, names: impl Iterator<Item = &'a String>) -> Result<()> {
        let claims = self.claims();
        for name in names {
            if let Some(work) = claims.get(name) {
                return Err(in_use(format!("\"{name}\" is being {}", work.verb()), name));
            }
            if let Some((other, work)) = claims.iter().find(|(_, w)| w.reads.contains(name)) {
                return Err(in_use(
                    format!(
                        "\"{name}\" is used by \"{other}\", which is being {}",
                        work.verb()
                    ),
                    other,
                ));
            }
        }
        Ok(())
    }

    /// Refuses to read, directly or not, what is being replaced.
    pub(super) fn check_readable(&self, upstream: &BTreeSet<String>) -> Result<()> {
        let claims = self.claims();
        match upstream
            .iter()
            .find(|name| claims.get(*name).is_some_and(|w| w.replaces))
        {
            Some(name) => Err(in_use(format!("\"{name}\" is being replaced"), name)),
            None => Ok(()),
        }
    }

    /// Returns once nobody claims `name`.
    pub(super) async fn ended(&self, name: &str) {
        let mut changed = self.changed.subscribe();
        while self.claims().contains_key(name) {
            // The sender lives as long as we do.
            let _ = changed.changed().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_claimed_and_what_it_reads_stay() {
        let busy = Arc::new(Busy::default());
        let name = |n: &str| n.to_string();
        let refused = |names: &[String]| busy.check_free(names.iter()).map_err(|e| e.code);
        let claim = busy.claim("v", true, &[name("s")]);
        assert_eq!(refused(&[name("v")]), Err("55006"));
        assert_eq!(refused(&[name("s")]), Err("55006"));
        assert_eq!(refused(&[name("other")]), Ok(()));
        assert!(busy.check_readable(&BTreeSet::from([name("v")])).is_err());
        busy.check_readable(&BTreeSet::from([name("s")]))
            .expect("it may be read");
        drop(claim);
        busy.ended("v").await;
        assert_eq!(refused(&[name("v"), name("s")]), Ok(()));
    }
}
