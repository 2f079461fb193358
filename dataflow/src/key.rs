//! Keys: how rows become bytes, bytes a hash, and a hash a key group and a worker.
//!
//! # Contract
//!
//! * Hashes are stored in checkpoints and decide which worker owns a row, so the function never
//!   changes without [`HASH_VERSION`]; a golden test holds it. It does not depend on the machine.
//! * Which of the two ways a hash is made (words, or row bytes) follows from the column types alone,
//!   so both sides of an exchange, a join or a restart agree.
//! * Keys that SQL calls equal have equal bytes: -0.0 is 0.0, and there is one NaN.
//! * Row bytes are arrow-row's: their order is the order of the values, nulls first, NaN last.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float32Array, Float64Array};
use arrow::buffer::ScalarBuffer;
use arrow::datatypes::{
    DataType, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, UInt8Type,
    UInt16Type, UInt32Type,
};
use arrow::row::{RowConverter, RowParser, Rows, SortField};

use crate::error::{Error, Result};

/// Of the hash function and of the choice of its input; written into every checkpoint.
pub const HASH_VERSION: u32 = 1;

/// Key groups: the units in which state is stored and moved between workers.
pub const GROUPS: usize = 256;

const SECRET: [u64; 4] = [
    0x2d35_8dcc_aa6c_78a5,
    0x8bb8_4b93_962e_acc9,
    0x4b33_a62e_d433_d4a3,
    0x4d5a_2da5_1de1_aa47,
];
/// What a null hashes as. That an integer may equal it costs a collision, not an error.
const NULL_WORD: u64 = 0xa076_1d64_78bd_642f;

/// Which worker this is, of how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    pub worker: usize,
    pub workers: usize,
}

impl Share {
    /// The only worker.
    pub const ALL: Self = Self {
        worker: 0,
        workers: 1,
    };
    pub fn groups(&self) -> Range<u16> {
        owned_groups(self.worker, self.workers)
    }
    pub fn owns(&self, hash: u64) -> bool {
        owner(key_group(hash), self.workers) == self.worker
    }
}

/// The key group of a hash. Tables are indexed by the low 32 bits, so these are others.
#[inline]
pub fn key_group(hash: u64) -> u8 {
    (hash >> 40) as u8
}

/// The worker whose [`owned_groups`] contain `group`.
#[inline]
pub fn owner(group: u8, workers: usize) -> usize {
    ((usize::from(group) + 1) * workers - 1) / GROUPS
}

/// The key groups of a worker; empty for some when there are more workers than groups.
pub fn owned_groups(worker: usize, workers: usize) -> Range<u16> {
    let bound = |worker: usize| (GROUPS * worker / workers) as u16;
    bound(worker)..bound(worker + 1)
}

#[inline]
fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

/// Hash of up to two words.
#[inline]
pub fn hash_words(a: u64, b: u64) -> u64 {
    let product = u128::from(a ^ SECRET[0]) * u128::from(b ^ SECRET[1]);
    mix(
        product as u64 ^ SECRET[0],
        (product >> 64) as u64 ^ SECRET[1],
    )
}

/// Hash of bytes: wyhash (final version 4) with seed 0.
#[inline]
pub fn hash_bytes(bytes: &[u8]) -> u64 {
    let read8 = |at: usize| {
        u64::from_le_bytes(
            bytes[at..at + 8]
                .try_into()
                .expect("the slice has eight bytes"),
        )
    };
    let read4 = |at: usize| {
        u64::from(u32::from_le_bytes(
            bytes[at..at + 4]
                .try_into()
                .expect("the slice has four bytes"),
        ))
    };
    let length = bytes.len();
    let mut seed = mix(SECRET[0], SECRET[1]);
    let (a, b);
    if length <= 16 {
        if length >= 4 {
            let step = (length >> 3) << 2;
            a = read4(0) << 32 | read4(step);
            b = read4(length - 4) << 32 | read4(length - 4 - step);
        } else if length > 0 {
            a = u64::from(bytes[0]) << 16
                | u64::from(bytes[length >> 1]) << 8
                | u64::from(bytes[length - 1]);
            b = 0;
        } else {
            (a, b) = (0, 0);
        }
    } else {
        let (mut at, mut left) = (0, length);
        if left >= 48 {
            let (mut second, mut third) = (seed, seed);
            while left >= 48 {
                seed = mix(read8(at) ^ SECRET[1], read8(at + 8) ^ seed);
                second = mix(read8(at + 16) ^ SECRET[2], read8(at + 24) ^ second);
                third = mix(read8(at + 32) ^ SECRET[3], read8(at + 40) ^ third);
                at += 48;
                left -= 48;
            }
            seed ^= second ^ third;
        }
        while left > 16 {
            seed = mix(read8(at) ^ SECRET[1], read8(at + 8) ^ seed);
            at += 16;
            left -= 16;
        }
        a = read8(length - 16);
        b = read8(length - 8);
    }
    let product = u128::from(a ^ SECRET[1]) * u128::from(b ^ seed);
    mix(
        product as u64 ^ SECRET[0] ^ length as u64,
        (product >> 64) as u64 ^ SECRET[1],
    )
}

