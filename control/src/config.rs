//! Settings of the service: defaults, environment, flags, in that order, into typed structs.
//!
//! Nothing else in the workspace reads a flag or the environment (logging's filter and the test
//! failpoints aside). An option exists because two users need different values.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use millrace_dataflow::error::{Error, Result};

/// `millrace`: a streaming-first lakehouse in one binary.
#[derive(Debug, Parser)]
#[command(
    name = "millrace",
    version,
    about = "SQL over streams, kept up to date, committed exactly once to Iceberg"
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run everything on this machine: metadata, engine, HTTP API
    Serve(ServeArgs),
    /// The service itself, started and restarted by `serve`
    #[command(hide = true)]
    ServeChild(ChildArgs),
    /// One process of a data plane, started and supervised by `serve --processes`
    #[command(hide = true)]
    Worker(WorkerArgs),
    /// A SQL shell; also runs a file or one statement
    Sql(SqlArgs),
}

/// Flags of `millrace serve`; each also has an environment variable `MILLRACE_<FLAG>`.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Where metadata, checkpoints and the warehouse live [default: ./millrace-data]
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
    /// Address of the HTTP API; port 0 picks a free one [default: 127.0.0.1:8080]
    #[arg(long)]
    pub http: Option<String>,
    /// Worker threads of the engine, in each process [default: number of cores]
    #[arg(long)]
    pub workers: Option<String>,
    /// Where checkpoints are kept, as a URL [default: in the data directory]
    #[arg(long)]
    pub checkpoints: Option<String>,
    /// Processes that the engine's workers are spread over [default: 1]
    #[arg(long)]
    pub processes: Option<String>,
    /// How often state is written to disk, such as 10s or 500ms [default: 10s]
    #[arg(long)]
    pub checkpoint_interval: Option<String>,
    /// How often sinks commit [default: 10s]
    #[arg(long)]
    pub commit_interval: Option<String>,
    /// Rows between sources and the last stateful operator before sources wait [default: 2000000]
    #[arg(long)]
    pub max_rows_in_flight: Option<String>,
    /// Largest request body, such as 16MiB [default: 16MiB]
    #[arg(long)]
    pub max_body: Option<String>,
    /// Memory the process may take, such as 4GiB: state that does not fit goes to a swap file in the
    /// data directory [default: no limit]
    #[arg(long)]
    pub memory: Option<String>,
    /// Memory that one-shot queries may take together [default: 1GiB, with --memory a quarter of it at
    /// most]
    #[arg(long)]
    pub query_memory: Option<String>,
    /// Largest answer of one statement in memory [default: 512MiB, with --memory an eighth of it at
    /// most]
    #[arg(long)]
    pub max_result: Option<String>,
    /// Longest time a query may take, such as 30s; 0 sets no limit [default: 0]
    #[arg(long)]
    pub statement_timeout: Option<String>,
}

/// Flags of the hidden subcommand: those of `serve` plus what is inherited from the parent.
#[derive(Debug, Clone, Args)]
pub struct ChildArgs {
    #[command(flatten)]
    pub serve: ServeArgs,
    /// Listening socket
    #[arg(long)]
    pub listen_fd: i32,
    /// Socket to the parent: closed when it dies; one byte is written when the service is ready
    #[arg(long)]
    pub parent_fd: i32,
}

/// Flags of the hidden subcommand `worker`: those of `serve`, and where to belong to. The incarnation and
/// its secret come on standard input, whose end is the end of the process.
#[derive(Debug, Clone, Args)]
pub struct WorkerArgs {
    #[command(flatten)]
    pub serve: ServeArgs,
    /// Number of this process, from 1
    #[arg(long)]
    pub process: usize,
    /// Where the server waits for its processes
    #[arg(long)]
    pub server: SocketAddr,
}

/// Flags of `millrace sql`.
#[derive(Debug, Clone, Args)]
pub struct SqlArgs {
    /// Address of the server [default: 127.0.0.1:8080]
    #[arg(long)]
    pub http: Option<String>,
    /// Run this text and leave
    #[arg(short = 'c', long, conflicts_with = "file")]
    pub command: Option<String>,
    /// Run this file and leave (`-` is standard input)
    #[arg(short = 'f', long)]
    pub file: Option<PathBuf>,
}

