//! Types, awkward values, tables, and how their contents change.

use millrace_tests::rng::Rng;
use serde_json::{Map, Value, json};

use super::known;

/// Types of columns. `Big` and `Wide` hold extremes, hence are compared and never added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Type {
    Int,
    Big,
    Dec,
    Wide,
    Double,
    Text,
    Bool,
    Date,
    Stamp,
}

pub(crate) const TYPES: &[Type] = &[
    Type::Int,
    Type::Big,
    Type::Dec,
    Type::Wide,
    Type::Double,
    Type::Text,
    Type::Bool,
    Type::Date,
    Type::Stamp,
];

/// Values of a column: few, so that they meet in joins and groups, and the awkward ones among them.
/// Doubles are small multiples of a power of two, so sums are exact in any order.
const INTS: &[&str] = &["-3", "-1", "0", "1", "2", "3", "5", "7"];
const BIGS: &[&str] = &[
    "-9223372036854775808",
    "9223372036854775807",
    "9007199254740993",
    "-9007199254740993",
    "0",
    "1",
];
const DECS: &[&str] = &["-1.25", "0.00", "0.01", "99.99", "-0.50", "1.00", "7.10"];
const WIDES: &[&str] = &[
    "9999999999999999999999999999.9999999999",
    "-9999999999999999999999999999.9999999999",
    "0.0000000001",
    "0.0000000000",
    "123456789012345678901234567.1234567891",
];
const DOUBLES: &[&str] = &[
    "NaN",
    "Infinity",
    "-Infinity",
    "-0.0",
    "0.0",
    "0.5",
    "-1.25",
    "3",
    "1024.015625",
];
const TEXTS: &[&str] = &["", "a", "b", "B", "é", "a b", " a", "%", "long"];
const DATES: &[&str] = &[
    "0001-01-01",
    "9999-12-31",
    "1969-12-31",
    "2024-02-29",
    "2024-03-01",
];
const STAMPS: &[&str] = &[
    "0001-01-01T00:00:00",
    "9999-12-31T23:59:59.999999",
    "1969-12-31T23:59:59.999999",
    "2024-02-29T12:30:00",
    "2024-02-29T12:30:00.000001",
];

impl Type {
    /// As both engines know it.
    pub(crate) fn sql(self) -> &'static str {
        match self {
            Self::Int | Self::Big => "BIGINT",
            Self::Dec => "DECIMAL(18,2)",
            Self::Wide => "DECIMAL(38,10)",
            Self::Double => "DOUBLE",
            Self::Text => "VARCHAR",
            Self::Bool => "BOOLEAN",
            Self::Date => "DATE",
            Self::Stamp => "TIMESTAMP",
        }
    }

    fn values(self) -> &'static [&'static str] {
        match self {
            Self::Int => INTS,
            Self::Big => BIGS,
            Self::Dec => DECS,
            Self::Wide => WIDES,
            Self::Double => DOUBLES,
            Self::Text => TEXTS,
            Self::Bool => &["true", "false"],
            Self::Date => DATES,
            Self::Stamp => STAMPS,
        }
    }

    /// The text of a value, or none for NULL.
    pub(crate) fn any(self, rng: &mut Rng) -> Option<String> {
        if rng.below(6) == 0 {
            return None;
        }
        let values = self.values();
        let mut text = values[rng.below(values.len())];
        if text == "-0.0" && !known::MINUS_ZERO {
            text = "0.0";
        }
        Some(if text == "long" {
            "xy".repeat(150)
        } else {
            text.to_string()
        })
    }

    /// A literal of this type for SQL.
    pub(crate) fn literal(self, rng: &mut Rng) -> String {
        self.literal_of(self.any(rng).as_deref())
    }

    pub(crate) fn literal_of(self, value: Option<&str>) -> String {
        match (self, value) {
            (_, None) => format!("CAST(NULL AS {})", self.sql()),
            (Self::Int, Some(text)) => text.to_string(),
            (Self::Bool, Some(text)) => text.to_uppercase(),
            (Self::Text, Some(text)) => format!("'{}'", text.replace('\'', "''")),
            (Self::Date, Some(text)) => format!("DATE '{text}'"),
            (Self::Stamp, Some(text)) => format!("TIMESTAMP '{}'", text.replace('T', " ")),
            (_, Some(text)) => format!("CAST('{text}' AS {})", self.sql()),
        }
    }

    /// The plainest literal.
    pub(crate) fn plain(self) -> String {
        let value = match self {
            Self::Int | Self::Big | Self::Dec | Self::Wide | Self::Double => "1",
            Self::Text => "a",
            Self::Bool => "true",
            Self::Date => "2024-03-01",
            Self::Stamp => "2024-02-29T12:30:00",
        };
        self.literal_of(Some(value))
    }

    /// As a field of a JSON record.
    fn json(self, value: Option<&String>) -> Value {
        match (self, value) {
            (_, None) => Value::Null,
            (Self::Bool, Some(text)) => json!(text == "true"),
            (Self::Int | Self::Big, Some(text)) => json!(text.parse::<i64>().expect("an integer")),
            (Self::Double, Some(text)) => match text.parse::<f64>() {
                Ok(number) if number.is_finite() => json!(number),
                _ => json!(text),
            },
            (_, Some(text)) => json!(text),
        }
    }
}

/// Values of one row, as texts.
pub(crate) type Row = Vec<Option<String>>;

