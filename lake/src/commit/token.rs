//! The token: what a commit says about itself, committed with the data.
//!
//! It stands in the summary of the snapshot and, because snapshots expire, as properties of the
//! table. Both are written by the same commit, so there are two ways only in which they can disagree:
//! the snapshot was expired, then the property counts; or somebody set `main` back to an older
//! snapshot, then commits are missing and nobody may guess. To tell them apart the property also
//! holds the snapshot's sequence number: the way from the head down is whole as far as it goes, so a
//! snapshot with a number in that stretch is on it, or no longer part of the table.

use std::collections::HashMap;

use iceberg::spec::TableMetadata;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::time::Tick;

const SINK: &str = "millrace.sink-id";
const FRONTIER: &str = "millrace.frontier";
const LOWER: &str = "millrace.lower";
const INCARNATION: &str = "millrace.incarnation";

/// Ticks `[lower, frontier)` of a sink, committed by one incarnation of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Token {
    pub sink: String,
    pub lower: Tick,
    pub frontier: Tick,
    pub incarnation: u64,
}

impl Token {
    /// Entries of the snapshot's summary.
    pub fn summary(&self) -> HashMap<String, String> {
        HashMap::from([
            (SINK.to_string(), self.sink.clone()),
            (FRONTIER.to_string(), self.frontier.to_string()),
            (LOWER.to_string(), self.lower.to_string()),
            (INCARNATION.to_string(), self.incarnation.to_string()),
        ])
    }

    /// Properties of the table, for a snapshot with this sequence number.
    pub fn properties(&self, sequence: i64) -> HashMap<String, String> {
        HashMap::from([
            (
                property_name(&self.sink, "frontier"),
                self.frontier.to_string(),
            ),
            (
                property_name(&self.sink, "incarnation"),
                self.incarnation.to_string(),
            ),
            (property_name(&self.sink, "sequence"), sequence.to_string()),
        ])
    }
}

fn property_name(sink: &str, entry: &str) -> String {
    format!("millrace.sinks.{sink}.{entry}")
}

/// How far a sink is, by a token somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    pub frontier: Tick,
    pub incarnation: u64,
}

/// The newest token, as the table's properties tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Property {
    pub mark: Mark,
    /// Of the snapshot that carried it.
    pub sequence: i64,
}

/// A snapshot, as far as the search for tokens is concerned.
#[derive(Debug, Clone, Copy)]
pub struct Link {
    pub parent: Option<i64>,
    pub sequence: i64,
    pub mark: Option<Mark>,
}

/// How far the table is with a sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Nothing of it was ever committed.
    Nothing,
    At(Tick),
    /// The table knows of commits that are no longer in its history: somebody set it back.
    SetBack {
        known: Tick,
        found: Option<Tick>,
    },
}

/// Looks for the newest token on the way from `head` to the root, or to where history has expired.
pub fn look(
    head: Option<i64>,
    link: impl Fn(i64) -> Option<Link>,
    property: Option<Property>,
) -> (Progress, u64) {
    let mut at = head;
    let (mut found, mut whole, mut oldest) = (None, true, i64::MAX);
    while let Some(id) = at {
        let Some(snapshot) = link(id) else {
            whole = false;
            break;
        };
        oldest = snapshot.sequence;
        if snapshot.mark.is_some() {
            found = snapshot.mark;
            break;
        }
        at = snapshot.parent;
    }
    let incarnation = |mark: Option<Mark>| mark.map_or(0, |m| m.incarnation);
    let newest = incarnation(found).max(incarnation(property.map(|p| p.mark)));
    let progress = match (found, property) {
        (None, None) => Progress::Nothing,
        (Some(found), Some(property)) if property.mark.frontier > found.frontier => {
            Progress::SetBack {
                known: property.mark.frontier,
                found: Some(found.frontier),
            }
        }
        (Some(found), _) => Progress::At(found.frontier),
        (None, Some(property)) if whole || property.sequence >= oldest => Progress::SetBack {
            known: property.mark.frontier,
            found: None,
        },
        (None, Some(property)) => Progress::At(property.mark.frontier),
    };
    (progress, newest)
}

