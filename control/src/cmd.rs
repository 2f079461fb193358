//! Subcommands of the binary, one file each.

pub mod client;
pub mod serve;
pub mod serve_child;
pub mod sql;
pub mod worker;

use millrace_dataflow::error::Error;

/// Prints an error as the command line shows it.
pub fn print_error(error: &Error) {
    eprintln!("error: {}", error.message);
    if let Some(detail) = &error.detail {
        eprintln!("  detail: {detail}");
    }
    if let Some(hint) = &error.hint {
        eprintln!("  hint: {hint}");
    }
}

/// Log lines go to standard error; standard output belongs to answers.
pub fn init_logging() {
    let filter = crate::config::environment("MILLRACE_LOG")
        .unwrap_or_else(|| "warn,millrace=info".to_string());
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    // A second initialisation (tests) keeps the first.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .try_init();
}
