//! Whole-system measurements. Each prints one JSON line per run.
//!
//! `nexmark --input memory|generator|kafka --queries q0,q1 --events N --workers W`
//! `digest`
//! `checkpoint --measure bytes|rate --draw uniform|zipf --keys N --rows N --interval SECONDS`

mod checkpoint;
mod digest;
mod kafka;
mod memory;
mod nexmark;
mod planner;
mod report;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(about = "Measurements of the engine; one JSON line per run")]
struct Cli {
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Debug, Subcommand)]
enum Suite {
    /// Nexmark queries: events of all three kinds per second and per CPU-second.
    Nexmark(nexmark::Args),
    /// What checkpoints cost.
    Checkpoint(checkpoint::Args),
    /// What the digest of replayed records costs.
    Digest,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().suite {
        Suite::Nexmark(args) => nexmark::run(&args),
        Suite::Checkpoint(args) => checkpoint::run(&args),
        Suite::Digest => digest::run(),
    }
}
