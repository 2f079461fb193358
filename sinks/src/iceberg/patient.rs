//! Waiting for a full disk.
//!
//! A Parquet writer that was refused a write is of no more use, and the rows it has encoded are nowhere
//! else. So a write that finds the disk full waits and tries again, and says so.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::time::Duration;

use millrace_dataflow::error::Error;
use millrace_dataflow::sink::Trouble;

const PAUSE: Duration = Duration::from_millis(500);

/// Does `work` again and again while the disk is full. Blocks.
pub(super) fn patient<T>(
    trouble: &Trouble,
    mut work: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    let mut waited = false;
    loop {
        match work() {
            Err(e) if matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
                waited = true;
                let error = Error::unavailable("the disk of the warehouse is full")
                    .code("53100")
                    .detail(e.to_string())
                    .hint("free space; the sink goes on by itself");
                trouble.set(Some(error));
                std::thread::sleep(PAUSE);
            }
            done => {
                if waited {
                    trouble.set(None);
                }
                return done;
            }
        }
    }
}

/// A file that waits for a full disk.
pub(super) struct PatientFile {
    file: File,
    trouble: Trouble,
}

impl PatientFile {
    pub(super) fn new(file: File, trouble: Trouble) -> Self {
        Self { file, trouble }
    }
    /// Waits until everything is on the disk.
    pub(super) fn sync_all(&self) -> io::Result<()> {
        patient(&self.trouble, || self.file.sync_all())
    }
    pub(super) fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }
}

impl Write for PatientFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let file = &mut self.file;
        patient(&self.trouble, || file.write(bytes))
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_waited_for_and_said() {
        let trouble = Trouble::default();
        let seen = Trouble::clone(&trouble);
        let mut tries = 0;
        let done = patient(&trouble, || {
            tries += 1;
            match tries {
                1 => Err(io::Error::from(ErrorKind::StorageFull)),
                _ => {
                    assert!(seen.get().is_some_and(|e| e.code == "53100"));
                    Ok(tries)
                }
            }
        });
        assert_eq!(done.expect("space came back"), 2);
        assert!(trouble.get().is_none());
        let other = patient(&trouble, || -> io::Result<()> {
            Err(ErrorKind::NotFound.into())
        });
        assert!(other.is_err());
    }
}
