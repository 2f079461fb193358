//! A page: about 16 KB of rows, the unit of copy-on-write and of paging.
//!
//! A row is a head (hash, lengths, links), key and value, all in one place, so that reading it touches
//! memory once. It is found by its slot, which keeps its number while the row lives; the bytes may
//! move when the page is compacted.

use std::sync::Arc;

use super::pager::{Account, Charge};
use crate::error::{Error, Result};

/// Bytes of rows a page takes before the next one is begun; a larger row has a page of its own.
pub(super) const PAGE_BYTES: usize = 16 * 1024;
/// A slot number takes 12 of the 32 bits of a row's address.
pub(super) const SLOT_BITS: u32 = 12;
pub(super) const PAGE_SLOTS: usize = 1 << SLOT_BITS;

/// No row: the end of a chain, or a slot that is free.
pub(super) const NONE: u32 = u32::MAX;

/// hash u64, key length u32, value length u32
const HEAD: usize = 16;
/// In chained state, then: next u32, previous u32.
const LINKS: usize = 8;

/// How a chained row hangs together with its neighbours; addresses within the group.
#[derive(Debug, Clone, Copy)]
pub(super) struct Links {
    pub next: u32,
    pub prev: u32,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Page {
    /// Where each row begins in `data`; [`NONE`] when the slot is free.
    slots: Vec<u32>,
    data: Vec<u8>,
    free: Vec<u16>,
    /// Bytes of `data` that belong to rows.
    live: usize,
    chained: bool,
    charge: Charge,
}

/// Bytes in front of a row's key.
#[inline]
pub(super) fn head(chained: bool) -> usize {
    if chained { HEAD + LINKS } else { HEAD }
}

#[inline]
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

impl Page {
    /// A page with room for `rows` rows of `bytes` in all from the start.
    pub(super) fn new(
        account: Option<&Arc<Account>>,
        chained: bool,
        rows: usize,
        bytes: usize,
    ) -> Self {
        let mut page = Self {
            chained,
            slots: Vec::with_capacity(rows),
            data: Vec::with_capacity(bytes),
            charge: Charge::new(account.cloned()),
            ..Self::default()
        };
        page.charge.set(page.bytes());
        page
    }
    pub(super) fn rows(&self) -> usize {
        self.slots.len() - self.free.len()
    }
    pub(super) fn garbage(&self) -> usize {
        self.data.len() - self.live
    }
    /// Memory held, roughly.
    pub(super) fn bytes(&self) -> usize {
        self.data.capacity() + self.slots.capacity() * 4 + self.free.capacity() * 2
    }
    #[inline]
    fn head(&self) -> usize {
        head(self.chained)
    }

    /// A row of `len` bytes fits without compaction.
    pub(super) fn fits(&self, len: usize) -> bool {
        (self.data.len() + self.head() + len <= PAGE_BYTES || self.data.is_empty())
            && (self.slots.len() < PAGE_SLOTS || !self.free.is_empty())
    }

    /// A row of `len` bytes would fit after compaction, and compaction is worth it.
    pub(super) fn fits_compacted(&self, len: usize) -> bool {
        self.garbage() >= PAGE_BYTES / 8
            && self.live + self.head() + len <= PAGE_BYTES
            && (self.slots.len() < PAGE_SLOTS || !self.free.is_empty())
    }

    /// Adds a row, its value in two pieces; the caller has asked [`Self::fits`].
    pub(super) fn insert(&mut self, hash: u64, key: &[u8], value: [&[u8]; 2]) -> u32 {
        let length = value[0].len() + value[1].len();
        let len = self.head() + key.len() + length;
        if self.data.len() + len > self.data.capacity() && self.garbage() > self.live {
            // Rather than growing around garbage: small groups stay small.
            self.compact();
        }
        let offset = self.data.len() as u32;
        self.data.extend_from_slice(&hash.to_le_bytes());
        self.data
            .extend_from_slice(&(key.len() as u32).to_le_bytes());
        self.data.extend_from_slice(&(length as u32).to_le_bytes());
        if self.chained {
            for link in [NONE, NONE] {
                self.data.extend_from_slice(&link.to_le_bytes());
            }
        }
        self.data.extend_from_slice(key);
        self.data.extend_from_slice(value[0]);
        self.data.extend_from_slice(value[1]);
        self.live += len;
        let slot = match self.free.pop() {
            Some(at) => {
                self.slots[usize::from(at)] = offset;
                u32::from(at)
            }
            None => {
                self.slots.push(offset);
                self.slots.len() as u32 - 1
            }
        };
        self.charge.set(self.bytes());
        slot
    }

    pub(super) fn remove(&mut self, slot: u32) {
        let offset = std::mem::replace(&mut self.slots[slot as usize], NONE);
        self.live -= self.len_at(offset);
        if self.free.len() + 1 == self.slots.len() {
            // Empty: give the memory back, the page itself will be filled again.
            *self = Self::new(self.charge.account(), self.chained, 0, 0);
        } else {
            self.free.push(slot as u16);
        }
    }