/// Values of this type fit into one word each.
pub fn is_word(data_type: &DataType) -> bool {
    use DataType::{
        Boolean, Date32, Date64, Duration, Float32, Float64, Int8, Int16, Int32, Int64, Time32,
        Time64, Timestamp, UInt8, UInt16, UInt32, UInt64,
    };
    matches!(
        data_type,
        Boolean
            | Int8
            | Int16
            | Int32
            | Int64
            | UInt8
            | UInt16
            | UInt32
            | UInt64
            | Float32
            | Float64
            | Date32
            | Date64
            | Time32(_)
            | Time64(_)
            | Timestamp(_, _)
            | Duration(_)
    )
}

/// The values of a column as words, equal exactly where the values are; without a copy for 64-bit
/// integers and timestamps. Words of nulls are arbitrary. `None` when a value does not fit.
pub(crate) fn words(column: &ArrayRef) -> Option<ScalarBuffer<u64>> {
    use DataType::{
        Boolean, Date32, Float32, Float64, Int8, Int16, Int32, Time32, UInt8, UInt16, UInt32,
    };
    if !is_word(column.data_type()) {
        return None;
    }
    macro_rules! widen {
        ($type:ty) => {{
            let values = column.as_primitive::<$type>().values();
            values.iter().map(|value| *value as u64).collect()
        }};
    }
    Some(match column.data_type() {
        Boolean => {
            let values = column.as_boolean().values();
            values.iter().map(u64::from).collect()
        }
        Int8 => widen!(Int8Type),
        Int16 => widen!(Int16Type),
        Int32 => widen!(Int32Type),
        UInt8 => widen!(UInt8Type),
        UInt16 => widen!(UInt16Type),
        UInt32 => widen!(UInt32Type),
        Date32 | Time32(_) => {
            let data = column.to_data();
            let values = &data.buffers()[0].typed_data::<i32>()[data.offset()..];
            values[..data.len()]
                .iter()
                .map(|value| *value as u64)
                .collect()
        }
        Float32 => {
            let values = column.as_primitive::<Float32Type>().values();
            values
                .iter()
                .map(|v| u64::from(one_f32(*v).to_bits()))
                .collect()
        }
        Float64 => {
            let values = column.as_primitive::<Float64Type>().values();
            values.iter().map(|v| one_f64(*v).to_bits()).collect()
        }
        _ => {
            let data = column.to_data();
            ScalarBuffer::new(data.buffers()[0].clone(), data.offset(), data.len())
        }
    })
}

/// Hashes of the rows of `columns`; `rows` is their number (there may be no column).
pub fn hash_columns(columns: &[ArrayRef], rows: usize) -> Result<Vec<u64>> {
    match columns {
        [] => Ok(vec![hash_bytes(&[]); rows]),
        [one] if is_word(one.data_type()) => {
            let a = hash_input(one);
            Ok(a.iter().map(|a| hash_words(*a, 0)).collect())
        }
        [one, two] if is_word(one.data_type()) && is_word(two.data_type()) => {
            let (a, b) = (hash_input(one), hash_input(two));
            Ok(a.iter()
                .zip(b.iter())
                .map(|(a, b)| hash_words(*a, *b))
                .collect())
        }
        _ => {
            let types = columns.iter().map(|c| c.data_type().clone());
            Ok(RowCodec::keys(types)?.encode(columns, rows)?.hashes())
        }
    }
}

/// As [`hash_columns`] for keys that are encoded already; saves the second encoding.
pub fn hash_encoded(columns: &[ArrayRef], encoded: &Encoded) -> Result<Vec<u64>> {
    if columns.len() <= 2 && columns.iter().all(|c| is_word(c.data_type())) {
        hash_columns(columns, encoded.len())
    } else {
        Ok(encoded.hashes())
    }
}

