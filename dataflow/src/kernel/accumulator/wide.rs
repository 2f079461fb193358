//! Sums of integers and decimals in 192 bits, two's complement.
//!
//! A `Decimal128` takes 127 bits and a multiplicity 64, so no single term overflows; a sum of terms
//! could only after more rows than can be stored. Whether a sum fits its type is judged when it is
//! shown: overflow goes away when its cause is retracted.

use arrow::datatypes::i256;

pub(crate) const BYTES: usize = 24;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Wide {
    low: u128,
    high: i64,
}

impl Wide {
    /// Adds `value` once.
    #[inline]
    pub(crate) fn add(&mut self, value: i128) {
        let (low, carry) = self.low.overflowing_add(value as u128);
        self.low = low;
        let sign = (value >> 127) as i64;
        self.high = self.high.wrapping_add(sign).wrapping_add(i64::from(carry));
    }

    /// Adds `value` as often as `multiplicity` says.
    #[inline]
    pub(crate) fn add_times(&mut self, value: i128, multiplicity: i64) {
        if let Some(product) = value.checked_mul(i128::from(multiplicity)) {
            return self.add(product);
        }
        let times = i128::from(multiplicity);
        self.add(i128::from(value as u64) * times);
        let upper = (value >> 64) * times;
        // upper * 2^64 as 192 bits
        self.merge(Self {
            low: (upper as u128) << 64,
            high: (upper >> 64) as i64,
        });
    }

    #[inline]
    pub(crate) fn merge(&mut self, other: Self) {
        let (low, carry) = self.low.overflowing_add(other.low);
        self.low = low;
        self.high = self
            .high
            .wrapping_add(other.high)
            .wrapping_add(i64::from(carry));
    }

    #[inline]
    pub(crate) fn to_bytes(self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        bytes[..16].copy_from_slice(&self.low.to_le_bytes());
        bytes[16..].copy_from_slice(&self.high.to_le_bytes());
        bytes
    }

    /// Reads the first 24 bytes.
    #[inline]
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        Self {
            low: u128::from_le_bytes(bytes[..16].try_into().expect("the slice has 16 bytes")),
            high: i64::from_le_bytes(bytes[16..BYTES].try_into().expect("the slice has 8 bytes")),
        }
    }

    fn small(self) -> Option<i128> {
        let low = self.low as i128;
        (self.high == (low >> 127) as i64).then_some(low)
    }

    /// The sum times ten to `power`, if that fits.
    pub(crate) fn scaled(self, power: u32) -> Option<i128> {
        let factor = 10i128.checked_pow(power)?;
        self.small()?.checked_mul(factor)
    }

    /// The sum times ten to `power` over `count`, rounded half away from zero, if that fits.
    pub(crate) fn average(self, power: u32, count: i64) -> Option<i128> {
        let (factor, divisor) = (10i128.checked_pow(power)?, i128::from(count));
        if let Some(scaled) = self.small().and_then(|sum| sum.checked_mul(factor)) {
            let (quotient, remainder) = (scaled / divisor, scaled % divisor);
            let up = remainder.unsigned_abs() * 2 >= divisor.unsigned_abs();
            return Some(
                quotient
                    + if up {
                        scaled.signum() * divisor.signum()
                    } else {
                        0
                    },
            );
        }
        let sum = i256::from_parts(self.low, i128::from(self.high));
        let scaled = sum.checked_mul(i256::from_i128(factor))?;
        let divisor = i256::from_i128(divisor);
        let (quotient, remainder) = (scaled.checked_div(divisor)?, scaled.checked_rem(divisor)?);
        let twice = remainder
            .wrapping_abs()
            .wrapping_add(remainder.wrapping_abs());
        let quotient = quotient.to_i128()?;
        if twice >= divisor.wrapping_abs() {
            let sign = if scaled.is_negative() == divisor.is_negative() {
                1
            } else {
                -1
            };
            quotient.checked_add(sign)
        } else {
            Some(quotient)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_beyond_128_bits_can_be_taken_back() {
        let terms = [
            (i128::MAX, i64::MAX),
            (i128::MIN, 7),
            (-5, i64::MIN),
            (i128::MIN, i64::MIN),
        ];
        let mut sum = Wide::default();
        for (value, times) in terms {
            sum.add_times(value, times);
        }
        let mut want = i256::ZERO;
        for (value, times) in terms {
            want = want
                .wrapping_add(i256::from_i128(value).wrapping_mul(i256::from_i128(times.into())));
        }
        assert_eq!(i256::from_parts(sum.low, sum.high.into()), want);
        assert_eq!(sum.scaled(0), None);
        assert_eq!(Wide::from_bytes(&sum.to_bytes()), sum);
        for (value, times) in terms {
            // i64::MIN has no opposite.
            sum.add_times(value, -times.max(-i64::MAX));
            sum.add_times(value, i64::from(times == i64::MIN));
        }
        assert_eq!(sum, Wide::default());
    }

    #[test]
    fn averages_round_half_away_from_zero() {
        let of = |sum: i128, count, power| {
            let mut wide = Wide::default();
            wide.add(sum);
            wide.average(power, count)
        };
        assert_eq!(of(7, 2, 0), Some(4));
        assert_eq!(of(-7, 2, 0), Some(-4));
        assert_eq!(of(-1, 3, 6), Some(-333_333));
        assert_eq!(of(2, 3, 6), Some(666_667));
        // Needs 256 bits on the way.
        let large = 10i128.pow(38) - 1;
        assert_eq!(of(large, 1_000_000, 6), Some(large));
        assert_eq!(of(-large, 2_000_000, 6), Some(-(large + 1) / 2));
    }
}
