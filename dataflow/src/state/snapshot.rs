//! Keyed state at a checkpoint: all pages, and which of their rows were written since the last one.

use super::held::PageRef;
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
    pub page: PageRef,
    /// One bit per slot written since the snapshot before.
    pub dirty: Vec<u64>,
}

/// A row's place and what is there: hash, key and value, or nothing any more.
pub(super) type Slot<'a> = (u32, u32, Option<(u64, &'a [u8], &'a [u8])>);

impl Snapshot {
    /// Of each key group: its number, its rows, and how many were written since the snapshot before.
    pub fn uses(&self) -> impl Iterator<Item = (u8, u64, u64)> {
        self.groups.iter().map(|group| {
            let rows = group.pages.iter().map(|page| page.page.rows() as u64).sum();
            let words = group.pages.iter().flat_map(|page| &page.dirty);
            let written = words.map(|word| u64::from(word.count_ones())).sum();
            (group.group, rows, written)
        })
    }
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

impl SnapshotPage {
    /// There is something to write: a row, or only a change.
    pub(super) fn has(&self, changes_only: bool) -> bool {
        if changes_only {
            self.dirty.iter().any(|word| *word != 0)
        } else {
            self.page.rows() > 0
        }
    }
    /// All rows of `page`, which is this page in memory, with their places.
    pub(super) fn all(page: &Page, number: u32) -> impl Iterator<Item = Slot<'_>> {
        let slots = page.live_slots();
        slots.map(move |slot| (number, slot, Some(page.stored(slot))))
    }
    /// What was written since the snapshot before.
    pub(super) fn changed<'a>(
        &'a self,
        page: &'a Page,
        number: u32,
    ) -> impl Iterator<Item = Slot<'a>> {
        ones(&self.dirty).map(move |slot| {
            let row = page.is_live(slot).then(|| page.stored(slot));
            (number, slot, row)
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
