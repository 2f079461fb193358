//! Exact sums of floats: adding is associative, commutative and has an inverse.
//!
//! A float sum in floating point depends on the order of its terms, and taking a term back does not
//! give the old sum. Here every finite `f64` is an integer multiple of 2^-1074 and the sum is kept as
//! that integer, in two's complement over 64-bit limbs. Replay, retraction and any division of the
//! work over workers therefore give the same bits.
//!
//! # Contract
//!
//! * [`ExactSum::value`] is the exact sum rounded once, to nearest, ties to even.
//! * Equal multisets of terms give equal [`ExactSum::to_bytes`], however they were reached.
//! * NaN and the infinities are counted apart, so they can be taken back too.
//!
//! Only the range of limbs in use is held: prices need three limbs, not the 36 of the full range.

use crate::error::{Error, ErrorKind, Result};

/// Limbs beyond this cannot arise: 2098 bits of range, 63 of multiplicity, 64 of count, one of sign.
const MAX_LIMBS: usize = 40;
const SPECIAL: u8 = 0x80;

/// An exact sum of `f64` terms with multiplicities. See the module contract.
#[derive(Debug, Clone, Default)]
pub struct ExactSum {
    /// Index of the lowest limb held; those below are zero.
    low: usize,
    /// Two's complement, least significant first, sign extended above the last one. The last limb is
    /// headroom: it is 0 or all ones before every addition.
    limbs: Vec<u64>,
    nan: i64,
    positive_infinity: i64,
    negative_infinity: i64,
}

impl ExactSum {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `value` as often as `multiplicity` says; a negative one takes it back.
    pub fn add(&mut self, value: f64, multiplicity: i64) {
        let bits = value.to_bits();
        let exponent = ((bits >> 52) & 0x7ff) as usize;
        let fraction = bits & ((1 << 52) - 1);
        let negative = bits >> 63 == 1;
        if exponent == 0x7ff {
            let counter = match (fraction, negative) {
                (0, false) => &mut self.positive_infinity,
                (0, true) => &mut self.negative_infinity,
                _ => &mut self.nan,
            };
            *counter = counter.wrapping_add(multiplicity);
            return;
        }
        // value = mantissa * 2^(shift - 1074)
        let (mantissa, shift) = match exponent {
            0 => (fraction, 0),
            e => (fraction | 1 << 52, e - 1),
        };
        if mantissa == 0 || multiplicity == 0 {
            return;
        }
        let term = u128::from(mantissa) * u128::from(multiplicity.unsigned_abs());
        let (index, offset) = (shift / 64, shift % 64);
        let (low, high) = (term as u64, (term >> 64) as u64);
        let words = match offset {
            0 => [low, high, 0],
            _ => [
                low << offset,
                low >> (64 - offset) | high << offset,
                high >> (64 - offset),
            ],
        };
        self.reserve(index, index + 4);
        let at = index - self.low;
        if negative == (multiplicity < 0) {
            add_limbs(&mut self.limbs[at..], &words);
        } else {
            subtract_limbs(&mut self.limbs[at..], &words);
        }
    }

    /// Adds all terms of `other`.
    pub fn merge(&mut self, other: &Self) {
        self.nan = self.nan.wrapping_add(other.nan);
        self.positive_infinity = self.positive_infinity.wrapping_add(other.positive_infinity);
        self.negative_infinity = self.negative_infinity.wrapping_add(other.negative_infinity);
        if other.limbs.is_empty() {
            return;
        }
        self.reserve(other.low, other.low + other.limbs.len() + 1);
        let at = other.low - self.low;
        let negative = other.is_negative();
        let upper = add_limbs(&mut self.limbs[at..at + other.limbs.len()], &other.limbs);
        // The sign of `other` continues over our higher limbs, together with the carry.
        let rest = &mut self.limbs[at + other.limbs.len()..];
        match (negative, upper) {
            (false, true) => {
                add_limbs(rest, &[1]);
            }
            (true, false) => subtract_limbs(rest, &[1]),
            (false, false) | (true, true) => {}
        }
    }

    /// No term is left (every one was taken back).
    pub fn is_zero(&self) -> bool {
        self.nan == 0
            && self.positive_infinity == 0
            && self.negative_infinity == 0
            && self.limbs.iter().all(|limb| *limb == 0)
    }

