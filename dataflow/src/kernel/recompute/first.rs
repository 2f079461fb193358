//! The first rows of each partition, apart from the rest.
//!
//! ```text
//! row of a tick ──► before the last of the front rows, or nothing behind them? ── yes ──► front
//!                                                                              └─ no ───► rest
//! front too short: the least rows of the rest move forward; too long: its last rows move back
//! ```
//!
//! Behind the rows that are asked for, the front holds some to spare, so that rows which leave it do
//! not make each tick read the rest: a change costs as much as the front is long, and once in as many
//! removals as there are spare rows, as the partition is.

use std::collections::{BTreeMap, BinaryHeap};

use super::{First, Place, Side};
use crate::error::Result;
use crate::kernel::OUTPUT_ROWS;
use crate::kernel::order::Time;
use crate::state::KeyedState;

type Tables = BTreeMap<Time, KeyedState>;

/// A row that comes or goes.
pub(super) struct News<'a> {
    pub place: Place<'a>,
    pub row: &'a [u8],
    pub diff: i64,
}

/// A stored row with what orders it.
type Ordered = (Box<[u8]>, Box<[u8]>, i64);

impl First {
    /// Rows that the front holds beyond those asked for.
    fn spare(&self) -> usize {
        self.rows.clamp(8, 4096)
    }
}

