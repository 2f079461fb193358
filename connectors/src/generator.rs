//! Made-up events and tables, for benchmarks and demos: deterministic, and as fast as the engine can take.
//!
//! # Contract
//!
//! * Event number `n` is the same for ever: every value depends on `seed`, `n` and its column only.
//!   So any offset can be started at, only wanted columns are computed, and several sources with one
//!   seed refer to each other as the benchmark means.
//! * One split, `0`; the offset is the event number, which counts all tables of Nexmark together. Of
//!   TPC-H, see [`tpch`].
//! * With `rate`, events come by the wall clock, at most 100 ms worth of them at once, from wherever
//!   reading begins. Under a limit they come at once: what a limit covers has been due before. What
//!   a table of TPC-H holds at first comes at once, too.

use std::ops::Range;
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

mod columns;
mod nexmark;
mod random;
mod tpch;

use nexmark::Nexmark;
use tpch::Tpch;

pub(crate) const INFO: ConnectorInfo = ConnectorInfo {
    name: "generator",
    options: &[
        option("kind", "what is generated: nexmark or tpch"),
        option(
            "table",
            "nexmark: person, auction or bid; tpch: one of its eight tables, such as lineitem",
        ),
        option("seed", "another seed, other events (default 0)"),
        option(
            "rate",
            "nexmark: events per second of all tables together; tpch: orders per second that refreshes \
             bring or take; absent or 0: as fast as possible",
        ),
        option(
            "max_events",
            "nexmark: ends after so many events of all tables together; absent: never",
        ),
        option(
            "out_of_order_ms",
            "nexmark: event times are up to this much earlier than their turn (default 0)",
        ),
        option(
            "base_time",
            "nexmark: event time of the first event (default 2015-07-15T00:00:00Z)",
        ),
        option(
            "scale",
            "tpch: scale factor, a multiple of 0.01 up to 10000 (default 0.01)",
        ),
        option(
            "refreshes",
            "tpch: pairs of refreshes after the initial rows, each brings a thousandth of the orders \
             and then takes as many of the oldest (default 0)",
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
    model: Model,
    rate: u64,
    batch_rows: u64,
}

/// What is generated.
#[derive(Debug, Clone)]
enum Model {
    Nexmark {
        events: Nexmark,
        max_events: Option<u64>,
    },
    Tpch(Tpch),
}

/// Options that only one kind has.
const OF_NEXMARK: &[&str] = &["max_events", "out_of_order_ms", "base_time"];
const OF_TPCH: &[&str] = &["scale", "refreshes"];

pub(crate) fn discover(options: &Options<'_>) -> Result<Schema> {
    Ok(match kind(options)? {
        "nexmark" => nexmark_table(options)?.schema(),
        _ => tpch_table(options)?.schema(),
    })
}

fn kind(options: &Options<'_>) -> Result<&'static str> {
    let kind = options.required_word("kind", &["nexmark", "tpch"])?;
    let others = match kind {
        "nexmark" => OF_TPCH,
        _ => OF_NEXMARK,
    };
    for name in others {
        if options.text(name).is_some() {
            return Err(Error::invalid(format!(
                "option \"{name}\" does not belong to kind \"{kind}\" of connector \"generator\""
            ))
            .hint(format!("leave \"{name}\" out")));
        }
    }
    Ok(kind)
}

fn nexmark_table(options: &Options<'_>) -> Result<nexmark::Table> {
    let table = options.required_word("table", &["person", "auction", "bid"])?;
    Ok(match table {
        "person" => nexmark::Table::Person,
        "auction" => nexmark::Table::Auction,
        _ => nexmark::Table::Bid,
    })
}

fn tpch_table(options: &Options<'_>) -> Result<tpch::Table> {
    let table = options.required_word("table", tpch::Table::NAMES)?;
    Ok(tpch::Table::named(table))
}

impl Model {
    fn new(options: &Options<'_>, rate: u64) -> Result<Self> {
        let seed = options.number("seed")?.unwrap_or(0);
        if kind(options)? == "tpch" {
            return Ok(Self::Tpch(tpch(options, seed)?));
        }
        let base_us = match options.text("base_time") {
            None => DEFAULT_BASE_US,
            Some(text) => scalar::timestamp(text.as_bytes())
                .ok_or_else(|| options.wrong("base_time", "a time such as 2015-07-15T00:00:00Z"))?,
        };
        let events_per_second = if rate == 0 {
            DEFAULT_EVENTS_PER_SECOND
        } else {
            rate
        };
        let jitter_ms: u64 = options.number("out_of_order_ms")?.unwrap_or(0);
        if jitter_ms > 86_400_000 {
            return Err(options.wrong("out_of_order_ms", "at most a day (86400000)"));
        }
        Ok(Self::Nexmark {
            events: Nexmark::new(
                nexmark_table(options)?,
                seed,
                base_us,
                events_per_second,
                jitter_ms * 1000,
            ),
            max_events: options.number("max_events")?,
        })
    }

    /// Events of a model that ends.
    fn last(&self) -> Option<u64> {
        match self {
            Self::Nexmark { max_events, .. } => *max_events,
            Self::Tpch(tables) => Some(tables.events()),
        }
    }

    /// Events before this one come as fast as possible.
    fn paced_from(&self) -> u64 {
        match self {
            Self::Nexmark { .. } => 0,
            Self::Tpch(tables) => tables.initial(),
        }
    }

    fn end_of(&self, from: u64, rows: u64) -> u64 {
        match self {
            Self::Nexmark { events, .. } => events.end_of(from, rows),
            Self::Tpch(tables) => tables.end_of(from, rows),
        }
    }

    fn batch(
        &self,
        events: Range<u64>,
        output: &SchemaRef,
    ) -> Result<(RecordBatch, Option<Vec<i64>>)> {
        match self {
            Self::Nexmark { events: model, .. } => Ok((model.batch(events, output)?, None)),
            Self::Tpch(tables) => tables.batch(events, output),
        }
    }
}

fn tpch(options: &Options<'_>, seed: u64) -> Result<Tpch> {
    let hundredths = match options.text("scale") {
        None => 1,
        Some(text) => {
            let scale = scalar::decimal(text.trim().as_bytes(), 7, 2).ok();
            let hundredths = scale.and_then(|scale| u64::try_from(scale).ok());
            hundredths
                .filter(|hundredths| (1..=1_000_000).contains(hundredths))
                .ok_or_else(|| options.wrong("scale", "a multiple of 0.01 up to 10000"))?
        }
    };
    let refreshes = options.number("refreshes")?.unwrap_or(0);
    // Offsets stay far below 2^63: a refresh is at most 3e7 events.
    if refreshes > 1_000_000_000 {
        return Err(options.wrong("refreshes", "at most 1000000000"));
    }
    Ok(Tpch::new(tpch_table(options)?, seed, hundredths, refreshes))
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
        let batch_rows = options.number("batch_size")?.unwrap_or(16_384_u64);
        if batch_rows == 0 || batch_rows > 1 << 20 {
            return Err(options.wrong("batch_size", "between 1 and 1048576"));
        }
        Ok(Self {
            model: Model::new(options, rate)?,
            schema: Arc::new(schema),
            rate,
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
        self.model.last().is_some()
    }
    fn append_only(&self) -> bool {
        match &self.model {
            Model::Nexmark { .. } => true,
            Model::Tpch(tables) => tables.append_only(),
        }
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
}

impl Reader for GeneratorReader {
    fn poll(&mut self, limit: Option<&Offsets>, wait: Duration) -> Result<Polled> {
        let last = self.source.model.last().unwrap_or(u64::MAX);
        let limit = limit.map(|limit| limit.0.get(SPLIT).copied().unwrap_or(0));
        let stop = limit.unwrap_or(last).min(last);
        if limit.is_some_and(|limit| self.next >= limit.min(last)) {
            return Ok(Polled::AtLimit);
        }
        if self.next >= last {
            return Ok(Polled::End);
        }
        let paced_from = self.source.model.paced_from();
        let paced = self.source.rate != 0 && limit.is_none() && self.next >= paced_from;
        let due = match limit {
            Some(_) => u64::MAX,
            None if self.next < paced_from => paced_from - self.next,
            None => self.due(wait),
        };
        if due == 0 {
            return Ok(Polled::Idle);
        }
        let rows = self.source.batch_rows;
        let end = self.source.model.end_of(self.next, rows);
        let end = end
            .min(self.next.saturating_add(due))
            .min(self.next + EVENTS_MAX)
            .min(stop);
        let (batch, diffs) = self.source.model.batch(self.next..end, &self.output)?;
        if paced {
            self.credit -= (end - self.next) as f64;
        }
        self.next = end;
        if batch.num_rows() == 0 && limit.is_none() && end < last {
            // Nothing of this table; the offset travels with the next rows.
            return Ok(Polled::Idle);
        }
        let known = self.source.model.last().or(limit);
        Ok(Polled::Chunk(Chunk {
            split: Arc::clone(&self.split),
            begin: std::mem::replace(&mut self.told, end),
            end,
            bytes: batch.get_array_memory_size() as u64,
            batch,
            diffs,
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
