//! Values of up to 64 bits as words whose order is the order of the values, and back.

use std::sync::Arc;

use arrow::array::{ArrayData, ArrayRef, BooleanArray, make_array};
use arrow::buffer::{BooleanBuffer, Buffer, NullBuffer};
use arrow::datatypes::DataType;

use crate::key;

const SIGN: u64 = 1 << 63;
const SIGN_32: u64 = 1 << 31;

/// Words of a column, in the order of the values: NaN greatest, one zero. Those of nulls are arbitrary.
/// `None` when the type is none of [`key::is_word`].
pub(crate) fn ordered(column: &ArrayRef) -> Option<Vec<u64>> {
    let words = key::words(column)?;
    let words = words.iter();
    Some(match column.data_type() {
        DataType::Float64 => words
            .map(|w| if w & SIGN == 0 { w ^ SIGN } else { !w })
            .collect(),
        DataType::Float32 => words
            .map(|w| {
                if w & SIGN_32 == 0 {
                    w ^ SIGN_32
                } else {
                    !w & u64::from(u32::MAX)
                }
            })
            .collect(),
        unsigned if is_unsigned(unsigned) => words.copied().collect(),
        _ => words.map(|w| w ^ SIGN).collect(),
    })
}

fn is_unsigned(data_type: &DataType) -> bool {
    data_type.is_unsigned_integer() || data_type == &DataType::Boolean
}

/// The column of these ordered words; `valid` is false where it is null.
pub(crate) fn restore(words: &[u64], valid: &[bool], data_type: &DataType) -> ArrayRef {
    let nulls = Some(NullBuffer::from_iter(valid.iter().copied())).filter(|n| n.null_count() > 0);
    let plain = |word: &u64| match data_type {
        DataType::Float64 if word & SIGN != 0 => word ^ SIGN,
        DataType::Float64 => !word,
        DataType::Float32 if word & SIGN_32 != 0 => word ^ SIGN_32,
        DataType::Float32 => !word & u64::from(u32::MAX),
        unsigned if is_unsigned(unsigned) => *word,
        _ => word ^ SIGN,
    };
    let words = words.iter().map(plain);
    let buffer = match data_type.primitive_width() {
        Some(1) => Buffer::from_vec(words.map(|w| w as u8).collect::<Vec<_>>()),
        Some(2) => Buffer::from_vec(words.map(|w| w as u16).collect::<Vec<_>>()),
        Some(4) => Buffer::from_vec(words.map(|w| w as u32).collect::<Vec<_>>()),
        Some(_) => Buffer::from_vec(words.collect::<Vec<_>>()),
        None => {
            let values = words.map(|w| w != 0).collect::<BooleanBuffer>();
            return Arc::new(BooleanArray::new(values, nulls));
        }
    };
    let data = ArrayData::builder(data_type.clone())
        .len(valid.len())
        .add_buffer(buffer)
        .nulls(nulls)
        .build()
        .expect("the buffer has the width of the type for each row");
    make_array(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{
        Array, Date32Array, Float32Array, Float64Array, Int8Array, Int64Array,
        TimestampMicrosecondArray, UInt16Array,
    };

    #[test]
    fn words_keep_the_order_and_come_back() {
        let nan = f64::NAN;
        let columns: Vec<ArrayRef> = vec![
            Arc::new(Int8Array::from(vec![i8::MIN, -1, 0, 1, i8::MAX])),
            Arc::new(Int64Array::from(vec![i64::MIN, -1, 0, 1, i64::MAX])),
            Arc::new(UInt16Array::from(vec![0, 1, 2, 40_000, u16::MAX])),
            Arc::new(Date32Array::from(vec![i32::MIN, -1, 0, 1, i32::MAX])),
            Arc::new(TimestampMicrosecondArray::from(vec![
                i64::MIN,
                -5,
                0,
                5,
                i64::MAX,
            ])),
            Arc::new(Float64Array::from(vec![
                f64::NEG_INFINITY,
                -1.5,
                0.0,
                f64::INFINITY,
                nan,
            ])),
            Arc::new(Float32Array::from(vec![
                f32::NEG_INFINITY,
                -1.5,
                0.0,
                1.5,
                f32::NAN,
            ])),
            Arc::new(BooleanArray::from(vec![false, false, false, true, true])),
        ];
        for column in columns {
            let words = ordered(&column).unwrap();
            assert!(words.is_sorted(), "{:?}", column.data_type());
            let back = restore(&words, &[true; 5], column.data_type());
            assert_eq!(back.to_data(), column.to_data());
            let valid = [false, true, true, true, true];
            assert!(restore(&words, &valid, column.data_type()).is_null(0));
        }
    }
}
