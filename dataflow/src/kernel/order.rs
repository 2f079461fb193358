//! The order in which rows visit keyed state: by table, then by key group.
//!
//! Rows in the order of their keys' hashes touch memory everywhere; piece by piece, each piece fits
//! into the processor's cache.

use std::collections::HashMap;

use crate::key::key_group;

/// A table's place in time; `None` is the table of what never closes.
pub(crate) type Time = Option<i64>;

/// A row, and where it goes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Placed {
    /// Number of its time, then its key group.
    place: u32,
    pub source: u32,
    pub row: u32,
}

#[derive(Debug)]
pub(crate) struct Order {
    times: Vec<Time>,
    rows: Vec<Placed>,
}

impl Order {
    /// Of rows given as time, hash, source and row.
    pub(crate) fn new(given: impl Iterator<Item = (Time, u64, u32, u32)>) -> Self {
        let mut times: Vec<Time> = Vec::new();
        let mut numbers: HashMap<Time, u32> = HashMap::new();
        let mut rows = Vec::with_capacity(given.size_hint().0);
        let mut last: Option<(Time, u32)> = None;
        for (time, hash, source, row) in given {
            let number = match last {
                Some((have, number)) if have == time => number,
                _ => *numbers.entry(time).or_insert_with(|| {
                    times.push(time);
                    times.len() as u32 - 1
                }),
            };
            last = Some((time, number));
            let place = number << 8 | u32::from(key_group(hash));
            rows.push(Placed { place, source, row });
        }
        let places = times.len() << 8;
        let rows = if places > 8 * rows.len() {
            rows.sort_by_key(|at| at.place);
            rows
        } else {
            counting_sort(&rows, places)
        };
        Self { times, rows }
    }

    /// The rows of each table.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (Time, &[Placed])> {
        let runs = self.rows.chunk_by(|a, b| a.place >> 8 == b.place >> 8);
        runs.map(|run| (self.times[(run[0].place >> 8) as usize], run))
    }
}

fn counting_sort(rows: &[Placed], places: usize) -> Vec<Placed> {
    let mut next = vec![0u32; places];
    rows.iter().for_each(|at| next[at.place as usize] += 1);
    let mut begin = 0;
    for next in &mut next {
        (*next, begin) = (begin, begin + *next);
    }
    let mut sorted = vec![Placed::default(); rows.len()];
    for at in rows {
        let next = &mut next[at.place as usize];
        sorted[*next as usize] = *at;
        *next += 1;
    }
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_by_table_and_group_each_once() {
        for (rows, times) in [(1u32, 1), (5, 3), (3000, 1), (3000, 7), (300, 300)] {
            let hash = |row: u32| crate::key::hash_words(row.into(), 0);
            let time = |row: u32| (row % times > 0).then_some(i64::from(row % times));
            let order = Order::new((0..rows).map(|row| (time(row), hash(row), 0, row)));
            let mut seen = Vec::new();
            for (at, run) in order.runs() {
                assert!(run.iter().all(|placed| time(placed.row) == at));
                assert!(run.is_sorted_by_key(|placed| (key_group(hash(placed.row)), placed.row)));
                seen.extend(run.iter().map(|placed| placed.row));
            }
            assert_eq!(order.runs().count(), times.min(rows) as usize);
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..rows));
        }
    }
}