    /// Puts the rows close together again.
    pub(super) fn compact(&mut self) {
        let mut data = Vec::with_capacity(self.live + self.live / 2 + 64);
        for slot in 0..self.slots.len() {
            let from = self.slots[slot];
            if from != NONE {
                let len = self.len_at(from);
                self.slots[slot] = data.len() as u32;
                data.extend_from_slice(&self.data[from as usize..from as usize + len]);
            }
        }
        self.data = data;
        self.charge.set(self.bytes());
    }

    /// Appends the page as bytes, for the swap file.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        let counts = [
            self.slots.len(),
            self.free.len(),
            self.data.len(),
            self.live,
        ];
        for count in counts {
            out.extend_from_slice(&(count as u32).to_le_bytes());
        }
        out.push(u8::from(self.chained));
        for offset in &self.slots {
            out.extend_from_slice(&offset.to_le_bytes());
        }
        for slot in &self.free {
            out.extend_from_slice(&slot.to_le_bytes());
        }
        out.extend_from_slice(&self.data);
    }

    /// The page that [`Self::write`] wrote; the bytes are known to be whole.
    pub(super) fn read(account: Option<&Arc<Account>>, bytes: &[u8]) -> Result<Self> {
        let strange = || Error::internal("a page in the swap file has another form");
        let (head, rest) = bytes.split_at_checked(17).ok_or_else(strange)?;
        let count = |number: usize| word(head, number * 4) as usize;
        let (slots, rest) = rest.split_at_checked(count(0) * 4).ok_or_else(strange)?;
        let (free, data) = rest.split_at_checked(count(1) * 2).ok_or_else(strange)?;
        if data.len() != count(2) {
            return Err(strange());
        }
        let free = free.chunks_exact(2);
        let mut page = Self {
            slots: slots
                .chunks_exact(4)
                .map(|offset| word(offset, 0))
                .collect(),
            data: data.to_vec(),
            free: free
                .map(|slot| u16::from_le_bytes([slot[0], slot[1]]))
                .collect(),
            live: count(3),
            chained: head[16] != 0,
            charge: Charge::new(account.cloned()),
        };
        page.charge.set(page.bytes());
        Ok(page)
    }

    /// Length of the row that begins at `offset`.
    fn len_at(&self, offset: u32) -> usize {
        let row = &self.data[offset as usize..];
        self.head() + word(row, 8) as usize + word(row, 12) as usize
    }

    /// The bytes from a row's head on.
    #[inline]
    fn at(&self, slot: u32) -> &[u8] {
        &self.data[self.slots[slot as usize] as usize..]
    }
    /// A row lives in this slot.
    #[inline]
    pub(super) fn is_live(&self, slot: u32) -> bool {
        self.slots
            .get(slot as usize)
            .is_some_and(|offset| *offset != NONE)
    }
    #[inline]
    pub(super) fn hash(&self, slot: u32) -> u64 {
        u64::from_le_bytes(self.at(slot)[..8].try_into().expect("eight bytes"))
    }
    /// Key and value of a row.
    #[inline]
    pub(super) fn row(&self, slot: u32) -> (&[u8], &[u8]) {
        let row = self.at(slot);
        let (key, value) = (word(row, 8) as usize, word(row, 12) as usize);
        let head = self.head();
        row[head..head + key + value].split_at(key)
    }
    /// The row has this hash and key.
    #[inline]
    pub(super) fn is(&self, slot: u32, hash: u64, key: &[u8]) -> bool {
        let row = self.at(slot);
        let head = self.head();
        row[..8] == hash.to_le_bytes()
            && word(row, 8) as usize == key.len()
            && &row[head..head + key.len()] == key
    }
    #[inline]
    pub(super) fn value_mut(&mut self, slot: u32) -> &mut [u8] {
        let head = self.head();
        let row = &mut self.data[self.slots[slot as usize] as usize..];
        let (key, value) = (word(row, 8) as usize, word(row, 12) as usize);
        &mut row[head + key..head + key + value]
    }

    /// Links of a chained row.
    #[inline]
    pub(super) fn links(&self, slot: u32) -> Links {
        let row = self.at(slot);
        Links {
            next: word(row, HEAD),
            prev: word(row, HEAD + 4),
        }
    }
    pub(super) fn set_next(&mut self, slot: u32, next: u32) {
        self.set_word(slot, HEAD, next);
    }
    pub(super) fn set_prev(&mut self, slot: u32, prev: u32) {
        self.set_word(slot, HEAD + 4, prev);
    }
    fn set_word(&mut self, slot: u32, at: usize, word: u32) {
        debug_assert!(self.chained);
        let start = self.slots[slot as usize] as usize + at;
        self.data[start..start + 4].copy_from_slice(&word.to_le_bytes());
    }

    /// The slots that hold a row, ascending.
    pub(super) fn live_slots(&self) -> impl Iterator<Item = u32> {
        (0..self.slots.len() as u32).filter(|slot| self.is_live(*slot))
    }

    /// Hash, key and value of a slot that holds a row.
    pub(super) fn stored(&self, slot: u32) -> (u64, &[u8], &[u8]) {
        let (key, value) = self.row(slot);
        (self.hash(slot), key, value)
    }

    /// The rows that live here, in slot order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &[u8], &[u8])> {
        self.live_slots().map(|slot| self.stored(slot))
    }
}
