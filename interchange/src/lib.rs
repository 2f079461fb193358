//! Outside forms, used by both ends: bytes to columns. Knows no dataflow operator.
//!
//! * A *format* turns records into columns: [`json`] and [`csv`] take one record after another and
//!   fill Arrow columns ([`format::Decoder`]); [`parquet`] reads whole files that are columns already.
//! * A *frame* finds records in a stream of bytes ([`frame`]): lines, or CSV records with quotes.
//! * [`scalar`] holds the text forms of single values, shared by all formats.

mod column;
pub mod csv;
pub mod format;
pub mod frame;
pub mod json;
pub mod parquet;
pub mod scalar;
