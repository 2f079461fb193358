//! The groups of one table, and which of them the current tick touched.
//!
//! The first bytes of a group's value say where it stands in the list of touched groups. They are
//! trusted only when that place names the same row, so they need no clearing and may come from a
//! checkpoint.

use crate::exact::ExactSum;
use crate::kernel::accumulator::wide::{self, Wide};
use crate::kernel::accumulator::{
    Kind, Layout, Slot, TOUCH, partial, push_tail, read_i64, rows_in, tails,
};
use crate::state::{KeyedState, RowId, Snapshot, StateRow};
use arrow::array::Array;

use super::{PartialColumn, WARM_ROWS};

/// No value before the tick.
pub(super) const NONE: usize = usize::MAX;

#[derive(Debug)]
struct Touch {
    id: RowId,
    /// Where in `images` the value before the tick begins; [`NONE`] when the group is new.
    image: usize,
    length: usize,
}

/// A group that changed in this tick.
#[derive(Debug)]
pub(super) struct Changed<'a> {
    pub key: &'a [u8],
    pub old: Option<&'a [u8]>,
    pub new: &'a [u8],
}

#[derive(Debug)]
pub(super) struct Groups {
    rows: KeyedState,
    /// Values of the groups, for extremes that can be taken back.
    values: Option<KeyedState>,
    /// Changes are shown.
    track: bool,
    touched: Vec<Touch>,
    images: Vec<u8>,
    scratch: Vec<u8>,
}

impl Groups {
    /// No groups yet; `expected` are about as many as will come.
    pub(super) fn new(layout: &Layout, track: bool, expected: u64) -> Self {
        Self {
            rows: KeyedState::plain_for(expected),
            values: layout.has_values().then(KeyedState::chained),
            track,
            touched: Vec::new(),
            images: Vec::new(),
            scratch: Vec::new(),
        }
    }

