//! Made-up events, for benchmarks and demos: deterministic, and as fast as the engine can take.
//!
//! # Contract
//!
//! * Event number `n` is the same for ever: every value depends on `seed`, `n` and its column only.
//!   So any offset can be started at, only wanted columns are computed, and several sources with one
//!   seed refer to each other as the benchmark means.
//! * One split, `0`; the offset is the event number, which counts all tables together.
//! * With `rate`, events come by the wall clock, at most 100 ms worth of them at once, from wherever
//!   reading begins. Under a limit they come at once: what a limit covers has been due before.

use std::sync::Arc;
use std::time::Duration;

use arrow::array::RecordBatch;
use arrow::datatypes::{Schema, SchemaRef};
use millrace_dataflow::env;
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::source::{Chunk, Offsets, Polled, Reader, Source};
use millrace_interchange::format::type_name;
use millrace_interchange::scalar;

use crate::options::{ConnectorInfo, Options, hint, option};

mod nexmark;
mod random;

use nexmark::{Nexmark, Table};

pub(crate) const INFO: ConnectorInfo = ConnectorInfo {
    name: "generator",
    options: &[
        option("kind", "what is generated: nexmark"),
        option("table", "person, auction or bid"),
        option("seed", "another seed, other events (default 0)"),
        option(
            "rate",
            "events per second of all tables together; absent or 0: as fast as possible",
        ),
        option(
            "max_events",
            "ends after so many events of all tables together; absent: never",
        ),
        option(
            "out_of_order_ms",
            "event times are up to this much earlier than their turn (default 0)",
        ),
        option(
            "base_time",
            "event time of the first event (default 2015-07-15T00:00:00Z)",
        ),
        option("batch_size", "rows per batch (default 16384)"),
    ],
};

/// The only split.
const SPLIT: &str = "0";
/// Event time runs this fast when no rate is given.
const DEFAULT_EVENTS_PER_SECOND: u64 = 10_000;
/// 2015-07-15T00:00:00Z, as in Beam.
const DEFAULT_BASE_US: i64 = 1_436_918_400_000_000;
/// Events considered at once. Persons are one event in fifty.
const EVENTS_MAX: u64 = 1 << 17;
/// How far the wall clock may run ahead of the reader before events are given up as not generated
/// in time, and the shortest time between two batches.
const BURST_US: i64 = 100_000;
const PACE_US: i64 = 10_000;

#[derive(Debug, Clone)]
pub(crate) struct GeneratorSource {
    schema: SchemaRef,
    events: Nexmark,
    rate: u64,
    max_events: Option<u64>,
    batch_rows: u64,
}

pub(crate) fn discover(options: &Options<'_>) -> Result<Schema> {
    options.required_word("kind", &["nexmark"])?;
    Ok(table(options)?.schema())
}

fn table(options: &Options<'_>) -> Result<Table> {
    Ok(
        match options.required_word("table", &["person", "auction", "bid"])? {
            "person" => Table::Person,
            "auction" => Table::Auction,
            _ => Table::Bid,
        },
    )
}

impl GeneratorSource {
    pub(crate) fn new(options: &Options<'_>, columns: &Schema) -> Result<Self> {
        let full = discover(options)?;
        let schema = if columns.fields().is_empty() {
            full
        } else {
            declared(&full, columns)?
        };
        let rate = options.number("rate")?.unwrap_or(0);
        let base_us = match options.text("base_time") {
            None => DEFAULT_BASE_US,
            Some(text) => scalar::timestamp(text.as_bytes())
                .ok_or_else(|| options.wrong("base_time", "a time such as 2015-07-15T00:00:00Z"))?,
        };
        let batch_rows = options.number("batch_size")?.unwrap_or(16_384_u64);
        if batch_rows == 0 || batch_rows > 1 << 20 {
            return Err(options.wrong("batch_size", "between 1 and 1048576"));
        }
        let events_per_second = if rate == 0 {
            DEFAULT_EVENTS_PER_SECOND
        } else {
            rate
        };
        let jitter_ms: u64 = options.number("out_of_order_ms")?.unwrap_or(0);
        if jitter_ms > 86_400_000 {
            return Err(options.wrong("out_of_order_ms", "at most a day (86400000)"));
        }
        let seed = options.number("seed")?.unwrap_or(0);
        Ok(Self {
            events: Nexmark::new(
                table(options)?,
                seed,
                base_us,
                events_per_second,
                jitter_ms * 1000,
            ),
            schema: Arc::new(schema),
            rate,
            max_events: options.number("max_events")?,
            batch_rows,
        })
    }
}

