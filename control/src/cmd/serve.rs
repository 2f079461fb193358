//! `millrace serve`: the small parent that holds the listening socket and restarts the service.
//!
//! # Contract
//!
//! * The parent has no state but the socket: whatever happens to the child costs a reconnect. While
//!   the child is away the socket queues connections.
//! * The child never outlives the parent: the kernel kills it (parent-death signal), and where that
//!   came too late for the signal to be set, the closed socket between them tells it.
//! * Exit codes of the child decide: 0 stops the parent too, [`EXIT_CONFIG`] (settings or data
//!   directory) and [`EXIT_FENCED`] (another server took over) are final, [`EXIT_AGAIN`] (a statement
//!   asked for it) restarts at once, anything else is a crash and leads to a restart with growing
//!   pauses.
//!
//! ```text
//!  SIGTERM ─► parent ──SIGTERM──► child: stop accepting, final checkpoint, exit 0
//!             socket ══inherited══► accept
//!             pair   ◄──ready byte──  (closed = parent died)
//! ```

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus};
use std::time::{Duration, Instant};

use millrace_dataflow::error::{Error, Result};
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use crate::config::{Config, ServeArgs, environment, socket_address};

/// The settings or the data directory are wrong: starting again will not help.
pub const EXIT_CONFIG: u8 = 2;
/// Another server has taken over the data directory.
pub const EXIT_FENCED: u8 = 3;
/// A statement asked for a restart: at once, and it is no crash.
pub const EXIT_AGAIN: u8 = 4;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A child that ran this long was well; its crash starts the pauses anew.
const RAN_WELL: Duration = Duration::from_secs(60);
/// A graceful stop that takes longer is cut short.
const STOP_TIMEOUT: Duration = Duration::from_secs(120);
/// A predecessor that was just killed may hold the port for a moment.
const BIND_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs the parent until it is told to stop or the child cannot be helped.
pub fn run(args: &ServeArgs) -> ExitCode {
    super::init_logging();
    let prepared = Config::load(args, environment).and_then(|config| bind(&config.http));
    let listener = match prepared {
        Ok(listener) => listener,
        Err(error) => {
            super::print_error(&error);
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    // One thread: the parent-death signal follows the thread that started the child.
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            super::print_error(&error.into());
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(supervise(args, &listener)) {
        Ok(code) => code,
        Err(error) => {
            super::print_error(&Error::from(error));
            ExitCode::FAILURE
        }
    }
}

fn bind(text: &str) -> Result<TcpListener> {
    let address = socket_address(text)?;
    let started = Instant::now();
    loop {
        match TcpListener::bind(address) {
            Ok(listener) => return Ok(listener),
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && started.elapsed() < BIND_TIMEOUT => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(e) => {
                return Err(Error::invalid(format!("cannot listen on {address}: {e}"))
                    .hint("choose another address with --http, such as --http 127.0.0.1:0"));
            }
        }
    }
}

async fn supervise(args: &ServeArgs, listener: &TcpListener) -> io::Result<ExitCode> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut pause = FIRST_PAUSE;
    let mut announced = false;
    loop {
        let started = Instant::now();
        let (mut child, pair) = spawn(args, listener)?;
        let mut ready = tokio::net::UnixStream::from_std(pair)?;
        let mut byte = [0_u8; 1];
        let mut listening = true;
        let status = loop {
            tokio::select! {
                status = child.wait() => break status?,
                _ = terminate.recv() => return stop(child, &mut terminate, &mut interrupt).await,
                _ = interrupt.recv() => return stop(child, &mut terminate, &mut interrupt).await,
                read = ready.read(&mut byte), if listening => {
                    listening = false;
                    if matches!(read, Ok(1)) && !std::mem::replace(&mut announced, true) {
                        announce(listener)?;
                    }
                }
            }
        };
        if let Some(code) = is_final(status) {
            return Ok(code);
        }
        if status.code() == Some(i32::from(EXIT_AGAIN)) {
            continue;
        }
        if started.elapsed() >= RAN_WELL {
            pause = FIRST_PAUSE;
        }
        warn!(target: "millrace", reason = %status, pause_ms = pause.as_millis() as u64, "service died, starting it again");
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = terminate.recv() => return Ok(ExitCode::SUCCESS),
            _ = interrupt.recv() => return Ok(ExitCode::SUCCESS),
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// What ends the parent too.
fn is_final(status: ExitStatus) -> Option<ExitCode> {
    match status.code() {
        Some(0) => Some(ExitCode::SUCCESS),
        Some(code) if code == i32::from(EXIT_CONFIG) => Some(ExitCode::from(EXIT_CONFIG)),
        Some(code) if code == i32::from(EXIT_FENCED) => Some(ExitCode::from(EXIT_FENCED)),
        _ => None,
    }
}

fn announce(listener: &TcpListener) -> io::Result<()> {
    use std::io::Write;
    let mut out = io::stdout().lock();
    // Whoever reads the line may have gone; that is no reason to stop.
    let _ = writeln!(
        out,
        "millrace is ready on http://{}",
        listener.local_addr()?
    );
    let _ = out.flush();
    Ok(())
}

/// Passes the wish on and waits; a second signal, or too long a wait, kills.
async fn stop(
    mut child: Child,
    terminate: &mut tokio::signal::unix::Signal,
    interrupt: &mut tokio::signal::unix::Signal,
) -> io::Result<ExitCode> {
    info!(target: "millrace", "stopping");
    if let Some(pid) = child.id() {
        // SAFETY: `kill` on the process id of a child that has not been waited for.
        unsafe { libc::kill(pid as libc::pid_t, libc::SIGTERM) };
    }
    let status = tokio::select! {
        status = child.wait() => status?,
        _ = terminate.recv() => kill(&mut child).await?,
        _ = interrupt.recv() => kill(&mut child).await?,
        () = tokio::time::sleep(STOP_TIMEOUT) => kill(&mut child).await?,
    };
    if status.success() {
        return Ok(ExitCode::SUCCESS);
    }
    warn!(target: "millrace", code = ?status.code(), signal = ?status.signal(), "service did not stop gracefully");
    Ok(ExitCode::FAILURE)
}

async fn kill(child: &mut Child) -> io::Result<ExitStatus> {
    child.start_kill()?;
    child.wait().await
}

/// Starts the service: the same executable, with the listening socket and its end of a pair.
fn spawn(args: &ServeArgs, listener: &TcpListener) -> io::Result<(Child, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let theirs: OwnedFd = theirs.into();
    let listen_fd = listener.as_raw_fd();
    let parent_fd = theirs.as_raw_fd();
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("serve-child")
        .args([
            "--listen-fd",
            &listen_fd.to_string(),
            "--parent-fd",
            &parent_fd.to_string(),
        ])
        .args(args.flags())
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true);
    // SAFETY: only async-signal-safe calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            keep_open(listen_fd)?;
            keep_open(parent_fd)?;
            die_with_parent()
        });
    }
    let child = command.spawn()?;
    drop(theirs);
    Ok((child, ours))
}

fn keep_open(fd: RawFd) -> io::Result<()> {
    descriptor_flags(fd, 0)
}

/// Children of this process do not inherit the descriptor.
pub(super) fn close_on_exec(fd: RawFd) -> io::Result<()> {
    descriptor_flags(fd, libc::FD_CLOEXEC)
}

fn descriptor_flags(fd: RawFd, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: `fcntl` on a descriptor that is open in this process.
    let done = unsafe { libc::fcntl(fd, libc::F_SETFD, flags) };
    if done == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// The kernel kills this process when the thread that started it ends.
#[cfg(target_os = "linux")]
pub(crate) fn die_with_parent() -> io::Result<()> {
    // SAFETY: plain system call on the calling process.
    let done = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    if done == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn die_with_parent() -> io::Result<()> {
    Ok(())
}
