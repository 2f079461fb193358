//! `KeyedState`: the one state under every operator, served view and sink.
//!
//! ```text
//! KeyedState ── 256 key groups ── index (tag, address) ── Arc<Page> ── slots ── key ++ value
//! ```
//!
//! # Contract
//!
//! * The caller gives the hash of each key, always by the same function of the key's columns (see
//!   [`crate::key`]); the key group follows from it.
//! * [`KeyedState::freeze`] copies no row: the pages are shared and copied when written to.
//! * State is *plain* (one row per key), *chained* (a multiset of rows per key) or *growing* (the same
//!   for rows that only come) from its creation;
//!   calling the methods of the other kind is a bug.
//! * A row's place says nothing: no caller may depend on the order of rows.
//! * Under a [`Pager`] pages come into memory when they are used and leave it in
//!   [`KeyedState::relieve`] only: who touches many rows calls that every few of them.

mod batch;
mod blob;
mod codec;
mod frozen;
mod group;
mod held;
mod index;
mod page;
mod pager;
mod snapshot;
mod swap;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use batch::HeldBatch;
pub use blob::Blob;
pub use codec::{
    Block, Part, PartData, StoredData, StoredPart, read_part, read_part_of, write_batches,
    write_keyed, write_meta, write_part,
};
pub use frozen::{Frozen, LoadedRows, StateRow};
pub use group::Chain;
pub use pager::{Pager, PagerStats};
pub use snapshot::Snapshot;

use crate::error::Result;
use crate::key::{GROUPS, key_group};
use frozen::FrozenGroup;
use group::Group;
pub(crate) use pager::Account;
#[cfg(test)]
pub(crate) use pager::testing;

/// What a checkpoint needs from whoever holds state.
pub trait Stateful {
    /// The state as it is now. Cheap: it is called between two ticks.
    fn freeze(&mut self) -> Vec<Part>;
    /// Takes over its share of what the workers of an earlier run froze: the parts of all of them, in
    /// the same order on every worker. The state must be new.
    fn restore(&mut self, parts: &[StoredPart]) -> Result<()>;
    /// Rows held.
    fn rows(&self) -> u64;
    /// Memory held, roughly.
    fn bytes(&self) -> u64;
    /// Bytes that are in the swap file only, roughly.
    fn swapped_bytes(&self) -> u64 {
        0
    }
    /// Puts out what was not used lately, if more is in memory than wanted.
    fn relieve(&mut self) {}
}

/// Names a row until it is removed or its value changes its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowId {
    group: u8,
    address: u32,
}

/// What [`KeyedState::update`] does to a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Keep,
    Put(Vec<u8>),
    Remove,
}

/// Rows by key. See the module contract.
#[derive(Debug)]
pub struct KeyedState {
    /// Empty until the first row, then one per key group.
    groups: Vec<Option<Box<Group>>>,
    kind: Kind,
    /// Of [`Snapshot`]; zero until the first one.
    generation: u64,
    snapshots: u64,
    /// Rows for which a new key group has room.
    expected: u32,
    account: Arc<Account>,
    /// The clock's hand: the key group that it looks at next.
    hand: u8,
}

impl Default for KeyedState {
    fn default() -> Self {
        Self {
            groups: Vec::new(),
            kind: Kind::Plain,
            generation: 0,
            snapshots: 0,
            expected: 0,
            account: Account::open(),
            hand: 0,
        }
    }
}

/// What a key has. See the module contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Chained,
    Growing,
}

impl Kind {
    fn is_chained(self) -> bool {
        self != Self::Plain
    }
}

impl KeyedState {
    /// One row per key.
    pub fn plain() -> Self {
        Self::default()
    }

    /// One row per key, about `rows` of them in all. A little room saves growing into it; of many rows
    /// each group still grows by itself, since they may not come.
    pub fn plain_for(rows: u64) -> Self {
        const MOST: u64 = 32;
        Self {
            expected: (rows / GROUPS as u64).min(MOST) as u32,
            ..Self::default()
        }
    }

    /// A multiset of rows per key.
    pub fn chained() -> Self {
        Self {
            kind: Kind::Chained,
            ..Self::default()
        }
    }

    /// A multiset of rows per key from which nothing is taken out: cheaper to fill. A retraction is
    /// kept beside what it retracts.
    pub fn growing() -> Self {
        Self {
            kind: Kind::Growing,
            ..Self::default()
        }
    }

    pub fn len(&self) -> u64 {
        self.live().map(|(_, group)| group.rows()).sum()
    }
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Memory held, roughly, with what readers of earlier contents keep there.
    pub fn bytes(&self) -> u64 {
        self.account.resident()
    }
    /// Bytes in the swap file, roughly.
    pub fn swapped_bytes(&self) -> u64 {
        self.account.swapped()
    }

