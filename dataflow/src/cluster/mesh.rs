//! The connections of a data plane: how processes find each other.
//!
//! # Protocol
//!
//! 1. The server opens a gate on a loopback port and starts the worker processes.
//! 2. Each worker process opens a gate of its own and calls the server's: its control connection. It
//!    says where its gate is.
//! 3. When all have called, the server tells each where the others are. Process `i` calls the gates of
//!    all `j < i`, and waits for the calls of the others: the mesh on which workers exchange rows.
//!
//! Every connection begins with a [`super::handshake`]. Whoever is refused costs a line in the log.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::frame::{read_frame, write_frame};
use super::handshake::{Identity, Role, answer, call};
use super::wire::{Down, Up};
use crate::error::{Error, Result};

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// How often the gate is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// When processes must hear of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Silence is broken this often.
    pub beat: Duration,
    /// A process that is silent this long is taken for dead.
    pub dead_after: Duration,
    /// How long the processes may take to find each other.
    pub assembly: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            beat: Duration::from_millis(500),
            dead_after: Duration::from_secs(5),
            assembly: Duration::from_secs(60),
        }
    }
}

/// Where processes of the same incarnation may call.
#[derive(Debug)]
pub struct Gate {
    listener: TcpListener,
    identity: Identity,
    timing: Timing,
}

/// The server's connections.
#[derive(Debug)]
pub struct Assembled {
    /// To the worker processes 1, 2, …
    pub controls: Vec<TcpStream>,
    /// By process; none to itself.
    pub mesh: Vec<Option<TcpStream>>,
    pub timing: Timing,
}

/// A worker process's connections.
#[derive(Debug)]
pub struct Joined {
    pub process: usize,
    /// Of each process.
    pub workers: usize,
    pub control: TcpStream,
    pub mesh: Vec<Option<TcpStream>>,
    pub timing: Timing,
}

impl Gate {
    pub fn open(identity: Identity, timing: Timing) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            identity,
            timing,
        })
    }

    pub fn address(&self) -> Result<SocketAddr> {
        Ok(self.listener.local_addr()?)
    }

    /// Waits until all of `wanted` have called; `gave_up` may end the wait.
    fn gather(
        &self,
        wanted: &BTreeSet<(Role, u32)>,
        gave_up: &dyn Fn() -> Result<()>,
    ) -> Result<BTreeMap<(Role, u32), TcpStream>> {
        let mut found = BTreeMap::new();
        let (sender, let_in) = mpsc::channel();
        let deadline = Instant::now() + self.timing.assembly;
        while found.len() < wanted.len() {
            gave_up()?;
            if Instant::now() > deadline {
                return Err(Error::unavailable(
                    "the processes of the data plane did not find each other in time",
                ));
            }
            match self.listener.accept() {
                Ok((stream, from)) => self.examine(stream, from, wanted.clone(), sender.clone()),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    if let Ok((who, stream)) = let_in.recv_timeout(LOOK) {
                        found.entry(who).or_insert(stream);
                    }
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(found)
    }

    /// On a thread of its own: a caller that says nothing holds nobody up.
    fn examine(
        &self,
        mut stream: TcpStream,
        from: SocketAddr,
        wanted: BTreeSet<(Role, u32)>,
        let_in: mpsc::Sender<((Role, u32), TcpStream)>,
    ) {
        let identity = self.identity.clone();
        let examined = move || {
            let known = tune(&stream).and_then(|()| {
                answer(&mut stream, &identity, |role, process| {
                    wanted.contains(&(role, process))
                })
            });
            match known {
                // The gate may have closed meanwhile.
                Ok(who) => drop(let_in.send((who, stream))),
                Err(error) => {
                    tracing::warn!(%from, %error, "a connection to the data plane was refused");
                }
            }
        };
        let thread = std::thread::Builder::new().name("millrace-gate".to_string());
        if let Err(error) = thread.spawn(examined) {
            tracing::warn!(%from, %error, "a connection to the data plane was refused");
        }
    }

    /// The server's side of the protocol, with `processes - 1` worker processes of `workers` workers.
    pub fn assemble(
        self,
        processes: usize,
        workers: usize,
        gave_up: &dyn Fn() -> Result<()>,
    ) -> Result<Assembled> {
        let others = || 1..processes as u32;
        let wanted = others().map(|p| (Role::Control, p)).collect();
        let mut found = self.gather(&wanted, gave_up)?;
        let mut addresses = vec![self.address()?];
        let mut controls = Vec::new();
        for process in others() {
            let mut control = found
                .remove(&(Role::Control, process))
                .expect("all that are wanted were found");
            match read_frame(&mut control)? {
                (Up::Hello { gate }, _) => addresses.push(gate),
                _ => return Err(unexpected()),
            }
            controls.push(control);
        }
        for control in &mut controls {
            let start = Down::Start {
                workers,
                addresses: addresses.clone(),
            };
            write_frame(control, &start, &[])?;
        }
        let wanted = others().map(|p| (Role::Mesh, p)).collect();
        let found = self.gather(&wanted, gave_up)?;
        let mesh = std::iter::once(None).chain(found.into_values().map(Some));
        Ok(Assembled {
            controls,
            mesh: mesh.collect(),
            timing: self.timing,
        })
    }
}

/// A worker process's side of the protocol.
pub fn join(
    server: SocketAddr,
    identity: &Identity,
    process: usize,
    timing: Timing,
) -> Result<Joined> {
    let gate = Gate::open(identity.clone(), timing)?;
    let mut control = reach(server, identity, Role::Control, process)?;
    let hello = Up::Hello {
        gate: gate.address()?,
    };
    write_frame(&mut control, &hello, &[])?;
    control.set_read_timeout(Some(timing.assembly))?;
    let (workers, addresses) = match read_frame(&mut control)? {
        (Down::Start { workers, addresses }, _) => (workers, addresses),
        _ => return Err(unexpected()),
    };
    let mut mesh = Vec::new();
    for address in &addresses[..process] {
        mesh.push(Some(reach(*address, identity, Role::Mesh, process)?));
    }
    mesh.push(None);
    let wanted = (process + 1..addresses.len())
        .map(|p| (Role::Mesh, p as u32))
        .collect();
    let found = gate.gather(&wanted, &|| Ok(()))?;
    mesh.extend(found.into_values().map(Some));
    Ok(Joined {
        process,
        workers,
        control,
        mesh,
        timing,
    })
}

fn reach(
    address: SocketAddr,
    identity: &Identity,
    role: Role,
    process: usize,
) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address, HANDSHAKE)?;
    tune(&stream)?;
    call(&mut stream, identity, role, process as u32)?;
    Ok(stream)
}

