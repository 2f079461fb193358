//! Errors of the libraries below, as the workspace's error.
//!
//! What may pass by waiting (the disk, the database) becomes `Unavailable`; bytes that are not what
//! the format says become `Corrupt`; the rest keeps the kind that tells a caller what to do.

use millrace_dataflow::error::{Error, ErrorKind};

/// An error of the `iceberg` crate, met while doing `what`.
pub fn iceberg(what: &str, e: iceberg::Error) -> Error {
    let kind = match e.kind() {
        iceberg::ErrorKind::Unexpected => ErrorKind::Unavailable,
        iceberg::ErrorKind::FeatureUnsupported => ErrorKind::Unsupported,
        iceberg::ErrorKind::DataInvalid => ErrorKind::Corrupt,
        iceberg::ErrorKind::TableNotFound | iceberg::ErrorKind::NamespaceNotFound => {
            ErrorKind::NotFound
        }
        _ => ErrorKind::Internal,
    };
    Error::new(kind, format!("cannot {what}")).detail(e.to_string())
}

/// An error of the catalog database.
pub fn database(what: &str, e: sqlx::Error) -> Error {
    Error::unavailable(format!(
        "cannot {what}: the catalog database does not answer"
    ))
    .detail(e.to_string())
}

/// An error of DataFusion while a table is planned.
pub fn datafusion(what: &str, e: datafusion::error::DataFusionError) -> Error {
    Error::internal(format!("cannot {what}")).detail(e.to_string())
}

/// The workspace's error on its way through DataFusion.
pub fn into_datafusion(e: Error) -> datafusion::error::DataFusionError {
    datafusion::error::DataFusionError::External(Box::new(e))
}