    /// More is in memory than wanted: whoever holds references to rows ought to let go of them soon.
    #[inline]
    pub fn is_over(&self) -> bool {
        self.account.is_over()
    }

    /// Puts out pages that were not used lately, if more is in memory than wanted.
    #[inline]
    pub fn relieve(&mut self) {
        if self.is_over() {
            self.put_out();
        }
    }

    #[cold]
    fn put_out(&mut self) {
        let due = self.account.due();
        let mut freed = 0;
        // In the first round pages used lately get a second chance, in the second none is left.
        for _ in 0..2 * self.groups.len() {
            if freed >= due {
                return;
            }
            let group = self.groups.get_mut(usize::from(self.hand));
            if let Some(group) = group.and_then(Option::as_deref_mut) {
                freed += group.put_out(due - freed);
            }
            self.hand = self.hand.wrapping_add(1);
        }
    }

    /// Forgets every row.
    pub fn clear(&mut self) {
        self.groups.clear();
        // What snapshots said of these places is over.
        self.generation = 0;
    }

    fn live(&self) -> impl Iterator<Item = (u8, &Group)> {
        let groups = self.groups.iter().enumerate();
        groups.filter_map(|(number, group)| Some((number as u8, &**group.as_ref()?)))
    }
    #[inline]
    fn group(&self, number: u8) -> Option<&Group> {
        self.groups.get(usize::from(number))?.as_deref()
    }
    #[inline]
    fn group_mut(&mut self, number: u8) -> &mut Group {
        if self.groups.is_empty() {
            self.groups.resize_with(GROUPS, || None);
        }
        let (kind, expected) = (self.kind, self.expected);
        let account = &self.account;
        self.groups[usize::from(number)]
            .get_or_insert_with(|| Box::new(Group::new(kind, expected, Arc::clone(account))))
    }

    /// The value of a key.
    #[inline]
    pub fn get(&self, hash: u64, key: &[u8]) -> Option<&[u8]> {
        let group = self.group(key_group(hash))?;
        group.find(hash, key).map(|address| group.value(address))
    }

    /// The value of a key for writing; its length stays.
    #[inline]
    pub fn get_mut(&mut self, hash: u64, key: &[u8]) -> Option<&mut [u8]> {
        let group = self
            .groups
            .get_mut(usize::from(key_group(hash)))?
            .as_deref_mut()?;
        let address = group.find(hash, key)?;
        Some(group.value_mut(address))
    }

    /// Brings what rows with these hashes touch into the cache; worth it before many lookups.
    #[inline]
    pub fn warm(&self, hashes: impl Iterator<Item = u64>) {
        let read = hashes.fold(0, |read, hash| match self.group(key_group(hash)) {
            Some(group) => read ^ group.warm(hash),
            None => read,
        });
        std::hint::black_box(read);
    }

    /// The value of a key for writing, `initial` where there was none; whether it is new.
    #[inline]
    pub fn entry(&mut self, hash: u64, key: &[u8], initial: &[u8]) -> (RowId, &mut [u8], bool) {
        debug_assert!(!self.kind.is_chained());
        let number = key_group(hash);
        let group = self.group_mut(number);
        let (address, new) = match group.find(hash, key) {
            Some(address) => (address, false),
            None => (group.insert(hash, key, initial), true),
        };
        let id = RowId {
            group: number,
            address,
        };
        (id, group.value_mut(address), new)
    }

    /// Sets the value of a key.
    pub fn upsert(&mut self, hash: u64, key: &[u8], value: &[u8]) {
        debug_assert!(!self.kind.is_chained());
        let group = self.group_mut(key_group(hash));
        match group.find(hash, key) {
            Some(address) => {
                group.replace(address, hash, key, value);
            }
            None => {
                group.insert(hash, key, value);
            }
        }
    }

    /// Removes a key; whether it was there.
    pub fn remove(&mut self, hash: u64, key: &[u8]) -> bool {
        debug_assert!(!self.kind.is_chained());
        let number = usize::from(key_group(hash));
        let Some(group) = self.groups.get_mut(number).and_then(Option::as_deref_mut) else {
            return false;
        };
        match group.find(hash, key) {
            Some(address) => {
                group.remove(address, hash);
                true
            }
            None => false,
        }
    }

    /// Changes the row of a key by what it is now.
    pub fn update(&mut self, hash: u64, key: &[u8], change: impl FnOnce(Option<&[u8]>) -> Change) {
        debug_assert!(!self.kind.is_chained());
        let group = self.group_mut(key_group(hash));
        let found = group.find(hash, key);
        match (change(found.map(|address| group.value(address))), found) {
            (Change::Put(value), Some(address)) => {
                group.replace(address, hash, key, &value);
            }
            (Change::Put(value), None) => {
                group.insert(hash, key, &value);
            }
            (Change::Remove, Some(address)) => group.remove(address, hash),
            (Change::Keep, _) | (Change::Remove, None) => {}
        }
    }

