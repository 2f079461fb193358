//! One writer of the catalog; every statement ends here, in a handler of its own file.
//!
//! # Contract
//!
//! * Statements that change something run one at a time, under the writer's lock, but for the time in
//!   which they read history ([`busy`]); reads take the current [`World`], an immutable picture, and
//!   wait for nobody.
//! * A change that has begun runs to its end even if the client that asked for it goes away, unless
//!   another statement calls off what it reads. A read ends with its client.
//! * Planning runs on the threads of queries: a panic there is an error of that statement. What
//!   talks to the engine runs on the service's own threads, where a panic ends the process.
//!
//! ```text
//! text ─parse─ purify ─┬─ query: bind guard resolve execute            (select.rs)
//!                      └─ change: lock ─ bind guard lower ─ row ─ engine ─ new World
//!                                        (prepare.rs)       (create.rs, drop.rs)
//! ```

mod alter;
mod backfill;
mod busy;
mod create;
mod drop;
mod explain;
mod facts;
pub mod planner;
mod prepare;
mod replace;
pub(crate) mod restore;
mod select;
pub mod show;
mod world;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use arrow::datatypes::SchemaRef;
use datafusion::common::ScalarValue;
use datafusion::execution::runtime_env::RuntimeEnv;
use millrace_dataflow::engine::shared::{EngineStats, Status};
use millrace_dataflow::engine::sinks::BrokenSink;
use millrace_dataflow::engine::subscribe::Subscription;
use millrace_dataflow::engine::{Engine, Waiting};
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::RelationId;
use millrace_dataflow::state::PagerStats;
use millrace_sql::bind::{Bound, bind};
use millrace_sql::guard::Policy;
use millrace_sql::parse::{Parsed, Statement};
use millrace_sql::purify::purify;
use tokio::runtime::Handle;

use crate::catalog::SqliteCatalog;
use crate::config::Config;
use crate::session::{Answer, Notice};

pub use world::{Detail, Entry, World};

/// How long a change may go on once the service stops.
const FINISH: Duration = Duration::from_secs(5);

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct Coordinator(Arc<Inner>);

struct Inner {
    config: Config,
    catalog: SqliteCatalog,
    engine: Engine,
    outside: facts::Outside,
    world: RwLock<Arc<World>>,
    writer: Arc<tokio::sync::Mutex<()>>,
    /// What is changed without that lock.
    busy: Arc<busy::Busy>,
    /// The service ends: what is half-way is left to the next start.
    stopping: AtomicBool,
    policy: Policy,
    /// Sinks that are paused.
    paused: std::sync::Mutex<BTreeSet<RelationId>>,
    /// Memory and scratch files of all queries together.
    query_env: Arc<RuntimeEnv>,
    /// Threads of the service itself; see the module.
    service: Handle,
    restart: tokio::sync::Notify,
}

/// Held by the statement that changes the catalog.
type WriterLock = tokio::sync::OwnedMutexGuard<()>;

/// Where the number of workers is kept.
const WORKERS: &str = "workers";
/// Where the number of processes is kept.
const PROCESSES: &str = "processes";

/// What `ALTER DATA PLANE … SET WORKERS` leaves behind, and `… SET PROCESSES`.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct WorkersSetting {
    /// How many, of either.
    workers: usize,
    /// What the flag said then: a later start that says something else means it.
    flag: Option<usize>,
}

impl std::fmt::Debug for Coordinator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coordinator")
            .field("config", &self.0.config)
            .finish_non_exhaustive()
    }
}

impl Coordinator {
    /// Restores everything the catalog holds and starts it; `waiting` says what holds that up.
    pub async fn start(config: Config, catalog: SqliteCatalog, waiting: Waiting) -> Result<Self> {
        restore::start(config, catalog, waiting).await
    }

    /// Runs one statement.
    pub async fn execute(&self, parsed: Parsed, params: &[ScalarValue]) -> Result<Answer> {
        let creates = create::name_of(&parsed.statement);
        if let Some(answer) = create::exists_already(&self.world(), creates.as_ref())? {
            return Ok(answer);
        }
        let changes = creates.is_some()
            || matches!(
                parsed.statement,
                Statement::Drop(_) | Statement::Alter(_) | Statement::SetSystem(_)
            );
        let gone = match &parsed.statement {
            Statement::Drop(drop) => self.cancel_for_drop(&self.world(), drop).await,
            _ => Vec::new(),
        };
        let purified = purify(parsed, &self.0.outside).await?;
        // Held from binding to the end of the change, so that what was bound still is.
        let lock = match changes {
            true => Some(self.lock().await),
            false => None,
        };
        let world = self.world();
        if let Some(answer) = create::exists_already(&world, creates.as_ref())? {
            return Ok(answer);
        }
        let lake = purified.lake.clone();
        let picture = world.picture_with(&lake);
        let bound = bind(purified, &picture, params).map_err(|e| world.explain_missing(e))?;
        match bound {
            Bound::Query(query) => self.select(&world, query).await,
            Bound::Show(what) => self.show(&world, what).await,
            Bound::ShowCreate { kind, name } => show::show_create(&world, kind, &name),
            Bound::Describe(def) => show::describe(def),
            Bound::Explain(def) => explain::explain(def, &self.0.policy),
            Bound::CancelBackfill(name) => self.cancel_backfill(&name).await,
            Bound::SetWorkers(workers) => {
                let config = &self.0.config;
                self.set_width(WORKERS, workers, config.workers, config.workers_flag)
                    .await
            }
            Bound::SetProcesses(processes) => {
                let config = &self.0.config;
                self.set_width(
                    PROCESSES,
                    processes,
                    config.processes,
                    config.processes_flag,
                )
                .await
            }
            Bound::Subscribe(_) => Err(Error::unsupported(
                "SUBSCRIBE answers without end, so it cannot stand among other statements",
            )
            .hint("send it as the only statement of a request")),
            change => {
                let lock =
                    lock.ok_or_else(|| Error::internal("a change without the writer's lock"))?;
                self.change(change, lake, &world, gone, lock).await
            }
        }
    }

