//! Nexmark: q0, q1, q2, q5, q7.
//!
//! Events are counted as the benchmark does: all three kinds (1 person, 3 auctions, 46 bids of 50), also
//! when a query reads bids only. CPU is that of the whole process, the source's included.
//!
//! * `memory`: batches built before the clock starts.
//! * `generator`: the generator runs as the source.
//! * `kafka`: bids as JSON in a topic that is filled before the clock starts; `--kafka` names the broker.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use clap::Args as ClapArgs;
use millrace_dataflow::engine::{Engine, EngineConfig, Item, Meta, SinkItem};
use millrace_dataflow::plan::RelationId;
use millrace_dataflow::source::Source;
use millrace_sinks::blackhole::BlackholeSink;

use crate::memory::Memory;
use crate::planner::{Planner, generator};
use crate::report::{Run, Stopwatch, peak_mib};

const QUERIES: [(&str, &str); 5] = [
    ("q0", include_str!("../nexmark/q0.sql")),
    ("q1", include_str!("../nexmark/q1.sql")),
    ("q2", include_str!("../nexmark/q2.sql")),
    ("q5", include_str!("../nexmark/q5.sql")),
    ("q7", include_str!("../nexmark/q7.sql")),
];
/// Of 50 events.
const BIDS: u64 = 46;
/// Columns the queries read, for the prepared batches: auction, bidder, price, date_time.
const BID_COLUMNS: [usize; 4] = [0, 1, 2, 5];

#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct Args {
    #[arg(long, default_value = "memory")]
    input: String,
    #[arg(long, default_value = "q0,q1,q2,q5,q7", value_delimiter = ',')]
    queries: Vec<String>,
    /// Events of all three kinds.
    #[arg(long, default_value_t = 10_000_000)]
    events: u64,
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// Bootstrap servers, for `--input kafka`.
    #[arg(long, default_value = "127.0.0.1:9092")]
    kafka: String,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    for name in &args.queries {
        let (name, sql) = QUERIES
            .iter()
            .find(|(n, _)| n == name)
            .with_context(|| format!("there is no query {name}; there are q0, q1, q2, q5, q7"))?;
        runtime.block_on(one(args, name, sql))?;
    }
    Ok(())
}

#[derive(Debug, Default)]
pub(crate) struct NoMeta;

#[async_trait]
impl Meta for NoMeta {
    async fn latest_checkpoint(&self) -> millrace_dataflow::error::Result<Option<u64>> {
        Ok(None)
    }
    async fn move_latest_checkpoint(
        &self,
        _: u64,
        _: Option<u64>,
        _: u64,
    ) -> millrace_dataflow::error::Result<bool> {
        Ok(true)
    }
}

async fn one(args: &Args, name: &str, sql: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let config = EngineConfig {
        workers: args.workers,
        dir: dir.path().to_path_buf(),
        checkpoints: None,
        incarnation: 1,
        checkpoint_interval: Duration::from_secs(10),
        commit_interval: Duration::from_secs(10),
        max_rows_in_flight: 1 << 20,
        waiting: Arc::default(),
        pager: None,
        paused: Default::default(),
        failed: Default::default(),
    };
    let engine = Engine::start(config, Arc::new(NoMeta), Vec::new()).await?;
    let mut planner = Planner::default();
    let statement = match args.input.as_str() {
        "memory" | "generator" => generator("bid", args.events),
        "kafka" => crate::kafka::source(&args.kafka, args.events)?,
        other => bail!("there is no input {other}; there are memory, generator and kafka"),
    };
    let prepared = args.input == "memory";
    let bid = planner
        .source(&statement, |source| -> Result<Arc<dyn Source>> {
            if prepared {
                Ok(Arc::new(Memory::load(source.as_ref(), &BID_COLUMNS)?))
            } else {
                Ok(source)
            }
        })
        .await?;
    let bid_id = bid.id;
    let view = planner.view(name, sql).await?;
    let (view_id, columns) = (view.id, view.plan.schema().fields().len());
    let watch = Stopwatch::start();
    engine.create(Item::Source(bid)).await?;
    engine.create(Item::View(view)).await?;
    let sink = SinkItem {
        id: RelationId(1000),
        name: "out".into(),
        from: view_id,
        columns,
        sink: BlackholeSink::new(),
        commit_interval: None,
    };
    engine.create(Item::Sink(sink)).await?;
    let bids = args.events / 50 * BIDS;
    loop {
        let status = engine.status();
        let source = status
            .iter()
            .find(|s| s.id == bid_id)
            .context("the source runs")?;
        if let Some(error) = &source.last_error {
            bail!("{error}");
        }
        if (source.state == "finished" || source.rows_in >= bids)
            && status
                .iter()
                .all(|s| s.kind == "source" || s.frontier >= source.frontier)
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (wall_s, cpu_s) = watch.stop();
    let status = engine.status();
    let rows = status
        .iter()
        .find(|s| s.id == view_id)
        .map_or(0, |s| s.rows_out);
    Run {
        suite: "nexmark",
        query: name.to_string(),
        input: args.input.clone(),
        workers: args.workers,
        events: args.events,
        result_rows: rows,
        wall_s,
        cpu_s,
        events_per_s: args.events as f64 / wall_s,
        events_per_cpu_s: args.events as f64 / cpu_s,
        peak_mib: peak_mib(),
    }
    .print();
    engine.stop().await?;
    Ok(())
}
