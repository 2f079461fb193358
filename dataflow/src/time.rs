//! Ticks and watermarks.
//!
//! A *tick* is the engine's time: milliseconds, strictly increasing, minted by one clock per data
//! plane. It is the timely timestamp. A *watermark* is what a source claims about event time; it
//! travels with the tick (see [`Watermark`]) and is never a timely timestamp.

/// The engine's time, in milliseconds since the epoch, strictly increasing.
pub type Tick = u64;

/// Event time up to which a source claims to be complete, in microseconds since the epoch.
///
/// `W` means: no more rows with an event time below `W` are expected. [`NO_WATERMARK`] until the
/// first row, [`END_OF_TIME`] once a bounded source has ended.
pub type Watermark = i64;

/// Nothing is claimed yet.
pub const NO_WATERMARK: Watermark = i64::MIN;
/// The source has ended: every window can close.
pub const END_OF_TIME: Watermark = i64::MAX;

/// Minted ticks are milliseconds since 1970; those below are private ones, which count from 1.
pub const FIRST_MINTED: Tick = 1_000_000_000_000;
