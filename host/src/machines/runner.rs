//! One thread for each machine that runs: its monitor's parent, and the only one who speaks with it.
//!
//! ```text
//!  control ── Ask ──▶ runner thread ── control socket ──▶ monitor process
//!          ◀─ Tell ──      │
//!                          └── once a second: statistics, times, throttling
//! ```
//!
//! The thread ends when the monitor is gone, and its last word is [`Tell::Ended`]. A monitor that
//! does not answer for [`SILENCE`] is killed: that is the watchdog over monitors, and the machine
//! fails with that reason. When the host ends, the threads let go of their monitors, which go on.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use insula_types::{Bytes, MachineId, TenantId};
use insula_vmm::event::Event;
use insula_vmm::life::{Exit, MonitorPid};
use insula_vmm::machine::Phase;
use insula_vmm::monitor::protocol::{Record, Reply, Request, Statistics};
use insula_vmm::monitor::wire::{Outgoing, SlotError};
use insula_vmm::monitor::{CallError, Client};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::{mpsc, oneshot};

use super::cgroups::Groups;
use super::network::Network;
use super::place::Place;
use super::start::{self, Plan};
use super::times::{self, Times};
use crate::pool::clock::{child_cpu_ns, paid_by_others};

/// How often a machine is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A monitor that says nothing for so long is killed.
const SILENCE: Duration = Duration::from_secs(10);
/// Writing a machine's memory to a disk.
pub(crate) const SAVING: Duration = Duration::from_secs(600);
/// How long the end of a process may take once its socket is closed.
const ENDING: Duration = Duration::from_secs(5);

pub(crate) type Answer = oneshot::Sender<Result<(), String>>;

/// What control asks of a machine that runs.
#[derive(Debug)]
pub(crate) enum Ask {
    Order(Request, Answer),
    /// A terminal.
    Console(OwnedFd, Answer),
    /// Write state and memory of a machine that is paused into these files.
    Save(File, File, Answer),
}

/// What a runner tells control of its machine.
#[derive(Debug)]
pub(crate) enum Tell {
    /// The guest runs.
    Entered(MonitorPid, Phase),
    /// What it used so far.
    Sample(Sample),
    /// The monitor is gone, and the thread with it.
    Ended(Ended),
}

/// What a machine used since its monitor started.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    pub(crate) times: Times,
    pub(crate) throttled: Duration,
    pub(crate) statistics: Statistics,
    pub(crate) stored_bytes: u64,
    /// Guest memory over the time since the runner has known the monitor.
    pub(crate) memory_kib_ms: u64,
}

/// How a monitor ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ended {
    /// What it left.
    pub(crate) record: Option<Record>,
    /// How the process ended, where the kernel tells us: it tells parents only.
    pub(crate) exit: Option<Exit>,
    /// What we saw of it.
    pub(crate) seen: Option<String>,
}

/// Tells of one machine.
pub(crate) type Tells = mpsc::UnboundedSender<(MachineId, Tell)>;

/// Control's end.
#[derive(Debug)]
pub(crate) struct Runner {
    asks: Option<Sender<Ask>>,
    wake: Event,
    thread: Option<JoinHandle<()>>,
}

/// Whose monitor.
#[derive(Debug, Clone)]
pub(crate) struct Whose {
    pub(crate) tenant: TenantId,
    pub(crate) machine: MachineId,
    pub(crate) memory: Bytes,
    pub(crate) place: Place,
    pub(crate) groups: Arc<Groups>,
    pub(crate) network: Arc<Network>,
}

/// How a runner comes to its monitor.
#[derive(Debug)]
pub(crate) enum Origin {
    /// A new process.
    New(Box<Plan>),
    /// One of an earlier host, which listens.
    Found(Client),
}

impl Runner {
    /// Starts the thread. Everything else comes as a [`Tell`].
    pub(crate) fn start(whose: Whose, origin: Origin, tells: Tells) -> io::Result<Self> {
        let (asks, asked) = channel();
        let wake = Event::new()?;
        let woken = wake.try_clone()?;
        let thread = std::thread::Builder::new()
            .name(format!("machine-{}", whose.machine))
            .spawn(move || {
                let machine = whose.machine;
                let ended = life(&whose, origin, &asked, &woken, &tells);
                if let Some(ended) = ended {
                    whose.network.detach(machine);
                    // Control is gone only when the host ends.
                    let _ = tells.send((machine, Tell::Ended(ended)));
                }
            })?;
        Ok(Self {
            asks: Some(asks),
            wake,
            thread: Some(thread),
        })
    }

    /// Asks; the answer comes through what is in it, or not at all if the monitor is gone.
    pub(crate) fn ask(&self, ask: Ask) {
        if let Some(asks) = &self.asks {
            // Refused only by a thread that has ended, whose last word is under way.
            let _ = asks.send(ask);
            self.wake.raise();
        }
    }
}

