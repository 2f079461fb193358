//! Ways in: from outside records to columns with offsets.
//!
//! A connector fills [`millrace_dataflow::source::Source`]: its splits are fixed by its options, its
//! offsets are its own, and reading a split again from an offset gives the same records. Bytes become
//! columns in `interchange`. The connectors and their options are listed by [`connectors`].
//!
//! # Contract
//!
//! * [`create`] looks at options and, for files, at the file system, never at the network: a server
//!   starts again while a broker is away. [`validate`] asks the outside, when a source is created.
//! * An unknown connector or option is an error that names what is known.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::datatypes::Schema;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::source::Source;

mod files;
mod generator;
mod kafka;
mod options;

use options::Options;
pub use options::{ConnectorInfo, OptionInfo};

/// Options of a source, as written in `WITH (…)`. The key `connector` may be among them.
pub type OptionMap = BTreeMap<String, String>;

/// All connectors with their options.
pub fn connectors() -> &'static [ConnectorInfo] {
    &[files::INFO, generator::INFO, kafka::INFO]
}

/// A source with the declared columns; with those it knows itself if none are declared.
///
/// [`Source::schema`] of the result holds the physical columns of the relation: for a changelog of
/// files that is one less than declared.
pub fn create(connector: &str, options: &OptionMap, columns: &Schema) -> Result<Arc<dyn Source>> {
    let options = Options::new(info(connector)?, options)?;
    Ok(match options.connector() {
        "files" => Arc::new(files::FilesSource::new(&options, columns).map_err(wrong_format)?),
        "generator" => Arc::new(generator::GeneratorSource::new(&options, columns)?),
        _ => Arc::new(kafka::KafkaSource::new(&options, columns)?),
    })
}

/// The columns that a source has by itself: fixed for the generator, told from the first records of
/// files. `None` where they must be declared.
pub fn discover(connector: &str, options: &OptionMap) -> Result<Option<Schema>> {
    let options = Options::new(info(connector)?, options)?;
    match options.connector() {
        "files" => files::discover(&options).map(Some).map_err(wrong_format),
        "generator" => generator::discover(&options).map(Some),
        _ => Ok(None),
    }
}

/// Asks the outside whether the source can be read: the broker answers within 5 s and has the topic,
/// the first file opens and fits the declared columns. Meant for the moment of creation only.
pub async fn validate(connector: &str, options: &OptionMap, columns: &Schema) -> Result<()> {
    let (connector, options, columns) = (connector.to_string(), options.clone(), columns.clone());
    let task = tokio::task::spawn_blocking(move || {
        let options = Options::new(info(&connector)?, &options)?;
        match options.connector() {
            "files" => files::FilesSource::new(&options, &columns)?
                .validate()
                .map_err(wrong_format),
            "generator" => generator::GeneratorSource::new(&options, &columns).map(drop),
            _ => kafka::KafkaSource::new(&options, &columns)?.validate(),
        }
    });
    task.await
        .map_err(|e| Error::internal(format!("validation of a source stopped: {e}")))?
}

/// What cannot be read when a source is created is most likely of another format than it says.
fn wrong_format(mut error: Error) -> Error {
    if error.kind == ErrorKind::Corrupt {
        error.kind = ErrorKind::Invalid;
        error.code = "22000";
        if error.hint.is_none() {
            error.hint = Some("check the option format: it says what the files hold".to_string());
        }
    }
    error
}

fn info(connector: &str) -> Result<&'static ConnectorInfo> {
    let names = || connectors().iter().map(|c| c.name);
    connectors()
        .iter()
        .find(|c| c.name == connector)
        .ok_or_else(|| {
            Error::invalid(format!("connector \"{connector}\" does not exist")).hint(options::hint(
                connector,
                names(),
                "the connectors are",
            ))
        })
}

#[cfg(test)]
mod tests {
    use millrace_dataflow::error::ErrorKind;

    use super::*;

    fn map(options: &[(&str, &str)]) -> OptionMap {
        options
            .iter()
            .map(|(k, v)| ((*k).to_string(), (*v).to_string()))
            .collect()
    }

    #[test]
    fn unknown_names_get_a_hint() {
        let error = create("kafak", &map(&[]), &Schema::empty()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Invalid);
        assert_eq!(
            error.hint.as_deref(),
            Some("did you mean \"kafka\"? the connectors are \"files\", \"generator\", \"kafka\"")
        );
        let error = create(
            "generator",
            &map(&[
                ("connector", "generator"),
                ("kind", "nexmark"),
                ("tabel", "bid"),
            ]),
            &Schema::empty(),
        )
        .unwrap_err();
        assert_eq!(
            error.message,
            "option \"tabel\" of connector \"generator\" does not exist"
        );
        assert!(error.hint.unwrap().starts_with("did you mean \"table\"?"));
    }
}
