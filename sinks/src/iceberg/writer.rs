//! One worker's files: written, rolled, closed and made durable.
//!
//! Encoding is CPU work and goes to the blocking threads. While it runs the state is with it; a call
//! that was dropped half-way therefore leaves a writer that refuses to go on instead of one that has
//! forgotten rows. So does an error, and the engine has the rows written again from its last checkpoint;
//! but for one that may pass and comes before any row was taken: that changes nothing. A full disk is
//! waited for in the middle of a write (see [`patient`]): the rows that are encoded already are nowhere
//! else.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::{Array, Float32Array, Float64Array, RecordBatch};
use arrow::datatypes::DataType;
use async_trait::async_trait;
use iceberg::spec::{FormatVersion, serialize_data_file_to_json};
use millrace_dataflow::blame;
use millrace_dataflow::delta::Diffs;
use millrace_dataflow::env::{self, failpoint};
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::sink::{Committable, Trouble, Writer};
use millrace_dataflow::time::Tick;
use millrace_lake::storage;
use parquet::arrow::{ArrowWriter, PARQUET_FIELD_ID_META_KEY};
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;

use super::layout::Layout;
use super::metrics;
use super::patient::{PatientFile, patient};

/// A row group is ended at this size: it is what a reader takes at once, and what is held in memory.
const ROW_GROUP_BYTES: usize = 32 << 20;

/// Writes the rows of one worker.
pub(super) struct IcebergWriter {
    /// `None` while it is away encoding, or after it failed.
    files: Option<Files>,
    trouble: Trouble,
}

impl IcebergWriter {
    pub(super) fn new(layout: Arc<Layout>, prefix: String, target_file_size: u64) -> Self {
        let trouble = Trouble::default();
        let files = Files {
            trouble: Trouble::clone(&trouble),
            layout,
            prefix,
            target_file_size,
            open: None,
            closed: vec![],
            spoiled: false,
        };
        Self {
            files: Some(files),
            trouble,
        }
    }

    /// Does file work away from the asynchronous threads. After an error that is not to be tried again,
    /// such as one that has cost rows, the writer is of no more use.
    async fn with_files<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Files) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let Some(mut files) = self.files.take() else {
            return Err(Error::internal("a writer was used after it had failed"));
        };
        let blame = blame::current();
        let (files, result) = tokio::task::spawn_blocking(move || {
            let _blame = blame::enter_as(blame);
            let result = work(&mut files);
            (files, result)
        })
        .await
        .map_err(|e| Error::internal(format!("a writer did not finish: {e}")))?;
        match result {
            Err(e) if files.spoiled && e.kind == ErrorKind::Unavailable => Err(Error {
                kind: ErrorKind::Internal,
                code: "58030",
                ..e
            }),
            // Rows that were refused are in no file: it must not be closed as if they were.
            Err(e) if e.kind != ErrorKind::Unavailable => Err(e),
            result => {
                self.files = Some(files);
                result
            }
        }
    }
}

#[async_trait]
impl Writer for IcebergWriter {
    fn trouble(&self) -> Trouble {
        Trouble::clone(&self.trouble)
    }

    async fn write(&mut self, tick: Tick, batch: &RecordBatch, diffs: &Diffs) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        let (batch, diffs) = (batch.clone(), diffs.clone());
        self.with_files(move |files| files.write(tick, &batch, &diffs))
            .await
    }

    async fn close(&mut self, lower: Tick, upper: Tick) -> Result<Vec<Committable>> {
        let closed = self.with_files(Files::close).await?;
        let committables = closed.into_iter().map(|file| Committable {
            lower,
            upper,
            rows: file.rows,
            bytes: file.bytes,
            payload: file.description.into_bytes(),
        });
        Ok(committables.collect())
    }
}

/// A file that is closed and durable.
struct ClosedFile {
    rows: u64,
    bytes: u64,
    /// The Iceberg `DataFile`, as JSON.
    description: String,
}

struct Files {
    trouble: Trouble,
    layout: Arc<Layout>,
    prefix: String,
    target_file_size: u64,
    open: Option<OpenFile>,
    closed: Vec<ClosedFile>,
    /// Rows are in a file in part, or were in one that is lost.
    spoiled: bool,
}

impl Files {
    fn write(&mut self, tick: Tick, batch: &RecordBatch, diffs: &Diffs) -> Result<()> {
        let batches = self.layout.arrange(tick, batch, diffs)?;
        if self.open.is_none() {
            self.open = Some(OpenFile::create(&self.layout, &self.prefix, &self.trouble)?);
        }
        // Up to here nothing was taken of the rows.
        self.spoiled = true;
        self.encode(&batches)?;
        self.spoiled = false;
        Ok(())
    }