    /// Finds a row for repeated use.
    #[inline]
    pub fn locate(&self, hash: u64, key: &[u8]) -> Option<RowId> {
        let number = key_group(hash);
        let address = self.group(number)?.find(hash, key)?;
        Some(RowId {
            group: number,
            address,
        })
    }

    /// The row that has this id now.
    #[inline]
    pub fn row(&self, id: RowId) -> Option<StateRow<'_>> {
        self.group(id.group)?.row(id.address)
    }

    /// The value of a located row for writing; its length stays.
    #[inline]
    pub fn value_mut(&mut self, id: RowId) -> &mut [u8] {
        self.group_mut(id.group).value_mut(id.address)
    }

    /// Sets the value of a located row; gives its id from now on.
    pub fn replace(&mut self, id: RowId, hash: u64, key: &[u8], value: &[u8]) -> RowId {
        let address = self
            .group_mut(id.group)
            .replace(id.address, hash, key, value);
        RowId { address, ..id }
    }

    /// Removes a located row.
    pub fn remove_located(&mut self, id: RowId, hash: u64) {
        debug_assert!(!self.kind.is_chained());
        self.group_mut(id.group).remove(id.address, hash);
    }

    /// Chained: adds `diff` to the multiplicity of `row` under `key`; gives the new multiplicity, at
    /// zero the row is gone (growing state only adds an entry and gives `diff`). Negative ones are kept: the insertion may come in a later tick.
    pub fn add_row(&mut self, hash: u64, key: &[u8], row: &[u8], diff: i64) -> i64 {
        debug_assert!(self.kind.is_chained());
        self.group_mut(key_group(hash))
            .add_row(hash, key, row, diff)
    }

    /// Chained: the rows of a key with their multiplicities.
    #[inline]
    pub fn rows_of(&self, hash: u64, key: &[u8]) -> Chain<'_> {
        match self.group(key_group(hash)) {
            Some(group) => group.chain(group.find(hash, key)),
            None => Chain::empty(),
        }
    }

    /// The rows of one key group; chained values begin with the multiplicity.
    pub fn rows_of_group(&self, group: u8) -> impl Iterator<Item = StateRow<'_>> {
        self.group(group).into_iter().flat_map(Group::iter)
    }

    /// The rows as they are now, unchanged by later writes. Shares the pages, copies no row.
    pub fn freeze(&self) -> Frozen {
        let filled = self.live().filter(|(_, group)| group.rows() > 0);
        let groups = filled.map(|(number, group)| FrozenGroup {
            group: number,
            rows: group.rows(),
            pages: group.pages().filter(|page| page.rows() > 0).collect(),
        });
        Frozen {
            groups: groups.collect(),
            chained: self.kind.is_chained(),
        }
    }

    /// Rows written or removed since the last [`Self::snapshot`].
    pub fn dirty_rows(&self) -> u64 {
        self.live().map(|(_, group)| group.dirty_rows()).sum()
    }
    /// The rows as they are now and which of them are new, for a checkpoint. Shares the pages, copies
    /// no row.
    pub fn snapshot(&mut self) -> Snapshot {
        static GENERATIONS: AtomicU64 = AtomicU64::new(1);
        if self.generation == 0 {
            self.generation = GENERATIONS.fetch_add(1, Ordering::Relaxed);
            self.snapshots = 0;
        }
        self.snapshots += 1;
        let groups = self.groups.iter_mut().enumerate();
        let groups =
            groups.filter_map(|(number, group)| Some(group.as_deref_mut()?.snapshot(number as u8)));
        Snapshot {
            generation: self.generation,
            number: self.snapshots,
            chained: self.kind.is_chained(),
            groups: groups.collect(),
        }
    }

    /// Adds rows that were frozen.
    pub fn restore<'a>(&mut self, rows: impl IntoIterator<Item = StateRow<'a>>) {
        for (hash, key, value) in rows {
            if self.kind.is_chained() {
                self.add_row(hash, key, &value[8..], group::multiplicity(value));
            } else {
                self.upsert(hash, key, value);
            }
        }
    }

    /// Adds the rows of the groups `owned` of a stored part.
    pub fn restore_part(&mut self, part: &StoredPart, owned: &Range<u16>) -> Result<()> {
        part.each_group(self.kind.is_chained(), owned, |rows| {
            self.restore(rows);
            self.relieve();
        })
    }
}

#[cfg(test)]
mod tests;
