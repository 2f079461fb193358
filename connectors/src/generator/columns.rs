//! Arrays from a function of the row's number.

use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, StringArray};
use arrow::buffer::{Buffer, OffsetBuffer, ScalarBuffer};

use super::random::below;

/// One of the words.
#[inline]
pub(super) fn pick<'w>(random: u64, words: &[&'w str]) -> &'w [u8] {
    words[below(random, words.len() as u64) as usize].as_bytes()
}

/// The number in decimal digits.
pub(super) fn append_number(out: &mut Vec<u8>, number: u64) {
    append_padded(out, number, 1);
}

/// The number with zeros in front, so that it has at least `width` digits.
pub(super) fn append_padded(out: &mut Vec<u8>, mut number: u64, width: usize) {
    let mut digits = [b'0'; 20];
    let mut at = digits.len();
    while number > 0 {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
    }
    out.extend_from_slice(&digits[at.min(digits.len() - width)..]);
}

pub(super) fn longs(numbers: &[u64], value: impl Fn(u64) -> i64) -> ArrayRef {
    Arc::new(Int64Array::from_iter_values(
        numbers.iter().map(|n| value(*n)),
    ))
}

/// `about` is the expected length of one string.
pub(super) fn strings(
    numbers: &[u64],
    about: usize,
    append: impl Fn(u64, &mut Vec<u8>),
) -> ArrayRef {
    // A few letters more, which `append_letters` cuts off again.
    let mut data = Vec::with_capacity(numbers.len() * about + 64);
    let mut offsets = Vec::with_capacity(numbers.len() + 1);
    offsets.push(0);
    for n in numbers {
        append(*n, &mut data);
        offsets.push(i32::try_from(data.len()).expect("a batch holds far less than 2 GiB of text"));
    }
    let offsets = OffsetBuffer::new(ScalarBuffer::from(offsets));
    Arc::new(StringArray::new(offsets, Buffer::from_vec(data), None))
}