    fn encode(&mut self, batches: &[RecordBatch]) -> Result<()> {
        for rows in batches {
            if self.open.is_none() {
                self.open = Some(OpenFile::create(&self.layout, &self.prefix, &self.trouble)?);
            }
            let Some(open) = &mut self.open else { continue };
            open.write(rows)?;
            if failpoint("sink.file.mid_write") {
                return Err(Error::unavailable("failpoint sink.file.mid_write"));
            }
            if open.size() >= self.target_file_size {
                self.roll()?;
            }
        }
        Ok(())
    }

    fn roll(&mut self) -> Result<()> {
        if let Some(open) = self.open.take() {
            self.closed.push(open.close(&self.layout)?);
            if failpoint("sink.file.after_close") {
                return Err(Error::unavailable("failpoint sink.file.after_close"));
            }
        }
        Ok(())
    }

    fn close(&mut self) -> Result<Vec<ClosedFile>> {
        self.spoiled = true;
        self.roll()?;
        self.spoiled = false;
        Ok(std::mem::take(&mut self.closed))
    }
}

struct OpenFile {
    /// `None` once closed.
    writer: Option<ArrowWriter<PatientFile>>,
    location: String,
    path: PathBuf,
    /// Per float column; readers need it to use bounds.
    nans: HashMap<i32, u64>,
}

impl OpenFile {
    fn create(layout: &Layout, prefix: &str, trouble: &Trouble) -> Result<Self> {
        let name = format!("{prefix}-{}.parquet", env::random_id());
        let location = format!("{}/{name}", layout.location);
        let path = storage::local_path(&location)?;
        if let Some(parent) = path.parent() {
            patient(trouble, || std::fs::create_dir_all(parent))?;
        }
        let file = patient(trouble, || File::create_new(&path))?;
        let file = PatientFile::new(file, Trouble::clone(trouble));
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::try_new(1).map_err(encoding)?))
            .build();
        let schema = Arc::clone(&layout.schema);
        let writer = ArrowWriter::try_new(file, schema, Some(properties)).map_err(encoding)?;
        Ok(Self {
            writer: Some(writer),
            location,
            path,
            nans: HashMap::new(),
        })
    }

    fn write(&mut self, rows: &RecordBatch) -> Result<()> {
        let Some(writer) = &mut self.writer else {
            return Err(Error::internal("a closed file was written to"));
        };
        writer.write(rows).map_err(encoding)?;
        if writer.in_progress_size() >= ROW_GROUP_BYTES {
            writer.flush().map_err(encoding)?;
        }
        for (field, column) in rows.schema_ref().fields().iter().zip(rows.columns()) {
            let id = field
                .metadata()
                .get(PARQUET_FIELD_ID_META_KEY)
                .and_then(|id| id.parse().ok());
            if let (Some(id), Some(nans)) = (id, count_nans(column)) {
                *self.nans.entry(id).or_insert(0) += nans;
            }
        }
        Ok(())
    }

    /// Bytes written and about to be written.
    fn size(&self) -> u64 {
        self.writer
            .as_ref()
            .map_or(0, |w| (w.bytes_written() + w.in_progress_size()) as u64)
    }

    fn close(mut self, layout: &Layout) -> Result<ClosedFile> {
        let Some(mut writer) = self.writer.take() else {
            return Err(Error::internal("a file was closed twice"));
        };
        let closed = writer.finish().map_err(encoding).and_then(|footer| {
            writer.inner().sync_all()?;
            if let Some(parent) = self.path.parent() {
                storage::sync_directory(parent)?;
            }
            let bytes = writer.inner().len()?;
            let nans = std::mem::take(&mut self.nans);
            let file = metrics::data_file(layout, self.location.clone(), bytes, &footer, nans)?;
            let rows = file.record_count();
            let description =
                serialize_data_file_to_json(file, &layout.partition_type, FormatVersion::V2)
                    .map_err(|e| Error::internal(format!("cannot describe a data file: {e}")))?;
            Ok(ClosedFile {
                rows,
                bytes,
                description,
            })
        });
        if closed.is_err() {
            self.writer = Some(writer);
        }
        closed
    }
}

impl Drop for OpenFile {
    /// A file that was never closed is in no checkpoint, so nobody can need it.
    fn drop(&mut self) {
        if self.writer.is_some() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn count_nans(column: &dyn Array) -> Option<u64> {
    let count = match column.data_type() {
        DataType::Float32 => {
            let values = column.as_any().downcast_ref::<Float32Array>()?;
            values.iter().flatten().filter(|v| v.is_nan()).count()
        }
        DataType::Float64 => {
            let values = column.as_any().downcast_ref::<Float64Array>()?;
            values.iter().flatten().filter(|v| v.is_nan()).count()
        }
        _ => return None,
    };
    Some(count as u64)
}

fn encoding(e: ParquetError) -> Error {
    let kind = match &e {
        // The disk, not the data.
        ParquetError::External(_) => ErrorKind::Unavailable,
        _ => ErrorKind::Internal,
    };
    Error::new(kind, "cannot write a data file").detail(e.to_string())
}
