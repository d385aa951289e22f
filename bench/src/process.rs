//! The processes that we start, and what the kernel's books say that they used.

use std::collections::HashMap;
use std::fs::{self, File};
use std::ops::Sub;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::cores::{Cores, while_bound};

/// How long a server may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

/// A process of ours; ended when dropped.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    /// Starts a server on some cores, its output in `log`.
    pub(crate) fn start(mut command: Command, cores: &Cores, log: &Path) -> Result<Self> {
        let output = File::create(log).with_context(|| log.display().to_string())?;
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            // Backtraces and logs would be measured as well, and not for everybody alike.
            .env_remove("RUST_BACKTRACE")
            .env_remove("RUST_LIB_BACKTRACE")
            .env_remove("RUST_LOG");
        let program = command.get_program().display().to_string();
        let child = while_bound(cores, || {
            command
                .spawn()
                .with_context(|| format!("starting {program}"))
        })?;
        Ok(Self {
            child,
            log: log.to_owned(),
        })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Polls until `ready` says so, the process ends, or the deadline passes.
    pub(crate) fn wait_until<T>(
        &mut self,
        what: &str,
        patience: Duration,
        mut ready: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + patience;
        loop {
            let error = match ready() {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if let Some(status) = self.child.try_wait()? {
                bail!("{what}: it ended with {status}: {}", self.last_words());
            }
            if Instant::now() >= deadline {
                let said = self.last_words();
                return Err(
                    error.context(format!("{what}: not within {patience:?}; it said {said:?}"))
                );
            }
            sleep(POLL);
        }
    }

    /// The last lines of its output.
    fn last_words(&self) -> String {
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        lines[lines.len().saturating_sub(5)..].join(" | ")
    }

    /// Ends it at once: for a server that is beyond being asked.
    pub(crate) fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn end(&mut self) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        if let Some(pid) = pid {
            // It has not been waited for, so the number is still its own.
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + GRACE;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() >= deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            sleep(POLL);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// CPU time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct CpuTime {
    pub(crate) user: Duration,
    pub(crate) system: Duration,
}

impl CpuTime {
    pub(crate) fn total(self) -> Duration {
        self.user + self.system
    }
}

impl Sub for CpuTime {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            user: self.user.saturating_sub(before.user),
            system: self.system.saturating_sub(before.system),
        }
    }
}

/// One process, as `/proc/PID/stat` has it (proc(5)).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    parent: u32,
    /// With the children that it has waited for.
    user_ticks: u64,
    system_ticks: u64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The name may hold anything, blanks and brackets included.
        let (_, rest) = text.rsplit_once(')')?;
        // Here the first is field 3.
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let ticks = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self {
            parent: fields.get(1)?.parse().ok()?,
            user_ticks: ticks(14)? + ticks(16)?,
            system_ticks: ticks(15)? + ticks(17)?,
        })
    }
}

fn ticks(count: u64) -> Duration {
    let hertz = rustix::param::clock_ticks_per_second().max(1);
    Duration::from_nanos(count * (1_000_000_000 / hertz))
}

/// CPU time so far of a process and all its descendants, living and gone.
pub(crate) fn tree_cpu(root: u32) -> Result<CpuTime> {
    let mut all = HashMap::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // A process can end between the listing and the reading.
        let text = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        if let Some(stat) = Stat::parse(&text) {
            all.insert(pid, stat);
        }
    }
    if !all.contains_key(&root) {
        bail!("process {root} is gone");
    }
    let mut sum = CpuTime::default();
    let mut waiting = vec![root];
    while let Some(pid) = waiting.pop() {
        if let Some(stat) = all.get(&pid) {
            sum.user += ticks(stat.user_ticks);
            sum.system += ticks(stat.system_ticks);
        }
        waiting.extend(
            all.iter()
                .filter(|(_, stat)| stat.parent == pid)
                .map(|(child, _)| *child),
        );
    }
    Ok(sum)
}

