//! Keyed state at a checkpoint: all pages, and which of their rows were written since the last one.

use std::sync::Arc;

use super::page::Page;

/// Taken by [`super::KeyedState::snapshot`]: shares the pages, copies no row.
///
/// A reader that holds what snapshot number `n - 1` of the same `generation` said needs only the
/// changes of number `n`; any other needs all rows.
#[derive(Debug)]
pub struct Snapshot {
    /// Names the rows' places: changes when the state was emptied or built anew.
    pub generation: u64,
    /// Counts the snapshots of a generation, from 1.
    pub number: u64,
    pub(super) chained: bool,
    /// Ascending by group.
    pub(super) groups: Vec<SnapshotGroup>,
}

#[derive(Debug)]
pub(super) struct SnapshotGroup {
    pub group: u8,
    /// By page number; a page without rows has changes only.
    pub pages: Vec<SnapshotPage>,
}

#[derive(Debug)]
pub(super) struct SnapshotPage {
    pub page: Arc<Page>,
    /// One bit per slot written since the snapshot before.
    pub dirty: Vec<u64>,
}

/// A row's place and what is there: hash, key and value, or nothing any more.
pub(super) type Slot<'a> = (u32, u32, Option<(u64, &'a [u8], &'a [u8])>);

impl Snapshot {
    /// Rows written or removed since the snapshot before.
    pub fn changes(&self) -> u64 {
        let pages = self.groups.iter().flat_map(|group| &group.pages);
        let words = pages.flat_map(|page| &page.dirty);
        words.map(|word| u64::from(word.count_ones())).sum()
    }
    pub fn rows(&self) -> u64 {
        let pages = self.groups.iter().flat_map(|group| &group.pages);
        pages.map(|page| page.page.rows() as u64).sum()
    }
}

impl SnapshotGroup {
    /// All rows with their places.
    pub(super) fn all(&self) -> impl Iterator<Item = Slot<'_>> {
        self.pages.iter().enumerate().flat_map(|(number, held)| {
            held.page
                .live_slots()
                .map(move |slot| (number as u32, slot, Some(held.page.stored(slot))))
        })
    }
    /// What was written since the snapshot before.
    pub(super) fn changed(&self) -> impl Iterator<Item = Slot<'_>> {
        self.pages.iter().enumerate().flat_map(|(number, held)| {
            ones(&held.dirty).map(move |slot| {
                let row = held.page.is_live(slot).then(|| held.page.stored(slot));
                (number as u32, slot, row)
            })
        })
    }
}

/// Positions of the bits that are set.
fn ones(words: &[u64]) -> impl Iterator<Item = u32> {
    words.iter().enumerate().flat_map(|(index, word)| {
        let mut left = *word;
        std::iter::from_fn(move || {
            (left != 0).then(|| {
                let bit = left.trailing_zeros();
                left &= left - 1;
                index as u32 * 64 + bit
            })
        })
    })
}
