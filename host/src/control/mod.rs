//! The admin API, and the owner of intent.
//!
//! ```text
//!              thread "insula-control": one current-thread runtime, everything is Rc
//!  HTTP ─▶ server ─▶ router ─▶ auth ─▶ api::* ─┬─▶ store  (thread "insula-state")
//!                                              ├─▶ files  (thread "insula-files")
//!                                              ├─▶ compilers (threads "insula-compileN", children)
//!                                              └─▶ link ─▶ data plane ─▶ pump ─▶ ledger, logs
//! ```
//!
//! A change takes the *mutation lock*, commits to the store, is sent to data, and is answered when
//! data has applied it: commands reach data in the order of commits. Each request runs in a task
//! of its own, so that a client that goes away does not leave a change half done.
//!
//! Failures: the store refuses → nothing happened, a problem says why. Data refuses an activation
//! → it is taken back. Data dies → it is told everything again, the change with it (`link`). Data
//! does not answer → the change is stored and the problem says so. The host dies → the next start
//! reconciles data with the store (`reconcile`).
//!
//! *Invariant:* nothing on the control thread waits for a disk, a child or another thread.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use insula_types::spec::RequestLimits;
use insula_types::{Digest, VolumeId};
use sha2::Digest as _;
use tokio::sync::{Mutex, Semaphore, watch};
use tokio::task::JoinSet;

use crate::process::walls::Wall;
use crate::state::{Blobs, Health, Store, StoreError, Timestamp, Worker};
use crate::storage::Usage;

mod api;
mod auth;
mod changes;
mod compile;
mod deploy;
mod documents;
mod events;
mod exposition;
mod http_types;
mod idempotency;
mod ledger;
mod link;
mod logs;
pub(crate) mod machine;
pub(crate) mod machines;
mod openapi;
mod problem;
mod pump;
mod recompile;
mod reconcile;
mod router;
mod server;
mod start;
#[cfg(test)]
mod tests;
mod trials;
mod upload;

pub use auth::AdminTokenError;
pub use compile::{Compiler, Seal};
pub use machines::{AtEnd, MachinesConfig};
pub(crate) use recompile::Progress;
pub(crate) use start::Steps;
pub use start::{ControlConfig, ControlPlane, StartError, listen, start};

use problem::{Code, Problem};

type StoreWorker = Worker<Box<dyn Store>>;

/// Streams (logs, events) that are followed at once; they must not use up the connections.
const STREAMS_MAX: usize = 64;

/// How long requests may go on after their connections are closed.
const TASKS_GRACE: std::time::Duration = std::time::Duration::from_secs(5);

/// How far the start has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Readiness {
    /// Data is being told what to serve, or artefacts are being compiled again.
    Reconciling,
    /// All that is intended is served.
    Ready,
    /// Data has died, and another is on its way.
    DataGone,
    /// The host is draining.
    Stopping,
}

/// What all handlers share. Lives on the control thread.
pub(crate) struct Control {
    pub(crate) config: ControlConfig,
    pub(crate) admin: SocketAddr,
    pub(crate) started: Timestamp,
    started_at: tokio::time::Instant,
    pub(crate) machine: machine::Machine,
    pub(crate) machines: machines::Room,
    /// Until another host has taken over.
    store: RefCell<Option<Rc<StoreWorker>>>,
    pub(crate) files: Worker<Blobs>,
    /// Whether the state still takes changes.
    pub(crate) health: Health,
    pub(crate) compilers: Rc<compile::Compilers>,
    /// What is compiled for: this host.
    pub(crate) target: Arc<compile::Target>,
    pub(crate) link: link::DataLink,
    /// Those of the data process that there is.
    pub(crate) walls: RefCell<Vec<Wall>>,
    pub(crate) ledger: RefCell<ledger::Ledger>,
    /// What volumes take, as data counted it last.
    pub(crate) volumes: RefCell<HashMap<VolumeId, Usage>>,
    pub(crate) trials: RefCell<trials::Trials>,
    pub(crate) logs: RefCell<logs::Logs>,
    pub(crate) events: events::Events,
    pub(crate) failures: auth::FailureLimit,
    pub(crate) in_progress: idempotency::InProgress,
    /// Services of which data does not know what is stored, for want of a file.
    pub(crate) untold: RefCell<std::collections::HashSet<insula_types::ServiceId>>,
    /// Held from the commit of a change until data has applied it.
    pub(crate) mutation: Mutex<()>,
    pub(crate) readiness: Cell<Readiness>,
    pub(crate) recompilation: Cell<recompile::Progress>,
    pub(crate) streams: Semaphore,
    /// Becomes true when streams have to end.
    pub(crate) stopping: watch::Sender<bool>,
    /// Whether a backup is being read: no file is removed meanwhile.
    pub(crate) backup_runs: Cell<bool>,
    tasks: RefCell<JoinSet<()>>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("readiness", &self.readiness)
            .finish_non_exhaustive()
    }
}

