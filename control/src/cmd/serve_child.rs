//! `millrace serve-child`: the service itself; started by `millrace serve` only.
//!
//! Exit codes tell the parent what to do: see [`super::serve`].

use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;

use millrace_dataflow::engine::sinks::BrokenSink;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::ingest::READER_THREAD;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};

use super::serve::{EXIT_AGAIN, EXIT_CONFIG, EXIT_FENCED};
use crate::config::{ChildArgs, Config, environment};
use crate::failures;
use crate::server::{QUERY_THREADS, Server};

/// Where `sql` plans deep statements; the statement that asked gets the panic.
const PLANNING_THREAD: &str = "statement";
/// Those of timely that send to and receive from another process.
const MESH_THREADS: [&str; 2] = ["timely:send-", "timely:recv-"];
/// How long the end of such a thread may be explained by others.
const MESH_GRACE: Duration = Duration::from_secs(3);
/// How often the incarnation is looked at.
const LEASE: Duration = Duration::from_secs(2);

/// Runs the service until it is told to stop.
pub fn run(args: ChildArgs) -> ExitCode {
    super::init_logging();
    abort_on_panic();
    let outcome = start(&args);
    let code = match &outcome {
        Ok(code) => *code,
        Err(problem) => {
            super::print_error(problem);
            exit_code(problem)
        }
    };
    // Not by returning, nor through what runs at a usual exit: threads that still run (a broker's
    // client) must not delay the end.
    let _ = std::io::stdout().flush();
    // SAFETY: ends the process at once; everything that counts is on the disk.
    unsafe { libc::_exit(i32::from(code)) }
}

/// What starting again cannot mend ends the parent too.
fn exit_code(problem: &Error) -> u8 {
    match problem.kind {
        _ if problem.code == "57P01" => EXIT_FENCED,
        ErrorKind::Unavailable | ErrorKind::Internal => 1,
        _ => EXIT_CONFIG,
    }
}

/// A panic of the engine is a bug; going on could answer wrongly. Statements are planned and run on
/// threads of their own, where a panic is caught and costs that statement only; a reader's costs its source.
/// Threads that exchange rows with other processes panic when a connection ends: no bug, but the end all
/// the same.
pub(super) fn abort_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or_default();
        if MESH_THREADS.iter().any(|prefix| name.starts_with(prefix)) {
            error!(target: "millrace", "the connection to another process of the data plane has ended");
            // The control connection ends as well, and knows what that means; not for ever, though.
            std::thread::sleep(MESH_GRACE);
            // SAFETY: ends the process at once; the next incarnation begins with the last checkpoint.
            unsafe { libc::_exit(1) }
        }
        print(info);
        let caught = |name: &str| {
            name.starts_with(QUERY_THREADS)
                || name.starts_with(READER_THREAD)
                || name == PLANNING_THREAD
        };
        if !thread.name().is_some_and(caught) {
            failures::note(info);
            error!(target: "millrace", thread = thread.name().unwrap_or("?"), "a bug stops the service");
            std::process::abort();
        }
    }));
}

/// The exit code.
fn start(args: &ChildArgs) -> Result<u8> {
    // SAFETY: the parent left both descriptors open for this process, and nothing else owns them.
    let (listener, parent) = unsafe {
        (
            std::net::TcpListener::from_raw_fd(args.listen_fd),
            UnixStream::from_raw_fd(args.parent_fd),
        )
    };
    // They are the service's alone: a worker process that lives on for a moment must not hold them.
    for fd in [args.listen_fd, args.parent_fd] {
        super::serve::close_on_exec(fd)?;
    }
    die_with(parent.try_clone()?)?;
    let config = Config::load(&args.serve, environment)?;
    failures::keep(&std::path::absolute(&config.data_dir)?);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.workers.max(2))
        .thread_name("millrace-service")
        .enable_all()
        .build()?;
    let code = runtime.block_on(serve(config, listener, parent));
    // Not by dropping it: a sink that waits for a full disk must not delay the end.
    runtime.shutdown_background();
    code
}

/// Ends this process when the parent is gone: its end of the pair closes.
fn die_with(mut parent: UnixStream) -> Result<()> {
    std::thread::Builder::new()
        .name("millrace-parent".to_string())
        .spawn(move || {
            let mut byte = [0_u8; 1];
            // The parent never writes: whatever returns, it is gone.
            let _ = parent.read(&mut byte);
            // SAFETY: ends the process at once, as the parent-death signal does.
            unsafe { libc::_exit(1) }
        })?;
    Ok(())
}

async fn serve(
    config: Config,
    listener: std::net::TcpListener,
    mut parent: UnixStream,
) -> Result<u8> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let data_dir = std::path::absolute(&config.data_dir)?;
    let server = Server::open(config, listener)?;
    tokio::select! {
        restored = server.restore() => restored?,
        // Nothing was begun that a checkpoint would have to hold.
        _ = terminate.recv() => return Ok(0),
        _ = interrupt.recv() => return Ok(0),
    }
    // A parent that is gone is noticed elsewhere.
    let _ = parent.write_all(b"r");
    info!(target: "millrace", address = %server.address(), "ready");
    let coordinator = server.service().coordinator()?;
    let mut again = false;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = until_fenced(&server) => return Err(crate::error::fenced()),
        broken = coordinator.broken() => return give_up(&broken, &data_dir),
        () = coordinator.restart_asked() => again = true,
    }
    info!(target: "millrace", again, "stopping");
    server.stop().await?;
    Ok(if again { EXIT_AGAIN } else { 0 })
}

/// Ends as a crash does, without a checkpoint: the next run reads again what the sink has not written, and
/// decides whether to leave the sink out.
fn give_up(broken: &BrokenSink, data_dir: &std::path::Path) -> Result<u8> {
    let BrokenSink { id, error, .. } = broken;
    error!(target: "millrace", sink = %id, %error, "a sink cannot go on, the service starts again");
    failures::note_broken(data_dir, broken)?;
    Ok(1)
}

/// Returns when a newer server has taken the data directory.
async fn until_fenced(server: &Server) {
    let mut ticks = tokio::time::interval(LEASE);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Ok(coordinator) = server.service().coordinator() else {
            continue;
        };
        match coordinator.is_newest().await {
            Ok(true) => {}
            Ok(false) => return,
            Err(problem) => warn!(target: "millrace", %problem, "cannot look at the lease"),
        }
    }
}
