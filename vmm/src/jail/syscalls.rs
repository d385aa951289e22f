//! The table of system calls that a monitor's threads may make, and why. What is not in it kills
//! the process.
//!
//! The table is what a thread needs *after* its filter is installed: threads are started, memory is
//! mapped and KVM is configured before. `docs/threat-model.md` shows it, and a test holds the two
//! together.

use std::fmt::Write;

use Kind::{Api, Device, Vcpu};

/// What a thread does, as far as its filter is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Runs one vCPU: `KVM_RUN`, and the device registers that the guest touches.
    Vcpu,
    /// Runs one virtio device, or moves console bytes.
    Device,
    /// The first thread: speaks with the host, stops and resumes the others.
    Api,
}

impl Kind {
    /// All of them, in the order of the table's columns.
    pub const ALL: [Self; 3] = [Vcpu, Device, Api];
}

/// What an argument must be, where a call is not allowed as such.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Only {
    /// Whatever they are.
    AnyArguments,
    /// No memory that can be executed: `PROT_EXEC` is not in argument 2.
    NotExecutable,
    /// `AF_UNIX` in argument 0.
    UnixSocket,
    /// This in argument 0.
    Operation(u32),
    /// One of these in argument 1.
    Commands(&'static [u32]),
    /// One of these in argument 2.
    Advice(&'static [u32]),
}

impl Only {
    /// For the document.
    const fn words(self) -> &'static str {
        match self {
            Self::AnyArguments => "",
            Self::NotExecutable => "without `PROT_EXEC`",
            Self::UnixSocket => "`AF_UNIX`",
            Self::Operation(_) => "listed operation",
            Self::Commands(_) => "listed commands",
            Self::Advice(_) => "listed advice",
        }
    }
}

/// One line: a call, who may make it, how, and what for.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Its name, as in its manual page.
    pub name: &'static str,
    /// Its number on x86-64.
    pub number: i64,
    /// The threads that may.
    pub kinds: &'static [Kind],
    /// With which arguments.
    pub only: Only,
    /// What for.
    pub reason: &'static str,
}

macro_rules! rows {
    ($($call:ident [$($kind:ident)*] $only:expr, $reason:literal;)*) => {
        &[$(Row {
            // The constant's name without its "SYS_".
            name: stringify!($call).split_at(4).1,
            number: libc::$call,
            kinds: &[$($kind),*],
            only: $only,
            reason: $reason,
        }),*]
    };
}

const ANY: Only = Only::AnyArguments;