/// Bytes of `--memory` for each row under way, and how many there may be at least.
const ROW_UNDER_WAY: usize = 6144;
const LEAST_ROWS: u64 = 65_536;

/// Below this there is no room for state.
const LEAST_MEMORY: usize = 256 << 20;

/// Settings of one server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub data_dir: PathBuf,
    pub http: String,
    pub workers: usize,
    /// What the flag or the environment said of them, if they did.
    pub workers_flag: Option<usize>,
    /// URL; `None`: in the data directory.
    pub checkpoints: Option<String>,
    /// Processes of the data plane, with `workers` workers each.
    pub processes: usize,
    /// As `workers_flag`.
    pub processes_flag: Option<usize>,
    /// A process of the data plane that is silent this long is taken for dead.
    pub peer_timeout: Duration,
    /// The flags as given, for worker processes.
    pub flags: Vec<OsString>,
    pub checkpoint_interval: Duration,
    pub commit_interval: Duration,
    /// What flags or the environment said of these two, if they did.
    pub interval_flags: [Option<Duration>; 2],
    pub max_rows_in_flight: u64,
    pub max_body: usize,
    /// `None`: no limit.
    pub memory: Option<usize>,
    pub query_memory: usize,
    pub max_result: usize,
    /// `None`: no limit.
    pub statement_timeout: Option<Duration>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("./millrace-data"),
            http: "127.0.0.1:8080".to_string(),
            workers_flag: None,
            workers: std::thread::available_parallelism().map_or(1, |n| n.get()),
            checkpoints: None,
            processes_flag: None,
            processes: 1,
            peer_timeout: Duration::from_secs(5),
            flags: Vec::new(),
            checkpoint_interval: Duration::from_secs(10),
            commit_interval: Duration::from_secs(10),
            interval_flags: [None; 2],
            max_rows_in_flight: 2_000_000,
            max_body: 16 << 20,
            memory: None,
            query_memory: 1 << 30,
            max_result: 512 << 20,
            statement_timeout: None,
        }
    }
}

impl ServeArgs {
    /// The flags as given; the environment is inherited.
    pub fn flags(&self) -> Vec<OsString> {
        let mut flags: Vec<OsString> = Vec::new();
        if let Some(dir) = &self.data_dir {
            flags.extend(["--data-dir".into(), dir.into()]);
        }
        for (flag, value) in [
            ("--http", &self.http),
            ("--workers", &self.workers),
            ("--processes", &self.processes),
            ("--checkpoints", &self.checkpoints),
            ("--checkpoint-interval", &self.checkpoint_interval),
            ("--commit-interval", &self.commit_interval),
            ("--max-rows-in-flight", &self.max_rows_in_flight),
            ("--max-body", &self.max_body),
            ("--memory", &self.memory),
            ("--query-memory", &self.query_memory),
            ("--max-result", &self.max_result),
            ("--statement-timeout", &self.statement_timeout),
        ] {
            if let Some(value) = value {
                flags.extend([flag.into(), value.into()]);
            }
        }
        flags
    }
}