    async fn change(
        &self,
        bound: Bound,
        lake: prepare::LakeSchemas,
        world: &Arc<World>,
        gone: Vec<String>,
        lock: WriterLock,
    ) -> Result<Answer> {
        let me = self.clone();
        let world = Arc::clone(world);
        let work = match bound {
            Bound::Alter(statement) => self
                .0
                .service
                .spawn(async move { (lock, me.alter(&world, statement).await).1 }),
            Bound::SetSystem(options) => self
                .0
                .service
                .spawn(async move { (lock, me.set_system(&options).await).1 }),
            Bound::Drop(statement) => self
                .0
                .service
                .spawn(async move { (lock, me.drop_objects(&world, statement, &gone).await).1 }),
            bound => {
                let draft = prepare::draft(bound, lake, &self.0.policy)?;
                // Only a statement that may replace comes here with a name that is taken.
                let exists = world.entries.contains_key(&draft.name);
                self.0.service.spawn(async move {
                    match exists {
                        true => me.replace(lock, &world, draft).await,
                        false => me.create(lock, draft).await,
                    }
                })
            }
        };
        work.await
            .map_err(|e| Error::internal(format!("the statement did not finish: {e}")))?
    }

    /// Keeps the number of workers or processes and asks for a restart with it: all state is by key
    /// group, so any number of workers takes it over, and nothing is computed again.
    async fn set_width(
        &self,
        what: &str,
        wanted: usize,
        now: usize,
        flag: Option<usize>,
    ) -> Result<Answer> {
        if wanted == now {
            return Ok(Answer::done().notice(Notice::remark(format!(
                "the data plane has {wanted} {what} already"
            ))));
        }
        let setting = WorkersSetting {
            workers: wanted,
            flag,
        };
        let text = serde_json::to_string(&setting).map_err(|e| Error::internal(e.to_string()))?;
        self.0.catalog.set_setting(what, &text).await?;
        self.0.restart.notify_one();
        Ok(Answer::done().notice(Notice::remark(
            "the service restarts with its state; requests wait for it",
        )))
    }

    /// Returns when a statement has asked for a restart.
    pub async fn restart_asked(&self) {
        self.0.restart.notified().await;
    }

    /// Returns when a sink cannot go on in this run of the service.
    pub async fn broken(&self) -> BrokenSink {
        self.0.engine.broken().await
    }

    /// Begins to follow the relation of a SUBSCRIBE.
    pub async fn subscribe(&self, parsed: Parsed) -> Result<(SchemaRef, Subscription)> {
        let purified = purify(parsed, &self.0.outside).await?;
        let world = self.world();
        let picture = world.picture_with(&purified.lake);
        match bind(purified, &picture, &[]).map_err(|e| world.explain_missing(e))? {
            Bound::Subscribe(def) => {
                let subscription = self
                    .0
                    .engine
                    .subscribe(def.relation, Arc::clone(&def.schema))
                    .await?;
                Ok((def.schema, subscription))
            }
            _ => Err(Error::internal("not a SUBSCRIBE")),
        }
    }

    async fn lock(&self) -> WriterLock {
        Arc::clone(&self.0.writer).lock_owned().await
    }

    /// What exists now.
    pub fn world(&self) -> Arc<World> {
        Arc::clone(
            &self
                .0
                .world
                .read()
                .expect("no panic while the world is exchanged"),
        )
    }

    fn publish(&self, world: World) {
        *self
            .0
            .world
            .write()
            .expect("no panic while the world is exchanged") = Arc::new(world);
    }

    /// What runs, as the engine sees it.
    pub fn status(&self) -> Vec<Status> {
        self.0.engine.status()
    }

    /// What the memory budget of state has done; `None` without one.
    pub fn pager_stats(&self) -> Option<PagerStats> {
        self.0.engine.pager_stats()
    }

    /// State of every operator.
    pub fn state(&self) -> Vec<millrace_dataflow::engine::shared::StateRow> {
        self.0.engine.state()
    }

    /// What keeps the engine from making progress, if anything does.
    pub fn trouble(&self) -> Option<Error> {
        self.0.engine.trouble()
    }

    /// Memory of the worker processes, from the first on, as they said last.
    pub fn resident_bytes(&self) -> Vec<u64> {
        self.0.engine.resident_bytes()
    }

    /// Counters of the engine as a whole.
    pub fn stats(&self) -> EngineStats {
        self.0.engine.stats()
    }

    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// Whether this server still is the newest on its data directory.
    pub async fn is_newest(&self) -> Result<bool> {
        self.0.catalog.is_newest().await
    }

    /// Final checkpoint; sinks commit what they can.
    pub async fn stop(&self) -> Result<()> {
        // A change that is half-way (a view reading history) is finished by the next start.
        self.0.stopping.store(true, Ordering::SeqCst);
        let _lock = tokio::time::timeout(FINISH, self.0.writer.lock()).await;
        let stopped = self.0.engine.stop().await;
        self.0.catalog.close().await;
        stopped
    }
}