    /// The sum, rounded to the nearest `f64`, ties to even; beyond the range it is an infinity.
    pub fn value(&self) -> f64 {
        if self.nan > 0 || (self.positive_infinity > 0 && self.negative_infinity > 0) {
            return f64::NAN;
        }
        if self.positive_infinity > 0 {
            return f64::INFINITY;
        }
        if self.negative_infinity > 0 {
            return f64::NEG_INFINITY;
        }
        let negative = self.is_negative();
        let mut buffer = [0u64; MAX_LIMBS];
        let magnitude = &mut buffer[..self.limbs.len()];
        magnitude.copy_from_slice(&self.limbs);
        if negative {
            negate(magnitude);
        }
        let Some(top) = magnitude.iter().rposition(|limb| *limb != 0) else {
            return 0.0;
        };
        let top_bit = 63 - magnitude[top].leading_zeros() as usize;
        // Position of the highest bit above 2^-1074.
        let position = (self.low + top) * 64 + top_bit;
        let bit = |at: usize| match (at / 64).checked_sub(self.low) {
            Some(limb) => magnitude[limb] >> (at % 64) & 1,
            None => 0,
        };
        let bits = if position <= 52 {
            // Exact: subnormal, or the lowest binade, whose pattern is the integer itself.
            magnitude[top] << (64 * (self.low + top))
        } else {
            let lowest = position - 52;
            let word = |at: usize| match at.checked_sub(self.low) {
                Some(limb) => magnitude.get(limb).copied().unwrap_or(0),
                None => 0,
            };
            let (limb, offset) = (lowest / 64, lowest % 64);
            let pair = u128::from(word(limb)) | u128::from(word(limb + 1)) << 64;
            let mantissa = (pair >> offset) as u64 & ((1 << 53) - 1);
            let half = bit(lowest - 1) == 1;
            let sticky = half && {
                let (limb, offset) = ((lowest - 1) / 64, (lowest - 1) % 64);
                let partial = word(limb) & ((1 << offset) - 1);
                let below = limb.saturating_sub(self.low).min(magnitude.len());
                partial != 0 || magnitude[..below].iter().any(|limb| *limb != 0)
            };
            // The implicit bit adds one to the exponent field; a carry out of the mantissa does too.
            let exact = ((lowest as u64) << 52) + mantissa;
            exact + u64::from(half && (sticky || mantissa & 1 == 1))
        };
        let magnitude = if bits >= 0x7ff << 52 {
            f64::INFINITY
        } else {
            f64::from_bits(bits)
        };
        if negative { -magnitude } else { magnitude }
    }

    /// The canonical form: equal sums have equal bytes. Zero takes one byte, a price about 18.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(2 + 8 * self.limbs.len());
        self.write(&mut out);
        out
    }

    /// Appends the canonical form, which tells its own length.
    pub fn write(&self, out: &mut Vec<u8>) {
        let (low, limbs) = self.canonical();
        let special = self.nan != 0 || self.positive_infinity != 0 || self.negative_infinity != 0;
        out.push(limbs.len() as u8 | if special { SPECIAL } else { 0 });
        if !limbs.is_empty() {
            out.push(low as u8);
        }
        for limb in limbs {
            out.extend_from_slice(&limb.to_le_bytes());
        }
        if special {
            for count in [self.nan, self.positive_infinity, self.negative_infinity] {
                out.extend_from_slice(&count.to_le_bytes());
            }
        }
    }

    /// Reads what [`Self::to_bytes`] wrote, all of it.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        match Self::read(bytes)? {
            (sum, rest) if rest.is_empty() => Ok(sum),
            _ => Err(corrupt()),
        }
    }

    /// Reads one sum from the front; gives the rest back.
    pub fn read(bytes: &[u8]) -> Result<(Self, &[u8])> {
        let (head, mut rest) = bytes.split_first().ok_or_else(corrupt)?;
        let count = (head & !SPECIAL) as usize;
        let mut sum = Self::default();
        if count > 0 {
            let (low, after) = rest.split_first().ok_or_else(corrupt)?;
            sum.low = *low as usize;
            if sum.low + count > MAX_LIMBS {
                return Err(corrupt());
            }
            let (words, after) = after.split_at_checked(8 * count).ok_or_else(corrupt)?;
            sum.limbs = words.chunks_exact(8).map(word).collect();
            rest = after;
        }
        if head & SPECIAL != 0 {
            let (words, after) = rest.split_at_checked(24).ok_or_else(corrupt)?;
            let mut counts = words.chunks_exact(8).map(|bytes| word(bytes) as i64);
            sum.nan = counts.next().unwrap_or(0);
            sum.positive_infinity = counts.next().unwrap_or(0);
            sum.negative_infinity = counts.next().unwrap_or(0);
            rest = after;
        }
        Ok((sum, rest))
    }

    fn is_negative(&self) -> bool {
        self.limbs.last().is_some_and(|limb| limb >> 63 == 1)
    }

    /// Limbs without zeros at the bottom and without a repeated sign at the top.
    fn canonical(&self) -> (usize, &[u64]) {
        let sign = if self.is_negative() { u64::MAX } else { 0 };
        let mut limbs = &self.limbs[..];
        while let [rest @ .., last] = limbs {
            // A limb may go when the one below carries the same sign (nothing below counts as 0).
            let below = rest.last().map_or(0, |limb| (*limb as i64 >> 63) as u64);
            if *last == sign && below == sign {
                limbs = rest;
            } else {
                break;
            }
        }
        let zeros = limbs.iter().take_while(|limb| **limb == 0).count();
        (self.low + zeros, &limbs[zeros..])
    }

    /// Makes limbs `low..high` present with one limb of headroom above every bit in use.
    fn reserve(&mut self, low: usize, high: usize) {
        if self.limbs.is_empty() {
            self.low = low;
        }
        if low < self.low {
            let missing = self.low - low;
            self.limbs.splice(0..0, std::iter::repeat_n(0, missing));
            self.low = low;
        }
        let sign = if self.is_negative() { u64::MAX } else { 0 };
        while self.low + self.limbs.len() < high || self.limbs.last().is_some_and(|l| *l != sign) {
            self.limbs.push(sign);
        }
    }
}

