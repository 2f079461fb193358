//! Which relations are held in a tick: see [`crate::tick::Hold`].

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Minter;
use crate::ingest::lock;
use crate::plan::RelationId;
use crate::remap::Binding;
use crate::tick::Hold;
use crate::time::Tick;

impl Minter {
    /// Holds as the checkpoint has them.
    pub fn restore_holds(&mut self, held: &BTreeMap<RelationId, Hold>) {
        self.held = Arc::new(held.clone());
        *lock(&self.shared.held) = Arc::clone(&self.held);
    }

    /// Relations that are held as of the last tick.
    pub fn held(&self) -> &BTreeMap<RelationId, Hold> {
        &self.held
    }

    /// Ends holds of a failure that is over, with the next tick.
    pub fn release(&mut self, relation: RelationId) {
        self.holding.push((relation, false, None));
    }

    /// What is held from `tick` on. Before the tick's own watermarks are known.
    pub(super) fn change_holds(&mut self, tick: Tick) {
        let mut changes = std::mem::take(&mut self.holding);
        for (relation, at) in &self.failing {
            let held = self.held.get(relation);
            if tick >= *at && held.is_none() {
                changes.push((*relation, true, None));
            }
        }
        for (relation, hold, done) in changes {
            let failed = self.failing.get(&relation).is_some_and(|at| tick >= *at);
            if hold {
                let watermarks = self.watermarks();
                let hold = Hold {
                    since: tick,
                    watermarks,
                    failed,
                };
                Arc::make_mut(&mut self.held)
                    .entry(relation)
                    .or_insert(hold);
            } else {
                self.failing.remove(&relation);
                if self.held.contains_key(&relation) {
                    Arc::make_mut(&mut self.held).remove(&relation);
                }
            }
            if let Some(done) = done {
                // Whoever asked may have gone away; it holds all the same.
                let _ = done.send(Ok(tick));
            }
        }
        *lock(&self.shared.held) = Arc::clone(&self.held);
    }

    /// What was held in a tick that is replayed, and what is held in it now because it fails.
    pub(super) fn repeat_holds(&mut self, binding: &Binding) {
        let mut held = binding.held.clone();
        for (relation, hold) in self.held.iter() {
            // It fails in a tick that was not held then.
            if self
                .failing
                .get(relation)
                .is_some_and(|at| binding.tick >= *at)
            {
                held.entry(*relation).or_insert_with(|| hold.clone());
            }
        }
        if *self.held != held {
            self.held = Arc::new(held);
        }
    }

    /// What is to be held, or no longer, once the ticks are live.
    pub(super) fn settle_holds(&mut self) {
        let next = self.last + 1;
        // A tick that is in no binding was shown to nobody, and is not minted again.
        self.failing
            .values_mut()
            .for_each(|at| *at = (*at).min(next));
        let over = |(id, hold): (&RelationId, &Hold)| {
            (hold.failed && !self.failing.contains_key(id)).then_some(*id)
        };
        let over: Vec<RelationId> = self.held.iter().filter_map(over).collect();
        for relation in over {
            self.release(relation);
        }
    }
}
