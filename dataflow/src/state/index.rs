//! The index of a key group: from a hash's tag to the addresses of rows.
//!
//! A sorted array with gaps: entries stand in the order of their spread tags, each at or a little after
//! the place that its tag asks for (linear probing that keeps the order). It may be filled to seven
//! eighths and grows by a quarter, so that an entry costs ten bytes and growing never needs the rows.

use std::sync::Arc;

use super::page::NONE;
use super::pager::{Account, Charge};

/// Nothing stands here. Its address is [`NONE`], which no row has.
const EMPTY: u64 = u64::MAX;
/// Places behind the last one that a tag asks for, at least.
const PAD: usize = 8;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// Spread tag, then address.
    entries: Vec<u64>,
    /// Places that tags ask for: the front of `entries`.
    places: usize,
    /// Places behind those.
    pad: usize,
    len: usize,
    charge: Charge,
}

/// A bijection whose upper bits depend on all bits of the tag.
#[inline]
fn spread(tag: u32) -> u32 {
    (tag ^ tag >> 15).wrapping_mul(0x9e37_79b1)
}

#[inline]
fn address(entry: u64) -> u32 {
    entry as u32
}

impl Index {
    /// An empty index with room for `expected` rows.
    pub(super) fn new(account: Option<&Arc<Account>>, expected: usize) -> Self {
        let mut index = Self {
            charge: Charge::fixed(account.cloned()),
            pad: PAD,
            ..Self::default()
        };
        if expected > 0 {
            index.rebuild(expected + expected / 4);
        }
        index
    }

    /// Memory held.
    pub(super) fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<u64>()
    }

    #[inline]
    fn place(&self, spread: u32) -> usize {
        ((u64::from(spread) * self.places as u64) >> 32) as usize
    }

    /// The address under this tag for which `is` holds.
    #[inline]
    pub(super) fn find(&self, tag: u32, mut is: impl FnMut(u32) -> bool) -> Option<u32> {
        self.position(tag, &mut is)
            .map(|at| address(self.entries[at]))
    }

    #[inline]
    fn position(&self, tag: u32, is: &mut impl FnMut(u32) -> bool) -> Option<usize> {
        let spread = spread(tag);
        let mut at = self.place(spread);
        // The last entry of a table that is not empty is always free, and larger than any tag.
        while let Some(entry) = self.entries.get(at).copied() {
            let have = (entry >> 32) as u32;
            if have >= spread {
                if have > spread || entry == EMPTY {
                    return None;
                }
                if is(address(entry)) {
                    return Some(at);
                }
            }
            at += 1;
        }
        None
    }

    /// Adds an address under a tag.
    pub(super) fn insert(&mut self, tag: u32, address: u32) {
        debug_assert_ne!(address, NONE);
        if self.len >= self.places - self.places / 8 {
            let more = (self.places / 4).max(8);
            self.rebuild(self.places + more);
        }
        let spread = spread(tag);
        let entry = u64::from(spread) << 32 | u64::from(address);
        while !self.put(self.place(spread), entry) {
            // A long run at the end has used up the places behind it.
            self.pad *= 2;
            self.rebuild(self.places);
        }
        self.len += 1;
    }

    /// Puts an entry into the run at a place; false when that would reach the end.
    fn put(&mut self, place: usize, entry: u64) -> bool {
        let mut at = place;
        while self.entries[at] < entry {
            at += 1;
        }
        let mut free = at;
        while self.entries[free] != EMPTY {
            free += 1;
        }
        if free + 1 >= self.entries.len() {
            return false;
        }
        self.entries.copy_within(at..free, at + 1);
        self.entries[at] = entry;
        true
    }

    /// Takes an address out.
    pub(super) fn remove(&mut self, tag: u32, address: u32) {
        let Some(at) = self.position(tag, &mut |have| have == address) else {
            return;
        };
        // What stands behind moves up, as long as that brings it nearer to its place.
        let mut end = at + 1;
        while self.entries[end] != EMPTY && self.place((self.entries[end] >> 32) as u32) < end {
            end += 1;
        }
        self.entries.copy_within(at + 1..end, at);
        self.entries[end - 1] = EMPTY;
        self.len -= 1;
    }

    /// Replaces an address that stands under a tag.
    pub(super) fn repoint(&mut self, tag: u32, from: u32, to: u32) {
        let Some(at) = self.position(tag, &mut |have| have == from) else {
            return;
        };
        let entry = u64::from(spread(tag)) << 32 | u64::from(to);
        let before = at.checked_sub(1).map(|at| self.entries[at]);
        let follows = before.is_none_or(|before| before == EMPTY || before < entry);
        if follows && self.entries[at + 1] > entry {
            self.entries[at] = entry;
        } else {
            // Others of the same tag stand between: they are in the order of their addresses.
            self.remove(tag, from);
            self.insert(tag, to);
        }
    }

    /// Gives every entry its place among `places`.
    fn rebuild(&mut self, places: usize) {
        let entries = loop {
            match self.spaced(places) {
                Some(entries) => break entries,
                None => self.pad *= 2,
            }
        };
        self.entries = entries;
        self.places = places;
        self.charge.set(self.bytes());
    }

    /// The entries at the places they ask for; `None` when they reach the end.
    fn spaced(&self, places: usize) -> Option<Vec<u64>> {
        let mut entries = vec![EMPTY; places + self.pad];
        let mut next = 0;
        for entry in self.entries.iter().filter(|entry| **entry != EMPTY) {
            let asked = (((entry >> 32) * places as u64) >> 32) as usize;
            let at = asked.max(next);
            if at + 1 >= entries.len() {
                return None;
            }
            entries[at] = *entry;
            next = at + 1;
        }
        Some(entries)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_a_set_of_tags_and_addresses(
            steps in prop::collection::vec((any::<bool>(), 0u32..40, 0u32..30), 0..600),
            wide in any::<bool>(),
        ) {
            let tag = |n: u32| if wide { n.wrapping_mul(0x0432_1567) } else { u32::MAX - n };
            let mut index = Index::new(None, 0);
            let mut model = BTreeSet::new();
            for (put, t, address) in steps {
                if put && model.insert((t, address)) {
                    index.insert(tag(t), address);
                } else if !put {
                    model.remove(&(t, address));
                    index.remove(tag(t), address);
                }
                prop_assert_eq!(index.len, model.len());
            }
            for t in 0..40 {
                let mut found = BTreeSet::new();
                index.find(tag(t), |address| {
                    found.insert((t, address));
                    false
                });
                let want: BTreeSet<_> = model.range((t, 0)..(t + 1, 0)).copied().collect();
                prop_assert_eq!(found, want);
            }
        }
    }

    #[test]
    fn an_entry_costs_about_ten_bytes() {
        let mut index = Index::new(None, 0);
        let mut most = 0.0_f64;
        for n in 0..200_000u32 {
            let tag = crate::key::hash_words(u64::from(n), 0) as u32;
            index.insert(tag, n);
            if n > 1000 {
                most = most.max(index.bytes() as f64 / f64::from(n + 1));
            }
        }
        assert!(most < 11.8, "{most}");
        for n in (0..200_000u32).step_by(97) {
            let tag = crate::key::hash_words(u64::from(n), 0) as u32;
            assert_eq!(index.find(tag, |address| address == n), Some(n));
            index.repoint(tag, n, n + 1_000_000);
            assert_eq!(index.find(tag, |address| address == n), None);
            assert_eq!(index.find(tag, |a| a == n + 1_000_000), Some(n + 1_000_000));
        }
    }
}