/// The table.
pub const TABLE: &[Row] = rows! {
    // What the language's run time and the C library do on any thread.
    SYS_brk [Vcpu Device Api] ANY, "allocator";
    SYS_mmap [Vcpu Device Api] Only::NotExecutable, "allocator, snapshot memory";
    SYS_mprotect [Vcpu Device Api] Only::NotExecutable, "allocator's arenas";
    SYS_mremap [Vcpu Device Api] ANY, "allocator";
    SYS_munmap [Vcpu Device Api] ANY, "allocator, the end of a thread";
    SYS_madvise [Vcpu Device Api] Only::Advice(ADVICE), "allocator, the end of a thread, balloon";
    SYS_prctl [Vcpu Device Api] Only::Operation(PR_SET_VMA), "allocator: names its mappings";
    SYS_futex [Vcpu Device Api] ANY, "locks, channels, joining threads";
    SYS_sched_yield [Vcpu Device Api] ANY, "locks";
    SYS_clock_gettime [Vcpu Device Api] ANY, "where the clock has no fast path; CPU time";
    SYS_clock_nanosleep [Vcpu Device Api] ANY, "waits with a time";
    SYS_restart_syscall [Vcpu Device Api] ANY, "a wait that was stopped and continued";
    SYS_rt_sigreturn [Vcpu Device Api] ANY, "the end of a signal handler";
    SYS_rt_sigprocmask [Vcpu Device Api] ANY, "the end of a thread, abort";
    SYS_sigaltstack [Vcpu Device Api] ANY, "the end of a thread";
    SYS_gettid [Vcpu Device Api] ANY, "panic messages, abort";
    SYS_getpid [Vcpu Device Api] ANY, "abort, signals to own threads";
    SYS_tgkill [Vcpu Device Api] ANY, "kicks a vCPU out of the guest; abort";
    SYS_getrandom [Vcpu Device Api] ANY, "virtio-rng, hash seeds, generation id";
    SYS_exit [Vcpu Device Api] ANY, "the end of a thread";
    SYS_exit_group [Vcpu Device Api] ANY, "the end of the process";
    // Bytes in and out of descriptors that are open.
    SYS_read [Vcpu Device Api] ANY, "event descriptors, console, tap, disk";
    SYS_write [Vcpu Device Api] ANY, "event descriptors, console, tap, disk, log";
    SYS_close [Vcpu Device Api] ANY, "connections that ended";
    SYS_ioctl [Vcpu] Only::Commands(VCPU_COMMANDS), "`KVM_RUN`; vCPU state for snapshots";
    SYS_ioctl [Device] Only::Commands(DEVICE_COMMANDS), "non-blocking sockets; tap; interrupts";
    SYS_ioctl [Api] Only::Commands(API_COMMANDS), "VM state for snapshots; non-blocking sockets; tap";
    SYS_readv [Device Api] ANY, "tap, sockets";
    SYS_writev [Vcpu Device Api] ANY, "tap, sockets, console";
    SYS_pread64 [Device Api] ANY, "disk, snapshot";
    SYS_pwrite64 [Device Api] ANY, "disk, snapshot";
    SYS_preadv [Device] ANY, "disk";
    SYS_pwritev [Device] ANY, "disk";
    SYS_lseek [Device Api] ANY, "disk: holes; snapshot";
    SYS_fallocate [Device] ANY, "disk: discard, write zeroes";
    SYS_fdatasync [Device Api] ANY, "disk: flush; snapshot";
    SYS_fsync [Device Api] ANY, "disk: flush; snapshot";
    SYS_ftruncate [Api] ANY, "the size of a snapshot";
    SYS_fstat [Device Api] ANY, "the size of an open file";
    SYS_statx [Device Api] ANY, "the size of an open file";
    SYS_fcntl [Device Api] ANY, "non-blocking, close-on-exec";
    // Waiting.
    SYS_epoll_create1 [Device Api] ANY, "event loop";
    SYS_epoll_ctl [Device Api] ANY, "event loop";
    SYS_epoll_wait [Device Api] ANY, "event loop";
    SYS_epoll_pwait [Device Api] ANY, "event loop";
    SYS_poll [Device Api] ANY, "event loop";
    SYS_ppoll [Device Api] ANY, "event loop";
    SYS_eventfd2 [Device Api] ANY, "wakes a thread";
    SYS_timerfd_create [Device Api] ANY, "rate limits, statistics";
    SYS_timerfd_settime [Device Api] ANY, "rate limits, statistics";
    // Sockets of the local kind: there is no network in here.
    SYS_socket [Device] Only::UnixSocket, "vsock: a port of the host's side";
    SYS_connect [Device] ANY, "vsock: a port of the host's side";
    SYS_accept4 [Device Api] ANY, "vsock, the control connection";
    SYS_sendto [Device Api] ANY, "vsock, the control connection";
    SYS_recvfrom [Device Api] ANY, "vsock, the control connection";
    SYS_sendmsg [Device Api] ANY, "vsock, the control connection";
    SYS_recvmsg [Device Api] ANY, "vsock, the control connection and its descriptors";
    SYS_shutdown [Device Api] ANY, "vsock, the control connection";
    SYS_getsockopt [Device Api] ANY, "errors of a connection; the peer's user";
};

/// `madvise`: what the allocator, the end of a thread and the balloon say. All of it concerns our
/// own mappings only; `MADV_HWPOISON` and the like are not for us.
const ADVICE: &[u32] = &[
    libc::MADV_DONTNEED.unsigned_abs(),
    libc::MADV_FREE.unsigned_abs(),
    libc::MADV_REMOVE.unsigned_abs(),
    libc::MADV_HUGEPAGE.unsigned_abs(),
    libc::MADV_NOHUGEPAGE.unsigned_abs(),
    libc::MADV_DONTDUMP.unsigned_abs(),
];

/// `linux/prctl.h`: says what a mapping is for, in `/proc/PID/maps`.
const PR_SET_VMA: u32 = 0x5356_4d41;

const FIONBIO: u32 = 0x5421;

/// `KVM_IRQ_LINE`: an interrupt, where KVM has no irqfd.
const IRQ_LINE: u32 = kvm(SET, 0x61, size_of::<kvm_bindings::kvm_irq_level>());

