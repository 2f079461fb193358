//! The catalog: which metadata file is the current version of a table.
//!
//! # Contract
//!
//! * A [`TableVersion`] is immutable; its `location` identifies it.
//! * A version follows another only through [`SqlCatalog::swap`], a compare-and-set on the location.
//! * Dropping a table drops the pointer; files stay unless asked otherwise.

pub mod sql;

use std::fmt;
use std::sync::Arc;

use iceberg::spec::TableMetadata;
use millrace_dataflow::error::{Error, Result};

pub use sql::SqlCatalog;

/// `namespace.table`; the namespace may itself contain dots.
#[derive(
    Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct TableName {
    pub namespace: String,
    pub name: String,
}

impl TableName {
    /// Checks that both parts can name a table.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Result<Self> {
        let (namespace, name) = (namespace.into(), name.into());
        check_part("namespace", &namespace)?;
        if namespace.split('.').any(str::is_empty) {
            return Err(bad_name("namespace", &namespace));
        }
        check_part("table", &name)?;
        if name.contains('.') {
            return Err(bad_name("table", &name));
        }
        Ok(Self { namespace, name })
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.namespace, self.name)
    }
}

fn check_part(what: &str, text: &str) -> Result<()> {
    let fits = !text.is_empty() && text.len() <= 255;
    if fits
        && !text
            .chars()
            .any(|c| c.is_control() || c == '/' || c == '\\')
    {
        Ok(())
    } else {
        Err(bad_name(what, text))
    }
}

fn bad_name(what: &str, text: &str) -> Error {
    Error::invalid(format!(
        "\"{}\" cannot name a lake {what}",
        text.escape_default()
    ))
    .code("42602")
    .hint("use 1 to 255 characters without dots, slashes and control characters")
}

/// One version of a table.
#[derive(Debug, Clone)]
pub struct TableVersion {
    pub name: TableName,
    /// The metadata file; identifies the version.
    pub location: String,
    pub metadata: Arc<TableMetadata>,
}
