//! How the monitor starts its threads: each has a kind, and a hook that runs first on it, where
//! the jail puts the kind's system call filter.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
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

/// Runs first on each new thread.
type Hook = dyn Fn(ThreadKind) -> io::Result<()> + Send + Sync;

/// What runs first on every thread of the monitor. Cheap to clone.
#[derive(Clone)]
pub struct Threads {
    hook: Arc<Hook>,
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
        }
    }

    /// Starts a thread, and waits until its hook has run.
    ///
    /// # Errors
    /// No thread is to be had, or the hook failed; `body` has not run then.
    pub fn spawn<T: Send + 'static>(
        &self,
        kind: ThreadKind,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<Option<T>>> {
        let hook = Arc::clone(&self.hook);
        let (tell, hooked) = sync_channel(1);
        let thread = thread::Builder::new()
            .name(kind.to_string())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let outcome = hook(kind);
                drop(hook);
                let ready = outcome.is_ok();
                // Nobody listens only where `spawn` itself is gone.
                let _ = tell.send(outcome);
                ready.then(body)
            })?;
        match hooked.recv() {
            Ok(Ok(())) => Ok(thread),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the thread's hook panicked")),
        }
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
        let refused = threads.spawn(ThreadKind::Vcpu(0), || unreachable!("the hook failed"));
        assert_eq!(
            refused.expect_err("the hook failed").kind(),
            io::ErrorKind::PermissionDenied
        );
        let thread = threads.spawn(ThreadKind::Vcpu(1), || 7).expect("a thread");
        assert_eq!(thread.join().expect("no panic"), Some(7));
    }
}