/// Rows in the order in which state is best touched: by bucket (which table; pass none for one), then
/// by key group, so that the pages and the index of a group stay in the cache; else as they came.
pub fn touch_order(hashes: &[u64], bucket: impl Fn(usize) -> i64) -> Vec<u32> {
    // Few buckets are open at a time; with many, the group alone must do.
    const BUCKETS: usize = 32;
    let mut buckets: Vec<i64> = Vec::new();
    let mut places = Vec::with_capacity(hashes.len());
    let mut last = 0;
    for (row, hash) in hashes.iter().enumerate() {
        let value = bucket(row);
        if buckets.get(last) != Some(&value) {
            last = match buckets.iter().position(|have| *have == value) {
                Some(at) => at,
                None if buckets.len() < BUCKETS => {
                    buckets.push(value);
                    buckets.len() - 1
                }
                None => BUCKETS - 1,
            };
        }
        places.push((last * GROUPS) as u32 + u32::from(key_group(*hash)));
    }
    let mut starts = vec![0u32; buckets.len() * GROUPS + 1];
    for place in &places {
        starts[*place as usize + 1] += 1;
    }
    for place in 1..starts.len() {
        starts[place] += starts[place - 1];
    }
    let mut order = vec![0u32; hashes.len()];
    for (row, place) in places.iter().enumerate() {
        let at = &mut starts[*place as usize];
        order[*at as usize] = row as u32;
        *at += 1;
    }
    order
}

fn hash_input(column: &ArrayRef) -> ScalarBuffer<u64> {
    let words = words(column).expect("the caller checked the type");
    match column.nulls().filter(|nulls| nulls.null_count() > 0) {
        None => words,
        Some(nulls) => {
            let valid = nulls.iter().zip(words.iter());
            valid
                .map(|(valid, word)| if valid { *word } else { NULL_WORD })
                .collect()
        }
    }
}

fn one_f64(value: f64) -> f64 {
    if value.is_nan() {
        f64::NAN
    } else {
        value + 0.0 // -0.0 + 0.0 is 0.0
    }
}

fn one_f32(value: f32) -> f32 {
    if value.is_nan() {
        f32::NAN
    } else {
        value + 0.0
    }
}

/// The column with one zero and one NaN, so that equal values have equal bytes. Costs nothing for
/// other types than floats.
pub fn normalise(column: &ArrayRef) -> ArrayRef {
    match column.data_type() {
        DataType::Float64 => {
            let floats = column.as_primitive::<Float64Type>();
            let odd = |v: &f64| v.to_bits() != one_f64(*v).to_bits();
            if floats.values().iter().any(odd) {
                let values = floats.values().iter().map(|v| one_f64(*v)).collect();
                return Arc::new(Float64Array::new(values, floats.nulls().cloned()));
            }
        }
        DataType::Float32 => {
            let floats = column.as_primitive::<Float32Type>();
            let odd = |v: &f32| v.to_bits() != one_f32(*v).to_bits();
            if floats.values().iter().any(odd) {
                let values = floats.values().iter().map(|v| one_f32(*v)).collect();
                return Arc::new(Float32Array::new(values, floats.nulls().cloned()));
            }
        }
        DataType::Float16 => {
            type Half = <Float16Type as arrow::datatypes::ArrowPrimitiveType>::Native;
            let floats = column.as_primitive::<Float16Type>();
            let quiet = Half::from_f32(f32::NAN);
            return Arc::new(floats.unary::<_, Float16Type>(|v| {
                if v.is_nan() {
                    quiet
                } else if v == Half::default() {
                    Half::default()
                } else {
                    v
                }
            }));
        }
        _ => {}
    }
    Arc::clone(column)
}

/// Columns to row bytes and back, the types fixed.
#[derive(Debug)]
pub struct RowCodec {
    types: Vec<DataType>,
    converter: RowConverter,
    parser: RowParser,
    normalise: bool,
}

impl RowCodec {
    /// For keys: floats are normalised, so that equal values have equal bytes.
    pub fn keys(types: impl IntoIterator<Item = DataType>) -> Result<Self> {
        Self::new(types, true)
    }

    /// For contents: every value comes back with the bits it had.
    pub fn rows(types: impl IntoIterator<Item = DataType>) -> Result<Self> {
        Self::new(types, false)
    }

