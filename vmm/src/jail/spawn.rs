//! Where a monitor, or the data process, is born: as the first process of a pid namespace of its own.
//!
//! A process cannot move itself into another pid namespace, so this is the spawner's part. The
//! kernel keeps "where my children are born" per thread; a thread made for this one spawn is told
//! so, spawns, and ends. Nothing happens to the other threads of the host, and no code runs
//! between fork and exec.
//!
//! As process 1 of its namespace it ignores every signal that it has no handler for, but `SIGKILL`
//! from outside; and whatever it might have forked dies with it.

use std::io;
use std::process::{Child, Command};
use std::thread;

use super::sys;

/// The allocator looks for memory nodes when a second thread first allocates, which no filter lets
/// it; told that there is one, it does not look. Which node a guest's memory is on is not decided
/// by the allocator.
const ONE_MEMORY_NODE: (&str, &str) = ("MIMALLOC_USE_NUMA_NODES", "1");

/// Which pid namespace a spawned process has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PidNamespace {
    /// Its own.
    Own,
    /// That of its spawner, which may not make one.
    Shared,
}

/// Spawns `command` in a new pid namespace; where that is not permitted, in the spawner's.
///
/// The child reports the same thing from the inside ([`super::Measure::PidNamespace`]).
///
/// # Errors
/// No thread or no process is to be had, or the program cannot be executed.
pub fn in_pid_namespace(command: &mut Command) -> io::Result<(Child, PidNamespace)> {
    command.env(ONE_MEMORY_NODE.0, ONE_MEMORY_NODE.1);
    thread::scope(|scope| {
        let spawner = thread::Builder::new()
            .name("spawn".to_owned())
            .spawn_scoped(scope, || {
                let namespace = match sys::unshare_pid_for_children() {
                    Ok(()) => PidNamespace::Own,
                    Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                        PidNamespace::Shared
                    }
                    Err(error) => return Err(error),
                };
                Ok((command.spawn()?, namespace))
            })?;
        spawner
            .join()
            .map_err(|_| io::Error::other("the spawning thread panicked"))?
    })
}

/// Does `job` on a thread that is in a network namespace of its own, which has nothing but a
/// loopback interface and ends with the thread; what the job spawns is in it as well.
///
/// # Errors
/// No thread is to be had, or the caller may not make namespaces.
pub fn in_own_network<T: Send>(job: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let alone = thread::Builder::new()
            .name("own-network".to_owned())
            .spawn_scoped(scope, || sys::unshare_network().map(|()| job()))?;
        alone
            .join()
            .map_err(|_| io::Error::other("the thread panicked"))?
    })
}