/// The declared columns, if the generator has them in these types.
fn declared(full: &Schema, columns: &Schema) -> Result<Schema> {
    for column in columns.fields() {
        let names = full.fields().iter().map(|f| f.name().as_str());
        let Ok(known) = full.field_with_name(column.name()) else {
            return Err(Error::invalid(format!(
                "the generator has no column \"{}\"",
                column.name()
            ))
            .code("42703")
            .hint(hint(column.name(), names, "its columns are")));
        };
        if known.data_type() != column.data_type() {
            return Err(Error::invalid(format!(
                "column \"{}\" of the generator is {}, not {}",
                column.name(),
                type_name(known.data_type()),
                type_name(column.data_type())
            ))
            .code("42804"));
        }
    }
    Ok(columns.clone())
}

impl Source for GeneratorSource {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }
    fn open(&self, start: &Offsets, projection: &[usize]) -> Result<Vec<Box<dyn Reader>>> {
        let output = self.schema.project(projection);
        let output =
            output.map_err(|e| Error::internal(format!("projection does not fit: {e}")))?;
        Ok(vec![Box::new(GeneratorReader {
            source: self.clone(),
            output: Arc::new(output),
            split: SPLIT.into(),
            next: start.0.get(SPLIT).copied().unwrap_or(0),
            told: start.0.get(SPLIT).copied().unwrap_or(0),
            paced_at_us: env::now_us(),
            credit: 0.0,
        })])
    }
    fn bounded(&self) -> bool {
        self.max_events.is_some()
    }
    fn append_only(&self) -> bool {
        true
    }
    fn any_event_time(&self) -> bool {
        true
    }
}

struct GeneratorReader {
    source: GeneratorSource,
    output: SchemaRef,
    split: Arc<str>,
    /// Next event number.
    next: u64,
    /// The `end` of the last chunk.
    told: u64,
    /// When the credit was last brought up to date.
    paced_at_us: i64,
    /// Events that are due.
    credit: f64,
}

impl GeneratorReader {
    /// Events that may be generated now: waits for some to be due. 0 means that none will be.
    fn due(&mut self, wait: Duration) -> u64 {
        if self.source.rate == 0 {
            return u64::MAX;
        }
        let rate = self.source.rate as f64 / 1e6;
        // The worth of a short pause, so that slow rates do not spin and fast ones come in batches.
        let enough = (rate * PACE_US as f64).max(1.0);
        let mut left = wait;
        loop {
            let now = env::now_us();
            // A clock that was set, or a reader that was held up, moves nothing but this moment.
            let passed = (now - self.paced_at_us).clamp(0, BURST_US);
            self.paced_at_us = now;
            let most = (rate * BURST_US as f64).max(1.0);
            self.credit = (self.credit + rate * passed as f64).min(most);
            if self.credit >= enough.min(most) {
                return self.credit as u64;
            }
            let missing = Duration::from_micros(((enough - self.credit) / rate) as u64 + 1);
            if left.is_zero() {
                return 0;
            }
            // Never longer than a burst: what passes beyond it would not be counted.
            let pause = missing
                .min(left)
                .min(Duration::from_micros(BURST_US as u64));
            std::thread::sleep(pause);
            left -= pause;
        }
    }

    fn batch(&self, events: std::ops::Range<u64>) -> Result<RecordBatch> {
        self.source.events.batch(events, &self.output)
    }
}

impl Reader for GeneratorReader {
    fn poll(&mut self, limit: Option<&Offsets>, wait: Duration) -> Result<Polled> {
        let last = self.source.max_events.unwrap_or(u64::MAX);
        let limit = limit.map(|limit| limit.0.get(SPLIT).copied().unwrap_or(0));
        let stop = limit.unwrap_or(last).min(last);
        if limit.is_some_and(|limit| self.next >= limit.min(last)) {
            return Ok(Polled::AtLimit);
        }
        if self.next >= last {
            return Ok(Polled::End);
        }
        let due = if limit.is_some() {
            u64::MAX
        } else {
            self.due(wait)
        };
        if due == 0 {
            return Ok(Polled::Idle);
        }
        let rows = self.source.batch_rows;
        let end = self.source.events.end_of(self.next, rows);
        let end = end
            .min(self.next.saturating_add(due))
            .min(self.next + EVENTS_MAX)
            .min(stop);
        let batch = self.batch(self.next..end)?;
        if self.source.rate != 0 && limit.is_none() {
            self.credit -= (end - self.next) as f64;
        }
        self.next = end;
        if batch.num_rows() == 0 && limit.is_none() && end < last {
            // Nothing of this table; the offset travels with the next rows.
            return Ok(Polled::Idle);
        }
        let known = self.source.max_events.or(limit);
        Ok(Polled::Chunk(Chunk {
            split: Arc::clone(&self.split),
            begin: std::mem::replace(&mut self.told, end),
            end,
            bytes: batch.get_array_memory_size() as u64,
            batch,
            diffs: None,
            rejected: Vec::new(),
            // The offset alone says what a row is.
            digest: None,
            remaining: match self.source.rate {
                0 => known.map(|last| last.saturating_sub(end)),
                _ => Some(self.credit as u64),
            },
        }))
    }
}

#[cfg(test)]
mod tests;