    pub(super) fn len(&self) -> u64 {
        self.rows.len() + self.values.as_ref().map_or(0, KeyedState::len)
    }
    /// Groups, without what is beside them.
    pub(super) fn count(&self) -> u64 {
        self.rows.len()
    }
    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
    pub(super) fn bytes(&self) -> u64 {
        self.rows.bytes() + self.values.as_ref().map_or(0, KeyedState::bytes)
    }
    /// All groups of one key group.
    pub(super) fn of_key_group(&self, number: u8) -> impl Iterator<Item = StateRow<'_>> {
        self.rows.rows_of_group(number)
    }
    /// More is in memory than wanted: few groups should be referred to at once.
    pub(super) fn is_over(&self) -> bool {
        self.rows.is_over()
    }
    /// Bytes that are in the swap file only.
    pub(super) fn swapped_bytes(&self) -> u64 {
        self.rows.swapped_bytes() + self.values.as_ref().map_or(0, KeyedState::swapped_bytes)
    }
    /// Puts pages out, if more is in memory than wanted. No group may be referred to.
    #[inline]
    pub(super) fn relieve(&mut self) {
        self.rows.relieve();
        if let Some(values) = &mut self.values {
            values.relieve();
        }
    }
    pub(super) fn snapshot(&mut self) -> impl Iterator<Item = (&'static str, Snapshot)> {
        let values = self
            .values
            .as_mut()
            .map(|values| ("values", values.snapshot()));
        [("groups", self.rows.snapshot())].into_iter().chain(values)
    }
    /// The state of a part of [`Self::snapshot`].
    pub(super) fn state_mut(&mut self, kind: &str) -> Option<&mut KeyedState> {
        match kind {
            "groups" => Some(&mut self.rows),
            "values" => self.values.as_mut(),
            _ => None,
        }
    }

    /// Brings groups with these hashes into the cache.
    #[inline]
    pub(super) fn warm(&self, hashes: impl Iterator<Item = u64>) {
        self.rows.warm(hashes);
    }

    /// Adds one partial row to the group of `key` (hash and bytes).
    #[inline]
    pub(super) fn add(
        &mut self,
        layout: &Layout,
        key: (u64, &[u8]),
        columns: &[PartialColumn<'_>],
        row: usize,
    ) {
        if layout.tails > 0 {
            return self.add_with_tails(layout, key, columns, row);
        }
        let (id, value, new) = self.rows.entry(key.0, key.1, &layout.initial);
        if self.track {
            touch(&mut self.touched, &mut self.images, id, value, new);
        }
        add_fixed(layout, value, columns, row);
    }

    /// The group exists from now on, also without rows.
    pub(super) fn create(&mut self, layout: &Layout, key: (u64, &[u8])) {
        let (id, value, new) = self.rows.entry(key.0, key.1, &layout.initial);
        if new {
            touch(&mut self.touched, &mut self.images, id, value, true);
        }
    }

    /// As [`Self::add`] where the length of the value changes.
    fn add_with_tails(
        &mut self,
        layout: &Layout,
        key: (u64, &[u8]),
        columns: &[PartialColumn<'_>],
        row: usize,
    ) {
        let (hash, bytes) = key;
        let found = self.rows.locate(hash, bytes);
        let mut value = std::mem::take(&mut self.scratch);
        value.clear();
        {
            let old = found.and_then(|id| self.rows.row(id)).map(|row| row.2);
            let old = old.unwrap_or(&layout.initial);
            value.extend_from_slice(&old[..layout.fixed]);
            add_tails(
                layout,
                old,
                &mut value,
                columns,
                row,
                self.values.as_mut(),
                key,
            );
        }
        add_fixed(layout, &mut value, columns, row);
        match found {
            None => {
                let (id, value, _) = self.rows.entry(hash, bytes, &value);
                if self.track {
                    touch(&mut self.touched, &mut self.images, id, value, true);
                }
            }
            Some(id) => {
                let mut at = None;
                if self.track {
                    let old = self.rows.value_mut(id);
                    at = Some(touch(&mut self.touched, &mut self.images, id, old, false));
                    value[..TOUCH].copy_from_slice(&old[..TOUCH]);
                }
                let moved = self.rows.replace(id, hash, bytes, &value);
                if let Some(at) = at {
                    self.touched[at].id = moved;
                }
            }
        }
        self.scratch = value;
    }

    /// Groups touched in this tick.
    pub(super) fn touched(&self) -> usize {
        self.touched.len()
    }

    /// Of `count` touched groups from `from` on, those whose value is another now. The places of those
    /// without rows go to `gone`.
    pub(super) fn changed<'a>(
        &'a self,
        (from, count): (usize, usize),
        out: &mut Vec<Changed<'a>>,
        gone: &mut Vec<usize>,
    ) {
        for (at, touch) in self.touched.iter().enumerate().skip(from).take(count) {
            let old = (touch.image != NONE)
                .then(|| &self.images[touch.image..touch.image + touch.length]);
            let row = self.rows.row(touch.id);
            let (_, key, new) = row.expect("rows are removed at the end of a tick only");
            if rows_in(new) == 0 {
                gone.push(at);
            }
            if old.is_none_or(|old| old[TOUCH..] != new[TOUCH..]) {
                out.push(Changed { key, old, new });
            }
        }
    }

    /// Forgets what was touched, and the groups at `gone`, of those touched, that nothing is left of.
    pub(super) fn end_tick(&mut self, layout: &Layout, gone: &[usize]) {
        for (count, at) in gone.iter().enumerate() {
            if count % WARM_ROWS == 0 {
                self.relieve();
            }
            let id = self.touched[*at].id;
            let Some((hash, key, value)) = self.rows.row(id) else {
                continue;
            };
            if !layout.is_initial(value) {
                continue;
            }
            if let Some(values) = &self.values {
                let left = |number: usize| {
                    let key = values_key(key, number);
                    values.rows_of(hash, &key).next().is_some()
                };
                if (0..layout.accumulators.len()).any(left) {
                    continue;
                }
            }
            let key = key.to_vec();
            self.rows.remove(hash, &key);
        }
        self.touched.clear();
        self.images.clear();
        const KEEP: usize = 1 << 20;
        self.images.shrink_to(KEEP);
        self.touched.shrink_to(KEEP / size_of::<Touch>());
    }
}

/// Puts the group among those touched, with its value before the tick, unless it stands there; gives
/// its place.
#[inline]
fn touch(
    touched: &mut Vec<Touch>,
    images: &mut Vec<u8>,
    id: RowId,
    value: &mut [u8],
    new: bool,
) -> usize {
    if let Some(at) = find(touched, id, value) {
        return at;
    }
    let image = if new {
        NONE
    } else {
        images.extend_from_slice(value);
        images.len() - value.len()
    };
    value[..TOUCH].copy_from_slice(&(touched.len() as u32).to_le_bytes());
    touched.push(Touch {
        id,
        image,
        length: value.len(),
    });
    touched.len() - 1
}

#[inline]
fn find(touched: &[Touch], id: RowId, value: &[u8]) -> Option<usize> {
    let at =
        u32::from_le_bytes(value[..TOUCH].try_into().expect("the slice has four bytes")) as usize;
    touched
        .get(at)
        .is_some_and(|touch| touch.id == id)
        .then_some(at)
}