/// How far a version of a table is with a sink, and the newest incarnation that committed.
pub fn read(table: &TableMetadata, sink: &str) -> Result<(Progress, u64)> {
    let entry = |name: &str| table.properties().get(&property_name(sink, name));
    let property = match entry("frontier") {
        None => None,
        Some(frontier) => Some(Property {
            mark: Mark {
                frontier: number(frontier)?,
                incarnation: entry("incarnation").map_or(Ok(0), |text| number(text))?,
            },
            sequence: entry("sequence").map_or(Ok(0), |text| number(text))? as i64,
        }),
    };
    // Parsed up front so that a token which is no number is an error, not a token that is not there.
    let mut marks = HashMap::new();
    for snapshot in table.snapshots() {
        let summary = &snapshot.summary().additional_properties;
        if summary.get(SINK).map(String::as_str) == Some(sink) {
            let entry = |key: &str| summary.get(key).map_or("", String::as_str);
            let mark = Mark {
                frontier: number(entry(FRONTIER))?,
                incarnation: number(entry(INCARNATION))?,
            };
            marks.insert(snapshot.snapshot_id(), mark);
        }
    }
    let link = |id: i64| {
        table.snapshot_by_id(id).map(|snapshot| Link {
            parent: snapshot.parent_snapshot_id(),
            sequence: snapshot.sequence_number(),
            mark: marks.get(&id).copied(),
        })
    };
    Ok(look(table.current_snapshot_id(), link, property))
}

fn number(text: &str) -> Result<u64> {
    text.parse().map_err(|_| {
        Error::new(
            ErrorKind::Corrupt,
            "a commit token of the table is not a number",
        )
        .hint("the millrace.* properties of a table and of its snapshots must not be edited")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(frontier: Tick) -> Option<Mark> {
        Some(Mark {
            frontier,
            incarnation: 1,
        })
    }
    fn property(frontier: Tick, sequence: i64) -> Option<Property> {
        mark(frontier).map(|mark| Property { mark, sequence })
    }
    /// Snapshots 1, 2, …, each the child of the one before; the first `gone` of them expired.
    fn chain(marks: &[Option<Mark>], gone: usize, property: Option<Property>) -> Progress {
        let link = |id: i64| {
            let index = id as usize - 1;
            (index >= gone).then(|| Link {
                parent: (index > 0).then_some(id - 1),
                sequence: id,
                mark: marks[index],
            })
        };
        let head = (!marks.is_empty()).then_some(marks.len() as i64);
        look(head, link, property).0
    }

    #[test]
    fn foreign_snapshots_are_passed_over() {
        assert_eq!(
            chain(&[mark(5), None, None], 0, property(5, 1)),
            Progress::At(5)
        );
        assert_eq!(chain(&[None], 0, None), Progress::Nothing);
        assert_eq!(chain(&[], 0, None), Progress::Nothing);
    }

    #[test]
    fn an_expired_token_is_read_from_the_property() {
        assert_eq!(chain(&[mark(5), None], 1, property(5, 1)), Progress::At(5));
    }

    #[test]
    fn a_property_ahead_of_the_history_means_set_back() {
        let set_back = |known, found| Progress::SetBack { known, found };
        assert_eq!(chain(&[mark(5)], 0, property(7, 2)), set_back(7, Some(5)));
        assert_eq!(chain(&[None], 0, property(7, 2)), set_back(7, None));
        assert_eq!(chain(&[], 0, property(7, 2)), set_back(7, None));
        // Also when older history has expired, whether a token is left in the rest or not.
        assert_eq!(
            chain(&[None, mark(5)], 1, property(7, 3)),
            set_back(7, Some(5))
        );
        assert_eq!(
            chain(&[mark(5), None], 1, property(7, 3)),
            set_back(7, None)
        );
    }
}
