//! The walls round the data process: what it gives up before the first request.
//!
//! ```text
//!  at the start      closes every descriptor but 0, 1, 2
//!  assignment, engine (the last files that it opens: /proc/self/pagemap, for wasmtime)
//!  before threads    the first process of a pid namespace (the spawner's part)
//!                    more likely to be killed for want of memory than control
//!                    mount namespace, an empty directory as its root, no queues of the host
//!                    bounds on descriptors, threads, files; no core dump
//!                    its own user, no capabilities but one, no new privileges, not dumpable
//!                    a filter: the system calls of [`CALLS`], which open files below directories that
//!                    were handed over, and connections to the Internet
//!                    killed by the kernel when control dies
//!  threads inherit all of it
//! ```
//!
//! What the kernel refuses is noted, said at the start and shown in `/v1/host`; the process runs with
//! what holds (decision 23). The measures are those of the machines' jail ([`insula_vmm::jail`]),
//! but for the network: connections are accepted from listeners that were bound outside, which a
//! namespace without interfaces would not hinder, but it would hinder guests' own requests.
//!
//! A call that is not in the list fails with `EPERM`. It does not kill, as in a machine's jail: a
//! path in a library that nobody foresaw must not end all tenants' requests.

use std::num::NonZeroU32;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use insula_vmm::jail::{self, Identity, Limits, Measure, Spec};
use rustix::process::{Resource, Signal, getrlimit, set_parent_process_death_signal};
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};

use super::filter::{self, ANY, NAMES, Only};
use crate::pool::clock::claims_can_change;

/// A user and a group that nobody else has: above what systems give to people and services, and
/// not among those of machines.
const DATA_USER: NonZeroU32 = NonZeroU32::new(1_879_048_193).unwrap();
/// Workers, runners and the few others.
const THREADS_MAX: u64 = 4_096;
/// What there can be (`off_t`): volumes have quotas of their own, and a call beyond a bound of the
/// process would not fail but end it (`setrlimit(2)`, RLIMIT_FSIZE).
const FILE_MAX_BYTES: u64 = i64::MAX.unsigned_abs();
/// Half-way to what is killed first (`proc_pid_oom_score_adj(5)`).
const OOM_SCORE: &str = "500";
/// To give a runner back the claim of any thread (decision 9, `sched(7)`). In a pid namespace of its
/// own it names no other process, and the filter lets no thread have a claim above the usual.
const OWN_CLAIMS: CapabilitySet = CapabilitySet::SYS_NICE;

/// One wall.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wall {
    /// What it is called.
    pub name: String,
    /// Why it does not hold, where it does not.
    pub missing: Option<String>,
}

impl Wall {
    pub(super) fn new(name: &str, outcome: Result<(), impl ToString>) -> Self {
        Self {
            name: name.to_owned(),
            missing: outcome.err().map(|why| why.to_string()),
        }
    }
}

/// In the order in which they are taken.
const MEASURES: [Measure; 11] = [
    Measure::PidNamespace,
    Measure::MountNamespace,
    Measure::EmptyRoot,
    Measure::IpcNamespace,
    Measure::UtsNamespace,
    Measure::CgroupNamespace,
    Measure::ResourceLimits,
    Measure::OwnUser,
    Measure::NoCapabilities,
    Measure::NoNewPrivileges,
    Measure::NotDumpable,
];

fn spec(root: PathBuf) -> Spec {
    let alone = rustix::process::getpid().is_init();
    let descriptors = getrlimit(Resource::Nofile).maximum;
    Spec {
        root,
        cgroups: Vec::new(),
        identity: Identity {
            user: DATA_USER,
            group: DATA_USER,
        },
        limits: Limits {
            descriptors: descriptors.unwrap_or(u64::from(u32::MAX)),
            file_bytes: FILE_MAX_BYTES,
            threads: THREADS_MAX,
        },
        capabilities: if alone {
            OWN_CLAIMS
        } else {
            CapabilitySet::empty()
        },
        keep: Vec::new(),
    }
}

fn took(spec: &Spec, measures: &[Measure]) -> Vec<Wall> {
    let outcome = |report: &jail::Report, measure: Measure| {
        let missing = report.missing().find(|(is, _)| *is == measure);
        missing.map_or(Ok(()), |(_, why)| Err(why.to_string()))
    };
    match jail::take(spec, measures) {
        Ok(report) => measures
            .iter()
            .map(|measure| Wall::new(word(*measure), outcome(&report, *measure)))
            .collect(),
        Err(not_alone) => measures
            .iter()
            .map(|measure| Wall::new(word(*measure), Err(&not_alone)))
            .collect(),
    }
}