/// Adds a partial row to the fixed slots of a value.
#[inline]
fn add_fixed(layout: &Layout, value: &mut [u8], columns: &[PartialColumn<'_>], row: usize) {
    for (number, column) in columns.iter().enumerate() {
        let Slot::Fixed(at) = layout.slots[number] else {
            continue;
        };
        match column {
            PartialColumn::Count(counts) => {
                let count = read_i64(value, at).wrapping_add(counts[row]);
                value[at..at + 8].copy_from_slice(&count.to_le_bytes());
            }
            PartialColumn::Sum(sums) => {
                let slot = &mut value[at..at + wide::BYTES];
                let mut sum = Wide::from_bytes(slot);
                sum.merge(Wide::from_bytes(&sums[row * wide::BYTES..]));
                slot.copy_from_slice(&sum.to_bytes());
            }
            PartialColumn::Words(words, column) => {
                if !column.is_valid(row) {
                    continue;
                }
                let max = layout.accumulators[number].kind == Kind::Extreme { max: true };
                let (old, new) = (read_i64(value, at + 1) as u64, words[row]);
                if value[at] == 0 || if max { new > old } else { new < old } {
                    value[at] = 1;
                    value[at + 1..at + 9].copy_from_slice(&new.to_le_bytes());
                }
            }
            PartialColumn::Blob(_) | PartialColumn::Rows(..) => {}
        }
    }
}

/// Appends the tails of `old` with a partial row added.
fn add_tails(
    layout: &Layout,
    old: &[u8],
    value: &mut Vec<u8>,
    columns: &[PartialColumn<'_>],
    row: usize,
    mut values: Option<&mut KeyedState>,
    (hash, key): (u64, &[u8]),
) {
    let mut old = tails(old, layout.fixed);
    for (number, (accumulator, column)) in layout.accumulators.iter().zip(columns).enumerate() {
        if let Slot::Fixed(_) = layout.slots[number] {
            continue;
        }
        let tail = old.next().unwrap_or_default();
        match (accumulator.kind, column) {
            (Kind::FloatSum, PartialColumn::Blob(blobs)) => {
                let read = |bytes| ExactSum::from_bytes(bytes).expect("a stored sum is a sum");
                let mut sum = read(tail);
                sum.merge(&read(blobs.value(row)));
                push_tail(value, &sum.to_bytes());
            }
            (Kind::Extreme { max }, PartialColumn::Rows(encoded, column)) => {
                let new = encoded.row(row);
                let better = column.is_valid(row)
                    && (tail.is_empty() || if max { new > tail } else { new < tail });
                push_tail(value, if better { new } else { tail });
            }
            (Kind::Values { min, max }, PartialColumn::Blob(blobs)) => {
                let greatest = old.next().unwrap_or_default();
                let values = values.as_deref_mut().expect("made with the layout");
                let key = values_key(key, number);
                let mut cache = Cache::new(tail, greatest);
                for (entry, count) in partial::entries(blobs.value(row)) {
                    let after = values.add_row(hash, &key, entry, count);
                    cache.count(entry, after.wrapping_sub(count), after);
                }
                cache.rescan(min, max, || values.rows_of(hash, &key));
                push_tail(value, if min { &cache.least } else { &[] });
                push_tail(value, if max { &cache.greatest } else { &[] });
            }
            _ => unreachable!("columns are read by their accumulator"),
        }
    }
}

/// Key of the values of one accumulator of a group.
fn values_key(key: &[u8], accumulator: usize) -> Vec<u8> {
    [key, &(accumulator as u16).to_be_bytes()].concat()
}

/// The extremes of a multiset while its counts change. Only values that occur more than zero times
/// count.
#[derive(Debug)]
struct Cache {
    least: Vec<u8>,
    greatest: Vec<u8>,
    /// An extreme went away: the others must be looked through.
    lost: bool,
}

impl Cache {
    fn new(least: &[u8], greatest: &[u8]) -> Self {
        Self {
            least: least.to_vec(),
            greatest: greatest.to_vec(),
            lost: false,
        }
    }

    fn count(&mut self, value: &[u8], before: i64, after: i64) {
        if before <= 0 && after > 0 {
            if self.least.is_empty() || value < self.least.as_slice() {
                self.least = value.to_vec();
            }
            if self.greatest.is_empty() || value > self.greatest.as_slice() {
                self.greatest = value.to_vec();
            }
        } else if before > 0 && after <= 0 {
            self.lost |= value == self.least || value == self.greatest;
        }
    }

    fn rescan<'a, I: Iterator<Item = (&'a [u8], i64)>>(
        &mut self,
        min: bool,
        max: bool,
        rows: impl Fn() -> I,
    ) {
        if !self.lost {
            return;
        }
        let shown = || {
            rows()
                .filter(|(_, count)| *count > 0)
                .map(|(value, _)| value)
        };
        if min {
            self.least = shown().min().map(<[u8]>::to_vec).unwrap_or_default();
        }
        if max {
            self.greatest = shown().max().map(<[u8]>::to_vec).unwrap_or_default();
        }
    }
}
