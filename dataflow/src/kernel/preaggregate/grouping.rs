//! Groups of equal keys within a batch: the id of each row's group, the first row of each group.
//!
//! Up to three keys of 64 bits without nulls are compared as words; other keys as row bytes.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, TimestampMicrosecondArray};

use crate::key::{self, RowCodec, hash_words};

const EMPTY: u32 = u32::MAX;
const SMALLEST: usize = 1024;

/// Buffers are kept from batch to batch.
#[derive(Debug, Default)]
pub(super) struct Grouping {
    /// Open addressing: group ids.
    table: Vec<u32>,
    /// Words of the groups' keys.
    words: Vec<u64>,
    /// Hashes of the groups' keys.
    hashes: Vec<u64>,
    ids: Vec<u32>,
    first: Vec<u32>,
}

impl Grouping {
    pub(super) fn ids(&self) -> &[u32] {
        &self.ids
    }
    pub(super) fn first(&self) -> &[u32] {
        &self.first
    }

    /// Groups `rows` rows by `columns` and their panes; `codec` has the types of both.
    pub(super) fn assign(
        &mut self,
        codec: &RowCodec,
        columns: &[ArrayRef],
        panes: Option<&[i64]>,
        rows: usize,
    ) {
        self.ids.clear();
        self.ids.reserve(rows);
        self.first.clear();
        self.words.clear();
        self.hashes.clear();
        if columns.is_empty() && panes.is_none() {
            self.ids.resize(rows, 0);
            self.first.push(0);
            return;
        }
        self.table.clear();
        self.table.resize(SMALLEST, EMPTY);
        let words: Option<Vec<_>> = columns
            .iter()
            .map(|c| {
                if c.null_count() == 0 {
                    key::words(c)
                } else {
                    None
                }
            })
            .collect();
        match (words.as_deref(), panes) {
            (Some([]), Some(panes)) => self.by_words(rows, |row| [panes[row] as u64]),
            (Some([a]), None) => self.by_words(rows, |row| [a[row]]),
            (Some([a]), Some(panes)) => self.by_words(rows, |row| [a[row], panes[row] as u64]),
            (Some([a, b]), None) => self.by_words(rows, |row| [a[row], b[row]]),
            (Some([a, b]), Some(panes)) => {
                self.by_words(rows, |row| [a[row], b[row], panes[row] as u64]);
            }
            (Some([a, b, c]), None) => self.by_words(rows, |row| [a[row], b[row], c[row]]),
            _ => self.by_bytes(codec, columns, panes, rows),
        }
    }

    #[inline]
    fn by_words<const N: usize>(&mut self, rows: usize, key: impl Fn(usize) -> [u64; N]) {
        for row in 0..rows {
            let key = key(row);
            let hash = match N {
                1 => hash_words(key[0], 0),
                2 => hash_words(key[0], key[1]),
                _ => hash_words(hash_words(key[0], key[1]), key[2]),
            };
            let words = &self.words;
            let same = |group: usize| words[group * N..group * N + N] == key;
            let id = match self.find(hash, same) {
                Ok(id) => id,
                Err(slot) => {
                    self.words.extend_from_slice(&key);
                    self.add(slot, hash, row)
                }
            };
            self.ids.push(id);
        }
    }

    fn by_bytes(
        &mut self,
        codec: &RowCodec,
        columns: &[ArrayRef],
        panes: Option<&[i64]>,
        rows: usize,
    ) {
        let mut columns = columns.to_vec();
        if let Some(panes) = panes {
            columns.push(Arc::new(TimestampMicrosecondArray::from(panes.to_vec())));
        }
        let encoded = codec
            .encode(&columns, rows)
            .expect("the columns have the types of the plan");
        for row in 0..rows {
            let key = encoded.row(row);
            let hash = key::hash_bytes(key);
            let (hashes, first) = (&self.hashes, &self.first);
            let same =
                |group: usize| hashes[group] == hash && encoded.row(first[group] as usize) == key;
            let id = match self.find(hash, same) {
                Ok(id) => id,
                Err(slot) => self.add(slot, hash, row),
            };
            self.ids.push(id);
        }
    }

    /// The group, or the free slot for it.
    #[inline]
    fn find(&self, hash: u64, same: impl Fn(usize) -> bool) -> Result<u32, usize> {
        let mask = self.table.len() - 1;
        let mut slot = hash as usize & mask;
        loop {
            match self.table[slot] {
                EMPTY => return Err(slot),
                group if same(group as usize) => return Ok(group),
                _ => slot = (slot + 1) & mask,
            }
        }
    }

    fn add(&mut self, slot: usize, hash: u64, row: usize) -> u32 {
        let id = self.first.len() as u32;
        self.table[slot] = id;
        self.first.push(row as u32);
        self.hashes.push(hash);
        if self.first.len() * 2 > self.table.len() {
            let size = self.table.len() * 4;
            self.table.clear();
            self.table.resize(size, EMPTY);
            for (group, hash) in self.hashes.iter().enumerate() {
                let mut slot = *hash as usize & (size - 1);
                while self.table[slot] != EMPTY {
                    slot = (slot + 1) & (size - 1);
                }
                self.table[slot] = group as u32;
            }
        }
        id
    }
}
