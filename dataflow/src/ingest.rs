//! Reading a source ahead of the minter: one thread per reader, decoded and prepared batches in a
//! bounded queue.
//!
//! # Contract
//!
//! * Preparing a chunk (computed columns, watermark) is a function of its records, so a replayed
//!   offset range gives the same rows.
//! * A reader blocks while the queue is full: the engine bounds what is in flight, not the source.
//! * `Unavailable` is retried with back-off and never loses records; any other error stops this
//!   source alone, and is shown in its status.

mod watermark;

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arrow::array::{AsArray, RecordBatch, RecordBatchOptions};
use arrow::datatypes::SchemaRef;
use datafusion::physical_expr::expressions::Column;
use datafusion::physical_expr::utils::{collect_columns, reassign_expr_columns};

use crate::delta::{Delta, Diffs};
use crate::env;
use crate::error::{Error, ErrorKind, Result};
use crate::kernel::map::{MapKernel, MapOutput};
use crate::kernel::nullable;
use crate::plan::{MapStep, SourcePlan};
use crate::source::{Chunk, Offsets, Polled, Reader, Rejected, Source};
use crate::time::{NO_WATERMARK, Watermark};
use watermark::BatchWatermark;

/// Rows and bytes that wait per source before its readers block.
pub const QUEUE_ROWS: usize = 512 * 1024;
pub const QUEUE_BYTES: usize = 64 << 20;
/// Threads whose names begin so survive a panic.
pub const READER_THREAD: &str = "read-";
/// How long a reader may block in one poll.
const POLL_WAIT: Duration = Duration::from_millis(500);

/// A chunk, ready to be bound to a tick.
#[derive(Debug)]
pub struct Prepared {
    pub split: Arc<str>,
    pub begin: u64,
    pub end: u64,
    pub delta: Option<Delta>,
    pub rejected: Vec<Rejected>,
    /// Maximum of the watermark expression over the rows.
    pub watermark: Watermark,
    pub bytes: u64,
    pub digest: Option<u64>,
    pub remaining: Option<u64>,
}

impl Prepared {
    pub fn rows(&self) -> usize {
        self.delta.as_ref().map_or(0, Delta::len)
    }
}

/// Turns decoded chunks into rows of the relation: the columns `used`, in that order.
pub struct Preparer {
    /// Physical columns to read.
    pub projection: Vec<usize>,
    /// Columns of the relation that come out.
    pub used: Vec<usize>,
    schema: SchemaRef,
    /// `Some(i)` for each column that is the `i`-th projected physical column as it is.
    plain: Option<Vec<usize>>,
    computed: Option<MapKernel>,
    watermark: Option<BatchWatermark>,
}

impl std::fmt::Debug for Preparer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Preparer({:?} from {:?})", self.used, self.projection)
    }
}

fn expr_error(e: datafusion::error::DataFusionError) -> Error {
    Error::internal(format!("cannot prepare the columns of a source: {e}"))
}

impl Preparer {
    /// For the columns `wanted` of the relation, to which those of the watermark are added and those
    /// that decide whether a record is accepted.
    pub fn new(source: &dyn Source, plan: &SourcePlan, wanted: &[usize]) -> Result<Self> {
        let mut used: Vec<usize> = wanted.to_vec();
        used.extend(&plan.deciding);
        if let Some(watermark) = &plan.watermark {
            used.push(watermark.column);
            used.extend(collect_columns(&watermark.expr).iter().map(Column::index));
        }
        used.sort_unstable();
        used.dedup();
        let physical = source.schema();
        let mut projection: Vec<usize> = used
            .iter()
            .flat_map(|c| collect_columns(&plan.columns[*c]))
            .map(|c| c.index())
            .collect();
        projection.sort_unstable();
        projection.dedup();
        let read = Arc::new(
            physical
                .project(&projection)
                .map_err(|e| Error::internal(e.to_string()))?,
        );
        let schema = nullable(
            &plan
                .schema
                .project(&used)
                .map_err(|e| Error::internal(e.to_string()))?,
        );
        let mut exprs = Vec::with_capacity(used.len());
        for column in &used {
            let expr = reassign_expr_columns(Arc::clone(&plan.columns[*column]), &read)
                .map_err(expr_error)?;
            exprs.push(expr);
        }
        let plain: Option<Vec<usize>> = exprs
            .iter()
            .zip(schema.fields())
            .map(|(expr, field)| {
                let column = expr.as_any().downcast_ref::<Column>()?;
                (read.field(column.index()).data_type() == field.data_type())
                    .then(|| column.index())
            })
            .collect();
        let computed = match &plain {
            Some(_) => None,
            None => Some(MapKernel::new(
                &read,
                &[MapStep::Project(exprs, Arc::clone(&schema))],
            )),
        };
        let watermark = match &plan.watermark {
            Some(w) => {
                let expr =
                    reassign_expr_columns(Arc::clone(&w.expr), &schema).map_err(expr_error)?;
                Some(BatchWatermark::new(expr, w.max_ahead_us))
            }
            None => None,
        };
        Ok(Self {
            projection,
            used,
            schema,
            plain,
            computed,
            watermark,
        })
    }