    fn new(types: impl IntoIterator<Item = DataType>, normalise: bool) -> Result<Self> {
        let types: Vec<_> = types.into_iter().collect();
        let fields = types.iter().cloned().map(SortField::new).collect();
        let converter = RowConverter::new(fields).map_err(|_| {
            let names: Vec<_> = types.iter().map(ToString::to_string).collect();
            Error::unsupported("columns of this type cannot be kept in state")
                .detail(format!("column types: {}", names.join(", ")))
        })?;
        let parser = converter.parser();
        Ok(Self {
            types,
            converter,
            parser,
            normalise,
        })
    }

    pub fn types(&self) -> &[DataType] {
        &self.types
    }

    /// Row bytes of `columns`; `rows` is their number (there may be no column).
    pub fn encode(&self, columns: &[ArrayRef], rows: usize) -> Result<Encoded> {
        if columns.is_empty() {
            return Ok(Encoded {
                rows: None,
                len: rows,
            });
        }
        let bytes = if self.normalise {
            let columns: Vec<_> = columns.iter().map(normalise).collect();
            self.converter.convert_columns(&columns)
        } else {
            self.converter.convert_columns(columns)
        };
        let bytes = bytes.map_err(|e| Error::internal(format!("rows cannot be encoded: {e}")))?;
        Ok(Encoded {
            rows: Some(bytes),
            len: rows,
        })
    }

    /// Columns of rows that [`Self::encode`] made.
    pub fn decode<'a>(&self, rows: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<ArrayRef>> {
        if self.types.is_empty() {
            return Ok(Vec::new());
        }
        let parsed = rows.into_iter().map(|row| self.parser.parse(row));
        // The parser's rows must not outlive this call; a copy of the slices is made inside anyway.
        let columns = self
            .converter
            .convert_rows(parsed)
            .map_err(|e| Error::internal(format!("rows cannot be decoded: {e}")))?;
        columns
            .into_iter()
            .zip(&self.types)
            .map(|(column, want)| {
                // Dictionaries come back flat.
                if column.data_type() == want {
                    return Ok(column);
                }
                arrow::compute::cast(&column, want)
                    .map_err(|e| Error::internal(format!("rows cannot be decoded: {e}")))
            })
            .collect()
    }
}

/// Rows as bytes.
#[derive(Debug)]
pub struct Encoded {
    rows: Option<Rows>,
    len: usize,
}

