//! A small disk of a test's own, to be filled.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A tmpfs that is gone when dropped.
#[derive(Debug)]
pub struct SmallDisk {
    path: PathBuf,
    ballast: u32,
}

impl SmallDisk {
    /// Mounted over a folder, which is made. `None` (said aloud) where mounting is not permitted.
    pub fn over(path: &Path, mib: u32) -> Option<Self> {
        std::fs::create_dir_all(path).expect("a folder");
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"])
            .arg(path)
            .stderr(Stdio::null())
            .status();
        if !status.is_ok_and(|status| status.success()) {
            println!("SKIPPED: a small disk cannot be mounted here (this needs root)");
            return None;
        }
        let path = path.to_path_buf();
        Some(Self { path, ballast: 0 })
    }

    /// Takes all the room that is left.
    pub fn fill(&mut self) {
        let path = self.path.join(format!("ballast-{}", self.ballast));
        let mut file = File::create(&path).expect("a file needs no room yet");
        self.ballast += 1;
        for block in [1 << 20, 4096, 1] {
            while file.write_all(&vec![0x55; block]).is_ok() {}
        }
        if file.metadata().map_or(0, |m| m.len()) == 0 {
            let _ = std::fs::remove_file(path);
        }
    }

    /// Gives it back.
    pub fn free(&mut self) {
        for number in 0..self.ballast {
            let _ = std::fs::remove_file(self.path.join(format!("ballast-{number}")));
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process of the test may still be ending.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}
