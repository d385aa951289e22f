//! Starting and stopping control.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use insula_types::spec::RequestLimits;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, Semaphore, mpsc, oneshot, watch};
use tokio::task::{JoinSet, LocalSet};

use super::auth::{self, AdminTokenError};
use super::compile::{Compiler, Compilers, Seal, Target};
use super::link::DataLink;
use super::machine::Machine;
use super::machines::{self, MachinesConfig, Told};
use super::recompile::{self, Progress, Successor};
use super::{Control, Readiness, STREAMS_MAX, pump, reconcile, server};
use crate::config::UrlScheme;
use crate::messages::{AtRest, DataEvent, UsageDelta};
use crate::state::sqlite::OpenError;
use crate::state::{Blobs, DataDir, EngineName, Health, SqliteStore, Store, Timestamp, Worker};
use crate::tls::Certificate;

/// What control is started with.
#[derive(Clone)]
pub struct ControlConfig {
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
    pub engine: EngineName,
    /// Whether another host serves until this one does.
    pub inherits: bool,
    /// How to compile.
    pub compiler: Compiler,
    /// How to seal what was compiled.
    pub seal: Seal,
    /// What the operator decided about machines.
    pub machines: MachinesConfig,
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
            .field("domain", &self.domain)
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
    stop: Option<oneshot::Sender<Stop>>,
    successors: mpsc::Sender<Successor>,
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
        let handover = None;
        self.stop(Stop { drain, handover });
        self.end();
    }

    /// Begins to compile what another host needs that is to take over. The end is when nobody tells of
    /// progress any more.
    pub(crate) fn prepare(
        &self,
        engine: EngineName,
        program: OwnedFd,
    ) -> watch::Receiver<Progress> {
        let (progress, told) = watch::channel(Progress::default());
        let target = Arc::new(Target::successor(engine, program));
        // Where control is gone or busy with one that has just given up, that is the end at once, and
        // the other host compiles by itself.
        let _ = self.successors.try_send(Successor { target, progress });
        told
    }

    /// Begins to stop in favour of another host; to be ended by dropping this.
    pub(crate) fn hand_over(&mut self, drain: Duration) -> Steps {
        let (released, steps_released) = oneshot::channel();
        let (steps_serves, serves) = oneshot::channel();
        let (usage, steps_usage) = oneshot::channel();
        let handover = Some(Handover {
            released,
            serves,
            usage,
        });
        self.stop(Stop { drain, handover });
        Steps {
            released: steps_released,
            serves: steps_serves,
            usage: steps_usage,
        }
    }

    fn stop(&mut self, stop: Stop) {
        if let Some(sender) = self.stop.take() {
            // Gone already: the thread ended by itself.
            let _ = sender.send(stop);
        }
    }

    fn end(&mut self) {
        self.stop(Stop::default());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the control thread panicked");
        }
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.end();
    }
}

/// How to stop.
#[derive(Debug, Default)]
pub(crate) struct Stop {
    drain: Duration,
    /// In favour of another host.
    handover: Option<Handover>,
}

/// What a handover waits for, as control sees it.
#[derive(Debug)]
struct Handover {
    /// The state is closed and unlocked.
    released: oneshot::Sender<()>,
    /// The other host serves.
    serves: oneshot::Receiver<()>,
    /// What was used since the state was closed.
    usage: oneshot::Sender<Vec<UsageDelta>>,
}

/// The other ends.
#[derive(Debug)]
pub(crate) struct Steps {
    pub(crate) released: oneshot::Receiver<()>,
    pub(crate) serves: oneshot::Sender<()>,
    pub(crate) usage: oneshot::Receiver<Vec<UsageDelta>>,
}

/// Opens the listener of the admin API.
///
/// # Errors
/// [`StartError::Listen`], [`StartError::Exposed`].
pub fn listen(
    address: SocketAddr,
    certificate: Option<&Arc<Certificate>>,
) -> Result<std::net::TcpListener, StartError> {
    exposed(address, certificate)?;
    let failed = |source| StartError::Listen { address, source };
    std::net::TcpListener::bind(address).map_err(failed)
}

fn exposed(address: SocketAddr, certificate: Option<&Arc<Certificate>>) -> Result<(), StartError> {
    if address.ip().is_loopback() || certificate.is_some() {
        Ok(())
    } else {
        Err(StartError::Exposed(address))
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
/// In favour of another host ([`crate::handover`]) it is 1, 3 and 4 first, then the other host's turn,
/// then 2, and 3 once more, for the other host.
///
/// # Errors
/// [`StartError`].
pub fn start(
    config: ControlConfig,
    data: DataDir,
    events: mpsc::Receiver<DataEvent>,
    listener: std::net::TcpListener,
) -> Result<ControlPlane, StartError> {
    let (started, start) = std::sync::mpsc::sync_channel(1);
    let (stop, stopped) = oneshot::channel();
    let (successors, successors_in) = mpsc::channel(1);
    let thread = std::thread::Builder::new()
        .name("insula-control".to_owned())
        .spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            let local = LocalSet::new();
            let result = runtime.map_err(StartError::from).and_then(|runtime| {
                local.block_on(
                    &runtime,
                    run(
                        config,
                        data,
                        (events, successors_in, listener),
                        &started,
                        stopped,
                    ),
                )
            });
            if let Err(error) = result {
                // The starter waits for this.
                let _ = started.send(Err(error));
            }
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
        successors,
        thread: Some(thread),
    })
}

