//! CPU time, measured; and the threads' places before the kernel's scheduler.
#![allow(
    unsafe_code,
    reason = "three system calls that no crate wraps; see the SAFETY notes"
)]

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// CPU time of the calling thread, in nanoseconds. Half a microsecond per call on the machines
/// that we measured, so boundaries are shared: the end of one slice is the beginning of the next.
#[must_use]
pub fn thread_cpu_ns() -> u64 {
    ns(ClockId::ThreadCPUTime)
}

/// CPU time of another thread of this process, in nanoseconds; 0 when there is no such thread.
pub(super) fn other_thread_cpu_ns(tid: i32) -> u64 {
    /// `CPUCLOCK_SCHED | CPUCLOCK_PERTHREAD_MASK` of the kernel's
    /// `include/linux/posix-timers.h`: the low bits of a clock id made of a thread's id.
    const OF_A_THREAD: libc::clockid_t = 2 | 4;
    let clock = (!tid << 3) | OF_A_THREAD;
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: clock_gettime(2) writes one timespec through the pointer, which is to one of ours;
    // it refuses a clock that there is not.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return 0;
    }
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// A thread's claim on a core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// As any thread's: `SCHED_OTHER`.
    Normal,
    /// Only where nothing else runs: `SCHED_IDLE`.
    Leftover,
}

/// Changes a thread's claim; says whether the kernel allowed it. `tid` 0 is the calling thread.
pub(super) fn set_claim(tid: i32, claim: Claim) -> bool {
    let policy = match claim {
        Claim::Normal => libc::SCHED_OTHER,
        Claim::Leftover => libc::SCHED_IDLE,
    };
    // SAFETY: an all-zero sched_param is a valid one: it is the priority that both policies demand.
    let priority = unsafe { std::mem::zeroed::<libc::sched_param>() };
    // SAFETY: sched_setscheduler(2) reads one sched_param through the pointer, which is to one of
    // ours; it refuses a thread that there is not.
    unsafe { libc::sched_setscheduler(tid, policy, &raw const priority) == 0 }
}

/// How long a worker expects to have a core once it has it: a slice of a guest.
const WORKERS_SLICE: Duration = Duration::from_micros(100);

/// Asks for short slices for the calling thread and those that it starts: Linux 6.12 and later lets
/// such a thread have its core as soon as it wakes, beside threads with longer ones (EEVDF; sched(7),
/// `sched_setattr(2)`). Others do not, and ignore it. A thread whose claim [changes](set_claim) has the
/// length of any thread afterwards.
pub(crate) fn ask_for_short_slices() {
    // SAFETY: all zero is a valid sched_attr: SCHED_OTHER and nice 0.
    let mut attributes = unsafe { std::mem::zeroed::<libc::sched_attr>() };
    attributes.size = u32::try_from(size_of::<libc::sched_attr>()).unwrap_or(0);
    attributes.sched_nice = rustix::process::nice(0).unwrap_or(0);
    attributes.sched_runtime = u64::try_from(WORKERS_SLICE.as_nanos()).unwrap_or(0);
    // SAFETY: sched_setattr(2) reads as many bytes through the pointer as the size in them says.
    let _ = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}

/// Whether a thread of this process may be taken its claim and be given it back, which takes
/// `CAP_SYS_NICE` or a resource limit for it (sched(7), RLIMIT_NICE). Tried once.
pub(crate) fn claims_can_change() -> bool {
    static TRIED: OnceLock<bool> = OnceLock::new();
    *TRIED.get_or_init(|| {
        let there_and_back = || set_claim(0, Claim::Leftover) && set_claim(0, Claim::Normal);
        std::thread::spawn(there_and_back).join().unwrap_or(false)
    })
}

/// A stretch no longer than this is measured by the monotonic clock, which costs a twentieth of the
/// CPU clock. Whoever took the core from us in the middle of it took no more than that either.
const SHORT: Duration = Duration::from_micros(50);