impl Side {
    /// Adds rows that are sorted by partition.
    pub(super) fn add_first(&mut self, first: First, news: &[News<'_>]) -> Result<()> {
        // In pieces, so that the first of many rows make a bound for the others.
        for news in news.chunks(OUTPUT_ROWS) {
            let same = |a: &News<'_>, b: &News<'_>| a.place.same(&b.place);
            let parts: Vec<&[News<'_>]> = news.chunk_by(same).collect();
            let forward = self.forward(first, &parts)?;
            for (news, forward) in news.iter().zip(forward) {
                let tables = match forward {
                    true => &mut self.tables,
                    false if first.growing => continue,
                    false => &mut self.rest,
                };
                let table = tables.entry(news.place.time);
                let table = table.or_insert_with(KeyedState::chained);
                table.add_row(news.place.hash, news.place.key, news.row, news.diff);
            }
            for part in parts {
                self.balance(first, &part[0].place)?;
            }
        }
        Ok(())
    }

    /// By row, in order: whether it belongs to the front.
    fn forward(&mut self, first: First, parts: &[&[News<'_>]]) -> Result<Vec<bool>> {
        let mut rows: Vec<&[u8]> = Vec::new();
        // Where the front of a partition begins among them, and its news.
        let mut bounded: Vec<Option<(usize, usize)>> = Vec::with_capacity(parts.len());
        for part in parts {
            let place = &part[0].place;
            let begin = rows.len();
            let mut there = 0usize;
            for (row, count) in rows_in(&self.tables, place) {
                rows.push(row);
                there = there.saturating_add(usize::try_from(count.max(0)).unwrap_or(usize::MAX));
            }
            let is_bounded = match first.growing {
                true => there >= first.rows,
                false => rows_in(&self.rest, place).next().is_some(),
            };
            match is_bounded {
                true => {
                    bounded.push(Some((begin, rows.len())));
                    rows.extend(part.iter().map(|news| news.row));
                }
                false => {
                    rows.truncate(begin);
                    bounded.push(None);
                }
            }
        }
        let keys = self.keys_of_rows(&rows)?;
        let worked = rows.len() as u64;
        let mut forward = Vec::with_capacity(parts.iter().map(|part| part.len()).sum());
        for (part, bounded) in parts.iter().zip(bounded) {
            match bounded {
                None => forward.extend(part.iter().map(|_| true)),
                Some((begin, end)) => {
                    let last = keys[begin..end].iter().max();
                    let news = keys[end..end + part.len()].iter();
                    forward.extend(news.map(|key| last.is_some_and(|last| key <= last)));
                }
            }
        }
        self.worked += worked;
        Ok(forward)
    }

    /// Moves rows between the front and the rest where the front has become too short or too long.
    fn balance(&mut self, first: First, place: &Place<'_>) -> Result<()> {
        let (mut entries, mut there) = (0usize, 0i64);
        for (_, count) in rows_in(&self.tables, place) {
            entries += 1;
            there = there.saturating_add(count.max(0));
        }
        let wanted = i64::try_from(first.rows).unwrap_or(i64::MAX);
        let spare = first.spare();
        let many = |spare: usize| entries > first.rows.saturating_add(spare);
        match first.growing {
            true if many(spare) => self.cut(place, wanted, true),
            false if there < wanted && rows_in(&self.rest, place).next().is_some() => {
                self.refill(place, wanted.saturating_add(spare as i64) - there)
            }
            false if many(2 * spare) => self.cut(place, wanted.saturating_add(spare as i64), false),
            _ => Ok(()),
        }
    }

    /// Takes what stands behind the first `wanted` rows out of the front.
    fn cut(&mut self, place: &Place<'_>, wanted: i64, forget: bool) -> Result<()> {
        let rows: Vec<(&[u8], i64)> = rows_in(&self.tables, place).collect();
        let bytes: Vec<&[u8]> = rows.iter().map(|(row, _)| *row).collect();
        let keys = self.keys_of_rows(&bytes)?;
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_unstable_by(|a, b| keys[*a].cmp(&keys[*b]));
        let mut before = 0i64;
        let behind = order.into_iter().filter(|at| {
            let is_behind = before >= wanted;
            before = before.saturating_add(rows[*at].1.max(0));
            is_behind
        });
        let behind: Vec<(Box<[u8]>, i64)> = behind.map(|i| (rows[i].0.into(), rows[i].1)).collect();
        self.worked += rows.len() as u64;
        for (row, count) in behind {
            add(&mut self.tables, place, &row, -count);
            if !forget {
                add(&mut self.rest, place, &row, count);
            }
        }
        Ok(())
    }

    /// Moves the least rows of the rest to the front, until they are `wanted` ones.
    fn refill(&mut self, place: &Place<'_>, wanted: i64) -> Result<()> {
        let mut least: BinaryHeap<Ordered> = BinaryHeap::new();
        let mut there = 0i64;
        let mut worked = 0;
        let mut rows = rows_in(&self.rest, place);
        loop {
            let piece: Vec<(&[u8], i64)> = rows.by_ref().take(OUTPUT_ROWS).collect();
            if piece.is_empty() {
                break;
            }
            worked += piece.len() as u64;
            let bytes: Vec<&[u8]> = piece.iter().map(|(row, _)| *row).collect();
            for (key, (row, count)) in self.keys_of_rows(&bytes)?.into_iter().zip(piece) {
                let last = least.peek();
                if there >= wanted && last.is_some_and(|(last, _, _)| key > *last) {
                    continue;
                }
                there = there.saturating_add(count.max(0));
                least.push((key, row.into(), count));
                while let Some((_, _, count)) = least.peek()
                    && there - (*count).max(0) >= wanted
                {
                    there -= (*count).max(0);
                    least.pop();
                }
            }
        }
        drop(rows);
        self.worked += worked;
        for (_, row, count) in least {
            add(&mut self.rest, place, &row, -count);
            add(&mut self.tables, place, &row, count);
        }
        Ok(())
    }

    /// What orders stored rows.
    fn keys_of_rows(&self, rows: &[&[u8]]) -> Result<Vec<Box<[u8]>>> {
        let columns = self.rows.decode(rows.iter().copied())?;
        if columns.is_empty() || rows.is_empty() {
            return Ok(vec![Box::default(); rows.len()]);
        }
        let keys = self.sort_keys(&columns)?;
        Ok(keys.iter().map(|key| key.as_ref().into()).collect())
    }
}

/// Rows of a partition with their multiplicities.
fn rows_in<'a>(
    tables: &'a Tables,
    place: &Place<'_>,
) -> impl Iterator<Item = (&'a [u8], i64)> + use<'a> {
    let table = tables.get(&place.time);
    table
        .map(|table| table.rows_of(place.hash, place.key))
        .into_iter()
        .flatten()
}

fn add(tables: &mut Tables, place: &Place<'_>, row: &[u8], diff: i64) {
    let table = tables.entry(place.time);
    let table = table.or_insert_with(KeyedState::chained);
    table.add_row(place.hash, place.key, row, diff);
}

impl Place<'_> {
    fn same(&self, other: &Self) -> bool {
        (self.time, self.hash) == (other.time, other.hash) && self.key == other.key
    }
}
