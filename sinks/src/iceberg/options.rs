//! `WITH (…)` of a sink into a lake table.

use std::collections::BTreeMap;
use std::time::Duration;

use millrace_dataflow::error::Result;

use crate::options::Options;

const TARGET_FILE_SIZE: u64 = 128 << 20;
/// Smaller files than this are a mistake in the unit.
const TARGET_FILE_SIZE_MIN: u64 = 64 << 10;
const TARGET_FILE_SIZE_MAX: u64 = 8 << 30;

/// Options of a sink into a lake table, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IcebergOptions {
    /// Files are closed when they reach about this many bytes.
    pub target_file_size: u64,
    /// Each change is a row, with its sign in `op` and its time in `tick`.
    pub changelog: bool,
    /// How often the engine ends an epoch; `None`: its default.
    pub commit_interval: Option<Duration>,
}

impl Default for IcebergOptions {
    fn default() -> Self {
        Self {
            target_file_size: TARGET_FILE_SIZE,
            changelog: false,
            commit_interval: None,
        }
    }
}

impl IcebergOptions {
    /// Reads and checks all of them.
    pub fn parse(options: &BTreeMap<String, String>) -> Result<Self> {
        let mut read = Options::new("iceberg", options);
        let target_file_size = read.bytes("target_file_size")?.unwrap_or(TARGET_FILE_SIZE);
        if !(TARGET_FILE_SIZE_MIN..=TARGET_FILE_SIZE_MAX).contains(&target_file_size) {
            let value = target_file_size.to_string();
            return Err(read.bad("target_file_size", &value, "a size from '64 kB' to '8 GB'"));
        }
        let changelog = match read.text("changelog") {
            None => false,
            Some("op") => true,
            Some(other) => return Err(read.bad("changelog", other, "'op', or leave it out")),
        };
        let commit_interval = read.duration("commit_interval")?;
        if let Some(interval) = commit_interval
            && interval < Duration::from_millis(100)
        {
            let value = format!("{} ms", interval.as_millis());
            return Err(read.bad("commit_interval", &value, "at least '100 ms'"));
        }
        read.finish()?;
        Ok(Self {
            target_file_size,
            changelog,
            commit_interval,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<IcebergOptions> {
        let pairs = pairs
            .iter()
            .map(|(k, v)| ((*k).to_string(), (*v).to_string()));
        IcebergOptions::parse(&pairs.collect())
    }

    #[test]
    fn options_are_checked() {
        assert_eq!(parse(&[]).expect("defaults"), IcebergOptions::default());
        let read = parse(&[
            ("target_file_size", "1 MB"),
            ("changelog", "op"),
            ("commit_interval", "2 s"),
        ])
        .expect("all of them");
        assert_eq!(read.target_file_size, 1 << 20);
        assert!(read.changelog);
        assert_eq!(read.commit_interval, Some(Duration::from_secs(2)));
        for (key, value) in [
            ("target_file_size", "12"),
            ("changelog", "yes"),
            ("commit_interval", "1 ms"),
            ("compression", "none"),
        ] {
            let e = parse(&[(key, value)]).expect_err(key);
            assert!(e.message.contains(key) && e.hint.is_some(), "{}", e.message);
        }
    }
}
