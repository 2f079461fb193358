//! Bytes that lie somewhere: what stored state is read from.

use std::fmt::Debug;
use std::sync::Arc;

use bytes::Bytes;

use crate::error::{Error, ErrorKind, Result};

/// An immutable object of a checkpoint.
pub trait Blob: Debug + Send + Sync {
    fn length(&self) -> u64;
    /// The bytes from `at` on; the caller has asked [`Self::length`]. May block.
    fn read(&self, at: u64, length: usize) -> Result<Bytes>;
}

impl Blob for Bytes {
    fn length(&self) -> u64 {
        self.len() as u64
    }
    fn read(&self, at: u64, length: usize) -> Result<Bytes> {
        Ok(self.slice(at as usize..at as usize + length))
    }
}

/// Bytes read at once, at least.
const WINDOW: usize = 1 << 20;

/// Reads a blob from front to back, a window at a time.
#[derive(Debug)]
pub(super) struct Front<'a> {
    pub(super) blob: &'a Arc<dyn Blob>,
    pub(super) at: u64,
    end: u64,
    window: Bytes,
    window_at: u64,
}

impl<'a> Front<'a> {
    pub(super) fn new(blob: &'a Arc<dyn Blob>, at: u64, end: u64) -> Self {
        Self {
            blob,
            at,
            end: end.min(blob.length()),
            window: Bytes::new(),
            window_at: at,
        }
    }

    /// The next `length` bytes, which stay in front.
    pub(super) fn peek(&mut self, length: usize) -> Result<Bytes> {
        let left = self.end.saturating_sub(self.at);
        if left < length as u64 {
            return Err(Error::new(ErrorKind::Corrupt, "stored state is cut short"));
        }
        let within = (self.at - self.window_at) as usize;
        if within + length > self.window.len() {
            let some = length.max(WINDOW).min(left as usize);
            self.window = self.blob.read(self.at, some)?;
            self.window_at = self.at;
        }
        let within = (self.at - self.window_at) as usize;
        Ok(self.window.slice(within..within + length))
    }

    /// The next bytes are done with.
    pub(super) fn skip(&mut self, length: usize) {
        self.at += length as u64;
    }
}
