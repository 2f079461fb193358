//! The start of a server: every statement of the catalog is planned again, then the engine restores.
//!
//! # Contract
//!
//! * Which definition of a view that was being replaced counts is settled first.
//! * Objects are planned so that each finds what it reads.
//! * One that cannot be planned any more, or whose plan is another one (state would not fit), is
//!   kept as FAILED with the reason, and so is what reads it; the others run.
//! * What cannot be planned because the outside does not answer, and has state in the checkpoint, ends the
//!   start: the parent tries again, and nothing is forgotten.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, RwLock};

use datafusion::execution::disk_manager::{DiskManagerBuilder, DiskManagerMode};
use datafusion::execution::memory_pool::FairSpillPool;
use datafusion::execution::runtime_env::{RuntimeEnv, RuntimeEnvBuilder};
use millrace_dataflow::checkpoint::store::CheckpointStore;
use millrace_dataflow::engine::start::Found;
use millrace_dataflow::engine::{Engine, EngineConfig, Waiting};
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::state::Pager;
use millrace_lake::SqlCatalog;
use millrace_sql::bind::bind;
use millrace_sql::guard::Policy;
use millrace_sql::purify::purify;
use tracing::{info, warn};

use super::facts::{Missing, Outside};
use super::world::{Detail, Entry, Made, World, in_order};
use super::{Coordinator, Inner, PROCESSES, WORKERS, WorkersSetting, alter, prepare};
use crate::catalog::{Object, SqliteCatalog};
use crate::cluster;
use crate::config::Config;
use crate::failures;

/// Plans everything again, restores and starts the engine.
pub(super) async fn start(
    mut config: Config,
    catalog: SqliteCatalog,
    waiting: Waiting,
) -> Result<Coordinator> {
    if let Some(text) = catalog.setting(WORKERS).await?
        && let Ok(setting) = serde_json::from_str::<WorkersSetting>(&text)
        && setting.flag == config.workers_flag
    {
        config.workers = setting.workers;
    }
    alter::restore_intervals(&mut config, &catalog).await?;
    let paused = alter::restore_paused(&catalog).await?;
    let data_dir = std::path::absolute(&config.data_dir)?;
    let pool = millrace_lake::catalog::sql::open_pool(&data_dir.join("metadata.db")).await?;
    let lake = SqlCatalog::open(pool, data_dir.join("warehouse")).await?;
    let outside = Outside { lake };
    let policy = Policy;
    failures::set_incarnation(catalog.incarnation());
    let engine_config = EngineConfig {
        workers: config.workers,
        dir: data_dir.join("engine"),
        checkpoints: checkpoints(&config)?,
        incarnation: catalog.incarnation(),
        checkpoint_interval: config.checkpoint_interval,
        commit_interval: config.commit_interval,
        max_rows_in_flight: config.max_rows_in_flight,
        waiting,
        pager: pager(&config, &data_dir)?,
        paused: paused.clone(),
        failed: failures::failing(&data_dir)?,
    };
    let found = Engine::find(&engine_config, &catalog).await?;
    settle_replacements(&catalog, &found).await?;
    let mut world = World::default();
    let mut items = Vec::new();
    let mut definitions = Vec::new();
    for object in in_order(catalog.objects().await?) {
        match again(&object, &world, &outside, &policy).await {
            Ok(made) => {
                // Worker processes plan what was planned here, in the same order.
                definitions.push(made.entry.object.definition());
                items.extend(made.items);
                world = world.with(made.entry, Some(made.picture));
            }
            // Without it the next checkpoint would hold nothing of it any more; the trouble may pass.
            Err(error) if error.kind == ErrorKind::Unavailable && holds(&found, &object) => {
                return Err(Error {
                    message: format!(
                        "cannot start with {} \"{}\": {}",
                        object.kind.as_str(),
                        object.name,
                        error.message
                    ),
                    ..error
                });
            }
            Err(error) => {
                let error = world.explain_missing(error);
                warn!(target: "millrace", name = object.name, kind = object.kind.as_str(), %error, "failed, the others run");
                let entry = Entry {
                    object,
                    failed: Some(error),
                    detail: Detail::Unknown,
                };
                world = world.with(entry, None);
            }
        }
    }
    if let Some(text) = catalog.setting(PROCESSES).await?
        && let Ok(setting) = serde_json::from_str::<WorkersSetting>(&text)
        && setting.flag == config.processes_flag
    {
        config.processes = setting.workers;
    }
    let count = world.entries.len();
    let peers = cluster::start(&config, &catalog, definitions).await?;
    let meta = Arc::new(catalog.clone());
    let engine = Engine::start_with(engine_config, meta, found, items, peers).await?;
    info!(target: "millrace", objects = count, incarnation = catalog.incarnation(), "restored");
    let query_env = query_env(&config, &data_dir)?;
    Ok(Coordinator(Arc::new(Inner {
        config,
        catalog,
        engine,
        outside,
        world: RwLock::new(Arc::new(world)),
        writer: Arc::default(),
        busy: Arc::default(),
        stopping: AtomicBool::new(false),
        policy,
        paused: std::sync::Mutex::new(paused),
        query_env,
        service: tokio::runtime::Handle::current(),
        restart: tokio::sync::Notify::new(),
    })))
}