    /// Columns that come out of [`Preparer::prepare`].
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    pub fn prepare(&mut self, chunk: Chunk) -> Prepared {
        let Chunk {
            split,
            begin,
            end,
            batch,
            diffs,
            mut rejected,
            bytes,
            digest,
            remaining,
        } = chunk;
        let diffs = diffs.map_or(Diffs::Ones, Diffs::from_vec);
        let rows = Delta::new(batch, diffs);
        let delta = match (&self.plain, &self.computed) {
            (Some(indices), _) => {
                let columns = indices
                    .iter()
                    .map(|i| Arc::clone(rows.batch.column(*i)))
                    .collect();
                let options = RecordBatchOptions::new().with_row_count(Some(rows.len()));
                let batch =
                    RecordBatch::try_new_with_options(Arc::clone(&self.schema), columns, &options)
                        .expect("a reader yields the projected columns");
                (!rows.is_empty()).then_some(Delta {
                    batch,
                    diffs: rows.diffs,
                })
            }
            (None, Some(kernel)) if !rows.is_empty() => {
                let MapOutput { delta, errors } = kernel.apply(rows);
                if let Some(errors) = errors {
                    let reasons = errors.batch.column(1).as_string::<i32>();
                    for row in 0..errors.len() {
                        rejected.push(Rejected {
                            split: split.to_string(),
                            offset: end,
                            bytes: Vec::new(),
                            reason: format!("a computed column failed: {}", reasons.value(row)),
                        });
                    }
                }
                delta
            }
            _ => None,
        };
        let watermark = delta
            .as_ref()
            .zip(self.watermark.as_ref())
            .map_or(NO_WATERMARK, |(d, watermark)| watermark.of(&d.batch));
        Prepared {
            split,
            begin,
            end,
            delta,
            rejected,
            watermark,
            bytes,
            digest,
            remaining,
        }
    }
}

