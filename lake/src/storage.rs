//! Locations and durability.
//!
//! A location is `file://` and an absolute path, as Iceberg readers expect it. A commit may name a
//! file only after the file *and the directory entries leading to it* are on disk: otherwise a power
//! cut leaves a table that points at nothing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use millrace_dataflow::error::{Error, Result};

/// The local path of a location.
pub fn local_path(location: &str) -> Result<PathBuf> {
    let path = match location.strip_prefix("file:") {
        Some(rest) => format!("/{}", rest.trim_start_matches('/')),
        None if location.starts_with('/') => location.to_string(),
        None => {
            return Err(Error::unsupported(format!(
                "location \"{location}\" is not on a local disk"
            ))
            .hint("only file:// locations are supported so far"));
        }
    };
    Ok(PathBuf::from(path))
}

/// The location of an absolute local path.
pub fn location_of(path: &Path) -> Result<String> {
    match path.to_str() {
        Some(text) if path.is_absolute() => Ok(format!("file://{text}")),
        _ => Err(Error::invalid(
            "the warehouse must be an absolute path in UTF-8",
        )),
    }
}

/// Makes files and the directories that hold them durable.
pub async fn sync(locations: &[String]) -> Result<()> {
    let files = locations
        .iter()
        .map(|l| local_path(l))
        .collect::<Result<Vec<_>>>()?;
    blocking(move || {
        let mut directories = BTreeSet::new();
        for file in &files {
            std::fs::File::open(file)?.sync_all()?;
            if let Some(parent) = file.parent() {
                directories.insert(parent.to_path_buf());
            }
        }
        for directory in directories {
            sync_directory(&directory)?;
        }
        Ok(())
    })
    .await
}

/// Creates a directory and makes every entry from `root` down to it durable.
pub async fn create_directory(root: PathBuf, directory: PathBuf) -> Result<()> {
    blocking(move || {
        std::fs::create_dir_all(&directory)?;
        for ancestor in directory.ancestors().take_while(|a| a.starts_with(&root)) {
            sync_directory(ancestor)?;
        }
        Ok(())
    })
    .await
}

/// Makes the entries of a directory durable.
pub fn sync_directory(directory: &Path) -> std::io::Result<()> {
    std::fs::File::open(directory)?.sync_all()
}

/// Runs file work off the asynchronous threads.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Error::from),
        Err(e) => Err(Error::internal(format!("file work did not finish: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_lead_back_to_their_paths() {
        let path = Path::new("/data/ware house/ns/t");
        let location = location_of(path).expect("absolute");
        assert_eq!(location, "file:///data/ware house/ns/t");
        assert_eq!(local_path(&location).expect("local"), path);
        assert_eq!(local_path("file:/a/b").expect("local"), Path::new("/a/b"));
        assert_eq!(local_path("/a/b").expect("local"), Path::new("/a/b"));
        assert!(local_path("s3://bucket/a").is_err());
        assert!(location_of(Path::new("relative")).is_err());
    }
}
