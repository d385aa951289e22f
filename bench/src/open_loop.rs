//! The client that keeps a pace: requests are due at a constant rate, whatever became of those
//! before (an open loop), as they come from many people who do not know of each other.
//!
//! ```text
//!  due at start + i / rate ─▶ waiting ─▶ sent on a free connection ─▶ answered
//!                               │                                      │
//!                               └──── latency is counted from when it was due ────┘
//! ```
//!
//! A server that stalls is asked nothing by a client that waits for it, and so such a client sees
//! one slow answer where people would have seen a thousand ("coordinated omission", Gil Tene, "How
//! NOT to Measure Latency"). Here latency is counted from the time at which a request was due, and
//! what was never sent or never answered is counted too, with the time that it has waited in vain.
//!
//! One thread and one epoll set. Bounded in connections, in requests ([`REQUESTS_MAX`]) and in
//! time: what is still under way [`DRAIN`] after the last was due counts as unanswered.

mod outcome;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use rustix::event::{PollFd, PollFlags, epoll};
use rustix::time::Timespec;

pub(crate) use self::outcome::{Ending, Outcome, Record};
use self::outcome::{LATENCY_DIGITS, LATENCY_MAX_US};
use crate::cores::{Cores, Priority};
use crate::response;
use crate::targets::Targets;
use crate::wire::{Received, Wire};

/// More than an hour at a thousand a second.
const REQUESTS_MAX: u64 = 4_000_000;
const CONNECTIONS_MAX: usize = 4_096;
/// How long answers are waited for after the last request was due.
const DRAIN: Duration = Duration::from_secs(2);
/// The usual [`Plan::head_start`]: some connections are opened in much less.
pub(crate) const HEAD_START: Duration = Duration::from_millis(200);
/// How often the clock is looked at while nothing comes, and whether a connection is to be opened.
const TICK: Duration = Duration::from_millis(10);
const NO_TIME: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 0,
};
/// The kernel may wake an ordinary thread so much later than it asked.
const TIMER_SLACK_NS: u64 = 1_000;
/// What to ask, how often, for how long.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) address: SocketAddr,
    pub(crate) targets: Targets,
    /// The body of a good answer; with `None` any 200 is good.
    pub(crate) expected: Option<Vec<u8>>,
    pub(crate) rate_per_second: f64,
    pub(crate) connections: usize,
    /// They are opened so long before the first request is due.
    pub(crate) head_start: Duration,
    /// Asked in the same way before, and not recorded.
    pub(crate) warm_up: Duration,
    pub(crate) measured: Duration,
    pub(crate) cores: Cores,
    pub(crate) priority: Priority,
}

/// A plan that is being carried out on a thread of its own.
#[derive(Debug)]
pub(crate) struct Generator {
    thread: JoinHandle<Result<Outcome>>,
    /// When what is measured begins.
    pub(crate) measured_from: Instant,
}

impl Generator {
    pub(crate) fn start(plan: Plan) -> Result<Self> {
        let begin = Instant::now() + plan.head_start;
        let measured_from = begin + plan.warm_up;
        let total = total(&plan)?;
        let thread = std::thread::Builder::new()
            .name("open-loop".to_owned())
            .spawn(move || {
                plan.cores.bind()?;
                // Refused, the kernel wakes us a little later: `late` tells.
                let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(TIMER_SLACK_NS));
                let prioritised = plan.priority.take();
                Client::new(&plan, begin, total)?.run(prioritised)
            })?;
        Ok(Self {
            thread,
            measured_from,
        })
    }

    /// Waits until it is over.
    pub(crate) fn join(self) -> Result<Outcome> {
        self.thread
            .join()
            .unwrap_or_else(|_| bail!("the client panicked"))
    }
}

fn total(plan: &Plan) -> Result<u64> {
    let rate = plan.rate_per_second;
    if !(rate.is_finite() && rate > 0.0) || plan.connections == 0 {
        bail!(
            "{rate} requests per second on {} connections",
            plan.connections
        );
    }
    if plan.connections > CONNECTIONS_MAX {
        bail!("at most {CONNECTIONS_MAX} connections");
    }
    let span = plan.warm_up + plan.measured;
    let total = Duration::from_secs_f64(span.as_secs_f64() * rate).as_secs();
    if total > REQUESTS_MAX {
        bail!("{total} requests: at most {REQUESTS_MAX} in one run");
    }
    Ok(total)
}

struct Slot {
    wire: Wire,
    /// The request that is under way, by its number.
    busy: Option<u64>,
}

struct Client<'a> {
    plan: &'a Plan,
    targets: Targets,
    epoll: OwnedFd,
    slots: Vec<Slot>,
    /// When it is looked next whether some are to be opened.
    open_next: Instant,
    /// Those that are open and free.
    free: Vec<usize>,
    begin: Instant,
    /// How many requests there will be.
    total: u64,
    /// The next one that will be due.
    next: u64,
    /// Due, and not sent for want of a free connection.
    waiting: VecDeque<u64>,
    outcome: Outcome,
}

impl<'a> Client<'a> {
    fn new(plan: &'a Plan, begin: Instant, total: u64) -> Result<Self> {
        let now = Instant::now();
        let slots = (0..plan.connections).map(|_| Slot {
            wire: Wire::new(now),
            busy: None,
        });
        Ok(Self {
            plan,
            targets: plan.targets.clone(),
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            slots: slots.collect(),
            open_next: now,
            free: Vec::with_capacity(plan.connections),
            begin,
            total,
            next: 0,
            waiting: VecDeque::new(),
            outcome: Outcome {
                records: Vec::with_capacity(usize::try_from(total)?),
                late: Histogram::new_with_max(LATENCY_MAX_US, LATENCY_DIGITS)?,
                prioritised: true,
            },
        })
    }

