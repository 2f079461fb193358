//! Rows of a table on their way in: as files at once, or through a topic in random slices.

use std::path::Path;

use serde_json::{Value, json};

use super::corpus::Table;
use crate::kafka::{Topic, Writer};
use crate::rng::Rng;

/// Rows that come and go again without leaving a trace, per changelog.
const CHURN: usize = 150;
const CHANGELOG_FILES: usize = 3;

/// Writes the final rows of a table as JSON lines, in one or more files; options of a source.
pub fn final_rows(table: &Table, folder: &Path) -> String {
    let net = table.net();
    // Two files, unless there is a watermark, whose order should not depend on names.
    let half = if table.watermark.is_some() {
        net.len()
    } else {
        net.len() / 2
    };
    let lines = |rows: &[&[Value]]| -> String {
        rows.iter()
            .map(|row| format!("{}\n", Value::Object(table.object(row))))
            .collect()
    };
    write(
        folder,
        &format!("{}.0.json", table.name),
        &lines(&net[..half]),
    );
    write(
        folder,
        &format!("{}.1.json", table.name),
        &lines(&net[half..]),
    );
    format!(
        "connector = 'files', format = 'json', path = '{}/{}.*.json'",
        folder.display(),
        table.name
    )
}

/// Writes a changelog, with churn, as JSON lines; options of a source.
///
/// Files are read side by side, so all that happens to one row value stays in one file, in order.
pub fn changelog(table: &Table, folder: &Path, rng: &mut Rng) -> String {
    let mut files: Vec<Vec<(bool, Vec<Value>)>> = vec![Vec::new(); CHANGELOG_FILES];
    let file_of = |values: &[Value]| {
        let text = format!("{values:?}");
        text.bytes().fold(7_usize, |h, b| {
            h.wrapping_mul(31).wrapping_add(usize::from(b))
        }) % CHANGELOG_FILES
    };
    for row in &table.rows {
        files[file_of(&row.values)].push((row.retracts, row.values.clone()));
    }
    for _ in 0..CHURN {
        // Each column from some row: values that exist, in combinations that do not.
        let values: Vec<Value> = (0..table.names.len())
            .map(|column| table.rows[rng.below(table.rows.len())].values[column].clone())
            .collect();
        let file = &mut files[file_of(&values)];
        let first = rng.below(file.len() + 1);
        let second = first + 1 + rng.below(file.len() + 1 - first);
        file.insert(first, (false, values.clone()));
        file.insert(second, (true, values));
    }
    for (i, rows) in files.iter().enumerate() {
        let lines: String = rows
            .iter()
            .map(|(retracts, values)| {
                let mut object = table.object(values);
                object.insert("op".into(), json!(if *retracts { "-" } else { "+" }));
                format!("{}\n", Value::Object(object))
            })
            .collect();
        write(folder, &format!("{}.{i}.json", table.name), &lines);
    }
    format!(
        "connector = 'files', format = 'json', changelog = 'op', path = '{}/{}.*.json'",
        folder.display(),
        table.name
    )
}

fn write(folder: &Path, name: &str, text: &str) {
    std::fs::write(folder.join(name), text).expect("a file can be written");
}

/// A table that comes through a topic.
#[derive(Debug)]
pub struct Stream<'a> {
    pub table: &'a Table,
    topic: Topic,
    writer: Writer,
    /// Indices of rows in the order in which they are sent.
    order: Vec<usize>,
    next: usize,
}

/// What sending a slice has come upon.
#[derive(Debug, PartialEq, Eq)]
pub enum Sent {
    Rows,
    /// The next row must come when everything before it has been applied.
    LateNext,
    Nothing,
}

impl<'a> Stream<'a> {
    pub fn new(broker: &str, table: &'a Table, rng: &mut Rng) -> Self {
        // Event time must not come later than its watermark allows: such a table keeps its order.
        let ordered = table.watermark.is_some();
        let mut order: Vec<usize> = (0..table.rows.len()).collect();
        if !ordered {
            rng.shuffle(&mut order);
        }
        let topic = Topic::create(
            broker,
            &format!("slt-{}", table.name),
            if ordered { 1 } else { 2 },
        );
        Self {
            table,
            topic,
            writer: Writer::new(broker),
            order,
            next: 0,
        }
    }

    /// Options of the source.
    pub fn options(&self) -> String {
        format!(
            "connector = 'kafka', bootstrap_servers = '{}', topic = '{}', format = 'json', start = 'earliest'",
            self.topic.broker, self.topic.name
        )
    }

    /// Records sent so far.
    pub fn sent(&self) -> u64 {
        self.next as u64
    }

    pub fn left(&self) -> usize {
        self.order.len() - self.next
    }

    /// Sends up to `count` rows; stops before a late one, which needs a call of its own.
    pub fn send(&mut self, count: usize, late: bool, rng: &mut Rng) -> Sent {
        let mut sent = 0;
        while sent < count.max(1) && self.next < self.order.len() {
            let row = &self.table.rows[self.order[self.next]];
            if row.late && (!late || sent > 0) {
                break;
            }
            let object = Value::Object(self.table.object(&row.values)).to_string();
            let partition = rng.below(self.topic.partitions as usize) as i32;
            self.writer.send(&self.topic, partition, object.as_bytes());
            self.next += 1;
            sent += 1;
            if row.late {
                break;
            }
        }
        self.writer.flush();
        match sent {
            0 if self.next == self.order.len() => Sent::Nothing,
            0 => Sent::LateNext,
            _ => Sent::Rows,
        }
    }
}
