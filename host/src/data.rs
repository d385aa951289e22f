//! The data plane: workers, pool and ingress, put together and told what to serve.
//!
//! ```text
//!  Command ─▶ `insula-data` thread ─▶ intent ─▶ new route table ─▶ swapped in ─▶ FromData::Done
//!                                       │
//!  worker 0 … n ◀── pool, ingress ──────┘
//! ```
//!
//! The thread applies all commands that wait, publishes one route table and answers them all. It
//! holds no database and no token, only the key of the artefacts that it loads. All this runs in a
//! process of its own ([`crate::process`]).
//!
//! Shutdown:
//! 1. `ToData::Drain` arrives: workers stop accepting, idle connections close.
//! 2. Requests go on until the last has ended or the deadline has passed; then they are
//!    cancelled.
//! 3. `Done` is answered; the command channel closes and the thread tells the workers to leave.
//! 4. [`DataPlane`] joins all threads when it is dropped.

use std::collections::HashMap;
use std::fs::File;
use std::net::TcpListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use insula_metrics::{DataMetrics, Kind};
use insula_types::spec::{RequestLimits, Reuse, Route, TenantSpec};
use insula_types::volume::MountMode;
use insula_types::{
    Bytes, Digest, ServiceId, ServiceName, TenantId, TenantName, VersionNumber, VolumeId,
    VolumeSpec,
};
use tokio::sync::{mpsc, watch};

use crate::engine::artefact::ArtefactKey;
use crate::engine::{
    Engine, EngineError, EngineLimits, HostMemory, Mounted, Place, Program, Room, Shelf,
    TenantMemory, Vault,
};
use crate::ingress::Ingress;
use crate::ingress::logs::{LogHub, ServiceLog};
use crate::ingress::routes::RouteTable;
use crate::messages::{
    AtRest, Collect, Collected, Command, FromData, IntendedVersion, LogRecord, Refusal,
    ServiceIntent, ToData,
};
use crate::outbound::{AddressPolicy, Inquiries, Network, Outbound};
use crate::pool::Pool;
use crate::pool::clock::process_cpu_ns;
use crate::pool::conduct::VersionStats;
use crate::pool::entries::{ServiceEntry, ServiceStats, TenantEntry};
use crate::pool::versions::{Active, Versions};
use crate::pool::worker::{self, Phase, WorkerError};
use crate::process::walls::Wall;
use crate::storage::{Purse, TenantStorage, Volume};
use crate::tls::Certificate;

/// What the data plane is started with.
#[derive(Debug)]
pub struct DataConfig {
    /// What makes the ingress speak TLS.
    pub certificate: Option<Arc<Certificate>>,
    /// Services answer on `<service>.<tenant>.<domain>`.
    pub domain: String,
    /// No request gets more than this.
    pub ceiling: RequestLimits,
    /// Instances alive at once.
    pub instances: u32,
    /// What all guests together may use.
    pub guest_memory: Bytes,
    /// Networks beside the Internet that guests may reach, where their services' lists do.
    pub outbound_networks: Vec<Network>,
    /// How long code stays that nobody asks.
    pub code_idle: Duration,
    /// The key that artefacts are sealed with.
    pub artefact_key: ArtefactKey,
}

/// Why the data plane could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No listener or no thread.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// No engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// No pool.
    #[error("{0}")]
    Pool(#[from] insula_scheduler::ConfigError),
    /// No runtime or no thread for commands.
    #[error("cannot start the data plane's thread: {0}")]
    Thread(std::io::Error),
}

/// The running data plane; joins its threads when dropped, after the command channel was closed.
#[derive(Debug)]
pub struct DataPlane {
    threads: Vec<JoinHandle<()>>,
}

/// The engine that a data plane with these settings needs. Made before the process is confined:
/// wasmtime opens a file of `/proc` for it.
///
/// # Errors
/// [`EngineError`].
pub fn engine(config: &DataConfig) -> Result<Engine, EngineError> {
    Engine::pooled(EngineLimits {
        // Instances that wait for another request take no places of those that run.
        instances: config.instances + config.instances / WAITING_PART,
        memory: config.ceiling.memory,
    })
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the data plane panicked");
            }
        }
    }
}

