//! A subscriber: adds up what `SUBSCRIBE TO` says.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use millrace_tests::http::Lines;
use serde_json::Value;

use super::answer::Answer;

/// A tick is said when no crash can take it back: after the next checkpoint.
const LIMIT: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(20);

/// What was said up to the last complete tick.
#[derive(Debug, Default)]
struct Heard {
    types: Vec<String>,
    rows: BTreeMap<String, (Vec<Value>, i64)>,
    ended: bool,
}

#[derive(Debug)]
pub(crate) struct Watch {
    heard: Arc<Mutex<Heard>>,
}

impl Watch {
    pub(crate) fn start(address: &str, relation: &str) -> Self {
        let heard = Arc::new(Mutex::new(Heard::default()));
        let (address, relation) = (address.to_string(), relation.to_string());
        let shared = Arc::clone(&heard);
        std::thread::spawn(move || {
            listen(&mut Lines::of(&address, &relation), &shared);
            shared.lock().expect("no panic").ended = true;
        });
        Self { heard }
    }

    /// The server ended meanwhile; one subscribes again.
    pub(crate) fn ended(&self) -> bool {
        self.heard.lock().expect("no panic").ended
    }

    /// Waits until snapshot and changes add up to the view; else says what differs.
    pub(crate) fn difference(&self, view: &Answer) -> Option<String> {
        let started = Instant::now();
        loop {
            let difference = match self.sum() {
                Ok(sum) => view.difference(&sum, false)?,
                Err(text) => text,
            };
            if started.elapsed() > LIMIT {
                return Some(difference);
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn sum(&self) -> Result<Answer, String> {
        let heard = self.heard.lock().expect("no panic");
        let mut sum = Answer {
            types: heard.types.clone(),
            rows: vec![],
        };
        for (row, count) in heard.rows.values() {
            if *count < 0 {
                return Err(format!("{row:?} is there {count} times"));
            }
            sum.rows.extend((0..*count).map(|_| row.clone()));
        }
        Ok(sum)
    }
}

fn listen(lines: &mut Lines, heard: &Mutex<Heard>) {
    let mut tick: Vec<(Vec<Value>, i64)> = Vec::new();
    while let Some(line) = lines.next_before_cut() {
        if let Some(columns) = line["columns"].as_array() {
            let name = |column: &Value| column["type"].as_str().unwrap_or_default().to_string();
            heard.lock().expect("no panic").types = columns.iter().map(name).collect();
        } else if line["complete"] == true {
            let mut heard = heard.lock().expect("no panic");
            for (row, diff) in tick.drain(..) {
                let key = Value::from(row.clone()).to_string();
                let entry = heard.rows.entry(key).or_insert((row, 0));
                entry.1 += diff;
            }
            heard.rows.retain(|_, (_, count)| *count != 0);
        } else if let (Some(row), Some(diff)) = (line["row"].as_array(), line["diff"].as_i64()) {
            tick.push((row.clone(), diff));
        }
    }
}
