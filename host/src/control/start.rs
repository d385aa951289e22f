//! Starting and stopping control.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use insula_types::spec::RequestLimits;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, Semaphore, mpsc, oneshot, watch};
use tokio::task::{JoinSet, LocalSet};

use super::auth::{self, AdminTokenError};
use super::compile::{Compiler, Compilers, Seal};
use super::link::DataLink;
use super::machine::Machine;
use super::{Control, Readiness, STREAMS_MAX, pump, reconcile, server};
use crate::config::UrlScheme;
use crate::messages::DataEvent;
use crate::state::sqlite::OpenError;
use crate::state::{Blobs, DataDir, Health, SqliteStore, Store, Timestamp, Worker};
use crate::tls::Certificate;

/// What control is started with.
#[derive(Clone)]
pub struct ControlConfig {
    /// The admin listener.
    pub admin: SocketAddr,
    /// What makes it speak TLS; needed where `admin` is not a loopback address.
    pub certificate: Option<Arc<Certificate>>,
    /// Where data's listeners are.
    pub ingress: SocketAddr,
    /// What makes them speak TLS: handed over to data when it changes.
    pub ingress_certificate: Option<Arc<Certificate>>,
    /// How URLs of services begin.
    pub ingress_scheme: UrlScheme,
    /// Services answer on `<service>.<tenant>.<domain>`.
    pub domain: String,
    /// Worker threads of the data plane: what CPU there is to reserve.
    pub workers: usize,
    /// Instances alive at once, as `/v1/host` shows it.
    pub instances: u32,
    /// The ceiling on one request, as `/v1/host` shows it.
    pub ceiling: RequestLimits,
    /// Version of the engine, as metrics show it.
    pub engine_version: String,
    /// Names what artefacts are good for.
    pub compatibility: String,
    /// How to compile.
    pub compiler: Compiler,
    /// How to seal what was compiled.
    pub seal: Seal,
}

impl ControlConfig {
    /// The CPU that tenants can reserve.
    pub(crate) fn capacity_millicores(&self) -> u64 {
        u64::try_from(self.workers)
            .unwrap_or(u64::MAX)
            .saturating_mul(1_000)
    }
}

impl std::fmt::Debug for ControlConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlConfig")
            .field("admin", &self.admin)
            .finish_non_exhaustive()
    }
}

/// Why control did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The admin address cannot be listened on.
    #[error("cannot listen on {address} for the admin API: {source}; choose another with --admin")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// Tokens would go over the network for everybody to read.
    #[error(
        "the admin API does not listen on {0} without TLS: give it a certificate with \
         --admin-tls-cert and --admin-tls-key, or a loopback address"
    )]
    Exposed(SocketAddr),
    /// The database.
    #[error(transparent)]
    Database(#[from] OpenError),
    /// The first token.
    #[error(transparent)]
    AdminToken(#[from] AdminTokenError),
    /// A directory, thread or runtime.
    #[error("cannot start the control plane: {0}")]
    Io(#[from] std::io::Error),
    /// Data could not be told what to serve.
    #[error("cannot reconcile: {0}")]
    Reconcile(String),
}

/// The running control plane.
#[derive(Debug)]
pub struct ControlPlane {
    admin: SocketAddr,
    stop: Option<oneshot::Sender<Duration>>,
    thread: Option<JoinHandle<()>>,
}

impl ControlPlane {
    /// Where the admin API listens.
    #[must_use]
    pub const fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Stops; see [`start`]. Blocks until the state is closed.
    pub fn shutdown(mut self, drain: Duration) {
        self.end(drain);
    }

    fn end(&mut self, drain: Duration) {
        if let Some(stop) = self.stop.take() {
            // Gone already: the thread ended by itself.
            let _ = stop.send(drain);
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the control thread panicked");
        }
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.end(Duration::ZERO);
    }
}

/// Starts control on its own thread and waits until the admin API listens and data has been told
/// what to serve.
///
/// Shutdown:
/// 1. The admin listener closes; streams end; running requests get a few seconds; compilations
///    are ended.
/// 2. Data drains: running requests until the deadline, then they are cancelled.
/// 3. What data counted last is collected and stored.
/// 4. The threads of state, files and compilers are joined, which closes the database.
///
/// # Errors
/// [`StartError`].
pub fn start(
    config: ControlConfig,
    data: DataDir,
    events: mpsc::Receiver<DataEvent>,
) -> Result<ControlPlane, StartError> {
    let (started, start) = std::sync::mpsc::sync_channel(1);
    let (stop, stopped) = oneshot::channel();
    let thread = std::thread::Builder::new()
        .name("insula-control".to_owned())
        .spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            let local = LocalSet::new();
            let result = runtime.map_err(StartError::from).and_then(|runtime| {
                local.block_on(&runtime, run(config, &data, events, &started, stopped))
            });
            if let Err(error) = result {
                // The starter waits for this.
                let _ = started.send(Err(error));
            }
            // The lock on the data directory goes last.
            drop(data);
        })?;
    let admin = match start.recv() {
        Ok(Ok(admin)) => admin,
        failed => {
            let panicked = thread.join().is_err();
            return Err(match failed {
                Ok(Err(error)) => error,
                _ => StartError::Reconcile(format!("the control thread ended ({panicked})")),
            });
        }
    };
    Ok(ControlPlane {
        admin,
        stop: Some(stop),
        thread: Some(thread),
    })
}

