//! What the lake holds, as PyIceberg sees it.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::kafka::service_script;

/// A python with PyIceberg. `None` (said aloud) when there is none, which CI forbids.
pub fn python() -> Option<PathBuf> {
    let given = std::env::var("MILLRACE_TEST_PYTHON").map(PathBuf::from);
    let path = given.unwrap_or_else(|_| {
        let answer = Command::new(service_script("pyiceberg.sh"))
            .arg("address")
            .output();
        let text = answer.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_string());
        PathBuf::from(text.unwrap_or_default())
    });
    if path.exists() {
        return Some(path);
    }
    let missing = "no PyIceberg: run tests/services/pyiceberg.sh install";
    assert!(std::env::var("CI").is_err(), "{missing}");
    println!("SKIPPED: {missing}");
    None
}

/// Runs `tests/ledger.py` on a data directory; its report.
///
/// # Panics
///
/// When the script fails: that is the finding.
pub fn ledger(python: &Path, data_dir: &Path, args: &[&str]) -> Value {
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("ledger.py");
    let out = Command::new(python)
        .arg(script)
        .arg(data_dir)
        .args(args)
        .output()
        .expect("python runs");
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(
        out.status.success(),
        "the ledger {args:?} does not hold:\n{text}\n{}",
        String::from_utf8_lossy(&out.stderr)
    );
    text.lines()
        .last()
        .and_then(|line| serde_json::from_str(line).ok())
        .unwrap_or_else(|| panic!("no report in: {text}"))
}

/// Runs a script with PyIceberg, which finds `catalog`, that of the data directory, and `data_dir`.
///
/// # Panics
///
/// When it fails.
pub fn script(python: &Path, data_dir: &Path, text: &str) {
    let head = "import os, sys
from pyiceberg.catalog.sql import SqlCatalog
data_dir = os.path.abspath(sys.argv[1])
catalog = SqlCatalog('lake', uri=f'sqlite:///{data_dir}/metadata.db')
";
    let out = Command::new(python)
        .arg("-c")
        .arg(format!("{head}{text}"))
        .arg(data_dir)
        .output()
        .expect("python runs");
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{text}:\n{errors}");
}
