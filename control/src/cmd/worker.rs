//! `millrace worker`: one more process of a data plane; started by the service only.
//!
//! It owns nothing: the server says what to run, what of it counts and when it is over. When the
//! server is gone, or silent, so is this process.

use std::io::{BufRead, Read};
use std::process::ExitCode;
use std::sync::Arc;

use millrace_dataflow::cluster::Lost;
use millrace_dataflow::cluster::handshake::{Identity, Secret};
use millrace_dataflow::cluster::mesh::join;
use millrace_dataflow::cluster::remote::{Setup, run as run_process};
use millrace_dataflow::error::{Error, Result};
use tracing::info;

use crate::cluster::{Handover, end, timing};
use crate::config::{Config, WorkerArgs, environment};
use crate::coordinator::planner::WorldPlanner;
use crate::coordinator::restore::{checkpoints, pager};
use crate::failures;
use crate::metrics::resident_bytes;

/// Runs until the server says that it is over, or is gone.
pub fn run(args: &WorkerArgs) -> ExitCode {
    super::init_logging();
    super::serve_child::abort_on_panic();
    ignore_signals();
    let code = match start(args) {
        Ok(()) => 0,
        Err(error) => {
            super::print_error(&error);
            1
        }
    };
    // As the service does: threads that still run must not delay the end.
    // SAFETY: ends the process at once; what it has written is on the disk.
    unsafe { libc::_exit(code) }
}

/// A signal from the terminal or from an init system goes to all processes; the server decides what it
/// means.
fn ignore_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: sets the disposition of a signal, before any thread is started.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

fn start(args: &WorkerArgs) -> Result<()> {
    let identity = handed_over()?;
    let config = Config::load(&args.serve, environment)?;
    let data_dir = std::path::absolute(&config.data_dir)?;
    failures::keep(&data_dir);
    failures::set_incarnation(identity.incarnation);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("millrace-worker")
        .enable_all()
        .build()?;
    let planner = runtime.block_on(WorldPlanner::open(&data_dir))?;
    // From here on silence would be taken for death.
    let joined = join(args.server, &identity, args.process, timing(&config))?;
    info!(target: "millrace", process = args.process, incarnation = identity.incarnation, "joined the data plane");
    let setup = Setup {
        joined,
        dir: data_dir.join("engine"),
        checkpoints: checkpoints(&config)?,
        pager: pager(&config, &data_dir)?,
        incarnation: identity.incarnation,
        planner: Box::new(planner),
        resident_bytes,
        lost: Lost(Arc::new(|error| end(&error))),
    };
    let done = run_process(setup, runtime.handle().clone());
    runtime.shutdown_background();
    done
}

/// Reads what the server says on standard input, and watches for its end.
fn handed_over() -> Result<Identity> {
    let mut input = std::io::stdin().lock();
    let mut line = String::new();
    input.read_line(&mut line)?;
    let handover: Handover = serde_json::from_str(&line).map_err(|_| {
        Error::invalid("a worker process is started by a server, which tells it where it belongs")
            .hint("use millrace serve --processes n")
    })?;
    drop(input);
    std::thread::Builder::new()
        .name("millrace-server".to_string())
        .spawn(|| {
            // The server writes nothing more: whatever returns, it is gone.
            let _ = std::io::stdin().lock().read(&mut [0]);
            // SAFETY: ends the process at once, as the parent-death signal does.
            unsafe { libc::_exit(1) }
        })?;
    Ok(Identity {
        incarnation: handover.incarnation,
        secret: Secret::from_hex(&handover.secret)?,
    })
}