/// Divides the CPU time of one thread at boundaries: each stretch ends where the next begins.
///
/// On failure: none. Where the kernel gave the core to another process within a short stretch, that
/// stretch is charged up to [`SHORT`] too much, and as much is taken from those that follow the next
/// reading of the CPU clock; the sum is always the thread's own.
#[derive(Debug)]
pub(super) struct Stopwatch {
    /// The monotonic clock at the last boundary.
    boundary: Instant,
    /// The CPU clock when it was last read.
    cpu_ns: u64,
    /// What the stretches since then were given, and too much before.
    given_ns: u64,
    /// What was given too much when the CPU clock was last read, and not yet taken back.
    debt_ns: u64,
}

impl Stopwatch {
    /// All CPU time of this thread so far belongs to the first stretch.
    pub(super) fn new() -> Self {
        Self {
            boundary: Instant::now(),
            cpu_ns: 0,
            given_ns: 0,
            debt_ns: 0,
        }
    }

    /// Ends a stretch of work at a new boundary, and says what CPU time it took.
    pub(super) fn lap(&mut self) -> (Instant, u64) {
        let now = Instant::now();
        let wall = now.saturating_duration_since(self.boundary);
        if wall > SHORT {
            return (now, self.read(now));
        }
        let ns = u64::try_from(wall.as_nanos()).unwrap_or(0);
        let back = ns.min(self.debt_ns);
        self.debt_ns -= back;
        let ns = ns - back;
        self.boundary = now;
        self.given_ns += ns;
        (now, ns)
    }

    /// CPU time of all stretches that have ended, in nanoseconds.
    pub(super) const fn sum_ns(&self) -> u64 {
        self.cpu_ns + self.given_ns
    }

    /// Ends a stretch in which the thread may have slept: it takes a reading of the CPU clock.
    pub(super) fn read(&mut self, now: Instant) -> u64 {
        let cpu_ns = thread_cpu_ns();
        let ns = cpu_ns
            .saturating_sub(self.cpu_ns)
            .saturating_sub(self.given_ns);
        // What was given too much is taken from later stretches.
        self.given_ns = self
            .given_ns
            .saturating_sub(cpu_ns.saturating_sub(self.cpu_ns));
        self.debt_ns = self.given_ns;
        self.cpu_ns = cpu_ns;
        self.boundary = now;
        ns
    }
}

/// CPU time of the whole process, in nanoseconds.
#[must_use]
pub fn process_cpu_ns() -> u64 {
    ns(ClockId::ProcessCPUTime)
}

fn ns(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds * 1_000_000_000 + nanos
}

/// CPU time of this process but for some of its threads, by their kernel ids, in nanoseconds.
/// Asks clocks only: a process that reaches no file can ask them too.
#[must_use]
pub(super) fn cpu_ns_without(threads: &[i32]) -> u64 {
    // The whole first: what runs on meanwhile must not make the rest too much.
    let whole = process_cpu_ns();
    let theirs: u64 = threads.iter().map(|tid| other_thread_cpu_ns(*tid)).sum();
    whole.saturating_sub(theirs)
}

/// One tick of the kernel's books (`USER_HZ`, 100 on every Linux that we know).
const TICK_NS: u64 = 10_000_000;

/// CPU time of the children that this process has waited for, in nanoseconds, by the kernel's books.
#[must_use]
pub fn children_cpu_ns() -> u64 {
    // proc(5): fields 16 and 17 of the process are those of its waited-for children.
    let own = std::fs::read_to_string("/proc/self/stat");
    own.map_or(0, |stat| sum_fields(&stat, 16..=17)) * TICK_NS
}

/// CPU time of this process and its children that others than the host pay for.
static PAID_BY_OTHERS_NS: AtomicU64 = AtomicU64::new(0);

