//! Records of the remap log as bytes: pure, so that the simulator tears the same ones.
//!
//! A record is `length u32, crc32 u32, JSON`. Writes are told durable in rounds, and behind each round
//! that was synced stands a [`Record::Synced`]: damage at or after the last of them is the part nobody
//! was shown and is cut off, wherever in it whole records follow (a disk that loses power writes its
//! blocks in any order). Damage before one of them hit what was acknowledged. (Of the very last round, whose
//! mark may be missing, damage cannot be told from a tear.)

use super::log::Rules;
use super::{Binding, Takeover};

/// Version of the log's format. A segment of a newer one is not guessed at.
pub const VERSION: u32 = 1;

/// What a segment holds.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    /// The first record of a segment.
    Takeover(Takeover),
    Binding(Binding),
    /// So many bytes of the segment were durable when this was written.
    Synced(u64),
}

/// Why a segment cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Damage {
    /// Something that was acknowledged is not what it was.
    At { byte: usize, why: String },
    /// The format is newer than this program.
    Newer { version: u32 },
}

/// The bytes of a record.
pub fn encode(record: &Record) -> Vec<u8> {
    let body = serde_json::to_vec(record).expect("a record is plain data");
    let mut bytes = Vec::with_capacity(body.len() + 8);
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
    bytes.extend_from_slice(&body);
    bytes
}

/// The records of a segment up to the torn part, if there is one.
pub fn decode(bytes: &[u8], rules: Rules) -> Result<Vec<Record>, Damage> {
    let mut rest = bytes;
    let mut records = Vec::new();
    while !rest.is_empty() {
        let at = bytes.len() - rest.len();
        let Some((body, length)) = intact(rest) else {
            if acknowledged(bytes, at, rules) {
                let why = format!("at byte {at}, which was durable");
                return Err(Damage::At { byte: at, why });
            }
            break;
        };
        let record = parse(body).map_err(|why| match newer(body) {
            Some(version) => Damage::Newer { version },
            None => Damage::At { byte: at, why },
        })?;
        if let Record::Takeover(takeover) = &record
            && takeover.version > VERSION
        {
            let version = takeover.version;
            return Err(Damage::Newer { version });
        }
        records.push(record);
        rest = &rest[length..];
    }
    Ok(records)
}

fn parse(body: &[u8]) -> Result<Record, String> {
    serde_json::from_slice(body).map_err(|e| e.to_string())
}

/// The version a takeover of another shape speaks of.
fn newer(body: &[u8]) -> Option<u32> {
    let value: serde_json::Value = serde_json::from_slice(body).ok()?;
    let version = value.get("takeover")?.get("version")?.as_u64()?;
    u32::try_from(version).ok().filter(|v| *v > VERSION)
}

/// Whether what is damaged at `at` had been durable: a record behind it says so.
fn acknowledged(bytes: &[u8], at: usize, rules: Rules) -> bool {
    if !rules.damage {
        return false;
    }
    let mut from = at + 1;
    while from < bytes.len() {
        let Some((body, length)) = intact(&bytes[from..]) else {
            from += 1;
            continue;
        };
        match parse(body) {
            Ok(Record::Synced(upto)) if upto as usize > at => return true,
            // The header of a segment is synced before anything else is written.
            Ok(_) if at == 0 || !rules.holes => return true,
            _ => {}
        }
        from += length;
    }
    false
}

/// The body of the record at the front and the length of the record, if it is whole.
fn intact(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let length = u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let crc = u32::from_le_bytes(bytes.get(4..8)?.try_into().ok()?);
    let body = bytes.get(8..length.checked_add(8)?)?;
    // No record is empty; zeros must not pass for one.
    (!body.is_empty() && crc32fast::hash(body) == crc).then_some((body, length + 8))
}
