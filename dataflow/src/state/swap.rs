//! The swap file: scratch space for pages that are not in memory. It means nothing after a restart.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::error::{Error, Result};
use crate::ingest::lock;

/// Places begin at multiples of this and are as long as some.
const UNIT: u64 = 2048;

/// See the module.
#[derive(Debug)]
pub(super) struct SwapFile {
    file: File,
    room: Mutex<Room>,
    used: AtomicU64,
    written: AtomicU64,
    read: AtomicU64,
}

/// Which places are free; in units.
#[derive(Debug, Default)]
struct Room {
    /// By length.
    free: BTreeMap<u32, Vec<u32>>,
    end: u32,
}

impl Room {
    /// The smallest free place that is long enough, unless that wastes much, else one at the end.
    fn take(&mut self, units: u32) -> Option<(u32, u32)> {
        let most = units + units / 4;
        let fitting = self.free.range_mut(units..=most);
        for (length, places) in fitting {
            if let Some(at) = places.pop() {
                return Some((at, *length));
            }
        }
        let at = self.end;
        self.end = at.checked_add(units)?;
        Some((at, units))
    }
    fn give_back(&mut self, at: u32, units: u32) {
        self.free.entry(units).or_default().push(at);
    }
}

impl SwapFile {
    /// A file that has no name, so that it is gone with the process.
    pub(super) fn create(dir: &Path) -> Result<Arc<Self>> {
        let path = dir.join(format!(".swap-{}", std::process::id()));
        let failed = |e: io::Error| {
            Error::unavailable("the swap file cannot be created")
                .detail(format!("{}: {e}", dir.display()))
        };
        std::fs::create_dir_all(dir).map_err(failed)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        let file = options.open(&path).map_err(failed)?;
        std::fs::remove_file(&path).map_err(failed)?;
        Ok(Arc::new(Self {
            file,
            room: Mutex::default(),
            used: AtomicU64::new(0),
            written: AtomicU64::new(0),
            read: AtomicU64::new(0),
        }))
    }

    /// Writes bytes to a place of their own.
    pub(super) fn write(self: &Arc<Self>, bytes: &[u8]) -> io::Result<Slot> {
        let full = || io::Error::new(io::ErrorKind::StorageFull, "the swap file is full");
        let units = u32::try_from((bytes.len() as u64).div_ceil(UNIT)).map_err(|_| full())?;
        let (at, units) = lock(&self.room).take(units).ok_or_else(full)?;
        // Made before the write, so that the place is given back when that fails.
        let slot = Slot {
            file: Arc::clone(self),
            at,
            units,
            length: bytes.len() as u32,
            crc: crc32fast::hash(bytes),
        };
        self.used.fetch_add(slot.space(), Ordering::Relaxed);
        self.file.write_all_at(bytes, u64::from(at) * UNIT)?;
        self.written.fetch_add(1, Ordering::Relaxed);
        Ok(slot)
    }

    /// Bytes in use, places written and read since the start.
    pub(super) fn stats(&self) -> (u64, u64, u64) {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (get(&self.used), get(&self.written), get(&self.read))
    }
}

/// A place in the swap file; free again when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    file: Arc<SwapFile>,
    at: u32,
    units: u32,
    length: u32,
    crc: u32,
}

impl Slot {
    /// Bytes of the file that it takes.
    pub(super) fn space(&self) -> u64 {
        u64::from(self.units) * UNIT
    }

    /// Reads the bytes back into `buffer`, which gets their length.
    pub(super) fn read(&self, buffer: &mut Vec<u8>) -> Result<()> {
        let damaged = |detail: String| {
            Error::internal("a page cannot be read back from the swap file").detail(detail)
        };
        buffer.resize(self.length as usize, 0);
        let at = u64::from(self.at) * UNIT;
        let read = self.file.file.read_exact_at(buffer, at);
        read.map_err(|e| damaged(e.to_string()))?;
        if crc32fast::hash(buffer) != self.crc {
            return Err(damaged("its checksum is wrong".to_string()));
        }
        self.file.read.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.file.used.fetch_sub(self.space(), Ordering::Relaxed);
        lock(&self.file.room).give_back(self.at, self.units);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_used_again_and_keep_their_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let file = SwapFile::create(dir.path()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let bytes = |n: usize| vec![n as u8; 1000 + 977 * n];
        let mut slots: Vec<_> = (0..40)
            .map(|n| Some(file.write(&bytes(n)).unwrap()))
            .collect();
        let end = lock(&file.room).end;
        for n in (0..40).step_by(3) {
            slots[n] = None;
        }
        let mut again: Vec<_> = (0..40)
            .step_by(3)
            .map(|n| (n, file.write(&bytes(n)).unwrap()))
            .collect();
        assert_eq!(lock(&file.room).end, end);
        again.extend(
            slots
                .into_iter()
                .enumerate()
                .filter_map(|(n, s)| Some((n, s?))),
        );
        let mut buffer = Vec::new();
        for (n, slot) in &again {
            slot.read(&mut buffer).unwrap();
            assert_eq!(buffer, bytes(*n));
        }
        drop(again);
        assert_eq!(file.stats(), (0, 54, 40));
    }

    #[test]
    fn damage_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let file = SwapFile::create(dir.path()).unwrap();
        let slot = file.write(&[7; 5000]).unwrap();
        file.file.write_all_at(&[8], 100).unwrap();
        let error = slot.read(&mut Vec::new()).unwrap_err();
        assert!(error.detail.unwrap().contains("checksum"));
    }
}
