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
    let text = e.to_string();
    // What a table consists of is gone: waiting does not bring it back.
    let missing = what.starts_with("read") && text.contains("No such file or directory");
    let kind = if missing { ErrorKind::Corrupt } else { kind };
    let error = Error::new(kind, format!("cannot {what}")).detail(without_directories(&text));
    match kind {
        ErrorKind::Corrupt => error.hint(MEND),
        _ => error,
    }
}

/// What to do about a damaged table.
const MEND: &str = "restore the files of the table in the warehouse from a copy, or drop the table";

/// Where a server keeps its files is not the business of its clients: names of files stay, the
/// directories before them go.
fn without_directories(text: &str) -> String {
    let inside = |c: char| !c.is_whitespace() && !"\"'`,;()[]{}<>=".contains(c);
    let mut out = String::with_capacity(text.len());
    let mut word = String::new();
    let end = |word: &mut String, out: &mut String| {
        let path = word.strip_prefix("file:").unwrap_or(word);
        match path.starts_with('/') {
            true => out.push_str(
                path.rsplit('/')
                    .find(|part| !part.is_empty())
                    .unwrap_or("/"),
            ),
            false => out.push_str(word),
        }
        word.clear();
    };
    for c in text.chars() {
        if inside(c) {
            word.push(c);
        } else {
            end(&mut word, &mut out);
            out.push(c);
        }
    }
    end(&mut word, &mut out);
    out
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_has_a_hint_and_no_directories() {
        let text =
            "cannot parse file:///var/lib/m/warehouse/ns/t/metadata/v1.json: (/a/b.avro) and/or x";
        let e = iceberg::Error::new(iceberg::ErrorKind::DataInvalid, text);
        let error = iceberg("read a manifest", e);
        assert_eq!(error.kind, ErrorKind::Corrupt);
        assert!(error.hint.is_some());
        let detail = error.detail.expect("a detail");
        assert!(detail.contains("v1.json: (b.avro) and/or x"), "{detail}");
        assert!(
            !detail.contains("/var") && !detail.contains("/a"),
            "{detail}"
        );
        let text = "cannot read: No such file or directory (os error 2)";
        let e = iceberg::Error::new(iceberg::ErrorKind::Unexpected, text);
        assert_eq!(iceberg("read a manifest", e).kind, ErrorKind::Corrupt);
    }
}