/// `linux/if_tun.h`: what the kernel may leave to the driver, and the length of its header.
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;

const DEVICE_COMMANDS: &[u32] = &[FIONBIO, IRQ_LINE, TUNSETOFFLOAD];

/// `_IOC(direction, KVMIO, number, size)` of `asm-generic/ioctl.h`, with `KVMIO` = 0xae.
const fn kvm(direction: u32, number: u32, size: usize) -> u32 {
    assert!(size < 1 << 14, "the size has 14 bits");
    #[expect(clippy::cast_possible_truncation, reason = "asserted above")]
    let size = size as u32;
    (direction << 30) | (size << 16) | (0xae << 8) | number
}

const NONE: u32 = 0;
/// The kernel reads our memory.
const SET: u32 = 1;
/// The kernel writes our memory.
const GET: u32 = 2;

/// The commands for one vCPU, numbered in `linux/kvm.h`.
const VCPU_COMMANDS: &[u32] = {
    use std::mem::size_of;

    use kvm_bindings::{
        kvm_cpuid2, kvm_debugregs, kvm_fpu, kvm_interrupt, kvm_lapic_state, kvm_mp_state, kvm_msrs,
        kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
    };
    &[
        IRQ_LINE,
        kvm(NONE, 0x80, 0),                            // KVM_RUN
        kvm(GET, 0x81, size_of::<kvm_regs>()),         // KVM_GET_REGS
        kvm(SET, 0x82, size_of::<kvm_regs>()),         // KVM_SET_REGS
        kvm(GET, 0x83, size_of::<kvm_sregs>()),        // KVM_GET_SREGS
        kvm(SET, 0x84, size_of::<kvm_sregs>()),        // KVM_SET_SREGS
        kvm(SET, 0x86, size_of::<kvm_interrupt>()),    // KVM_INTERRUPT
        kvm(GET | SET, 0x88, size_of::<kvm_msrs>()),   // KVM_GET_MSRS
        kvm(SET, 0x89, size_of::<kvm_msrs>()),         // KVM_SET_MSRS
        kvm(GET, 0x8c, size_of::<kvm_fpu>()),          // KVM_GET_FPU
        kvm(SET, 0x8d, size_of::<kvm_fpu>()),          // KVM_SET_FPU
        kvm(GET, 0x8e, size_of::<kvm_lapic_state>()),  // KVM_GET_LAPIC
        kvm(SET, 0x8f, size_of::<kvm_lapic_state>()),  // KVM_SET_LAPIC
        kvm(SET, 0x90, size_of::<kvm_cpuid2>()),       // KVM_SET_CPUID2
        kvm(GET | SET, 0x91, size_of::<kvm_cpuid2>()), // KVM_GET_CPUID2
        kvm(GET, 0x98, size_of::<kvm_mp_state>()),     // KVM_GET_MP_STATE
        kvm(SET, 0x99, size_of::<kvm_mp_state>()),     // KVM_SET_MP_STATE
        kvm(NONE, 0x9a, 0),                            // KVM_NMI
        kvm(GET, 0x9f, size_of::<kvm_vcpu_events>()),  // KVM_GET_VCPU_EVENTS
        kvm(SET, 0xa0, size_of::<kvm_vcpu_events>()),  // KVM_SET_VCPU_EVENTS
        kvm(GET, 0xa1, size_of::<kvm_debugregs>()),    // KVM_GET_DEBUGREGS
        kvm(SET, 0xa2, size_of::<kvm_debugregs>()),    // KVM_SET_DEBUGREGS
        kvm(NONE, 0xa2, 0),                            // KVM_SET_TSC_KHZ
        kvm(NONE, 0xa3, 0),                            // KVM_GET_TSC_KHZ
        kvm(GET, 0xa4, size_of::<kvm_xsave>()),        // KVM_GET_XSAVE
        kvm(SET, 0xa5, size_of::<kvm_xsave>()),        // KVM_SET_XSAVE
        kvm(GET, 0xa6, size_of::<kvm_xcrs>()),         // KVM_GET_XCRS
        kvm(SET, 0xa7, size_of::<kvm_xcrs>()),         // KVM_SET_XCRS
        kvm(NONE, 0xad, 0),                            // KVM_KVMCLOCK_CTRL
        kvm(GET, 0xcf, size_of::<kvm_xsave>()),        // KVM_GET_XSAVE2
    ]
};

