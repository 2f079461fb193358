//! One key group: an index of (tag, address) over pages of rows.
//!
//! A row's address is page number and slot. The index holds 32 bits of the hash beside the address,
//! so that a miss, and growing the index, touch no page, in memory or not.
//!
//! In *chained* state a key has many rows, linked through their slots, the index pointing at the first;
//! a second index finds one exact row by its own hash. A chained row's value begins with its
//! multiplicity, which is never zero. *Growing* state is chained without the second index: equal rows
//! stand side by side, and none is taken out.

use std::sync::Arc;

use super::Kind;
use super::held::{Held, PageRef};
use super::index::Index;
use super::page::{Links, NONE, PAGE_BYTES, Page, SLOT_BITS, head};
use super::pager::Account;
use super::snapshot::{SnapshotGroup, SnapshotPage};
use crate::key::hash_bytes;

#[derive(Debug)]
pub(super) struct Group {
    index: Index,
    /// Exact rows, in chained state only.
    exact: Index,
    pages: Vec<Held>,
    /// Pages with room, the last one is tried first.
    open: Vec<u32>,
    rows: u64,
    kind: Kind,
    /// Rows for which there is room from the start.
    expected: u32,
    account: Arc<Account>,
    /// The clock's hand: the page that it looks at next.
    hand: usize,
}

#[inline]
fn split(address: u32) -> (usize, u32) {
    (
        (address >> SLOT_BITS) as usize,
        address & ((1 << SLOT_BITS) - 1),
    )
}

#[inline]
fn page_at(pages: &[Held], address: u32) -> (&Page, u32) {
    let (page, slot) = split(address);
    (pages[page].page(), slot)
}

