//! A value given as text into a column: CSV fields, and JSON strings of the types that JSON lacks.

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use super::{Column, Values};
use crate::format::Reject;
use crate::scalar::{self, DecimalError};

/// Padding is optional on the way in.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

impl Column {
    /// A date, time, timestamp, decimal, binary or sign from its text. Shared by all text formats.
    pub(crate) fn push_quoted(&mut self, text: &[u8]) -> Result<(), Reject> {
        let keep = self.keep;
        match &mut self.values {
            Values::Text(bytes) => {
                if keep {
                    bytes.data.extend_from_slice(text);
                    bytes.close()?;
                }
            }
            Values::Timestamp(v) => match scalar::timestamp(text) {
                Some(us) if keep => v.push(us),
                Some(_) => {}
                None => return Err(self.expected("text that is not a timestamp")),
            },
            Values::Date(v) => match scalar::date(text) {
                Some(day) if keep => v.push(day),
                Some(_) => {}
                None => return Err(self.expected("text that is not a date")),
            },
            Values::Time(v) => match scalar::time(text) {
                Some(us) if keep => v.push(us),
                Some(_) => {}
                None => return Err(self.expected("text that is not a time of day")),
            },
            Values::Decimal { .. } => return self.push_decimal(text),
            Values::Float { values, .. } => {
                let value = match text {
                    b"NaN" => f64::NAN,
                    b"Infinity" => f64::INFINITY,
                    b"-Infinity" => f64::NEG_INFINITY,
                    _ => return Err(self.expected("text")),
                };
                if keep {
                    values.push(value);
                }
            }
            Values::Binary(bytes) => {
                if keep {
                    BASE64.decode_vec(text, &mut bytes.data).map_err(|_| {
                        Reject::new("expected BYTEA, found text that is not base64")
                    })?;
                    bytes.close()?;
                } else if BASE64.decode(text).is_err() {
                    return Err(self.expected("text that is not base64"));
                }
            }
            Values::Sign(v) => match text {
                b"+" => v.push(1),
                b"-" => v.push(-1),
                _ => return Err(self.expected("other text")),
            },
            _ => return Err(self.expected("text")),
        }
        if keep {
            self.push_valid();
        }
        Ok(())
    }

    /// A decimal from a number or its text.
    pub(crate) fn push_decimal(&mut self, text: &[u8]) -> Result<(), Reject> {
        let Values::Decimal {
            values,
            precision,
            scale,
        } = &mut self.values
        else {
            return Err(self.expected("a number"));
        };
        match scalar::decimal(text, *precision, *scale) {
            Ok(value) => {
                if self.keep {
                    values.push(value);
                    self.push_valid();
                }
                Ok(())
            }
            Err(DecimalError::Syntax) => Err(self.expected("text that is not a number")),
            Err(DecimalError::TooLarge) => Err(self.expected("a number that is too large")),
            Err(DecimalError::TooPrecise) => {
                Err(self.expected("a number with more digits after the point"))
            }
        }
    }

    /// An integer as sign and magnitude; `None` is one that no 64 bits hold.
    #[inline]
    pub(crate) fn push_integer(
        &mut self,
        negative: bool,
        magnitude: Option<u64>,
    ) -> Result<(), Reject> {
        let keep = self.keep;
        let fits = match &mut self.values {
            Values::Int { values, min, max } => {
                let value = magnitude.and_then(|m| signed(negative, m));
                match value {
                    Some(value) if (*min..=*max).contains(&value) => {
                        if keep {
                            values.push(value);
                        }
                        true
                    }
                    _ => false,
                }
            }
            Values::UInt(values) => match magnitude {
                Some(value) if !negative || value == 0 => {
                    if keep {
                        values.push(value);
                    }
                    true
                }
                _ => false,
            },
            _ => return Err(self.expected("an integer")),
        };
        if !fits {
            return Err(self.expected("a number out of range"));
        }
        if keep {
            self.push_valid();
        }
        Ok(())
    }

    /// A float from the text of a finite number.
    pub(crate) fn push_float(&mut self, text: &str) -> Result<(), Reject> {
        let keep = self.keep;
        let Values::Float { values, single } = &mut self.values else {
            return Err(self.expected("a number"));
        };
        let parsed = if *single {
            text.parse::<f32>().map(f64::from)
        } else {
            text.parse::<f64>()
        };
        match parsed {
            Ok(value) if value.is_finite() => {
                if keep {
                    values.push(value);
                    self.push_valid();
                }
                Ok(())
            }
            Ok(_) => Err(self.expected("a number out of range")),
            Err(_) => Err(self.expected("text that is not a number")),
        }
    }

    #[inline]
    pub(crate) fn push_bool(&mut self, value: bool) -> Result<(), Reject> {
        let keep = self.keep;
        let Values::Bool(values) = &mut self.values else {
            return Err(self.expected("a boolean"));
        };
        if keep {
            values.push(value);
            self.push_valid();
        }
        Ok(())
    }
}

#[inline]
fn signed(negative: bool, magnitude: u64) -> Option<i64> {
    if negative {
        0_i64.checked_sub_unsigned(magnitude)
    } else {
        i64::try_from(magnitude).ok()
    }
}