fn unexpected() -> Error {
    Error::unavailable("a process of the data plane said something unexpected")
}

/// Small messages go at once, and a peer whose machine is gone is noticed by the kernel. Reads time
/// out, for the handshake; the mesh has no use for that, and [`patient`] takes it off.
fn tune(stream: &TcpStream) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(HANDSHAKE))?;
    set(stream, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    #[cfg(target_os = "linux")]
    for (option, value) in [
        (libc::TCP_KEEPIDLE, 5),
        (libc::TCP_KEEPINTVL, 2),
        (libc::TCP_KEEPCNT, 3),
        (libc::TCP_USER_TIMEOUT, 15_000),
    ] {
        set(stream, libc::IPPROTO_TCP, option, value)?;
    }
    Ok(())
}

/// Reads wait as long as it takes.
pub fn patient(mesh: &[Option<TcpStream>]) -> Result<()> {
    for stream in mesh.iter().flatten() {
        stream.set_read_timeout(None)?;
    }
    Ok(())
}

fn set(stream: &TcpStream, level: i32, option: i32, value: libc::c_int) -> Result<()> {
    let size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the descriptor is open, and `value` lives through the call.
    let done = unsafe {
        let value = std::ptr::from_ref(&value).cast();
        libc::setsockopt(stream.as_raw_fd(), level, option, value, size)
    };
    if done == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error().into())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::super::handshake::Secret;
    use super::*;

    fn identity() -> Identity {
        Identity {
            incarnation: 4,
            secret: Secret::random(),
        }
    }

    #[test]
    fn three_processes_find_each_other_whoever_else_calls() {
        let one = identity();
        let gate = Gate::open(one.clone(), Timing::default()).expect("a port");
        let address = gate.address().expect("an address");
        // One says nothing, one belongs to an earlier start.
        let silent = TcpStream::connect(address).expect("the gate is open");
        let stranger = std::thread::spawn(move || {
            reach(address, &identity(), Role::Control, 1).expect_err("refused")
        });
        let server = std::thread::spawn(move || gate.assemble(3, 2, &|| Ok(())));
        assert!(
            stranger
                .join()
                .expect("no panic")
                .message
                .contains("secret")
        );
        let joining: Vec<_> = (1..3)
            .map(|process| {
                let one = one.clone();
                std::thread::spawn(move || join(address, &one, process, Timing::default()))
            })
            .collect();
        let joined: Vec<Joined> = joining
            .into_iter()
            .map(|j| j.join().expect("no panic").expect("joined"))
            .collect();
        let server = server.join().expect("no panic").expect("assembled");
        drop(silent);
        assert_eq!(server.controls.len(), 2);
        let meshes: Vec<&Vec<Option<TcpStream>>> = std::iter::once(&server.mesh)
            .chain(joined.iter().map(|j| &j.mesh))
            .collect();
        for (from, mesh) in meshes.iter().enumerate() {
            assert_eq!(mesh.len(), 3);
            for (to, stream) in mesh.iter().enumerate() {
                assert_eq!(stream.is_none(), from == to);
                if let Some(mut stream) = stream.as_ref() {
                    stream.write_all(&[from as u8, to as u8]).expect("sent");
                    let mut other = meshes[to][from].as_ref().expect("both ends");
                    let mut got = [9; 2];
                    other.read_exact(&mut got).expect("received");
                    assert_eq!(got, [from as u8, to as u8]);
                }
            }
        }
        assert!(joined.iter().all(|j| j.workers == 2));
    }
}
