//! Files of Parquet, JSON lines or CSV, read once: a bounded source.
//!
//! # Contract
//!
//! * The files are listed when the source is made, in the order of their names; each is a split, named
//!   by its absolute path. The offset is the number of records consumed, rejected ones included.
//! * They are read one after another. A file that was named by an offset and is gone, or has become
//!   shorter, is an error.
//! * With `changelog = 'op'` the field `op` holds `+` or `-`; it becomes the sign of the row and is no
//!   column of the relation.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::datatypes::{Schema, SchemaRef};
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::source::{Offsets, Reader, Source};
use millrace_interchange::csv::CsvOptions;
use millrace_interchange::format::Layout;
use millrace_interchange::frame::Framing;
use millrace_interchange::{csv, json, parquet};

use crate::options::{ConnectorInfo, Options, option};

mod list;
mod reader;
mod records;
#[cfg(test)]
mod tests;

pub(crate) const INFO: ConnectorInfo = ConnectorInfo {
    name: "files",
    options: &[
        option(
            "path",
            "a file, a directory (its files, not those below) or a pattern with * and ?",
        ),
        option("format", "parquet, json (one object per line) or csv"),
        option(
            "changelog",
            "name of a field with + or -, which makes the row an insertion or a retraction",
        ),
        option(
            "header",
            "csv: the first record names the fields (default true); false: fields are the declared columns, in order",
        ),
        option("delimiter", "csv: one character between fields (default ,)"),
    ],
};

/// What stands in the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FileFormat {
    Parquet,
    Json,
    Csv(CsvOptions),
}

#[derive(Debug)]
pub(crate) struct FilesSource {
    schema: SchemaRef,
    format: FileFormat,
    changelog: Option<String>,
    /// Absolute paths, in order; or why there are none. A source that was read to its end needs them no
    /// more, so a server starts without them.
    files: Result<Arc<[PathBuf]>>,
}

/// The columns that the first file shows, the changelog field left out.
pub(crate) fn discover(options: &Options<'_>) -> Result<Schema> {
    let files = list::list(options.required("path")?)?;
    let first = files
        .first()
        .ok_or_else(|| Error::internal("an empty list of files"))?;
    let all = infer(first, format(options)?)?;
    Ok(without(&all, changelog(options)))
}

fn changelog<'a>(options: &Options<'a>) -> Option<&'a str> {
    options.text("changelog").filter(|name| !name.is_empty())
}

/// The columns but the one of this name.
fn without(columns: &Schema, name: Option<&str>) -> Schema {
    let kept = columns
        .fields()
        .iter()
        .filter(|f| Some(f.name().as_str()) != name);
    Schema::new(kept.cloned().collect::<Vec<_>>())
}

fn format(options: &Options<'_>) -> Result<FileFormat> {
    let format = options.required_word("format", &["parquet", "json", "csv"])?;
    for name in ["header", "delimiter"] {
        if format != "csv" && options.text(name).is_some() {
            return Err(Error::invalid(format!(
                "option \"{name}\" belongs to format \"csv\""
            )));
        }
    }
    Ok(match format {
        "parquet" => FileFormat::Parquet,
        "json" => FileFormat::Json,
        _ => {
            let header = options.flag("header", true)?;
            let delimiter = match options.text("delimiter").map(str::as_bytes) {
                None => b',',
                Some(b"\\t") => b'\t',
                Some([byte]) if byte.is_ascii() && !matches!(byte, b'"' | b'\n' | b'\r') => *byte,
                Some(_) => return Err(options.wrong("delimiter", "one ASCII character")),
            };
            FileFormat::Csv(CsvOptions {
                header,
                delimiter,
                sign_at: None,
            })
        }
    })
}