/// Sums are equal when their canonical forms are.
impl PartialEq for ExactSum {
    fn eq(&self, other: &Self) -> bool {
        self.to_bytes() == other.to_bytes()
    }
}

impl Eq for ExactSum {}

/// Adds `words` at the bottom of `limbs` and carries on; gives the carry out of the top.
fn add_limbs(limbs: &mut [u64], words: &[u64]) -> bool {
    let mut carry = false;
    for (at, limb) in limbs.iter_mut().enumerate() {
        if at >= words.len() && !carry {
            break;
        }
        let (sum, first) = limb.overflowing_add(words.get(at).copied().unwrap_or(0));
        let (sum, second) = sum.overflowing_add(u64::from(carry));
        *limb = sum;
        carry = first | second;
    }
    carry
}

fn subtract_limbs(limbs: &mut [u64], words: &[u64]) {
    let mut borrow = false;
    for (at, limb) in limbs.iter_mut().enumerate() {
        if at >= words.len() && !borrow {
            break;
        }
        let (rest, first) = limb.overflowing_sub(words.get(at).copied().unwrap_or(0));
        let (rest, second) = rest.overflowing_sub(u64::from(borrow));
        *limb = rest;
        borrow = first | second;
    }
}

fn negate(limbs: &mut [u64]) {
    for limb in limbs.iter_mut() {
        *limb = !*limb;
    }
    add_limbs(limbs, &[1]);
}

fn word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("the slice has eight bytes"))
}