impl Config {
    /// Layers defaults, environment (through `env`) and flags.
    pub fn load(args: &ServeArgs, env: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let pick = |flag: &Option<String>, name: &str| flag.clone().or_else(|| env(name));
        let mut config = Self {
            flags: args.flags(),
            ..Self::default()
        };
        if let Some(dir) = args
            .data_dir
            .clone()
            .or_else(|| env("MILLRACE_DATA_DIR").map(Into::into))
        {
            config.data_dir = dir;
        }
        if let Some(http) = pick(&args.http, "MILLRACE_HTTP") {
            config.http = http;
        }
        if let Some(text) = pick(&args.workers, "MILLRACE_WORKERS") {
            config.workers = parse_number("workers", &text)?;
            config.workers_flag = Some(config.workers);
        }
        config.checkpoints = pick(&args.checkpoints, "MILLRACE_CHECKPOINTS");
        if let Some(text) = pick(&args.processes, "MILLRACE_PROCESSES") {
            config.processes = parse_number("processes", &text)?;
            config.processes_flag = Some(config.processes);
        }
        // No flag: it is for machines that stand still for seconds.
        if let Some(text) = env("MILLRACE_PEER_TIMEOUT") {
            config.peer_timeout = parse_duration("peer-timeout", &text)?;
        }
        if let Some(text) = pick(&args.checkpoint_interval, "MILLRACE_CHECKPOINT_INTERVAL") {
            config.checkpoint_interval = parse_duration("checkpoint-interval", &text)?;
            config.interval_flags[0] = Some(config.checkpoint_interval);
        }
        if let Some(text) = pick(&args.commit_interval, "MILLRACE_COMMIT_INTERVAL") {
            config.commit_interval = parse_duration("commit-interval", &text)?;
            config.interval_flags[1] = Some(config.commit_interval);
        }
        if let Some(text) = pick(&args.max_rows_in_flight, "MILLRACE_MAX_ROWS_IN_FLIGHT") {
            config.max_rows_in_flight = parse_number("max-rows-in-flight", &text)?;
        }
        if let Some(text) = pick(&args.max_body, "MILLRACE_MAX_BODY") {
            config.max_body = parse_size("max-body", &text)?;
        }
        if let Some(text) = pick(&args.memory, "MILLRACE_MEMORY") {
            let memory = parse_size("memory", &text)?;
            config.memory = Some(memory);
            config.query_memory = config.query_memory.min(memory / 4);
            // Rows under way, in several forms, are a good part of what is not state.
            let rows = (memory / ROW_UNDER_WAY) as u64;
            config.max_rows_in_flight = config.max_rows_in_flight.min(rows.max(LEAST_ROWS));
            config.max_result = config.max_result.min(memory / 8);
        }
        if let Some(text) = pick(&args.query_memory, "MILLRACE_QUERY_MEMORY") {
            config.query_memory = parse_size("query-memory", &text)?;
        }
        if let Some(text) = pick(&args.max_result, "MILLRACE_MAX_RESULT") {
            config.max_result = parse_size("max-result", &text)?;
        }
        if let Some(text) = pick(&args.statement_timeout, "MILLRACE_STATEMENT_TIMEOUT") {
            let limit = parse_duration("statement-timeout", &text)?;
            config.statement_timeout = (!limit.is_zero()).then_some(limit);
        }
        config.validate()?;
        Ok(config)
    }

    /// Bytes of pages and indexes of state that may be in memory. What else the process takes (code,
    /// rows under way, decoding, checkpoints being written, queries) is left room for.
    pub fn state_memory(&self) -> Option<u64> {
        let memory = self.memory? as u64;
        Some((memory / 5 * 2).max(memory.saturating_sub(1 << 30)))
    }

    /// Checks the ranges of all settings.
    pub fn validate(&self) -> Result<()> {
        if self.workers == 0 || self.workers > 512 {
            return Err(bad("workers", "must be between 1 and 512"));
        }
        if self.processes == 0 || self.processes > 64 {
            return Err(bad("processes", "must be between 1 and 64"));
        }
        if self.peer_timeout < Duration::from_millis(100) {
            return Err(Error::invalid(
                "MILLRACE_PEER_TIMEOUT must be at least 100ms",
            ));
        }
        for (name, value) in [
            ("checkpoint-interval", self.checkpoint_interval),
            ("commit-interval", self.commit_interval),
        ] {
            if value < Duration::from_millis(10) || value > Duration::from_secs(86_400) {
                return Err(bad(name, "must be between 10ms and 1d"));
            }
        }
        if self.max_rows_in_flight < 1024 {
            return Err(bad("max-rows-in-flight", "must be at least 1024"));
        }
        if self.memory.is_some_and(|memory| memory < LEAST_MEMORY) {
            return Err(bad("memory", "must be at least 256MiB"));
        }
        if self.max_body < 1024 {
            return Err(bad("max-body", "must be at least 1KiB"));
        }
        if self.data_dir.as_os_str().is_empty() {
            return Err(bad("data-dir", "must not be empty"));
        }
        socket_address(&self.http).map(|_| ())
    }
}

/// Address to listen on; a name such as `localhost` is resolved.
pub fn socket_address(text: &str) -> Result<SocketAddr> {
    use std::net::ToSocketAddrs;
    let text = text
        .strip_prefix("http://")
        .unwrap_or(text)
        .trim_end_matches('/');
    text.to_socket_addrs()
        .ok()
        .and_then(|mut found| found.next())
        .ok_or_else(|| {
            bad(
                "http",
                &format!("\"{text}\" is not an address and a port, such as 127.0.0.1:8080"),
            )
        })
}

