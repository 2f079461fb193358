//! Whole-system measurements. Each prints one JSON line per run.
//!
//! `nexmark --input memory|generator|kafka --queries q0,q1 --events N --workers W`

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
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().suite {
        Suite::Nexmark(args) => nexmark::run(&args),
    }
}
