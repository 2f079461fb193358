//! What checkpoints cost: bytes per changed byte, the pause of a worker, and throughput with and without.
//!
//! A view counts rows by a key of about a hundred bytes. First every key comes once, until the state has
//! its size; then rows with keys drawn uniformly, or with Zipf's law (exponent 1). The source makes the
//! same rows again from an offset, so that replay would be possible.
//!
//! * `bytes`: a tenth, a hundredth and a thousandth of the keys change, a checkpoint follows each.
//! * `rate`: rows per second while a checkpoint is taken every ten seconds, and while none is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringBuilder, new_null_array};
use arrow::datatypes::SchemaRef;
use clap::Args as ClapArgs;
use millrace_dataflow::checkpoint::freeze_time;
use millrace_dataflow::engine::{Engine, EngineConfig, Item};
use millrace_dataflow::source::{Chunk, Offsets, Polled, Reader, Source};
use serde::Serialize;

use crate::nexmark::NoMeta;
use crate::planner::{Planner, generator};
use crate::report::{Stopwatch, peak_mib};

const BATCH: u64 = 8192;

#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct Args {
    /// Different keys; each takes about 300 bytes of state.
    #[arg(long, default_value_t = 3_500_000)]
    keys: u64,
    /// `uniform` or `zipf`.
    #[arg(long, default_value = "uniform")]
    draw: String,
    /// `bytes` or `rate`.
    #[arg(long, default_value = "bytes")]
    measure: String,
    /// Rows after the first of each key, for `rate`.
    #[arg(long, default_value_t = 20_000_000)]
    rows: u64,
    /// Seconds between checkpoints, for `rate`; 0 takes none.
    #[arg(long, default_value_t = 10)]
    interval: u64,
    #[arg(long, default_value_t = 1)]
    workers: usize,
}

#[derive(Debug, Serialize)]
struct Line {
    suite: &'static str,
    measure: String,
    draw: String,
    keys: u64,
    state_mib: f64,
    rows: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    keys_changed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_per_changed_byte: Option<f64>,
    checkpoints: u64,
    checkpoint_mib: f64,
    checkpoint_s: f64,
    pause_ms: f64,
    wall_s: f64,
    cpu_s: f64,
    rows_per_s: f64,
    peak_mib: f64,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(one(args))
}

async fn one(args: &Args) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let seconds = match args.measure.as_str() {
        "rate" if args.interval > 0 => args.interval,
        _ => 86_400,
    };
    let config = EngineConfig {
        workers: args.workers,
        dir: dir.path().to_path_buf(),
        checkpoints: None,
        incarnation: 1,
        checkpoint_interval: Duration::from_secs(seconds),
        commit_interval: Duration::from_secs(10),
        max_rows_in_flight: 1 << 20,
        waiting: Arc::default(),
        pager: None,
        paused: Default::default(),
        failed: Default::default(),
    };
    let engine = Engine::start(config, Arc::new(NoMeta), Vec::new()).await?;
    let mut planner = Planner::default();
    let available = Arc::new(AtomicU64::new(args.keys));
    let (keys, zipf, limit) = (args.keys, args.draw == "zipf", Arc::clone(&available));
    let source = planner
        .source(&generator("bid", 50), |source| {
            Ok(Arc::new(Keyed {
                schema: source.schema(),
                keys,
                zipf,
                available: limit,
            }) as Arc<dyn Source>)
        })
        .await?;
    let id = source.id;
    let view = planner
        .view(
            "counts",
            "SELECT channel, count(*) AS n, sum(price) AS s FROM bid GROUP BY channel",
        )
        .await?;
    engine.create(Item::Source(source)).await?;
    engine.create(Item::View(view)).await?;
    reach(&engine, id, args.keys).await?;
    engine.checkpoint().await?;
    let full = engine.stats().checkpoint_bytes;
    let before = engine.stats();
    let mut rounds = vec![(args.rows, None)];
    if args.measure == "bytes" {
        rounds = [1000, 100, 10]
            .map(|part| (args.keys / part, Some(())))
            .to_vec();
    }
    let mut sent = args.keys;
    for (rows, bytes) in rounds {
        let base = engine.stats();
        let watch = Stopwatch::start();
        available.store(sent + rows, Ordering::Relaxed);
        reach(&engine, id, sent + rows).await?;
        let (wall_s, cpu_s) = watch.stop();
        let mut changed = None;
        if bytes.is_some() {
            engine.checkpoint().await?;
            let mut distinct: Vec<u64> = (sent..sent + rows)
                .map(|row| key_of(row, args.keys, zipf))
                .collect();
            distinct.sort_unstable();
            distinct.dedup();
            changed = Some(distinct.len() as u64);
        }
        sent += rows;
        let stats = engine.stats();
        let (last, _) = freeze_time::longest();
        let checkpoints = stats.checkpoints - base.checkpoints;
        let per_key = full as f64 / args.keys as f64;
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let line = Line {
            suite: "checkpoint",
            measure: args.measure.clone(),
            draw: args.draw.clone(),
            keys: args.keys,
            state_mib: mib(full),
            rows,
            keys_changed: changed,
            bytes_per_changed_byte: changed
                .map(|changed| stats.checkpoint_bytes as f64 / (changed as f64 * per_key)),
            checkpoints,
            checkpoint_mib: mib(stats.checkpoint_bytes),
            checkpoint_s: (stats.checkpoint_ms - before.checkpoint_ms) as f64
                / 1e3
                / (stats.checkpoints - before.checkpoints).max(1) as f64,
            pause_ms: last.as_secs_f64() * 1e3,
            wall_s,
            cpu_s,
            rows_per_s: rows as f64 / wall_s,
            peak_mib: peak_mib(),
        };
        println!("{}", serde_json::to_string(&line)?);
    }
    // What a stop would write is not measured.
    std::process::exit(0)
}

