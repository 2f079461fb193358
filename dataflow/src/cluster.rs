//! Several processes for one data plane: the server and its worker processes.
//!
//! ```text
//!            server (process 0)                      worker process i
//!  minter ─► Link ═══ control: commands ══════════► Remote ─► workers
//!            Link ◄══ progress, parts, answers ════ Remote
//!  workers ◄═════════ mesh: rows between workers ══► workers
//! ```
//!
//! # Contract
//!
//! * The workers of all processes hear the same commands in the same order relative to ticks, as those of one
//!   process do; nothing depends on shared memory.
//! * Fate is shared: a process that dies, is silent or says something unexpected ends the incarnation
//!   everywhere, and the next one begins with the last checkpoint. So nothing here is tried again.
//! * Only the server decides what counts: it alone writes manifests and commits. What a worker process
//!   of an older incarnation still writes, nobody refers to.

pub mod frame;
pub mod handshake;
pub mod link;
pub mod mesh;
pub mod remote;
pub mod wire;

use std::sync::Arc;

use crate::error::Error;

/// Told once that a process is gone; ends the incarnation.
#[derive(Clone)]
pub struct Lost(pub Arc<dyn Fn(Error) + Send + Sync>);

impl std::fmt::Debug for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lost")
    }
}

/// The service's own description of items, which makes them again in a worker process.
pub type Definition = Arc<[u8]>;

/// The worker processes an engine starts with.
#[derive(Debug)]
pub struct Peers {
    pub connections: mesh::Assembled,
    /// Of everything that may be installed at the start, in an order in which each finds what it reads.
    pub definitions: Vec<Definition>,
    pub lost: Lost,
}