/// The commands for the machine as a whole that a snapshot needs.
const API_COMMANDS: &[u32] = {
    use std::mem::size_of;

    use kvm_bindings::{kvm_clock_data, kvm_irqchip, kvm_pit_state2};
    &[
        FIONBIO,
        IRQ_LINE,
        TUNSETVNETHDRSZ,
        kvm(GET | SET, 0x62, size_of::<kvm_irqchip>()), // KVM_GET_IRQCHIP
        kvm(GET, 0x63, size_of::<kvm_irqchip>()),       // KVM_SET_IRQCHIP (_IOR in linux/kvm.h)
        kvm(SET, 0x7b, size_of::<kvm_clock_data>()),    // KVM_SET_CLOCK
        kvm(GET, 0x7c, size_of::<kvm_clock_data>()),    // KVM_GET_CLOCK
        kvm(GET, 0x9f, size_of::<kvm_pit_state2>()),    // KVM_GET_PIT2
        kvm(SET, 0xa0, size_of::<kvm_pit_state2>()),    // KVM_SET_PIT2
    ]
};

/// The calls of one kind of thread.
pub fn of(kind: Kind) -> impl Iterator<Item = &'static Row> {
    TABLE.iter().filter(move |row| row.kinds.contains(&kind))
}

/// The table as it stands in the threat model.
#[must_use]
pub fn markdown() -> String {
    let mut text =
        String::from("| system call | vCPU | device | API | what for |\n|---|---|---|---|---|\n");
    for row in TABLE {
        let only = row.only.words();
        let space = if only.is_empty() { "" } else { ", " };
        let mark = |kind| if row.kinds.contains(&kind) { "✓" } else { "" };
        let [vcpu, device, api] = Kind::ALL.map(mark);
        // Writing to a String does not fail.
        let _ = writeln!(
            text,
            "| `{}`{space}{only} | {vcpu} | {device} | {api} | {} |",
            row.name, row.reason
        );
    }
    let [vcpu, device, api] = Kind::ALL.map(|kind| of(kind).count());
    let _ = writeln!(text, "| *all* | {vcpu} | {device} | {api} | |");
    text
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// The bound that the threat model promises for the busiest kind.
    const MOST: usize = 60;

    #[test]
    fn no_kind_may_make_more_than_sixty_calls() {
        for kind in Kind::ALL {
            let numbers: HashSet<i64> = of(kind).map(|row| row.number).collect();
            assert!(numbers.len() <= MOST, "{kind:?}: {}", numbers.len());
            // One row each: a second one would quietly widen the first.
            assert_eq!(numbers.len(), of(kind).count(), "{kind:?}");
        }
    }

    #[test]
    fn nobody_opens_executes_or_starts_anything() {
        for row in TABLE {
            for word in [
                "open", "exec", "clone", "fork", "ptrace", "mount", "kexec", "bpf",
            ] {
                assert!(!row.name.contains(word), "{}", row.name);
            }
        }
        assert!(!of(Kind::Vcpu).any(|row| ["socket", "connect", "pwrite64"].contains(&row.name)));
    }

    /// Against numbers printed by a C program that includes `linux/kvm.h`.
    #[test]
    fn commands_are_the_kernels() {
        assert_eq!(u64::from(TUNSETOFFLOAD), libc::TUNSETOFFLOAD);
        assert_eq!(u64::from(TUNSETVNETHDRSZ), libc::TUNSETVNETHDRSZ);
        for command in [0xae80, 0x8090_ae81, 0xc008_ae88, 0x9000_aea4, 0x4008_ae89] {
            assert!(VCPU_COMMANDS.contains(&command), "{command:#x}");
        }
        for command in [
            0x4030_ae7b,
            0x8030_ae7c,
            0xc208_ae62,
            0x8208_ae63,
            0x8070_ae9f,
        ] {
            assert!(API_COMMANDS.contains(&command), "{command:#x}");
        }
    }

    #[test]
    fn the_document_shows_the_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/threat-model.md");
        let document = std::fs::read_to_string(path).expect("docs/threat-model.md");
        assert!(
            document.contains(&markdown()),
            "docs/threat-model.md must contain this:\n\n{}",
            markdown()
        );
    }
}