impl Drop for Runner {
    /// Lets go of the monitor, which goes on if it lives.
    fn drop(&mut self) {
        self.asks = None;
        self.wake.raise();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a machine's thread panicked");
        }
    }
}

/// A monitor process.
struct Monitor {
    client: Client,
    pid: MonitorPid,
    /// Refers to this very process, even when its number is used again.
    process: OwnedFd,
    child: Option<std::process::Child>,
}

impl Monitor {
    fn new(client: Client, child: Option<std::process::Child>) -> io::Result<Self> {
        let no_pid = || io::Error::other("a monitor without a process");
        // A monitor's own number is one in its own namespace; its parent and the kernel know ours.
        let number = match &child {
            Some(child) => child.id(),
            None => client.monitor_pid()?,
        };
        let pid = MonitorPid::new(number).ok_or_else(no_pid)?;
        let raw = i32::try_from(number).ok().and_then(Pid::from_raw);
        let process = pidfd_open(raw.ok_or_else(no_pid)?, PidfdFlags::empty())?;
        Ok(Self {
            client,
            pid,
            process,
            child,
        })
    }

    fn kill(&self) {
        // Fails only where it is gone already.
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
    }

    /// Waits until the process is gone; if it was our child, how it ended and for how long it ran.
    fn wait(&mut self) -> Option<(Exit, Duration)> {
        use std::os::unix::process::ExitStatusExt;
        if !readable_within(&self.process, ENDING) {
            self.kill();
            readable_within(&self.process, ENDING);
        }
        let child = self.child.as_mut()?;
        let ran = times::all_that_ran(child.id()).unwrap_or_default();
        // What it ran is its tenant's; waited for, it is in this process's books as well.
        paid_by_others(child_cpu_ns(child.id()));
        let status = child.wait().ok()?;
        let signal = || status.signal().map(Exit::Signal);
        let exit = status.code().map(Exit::Code).or_else(signal)?;
        Some((exit, ran))
    }
}