/// The process environment; the only place that reads it.
pub fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn bad(option: &str, why: &str) -> Error {
    Error::invalid(format!("option --{option} {why}"))
        .hint("millrace serve --help lists the options")
}

fn parse_number<T: std::str::FromStr>(option: &str, text: &str) -> Result<T> {
    text.trim()
        .replace('_', "")
        .parse()
        .map_err(|_| bad(option, &format!("is not a number: \"{text}\"")))
}

/// `500ms`, `10s`, `2m`, `1h`, `1d`; a bare number is seconds.
pub fn parse_duration(option: &str, text: &str) -> Result<Duration> {
    let (number, unit) = split_unit(text);
    let number: u64 = parse_number(option, number)?;
    let ms = match unit {
        "ms" => 1,
        "" | "s" => 1_000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => {
            return Err(bad(
                option,
                &format!("has an unknown unit: \"{text}\" (ms, s, m, h, d)"),
            ));
        }
    };
    number
        .checked_mul(ms)
        .map(Duration::from_millis)
        .ok_or_else(|| bad(option, "is too long"))
}

/// `64KiB`, `16MiB`, `1GiB` (also `KB`, `MB`, `GB`, taken as powers of 1000); a bare number is bytes.
pub fn parse_size(option: &str, text: &str) -> Result<usize> {
    let (number, unit) = split_unit(text);
    let number: usize = parse_number(option, number)?;
    let factor: usize = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" | "k" => 1 << 10,
        "mib" | "m" => 1 << 20,
        "gib" | "g" => 1 << 30,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        _ => {
            return Err(bad(
                option,
                &format!("has an unknown unit: \"{text}\" (KiB, MiB, GiB)"),
            ));
        }
    };
    number
        .checked_mul(factor)
        .ok_or_else(|| bad(option, "is too large"))
}

fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let at = text
        .find(|c: char| !c.is_ascii_digit() && c != '_')
        .unwrap_or(text.len());
    (&text[..at], text[at..].trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(flags: &[&str]) -> ServeArgs {
        let line = ["millrace", "serve"].iter().chain(flags);
        match Cli::try_parse_from(line).expect("flags parse").command {
            Command::Serve(args) => args,
            other => panic!("not serve: {other:?}"),
        }
    }

    #[test]
    fn flags_win_over_the_environment_and_that_over_defaults() {
        let env = |name: &str| match name {
            "MILLRACE_WORKERS" => Some("3".to_string()),
            "MILLRACE_COMMIT_INTERVAL" => Some("250ms".to_string()),
            _ => None,
        };
        let config =
            Config::load(&args(&["--workers", "5", "--max-body", "2MiB"]), env).expect("valid");
        assert_eq!(config.workers, 5);
        assert_eq!(config.commit_interval, Duration::from_millis(250));
        assert_eq!(config.checkpoint_interval, Duration::from_secs(10));
        assert_eq!(config.max_body, 2 << 20);
    }

    #[test]
    fn wrong_values_name_the_option() {
        for flags in [
            ["--workers", "0"],
            ["--workers", "many"],
            ["--processes", "0"],
            ["--processes", "65"],
            ["--checkpoint-interval", "10 parsecs"],
            ["--commit-interval", "1ms"],
            ["--max-body", "99999999999999999GiB"],
            ["--http", "nowhere"],
        ] {
            let error = Config::load(&args(&flags), |_| None).expect_err("refused");
            assert!(
                error.message.contains(flags[0]),
                "{}: {}",
                flags[0],
                error.message
            );
        }
    }

    #[test]
    fn durations_and_sizes_in_human_form() {
        assert_eq!(
            parse_duration("x", "2m").expect("ok"),
            Duration::from_secs(120)
        );
        assert_eq!(
            parse_duration("x", "7").expect("ok"),
            Duration::from_secs(7)
        );
        assert_eq!(parse_size("x", "1_024KiB").expect("ok"), 1 << 20);
        assert_eq!(parse_size("x", "1MB").expect("ok"), 1_000_000);
    }
}
