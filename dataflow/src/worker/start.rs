//! Starts the workers of this process, alone or as part of a mesh.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use timely::communication::allocator::zero_copy::initialize::initialize_networking_from_sockets;
use timely::communication::allocator::{AllocatorBuilder, ProcessBuilder};
use timely::communication::{Hooks, WorkerGuards};

use super::command::{Command, WorkerHandle};
use crate::checkpoint::PartSender;
use crate::cluster::mesh::patient;
use crate::error::{Error, Result};
use crate::ingest::lock;
use crate::state::Pager;

/// Connections to the other processes of the data plane.
#[derive(Debug)]
pub struct Mesh {
    /// Number of this process.
    pub process: usize,
    /// By process; none to itself.
    pub sockets: Vec<Option<TcpStream>>,
}

/// Workers that wait for commands.
#[derive(Debug)]
pub struct Workers {
    /// In the order of their numbers.
    pub handles: Vec<WorkerHandle>,
    /// Ends with the last of them.
    pub thread: std::thread::JoinHandle<()>,
}

/// Starts `count` workers, their state under a budget of memory if there is one.
pub fn start(
    count: usize,
    parts: PartSender,
    pager: Option<Arc<Pager>>,
    mesh: Option<Mesh>,
) -> Result<Workers> {
    let first = mesh.as_ref().map_or(0, |m| m.process * count);
    let mut senders = Vec::new();
    let mut receivers: Vec<Option<Receiver<Command>>> = Vec::new();
    for _ in 0..count {
        let (sender, receiver) = channel();
        senders.push(sender);
        receivers.push(Some(receiver));
    }
    let receivers = Mutex::new(receivers);
    let parts = Mutex::new(parts);
    let (up, ups) = channel();
    let up = Mutex::new(up);
    let thread = std::thread::Builder::new()
        .name("workers".into())
        .spawn(move || {
            let guards = execute(count, mesh, move |timely_worker| {
                let index = timely_worker.index();
                Pager::enter(pager.clone());
                let receiver = lock(&receivers)[index - first]
                    .take()
                    .expect("each worker starts once");
                let parts = lock(&parts).clone();
                let _ = lock(&up).send((index, std::thread::current()));
                super::run(timely_worker, &receiver, parts);
            });
            match guards {
                Ok(guards) => drop(guards.join()),
                Err(error) => tracing::error!(%error, "the workers could not be started"),
            }
        })
        .map_err(|e| Error::unavailable(e.to_string()))?;
    let mut threads: BTreeMap<usize, std::thread::Thread> = BTreeMap::new();
    for _ in 0..count {
        let (index, thread) = ups
            .recv()
            .map_err(|_| Error::internal("a worker did not start"))?;
        threads.insert(index, thread);
    }
    let handles = senders
        .into_iter()
        .zip(threads.into_values())
        .map(|(sender, thread)| WorkerHandle::Local { sender, thread })
        .collect();
    Ok(Workers { handles, thread })
}

fn execute(
    count: usize,
    mesh: Option<Mesh>,
    work: impl Fn(&mut timely::worker::Worker) + Send + Sync + 'static,
) -> Result<WorkerGuards<()>> {
    let Some(Mesh { process, sockets }) = mesh else {
        return timely::execute(timely::Config::process(count), work).map_err(Error::internal);
    };
    patient(&sockets)?;
    let hooks = Hooks::default();
    let local = ProcessBuilder::new_typed_vector(count, hooks.refill.clone(), None);
    let (builders, guard) =
        initialize_networking_from_sockets(local, sockets, process, count, hooks)?;
    let builders = builders.into_iter().map(AllocatorBuilder::Tcp).collect();
    let settings = timely::WorkerConfig::default();
    timely::execute::execute_from(builders, Box::new(guard), settings, work)
        .map_err(Error::internal)
}