impl Encoded {
    pub fn len(&self) -> usize {
        self.len
    }
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    #[inline]
    pub fn row(&self, row: usize) -> &[u8] {
        match &self.rows {
            Some(rows) => rows.row(row).data(),
            None => &[],
        }
    }
    /// Hash of each row's bytes.
    pub fn hashes(&self) -> Vec<u64> {
        (0..self.len).map(|row| hash_bytes(self.row(row))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Int32Array, Int64Array, StringArray};

    /// These numbers are in checkpoints: if this fails, [`HASH_VERSION`] must change.
    #[test]
    fn hashes_never_change() {
        let bytes: Vec<u8> = (0..100).collect();
        let lengths = [0, 1, 3, 4, 8, 15, 16, 17, 47, 48, 49, 96, 100];
        let got: Vec<u64> = lengths.iter().map(|l| hash_bytes(&bytes[..*l])).collect();
        assert_eq!(got, GOLDEN_BYTES);
        let got = [
            hash_words(0, 0),
            hash_words(1, 0),
            hash_words(1, 2),
            hash_words(u64::MAX, 7),
        ];
        assert_eq!(got, GOLDEN_WORDS);
    }

    const GOLDEN_BYTES: [u64; 13] = [
        0x9322_8a4d_e0ee_c5a2,
        0x8e6d_4af7_d310_c8c4,
        0x78c4_aa0c_972a_522d,
        0xe08a_eeb6_8058_fb32,
        0xb4d6_ac74_d009_e1d4,
        0x87ed_af96_d89a_08ef,
        0x305f_dea0_ed4a_2619,
        0xd29f_fdd2_01a4_6f9a,
        0xe2cb_58f6_ab8e_4419,
        0xecbf_b7ff_9e3d_9a97,
        0x0691_f11b_ac52_3a91,
        0x9481_37d6_9794_b570,
        0x77ed_9a7d_fb9a_c9b7,
    ];
    const GOLDEN_WORDS: [u64; 4] = [
        0xfa30_3abc_2b1d_7630,
        0x8fd9_0e73_37ab_042d,
        0x5278_1e39_de84_ce33,
        0xc649_ef12_61e5_2156,
    ];

    #[test]
    fn every_group_has_one_owner() {
        for workers in [1, 2, 3, 5, 8, 255, 256, 300] {
            let mut next = 0;
            for worker in 0..workers {
                let groups = owned_groups(worker, workers);
                assert_eq!(groups.start, next);
                next = groups.end;
                for group in groups {
                    assert_eq!(owner(group as u8, workers), worker);
                }
            }
            assert_eq!(next, 256);
        }
    }

    #[test]
    fn groups_are_filled_evenly() {
        let column: ArrayRef = Arc::new(Int64Array::from_iter_values(0..256_000));
        let mut counts = [0u32; 256];
        for hash in hash_columns(&[column], 256_000).unwrap() {
            counts[usize::from(key_group(hash))] += 1;
        }
        assert!(counts.iter().all(|c| (800..1200).contains(c)), "{counts:?}");
    }

    #[test]
    fn equal_keys_have_equal_bytes_and_hashes() {
        let odd = f64::from_bits(0xfff8_0000_0000_0001);
        let floats: ArrayRef = Arc::new(Float64Array::from(vec![0.0, -0.0, f64::NAN, odd]));
        let text: ArrayRef = Arc::new(StringArray::from(vec!["a", "a", "b", "b"]));
        for columns in [vec![floats.clone()], vec![floats.clone(), text.clone()]] {
            let types = columns.iter().map(|c| c.data_type().clone());
            let encoded = RowCodec::keys(types).unwrap().encode(&columns, 4).unwrap();
            let hashes = hash_columns(&columns, 4).unwrap();
            assert_eq!(hashes, hash_encoded(&columns, &encoded).unwrap());
            for (a, b) in [(0, 1), (2, 3)] {
                assert_eq!(encoded.row(a), encoded.row(b));
                assert_eq!(hashes[a], hashes[b]);
            }
            assert_ne!(hashes[0], hashes[2]);
        }
        let exact = RowCodec::rows([DataType::Float64]).unwrap();
        let encoded = exact.encode(&[floats.clone()], 4).unwrap();
        let back = exact.decode((0..4).map(|row| encoded.row(row))).unwrap();
        let bits = |c: &ArrayRef| {
            let floats = c.as_primitive::<Float64Type>().values();
            floats.iter().map(|f| f.to_bits()).collect::<Vec<_>>()
        };
        assert_eq!(bits(&back[0]), bits(&floats));
    }

    #[test]
    fn nulls_slices_and_narrow_types_hash_by_value() {
        let wide: ArrayRef = Arc::new(Int64Array::from(vec![Some(9), None, Some(-3), Some(5)]));
        let narrow: ArrayRef = Arc::new(Int32Array::from(vec![Some(-3), Some(5)]));
        let sliced = hash_columns(&[wide.slice(2, 2)], 2).unwrap();
        assert_eq!(sliced, hash_columns(&[narrow], 2).unwrap());
        let all = hash_columns(&[wide.clone()], 4).unwrap();
        assert_eq!(all[2..], sliced);
        let zero: ArrayRef = Arc::new(Int64Array::from(vec![0]));
        assert_ne!(all[1], hash_columns(&[zero], 1).unwrap()[0]);
    }

    #[test]
    fn the_order_of_touch_is_a_permutation_by_bucket_and_group() {
        for buckets in [1, 5, 500] {
            let hashes: Vec<u64> = (0..2000u64).map(|n| hash_words(n, 0)).collect();
            let bucket = |row: usize| (row % buckets) as i64;
            let order = touch_order(&hashes, bucket);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert!(
                sorted
                    .iter()
                    .enumerate()
                    .all(|(at, row)| at == *row as usize)
            );
            if buckets < 32 {
                let place = |row: &u32| (bucket(*row as usize), key_group(hashes[*row as usize]));
                assert!(order.is_sorted_by_key(place));
            }
        }
        assert!(touch_order(&[], |_| 0).is_empty());
    }

    #[test]
    fn no_columns_make_one_key() {
        let codec = RowCodec::keys([]).unwrap();
        let encoded = codec.encode(&[], 3).unwrap();
        assert_eq!(encoded.len(), 3);
        assert_eq!(encoded.row(2), b"");
        assert_eq!(hash_columns(&[], 3).unwrap(), encoded.hashes());
    }
}