/// What a measure is called as a wall.
fn word(measure: Measure) -> &'static str {
    match measure {
        Measure::NoCapabilities => "no capabilities but CAP_SYS_NICE",
        measure => measure.word(),
    }
}

/// Whose the files must be that the data process is to change, where it has a user of its own.
pub(crate) fn owner_of_files(walls: &[Wall]) -> Option<NonZeroU32> {
    let own = |wall: &&Wall| wall.name == Measure::OwnUser.word();
    let wall = walls.iter().find(own)?;
    wall.missing.is_none().then_some(DATA_USER)
}

/// First of all: lets go of what was inherited by mistake.
pub(super) fn close_descriptors(keep: &[RawFd]) -> Vec<Wall> {
    let spec = Spec {
        keep: keep.to_vec(),
        ..spec(PathBuf::new())
    };
    took(&spec, &[Measure::Descriptors])
}

/// Raises the walls, before the process has a second thread. `root` is an empty directory.
pub(super) fn raise(root: &Path) -> Vec<Wall> {
    let mut walls = vec![Wall::new("killed before control", oom_score())];
    walls.extend(took(&spec(root.to_owned()), &MEASURES));
    // After the last change of user, which takes it back. Where it is too late, the link is closed
    // already.
    let orphan = set_parent_process_death_signal(Some(Signal::KILL));
    walls.push(Wall::new("killed with control", orphan));
    walls.push(Wall::new("system calls", filter::apply(CALLS)));
    walls
}

/// Not against a thief but between tenants (decision 9): what is slow lets go of a core at once.
/// Tried behind the other walls, with a thread of its own.
pub(super) fn runners_give_way() -> Wall {
    let why = "the kernel gives no thread its claim back without CAP_SYS_NICE and an own pid \
               namespace, or RLIMIT_NICE: a request may wait some milliseconds beside slow ones";
    Wall::new(
        "runners give way",
        claims_can_change().then_some(()).ok_or(why),
    )
}

fn oom_score() -> std::io::Result<()> {
    std::fs::write("/proc/self/oom_score_adj", OOM_SCORE)
}

/// `linux/sched.h`: `SCHED_OTHER`, `SCHED_IDLE`.
const CLAIMS: Only = Only::One(1, &[0, 5]);
/// `FIONBIO`; `PAGEMAP_SCAN` and `FICLONE` of `linux/fs.h`.
const IOCTLS: Only = Only::One(1, &[0x5421, 0xc060_6610, 0x4004_9409]);
/// `AF_UNIX`.
const LOCAL: Only = Only::One(0, &[1]);
/// `AF_INET`, `AF_INET6`.
const INTERNET: Only = Only::One(0, &[2, 10]);

