//! A worker: one thread, one core, one runtime, one listener.
//!
//! The dispatcher is the runtime's main future; connections are its tasks. After a batch of
//! slices the dispatcher yields in the way that lets every ready connection run and the kernel be
//! asked for input before it is polled again.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use insula_scheduler::WorkerId;
use tokio::runtime::LocalOptions;
use tokio::sync::watch;

use super::Pool;
use super::batch::{self, After};
use crate::ingress::Ingress;

/// Why a worker could not start.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The listener could not be opened.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// No thread.
    #[error("cannot start a worker thread: {0}")]
    Thread(std::io::Error),
}

/// What the workers are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Accept nothing yet.
    Starting,
    /// Accept and serve.
    Serving,
    /// Accept nothing new, finish what runs.
    Draining,
    /// Leave.
    Ended,
}

/// Opens one listener per worker on one address. Port 0 is resolved once, for all of them.
///
/// # Errors
/// [`WorkerError::Listen`].
pub fn listeners(address: SocketAddr, workers: usize) -> Result<Vec<TcpListener>, WorkerError> {
    let mut address = address;
    let mut listeners = Vec::with_capacity(workers);
    for _ in 0..workers {
        let listener = listen(address).map_err(|source| WorkerError::Listen { address, source })?;
        address = listener
            .local_addr()
            .map_err(|source| WorkerError::Listen { address, source })?;
        listeners.push(listener);
    }
    Ok(listeners)
}

/// Connections that the kernel holds until we accept them.
const BACKLOG: i32 = 1024;

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Starts one worker.
///
/// # Errors
/// [`WorkerError::Thread`].
pub fn start(
    index: u16,
    listener: TcpListener,
    pool: Arc<Pool>,
    ingress: Arc<Ingress>,
    phase: watch::Receiver<Phase>,
) -> Result<JoinHandle<()>, WorkerError> {
    std::thread::Builder::new()
        .name(format!("insula-worker-{index}"))
        .spawn(move || {
            let core = pin_to_core(usize::from(index));
            pool.pinned(WorkerId::new(index), core);
            if let Err(error) = work(index, listener, &pool, ingress, phase) {
                tracing::error!(%error, index, "a worker has no runtime");
            }
        })
        .map_err(WorkerError::Thread)
}

/// A worker's life, on its own thread.
fn work(
    index: u16,
    listener: TcpListener,
    pool: &Pool,
    ingress: Arc<Ingress>,
    phase: watch::Receiver<Phase>,
) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .on_thread_unpark(batch::slept)
        .build_local(LocalOptions::default())?;
    let id = WorkerId::new(index);
    runtime.block_on(async {
        let accept = ingress.accept(listener, id, phase.clone());
        let accepting = tokio::task::spawn_local(accept);
        pool.enter(id);
        dispatch(pool, id, phase).await;
        accepting.abort();
    });
    // Connections that still stand are dropped with the runtime.
    Ok(())
}

/// Pins the calling thread to the `index`-th core that this process may use, and says which that is.
/// A refusal costs speed, nothing else.
fn pin_to_core(index: usize) -> Option<usize> {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let allowed = sched_getaffinity(None).ok()?;
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU)
        .filter(|core| allowed.is_set(*core))
        .collect();
    let core = *cores.get(index.checked_rem(cores.len())?)?;
    let mut only = CpuSet::new();
    only.set(core);
    match sched_setaffinity(None, &only) {
        Ok(()) => Some(core),
        Err(error) => {
            tracing::debug!(%error, index, "cannot pin a worker to its core");
            None
        }
    }
}

/// Serves the run queue until the pool has ended.
async fn dispatch(pool: &Pool, worker: WorkerId, mut phase: watch::Receiver<Phase>) {
    loop {
        match pool.run_batch() {
            After::Again => tokio::task::yield_now().await,
            After::Idle => {
                // Both branches only wait; nothing is lost when the other one wins.
                tokio::select! {
                    () = pool.wait(worker) => {}
                    changed = phase.changed() => if changed.is_err() { return },
                }
            }
            After::Until(at) => {
                tokio::select! {
                    () = pool.wait(worker) => {}
                    () = sleep_until(at) => {}
                    changed = phase.changed() => if changed.is_err() { return },
                }
            }
        }
        if *phase.borrow() == Phase::Ended {
            return;
        }
    }
}

async fn sleep_until(at: Instant) {
    tokio::time::sleep_until(at.into()).await;
}
