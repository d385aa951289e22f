//! The walls round a compiler child, which parses what a tenant sent: what it gives up before it
//! reads the first byte.
//!
//! ```text
//!  limits itself, begins anew   see [`crate::engine::compile`]
//!  before threads               closes every descriptor but 0, 1, 2
//!                               an own user without capabilities, not dumpable   (as root)
//!                               no new privileges
//!                               killed by the kernel when control dies
//!                               a filter: memory, threads, and bytes in and out of what is open
//!  reads the component
//! ```
//!
//! Nothing in the list opens a file or makes a socket, so that there is neither a file system nor a
//! network for it. Without the filter nothing is compiled; what only root can give up is given up
//! where control is root.

use std::num::NonZeroU32;
use std::path::PathBuf;

use insula_vmm::jail::{self, Identity, Limits, Measure, Spec};
use rustix::process::{Signal, set_parent_process_death_signal};
use rustix::thread::CapabilitySet;

use super::filter::{self, ANY, NAMES, Only};

/// Beside that of the data process.
const COMPILER_USER: NonZeroU32 = NonZeroU32::new(1_879_048_194).unwrap();
/// Standard input, output, error.
const DESCRIPTORS: [i32; 3] = [0, 1, 2];
/// Those of a compilation are a handful; those of all compilations count as one user's.
const THREADS_MAX: u64 = 256;

/// In the order in which they are taken.
const MEASURES: [Measure; 6] = [
    Measure::Descriptors,
    Measure::ResourceLimits,
    Measure::OwnUser,
    Measure::NoCapabilities,
    Measure::NoNewPrivileges,
    Measure::NotDumpable,
];
/// Those that need no privilege.
const REQUIRED: [Measure; 3] = [
    Measure::Descriptors,
    Measure::ResourceLimits,
    Measure::NoNewPrivileges,
];

/// Raises the walls, before the process has a second thread. `file_max_bytes` is the most that it may
/// write.
pub(crate) fn shut_in(file_max_bytes: u64) -> Result<(), String> {
    let spec = Spec {
        root: PathBuf::new(),
        cgroups: Vec::new(),
        identity: Identity {
            user: COMPILER_USER,
            group: COMPILER_USER,
        },
        limits: Limits {
            descriptors: 16,
            file_bytes: file_max_bytes,
            threads: THREADS_MAX,
        },
        capabilities: CapabilitySet::empty(),
        keep: DESCRIPTORS.to_vec(),
    };
    let report = jail::take(&spec, &MEASURES).map_err(|error| error.to_string())?;
    report
        .require(&REQUIRED)
        .map_err(|error| error.to_string())?;
    // After the last change of user, which takes it back.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|error| error.to_string())?;
    filter::apply(CALLS)
}

/// What a compiler may ask of the kernel.
const CALLS: &[(i64, Only)] = &[
    // Bytes in and out of what is open.
    (libc::SYS_read, ANY),
    (libc::SYS_write, ANY),
    (libc::SYS_close, ANY),
    // Memory. wasmtime maps what it compiled, to look at its types.
    (libc::SYS_brk, ANY),
    (libc::SYS_mmap, ANY),
    (libc::SYS_munmap, ANY),
    (libc::SYS_mremap, ANY),
    (libc::SYS_mprotect, ANY),
    (libc::SYS_madvise, ANY),
    (libc::SYS_membarrier, ANY),
    // Threads.
    (libc::SYS_clone, ANY),
    (libc::SYS_clone3, ANY),
    (libc::SYS_set_robust_list, ANY),
    (libc::SYS_rseq, ANY),
    (libc::SYS_futex, ANY),
    (libc::SYS_sched_yield, ANY),
    (libc::SYS_sched_getaffinity, ANY),
    (libc::SYS_gettid, ANY),
    (libc::SYS_getpid, ANY),
    (libc::SYS_prctl, NAMES),
    (libc::SYS_exit, ANY),
    (libc::SYS_exit_group, ANY),
    // Time, and what hashes begin with.
    (libc::SYS_clock_gettime, ANY),
    (libc::SYS_getrandom, ANY),
    // Panics.
    (libc::SYS_rt_sigaction, ANY),
    (libc::SYS_rt_sigprocmask, ANY),
    (libc::SYS_rt_sigreturn, ANY),
    (libc::SYS_sigaltstack, ANY),
    (libc::SYS_tgkill, Only::OwnThreads),
];

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::net::UdpSocket;
    use std::process::Command;

    use super::*;

    /// Threads are behind filters one by one, so that one of this process can try it.
    #[test]
    fn behind_it_nothing_is_opened_reached_or_started() {
        let tried = std::thread::spawn(|| {
            rustix::thread::set_no_new_privs(true).expect("prctl(2)");
            assert!(std::fs::File::open("/proc/self/status").is_ok());
            filter::apply(CALLS).expect("a filter");
            [
                std::fs::File::open("/proc/self/status").err(),
                std::fs::File::create("/tmp/compiler").err(),
                std::net::TcpListener::bind("127.0.0.1:0").err(),
                UdpSocket::bind("127.0.0.1:0").err(),
                std::os::unix::net::UnixStream::connect("/nowhere").err(),
                Command::new("/bin/true").status().err(),
            ]
            .map(|error| error.map(|error| error.kind()))
        });
        let refused = tried.join().expect("it ends well");
        assert_eq!(refused, [Some(ErrorKind::PermissionDenied); 6]);
    }
}
