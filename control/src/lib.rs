//! The service: doors, sessions, the coordinator and the durable catalog; wires everything below.
//!
//! # A statement
//!
//! 1. [`server`] accepts a request and hands its text to a [`session::Session`].
//! 2. [`coordinator`] parses, purifies, binds, guards and lowers it (crate `sql`), changes the
//!    [`catalog`] and tells the engine; one writer at a time.
//! 3. [`query`] answers one-shot reads: engine relations at one tick, lake tables at a snapshot.
//! 4. [`api`] gives the answer its form.
//!
//! `millrace serve` is two processes: a parent that holds the socket ([`cmd::serve`]) and the
//! service itself ([`cmd::serve_child`]). With `--processes n` the service starts `n - 1` worker processes
//! beside itself ([`cluster`], [`cmd::worker`]).

pub mod api;
pub mod catalog;
pub mod cluster;
pub mod cmd;
pub mod config;
pub mod coordinator;
pub mod error;
pub mod failures;
pub mod metrics;
pub mod query;
pub mod server;
pub mod session;