fn infer(file: &Path, format: FileFormat) -> Result<Schema> {
    let open = || Ok::<_, Error>(std::io::BufReader::new(open_file(file)?));
    let schema = match format {
        FileFormat::Parquet => parquet::infer(file),
        FileFormat::Json => json::infer(open()?),
        FileFormat::Csv(options) => csv::infer(open()?, options),
    };
    let schema = schema.map_err(|mut e| {
        e.detail = Some(format!(
            "{}: {}",
            file.display(),
            e.detail.unwrap_or_default()
        ));
        e
    })?;
    if schema.fields().is_empty() {
        return Err(
            Error::invalid(format!("file \"{}\" shows no columns", file.display()))
                .hint("declare the columns of the source"),
        );
    }
    Ok(schema)
}

/// The first of the files that were listed.
fn first(files: &Result<Vec<PathBuf>>) -> Result<&PathBuf> {
    let files = files.as_ref().map_err(Error::clone)?;
    files
        .first()
        .ok_or_else(|| Error::internal("an empty list of files"))
}

/// Opens a file that was listed.
fn open_file(path: &Path) -> Result<std::fs::File> {
    std::fs::File::open(path).map_err(|e| {
        let kind = match e.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            std::io::ErrorKind::PermissionDenied => ErrorKind::Denied,
            _ => ErrorKind::Unavailable,
        };
        Error::new(
            kind,
            format!("file \"{}\" cannot be opened: {e}", path.display()),
        )
    })
}

impl FilesSource {
    pub(crate) fn new(options: &Options<'_>, columns: &Schema) -> Result<Self> {
        let mut format = format(options)?;
        let files = list::list(options.required("path")?);
        let changelog = changelog(options);
        let inferred = columns.fields().is_empty();
        let all = if inferred {
            infer(first(&files)?, format)?
        } else {
            columns.clone()
        };
        let sign_at = changelog.and_then(|name| all.index_of(name).ok());
        if let (Some(name), None, true) = (changelog, sign_at, inferred) {
            return Err(Error::invalid(format!(
                "changelog field \"{name}\" is not in file \"{}\"",
                first(&files)?.display()
            ))
            .hint("name a field that holds + or -, or declare the columns of the source"));
        }
        if let FileFormat::Csv(csv) = &mut format {
            csv.sign_at = sign_at;
        }
        let source = Self {
            schema: Arc::new(without(&all, changelog)),
            format,
            changelog: changelog.map(String::from),
            files: files.map(Into::into),
        };
        // Types that the format cannot read are an error now.
        match source.format {
            FileFormat::Parquet => {}
            FileFormat::Json => drop(json::decoder(&source.layout(&[]))?),
            FileFormat::Csv(options) => drop(csv::decoder(&source.layout(&[]), options, None)?),
        }
        Ok(source)
    }

    /// Whether the first file opens and has the declared columns.
    pub(crate) fn validate(&self) -> Result<()> {
        let files = self.files.as_ref().map_err(Error::clone)?;
        let file = &files[0];
        let layout = self.layout(&[]);
        match self.format {
            FileFormat::Parquet => parquet::open(file, &layout, 0, 1).map(drop),
            format => records::RecordFile::open(file, &layout, format, 0).map(drop),
        }
    }

    fn layout(&self, projection: &[usize]) -> Layout {
        Layout {
            schema: Arc::clone(&self.schema),
            projection: projection.to_vec(),
            changelog: self.changelog.clone(),
        }
    }
}

impl FileFormat {
    fn framing(self) -> Framing {
        match self {
            Self::Csv(options) => Framing::Csv {
                delimiter: options.delimiter,
            },
            _ => Framing::Lines,
        }
    }
}

impl Source for FilesSource {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }
    fn open(&self, start: &Offsets, projection: &[usize]) -> Result<Vec<Box<dyn Reader>>> {
        let files = self.files.as_ref().map_err(Error::clone)?;
        let reader = reader::FilesReader::new(files, self.format, self.layout(projection), start)?;
        Ok(vec![Box::new(reader)])
    }
    fn bounded(&self) -> bool {
        true
    }
    fn append_only(&self) -> bool {
        self.changelog.is_none()
    }
    /// The order of files and of rows within them says nothing about time.
    fn watermark_while_running(&self) -> bool {
        false
    }
}
