//! Text to single values: decimals, dates, times, timestamps. Shared by all text formats.
//!
//! # Contract
//!
//! * Exact or nothing: no value passes through a float on its way to a decimal, no digit is rounded
//!   away, no date is moved into range. `None` means that the text is not such a value.
//! * Fractions of a second beyond microseconds are cut, which is what the type can hold.

/// Microseconds of a day.
const DAY_US: i64 = 86_400_000_000;

/// A decimal number (`-12.50`, `3e2`) as an integer scaled by `10^scale`; `Err` says why not.
pub fn decimal(text: &[u8], precision: u8, scale: u8) -> Result<i128, DecimalError> {
    let (negative, mut rest) = match text {
        [b'-', rest @ ..] => (true, rest),
        [b'+', rest @ ..] => (false, rest),
        rest => (false, rest),
    };
    let mut exponent: i64 = 0;
    if let Some(e) = rest.iter().position(|b| matches!(b, b'e' | b'E')) {
        exponent = decimal_exponent(&rest[e + 1..])?;
        rest = &rest[..e];
    }
    let (whole, fraction) = match rest.iter().position(|b| *b == b'.') {
        Some(dot) => (&rest[..dot], &rest[dot + 1..]),
        None => (rest, &[][..]),
    };
    if whole.is_empty() && fraction.is_empty() {
        return Err(DecimalError::Syntax);
    }
    // value = mantissa * 10^shift. Zeros are held back until a digit follows them, so that neither
    // leading nor trailing zeros can overflow the mantissa.
    let mut mantissa: i128 = 0;
    let mut zeros: i64 = 0;
    for digit in whole.iter().chain(fraction) {
        if !digit.is_ascii_digit() {
            return Err(DecimalError::Syntax);
        }
        if *digit == b'0' {
            zeros += 1;
            continue;
        }
        let times = if mantissa == 0 { 0 } else { zeros + 1 };
        mantissa = scaled(mantissa, times)?
            .checked_add(i128::from(digit - b'0'))
            .ok_or(DecimalError::TooLarge)?;
        zeros = 0;
    }
    if mantissa == 0 {
        return Ok(0);
    }
    let shift = zeros + exponent - fraction.len() as i64 + i64::from(scale);
    if shift < 0 {
        return Err(DecimalError::TooPrecise);
    }
    let value = scaled(mantissa, shift)?;
    if value >= 10_i128.pow(u32::from(precision.min(38))) {
        return Err(DecimalError::TooLarge);
    }
    Ok(if negative { -value } else { value })
}

/// Why a text is not a decimal of the wanted precision and scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecimalError {
    Syntax,
    /// More digits before the point than the type has.
    TooLarge,
    /// More digits after the point than the type has; rounding would change the value.
    TooPrecise,
}

fn decimal_exponent(text: &[u8]) -> Result<i64, DecimalError> {
    let (negative, digits) = match text {
        [b'-', rest @ ..] => (true, rest),
        [b'+', rest @ ..] => (false, rest),
        rest => (false, rest),
    };
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(DecimalError::Syntax);
    }
    // Beyond any type either way; the cap keeps the arithmetic small.
    let value = digits
        .iter()
        .fold(0_i64, |v, d| (v * 10 + i64::from(d - b'0')).min(1_000_000));
    Ok(if negative { -value } else { value })
}

fn scaled(value: i128, power: i64) -> Result<i128, DecimalError> {
    let power = u32::try_from(power).map_err(|_| DecimalError::TooLarge)?;
    10_i128
        .checked_pow(power)
        .and_then(|p| value.checked_mul(p))
        .ok_or(DecimalError::TooLarge)
}

/// `YYYY-MM-DD` as days since 1970-01-01.
pub fn date(text: &[u8]) -> Option<i32> {
    let [y1, y2, y3, y4, b'-', m1, m2, b'-', d1, d2] = text else {
        return None;
    };
    let year = two(*y1, *y2)? * 100 + two(*y3, *y4)?;
    let (month, day) = (two(*m1, *m2)?, two(*d1, *d2)?);
    if !(1..=12).contains(&month) || day < 1 || day > month_days(year, month) {
        return None;
    }
    Some(days_from_civil(year, month, day))
}

/// `HH:MM:SS[.fraction]` as microseconds since midnight.
pub fn time(text: &[u8]) -> Option<i64> {
    let (us, rest) = time_prefix(text)?;
    rest.is_empty().then_some(us)
}

/// RFC 3339, or `YYYY-MM-DD HH:MM:SS[.fraction]` with an optional offset, as microseconds since the
/// epoch. Without an offset the text counts as UTC.
pub fn timestamp(text: &[u8]) -> Option<i64> {
    let (day, rest) = text.split_at_checked(10)?;
    let days = i64::from(date(day)?);
    let [b'T' | b't' | b' ', rest @ ..] = rest else {
        return None;
    };
    let (us, zone) = time_prefix(rest)?;
    Some(days * DAY_US + us - offset(zone)?)
}