/// Wakes the minter: data arrived, a request came, a tick was completed.
#[derive(Debug, Default)]
pub struct Signal {
    raised: Mutex<bool>,
    condition: Condvar,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic aborts the process, so a poisoned lock cannot be seen; going on is right in tests.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Signal {
    pub fn raise(&self) {
        let mut raised = lock(&self.raised);
        if !*raised {
            *raised = true;
            self.condition.notify_one();
        }
    }
    /// Waits until raised or until the time is over; lowers it.
    pub fn wait(&self, timeout: Option<Duration>) {
        let mut raised = lock(&self.raised);
        if !*raised {
            raised = match timeout {
                Some(timeout) => {
                    self.condition
                        .wait_timeout(raised, timeout)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
                None => self
                    .condition
                    .wait(raised)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
        *raised = false;
    }
}

#[derive(Debug, Default)]
struct Pending {
    chunks: VecDeque<Prepared>,
    rows: usize,
    bytes: usize,
    running: usize,
    /// By reader: one that is well must not hide what ails another.
    trouble: BTreeMap<usize, String>,
    failed: Option<Error>,
}

/// Reader threads of one source and what they have read ahead.
#[derive(Debug)]
pub struct Ingest {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    pending: Mutex<Pending>,
    room: Condvar,
    stop: AtomicBool,
    signal: Arc<Signal>,
}

impl Ingest {
    /// Starts a thread per reader. `make_preparer` is called once per thread.
    pub fn start(
        name: &str,
        readers: Vec<Box<dyn Reader>>,
        mut make_preparer: impl FnMut() -> Result<Preparer>,
        signal: Arc<Signal>,
    ) -> Result<Self> {
        let shared = Arc::new(Shared {
            pending: Mutex::new(Pending {
                running: readers.len(),
                ..Pending::default()
            }),
            room: Condvar::new(),
            stop: AtomicBool::new(false),
            signal,
        });
        for (index, reader) in readers.into_iter().enumerate() {
            let preparer = make_preparer()?;
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("{READER_THREAD}{name}-{index}"))
                .spawn(move || {
                    let work = || shared.run(index, reader, preparer);
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
                        shared.fail(panic.as_ref());
                    }
                })
                .map_err(|e| Error::unavailable(e.to_string()))?;
        }
        Ok(Self { shared })
    }

    pub fn has_data(&self) -> bool {
        !lock(&self.shared.pending).chunks.is_empty()
    }

    /// Takes chunks until `max_rows` is reached (at least one chunk if there is any).
    pub fn take(&self, max_rows: usize) -> Vec<Prepared> {
        let mut pending = lock(&self.shared.pending);
        let mut taken = Vec::new();
        let mut rows = 0;
        while rows < max_rows
            && let Some(chunk) = pending.chunks.pop_front()
        {
            rows += chunk.rows();
            pending.rows -= chunk.rows();
            pending.bytes -= chunk.bytes as usize;
            taken.push(chunk);
        }
        drop(pending);
        self.shared.room.notify_all();
        taken
    }

    /// All readers have ended and everything was taken.
    pub fn ended(&self) -> bool {
        let pending = lock(&self.shared.pending);
        pending.running == 0 && pending.chunks.is_empty() && pending.failed.is_none()
    }

    /// Temporary trouble (being retried), or the error that stopped the source.
    pub fn trouble(&self) -> (Option<String>, Option<Error>) {
        let pending = lock(&self.shared.pending);
        (
            pending.trouble.values().next().cloned(),
            pending.failed.clone(),
        )
    }

    /// Records read ahead and not yet bound.
    pub fn waiting_rows(&self) -> usize {
        lock(&self.shared.pending).rows
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.room.notify_all();
    }
}

impl Shared {
    fn run(&self, index: usize, mut reader: Box<dyn Reader>, mut preparer: Preparer) {
        let mut pause = Duration::from_millis(100);
        while !self.stop.load(Ordering::Relaxed) {
            env::failpoint("source.poll.after");
            match reader.poll(None, POLL_WAIT) {
                Ok(Polled::Chunk(chunk)) => {
                    pause = Duration::from_millis(100);
                    let prepared = preparer.prepare(chunk);
                    self.push(index, prepared);
                }
                Ok(Polled::Idle | Polled::AtLimit) => {
                    pause = Duration::from_millis(100);
                    if lock(&self.pending).trouble.remove(&index).is_some() {
                        self.signal.raise();
                    }
                }
                Ok(Polled::End) => break,
                Err(e) if e.kind == ErrorKind::Unavailable => {
                    lock(&self.pending).trouble.insert(index, e.message.clone());
                    self.signal.raise();
                    self.nap(pause);
                    pause = (pause * 2).min(Duration::from_secs(5));
                }
                Err(e) => {
                    tracing::error!(error = %e, "a source stopped");
                    lock(&self.pending).failed = Some(e);
                    break;
                }
            }
        }
        lock(&self.pending).running -= 1;
        self.signal.raise();
    }

    /// A reader that panics stops its source alone: nothing of what it was about to give is bound.
    fn fail(&self, panic: &(dyn std::any::Any + Send)) {
        let text = panic.downcast_ref::<&str>().map(ToString::to_string);
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        let mut pending = lock(&self.pending);
        let error = Error::internal("a reader failed").detail(text.unwrap_or_default());
        pending.failed.get_or_insert(error);
        pending.running -= 1;
        drop(pending);
        self.signal.raise();
    }

    fn push(&self, index: usize, prepared: Prepared) {
        let mut pending = lock(&self.pending);
        while (pending.rows >= QUEUE_ROWS || pending.bytes >= QUEUE_BYTES)
            && !self.stop.load(Ordering::Relaxed)
        {
            pending = self
                .room
                .wait(pending)
                .unwrap_or_else(PoisonError::into_inner);
        }
        pending.trouble.remove(&index);
        pending.rows += prepared.rows();
        pending.bytes += prepared.bytes as usize;
        pending.chunks.push_back(prepared);
        drop(pending);
        self.signal.raise();
    }

    /// Sleeps, but wakes when the source is dropped.
    fn nap(&self, pause: Duration) {
        let pending = lock(&self.pending);
        if !self.stop.load(Ordering::Relaxed) {
            drop(self.room.wait_timeout(pending, pause));
        }
    }
}

/// Reads exactly the records below `limit` (splits absent from it yield nothing), for history and
/// replay. Blocks; retries while the source is unavailable, until `give_up` says otherwise; `trouble` is
/// told when that begins and when it is over.
pub fn read_to_limit(
    readers: &mut [Box<dyn Reader>],
    preparer: &mut Preparer,
    limit: &Offsets,
    give_up: &dyn Fn() -> bool,
    trouble: &mut dyn FnMut(Option<&Error>),
    mut each: impl FnMut(Prepared),
) -> Result<()> {
    for reader in readers {
        let mut pause = Duration::from_millis(100);
        let mut troubled = false;
        loop {
            if give_up() {
                return Err(Error::unavailable("reading was given up"));
            }
            let polled = reader.poll(Some(limit), POLL_WAIT);
            if troubled && polled.is_ok() {
                troubled = false;
                trouble(None);
            }
            match polled {
                Ok(Polled::Chunk(chunk)) => each(preparer.prepare(chunk)),
                Ok(Polled::Idle) => {}
                Ok(Polled::AtLimit | Polled::End) => break,
                Err(e) if e.kind == ErrorKind::Unavailable => {
                    tracing::warn!(error = %e, "a source is unavailable, trying again");
                    troubled = true;
                    trouble(Some(&e));
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_secs(5));
                }
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
}