/// How changes arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Feed {
    /// A topic of versions by row id; the newest counts (`row_number() <= 1`).
    Versions,
    /// A topic of rows added and taken back (EXCEPT ALL).
    Signed,
    /// A file of changes, read once.
    File,
    /// A topic of events in the order of time.
    Events,
}

#[derive(Debug, Clone)]
pub(crate) struct Table {
    pub(crate) name: String,
    pub(crate) types: Vec<Type>,
    pub(crate) feed: Feed,
}

/// One change of a table.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Change {
    pub(crate) id: u64,
    pub(crate) row: Row,
    pub(crate) removes: bool,
}

/// A table and its rows now.
#[derive(Debug, Clone)]
pub(crate) struct Contents {
    pub(crate) rows: Vec<(u64, Row)>,
    next_id: u64,
}

impl Table {
    pub(crate) fn random(name: &str, feed: Feed, rng: &mut Rng) -> Self {
        let mut types = vec![Type::Int];
        if feed == Feed::Events {
            types.push(Type::Stamp);
        }
        for _ in 0..2 + rng.below(3) {
            types.push(TYPES[rng.below(TYPES.len())]);
        }
        Self {
            name: name.to_string(),
            types,
            feed,
        }
    }

    /// `c0 BIGINT, c1 …`.
    pub(crate) fn columns(&self) -> String {
        let columns: Vec<String> = self
            .types
            .iter()
            .enumerate()
            .map(|(i, ty)| format!("c{i} {}", ty.sql()))
            .collect();
        columns.join(", ")
    }

    /// `c0, c1, …`.
    pub(crate) fn names(&self) -> String {
        let names: Vec<String> = (0..self.types.len()).map(|i| format!("c{i}")).collect();
        names.join(", ")
    }

    /// A row as a list.
    pub(crate) fn json(&self, row: &Row) -> Value {
        let values = self.types.iter().zip(row);
        values.map(|(ty, value)| ty.json(value.as_ref())).collect()
    }

    /// A record of a change.
    pub(crate) fn record(&self, change: &Change, sequence: u64) -> Value {
        let mut object: Map<String, Value> = self
            .types
            .iter()
            .enumerate()
            .map(|(i, ty)| (format!("c{i}"), ty.json(change.row[i].as_ref())))
            .collect();
        match self.feed {
            Feed::Versions => {
                object.insert("id".into(), json!(change.id));
                object.insert("seq".into(), json!(sequence));
                object.insert("dead".into(), json!(change.removes));
            }
            Feed::Signed => {
                object.insert("dead".into(), json!(change.removes));
            }
            Feed::File => {
                object.insert("op".into(), json!(if change.removes { "-" } else { "+" }));
            }
            Feed::Events => {}
        }
        Value::Object(object)
    }
}

/// Seconds of event time per event, about; and the time at which events begin.
const EVENT_GAP_S: usize = 4;
const EVENTS_BEGIN: &str = "2024-02-29T12:";

impl Contents {
    pub(crate) fn new() -> Self {
        Self {
            rows: vec![],
            next_id: 0,
        }
    }

    /// A row with a new id is added.
    fn insert(&mut self, row: Row) -> Change {
        self.next_id += 1;
        self.rows.push((self.next_id, row.clone()));
        Change {
            id: self.next_id,
            row,
            removes: false,
        }
    }

    pub(crate) fn remove(&mut self, at: usize) -> Change {
        let (id, row) = self.rows.swap_remove(at);
        Change {
            id,
            row,
            removes: true,
        }
    }

    /// Random changes, applied.
    pub(crate) fn change(&mut self, table: &Table, count: usize, rng: &mut Rng) -> Vec<Change> {
        let mut changes = Vec::new();
        for _ in 0..count {
            let kind = rng.below(10);
            if table.feed == Feed::Events {
                let row = self.event(table, rng);
                changes.push(self.insert(row));
            } else if kind < 5 || self.rows.is_empty() {
                // A row twice is a row twice.
                let row = if kind == 0 && !self.rows.is_empty() {
                    self.rows[rng.below(self.rows.len())].1.clone()
                } else {
                    table.types.iter().map(|ty| ty.any(rng)).collect()
                };
                changes.push(self.insert(row));
            } else if kind < 8 {
                let at = rng.below(self.rows.len());
                changes.push(self.remove(at));
            } else {
                let at = rng.below(self.rows.len());
                let mut row = self.rows[at].1.clone();
                let column = rng.below(row.len());
                row[column] = table.types[column].any(rng);
                if table.feed == Feed::Versions {
                    self.rows[at].1.clone_from(&row);
                    let id = self.rows[at].0;
                    changes.push(Change {
                        id,
                        row,
                        removes: false,
                    });
                } else {
                    changes.push(self.remove(at));
                    changes.push(self.insert(row));
                }
            }
        }
        changes
    }

    fn event(&self, table: &Table, rng: &mut Rng) -> Row {
        let second = self.rows.len() * EVENT_GAP_S + rng.below(EVENT_GAP_S);
        let time = format!(
            "{EVENTS_BEGIN}{:02}:{:02}.{:06}",
            second / 60 % 60,
            second % 60,
            if rng.coin() { 0 } else { 250_001 }
        );
        let mut row: Row = table.types.iter().map(|ty| ty.any(rng)).collect();
        row[1] = Some(time);
        row
    }
}
