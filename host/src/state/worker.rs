//! A thread that owns a resource which blocks: the database, the blob files.
//!
//! Jobs wait in a bounded channel and run one after the other, so that the resource needs no lock
//! and the admin API's own thread never waits for a disk. Dropping the worker lets the queued
//! jobs finish and joins the thread.

use std::thread::JoinHandle;

use tokio::sync::{mpsc, oneshot};

/// Jobs that wait for a worker, at most; a caller beyond that waits for a place.
const JOBS_MAX: usize = 64;

type Job<S> = Box<dyn FnOnce(&mut S) + Send>;

/// The thread is gone: it panicked in an earlier job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the host's {0} thread has stopped; its log says why, and a restart of the host mends it")]
pub struct WorkerGone(&'static str);

/// A named thread and what it owns.
pub struct Worker<S> {
    name: &'static str,
    jobs: Option<mpsc::Sender<Job<S>>>,
    thread: Option<JoinHandle<()>>,
}

impl<S> std::fmt::Debug for Worker<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl<S: Send + 'static> Worker<S> {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(name: &'static str, mut owned: S) -> std::io::Result<Self> {
        let (jobs, mut queue) = mpsc::channel::<Job<S>>(JOBS_MAX);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                while let Some(job) = queue.blocking_recv() {
                    job(&mut owned);
                }
            })?;
        Ok(Self {
            name,
            jobs: Some(jobs),
            thread: Some(thread),
        })
    }

    /// Runs a job and waits for it without blocking the caller's thread. A caller that goes away
    /// does not stop a job that was queued.
    ///
    /// # Errors
    /// When the thread is gone.
    pub async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut S) -> T + Send + 'static,
    ) -> Result<T, WorkerGone> {
        let gone = WorkerGone(self.name);
        let (answer, answered) = oneshot::channel();
        let job: Job<S> = Box::new(move |owned| {
            // Nobody may be waiting any more; the work was done all the same.
            let _ = answer.send(job(owned));
        });
        self.jobs
            .as_ref()
            .ok_or(gone)?
            .send(job)
            .await
            .map_err(|_| gone)?;
        answered.await.map_err(|_| gone)
    }
}

impl<S> Drop for Worker<S> {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(thread = self.name, "the thread had panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_run_in_order_and_finish_before_drop() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let (seen, seen_in) = std::sync::mpsc::channel();
        let worker = Worker::start("insula-test", seen).unwrap();
        runtime.block_on(async {
            for number in 0..3 {
                worker
                    .run(move |seen| seen.send(number).unwrap())
                    .await
                    .unwrap();
            }
        });
        drop(worker);
        assert_eq!(seen_in.iter().collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn a_panic_is_reported_and_not_waited_for() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let worker = Worker::start("insula-test", ()).unwrap();
        let panicked = runtime.block_on(worker.run(|()| panic!("on purpose")));
        assert_eq!(panicked, Err(WorkerGone("insula-test")));
        assert!(runtime.block_on(worker.run(|()| ())).is_err());
    }
}