type Started = std::sync::mpsc::SyncSender<Result<SocketAddr, StartError>>;

/// The whole life of the control thread.
async fn run(
    config: ControlConfig,
    // Dropped last: with it goes the lock.
    data: DataDir,
    (events, successors, listener): (
        mpsc::Receiver<DataEvent>,
        mpsc::Receiver<Successor>,
        std::net::TcpListener,
    ),
    started: &Started,
    stopped: oneshot::Receiver<Stop>,
) -> Result<(), StartError> {
    let (control, listener, told) = open(config, &data, listener)?;
    let mut background = JoinSet::new();
    background.spawn_local(machines::pump(Rc::clone(&control), told));
    background.spawn_local(machines::share(Rc::clone(&control)));
    background.spawn_local(pump::pump(Rc::clone(&control), events));
    let reconciled = reconcile::reconcile(&control).await;
    reconciled.map_err(|problem| {
        control.readiness.set(Readiness::Stopping);
        StartError::Reconcile(problem.detail().to_owned())
    })?;
    let tick = background.spawn_local(pump::tick(Rc::clone(&control)));
    background.spawn_local(recompile::for_successors(Rc::clone(&control), successors));
    tracing::info!(admin = %control.admin, "the admin API is ready");
    // The starter waits for this.
    let _ = started.send(Ok(control.admin));

    let Stop { drain, handover } = server::serve(Rc::clone(&control), listener, stopped).await;
    control.readiness.set(Readiness::Stopping);
    control.compilers.stop();
    control.leave_machines().await;
    control.finish_tasks().await;
    match handover {
        None => {
            drained(&control, drain, AtRest::Close).await;
            checkpoint(&control).await;
        }
        Some(handover) => {
            tick.abort();
            hand_over(&control, data, drain, handover).await;
        }
    }
    background.shutdown().await;
    Ok(())
}

/// Lets data finish, and takes what it counted.
async fn drained(control: &Control, drain: Duration, at_rest: AtRest) {
    if let Err(error) = control.link.drain(drain, at_rest).await {
        tracing::warn!(%error, "the data plane did not drain");
    }
    collect(control).await;
}

async fn collect(control: &Control) {
    if let Err(error) = control.link.collect().await {
        tracing::warn!(%error, "the last second of usage was not collected");
    }
}

async fn checkpoint(control: &Control) {
    if let Err(problem) = control.checkpoint().await {
        tracing::error!(problem = problem.detail(), "the last usage was not stored");
    }
}

/// The state goes first, then the connections.
async fn hand_over(control: &Control, data: DataDir, drain: Duration, handover: Handover) {
    collect(control).await;
    checkpoint(control).await;
    control.close_store();
    drop(data);
    // Where nobody waits for these any more, the other host is gone, which `serves` tells.
    let _ = handover.released.send(());
    let at_rest = match handover.serves.await {
        Ok(()) => AtRest::AnswerOnce,
        Err(_) => {
            tracing::error!("the host that was to take over does not serve; this one ends");
            AtRest::Close
        }
    };
    drained(control, drain, at_rest).await;
    let usage = control.ledger.borrow_mut().take_for_another();
    let _ = handover.usage.send(usage);
}

/// Opens the state and the listener.
fn open(
    config: ControlConfig,
    data: &DataDir,
    listener: std::net::TcpListener,
) -> Result<(Rc<Control>, TcpListener, Told), StartError> {
    let health = Health::default();
    let mut store: Box<dyn Store> = Box::new(SqliteStore::open(data, health.clone())?);
    let files = Blobs::open(data, config.engine.clone(), health.clone())?;
    let now = Timestamp::now();
    auth::ensure_admin_token(data, store.as_mut(), now)?;
    let admin = listener.local_addr()?;
    exposed(admin, config.certificate.as_ref())?;
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let (machines, told) = machines::Room::open(data, config.machines.clone())?;
    let control = Control {
        machines,
        compilers: Rc::new(Compilers::start(&config.seal)?),
        target: Arc::new(Target::own(config.engine.clone(), config.compiler.clone())),
        config,
        admin,
        started: now,
        started_at: tokio::time::Instant::now(),
        machine: Machine::look(),
        store: std::cell::RefCell::new(Some(Rc::new(Worker::start("insula-state", store)?))),
        files: Worker::start("insula-files", files)?,
        health,
        link: DataLink::new(),
        walls: Default::default(),
        ledger: Default::default(),
        volumes: Default::default(),
        trials: Default::default(),
        logs: Default::default(),
        events: Default::default(),
        failures: Default::default(),
        in_progress: Default::default(),
        untold: Default::default(),
        recompilation: Default::default(),
        mutation: Mutex::new(()),
        readiness: std::cell::Cell::new(Readiness::Reconciling),
        streams: Semaphore::new(STREAMS_MAX),
        stopping: watch::Sender::new(false),
        backup_runs: Default::default(),
        tasks: Default::default(),
    };
    Ok((Rc::new(control), listener, told))
}
