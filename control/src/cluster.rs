//! The worker processes of the data plane: started by the service, which shares their fate.
//!
//! # Contract
//!
//! * A worker process is this executable with the subcommand `worker`. It learns the incarnation and
//!   its secret on standard input, so that neither is seen in the list of processes.
//! * It never outlives the service: the kernel kills it (parent-death signal), and where that came too
//!   late, standard input ends.
//! * When one ends before it was told to, the service ends at once, and so do the others; the parent of
//!   the service starts the next incarnation.

use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use millrace_dataflow::cluster::handshake::{Identity, Secret};
use millrace_dataflow::cluster::mesh::{Gate, Timing};
use millrace_dataflow::cluster::{Definition, Lost, Peers};
use millrace_dataflow::error::{Error, Result};
use tracing::{error, info};

use crate::catalog::SqliteCatalog;
use crate::cmd::serve::{EXIT_FENCED, die_with_parent};
use crate::config::Config;

/// Silence between processes is broken this often.
const BEAT: Duration = Duration::from_millis(500);
/// How long looking at the lease may delay the end.
const LOOK: Duration = Duration::from_secs(2);

/// What a worker process reads from its standard input: one line of JSON.
#[derive(serde::Serialize, serde::Deserialize)]
pub struct Handover {
    pub incarnation: u64,
    pub secret: String,
}

/// When processes must hear of each other.
pub fn timing(config: &Config) -> Timing {
    Timing {
        beat: BEAT.min(config.peer_timeout / 5),
        dead_after: config.peer_timeout,
        ..Timing::default()
    }
}

/// The processes that ended, and how.
type Ended = Arc<Mutex<Option<Error>>>;

/// Starts the worker processes, if there are to be any, and waits until all have found each other.
pub async fn start(
    config: &Config,
    catalog: &SqliteCatalog,
    definitions: Vec<Definition>,
) -> Result<Option<Peers>> {
    if config.processes == 1 {
        return Ok(None);
    }
    let identity = Identity {
        incarnation: catalog.incarnation(),
        secret: Secret::random(),
    };
    let gate = Gate::open(identity.clone(), timing(config))?;
    let address = gate.address()?;
    let ended = Ended::default();
    for process in 1..config.processes {
        supervise(process, address, &identity, config, Arc::clone(&ended))?;
    }
    let (processes, workers) = (config.processes, config.workers);
    let assemble = move || {
        gate.assemble(processes, workers, &|| {
            let ended = ended.lock().unwrap_or_else(PoisonError::into_inner);
            ended.clone().map_or(Ok(()), Err)
        })
    };
    let connections = tokio::task::spawn_blocking(assemble)
        .await
        .map_err(|e| Error::internal(e.to_string()))??;
    info!(target: "millrace", processes, workers, "the processes of the data plane have found each other");
    Ok(Some(Peers {
        connections,
        definitions,
        lost: when_lost(catalog.clone()),
    }))
}

/// The end of a service that has lost a process. One that was stopped, and wakes when another has taken over,
/// finds its processes gone too: it must not take over in its turn.
fn when_lost(catalog: SqliteCatalog) -> Lost {
    let runtime = tokio::runtime::Handle::current();
    Lost(Arc::new(move |error| {
        let look = async { tokio::time::timeout(LOOK, catalog.is_newest()).await };
        let newest = runtime.block_on(look);
        if matches!(newest, Ok(Ok(false))) {
            crate::cmd::print_error(&crate::error::fenced());
            // SAFETY: as in `end`.
            unsafe { libc::_exit(i32::from(EXIT_FENCED)) }
        }
        end(&error)
    }))
}

/// Ends this process at once, and with it the incarnation.
pub fn end(error: &Error) -> ! {
    error!(target: "millrace", %error, detail = error.detail.as_deref().unwrap_or_default(), "this incarnation ends");
    // SAFETY: ends the process; everything that counts is on the disk.
    unsafe { libc::_exit(1) }
}

/// Starts a worker process, from a thread that lives as long as it: the parent-death signal follows
/// that thread.
fn supervise(
    process: usize,
    server: SocketAddr,
    identity: &Identity,
    config: &Config,
    ended: Ended,
) -> Result<()> {
    let handover = Handover {
        incarnation: identity.incarnation,
        secret: identity.secret.to_hex(),
    };
    let line = serde_json::to_string(&handover).map_err(|e| Error::internal(e.to_string()))?;
    let flags = config.flags.clone();
    let (sender, started) = std::sync::mpsc::channel();
    std::thread::Builder::new()
        .name(format!("millrace-process-{process}"))
        .spawn(move || {
            let mut child = match spawn(process, server, &flags, &line) {
                Ok(child) => child,
                Err(e) => return drop(sender.send(Err(e))),
            };
            // Held: its end would end the process.
            let input = child.stdin.take();
            let _ = sender.send(Ok(()));
            let status = child.wait();
            drop(input);
            let how = status.map_or_else(|e| e.to_string(), |status| status.to_string());
            info!(target: "millrace", process, how, "a worker process has ended");
            let error = Error::unavailable(format!(
                "process {process} of the data plane ended while the service starts"
            ));
            let mut ended = ended.lock().unwrap_or_else(PoisonError::into_inner);
            // Later than that its connection tells.
            ended.get_or_insert(error.detail(how));
        })?;
    started
        .recv()
        .map_err(|_| Error::internal("the thread of a worker process has ended"))??;
    Ok(())
}

fn spawn(
    process: usize,
    server: SocketAddr,
    flags: &[std::ffi::OsString],
    line: &str,
) -> std::io::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("worker")
        .args(["--process", &process.to_string()])
        .args(["--server", &server.to_string()])
        .args(flags)
        .stdin(Stdio::piped())
        .stdout(Stdio::null());
    // SAFETY: only an async-signal-safe call between fork and exec.
    unsafe { command.pre_exec(die_with_parent) };
    let mut child = command.spawn()?;
    if let Some(input) = &mut child.stdin {
        writeln!(input, "{line}")?;
    }
    Ok(child)
}