    /// When a request is due.
    fn due(&self, number: u64) -> Instant {
        #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
        let after = number as f64 / self.plan.rate_per_second;
        self.begin + Duration::from_secs_f64(after)
    }

    fn run(mut self, prioritised: bool) -> Result<Outcome> {
        let end = self.due(self.total) + DRAIN;
        let mut events = Vec::with_capacity(self.slots.len());
        loop {
            let now = Instant::now();
            self.open_due(now)?;
            self.take_up(now);
            self.send_waiting(now);
            if now >= end || self.is_over() {
                break;
            }
            events.clear();
            self.sleep(now)?;
            let space = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, space, Some(&NO_TIME)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("waiting for answers"),
            }
            for event in &events {
                // `data` lies unaligned in the kernel's record.
                let data = event.data;
                self.ready(usize::try_from(data.u64())?)?;
            }
        }
        self.give_up();
        self.outcome.prioritised = prioritised;
        Ok(self.outcome)
    }

    fn is_over(&self) -> bool {
        self.next == self.total
            && self.waiting.is_empty()
            && self.slots.iter().all(|slot| slot.busy.is_none())
    }

    /// Until something comes, the next request is due, or something else is to be looked at.
    fn sleep(&self, now: Instant) -> Result<()> {
        let time = if self.next == self.total {
            TICK
        } else {
            self.due(self.next).saturating_duration_since(now).min(TICK)
        };
        // Not by `epoll_wait`, which counts in milliseconds, many requests long.
        let mut set = [PollFd::new(&self.epoll, PollFlags::IN)];
        match rustix::event::poll(&mut set, Some(&timespec(time))) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error).context("waiting for what is due"),
        }
    }

    fn open_due(&mut self, now: Instant) -> Result<()> {
        if now < self.open_next {
            return Ok(());
        }
        self.open_next = now + TICK;
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if slot.wire.is_due(now) {
                let data = index as u64;
                slot.wire.open(&self.epoll, data, self.plan.address, now)?;
            }
        }
        Ok(())
    }

    /// Puts those that are due by now in the line.
    fn take_up(&mut self, now: Instant) {
        while self.next < self.total {
            let due = self.due(self.next);
            if due > now {
                break;
            }
            self.outcome.late.saturating_record(micros(now - due));
            self.waiting.push_back(self.next);
            self.next += 1;
        }
    }

    fn send_waiting(&mut self, now: Instant) {
        while let Some(number) = self.waiting.front().copied() {
            let Some(index) = self.free.pop() else {
                break;
            };
            let slot = &mut self.slots[index];
            if !slot.wire.is_open() || slot.busy.is_some() {
                continue;
            }
            self.waiting.pop_front();
            slot.busy = Some(number);
            if slot.wire.send(self.targets.next()).is_err() {
                self.ended(index, Ending::Failed, now);
                self.slots[index].wire.down(now);
            }
        }
    }

    fn ready(&mut self, index: usize) -> Result<()> {
        let slot = &mut self.slots[index];
        if slot.wire.is_connecting() {
            let open = slot
                .wire
                .connected(&self.epoll, index as u64, Instant::now())?;
            if open {
                self.free.push(index);
            }
            return Ok(());
        }
        match self.receive(index) {
            Ok(None) => {}
            Ok(Some(ending)) => {
                let now = Instant::now();
                self.ended(index, ending.0, now);
                if ending.1 {
                    self.slots[index].wire.down(now);
                } else {
                    self.slots[index].wire.clear();
                    self.free.push(index);
                    self.send_waiting(now);
                }
            }
            Err(_) => {
                let now = Instant::now();
                self.ended(index, Ending::Failed, now);
                self.slots[index].wire.down(now);
            }
        }
        Ok(())
    }

    /// How the request ended, if it has, and whether its connection is to be closed.
    fn receive(&mut self, index: usize) -> Result<Option<(Ending, bool)>> {
        let wire = &mut self.slots[index].wire;
        if wire.receive()? == Received::Nothing {
            return Ok(None);
        }
        let Some(response) = response::parse(wire.bytes())? else {
            return Ok(None);
        };
        let expected = self.plan.expected.as_ref();
        let good =
            response.status == 200 && expected.is_none_or(|expected| *response.body == **expected);
        let ending = match response.status {
            200 if good => Ending::Good,
            200 => Ending::Failed,
            status => Ending::Status(status),
        };
        let more = response.length != wire.bytes().len();
        Ok(Some((ending, response.close || more)))
    }

    fn ended(&mut self, index: usize, ending: Ending, now: Instant) {
        if let Some(number) = self.slots[index].busy.take() {
            self.record(number, ending, now);
        }
    }

    fn record(&mut self, number: u64, ending: Ending, now: Instant) {
        let due = self.due(number);
        let measured_from = self.begin + self.plan.warm_up;
        // By its time and not by its end: a slow one belongs to the time that it was due in.
        let Some(after) = due.checked_duration_since(measured_from) else {
            return;
        };
        let short = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        self.outcome.records.push(Record {
            due_us: short(after),
            took_us: short(now.saturating_duration_since(due)),
            ending,
        });
    }

    /// Counts what is still under way.
    fn give_up(&mut self) {
        let now = Instant::now();
        for index in 0..self.slots.len() {
            self.ended(index, Ending::Unanswered, now);
        }
        while let Some(number) = self.waiting.pop_front() {
            self.record(number, Ending::Unanswered, now);
        }
        while self.next < self.total {
            self.record(self.next, Ending::Unanswered, now);
            self.next += 1;
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(time.subsec_nanos()),
    }
}

#[cfg(test)]
mod tests;