type Started = std::sync::mpsc::SyncSender<Result<SocketAddr, StartError>>;

/// The whole life of the control thread.
async fn run(
    config: ControlConfig,
    data: &DataDir,
    events: mpsc::Receiver<DataEvent>,
    started: &Started,
    stopped: oneshot::Receiver<Duration>,
) -> Result<(), StartError> {
    let (control, listener) = open(config, data).await?;
    let mut background = JoinSet::new();
    background.spawn_local(pump::pump(Rc::clone(&control), events));
    let reconciled = reconcile::reconcile(&control).await;
    reconciled.map_err(|problem| StartError::Reconcile(problem.detail().to_owned()))?;
    background.spawn_local(pump::tick(Rc::clone(&control)));
    tracing::info!(admin = %control.admin, "the admin API is ready");
    // The starter waits for this.
    let _ = started.send(Ok(control.admin));

    let drain = server::serve(Rc::clone(&control), listener, stopped).await;
    control.readiness.set(Readiness::Stopping);
    control.compilers.stop();
    control.finish_tasks().await;
    if let Err(error) = control.link.drain(drain).await {
        tracing::warn!(%error, "the data plane did not drain");
    }
    if let Err(error) = control.link.collect().await {
        tracing::warn!(%error, "the last second of usage was not collected");
    }
    if let Err(problem) = control.checkpoint().await {
        tracing::error!(problem = problem.detail(), "the last usage was not stored");
    }
    background.shutdown().await;
    Ok(())
}

/// Opens the state and the listener.
async fn open(
    config: ControlConfig,
    data: &DataDir,
) -> Result<(Rc<Control>, TcpListener), StartError> {
    let address = config.admin;
    if !address.ip().is_loopback() && config.certificate.is_none() {
        return Err(StartError::Exposed(address));
    }
    let health = Health::default();
    let mut store: Box<dyn Store> = Box::new(SqliteStore::open(data, health.clone())?);
    let files = Blobs::open(data, &config.compatibility, health.clone())?;
    let now = Timestamp::now();
    auth::ensure_admin_token(data, store.as_mut(), now)?;
    let listen = |source| StartError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(listen)?;
    let admin = listener.local_addr().map_err(listen)?;
    let control = Control {
        compilers: Rc::new(Compilers::start(&config.compiler, &config.seal)?),
        config,
        admin,
        started: now,
        started_at: tokio::time::Instant::now(),
        machine: Machine::look(),
        store: Worker::start("insula-state", store)?,
        files: Worker::start("insula-files", files)?,
        health,
        link: DataLink::new(),
        walls: Default::default(),
        ledger: Default::default(),
        trials: Default::default(),
        logs: Default::default(),
        events: Default::default(),
        failures: Default::default(),
        in_progress: Default::default(),
        mutation: Mutex::new(()),
        readiness: std::cell::Cell::new(Readiness::Reconciling),
        streams: Semaphore::new(STREAMS_MAX),
        stopping: watch::Sender::new(false),
        backup_runs: Default::default(),
        tasks: Default::default(),
    };
    Ok((Rc::new(control), listener))
}