/// Time of day at the front of `text`, and what follows it.
fn time_prefix(text: &[u8]) -> Option<(i64, &[u8])> {
    let [h1, h2, b':', m1, m2, b':', s1, s2, rest @ ..] = text else {
        return None;
    };
    let (hour, minute, second) = (two(*h1, *h2)?, two(*m1, *m2)?, two(*s1, *s2)?);
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let whole = i64::from(hour * 3600 + minute * 60 + second) * 1_000_000;
    let [b'.', rest @ ..] = rest else {
        return Some((whole, rest));
    };
    let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
    if digits == 0 {
        return None;
    }
    let us = (0..6).fold(0_i64, |us, i| {
        us * 10
            + if i < digits {
                i64::from(rest[i] - b'0')
            } else {
                0
            }
    });
    Some((whole + us, &rest[digits..]))
}

/// `Z`, `+HH`, `+HHMM`, `+HH:MM` or nothing, as microseconds east of UTC.
fn offset(text: &[u8]) -> Option<i64> {
    let (sign, hour, minute) = match text {
        [] | [b'Z' | b'z'] => return Some(0),
        [sign, h1, h2] => (sign, two(*h1, *h2)?, 0),
        [sign, h1, h2, m1, m2] | [sign, h1, h2, b':', m1, m2] => {
            (sign, two(*h1, *h2)?, two(*m1, *m2)?)
        }
        _ => return None,
    };
    if hour > 23 || minute > 59 {
        return None;
    }
    let us = i64::from(hour * 60 + minute) * 60_000_000;
    match sign {
        b'+' => Some(us),
        b'-' => Some(-us),
        _ => None,
    }
}

fn two(tens: u8, ones: u8) -> Option<i32> {
    (tens.is_ascii_digit() && ones.is_ascii_digit())
        .then(|| i32::from(tens - b'0') * 10 + i32::from(ones - b'0'))
}

fn month_days(year: i32, month: i32) -> i32 {
    match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days since 1970-01-01 of a date in the proleptic Gregorian calendar; years count from March, so
/// that the leap day is the last of its year.
fn days_from_civil(year: i32, month: i32, day: i32) -> i32 {
    let y = if month <= 2 { year - 1 } else { year };
    let era = y.div_euclid(400);
    let of_era = y.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_are_exact() {
        let ok = [
            ("0", 0),
            ("-0.00", 0),
            ("12.5", 1250),
            ("-12.50", -1250),
            ("12.5000000000000000000000000000000000000000000000000", 1250),
            ("000000000000000000000000000000000000000000000000001", 100),
            ("1.25e2", 12500),
            ("12500E-2", 12500),
            ("99999999.99", 9_999_999_999),
        ];
        for (text, value) in ok {
            assert_eq!(decimal(text.as_bytes(), 10, 2), Ok(value), "{text}");
        }
        let bad = [
            ("", DecimalError::Syntax),
            (".", DecimalError::Syntax),
            ("1x", DecimalError::Syntax),
            ("1e", DecimalError::Syntax),
            ("0.001", DecimalError::TooPrecise),
            ("100000000", DecimalError::TooLarge),
            ("1e400", DecimalError::TooLarge),
            ("1e-400", DecimalError::TooPrecise),
        ];
        for (text, why) in bad {
            assert_eq!(decimal(text.as_bytes(), 10, 2), Err(why), "{text}");
        }
        let largest = "99999999999999999999999999999999999999";
        assert_eq!(decimal(largest.as_bytes(), 38, 0), Ok(10_i128.pow(38) - 1));
        assert_eq!(
            decimal(b"100000000000000000000000000000000000000", 38, 0),
            Err(DecimalError::TooLarge)
        );
    }

    #[test]
    fn times_and_dates() {
        assert_eq!(date(b"1970-01-01"), Some(0));
        assert_eq!(date(b"2024-02-29"), Some(19_782));
        assert_eq!(date(b"0001-01-01"), Some(-719_162));
        assert_eq!(date(b"9999-12-31"), Some(2_932_896));
        for bad in [
            "2023-02-29",
            "2024-13-01",
            "2024-00-10",
            "2024-1-1",
            "24-01-01",
            "2024-04-31",
        ] {
            assert_eq!(date(bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(time(b"23:59:59.999999999"), Some(DAY_US - 1));
        assert_eq!(time(b"24:00:00"), None);
        assert_eq!(time(b"00:00:00."), None);
        let expected = Some(1_706_659_200_000_000 + 3_600_000_000 + 500_000);
        for same in [
            "2024-01-31T01:00:00.5Z",
            "2024-01-31 01:00:00.500000",
            "2024-01-31T03:00:00.5+02:00",
            "2024-01-30t22:30:00.5-0230",
        ] {
            assert_eq!(timestamp(same.as_bytes()), expected, "{same}");
        }
        for bad in [
            "2024-01-31",
            "2024-01-31T01:00",
            "2024-01-31T01:00:00 UTC",
            "1706659200",
            "",
        ] {
            assert_eq!(timestamp(bad.as_bytes()), None, "{bad}");
        }
    }
}