impl Group {
    pub(super) fn new(kind: Kind, expected: u32, account: Arc<Account>) -> Self {
        Self {
            index: Index::new(Some(&account), expected as usize),
            exact: Index::new(Some(&account), 0),
            pages: Vec::new(),
            open: Vec::new(),
            rows: 0,
            kind,
            expected,
            account,
            hand: 0,
        }
    }
    pub(super) fn rows(&self) -> u64 {
        self.rows
    }
    /// All rows.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &[u8], &[u8])> {
        self.pages.iter().flat_map(|held| held.page().iter())
    }
    /// The pages as they are now.
    pub(super) fn pages(&self) -> impl Iterator<Item = PageRef> {
        self.pages.iter().map(Held::now)
    }
    /// Rows written since the marks were last taken.
    pub(super) fn dirty_rows(&self) -> u64 {
        let bits = self.pages.iter().flat_map(Held::dirty);
        bits.map(|word| u64::from(word.count_ones())).sum()
    }
    /// All pages, with the marks since this was last called.
    pub(super) fn snapshot(&mut self, group: u8) -> SnapshotGroup {
        let pages = self.pages.iter_mut().map(|held| SnapshotPage {
            page: held.now_at_leisure(),
            dirty: held.take_dirty(),
        });
        SnapshotGroup {
            group,
            pages: pages.collect(),
        }
    }

    /// Puts out pages that were not used since the clock's hand last passed, until `bytes` are free or
    /// the hand is round; how many are.
    pub(super) fn put_out(&mut self, bytes: u64) -> u64 {
        let mut freed = 0;
        for _ in 0..self.pages.len() {
            if freed >= bytes {
                break;
            }
            self.hand = if self.hand >= self.pages.len() {
                0
            } else {
                self.hand
            };
            let held = &mut self.pages[self.hand];
            if held.is_cold() {
                freed += held.put_out(&self.account) as u64;
            }
            self.hand += 1;
        }
        freed
    }

    /// Address of the row of `key`; in chained state of the first one.
    #[inline]
    pub(super) fn find(&self, hash: u64, key: &[u8]) -> Option<u32> {
        let pages = &self.pages;
        self.index.find(hash as u32, |address| {
            let (page, slot) = page_at(pages, address);
            page.is(slot, hash, key)
        })
    }

    /// Reads a few bytes of the first row whose tag fits, so that they are in the cache when the row
    /// is wanted. The reads of many rows overlap, those of full lookups hardly.
    #[inline]
    pub(super) fn warm(&self, hash: u64) -> u64 {
        let Some(address) = self.index.find(hash as u32, |_| true) else {
            return 0;
        };
        let (page, slot) = split(address);
        self.pages[page]
            .resident()
            .map_or(0, |page| page.hash(slot))
    }

    /// Hash, key and value at an address, if a row lives there.
    #[inline]
    pub(super) fn row(&self, address: u32) -> Option<(u64, &[u8], &[u8])> {
        let (page, slot) = split(address);
        let page = self.pages.get(page)?.page();
        if !page.is_live(slot) {
            return None;
        }
        let (key, value) = page.row(slot);
        Some((page.hash(slot), key, value))
    }

    #[inline]
    pub(super) fn value(&self, address: u32) -> &[u8] {
        let (page, slot) = page_at(&self.pages, address);
        page.row(slot).1
    }

    #[inline]
    pub(super) fn value_mut(&mut self, address: u32) -> &mut [u8] {
        let (page, slot) = split(address);
        let held = &mut self.pages[page];
        held.mark(slot);
        held.page_mut().value_mut(slot)
    }

    /// Adds a row of a key that has none.
    pub(super) fn insert(&mut self, hash: u64, key: &[u8], value: &[u8]) -> u32 {
        let address = self.place(hash, key, [value, &[]]);
        self.index.insert(hash as u32, address);
        address
    }

    /// Replaces a value; the address may change when the length does.
    pub(super) fn replace(&mut self, address: u32, hash: u64, key: &[u8], value: &[u8]) -> u32 {
        if self.value(address).len() == value.len() {
            self.value_mut(address).copy_from_slice(value);
            return address;
        }
        self.release(address);
        let moved = self.place(hash, key, [value, &[]]);
        self.index.repoint(hash as u32, address, moved);
        moved
    }

    /// Removes the only row of its key.
    pub(super) fn remove(&mut self, address: u32, hash: u64) {
        self.release(address);
        self.index.remove(hash as u32, address);
    }

    /// Puts the bytes of a row into a page with room.
    fn place(&mut self, hash: u64, key: &[u8], value: [&[u8]; 2]) -> u32 {
        let len = key.len() + value[0].len() + value[1].len();
        let number = loop {
            let Some(last) = self.open.last().copied() else {
                self.open.push(self.pages.len() as u32);
                self.add_page(len);
                continue;
            };
            let held = &mut self.pages[last as usize];
            if held.page().fits(len) {
                break last;
            }
            if held.page().fits_compacted(len) {
                held.page_mut().compact();
                break last;
            }
            if len > PAGE_BYTES / 4 && held.rows() > 0 {
                // A large row does not end a page that still has room for small ones.
                self.open.insert(0, self.pages.len() as u32);
                self.add_page(len);
                break self.open[0];
            }
            held.open = false;
            self.open.pop();
        };
        let held = &mut self.pages[number as usize];
        let slot = held.page_mut().insert(hash, key, value);
        held.mark(slot);
        self.rows += 1;
        number << SLOT_BITS | slot
    }

    /// An empty page, for a row of `len` bytes. The first of a group has room for the rows expected, the
    /// others will be filled.
    fn add_page(&mut self, len: usize) {
        let chained = self.kind.is_chained();
        let account = Some(&self.account);
        let page = if self.pages.is_empty() {
            let rows = self.expected as usize;
            let bytes = rows * (head(chained) + len);
            Page::new(account, chained, rows, bytes.min(PAGE_BYTES))
        } else {
            Page::new(account, chained, 0, PAGE_BYTES)
        };
        self.pages.push(Held::new(page));
    }

    /// Frees the bytes and the slot of a row.
    fn release(&mut self, address: u32) {
        let (number, slot) = split(address);
        let held = &mut self.pages[number];
        held.mark(slot);
        let page = held.page_mut();
        page.remove(slot);
        let has_room = page.rows() == 0 || page.garbage() >= PAGE_BYTES / 4;
        self.rows -= 1;
        if has_room && !held.open {
            held.open = true;
            self.open.push(number as u32);
        }
    }

    /// Adds `diff` to the multiplicity of a row of a key; gives the new one. Zero removes the row.
    pub(super) fn add_row(&mut self, hash: u64, key: &[u8], row: &[u8], diff: i64) -> i64 {
        if self.kind == Kind::Growing {
            self.append_row(hash, key, row, diff);
            return diff;
        }
        let tag = row_tag(hash, row);
        let pages = &self.pages;
        let found = self.exact.find(tag, |address| {
            let (page, slot) = page_at(pages, address);
            page.is(slot, hash, key) && &page.row(slot).1[8..] == row
        });
        let Some(address) = found else {
            self.link(hash, key, tag, row, diff);
            return diff;
        };
        let count = multiplicity(self.value(address)).wrapping_add(diff);
        if count == 0 {
            self.unlink(address, hash, tag);
        } else {
            self.value_mut(address)[..8].copy_from_slice(&count.to_le_bytes());
        }
        count
    }

    /// Puts a row in front of its chain. The old first row is not touched, so it does not know the new
    /// one: rows of growing state go only all together.
    fn append_row(&mut self, hash: u64, key: &[u8], row: &[u8], diff: i64) {
        let address = self.place(hash, key, [&diff.to_le_bytes(), row]);
        match self.find(hash, key) {
            Some(next) => {
                self.index.repoint(hash as u32, next, address);
                self.link_mut(address, |page, slot| page.set_next(slot, next));
            }
            None => self.index.insert(hash as u32, address),
        }
    }

    fn link(&mut self, hash: u64, key: &[u8], tag: u32, row: &[u8], diff: i64) {
        let first = self.find(hash, key);
        let address = self.place(hash, key, [&diff.to_le_bytes(), row]);
        match first {
            Some(first) => {
                self.link_mut(address, |page, slot| page.set_next(slot, first));
                self.link_mut(first, |page, slot| page.set_prev(slot, address));
                self.index.repoint(hash as u32, first, address);
            }
            None => self.index.insert(hash as u32, address),
        }
        self.exact.insert(tag, address);
    }

    fn unlink(&mut self, address: u32, hash: u64, tag: u32) {
        let (page, slot) = page_at(&self.pages, address);
        let Links { next, prev } = page.links(slot);
        if next != NONE {
            self.link_mut(next, |page, slot| page.set_prev(slot, prev));
        }
        if prev != NONE {
            self.link_mut(prev, |page, slot| page.set_next(slot, next));
        } else if next != NONE {
            self.index.repoint(hash as u32, address, next);
        } else {
            self.index.remove(hash as u32, address);
        }
        self.exact.remove(tag, address);
        self.release(address);
    }

    /// Changes links; these are not contents, so nothing becomes dirty.
    fn link_mut(&mut self, address: u32, change: impl FnOnce(&mut Page, u32)) {
        let (page, slot) = split(address);
        change(self.pages[page].page_mut(), slot);
    }

    /// Rows of a key with their multiplicities, beginning at an address from [`Self::find`].
    pub(super) fn chain(&self, first: Option<u32>) -> Chain<'_> {
        Chain {
            pages: &self.pages,
            next: first.unwrap_or(NONE),
        }
    }
}

/// Rows of one key. See [`Group::chain`].
#[derive(Debug)]
pub struct Chain<'a> {
    pages: &'a [Held],
    next: u32,
}

impl<'a> Chain<'a> {
    pub(super) fn empty() -> Self {
        Self {
            pages: &[],
            next: NONE,
        }
    }
}

impl<'a> Iterator for Chain<'a> {
    type Item = (&'a [u8], i64);
    fn next(&mut self) -> Option<Self::Item> {
        if self.next == NONE {
            return None;
        }
        let (page, slot) = page_at(self.pages, self.next);
        self.next = page.links(slot).next;
        let (_, value) = page.row(slot);
        Some((&value[8..], multiplicity(value)))
    }
}

/// Tag of an exact row. The key takes part: many keys may hold the same row.
fn row_tag(hash: u64, row: &[u8]) -> u32 {
    (hash_bytes(row) ^ hash.rotate_left(29)) as u32
}

/// The multiplicity at the front of a chained row's value.
pub(super) fn multiplicity(value: &[u8]) -> i64 {
    i64::from_le_bytes(
        value[..8]
            .try_into()
            .expect("a chained value begins with eight bytes"),
    )
}
