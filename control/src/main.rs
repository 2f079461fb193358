//! The binary `millrace`: subcommands, nothing else.

use std::process::ExitCode;

use clap::Parser;
use millrace_control::cmd;
use millrace_control::config::{Cli, Command};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Serve(args) => cmd::serve::run(&args),
        Command::ServeChild(args) => cmd::serve_child::run(args),
        Command::Worker(args) => cmd::worker::run(&args),
        Command::Sql(args) => cmd::sql::run(&args),
    }
}