/// So much of this process's own time, or of that of children which it has waited for, is charged
/// elsewhere.
pub fn paid_by_others(cpu_ns: u64) {
    PAID_BY_OTHERS_NS.fetch_add(cpu_ns, Ordering::Relaxed);
}

/// CPU time of this process and of the children that it has waited for, but for what others pay.
#[must_use]
pub fn own_cpu_ns() -> u64 {
    let others = PAID_BY_OTHERS_NS.load(Ordering::Relaxed);
    (process_cpu_ns() + children_cpu_ns()).saturating_sub(others)
}

/// CPU time of a child that was not waited for yet, in nanoseconds, by the kernel's books.
#[must_use]
pub fn child_cpu_ns(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    // proc(5): fields 14 and 15, counted after the name, which may hold anything.
    stat.map_or(0, |stat| sum_fields(&stat, 14..=15)) * TICK_NS
}

/// The sum of some fields of a `stat` line, numbered as in proc(5).
fn sum_fields(stat: &str, fields: std::ops::RangeInclusive<usize>) -> u64 {
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    // What follows the name is field 3.
    after_name
        .split_whitespace()
        .skip(fields.start() - 3)
        .take(fields.end() - fields.start() + 1)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_fields_are_found_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 100 0 0 0 12 34 56 78 20 0 1 0 5";
        assert_eq!(sum_fields(stat, 14..=15), 46);
        assert_eq!(sum_fields(stat, 16..=17), 134);
        assert_eq!(sum_fields("garbage", 14..=15), 0);
    }

    #[test]
    fn stretches_add_up_to_the_threads_own_time() {
        let spin = |wall: Duration| {
            let begin = Instant::now();
            while begin.elapsed() < wall {}
        };
        let mut watch = Stopwatch::new();
        let first = watch.read(Instant::now());
        let mut sum = 0;
        for round in 0..400 {
            spin(Duration::from_micros(if round % 7 == 0 { 120 } else { 15 }));
            sum += watch.lap().1;
        }
        std::thread::sleep(Duration::from_millis(20));
        sum += watch.read(Instant::now());
        let whole = thread_cpu_ns() - first;
        assert!(sum <= whole, "{sum} of {whole} ns");
        assert!(sum + 200_000 >= whole, "{sum} of {whole} ns");
    }

    #[test]
    fn what_was_given_too_much_is_taken_from_what_follows() {
        const TOO_MUCH: u64 = 2_000_000;
        let mut watch = Stopwatch::new();
        watch.read(Instant::now());
        // As if others had had the core in many short stretches.
        watch.given_ns += TOO_MUCH;
        let begin = thread_cpu_ns();
        assert_eq!(watch.read(Instant::now()), 0);
        let mut given = 0;
        while thread_cpu_ns() - begin < TOO_MUCH / 2 {
            given += watch.lap().1;
        }
        assert_eq!(given, 0, "half of it is not taken back yet");
        while thread_cpu_ns() - begin < 2 * TOO_MUCH {
            given += watch.lap().1;
        }
        assert!(given > TOO_MUCH / 2, "{given} ns after it was");
    }

    #[test]
    fn another_threads_clock_is_its_own() {
        let own = thread_cpu_ns();
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let seen = std::thread::spawn(move || other_thread_cpu_ns(tid)).join();
        let seen = seen.unwrap();
        assert!(seen >= own, "{seen} after {own}");
        // One more than the kernel's largest (proc(5), /proc/sys/kernel/pid_max).
        assert_eq!(other_thread_cpu_ns(4_194_305), 0, "no such thread");
    }

    #[test]
    fn the_thread_clock_counts_work_and_not_sleep() {
        let begin = thread_cpu_ns();
        std::thread::sleep(std::time::Duration::from_millis(30));
        let slept = thread_cpu_ns() - begin;
        assert!(slept < 20_000_000, "{slept} ns of CPU while sleeping");
        assert!(process_cpu_ns() >= slept);
    }
}