/// Whether the checkpoint has state of an object, or of what it is published through.
fn holds(found: &Found, object: &Object) -> bool {
    let ids = [Some(object.dataflow), Some(object.id), object.companion];
    ids.into_iter().flatten().any(|id| found.holds(id))
}

/// Which definition of a view that was being replaced is the valid one: that whose state the checkpoint
/// holds. What was not complete is forgotten.
async fn settle_replacements(catalog: &SqliteCatalog, found: &Found) -> Result<()> {
    let objects = catalog.objects().await?;
    for new in catalog.replacements().await? {
        let old = objects.iter().find(|object| object.id == new.object);
        let name = old.map_or("", |object| &object.name);
        if old.is_some_and(|old| !found.holds(old.dataflow)) && found.holds(new.dataflow) {
            info!(target: "millrace", name, "the replacement was complete");
            catalog.adopt_replacement(&new).await?;
        } else {
            warn!(target: "millrace", name, "the replacement was not complete, the view is what it was");
            catalog.forget_replacement(new.object).await?;
        }
    }
    Ok(())
}

/// Plans the statement of a stored object as when it was created.
pub(super) async fn again(
    object: &Object,
    world: &World,
    outside: &Outside,
    policy: &Policy,
) -> Result<Made> {
    let script = millrace_sql::parse::parse(&object.text);
    let parsed = match (script.statements.into_iter().next(), script.error) {
        (_, Some(error)) => return Err(error),
        (Some(parsed), None) => parsed,
        (None, None) => {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("the catalog holds no statement for \"{}\"", object.name),
            ));
        }
    };
    let purified = purify(parsed, outside).await?;
    let lake = purified.lake.clone();
    let picture = world.picture_for(object, &lake);
    let draft = prepare::draft(bind(purified, &picture, &[])?, lake, policy)?;
    if draft.fingerprint != object.fingerprint {
        return Err(Error::unsupported(format!(
            "{} \"{}\" is planned differently now than when it was created",
            object.kind.as_str(),
            object.name
        ))
        .detail("its stored state does not fit the new plan")
        .hint("drop it and create it again"));
    }
    prepare::connect(draft, object.clone(), outside, Missing::Fail).await
}

/// Memory and scratch space of one-shot queries.
fn query_env(config: &Config, data_dir: &Path) -> Result<Arc<RuntimeEnv>> {
    let scratch = data_dir.join("scratch");
    // What queries left behind means nothing after a restart.
    match std::fs::remove_dir_all(&scratch) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
        _ => std::fs::create_dir_all(&scratch)?,
    }
    RuntimeEnvBuilder::new()
        .with_memory_pool(Arc::new(FairSpillPool::new(config.query_memory)))
        .with_disk_manager_builder(
            DiskManagerBuilder::default().with_mode(DiskManagerMode::Directories(vec![scratch])),
        )
        .build_arc()
        .map_err(crate::error::from_datafusion)
}

/// Where checkpoints are kept, if not in the data directory.
pub(crate) fn checkpoints(config: &Config) -> Result<Option<CheckpointStore>> {
    let url = config.checkpoints.as_deref();
    url.map(CheckpointStore::at).transpose().map_err(|e| Error {
        message: format!("option --checkpoints: {}", e.message),
        ..e
    })
}

/// Holds state to its share of the memory that the process may take.
pub(crate) fn pager(config: &Config, data_dir: &Path) -> Result<Option<Arc<Pager>>> {
    let Some(limit) = config.state_memory() else {
        return Ok(None);
    };
    let pager = Pager::new(&data_dir.join("swap"), limit)?;
    info!(target: "millrace", state_bytes = limit, "state larger than this goes to the swap file");
    Ok(Some(pager))
}
