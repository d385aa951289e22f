//! What a monitor's threads used, as the kernel counts it.

use std::fs;
use std::time::Duration;

/// Since the threads started. A thread that ended is not in it: a monitor's threads live as long as
/// its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Times {
    /// On a processor, guest and monitor together.
    pub(crate) ran: Duration,
    /// Ready to run, and waiting for a processor.
    pub(crate) waited: Duration,
    /// Memory that the process keeps, its guest's included.
    pub(crate) resident_bytes: u64,
}

impl Times {
    /// Reads them. `None` when the process is gone.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let mut times = Self::default();
        for task in fs::read_dir(format!("/proc/{pid}/task")).ok()? {
            let Ok(text) = fs::read_to_string(task.ok()?.path().join("schedstat")) else {
                continue;
            };
            let (ran, waited) = parse(&text)?;
            times.ran = times.ran.saturating_add(ran);
            times.waited = times.waited.saturating_add(waited);
        }
        let pages = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
        let pages: u64 = pages.split(' ').nth(1)?.parse().ok()?;
        let page = u64::try_from(rustix::param::page_size()).unwrap_or(4096);
        times.resident_bytes = pages.saturating_mul(page);
        Some(times)
    }
}

/// On a processor, all threads of a process together, those that ended too. Of a process that is
/// over as well, until its parent has waited for it.
pub(crate) fn all_that_ran(pid: u32) -> Option<Duration> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Fields 14 and 15, `utime` and `stime` (proc_pid_stat(5)): what precedes them may be anything but
/// a closing parenthesis.
fn parse_stat(text: &str) -> Option<Duration> {
    let (_, after) = text.rsplit_once(')')?;
    let mut fields = after.split_whitespace().skip(11).map(str::parse::<u64>);
    let (user, system) = (fields.next()?.ok()?, fields.next()?.ok()?);
    let each = 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1);
    Some(Duration::from_nanos(
        user.saturating_add(system).saturating_mul(each),
    ))
}

/// "time on the cpu, time waiting on a runqueue, timeslices" in nanoseconds
/// (`Documentation/scheduler/sched-stats.rst`).
fn parse(text: &str) -> Option<(Duration, Duration)> {
    let mut numbers = text.split_whitespace().map(str::parse::<u64>);
    let (ran, waited) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some((Duration::from_nanos(ran), Duration::from_nanos(waited)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_of_three_numbers() {
        let parsed = parse("12000000 34 5\n");
        let expected = (Duration::from_millis(12), Duration::from_nanos(34));
        assert_eq!(parsed, Some(expected));
        assert_eq!(parse("12"), None);
    }

    #[test]
    fn the_name_of_a_process_is_no_field() {
        let text = "7 (a) b 9) Z 1 7 7 0 -1 4194304 0 0 0 0 150 50 0 0 20 0 1";
        let tick = Duration::from_secs(1)
            / u32::try_from(rustix::param::clock_ticks_per_second()).expect("a small number");
        assert_eq!(parse_stat(text), Some(tick * 200));
        assert_eq!(parse_stat("7 (a"), None);
    }

    #[test]
    fn this_process_used_something() {
        let before = Times::of(std::process::id()).expect("it is here");
        let mut sum = 0_u64;
        while Times::of(std::process::id()).expect("it is here").ran == before.ran {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(before.resident_bytes > 1 << 20);
        assert_eq!(Times::of(u32::MAX), None);
    }
}
