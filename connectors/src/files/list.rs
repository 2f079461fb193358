//! Which files a path means.

use std::path::{Path, PathBuf};

use millrace_dataflow::error::{Error, ErrorKind, Result};

/// Absolute paths of the files that `path` names: itself, those in a directory, or those that match a
/// pattern; in order, at least one. Names that begin with `.` or `_` are left out of directories and
/// patterns, as other tools write their notes there.
pub(super) fn list(path: &str) -> Result<Vec<PathBuf>> {
    let plain = Path::new(path);
    let mut files = if plain.is_file() {
        vec![plain.to_path_buf()]
    } else if plain.is_dir() {
        directory(plain)?
    } else if path.contains(['*', '?', '[']) {
        pattern(path)?
    } else {
        let place = std::path::absolute(plain).unwrap_or_else(|_| plain.to_path_buf());
        return Err(
            missing(format!("no file or directory \"{path}\"")).hint(format!(
                "looked for {} on the server's machine",
                place.display()
            )),
        );
    };
    if files.is_empty() {
        return Err(missing(format!("no file matches \"{path}\"")).hint(
            "names that begin with . or _ are left out; directories are not searched downwards \
             unless the pattern has **",
        ));
    }
    for file in &mut files {
        *file = std::path::absolute(&file)
            .map_err(|e| Error::unavailable(format!("path \"{path}\" cannot be resolved: {e}")))?;
    }
    files.sort();
    files.dedup();
    Ok(files)
}

fn directory(path: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e: std::io::Error| {
        Error::unavailable(format!(
            "directory \"{}\" cannot be read: {e}",
            path.display()
        ))
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        if wanted(&file) {
            files.push(file);
        }
    }
    Ok(files)
}

fn pattern(path: &str) -> Result<Vec<PathBuf>> {
    let matches = glob::glob(path)
        .map_err(|e| Error::invalid(format!("path \"{path}\" is no valid pattern: {e}")))?;
    let mut files = Vec::new();
    for file in matches {
        let file = file.map_err(|e| Error::unavailable(format!("cannot be searched: {e}")))?;
        if wanted(&file) {
            files.push(file);
        }
    }
    Ok(files)
}

fn wanted(file: &Path) -> bool {
    let name = file
        .file_name()
        .map(|n| n.to_string_lossy())
        .unwrap_or_default();
    file.is_file() && !name.starts_with(['.', '_'])
}

fn missing(message: String) -> Error {
    Error::new(ErrorKind::NotFound, message).code("58P01")
}
