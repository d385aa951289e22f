//! How the monitor starts its threads: each has a kind, and a hook that runs first on it, where
//! the jail puts the kind's system call filter. Hooks take a while, so that nobody waits for one
//! before the next thread is started: whoever lets the guest run waits for all of them.

use std::fmt;
use std::io;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crate::virtio::DeviceKind;

/// What a thread does, and so which system calls it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs one vCPU.
    Vcpu(u8),
    /// Runs one virtio device.
    Device(DeviceKind),
    /// Moves console input into the serial port.
    Console,
    /// Waits for the time at which the guest's watchdog runs out.
    Watchdog,
}

impl fmt::Display for ThreadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vcpu(number) => write!(f, "vcpu-{number}"),
            Self::Device(kind) => write!(f, "virtio-{}", kind.name()),
            Self::Console => f.write_str("console"),
            Self::Watchdog => f.write_str("watchdog"),
        }
    }
}

/// No thread of ours recurses. And a stack of two MiB, as it is otherwise, may be given to us as one
/// large page.
const STACK_BYTES: usize = 256 << 10;

/// A thread of this process, before it is started.
pub(crate) fn named(name: impl ToString) -> thread::Builder {
    thread::Builder::new()
        .name(name.to_string())
        .stack_size(STACK_BYTES)
}

/// Runs first on each new thread.
type Hook = dyn Fn(ThreadKind) -> io::Result<()> + Send + Sync;

/// What runs first on every thread of the monitor. Cheap to clone.
#[derive(Clone)]
pub struct Threads {
    hook: Arc<Hook>,
    /// What came of hooks that nobody has asked for yet.
    hooked: Arc<Mutex<Vec<Receiver<io::Result<()>>>>>,
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Threads")
    }
}

impl Default for Threads {
    /// Nothing runs first: a monitor without a jail, in tests.
    fn default() -> Self {
        Self::new(|_| Ok(()))
    }
}

impl Threads {
    /// `hook` runs first on each thread, and if it fails the thread ends there.
    pub fn new(hook: impl Fn(ThreadKind) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self {
            hook: Arc::new(hook),
            hooked: Arc::default(),
        }
    }

    /// Starts a thread. If its hook fails, `body` never runs, and [`ready`](Self::ready) says so.
    ///
    /// # Errors
    /// No thread is to be had.
    pub fn spawn<T: Send + 'static>(
        &self,
        kind: ThreadKind,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<Option<T>>> {
        let hook = Arc::clone(&self.hook);
        let (tell, hooked) = sync_channel(1);
        let thread = named(kind).spawn(move || {
            let outcome = hook(kind);
            drop(hook);
            let ready = outcome.is_ok();
            // Nobody listens where the machine is not to be after all.
            let _ = tell.send(outcome);
            ready.then(body)
        })?;
        self.lock().push(hooked);
        Ok(thread)
    }

    /// Waits until the hooks of all threads that were started have run.
    ///
    /// # Errors
    /// One of them failed.
    pub fn ready(&self) -> io::Result<()> {
        let hooked = std::mem::take(&mut *self.lock());
        for hooked in hooked {
            match hooked.recv() {
                Ok(outcome) => outcome?,
                Err(_) => return Err(io::Error::other("a thread's hook panicked")),
            }
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Receiver<io::Result<()>>>> {
        // Nothing that holds it panics half way.
        self.hooked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hook_runs_first_and_on_the_thread() {
        let threads = Threads::new(|kind| match kind {
            ThreadKind::Vcpu(0) => Err(io::ErrorKind::PermissionDenied.into()),
            _ => {
                assert_eq!(thread::current().name(), Some("vcpu-1"));
                Ok(())
            }
        });
        let spawn = |number, body: fn() -> u8| {
            let thread = threads.spawn(ThreadKind::Vcpu(number), body);
            thread.expect("a thread").join().expect("no panic")
        };
        assert_eq!(spawn(1, || 7), Some(7));
        threads.ready().expect("its hook was content");
        assert_eq!(spawn(0, || unreachable!("the hook failed")), None);
        assert_eq!(spawn(1, || 7), Some(7));
        let refused = threads.ready().expect_err("the hook failed");
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        threads.ready().expect("that has been said");
    }

    #[test]
    fn ready_waits_for_hooks_that_take_long() {
        let (go, gone) = sync_channel::<()>(0);
        let gone = Mutex::new(gone);
        let threads = Threads::new(move |_| {
            let gone = gone.lock().expect("no panic");
            gone.recv().map_err(io::Error::other)
        });
        let (ran, has_run) = sync_channel(1);
        let thread = threads.spawn(ThreadKind::Console, move || ran.send(()));
        let thread = thread.expect("a thread");
        let waiting = thread::spawn(move || threads.ready());
        assert!(has_run.try_recv().is_err(), "its hook has not run");
        assert!(!waiting.is_finished());
        go.send(()).expect("the hook waits");
        waiting
            .join()
            .expect("no panic")
            .expect("its hook is content");
        thread.join().expect("no panic");
        has_run.recv().expect("the body ran");
    }
}