/// What a process and its children have of the machine's memory now, in KiB, as `/proc/PID/status`
/// has it (proc(5)).
pub(crate) fn resident_kib(process: u32) -> Result<u64> {
    let mut sum = resident_kib_of_one(process)?;
    for task in fs::read_dir(format!("/proc/{process}/task"))?.flatten() {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for child in children
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok())
        {
            // One that has ended meanwhile has none.
            sum += resident_kib_of_one(child).unwrap_or(0);
        }
    }
    Ok(sum)
}

fn resident_kib_of_one(process: u32) -> Result<u64> {
    let path = format!("/proc/{process}/status");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let figure = line.and_then(|line| line.split_whitespace().next());
    let figure = figure.with_context(|| format!("{path} has no VmRSS"))?;
    Ok(figure.parse()?)
}

/// How long some cores were not idle so far, whoever used them, the hypervisor included.
pub(crate) fn busy(cores: &Cores) -> Result<Duration> {
    Ok(ticks(busy_ticks(&fs::read_to_string("/proc/stat")?, cores)))
}

fn busy_ticks(stat: &str, cores: &Cores) -> u64 {
    let mut sum = 0;
    for line in stat.lines() {
        let mut fields = line.split_whitespace();
        let core = fields.next().and_then(|name| name.strip_prefix("cpu"));
        let Some(core) = core.and_then(|core| core.parse().ok()) else {
            continue;
        };
        if cores.contains(core) {
            // user nice system idle iowait irq softirq steal; guests are in user already.
            let figures: Vec<u64> = fields.filter_map(|field| field.parse().ok()).collect();
            let idle = figures.iter().skip(3).take(2).sum::<u64>();
            sum += figures.iter().take(8).sum::<u64>() - idle;
        }
    }
    sum
}

/// What the server, we, and everybody else take of some cores between two moments.
#[derive(Debug, Clone)]
pub(crate) struct Meter {
    server: u32,
    cores: Cores,
    began: Instant,
    before: Books,
}

#[derive(Debug, Clone, Copy)]
struct Books {
    server: CpuTime,
    /// This process and all that it started, the server included.
    ours: CpuTime,
    busy: Duration,
}

impl Books {
    fn now(server: u32, cores: &Cores) -> Result<Self> {
        Ok(Self {
            server: tree_cpu(server)?,
            ours: tree_cpu(std::process::id())?,
            busy: busy(cores)?,
        })
    }
}

/// What a [`Meter`] found.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Metered {
    pub(crate) elapsed: Duration,
    pub(crate) server: CpuTime,
    /// What part of the cores went to neither us nor what we started.
    pub(crate) elsewhere: f64,
}

impl Metered {
    /// Server CPU as a part of one core.
    pub(crate) fn server_cores(&self) -> f64 {
        self.server.total().as_secs_f64() / self.elapsed.as_secs_f64()
    }
}

impl Meter {
    pub(crate) fn begin(server: u32, cores: &Cores) -> Result<Self> {
        Ok(Self {
            server,
            cores: cores.clone(),
            before: Books::now(server, cores)?,
            began: Instant::now(),
        })
    }

    pub(crate) fn end(&self) -> Result<Metered> {
        let (elapsed, after) = (self.began.elapsed(), Books::now(self.server, &self.cores)?);
        let busy = after.busy.saturating_sub(self.before.busy);
        let other = busy.saturating_sub((after.ours - self.before.ours).total());
        let cores = f64::from(u32::try_from(self.cores.count())?);
        Ok(Metered {
            elapsed,
            server: after.server - self.before.server,
            elsewhere: other.as_secs_f64() / (elapsed.as_secs_f64() * cores),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_move_the_fields() {
        let text = "7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0 12 34 56 78 20 0 1 0 5";
        let stat = Stat {
            parent: 1,
            user_ticks: 68,
            system_ticks: 112,
        };
        assert_eq!(Stat::parse(text), Some(stat));
        assert_eq!(Stat::parse("7 (a) S 1"), None);
    }

    #[test]
    fn this_process_has_used_some() {
        let begun = Instant::now();
        while tree_cpu(std::process::id()).unwrap().total() < Duration::from_millis(20) {
            assert!(begun.elapsed() < Duration::from_secs(10));
        }
        assert!(tree_cpu(u32::MAX).is_err());
        assert!(resident_kib(std::process::id()).unwrap() > 100);
    }
}
