//! Ways out: sinks, as `millrace_dataflow::sink` defines them.
//!
//! What every sink must promise stands there. In short: rows below a closed tick are in committables,
//! committables are published once, and the destination itself says how far it is.
//!
//! * [`iceberg`]: appends to a lake table, exactly once.
//! * [`blackhole`]: counts and drops, for measurements.
//! * [`refused`]: stands for one that cannot be opened.

pub mod blackhole;
pub mod iceberg;
pub mod options;
pub mod refused;

pub use blackhole::BlackholeSink;
pub use iceberg::{IcebergOptions, IcebergSink};
pub use refused::RefusedSink;