/// Waits until all rows are in the view.
async fn reach(
    engine: &Engine,
    source: millrace_dataflow::plan::RelationId,
    rows: u64,
) -> Result<()> {
    loop {
        let status = engine.status();
        let of = status.iter().find(|s| s.id == source);
        let of = of.context("the source runs")?;
        if let Some(error) = &of.last_error {
            anyhow::bail!("{error}");
        }
        let done = status.iter().all(|s| s.frontier >= of.frontier);
        if of.rows_in >= rows && done {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn arrow(e: arrow::error::ArrowError) -> millrace_dataflow::error::Error {
    millrace_dataflow::error::Error::internal(e.to_string())
}

fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The key of a row: each once, then drawn.
fn key_of(row: u64, keys: u64, zipf: bool) -> u64 {
    if row < keys {
        return row;
    }
    let drawn = mix(row);
    if !zipf {
        return drawn % keys;
    }
    // The inverse of the distribution with density 1/x on [1, keys + 1).
    let u = (drawn >> 11) as f64 / (1_u64 << 53) as f64;
    let rank = ((keys + 1) as f64).powf(u) as u64 - 1;
    mix(rank.min(keys - 1)) % keys
}

#[derive(Debug)]
struct Keyed {
    schema: SchemaRef,
    keys: u64,
    zipf: bool,
    available: Arc<AtomicU64>,
}

impl Source for Keyed {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }
    fn open(
        &self,
        start: &Offsets,
        projection: &[usize],
    ) -> millrace_dataflow::error::Result<Vec<Box<dyn Reader>>> {
        Ok(vec![Box::new(KeyedReader {
            schema: Arc::new(self.schema.project(projection).map_err(arrow)?),
            at: start.0.get("0").copied().unwrap_or(0),
            keys: self.keys,
            zipf: self.zipf,
            available: Arc::clone(&self.available),
        })])
    }
    fn bounded(&self) -> bool {
        false
    }
    fn any_event_time(&self) -> bool {
        true
    }
    fn append_only(&self) -> bool {
        true
    }
}

struct KeyedReader {
    schema: SchemaRef,
    at: u64,
    keys: u64,
    zipf: bool,
    available: Arc<AtomicU64>,
}

impl KeyedReader {
    fn column(&self, name: &str, rows: std::ops::Range<u64>) -> ArrayRef {
        let count = (rows.end - rows.start) as usize;
        match name {
            "channel" => {
                let mut keys = StringBuilder::with_capacity(count, count * 100);
                let mut text = "k".repeat(100);
                for row in rows {
                    let digits = format!("{:016x}", key_of(row, self.keys, self.zipf));
                    text.replace_range(84.., &digits);
                    keys.append_value(&text);
                }
                Arc::new(keys.finish())
            }
            "price" => Arc::new(Int64Array::from_iter_values(
                rows.map(|row| row as i64 % 100),
            )),
            other => {
                let field = self.schema.field_with_name(other);
                new_null_array(
                    field.map_or(&arrow::datatypes::DataType::Null, |f| f.data_type()),
                    count,
                )
            }
        }
    }
}

impl Reader for KeyedReader {
    fn poll(
        &mut self,
        limit: Option<&Offsets>,
        wait: Duration,
    ) -> millrace_dataflow::error::Result<Polled> {
        let mut end = self.available.load(Ordering::Relaxed).min(self.at + BATCH);
        if let Some(limit) = limit {
            let limit = limit.0.get("0").copied().unwrap_or(0);
            if self.at >= limit {
                return Ok(Polled::AtLimit);
            }
            end = end.min(limit);
        }
        if end <= self.at {
            std::thread::sleep(wait.min(Duration::from_millis(1)));
            return Ok(Polled::Idle);
        }
        let rows = self.at..end;
        let columns = self.schema.fields().iter();
        let columns = columns
            .map(|f| self.column(f.name(), rows.clone()))
            .collect();
        let begin = std::mem::replace(&mut self.at, end);
        Ok(Polled::Chunk(Chunk {
            split: "0".into(),
            begin,
            end,
            batch: RecordBatch::try_new(Arc::clone(&self.schema), columns).map_err(arrow)?,
            diffs: None,
            rejected: Vec::new(),
            bytes: (end - begin) * 108,
            digest: None,
            remaining: None,
        }))
    }
}
