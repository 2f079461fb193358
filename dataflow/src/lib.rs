//! The engine: batches of changes, time, plans, operators, state.
//!
//! It knows no SQL text, no Kafka, no Iceberg and no user. What is outside comes in through two
//! traits: [`source::Source`] (ways in) and [`sink::Sink`] (ways out).
//!
//! # An update, from source to sink
//!
//! 1. A [`source::Reader`] decodes bytes into a `RecordBatch` that ends at an offset.
//! 2. The minter closes a *tick*: it binds offsets and watermarks of all sources to one number,
//!    writes the binding to the remap log and hands the batches to the workers.
//! 3. Each relation is a timely dataflow. It applies complete ticks in order and ends in a tap,
//!    where other relations and sinks are attached.
//! 4. Contents are read at a tick; a sink hands closed files to its committer at a tick.
//! 5. A checkpoint freezes all keyed state at one tick; a restart begins there.

pub mod blame;
pub mod checkpoint;
pub mod cluster;
pub mod delta;
pub mod engine;
pub mod env;
pub mod error;
pub mod exact;
pub mod follow;
pub mod ingest;
pub mod kernel;
pub mod key;
pub mod operator;
pub mod plan;
pub mod remap;
pub mod render;
pub mod served;
pub mod sink;
pub mod source;
pub mod state;
pub mod tap;
pub mod tick;
pub mod time;
pub mod worker;
