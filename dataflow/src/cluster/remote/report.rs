//! Tells the server, in batches, how far the workers here are and what passed through them; and that
//! this process lives.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::super::wire::{FlowReport, Report, SinkReport, Up};
use super::Outbox;
use crate::engine::sinks::SinkStatus;
use crate::error::Result;
use crate::ingest::{Signal, lock};
use crate::plan::RelationId;
use crate::time::Tick;
use crate::worker::command::{Progress, StateSize};

/// What happens within this time goes in one report.
const BATCH: Duration = Duration::from_millis(1);

/// What the reporting thread looks at.
pub(super) struct Watched {
    /// Numbers of the workers here among all.
    pub own: Range<usize>,
    /// Raised when there may be something to say.
    pub signal: Arc<Signal>,
    pub queued_bytes: Arc<AtomicU64>,
    pub resident_bytes: fn() -> u64,
    pub outbox: Outbox,
    pub beat: Duration,
}

struct Flow {
    progress: Arc<Progress>,
    sink: Option<Arc<SinkStatus>>,
    said: Said,
}

/// What the server knows.
struct Said {
    /// By worker here, by port.
    next: Vec<[Tick; Progress::PORTS]>,
    counters: [u64; 7],
    last_rows: Tick,
    /// Rows and bytes by worker and stage.
    state: BTreeMap<(usize, u32), StateSize>,
    sink: SinkReport,
}

type Flows = Arc<Mutex<BTreeMap<RelationId, Flow>>>;

/// The reporting thread.
pub(super) struct Reports {
    flows: Flows,
    own: Range<usize>,
    ended: Arc<AtomicBool>,
    signal: Arc<Signal>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Reports {
    pub(super) fn start(watched: Watched) -> Result<Self> {
        let flows = Flows::default();
        let ended = Arc::new(AtomicBool::new(false));
        let (own, signal) = (watched.own.clone(), Arc::clone(&watched.signal));
        let (looked_at, over) = (Arc::clone(&flows), Arc::clone(&ended));
        let thread = std::thread::Builder::new()
            .name("reports".into())
            .spawn(move || watched.run(&looked_at, &over))?;
        Ok(Self {
            flows,
            own,
            ended,
            signal,
            thread: Some(thread),
        })
    }

    /// Reports on a dataflow that is about to be installed.
    pub(super) fn watch(
        &self,
        id: RelationId,
        progress: Arc<Progress>,
        sink: Option<Arc<SinkStatus>>,
    ) {
        let said = Said {
            next: self.own.clone().map(|w| progress.ports(w)).collect(),
            counters: [0; 7],
            last_rows: 0,
            state: BTreeMap::new(),
            sink: SinkReport::default(),
        };
        let flow = Flow {
            progress,
            sink,
            said,
        };
        lock(&self.flows).insert(id, flow);
    }

    pub(super) fn forget(&self, ids: &[RelationId]) {
        lock(&self.flows).retain(|id, _| !ids.contains(id));
    }

    /// A last report, then none.
    pub(super) fn end(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        self.signal.raise();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Watched {
    fn run(&self, flows: &Flows, ended: &AtomicBool) {
        let mut queued = 0;
        let mut spoke = Instant::now();
        let mut resident = 0;
        loop {
            self.signal.wait(Some(self.beat));
            let over = ended.load(Ordering::SeqCst);
            let waiting = self.queued_bytes.load(Ordering::Relaxed);
            let silent = spoke.elapsed() >= self.beat;
            if silent {
                resident = (self.resident_bytes)();
            }
            let report = Report {
                flows: lock(flows)
                    .iter_mut()
                    .filter_map(|(id, flow)| flow.report(*id, &self.own))
                    .collect(),
                queued_bytes: waiting.wrapping_sub(queued) as i64,
                resident_bytes: resident,
            };
            queued = waiting;
            if !report.flows.is_empty() || report.queued_bytes != 0 || silent {
                self.outbox.send(Up::Report(Box::new(report)));
                spoke = Instant::now();
            }
            if over {
                return;
            }
            // Nothing waits for this but the next report.
            std::thread::sleep(BATCH);
        }
    }
}

impl Flow {
    /// What is new; `None` when nothing is.
    fn report(&mut self, id: RelationId, own: &Range<usize>) -> Option<FlowReport> {
        let said = &mut self.said;
        // First: what passed through before a tick was applied is then in the counters.
        let mut progress = Vec::new();
        for (worker, known) in said.next.iter_mut().enumerate() {
            let now = self.progress.ports(own.start + worker);
            for (port, (now, known)) in now.into_iter().zip(known.iter_mut()).enumerate() {
                if now != *known {
                    *known = now;
                    progress.push((worker, port, now));
                }
            }
        }
        let counters = &self.progress.counters;
        let mut new = [0; 7];
        for ((now, known), new) in counters
            .sums()
            .into_iter()
            .zip(&mut said.counters)
            .zip(&mut new)
        {
            let now = now.load(Ordering::Relaxed);
            *new = now - std::mem::replace(known, now);
        }
        let last_rows = counters.last_rows.load(Ordering::Relaxed);
        let mut state = Vec::new();
        for ((worker, stage), (operator, size)) in lock(&counters.state).iter() {
            if said.state.insert((*worker, *stage), *size) != Some(*size) {
                let worker = worker - own.start;
                state.push((worker, *stage, (*operator).to_string(), *size));
            }
        }
        let sink = self.sink.as_ref().and_then(|status| said.sink(status));
        let quiet = progress.is_empty()
            && new == [0; 7]
            && last_rows == said.last_rows
            && state.is_empty()
            && sink.is_none();
        said.last_rows = last_rows;
        (!quiet).then_some(FlowReport {
            id,
            progress,
            counters: new,
            last_rows,
            state,
            sink,
        })
    }
}

impl Said {
    /// What is new of the writers of a sink: counts as differences, the rest as it is.
    fn sink(&mut self, status: &SinkStatus) -> Option<SinkReport> {
        let now = SinkReport {
            rows: status.rows.load(Ordering::Relaxed),
            bytes: status.bytes.load(Ordering::Relaxed),
            fresh: status.fresh.swap(false, Ordering::Relaxed),
            trouble: lock(&status.trouble).clone(),
            failed: status.failed.load(Ordering::Relaxed),
        };
        if !now.fresh
            && (SinkReport {
                fresh: false,
                ..self.sink.clone()
            }) == now
        {
            return None;
        }
        let before = std::mem::replace(&mut self.sink, now.clone());
        Some(SinkReport {
            rows: now.rows - before.rows,
            bytes: now.bytes - before.bytes,
            ..now
        })
    }
}
