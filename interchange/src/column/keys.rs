//! Field names to column numbers, fast when records look alike.
//!
//! Records of one topic carry the same fields in the same order, wanted or not. The lookup first
//! compares with the key that stood at this place in the record before; only when that fails it
//! searches, and remembers what it found.

use std::collections::HashMap;

/// Places remembered; records with more fields than this are searched from there on.
const PLACES_MAX: usize = 512;
/// Longer keys are not remembered, so that strange input cannot hold memory.
const KEY_MAX: usize = 128;

#[derive(Debug)]
pub(crate) struct Keys {
    by_name: HashMap<Box<[u8]>, usize>,
    /// What stood at each place of the last record: the key with its closing quote, and the column
    /// it belongs to, if it is a known one.
    places: Vec<(Box<[u8]>, Option<usize>)>,
}

impl Keys {
    pub(crate) fn new<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let by_name = names
            .enumerate()
            .map(|(i, name)| (name.as_bytes().into(), i))
            .collect();
        Self {
            by_name,
            places: Vec::new(),
        }
    }

    /// If the key at `place` is the one of the record before: its length without the quote, and its
    /// column. `rest` begins behind the opening quote.
    #[inline]
    pub(crate) fn guess(&self, place: usize, rest: &[u8]) -> Option<(usize, Option<usize>)> {
        let (key, column) = self.places.get(place)?;
        rest.starts_with(key).then(|| (key.len() - 1, *column))
    }

    /// Column of `key`, remembered for `place` if the key stands there as it is (without escapes).
    pub(crate) fn find(&mut self, place: usize, key: &[u8], plain: bool) -> Option<usize> {
        let column = self.by_name.get(key).copied();
        if plain && key.len() <= KEY_MAX && place < PLACES_MAX {
            let quoted = [key, b"\""].concat().into_boxed_slice();
            if place < self.places.len() {
                self.places[place] = (quoted, column);
            } else if place == self.places.len() {
                self.places.push((quoted, column));
            }
        }
        column
    }
}