impl Control {
    /// Time since the start, for what only compares.
    pub(crate) fn uptime(&self) -> std::time::Duration {
        self.started_at.elapsed()
    }

    /// All that is intended has been told, with its code where it has any.
    fn all_is_served(&self) {
        if self.readiness.get() == Readiness::Reconciling {
            self.readiness.set(Readiness::Ready);
            self.events.host("host.ready");
        }
    }

    /// Runs a job on the state thread.
    pub(crate) async fn store<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut dyn Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Problem> {
        let health = self.health.clone();
        let worker = self.store.borrow().clone();
        let gone = || Problem::new(Code::Stopping, "another host has taken over");
        let worker = worker.ok_or_else(gone)?;
        let answer = worker.run(move |store| {
            let answer = job(store.as_mut());
            // Before the next job: it must not write any more.
            if let Err(StoreError::Disk(reason)) = &answer {
                health.stop(reason);
            }
            answer
        });
        Ok(answer.await??)
    }

    /// Lets go of the state. Nothing uses it any more but what waits for its end.
    fn close_store(&self) {
        self.store.take();
    }

    /// Starts a task that goes on when its starter goes away, and that the shutdown waits for.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let mut tasks = self.tasks.borrow_mut();
        while tasks.try_join_next().is_some() {}
        tasks.spawn_local(task);
    }

    /// Waits a little for the tasks that [`Control::spawn`] started, then ends them.
    async fn finish_tasks(&self) {
        let mut tasks = self.tasks.take();
        let finished = tokio::time::timeout(TASKS_GRACE, async {
            while tasks.join_next().await.is_some() {}
        });
        if finished.await.is_err() {
            tracing::warn!(tasks = tasks.len(), "requests were cut short");
        }
        tasks.shutdown().await;
    }

    /// Removes files that no version refers to. The mutation lock is held. What cannot be removed
    /// now is at the next start.
    pub(crate) async fn remove_files(&self, digests: Vec<Digest>) {
        if digests.is_empty() || self.backup_runs.get() {
            return;
        }
        let removed = self
            .files
            .run(move |files| digests.iter().try_for_each(|digest| files.remove(digest)));
        match removed.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "unused files were not removed"),
            Err(error) => tracing::warn!(%error, "unused files were not removed"),
        }
    }

    /// Removes what nothing refers to.
    pub(crate) async fn collect_garbage(&self) {
        let _mutation = self.mutation.lock().await;
        let Ok(referenced) = self.digests().await else {
            return;
        };
        let collected = self
            .files
            .run(move |files| files.collect_garbage(&referenced));
        if let Ok(Err(error)) = collected.await {
            tracing::warn!(%error, "unused files were not removed");
        }
    }

    /// Removes a component that was placed for nothing. The mutation lock is held.
    pub(crate) async fn remove_unreferenced(&self, digest: Digest) {
        if let Ok(digests) = self.digests().await
            && !digests.contains(&digest)
        {
            self.remove_files(vec![digest]).await;
        }
    }

    /// Adds what was counted to the stored sums.
    pub(crate) async fn checkpoint(&self) -> Result<(), Problem> {
        let machines = self.ledger.borrow_mut().take_pending_machines();
        if !machines.is_empty() {
            let parts: Vec<_> = machines.iter().map(|(t, sum)| (*t, *sum)).collect();
            let stored = self.store(move |store| store.add_machine_usage(&parts));
            if let Err(problem) = stored.await {
                self.ledger.borrow_mut().put_back_machines(&machines);
                return Err(problem);
            }
        }
        let pending = self.ledger.borrow_mut().take_pending();
        if pending.is_empty() {
            return Ok(());
        }
        let parts: Vec<_> = pending.iter().map(|((t, s), sum)| (*t, *s, *sum)).collect();
        let stored = self.store(move |store| store.add_usage(&parts)).await;
        if stored.is_err() {
            self.ledger.borrow_mut().put_back(&pending);
        }
        stored
    }

    /// Whether nothing refers to any of these any more.
    async fn are_gone(&self, digests: &[Digest]) -> bool {
        let stored = self.digests().await;
        stored.is_ok_and(|stored| !digests.iter().any(|digest| stored.contains(digest)))
    }

    /// All digests that versions, images and machines have.
    async fn digests(&self) -> Result<HashSet<Digest>, Problem> {
        self.store(|store| store.digests()).await
    }
}

/// SHA-256.
pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    sha2::Sha256::digest(bytes).into()
}

/// The host's ceiling on one request, as `/v1/host` shows it.
fn ceiling(limits: &RequestLimits) -> serde_json::Value {
    serde_json::json!(limits)
}