fn corrupt() -> Error {
    Error::new(ErrorKind::Corrupt, "a stored float sum is damaged")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The sum in a wide integer of 32-bit digits with explicit sign: shares no code with the above.
    fn naive(terms: &[(f64, i64)]) -> f64 {
        const DIGITS: usize = 80;
        let mut digits = [0i128; DIGITS];
        for (value, times) in terms {
            let bits = value.to_bits();
            let exponent = (bits >> 52 & 0x7ff) as usize;
            let fraction = i128::from(bits & ((1u64 << 52) - 1));
            let mantissa = if exponent == 0 {
                fraction
            } else {
                fraction | 1 << 52
            };
            let sign = if *value < 0.0 { -1 } else { 1 };
            let shift = exponent.max(1) - 1;
            // One bit at a time keeps this obviously right.
            for bit in 0..53 {
                if mantissa >> bit & 1 == 1 {
                    let at = shift + bit;
                    digits[at / 32] += sign * i128::from(*times) * (1i128 << (at % 32));
                }
            }
        }
        let carry = |digits: &mut [i128; DIGITS]| {
            for at in 0..DIGITS - 1 {
                let carry = digits[at].div_euclid(1 << 32);
                digits[at] -= carry << 32;
                digits[at + 1] += carry;
            }
        };
        carry(&mut digits);
        let negative = digits[DIGITS - 1] < 0;
        if negative {
            digits.iter_mut().for_each(|d| *d = -*d);
            carry(&mut digits);
        }
        let bit = |at: usize| digits[at / 32] >> (at % 32) & 1;
        let Some(top) = (0..DIGITS * 32).rev().find(|at| bit(*at) == 1) else {
            return 0.0;
        };
        let lowest = top.saturating_sub(52);
        let mut mantissa = (lowest..=top).fold(0u64, |m, at| m | (bit(at) as u64) << (at - lowest));
        if lowest > 0 && bit(lowest - 1) == 1 {
            let sticky = (0..lowest - 1).any(|at| bit(at) == 1);
            if sticky || mantissa & 1 == 1 {
                mantissa += 1;
            }
        }
        // Two exact steps: the mantissa is below 2^54 and the scale is a power of two.
        let scale = lowest as i32 - 1074;
        let scaled = match scale {
            -1074..-900 => mantissa as f64 * 2f64.powi(scale + 200) * 2f64.powi(-200),
            971.. => (mantissa as f64 * 2f64.powi(900)) * 2f64.powi(scale - 900),
            _ => mantissa as f64 * 2f64.powi(scale),
        };
        if negative { -scaled } else { scaled }
    }

    fn finite() -> impl Strategy<Value = f64> {
        prop_oneof![
            any::<u64>()
                .prop_map(f64::from_bits)
                .prop_filter("finite", |f| f.is_finite()),
            (-1_000_000i64..1_000_000).prop_map(|cents| cents as f64 / 100.0),
            Just(f64::MIN_POSITIVE),
            Just(f64::from_bits(1)),
            Just(0.1),
            Just(1e300),
            Just(-1e300),
        ]
    }

    fn terms() -> impl Strategy<Value = Vec<(f64, i64)>> {
        let times = prop_oneof![Just(1i64), Just(-1), -5i64..6, any::<i64>()];
        prop::collection::vec((finite(), times), 0..24)
    }

    proptest! {
        #[test]
        fn equals_the_naive_sum(terms in terms()) {
            let mut sum = ExactSum::new();
            for (value, times) in &terms {
                sum.add(*value, *times);
            }
            let (got, want) = (sum.value(), naive(&terms));
            prop_assert_eq!(got.to_bits(), want.to_bits(), "{} {}", got, want);
        }

        #[test]
        fn order_split_and_retraction_leave_no_trace(
            terms in terms(), churn in terms(), cut in 0usize..24,
        ) {
            let mut forward = ExactSum::new();
            for (value, times) in &terms {
                forward.add(*value, *times);
            }
            let cut = cut.min(terms.len());
            let (mut left, mut right) = (ExactSum::new(), ExactSum::new());
            for (value, times) in &churn {
                left.add(*value, *times);
            }
            for (value, times) in terms[..cut].iter().rev() {
                left.add(*value, *times);
            }
            for (value, times) in terms[cut..].iter().rev() {
                right.add(*value, *times);
            }
            right.merge(&left);
            for (value, times) in &churn {
                right.add(*value, times.wrapping_neg());
                if *times == i64::MIN {
                    // Its own negation: the two additions make -2^64 copies.
                    right.add(*value, i64::MAX);
                    right.add(*value, 1);
                    right.add(*value, i64::MAX);
                    right.add(*value, 1);
                }
            }
            prop_assert_eq!(right.to_bytes(), forward.to_bytes());
            let read = ExactSum::from_bytes(&forward.to_bytes()).unwrap();
            prop_assert_eq!(read.to_bytes(), forward.to_bytes());
            prop_assert_eq!(read.value().to_bits(), forward.value().to_bits());
        }
    }

    #[test]
    fn ties_go_to_even_and_the_range_ends_in_infinity() {
        let mut sum = ExactSum::new();
        sum.add(9007199254740992.0, 1); // 2^53
        sum.add(1.0, 1);
        assert_eq!(sum.value(), 9007199254740992.0);
        sum.add(f64::from_bits(1), 1);
        assert_eq!(sum.value(), 9007199254740994.0);
        let mut sum = ExactSum::new();
        sum.add(f64::MAX, 2);
        assert_eq!(sum.value(), f64::INFINITY);
        sum.add(f64::MAX, -1);
        assert_eq!(sum.value(), f64::MAX);
    }

    #[test]
    fn special_values_can_be_taken_back() {
        let mut sum = ExactSum::new();
        sum.add(1.5, 1);
        let plain = sum.to_bytes();
        sum.add(f64::INFINITY, 2);
        assert_eq!(sum.value(), f64::INFINITY);
        sum.add(f64::NEG_INFINITY, 1);
        assert!(sum.value().is_nan());
        let stored = ExactSum::from_bytes(&sum.to_bytes()).unwrap();
        assert!(stored.value().is_nan());
        sum.add(f64::NEG_INFINITY, -1);
        sum.add(f64::INFINITY, -2);
        sum.add(f64::NAN, 1);
        assert!(sum.value().is_nan());
        sum.add(f64::NAN, -1);
        assert_eq!(sum.to_bytes(), plain);
    }

    #[test]
    fn damaged_bytes_are_refused() {
        let mut sum = ExactSum::new();
        sum.add(12.5, 1);
        let bytes = sum.to_bytes();
        assert!(ExactSum::from_bytes(&bytes[..bytes.len() - 1]).is_err());
        assert!(ExactSum::from_bytes(&[]).is_err());
        assert!(ExactSum::from_bytes(&[0x7f, 0]).is_err());
    }
}
