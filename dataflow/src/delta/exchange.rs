//! Partitions deltas by the key group of their hashed key, one `take` per worker that gets rows.
//!
//! # Contract
//!
//! * Rows with equal keys meet on the worker that owns their key group (see [`crate::key`]).
//! * The number of rows is preserved and no empty delta is sent.

use std::sync::Arc;

use arrow::array::UInt32Array;
use timely::communication::Push;
use timely::dataflow::channels::Message;
use timely::dataflow::channels::pact::DistributorPact;
use timely::dataflow::channels::pushers::exchange::Distributor;

use super::Delta;
use crate::kernel::table::row_hashes;
use crate::key;

/// Which columns decide where a row goes.
#[derive(Debug, Clone)]
pub enum Route {
    /// By these columns. No columns: everything to the owner of the empty key.
    Columns(Vec<usize>),
    /// By the whole row.
    Row,
}

pub struct DeltaDistributor {
    route: Route,
    rows: Vec<Vec<u32>>,
}

impl Distributor<Delta> for DeltaDistributor {
    fn partition<T: Clone, P: Push<Message<T, Delta>>>(
        &mut self,
        container: &mut Delta,
        time: &T,
        pushers: &mut [P],
    ) {
        let delta = std::mem::take(container);
        let workers = pushers.len();
        let hashes = match &self.route {
            Route::Columns(columns) => {
                let columns: Vec<_> = columns
                    .iter()
                    .map(|c| Arc::clone(delta.batch.column(*c)))
                    .collect();
                key::hash_columns(&columns, delta.len())
            }
            Route::Row => row_hashes(&delta.batch),
        }
        .expect("the plan's key types can be hashed");
        for rows in &mut self.rows {
            rows.clear();
        }
        for (row, hash) in hashes.iter().enumerate() {
            self.rows[key::owner(key::key_group(*hash), workers)].push(row as u32);
        }
        for (worker, rows) in self.rows.iter_mut().enumerate() {
            if rows.is_empty() {
                continue;
            }
            let mut part = if rows.len() == delta.len() {
                delta.clone()
            } else {
                delta.take(&UInt32Array::from(std::mem::take(rows)))
            };
            Message::push_at(&mut part, time.clone(), &mut pushers[worker]);
        }
    }
    fn flush<T: Clone, P: Push<Message<T, Delta>>>(&mut self, _time: &T, _pushers: &mut [P]) {}
}

/// The pact of an edge that brings equal keys together.
pub fn exchange(route: Route) -> DistributorPact<impl FnOnce(usize) -> DeltaDistributor> {
    DistributorPact(move |peers: usize| DeltaDistributor {
        route,
        rows: vec![Vec::new(); peers],
    })
}
