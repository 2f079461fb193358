//! Kernels: what an operator computes, without timely, threads or I/O.
//!
//! A kernel is a function (state, complete deltas of one tick, watermark) → deltas. The operators of
//! the engine collect a tick's input, call one, and send what it gives; nothing depends on the order
//! in which messages arrived, or on the clock.
//!
//! # Contract
//!
//! * No output delta is empty, none has more than [`OUTPUT_ROWS`] rows where rows can multiply.
//! * Output columns may hold nulls, whatever the plan says: see [`nullable`].
//! * A row whose computation fails is left out and stands in the errors instead, with its diff; when
//!   its cause is retracted, so is the error.

pub(crate) mod accumulator;
pub mod aggregate;
pub mod backlog;
pub mod contents;
pub mod join;
pub(crate) mod late;
pub mod map;
pub(crate) mod order;
pub mod preaggregate;
pub mod recompute;
pub mod runs;
pub mod table;
pub mod window;

use std::sync::{Arc, LazyLock};

use arrow::array::{RecordBatch, StringArray};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use datafusion::error::DataFusionError;

use crate::delta::{Delta, Diffs};
use crate::error::{Error, Result};

/// Rows of one output delta at the most, where a kernel makes many rows out of few.
pub const OUTPUT_ROWS: usize = 65_536;

/// Rows whose state is brought into the cache together, before it is read and written.
const WARM_ROWS: usize = 64;

/// What a stateful kernel gives for one tick.
#[derive(Debug, Default)]
pub struct TickOutput {
    pub deltas: Vec<Delta>,
    /// Of [`errors_schema`].
    pub errors: Vec<Delta>,
}

static ERRORS: LazyLock<SchemaRef> = LazyLock::new(|| {
    Arc::new(Schema::new(vec![
        Field::new("code", DataType::Utf8, false),
        Field::new("message", DataType::Utf8, false),
    ]))
});

/// Columns of an errors delta: SQLSTATE and message. The message holds no row values.
pub fn errors_schema() -> SchemaRef {
    Arc::clone(&ERRORS)
}

/// The schema with every column nullable.
///
/// What an expression declares about nulls does not always hold on real rows, and a batch with a null
/// where none is declared cannot be built. Inside the engine every column may therefore hold nulls.
pub fn nullable(schema: &Schema) -> SchemaRef {
    let fields = schema
        .fields()
        .iter()
        .map(|field| field.as_ref().clone().with_nullable(true));
    Arc::new(Schema::new_with_metadata(
        fields.collect::<Vec<_>>(),
        schema.metadata().clone(),
    ))
}

/// Deltas of one tick and schema, put together until each has about [`OUTPUT_ROWS`] rows: kernels work
/// on thousands of rows at a time, not on dozens.
pub fn coalesce(deltas: &[Delta]) -> Result<Vec<Delta>> {
    let mut out = Vec::new();
    let mut start = 0;
    while start < deltas.len() {
        let mut rows = deltas[start].len();
        let mut end = start + 1;
        while end < deltas.len() && rows + deltas[end].len() <= OUTPUT_ROWS {
            rows += deltas[end].len();
            end += 1;
        }
        let run = &deltas[start..end];
        start = end;
        if let [one] = run {
            out.push(one.clone());
            continue;
        }
        let batches: Vec<_> = run.iter().map(|delta| &delta.batch).collect();
        let batch = concat_batches(&batches[0].schema(), batches)
            .map_err(|e| Error::internal(format!("deltas cannot be put together: {e}")))?;
        let diffs = if run.iter().all(|delta| delta.diffs.is_ones()) {
            Diffs::Ones
        } else {
            let diffs = run
                .iter()
                .flat_map(|d| (0..d.len()).map(|row| d.diffs.get(row)));
            Diffs::from_vec(diffs.collect())
        };
        out.push(Delta::new(batch, diffs));
    }
    Ok(out)
}

/// Rows that failed, collected for an errors delta.
#[derive(Debug, Default)]
pub(crate) struct RowErrors {
    codes: Vec<&'static str>,
    messages: Vec<String>,
    diffs: Vec<i64>,
}

impl RowErrors {
    pub(crate) fn push(&mut self, code: &'static str, message: impl Into<String>, diff: i64) {
        self.codes.push(code);
        self.messages.push(message.into());
        self.diffs.push(diff);
    }

    /// The errors as a delta; `None` when there is none.
    pub(crate) fn finish(self) -> Option<Delta> {
        if self.codes.is_empty() {
            return None;
        }
        let codes = Arc::new(StringArray::from(self.codes));
        let messages = Arc::new(StringArray::from(self.messages));
        let batch = RecordBatch::try_new(errors_schema(), vec![codes, messages])
            .expect("both columns are as long as the diffs");
        Some(Delta::new(batch, Diffs::from_vec(self.diffs)))
    }
}

/// SQLSTATE and message of a failed expression.
pub fn row_error(error: &DataFusionError) -> (&'static str, String) {
    const DIVISION: (&str, &str) = ("22012", "division by zero");
    const RANGE: (&str, &str) = ("22003", "value out of range");
    let fixed = |(code, message): (&'static str, &str)| (code, message.to_string());
    let by_text = |text: &str| {
        let lower = text.to_ascii_lowercase();
        if lower.contains("divide by zero") || lower.contains("division by zero") {
            fixed(DIVISION)
        } else if lower.contains("overflow") || lower.contains("too large to store") {
            fixed(RANGE)
        } else {
            ("22000", without_values(text))
        }
    };
    match error.find_root() {
        DataFusionError::ArrowError(arrow, _) => match arrow.as_ref() {
            ArrowError::DivideByZero => fixed(DIVISION),
            ArrowError::ArithmeticOverflow(_) => fixed(RANGE),
            ArrowError::CastError(text) | ArrowError::ParseError(text) => {
                ("22P02", without_values(text))
            }
            ArrowError::ComputeError(text) | ArrowError::InvalidArgumentError(text) => {
                by_text(text)
            }
            other => by_text(&other.to_string()),
        },
        DataFusionError::External(outer) => match outer.downcast_ref::<Error>() {
            Some(own) => (own.code, own.message.clone()),
            None => by_text(&outer.to_string()),
        },
        DataFusionError::Execution(text) => by_text(text),
        other => by_text(&other.strip_backtrace()),
    }
}

/// A library's message in our manner: one lowercase line, quoted text and numbers taken out, since
/// errors may be read by people who may not read the rows.
fn without_values(text: &str) -> String {
    let mut line = text
        .lines()
        .next()
        .unwrap_or_default()
        .trim_end_matches('.')
        .to_string();
    for quote in ['\'', '"', '`'] {
        if let (Some(first), Some(last)) = (line.find(quote), line.rfind(quote))
            && first < last
        {
            line.replace_range(first..=last, "…");
        }
    }
    let mut out = String::with_capacity(line.len());
    let mut before = ' ';
    for c in line.chars() {
        // Digits belong to a value unless they end a word such as Int64.
        let value = c.is_ascii_digit() && !before.is_alphanumeric() && before != '…';
        if value {
            out.push('…');
            before = '…';
        } else if !(c.is_ascii_digit() && before == '…') {
            out.push(c);
            before = c;
        }
    }
    let mut chars = out.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => "the expression failed".to_string(),
    }
}

#[cfg(test)]
pub(crate) mod testing;