/// What the data process may ask of the kernel. Calls that are checked by their number alone cost
/// next to nothing: the kernel keeps a bitmap of them.
const CALLS: &[(i64, Only)] = &[
    // Bytes in and out of what is open.
    (libc::SYS_read, ANY),
    (libc::SYS_write, ANY),
    (libc::SYS_readv, ANY),
    (libc::SYS_writev, ANY),
    (libc::SYS_pread64, ANY),
    (libc::SYS_pwrite64, ANY),
    (libc::SYS_preadv, ANY),
    (libc::SYS_pwritev, ANY),
    (libc::SYS_lseek, ANY),
    (libc::SYS_fstat, ANY),
    (libc::SYS_statx, ANY),
    (libc::SYS_fcntl, ANY),
    (libc::SYS_close, ANY),
    (libc::SYS_ioctl, IOCTLS),
    // Volumes. A path begins at a directory that was handed over: the root is empty.
    (libc::SYS_openat, ANY),
    (libc::SYS_openat2, ANY),
    (libc::SYS_newfstatat, ANY),
    (libc::SYS_getdents64, ANY),
    (libc::SYS_readlinkat, ANY),
    (libc::SYS_mkdirat, ANY),
    (libc::SYS_unlinkat, ANY),
    (libc::SYS_renameat, ANY),
    (libc::SYS_renameat2, ANY),
    (libc::SYS_symlinkat, ANY),
    (libc::SYS_utimensat, ANY),
    (libc::SYS_fadvise64, ANY),
    (libc::SYS_fsync, ANY),
    (libc::SYS_fdatasync, ANY),
    (libc::SYS_syncfs, ANY),
    // One process at a time has a store of keys and values.
    (libc::SYS_flock, ANY),
    (libc::SYS_copy_file_range, ANY),
    (libc::SYS_dup, ANY),
    // Guests' requests: connections that go out. None is waited for that was bound here.
    (libc::SYS_socket, INTERNET),
    (libc::SYS_connect, ANY),
    // Connections: those that come.
    (libc::SYS_accept4, ANY),
    (libc::SYS_recvfrom, ANY),
    (libc::SYS_recvmsg, ANY),
    (libc::SYS_sendto, ANY),
    (libc::SYS_sendmsg, ANY),
    (libc::SYS_shutdown, ANY),
    (libc::SYS_getsockopt, ANY),
    (libc::SYS_setsockopt, ANY),
    (libc::SYS_getsockname, ANY),
    (libc::SYS_getpeername, ANY),
    (libc::SYS_socketpair, LOCAL),
    // Waiting.
    (libc::SYS_epoll_create1, ANY),
    (libc::SYS_epoll_ctl, ANY),
    (libc::SYS_epoll_wait, ANY),
    (libc::SYS_epoll_pwait, ANY),
    (libc::SYS_eventfd2, ANY),
    (libc::SYS_poll, ANY),
    (libc::SYS_ppoll, ANY),
    (libc::SYS_futex, ANY),
    (libc::SYS_nanosleep, ANY),
    (libc::SYS_clock_nanosleep, ANY),
    (libc::SYS_restart_syscall, ANY),
    // Time.
    (libc::SYS_clock_gettime, ANY),
    (libc::SYS_clock_getres, ANY),
    (libc::SYS_gettimeofday, ANY),
    // Memory: the allocator's, and that of guests and their code, which is compiled elsewhere but
    // has to be made executable here.
    (libc::SYS_brk, ANY),
    (libc::SYS_mmap, ANY),
    (libc::SYS_munmap, ANY),
    (libc::SYS_mremap, ANY),
    (libc::SYS_mprotect, ANY),
    (libc::SYS_madvise, ANY),
    (libc::SYS_memfd_create, ANY),
    (libc::SYS_ftruncate, ANY),
    (libc::SYS_membarrier, ANY),
    // Threads, and who of them goes first.
    (libc::SYS_clone, ANY),
    (libc::SYS_clone3, ANY),
    (libc::SYS_set_robust_list, ANY),
    (libc::SYS_rseq, ANY),
    (libc::SYS_exit, ANY),
    (libc::SYS_exit_group, ANY),
    (libc::SYS_getpid, ANY),
    (libc::SYS_gettid, ANY),
    (libc::SYS_sched_yield, ANY),
    (libc::SYS_sched_getaffinity, ANY),
    (libc::SYS_sched_setaffinity, ANY),
    (libc::SYS_sched_setscheduler, CLAIMS),
    (libc::SYS_prctl, NAMES),
    // Traps of guests, panics of ours.
    (libc::SYS_rt_sigaction, ANY),
    (libc::SYS_rt_sigprocmask, ANY),
    (libc::SYS_rt_sigreturn, ANY),
    (libc::SYS_sigaltstack, ANY),
    (libc::SYS_tgkill, Only::OwnThreads),
    (libc::SYS_getrandom, ANY),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_compiles() {
        assert!(filter::compiled(CALLS).is_ok());
    }

    #[test]
    fn nothing_in_the_list_listens_or_executes() {
        let never = [
            libc::SYS_open,
            libc::SYS_creat,
            libc::SYS_open_by_handle_at,
            libc::SYS_chroot,
            libc::SYS_link,
            libc::SYS_linkat,
            libc::SYS_mknodat,
            libc::SYS_fchmodat,
            libc::SYS_fchownat,
            libc::SYS_fsetxattr,
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_kill,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_pidfd_getfd,
            libc::SYS_unshare,
            libc::SYS_mount,
            libc::SYS_bpf,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
        ];
        for call in never {
            assert!(CALLS.iter().all(|(is, _)| *is != call), "{call}");
        }
    }
}
