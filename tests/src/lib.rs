//! What the tests share: a real server as a child process, a client, a broker, an outside reader.
//!
//! The tests look at the system from outside only, through the doors that a user has: the binary,
//! SQL over HTTP, files, topics, and Iceberg tables as PyIceberg sees them. There is one test binary
//! per kind of evidence (`tests/tests/*.rs`).
//!
//! # Contract
//!
//! * Nothing waits for a fixed time: [`wait::until`] waits for a condition, with a deadline.
//! * Every process ends with the value that started it ([`server::Server`]); loopback only.
//! * What chance decides comes from a seed ([`rng::Rng`]) that a failing test prints.

pub mod http;
pub mod kafka;
pub mod lake;
pub mod proxy;
pub mod rng;
pub mod server;
#[cfg(test)]
mod sim;
pub mod slt;
pub mod small_disk;
pub mod wait;

pub use server::Server;
