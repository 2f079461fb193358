//! Reads the options of `WITH (…)`: each once, none unknown, with units.

use std::collections::BTreeMap;
use std::time::Duration;

use millrace_dataflow::error::{Error, Result};

/// Options not yet taken.
pub struct Options<'a> {
    sink: &'static str,
    left: BTreeMap<&'a str, &'a str>,
    known: Vec<&'static str>,
}

impl<'a> Options<'a> {
    /// Options of a sink; its name goes into messages.
    pub fn new(sink: &'static str, options: &'a BTreeMap<String, String>) -> Self {
        let left = options
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        Self {
            sink,
            left,
            known: vec![],
        }
    }

    pub fn text(&mut self, key: &'static str) -> Option<&'a str> {
        self.known.push(key);
        self.left.remove(key)
    }

    /// A number of bytes: `134217728`, `128 MB`, `64kb`.
    pub fn bytes(&mut self, key: &'static str) -> Result<Option<u64>> {
        let Some(text) = self.text(key) else {
            return Ok(None);
        };
        let (number, unit) = split_unit(text);
        let scale = match unit.as_str() {
            "" | "b" => Some(1_u64),
            "kb" | "kib" => Some(1 << 10),
            "mb" | "mib" => Some(1 << 20),
            "gb" | "gib" => Some(1 << 30),
            _ => None,
        };
        number
            .parse::<u64>()
            .ok()
            .zip(scale)
            .and_then(|(number, scale)| number.checked_mul(scale))
            .map(Some)
            .ok_or_else(|| self.bad(key, text, "a size such as '128 MB'"))
    }

    /// A length of time: `10 s`, `500ms`, `1 minute`.
    pub fn duration(&mut self, key: &'static str) -> Result<Option<Duration>> {
        let Some(text) = self.text(key) else {
            return Ok(None);
        };
        let (number, unit) = split_unit(text);
        let scale_ms = match unit.trim_end_matches('s') {
            "m" if unit == "ms" => Some(1_u64),
            "millisecond" => Some(1),
            "" | "second" | "sec" => Some(1_000),
            "m" | "min" | "minute" => Some(60_000),
            "h" | "hour" => Some(3_600_000),
            _ => None,
        };
        number
            .parse::<u64>()
            .ok()
            .zip(scale_ms)
            .and_then(|(number, scale)| number.checked_mul(scale))
            .map(|ms| Some(Duration::from_millis(ms)))
            .ok_or_else(|| self.bad(key, text, "a length of time such as '10 s'"))
    }

    /// Refuses a value.
    pub fn bad(&self, key: &str, value: &str, wanted: &str) -> Error {
        Error::invalid(format!(
            "option \"{key}\" of the {} sink cannot be '{value}'",
            self.sink
        ))
        .hint(format!("give {wanted}"))
    }

    /// Refuses what nobody asked for.
    pub fn finish(self) -> Result<()> {
        let Some(key) = self.left.keys().next() else {
            return Ok(());
        };
        let hint = if self.known.is_empty() {
            "it takes no options".to_string()
        } else {
            format!("it takes: {}", self.known.join(", "))
        };
        Err(Error::invalid(format!(
            "unknown option \"{key}\" of the {} sink",
            self.sink
        ))
        .hint(hint))
    }
}

fn split_unit(text: &str) -> (&str, String) {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    (&text[..end], text[end..].trim().to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(key: &str, value: &str) -> BTreeMap<String, String> {
        BTreeMap::from([(key.to_string(), value.to_string())])
    }

    #[test]
    fn sizes_and_times_have_units() {
        for (text, bytes) in [("128 MB", 128 << 20), ("64kb", 64 << 10), ("17", 17)] {
            let options = one("size", text);
            let read = Options::new("test", &options)
                .bytes("size")
                .expect("a size");
            assert_eq!(read, Some(bytes), "{text}");
        }
        for (text, ms) in [
            ("500ms", 500),
            ("10 s", 10_000),
            ("3", 3_000),
            ("1 minute", 60_000),
            ("2m", 120_000),
        ] {
            let options = one("every", text);
            let read = Options::new("test", &options)
                .duration("every")
                .expect("a time");
            assert_eq!(read, Some(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "MB", "-1", "1 parsec", "99999999999999999999"] {
            let options = one("x", text);
            assert!(Options::new("test", &options).bytes("x").is_err(), "{text}");
            assert!(
                Options::new("test", &options).duration("x").is_err(),
                "{text}"
            );
        }
    }

    #[test]
    fn unknown_options_are_named_with_the_known_ones() {
        let options = one("colour", "red");
        let mut read = Options::new("test", &options);
        assert_eq!(read.text("size"), None);
        let e = read.finish().expect_err("unknown");
        assert!(e.message.contains("\"colour\""), "{}", e.message);
        assert_eq!(e.hint.as_deref(), Some("it takes: size"));
    }
}
