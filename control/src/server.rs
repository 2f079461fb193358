//! The running service: threads of queries, the doors, the coordinator behind them.
//!
//! # Contract
//!
//! * The doors open before anything is restored: `/healthz` answers, `/readyz` and the API say 503
//!   until the coordinator is there.
//! * Stopping first stops accepting, gives running requests a moment, then takes the final
//!   checkpoint.

pub mod http;

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use millrace_dataflow::engine::Waiting;
use millrace_dataflow::error::{Error, Result};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::warn;

use crate::catalog::SqliteCatalog;
use crate::config::Config;
use crate::coordinator::Coordinator;
use crate::query::AbortOnDrop;
use crate::session::Session;

/// Threads with this name run statements; a panic there is caught, anywhere else it is the end.
pub const QUERY_THREADS: &str = "millrace-query";
/// As many threads run queries at least: one that computes without a pause blocks a thread of them.
const MIN_QUERY_THREADS: usize = 8;
/// Plans nest; sixteen megabytes are used only where touched.
const QUERY_STACK: usize = 16 << 20;
/// How long running requests may take once the service stops.
const DRAIN: Duration = Duration::from_secs(5);
/// How long a statement waits for the service to be restored.
const PATIENCE: Duration = Duration::from_secs(10);

/// What all doors share.
#[derive(Debug)]
pub struct Service {
    pub config: Config,
    pub started: Instant,
    coordinator: watch::Sender<Option<Coordinator>>,
    /// What holds up the start, if something outside does.
    waiting: Waiting,
    stopped: watch::Receiver<bool>,
    queries: tokio::runtime::Handle,
}

impl Service {
    /// The coordinator, once everything is restored.
    pub fn coordinator(&self) -> Result<Coordinator> {
        self.coordinator.borrow().clone().ok_or_else(|| {
            let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            crate::error::starting(waiting.as_ref())
        })
    }

    /// The coordinator; a request that comes during a restart waits a moment for it.
    pub async fn restored(&self) -> Result<Coordinator> {
        let mut coordinator = self.coordinator.subscribe();
        let _ = tokio::time::timeout(PATIENCE, coordinator.wait_for(Option::is_some)).await;
        self.coordinator()
    }

    /// Becomes true when the server stops.
    pub fn stopped(&self) -> watch::Receiver<bool> {
        self.stopped.clone()
    }

    /// A session for one request.
    pub async fn session(&self) -> Result<Session> {
        Ok(Session::new(self.restored().await?))
    }

    /// Runs work on the threads of queries; dropping the future ends it.
    pub async fn on_query_threads<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T> {
        let mut task = AbortOnDrop(self.queries.spawn(work));
        (&mut task.0).await.map_err(|e| {
            warn!(target: "millrace", error = %e, "a statement ended in a panic");
            Error::internal("the statement ran into a bug").hint("please report the statement")
        })
    }
}

/// A server in this process.
#[derive(Debug)]
pub struct Server {
    service: Arc<Service>,
    address: SocketAddr,
    stopping: watch::Sender<bool>,
    http: JoinHandle<std::io::Result<()>>,
    query_threads: Option<Runtime>,
}

impl Server {
    /// Opens the doors and restores; returns when the service is ready.
    pub async fn start(config: Config, listener: TcpListener) -> Result<Self> {
        let server = Self::open(config, listener)?;
        match server.restore().await {
            Ok(()) => Ok(server),
            Err(error) => {
                server.close().await;
                Err(error)
            }
        }
    }

    /// Opens the doors only.
    pub fn open(config: Config, listener: TcpListener) -> Result<Self> {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let query_threads = tokio::runtime::Builder::new_multi_thread()
            // One query keeps `workers` of them busy.
            .worker_threads((2 * config.workers).max(MIN_QUERY_THREADS))
            .thread_name(QUERY_THREADS)
            .thread_stack_size(QUERY_STACK)
            .enable_all()
            .build()?;
        let (stopping, stopped) = watch::channel(false);
        let service = Arc::new(Service {
            config,
            started: Instant::now(),
            coordinator: watch::Sender::new(None),
            waiting: Waiting::default(),
            stopped: stopped.clone(),
            queries: query_threads.handle().clone(),
        });
        let http = tokio::spawn(http::serve(listener, Arc::clone(&service), stopped));
        Ok(Self {
            service,
            address,
            stopping,
            http,
            query_threads: Some(query_threads),
        })
    }

    /// Restores everything; the API answers from then on.
    pub async fn restore(&self) -> Result<()> {
        let config = self.service.config.clone();
        std::fs::create_dir_all(&config.data_dir).map_err(|e| {
            Error::invalid(format!(
                "cannot create the data directory \"{}\": {e}",
                config.data_dir.display()
            ))
            .hint("choose another one with --data-dir")
        })?;
        let holder = format!("pid {} at {}", std::process::id(), self.address);
        let catalog = SqliteCatalog::open(&config.data_dir, &holder).await?;
        let coordinator =
            Coordinator::start(config, catalog, Waiting::clone(&self.service.waiting)).await?;
        self.service.coordinator.send_replace(Some(coordinator));
        Ok(())
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn service(&self) -> &Arc<Service> {
        &self.service
    }

    /// Stops gracefully.
    pub async fn stop(mut self) -> Result<()> {
        self.stopping.send_replace(true);
        let drained = tokio::time::timeout(DRAIN, &mut self.http).await;
        if drained.is_err() {
            warn!(target: "millrace", "requests still running are cut off");
        }
        let stopped = match self.service.coordinator() {
            Ok(coordinator) => coordinator.stop().await,
            Err(_) => Ok(()),
        };
        self.close().await;
        stopped
    }

    /// Closes the doors without a checkpoint, as a crash would.
    pub async fn close(mut self) {
        self.stopping.send_replace(true);
        self.http.abort();
        if let Some(threads) = self.query_threads.take() {
            threads.shutdown_background();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A runtime may not be dropped where it would block.
        if let Some(threads) = self.query_threads.take() {
            threads.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests;