/// Starts the data plane: a worker for each listener, then the thread that applies commands.
///
/// # Errors
/// [`StartError`]; whatever was started is stopped again.
pub fn start(
    config: DataConfig,
    engine: Engine,
    listeners: Vec<TcpListener>,
    (commands, reports): (mpsc::Receiver<Command>, mpsc::Sender<FromData>),
    walls: Vec<Wall>,
    inquiries: Arc<Inquiries>,
) -> Result<DataPlane, StartError> {
    let workers = listeners.len();
    let pool = Pool::new(workers, config.instances)?;
    let metrics = DataMetrics::new();
    metrics.set_host_workers(workers);
    let ingress = Ingress::new(
        Arc::clone(&pool),
        metrics.clone(),
        workers,
        config.certificate.clone(),
    );
    let (phase, _) = watch::channel(Phase::Starting);
    let mut plane = DataPlane {
        threads: Vec::with_capacity(workers + 1),
    };
    for (index, listener) in (0u16..).zip(listeners) {
        let (pool, ingress) = (Arc::clone(&pool), Arc::clone(&ingress));
        // On an error `phase` is dropped, which ends the workers that run already.
        plane.threads.push(worker::start(
            index,
            listener,
            pool,
            ingress,
            phase.subscribe(),
        )?);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .map_err(StartError::Thread)?;
    let desk = Desk {
        memory: Arc::new(HostMemory::new(config.guest_memory)),
        outbound: Outbound::new(
            AddressPolicy::new(config.outbound_networks.clone()),
            Arc::clone(&inquiries),
        ),
        inquiries,
        vault: Vault::new(engine, config.artefact_key.clone()),
        room: Room::new(config.instances / WAITING_PART),
        config,
        pool,
        ingress,
        metrics,
        logs: Arc::default(),
        tenants: HashMap::new(),
        services: HashMap::new(),
        volumes: HashMap::new(),
        programs: HashMap::new(),
        phase,
    };
    let thread = std::thread::Builder::new()
        .name("insula-data".to_owned())
        .spawn(move || runtime.block_on(desk.run(commands, reports, walls)))
        .map_err(StartError::Thread)?;
    plane.threads.push(thread);
    Ok(plane)
}

/// A tenant, and what was last told to its metrics.
struct Tenant {
    entry: Arc<TenantEntry>,
    waited: (Duration, Duration),
}

struct Service {
    entry: Arc<ServiceEntry>,
    routes: Vec<Route>,
}

/// The state of the command thread.
struct Desk {
    config: DataConfig,
    vault: Arc<Vault>,
    room: Arc<Room>,
    pool: Arc<Pool>,
    ingress: Arc<Ingress>,
    metrics: DataMetrics,
    memory: Arc<HostMemory>,
    outbound: Arc<Outbound>,
    inquiries: Arc<Inquiries>,
    logs: Arc<LogHub>,
    tenants: HashMap<TenantId, Tenant>,
    services: HashMap<ServiceId, Service>,
    volumes: HashMap<VolumeId, (TenantId, Arc<Volume>)>,
    programs: HashMap<Digest, Program>,
    phase: watch::Sender<Phase>,
}

/// Of so many instances that may run, one more may wait to be used again.
const WAITING_PART: u32 = 4;

/// Commands applied before the route table is published.
const COMMANDS_AT_ONCE: usize = 256;

impl Desk {
    async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        reports: mpsc::Sender<FromData>,
        walls: Vec<Wall>,
    ) {
        if reports.send(FromData::Ready(walls)).await.is_err() {
            return;
        }
        let logs = Arc::clone(&self.logs);
        let mut batch = Vec::with_capacity(COMMANDS_AT_ONCE);
        loop {
            // Both branches are cancel-safe: commands stay in the channel, records in the hub.
            tokio::select! {
                biased;
                received = commands.recv_many(&mut batch, COMMANDS_AT_ONCE) => {
                    if received == 0 {
                        break;
                    }
                    for answer in self.apply(&mut batch, &reports).await {
                        if reports.send(answer).await.is_err() {
                            return;
                        }
                    }
                }
                records = logs.take() => {
                    for report in in_parts(records) {
                        if reports.send(report).await.is_err() {
                            return;
                        }
                    }
                }
            }
        }
        self.pool.cancel_all();
        self.phase.send_replace(Phase::Ended);
        self.pool.wake_all();
    }

    /// Applies commands in order; publishes the route table once, before any is answered.
    async fn apply(
        &mut self,
        batch: &mut Vec<Command>,
        reports: &mpsc::Sender<FromData>,
    ) -> Vec<FromData> {
        let mut answers = Vec::with_capacity(batch.len());
        let mut changed = false;
        let mut opening = false;
        for Command { seq, body } in batch.drain(..) {
            let result = match body {
                ToData::Collect {
                    what,
                    control_cpu_ns,
                } => {
                    let collected = Box::new(self.collect(what, control_cpu_ns));
                    answers.extend(in_parts(self.logs.take_now()));
                    answers.push(FromData::Collected { seq, collected });
                    continue;
                }
                ToData::Answer(answer) => {
                    self.inquiries.answer(answer);
                    continue;
                }
                ToData::Certificate(pem) => {
                    let now = self.config.certificate.as_ref();
                    if let Some(Err(error)) = now.map(|now| now.replace(pem)) {
                        tracing::error!(%error, "the old certificate stays");
                    }
                    Ok(())
                }
                ToData::Open => {
                    opening = true;
                    Ok(())
                }
                ToData::Drain { deadline, at_rest } => {
                    self.drain(deadline, at_rest).await;
                    Ok(())
                }
                ToData::Tenant {
                    id,
                    name,
                    spec,
                    promised,
                } => {
                    changed = true;
                    self.set_tenant(id, name, &spec, promised)
                }
                ToData::DropTenant(id) => {
                    changed = true;
                    self.drop_tenant(id);
                    Ok(())
                }
                ToData::Volume {
                    id,
                    tenant,
                    spec,
                    directory,
                } => self.set_volume(id, tenant, spec, directory),
                ToData::DropVolume(id) => {
                    let gone = self.volumes.remove(&id);
                    // Here and not where the last request that used it ends: it may block.
                    if let Some((tenant, volume)) = gone.filter(|(_, volume)| volume.is_store()) {
                        self.close_store(tenant, &volume);
                    }
                    Ok(())
                }
                ToData::Recount => {
                    self.recount();
                    Ok(())
                }
                ToData::CopyVolume { from, to, spec } => {
                    match self.copy_volume(seq, from, to, spec, reports) {
                        Ok(()) => continue,
                        Err(refusal) => Err(refusal),
                    }
                }
                ToData::Service(intent) => {
                    changed = true;
                    self.set_service(*intent)
                }
                ToData::DropService(id) => {
                    changed = true;
                    self.drop_service(id);
                    Ok(())
                }
            };
            answers.push(FromData::Done { seq, result });
        }
        // Nobody can ask before the first `Open`; one table at the end is enough until then.
        let starting = *self.phase.borrow() == Phase::Starting;
        if opening || (changed && !starting) {
            self.publish();
        }
        if opening && starting {
            self.phase.send_replace(Phase::Serving);
        }
        answers
    }

    fn publish(&mut self) {
        let services = self.services.values();
        let table = RouteTable::build(
            &self.config.domain,
            services.map(|service| (&service.entry, service.routes.as_slice())),
        );
        self.ingress.swap_routes(table);
        // Programs that nothing serves any more are unmapped when their last request ends.
        let used: std::collections::HashSet<Digest> = self
            .services
            .values()
            .flat_map(|service| service.entry.versions.ready().map(|version| version.digest))
            .collect();
        self.programs.retain(|digest, _| used.contains(digest));
    }

    fn set_tenant(
        &mut self,
        id: TenantId,
        name: TenantName,
        spec: &TenantSpec,
        promised: Bytes,
    ) -> Result<(), Refusal> {
        self.pool.set_tenant(id, spec).map_err(Refusal::Envelope)?;
        let (metrics, host_memory) = (&self.metrics, &self.memory);
        let offload = self.pool.offload();
        let tenant = self.tenants.entry(id).or_insert_with(|| {
            let memory = Arc::new(TenantMemory::new(Arc::clone(host_memory)));
            let purse = Arc::clone(&memory) as Arc<dyn Purse>;
            Tenant {
                entry: Arc::new(TenantEntry {
                    owed: Default::default(),
                    id,
                    metrics: metrics.tenant(&name),
                    name,
                    memory,
                    offload,
                    storage: Arc::new(TenantStorage::new(purse)),
                    places: Outbound::tenant_places(),
                }),
                waited: Default::default(),
            }
        });
        let shares = u64::from(spec.cpu.shares.get());
        let left = spec.memory_limit.map(|limit| {
            // Less than a size is one.
            Bytes::new(limit.get().saturating_sub(promised.get())).unwrap_or(limit)
        });
        tenant.entry.memory.set(left, shares);
        let limit = spec.memory_limit.map(Bytes::get);
        tenant.entry.metrics.set_memory_limit(limit);
        tenant.entry.storage.set_limit(spec.storage_limit);
        let limit = spec.storage_limit.map(Bytes::get);
        tenant.entry.metrics.set_storage_limit(limit);
        Ok(())
    }

    fn drop_tenant(&mut self, id: TenantId) {
        self.services
            .retain(|_, service| service.entry.tenant.id != id);
        self.pool.remove_tenant(id);
        self.volumes.retain(|_, (tenant, _)| *tenant != id);
        if let Some(tenant) = self.tenants.remove(&id) {
            self.metrics.remove_tenant(&tenant.entry.name);
        }
    }

    fn drop_service(&mut self, id: ServiceId) {
        if let Some(service) = self.services.remove(&id) {
            let entry = service.entry;
            self.metrics.remove_service(&entry.tenant.name, &entry.name);
            self.pool.cancel_service(id);
        }
    }

    fn set_service(&mut self, intent: ServiceIntent) -> Result<(), Refusal> {
        let tenant = self.tenants.get(&intent.tenant);
        let tenant = Arc::clone(&tenant.ok_or(Refusal::UnknownTenant(intent.tenant))?.entry);
        let mounts = self.mounts(&intent)?;
        let mut ready = Vec::with_capacity(intent.versions.len());
        for version in intent.versions {
            let number = version.number;
            let stats = self.conduct(intent.id, number);
            match self.load(version, stats, intent.spec.reuse) {
                Ok(version) => ready.push((number, version)),
                // Nobody but its author, by its preview name, would have met it.
                Err(refusal) if intent.traffic.share(number).unwrap_or(0) == 0 => {
                    tracing::warn!(service = %intent.id, version = %number, %refusal, "no preview");
                }
                Err(refusal) => return Err(refusal),
            }
        }
        let sticky = intent.spec.sticky_header.as_ref();
        let stats = match self.services.get(&intent.id) {
            Some(service) => Arc::clone(&service.entry.stats),
            None => {
                let hub = Arc::clone(&self.logs);
                let log = ServiceLog::new(intent.id, hub, Arc::clone(&tenant.metrics));
                Arc::new(ServiceStats::new(self.metrics.clone(), Arc::new(log)))
            }
        };
        let entry = ServiceEntry {
            id: intent.id,
            name: intent.name,
            tenant,
            limits: intent.spec.limits.min(self.config.ceiling),
            env: intent.spec.env.into_iter().collect(),
            mounts: mounts.into(),
            outbound: Arc::clone(&self.outbound),
            outbound_rules: intent.spec.outbound.into(),
            usage_header: intent.spec.usage_header,
            versions: Versions::new(ready, &intent.traffic),
            awaited: intent.awaited.into(),
            // A sticky header's name is a token by its type, which is all that this asks.
            sticky_header: sticky.and_then(|name| name.as_str().parse().ok()),
            stats,
        };
        let service = Service {
            entry: Arc::new(entry),
            routes: intent.spec.routes,
        };
        self.services.insert(intent.id, service);
        Ok(())
    }

    /// The volumes of a service, as its guests find them.
    fn mounts(&self, intent: &ServiceIntent) -> Result<Vec<Mounted>, Refusal> {
        let spec = &intent.spec;
        let paths = spec.volumes.iter().map(|mount| mount.path.to_string());
        let places = paths.map(Place::Path);
        let stores = spec.stores.iter().map(|store| store.name.to_string());
        let places = places.chain(stores.map(Place::Store));
        let used = spec.used_volumes().zip(places).zip(&intent.mounts);
        let mounts = used.map(|(((_, _, mode), place), id)| {
            let (_, volume) = self.volumes.get(id).ok_or(Refusal::UnknownVolume(*id))?;
            Ok(Mounted {
                volume: Arc::clone(volume),
                place,
                writable: mode == MountMode::Rw,
            })
        });
        mounts.collect()
    }

    fn set_volume(
        &mut self,
        id: VolumeId,
        tenant: TenantId,
        spec: VolumeSpec,
        directory: File,
    ) -> Result<(), Refusal> {
        if let Some((_, volume)) = self.volumes.get(&id) {
            volume.set_quota(spec);
            return Ok(());
        }
        let entry = &self
            .tenants
            .get(&tenant)
            .ok_or(Refusal::UnknownTenant(tenant))?
            .entry;
        let storage = Arc::clone(&entry.storage);
        let volume = Arc::new(Volume::new(id, directory, storage, spec));
        self.volumes.insert(id, (tenant, Arc::clone(&volume)));
        // Whoever changes it first would count it as well; this way it is known before.
        let count = move || {
            if let Err(error) = volume.change() {
                tracing::warn!(%id, %error, "a volume could not be counted");
            }
        };
        entry.offload.submit(tenant, None, Box::new(count));
        Ok(())
    }

    /// Begins to count all volumes anew.
    fn recount(&self) {
        for (id, (tenant, volume)) in &self.volumes {
            let (id, volume) = (*id, Arc::clone(volume));
            let count = move || {
                if let Err(error) = volume.recount() {
                    tracing::warn!(%id, %error, "a volume could not be counted anew");
                }
            };
            self.pool.offload().submit(*tenant, None, Box::new(count));
        }
    }

    /// Begins a copy; it is answered when it is done.
    fn copy_volume(
        &self,
        seq: u64,
        from: VolumeId,
        to: File,
        spec: VolumeSpec,
        reports: &mpsc::Sender<FromData>,
    ) -> Result<(), Refusal> {
        let unknown = Refusal::UnknownVolume(from);
        let (tenant, volume) = self.volumes.get(&from).ok_or(unknown)?;
        let (volume, reports) = (Arc::clone(volume), reports.clone());
        let copy = move || {
            let copied = volume.copy_to(&to, spec);
            let result = copied.map_err(|error| Refusal::Storage(error.to_string()));
            // Control may be gone.
            let _ = reports.blocking_send(FromData::Done { seq, result });
        };
        self.pool.offload().submit(*tenant, None, Box::new(copy));
        Ok(())
    }

    /// The counters of a version: as before, when it was ready before.
    fn conduct(&self, service: ServiceId, number: VersionNumber) -> Arc<VersionStats> {
        let before = self.services.get(&service);
        let before = before.and_then(|service| service.entry.versions.get(number));
        before.map_or_else(Arc::default, |version| Arc::clone(&version.stats))
    }

    fn load(
        &mut self,
        version: IntendedVersion,
        stats: Arc<VersionStats>,
        reuse: Option<Reuse>,
    ) -> Result<Active, Refusal> {
        let digest = version.digest;
        let known = self
            .programs
            .get(&digest)
            .filter(|known| !known.is_broken());
        let program = match (known, version.artefact) {
            (Some(program), _) => program.clone(),
            (None, None) => return Err(Refusal::ArtefactMissing(digest)),
            (None, Some(artefact)) => {
                // At the start there may be ten thousand, of which few are asked soon.
                let keep = *self.phase.borrow() != Phase::Starting;
                let opened = self.vault.open(digest, artefact, keep);
                let program = opened.map_err(|error| Refusal::ArtefactRefused {
                    digest,
                    reason: error.to_string(),
                })?;
                self.programs.insert(digest, program.clone());
                program
            }
        };
        // Never shared: it goes with this state of this version of this service.
        let shelf = reuse.map(|reuse| Arc::new(Shelf::new(reuse, Arc::clone(&self.room))));
        Ok(Active {
            number: version.number,
            digest,
            program,
            shelf,
            stats,
        })
    }

    fn collect(&mut self, what: Collect, control_cpu_ns: u64) -> Collected {
        for (id, tenant) in &mut self.tenants {
            let metrics = &tenant.entry.metrics;
            let memory = &tenant.entry.memory;
            metrics.set_memory_bytes(Kind::Wasm, memory.used_bytes());
            let (limit, host) = memory.refusals();
            metrics.raise_memory_refusals_to(limit, host);
            let stored = self.volumes.values().any(|(owner, _)| owner == id);
            let used = stored.then(|| tenant.entry.storage.used_bytes());
            metrics.set_storage(used);
            if let Some((waited, throttled)) = self.pool.waited(*id) {
                let (waited_before, throttled_before) = tenant.waited;
                metrics.add_cpu_wait_ns(Kind::Wasm, ns(waited.saturating_sub(waited_before)));
                let held = throttled.saturating_sub(throttled_before);
                metrics.add_cpu_throttled_ns(Kind::Wasm, ns(held));
                tenant.waited = (waited, throttled);
            }
        }
        let memory = &self.memory;
        self.metrics
            .set_guest_memory(memory.used_bytes(), memory.budget_bytes());
        self.metrics
            .raise_host_cpu_ns_to(self.pool.host_cpu_ns() + control_cpu_ns);
        let mut usage = Vec::new();
        let mut versions = Vec::new();
        let now = Instant::now();
        for service in self.services.values() {
            for version in service.entry.versions.ready() {
                if let Some(shelf) = &version.shelf {
                    shelf.sweep(now);
                }
            }
            // Who used nothing ended nothing.
            if let Some(used) = service.entry.take_usage() {
                usage.push(used);
                versions.extend(service.entry.take_conduct());
            }
        }
        let volumes = self.volumes.iter();
        let volumes = volumes.filter_map(|(id, (_, volume))| Some((*id, volume.counted()?)));
        let collected = Collected {
            volumes: volumes.collect(),
            usage,
            versions,
            broken: self.look_after_programs(now),
            metrics: (what == Collect::Families).then(|| self.metrics.expose()),
        };
        self.close_idle_stores(now);
        collected
    }

    /// Closes databases of guests that nobody called for a while.
    fn close_idle_stores(&self, now: Instant) {
        for (tenant, volume) in self.volumes.values() {
            if volume.is_idle_store(now) {
                self.close_store(*tenant, volume);
            }
        }
    }

    fn close_store(&self, tenant: TenantId, volume: &Arc<Volume>) {
        let volume = Arc::clone(volume);
        let close = move || volume.close_store();
        self.pool.offload().submit(tenant, None, Box::new(close));
    }

    /// Lets go of code that nobody asked for; names the services whose artefact does not load.
    fn look_after_programs(&mut self, now: Instant) -> Vec<(TenantName, ServiceName)> {
        let mut broken = Vec::new();
        self.programs.retain(|digest, program| {
            program.cool(now, self.config.code_idle);
            if program.is_broken() {
                broken.push(*digest);
            }
            !program.is_broken()
        });
        if broken.is_empty() {
            return Vec::new();
        }
        let services = self.services.values().map(|service| &service.entry);
        services
            .filter(|entry| {
                entry
                    .versions
                    .ready()
                    .any(|version| broken.contains(&version.digest))
            })
            .map(|entry| (entry.tenant.name.clone(), entry.name.clone()))
            .collect()
    }

    async fn drain(&self, deadline: Duration, at_rest: AtRest) {
        if at_rest == AtRest::AnswerOnce {
            self.ingress.retire();
        }
        self.phase.send_replace(Phase::Draining);
        self.pool.wake_all();
        let until = Instant::now() + deadline;
        while self.busy() && Instant::now() < until {
            tokio::time::sleep(DRAIN_POLL).await;
        }
        self.pool.cancel_all();
        // Cancelled requests still send their last bytes and write their records.
        let until = Instant::now() + DRAIN_GRACE;
        while self.busy() && Instant::now() < until {
            tokio::time::sleep(DRAIN_POLL).await;
        }
        let left = self.ingress.connections();
        let cpu_seconds = process_cpu_ns() / 1_000_000_000;
        tracing::info!(left, cpu_seconds, "drained");
    }

    fn busy(&self) -> bool {
        self.pool.jobs() > 0 || self.ingress.connections() > 0
    }
}

/// Records of one message: of the longest lines they are a few megabytes.
const RECORDS_AT_ONCE: usize = 512;

/// Records as reports of a size that fits the link.
fn in_parts(mut records: Vec<LogRecord>) -> Vec<FromData> {
    let mut parts = Vec::with_capacity(records.len().div_ceil(RECORDS_AT_ONCE));
    while !records.is_empty() {
        let rest = records.split_off(records.len().min(RECORDS_AT_ONCE));
        parts.push(FromData::Logs(std::mem::replace(&mut records, rest)));
    }
    parts
}

const DRAIN_POLL: Duration = Duration::from_millis(5);
const DRAIN_GRACE: Duration = Duration::from_millis(500);

fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
