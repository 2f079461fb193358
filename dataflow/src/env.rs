//! The only door to wall time and chance.
//!
//! Everything that depends on the machine's clock or on random numbers asks here, so that a
//! simulation can stand in for both.

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}

/// Microseconds since the Unix epoch.
pub fn now_us() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_micros() as i64)
}

/// A random identifier, for names of files and tables.
pub fn random_id() -> uuid::Uuid {
    uuid::Uuid::new_v4()
}

/// Creates a directory and, if it was not there, makes the entries that lead to it durable.
pub fn create_directory(directory: &std::path::Path) -> std::io::Result<()> {
    let missing = (directory.ancestors()).take_while(|a| !a.as_os_str().is_empty() && !a.exists());
    let missing: Vec<_> = missing.collect();
    std::fs::create_dir_all(directory)?;
    for made in missing {
        let parent = made.parent().filter(|p| !p.as_os_str().is_empty());
        let parent = parent.unwrap_or(std::path::Path::new("."));
        std::fs::File::open(parent)?.sync_all()?;
    }
    Ok(())
}

/// Stops the process at a named point when a test asks for it.
///
/// Exists in builds with debug assertions only. `MILLRACE_FAILPOINTS` holds entries
/// `name=action[:n]` separated by `;`: the `n`-th hit (from 1, default 1) of `name` performs
/// `action`: `kill` (SIGKILL to this process), `error` (the function returns true and the caller
/// fails as if the outside had), `panic`, `delay<ms>`.
#[cfg(debug_assertions)]
pub fn failpoint(name: &str) -> bool {
    use std::collections::HashMap;
    use std::sync::{LazyLock, Mutex};
    struct Armed {
        action: String,
        hit: u64,
        seen: u64,
    }
    static ARMED: LazyLock<Mutex<HashMap<String, Armed>>> = LazyLock::new(|| {
        let text = std::env::var("MILLRACE_FAILPOINTS").unwrap_or_default();
        let entries = text.split(';').filter_map(|entry| {
            let (name, action) = entry.split_once('=')?;
            let (action, hit) = action.split_once(':').unwrap_or((action, "1"));
            let hit = hit.parse().unwrap_or(1);
            Some((
                name.trim().to_string(),
                Armed {
                    action: action.trim().to_string(),
                    hit,
                    seen: 0,
                },
            ))
        });
        Mutex::new(entries.collect())
    });
    let action = {
        let Ok(mut armed) = ARMED.lock() else {
            return false;
        };
        let Some(point) = armed.get_mut(name) else {
            return false;
        };
        point.seen += 1;
        if point.seen != point.hit {
            return false;
        }
        point.action.clone()
    };
    tracing::warn!(failpoint = name, action, "a failpoint fires");
    match action.as_str() {
        "kill" => {
            // SIGKILL, not exit: nothing may be flushed or unwound.
            let _ = std::process::Command::new("kill")
                .args(["-9", &std::process::id().to_string()])
                .status();
            loop {
                std::thread::park();
            }
        }
        "error" => true,
        "panic" => panic!("failpoint {name}"),
        other => {
            if let Some(ms) = other.strip_prefix("delay").and_then(|ms| ms.parse().ok()) {
                std::thread::sleep(std::time::Duration::from_millis(ms));
            }
            false
        }
    }
}

/// Failpoints do not exist in release builds.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn failpoint(_name: &str) -> bool {
    false
}