fn readable_within(descriptor: &OwnedFd, time: Duration) -> bool {
    let deadline = Instant::now() + time;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(timeout) = Timespec::try_from(left) else {
            return false;
        };
        let mut polled = [PollFd::new(descriptor, PollFlags::IN)];
        match poll(&mut polled, Some(&timeout)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// From start to end. `None` when control let go of it.
fn life(
    whose: &Whose,
    origin: Origin,
    asked: &Receiver<Ask>,
    woken: &Event,
    tells: &Tells,
) -> Option<Ended> {
    let monitor = match origin {
        Origin::Found(client) => Monitor::new(client, None).map_err(|error| Ended {
            record: None,
            exit: None,
            seen: Some(format!("the monitor that was found: {error}")),
        }),
        Origin::New(plan) => begin(whose, *plan),
    };
    let mut monitor = match monitor {
        Ok(monitor) => monitor,
        Err(ended) => return Some(ended),
    };
    // Control is gone only when the host ends.
    let tell = |tell| drop(tells.send((whose.machine, tell)));
    let looks = Looks::begin(whose, &monitor);
    let mut last = looks.look(&monitor).ok();
    // What could not be seen is seen by the next look.
    let phase = last
        .as_ref()
        .map_or(Phase::Running, |sample| sample.statistics.phase);
    tell(Tell::Entered(monitor.pid, phase));
    let mut next = Instant::now();
    let broken = loop {
        match answer_all(&monitor, asked, woken) {
            Ok(Waiting::ForMore) => {}
            Ok(Waiting::ForNobody) => return None,
            Err(error) => break error,
        }
        if Instant::now() >= next {
            next = Instant::now() + LOOK_EVERY;
            match looks.look(&monitor) {
                Ok(sample) => {
                    last = Some(sample.clone());
                    tell(Tell::Sample(sample));
                }
                Err(error) => break error,
            }
        }
        if wait(&monitor.client, woken, next) {
            break CallError::Gone;
        }
    };
    let mut seen = None;
    if !matches!(broken, CallError::Gone) {
        monitor.kill();
        seen = Some(format!("its monitor was ended: {broken}"));
    }
    let exit = monitor.wait().map(|(exit, ran)| {
        // Since the last look it ran on.
        if let Some(sample) = last {
            tell(Tell::Sample(looks.last(sample, ran)));
        }
        exit
    });
    let record = whose.place.record();
    Some(Ended { record, exit, seen })
}

/// A new process that runs the machine; or how that ended.
fn begin(whose: &Whose, plan: Plan) -> Result<Monitor, Ended> {
    let failed = |seen: String| Ended {
        record: None,
        exit: None,
        seen: Some(seen),
    };
    let child = start::spawn(whose, &plan).map_err(|error| failed(error.to_string()))?;
    let client = whose.place.connect();
    let client = client.map_err(|error| failed(format!("connecting to its monitor: {error}")))?;
    let monitor = Monitor::new(client, Some(child));
    let mut monitor = monitor.map_err(|error| failed(format!("its monitor: {error}")))?;
    let told = start::tell(whose, &monitor.client, plan);
    if let Err(error) = told {
        if matches!(error, start::StartError::Call(CallError::Silent { .. })) {
            monitor.kill();
        }
        let exit = monitor.wait().map(|(exit, _)| exit);
        // The record says it best, if there is one.
        let record = whose.place.record();
        let seen = record.is_none().then(|| error.to_string());
        return Err(Ended { record, exit, seen });
    }
    Ok(monitor)
}

enum Waiting {
    ForMore,
    ForNobody,
}

/// Does what was asked so far.
fn answer_all(
    monitor: &Monitor,
    asked: &Receiver<Ask>,
    woken: &Event,
) -> Result<Waiting, CallError> {
    woken.clear();
    loop {
        let (outcome, answer) = match asked.try_recv() {
            Ok(Ask::Order(request, answer)) => {
                let nothing = Outgoing::default();
                let outcome = monitor.client.order(&request, &nothing, SILENCE);
                (outcome, answer)
            }
            Ok(Ask::Console(terminal, answer)) => {
                let mut with = Outgoing::default();
                let outcome = match with.add(terminal.as_fd()) {
                    Ok(_) => monitor.client.order(&Request::Console, &with, SILENCE),
                    Err(error) => Err(CallError::Refused(error.to_string())),
                };
                (outcome, answer)
            }
            Ok(Ask::Save(state, memory, answer)) => (save(monitor, &state, &memory), answer),
            Err(TryRecvError::Empty) => return Ok(Waiting::ForMore),
            Err(TryRecvError::Disconnected) => return Ok(Waiting::ForNobody),
        };
        match outcome {
            // Whoever asked may have given up.
            Ok(()) => drop(answer.send(Ok(()))),
            Err(CallError::Refused(why)) => drop(answer.send(Err(why))),
            Err(error) => {
                let _ = answer.send(Err(error.to_string()));
                return Err(error);
            }
        }
    }
}

fn save(monitor: &Monitor, state: &File, memory: &File) -> Result<(), CallError> {
    let refused = |error: SlotError| CallError::Refused(error.to_string());
    let mut with = Outgoing::default();
    let request = Request::Save {
        state: with.add(state.as_fd()).map_err(refused)?,
        memory: with.add(memory.as_fd()).map_err(refused)?,
    };
    monitor.client.order(&request, &with, SAVING)
}

/// Looks at one monitor.
struct Looks<'w> {
    whose: &'w Whose,
    begin: Instant,
    /// For how long the machine's group was held back before: it may be that of earlier monitors.
    throttled_before: Duration,
}

impl<'w> Looks<'w> {
    fn begin(whose: &'w Whose, monitor: &Monitor) -> Self {
        let groups = &whose.groups;
        // Of a monitor that was found an earlier host has charged a part, which control knows.
        let new = monitor.child.is_some();
        let throttled = new.then(|| groups.throttled(whose.tenant, whose.machine));
        Self {
            whose,
            begin: Instant::now(),
            throttled_before: throttled.flatten().unwrap_or_default(),
        }
    }

    fn look(&self, monitor: &Monitor) -> Result<Sample, CallError> {
        let (request, nothing) = (Request::Statistics, Outgoing::default());
        let statistics = match monitor.client.call(&request, &nothing, SILENCE)? {
            Reply::Statistics { of } => *of,
            _ => return Err(CallError::Confused),
        };
        let mut sample = Sample {
            times: Times::of(monitor.pid.get()).ok_or(CallError::Gone)?,
            throttled: Duration::ZERO,
            statistics,
            stored_bytes: self.whose.place.stored_bytes(),
            memory_kib_ms: 0,
        };
        self.measure(&mut sample);
        Ok(sample)
    }

    /// After a monitor's end: `ran` counts the threads that are gone as well.
    fn last(&self, mut sample: Sample, ran: Duration) -> Sample {
        sample.times.ran = sample.times.ran.max(ran);
        self.measure(&mut sample);
        sample
    }

    /// What is known without asking.
    fn measure(&self, sample: &mut Sample) {
        let Whose {
            tenant,
            machine,
            memory,
            groups,
            ..
        } = self.whose;
        let throttled = groups.throttled(*tenant, *machine).unwrap_or_default();
        sample.throttled = throttled.saturating_sub(self.throttled_before);
        let passed_ms = u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        sample.memory_kib_ms = (memory.get() >> 10).saturating_mul(passed_ms);
    }
}

/// Waits for questions, the next look, or the monitor's end, which it says.
fn wait(client: &Client, woken: &Event, look: Instant) -> bool {
    let left = look.saturating_duration_since(Instant::now());
    let Ok(timeout) = Timespec::try_from(left) else {
        return false;
    };
    let mut polled = [
        PollFd::new(client, PollFlags::IN),
        PollFd::new(woken, PollFlags::IN),
    ];
    // An error is a look too early.
    let _ = poll(&mut polled, Some(&timeout));
    !polled[0].revents().is_empty()
}
