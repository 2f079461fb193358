//! A session: who asks, and what came of a script.
//!
//! All doors lead here; what a door adds is only the form in which answers leave.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::RecordBatch;
use arrow::datatypes::{Schema, SchemaRef};
use datafusion::common::ScalarValue;
use millrace_dataflow::engine::subscribe::Subscription;
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::time::Tick;
use millrace_sql::parse::Parsed;

use crate::coordinator::Coordinator;

/// What one statement gave.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Columns of the rows; none for a statement that returns none.
    pub schema: SchemaRef,
    pub batches: Vec<RecordBatch>,
    /// Rows changed; `None` for a statement that returns rows.
    pub rows_affected: Option<u64>,
    /// The moment at which all views were read.
    pub tick: Option<Tick>,
    /// The snapshot at which each lake table was read.
    pub snapshots: BTreeMap<String, i64>,
    pub notices: Vec<Notice>,
    pub elapsed: Duration,
}

/// Something worth knowing beside an answer.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Notice {
    /// SQLSTATE: `01000` warning, `00000` remark.
    pub code: &'static str,
    pub message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Notice {
    pub fn warning(message: impl Into<String>) -> Self {
        Self {
            code: "01000",
            message: message.into(),
            hint: None,
        }
    }
    pub fn remark(message: impl Into<String>) -> Self {
        Self {
            code: "00000",
            message: message.into(),
            hint: None,
        }
    }
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl Answer {
    /// A statement that changed the catalog and returns nothing.
    pub fn done() -> Self {
        Self {
            schema: Arc::new(Schema::empty()),
            batches: Vec::new(),
            rows_affected: Some(0),
            tick: None,
            snapshots: BTreeMap::new(),
            notices: Vec::new(),
            elapsed: Duration::ZERO,
        }
    }
    /// Rows.
    pub fn rows(schema: SchemaRef, batches: Vec<RecordBatch>) -> Self {
        Self {
            schema,
            batches,
            rows_affected: None,
            ..Self::done()
        }
    }
    #[must_use]
    pub fn notice(mut self, notice: Notice) -> Self {
        self.notices.push(notice);
        self
    }
    pub fn num_rows(&self) -> usize {
        self.batches.iter().map(RecordBatch::num_rows).sum()
    }
}

/// What a script gave: answers of the statements that took effect, then perhaps an error.
#[derive(Debug, Default)]
pub struct Outcome {
    pub answers: Vec<Answer>,
    /// The statement that failed, counted from 0, and why.
    pub error: Option<(usize, Error)>,
}

/// A principal at work. Policies allow everything for now, so it carries only its settings.
#[derive(Debug, Clone)]
pub struct Session {
    coordinator: Coordinator,
}

impl Session {
    pub fn new(coordinator: Coordinator) -> Self {
        Self { coordinator }
    }

    /// Number of statements in a script, those after a syntax error not counted.
    pub fn count_statements(script: &str) -> usize {
        let parsed = millrace_sql::parse::parse(script);
        parsed.statements.len() + usize::from(parsed.error.is_some())
    }

    /// The statement of a script that is nothing but a SUBSCRIBE.
    pub fn subscribe_of(script: &str) -> Option<Parsed> {
        // Most scripts are none, and need not be parsed twice.
        let word = script.trim_start().get(..9)?;
        if !word.eq_ignore_ascii_case("subscribe") {
            return None;
        }
        let mut parsed = millrace_sql::parse::parse(script);
        match (parsed.statements.len(), &parsed.error) {
            (1, None) => parsed.statements.pop(),
            _ => None,
        }
    }

    /// Begins to follow a relation.
    pub async fn subscribe(&self, parsed: Parsed) -> Result<(SchemaRef, Subscription)> {
        self.coordinator.subscribe(parsed).await
    }

    /// Runs a script, one statement after the other, until its end or the first error.
    pub async fn execute(&self, script: &str, params: &[ScalarValue]) -> Outcome {
        let script = millrace_sql::parse::parse(script);
        let mut outcome = Outcome::default();
        for (index, parsed) in script.statements.into_iter().enumerate() {
            let started = std::time::Instant::now();
            match self.coordinator.execute(parsed, params).await {
                Ok(mut answer) => {
                    answer.elapsed = started.elapsed();
                    outcome.answers.push(answer);
                }
                Err(error) => {
                    outcome.error = Some((index, error));
                    return outcome;
                }
            }
        }
        outcome.error = script.error.map(|error| (outcome.answers.len(), error));
        outcome
    }
}
