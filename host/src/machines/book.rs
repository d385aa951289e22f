//! Every machine's life, as the host keeps it. No I/O: what is to be done comes back as a value.

use std::collections::HashMap;
use std::time::Duration;

use insula_types::{Bytes, MachineId, MachineName, TenantId, TenantName};
use insula_vmm::life::{Event, Exit, Failure, Refused, Source, State};
use insula_vmm::machine::Phase;
use insula_vmm::monitor::protocol::Cause;
use tokio::sync::watch;

use super::runner::{Ended, Runner, Sample, Tell};

/// A machine that exists.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) tenant: TenantId,
    pub(crate) tenant_name: TenantName,
    pub(crate) name: MachineName,
    /// Where it is in its life; whoever waits for a change is woken.
    life: watch::Sender<State>,
    pub(crate) runner: Option<Runner>,
    /// Guest memory that is promised while it runs.
    pub(crate) memory: Bytes,
    meter: Meter,
}

/// What a machine used, over all its monitors.
#[derive(Debug, Clone, Default)]
pub(crate) struct Meter {
    before: Used,
    now: Used,
    /// Of the running monitor.
    pub(crate) last: Option<Sample>,
    /// The next sample is where counting begins: what came before it an earlier host has charged.
    begins: bool,
}

/// Sums that only rise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Used {
    pub(crate) cpu: Duration,
    pub(crate) waited: Duration,
    pub(crate) throttled: Duration,
    pub(crate) disk_read_bytes: u64,
    pub(crate) disk_written_bytes: u64,
    pub(crate) net_received_bytes: u64,
    pub(crate) net_sent_bytes: u64,
    /// Guest memory over the time in which it was promised.
    pub(crate) memory_kib_ms: u64,
}

impl Used {
    fn of(sample: &Sample) -> Self {
        let bytes = |kind: &str, of: fn(&_) -> u64| {
            let devices = sample.statistics.devices.iter();
            devices.filter(|device| device.kind == kind).map(of).sum()
        };
        Self {
            cpu: sample.times.ran,
            waited: sample.times.waited,
            throttled: sample.throttled,
            disk_read_bytes: bytes("block", |device| device.read_bytes),
            disk_written_bytes: bytes("block", |device| device.written_bytes),
            net_received_bytes: bytes("net", |device| device.read_bytes),
            net_sent_bytes: bytes("net", |device| device.written_bytes),
            memory_kib_ms: sample.memory_kib_ms,
        }
    }

    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            cpu: self.cpu.saturating_add(other.cpu),
            waited: self.waited.saturating_add(other.waited),
            throttled: self.throttled.saturating_add(other.throttled),
            disk_read_bytes: self.disk_read_bytes.saturating_add(other.disk_read_bytes),
            disk_written_bytes: self
                .disk_written_bytes
                .saturating_add(other.disk_written_bytes),
            net_received_bytes: self
                .net_received_bytes
                .saturating_add(other.net_received_bytes),
            net_sent_bytes: self.net_sent_bytes.saturating_add(other.net_sent_bytes),
            memory_kib_ms: self.memory_kib_ms.saturating_add(other.memory_kib_ms),
        }
    }

    fn since(self, earlier: Self) -> Self {
        Self {
            cpu: self.cpu.saturating_sub(earlier.cpu),
            waited: self.waited.saturating_sub(earlier.waited),
            throttled: self.throttled.saturating_sub(earlier.throttled),
            disk_read_bytes: self.disk_read_bytes.saturating_sub(earlier.disk_read_bytes),
            disk_written_bytes: self
                .disk_written_bytes
                .saturating_sub(earlier.disk_written_bytes),
            net_received_bytes: self
                .net_received_bytes
                .saturating_sub(earlier.net_received_bytes),
            net_sent_bytes: self.net_sent_bytes.saturating_sub(earlier.net_sent_bytes),
            memory_kib_ms: self.memory_kib_ms.saturating_sub(earlier.memory_kib_ms),
        }
    }
}

impl Meter {
    pub(crate) fn total(&self) -> Used {
        self.before.plus(self.now)
    }

    /// Takes a sample; says what is new since the one before.
    fn take(&mut self, sample: Sample) -> Used {
        let used = Used::of(&sample);
        if std::mem::take(&mut self.begins) {
            self.now = used;
        }
        let new = used.since(self.now);
        self.now = used;
        self.last = Some(sample);
        new
    }

    /// The monitor is gone; the next one counts from zero.
    fn close(&mut self) {
        self.before = self.total();
        self.now = Used::default();
        self.last = None;
    }
}

/// What comes of a tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Consequence {
    /// Nothing but what is in the book.
    Nothing,
    /// More was used.
    Used(Used),
    /// Another state; to be stored and announced.
    Changed,
    /// Another state, and a new monitor is wanted: the guest starts anew.
    StartAgain,
}

/// All machines.
#[derive(Debug, Default)]
pub(crate) struct Book {
    entries: HashMap<MachineId, Entry>,
}

impl Book {
    pub(crate) fn add(
        &mut self,
        id: MachineId,
        (tenant, tenant_name, name): (TenantId, TenantName, MachineName),
        memory: Bytes,
        life: State,
    ) {
        let entry = Entry {
            tenant,
            tenant_name,
            name,
            life: watch::Sender::new(life),
            runner: None,
            memory,
            meter: Meter::default(),
        };
        self.entries.insert(id, entry);
    }

    pub(crate) fn get(&self, id: MachineId) -> Option<&Entry> {
        self.entries.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: MachineId) -> Option<&mut Entry> {
        self.entries.get_mut(&id)
    }

    pub(crate) fn remove(&mut self, id: MachineId) -> Option<Entry> {
        self.entries.remove(&id)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (MachineId, &Entry)> {
        self.entries.iter().map(|(id, entry)| (*id, entry))
    }

    /// Guest memory that running machines were promised.
    pub(crate) fn committed(&self, of: Option<TenantId>) -> u64 {
        let running = self
            .entries
            .values()
            .filter(|entry| entry.state().has_memory());
        let running = running.filter(|entry| of.is_none_or(|tenant| tenant == entry.tenant));
        running.map(|entry| entry.memory.get()).sum()
    }

    /// Notes what a runner tells.
    pub(crate) fn tell(&mut self, id: MachineId, tell: Tell) -> Consequence {
        let Some(entry) = self.entries.get_mut(&id) else {
            // Deleted meanwhile.
            return Consequence::Nothing;
        };
        match tell {
            Tell::Entered(monitor, Phase::Paused) => {
                entry.observe(&[Event::Entered(monitor), Event::Pause])
            }
            Tell::Entered(monitor, _) => entry.observe(&[Event::Entered(monitor)]),
            Tell::Sample(sample) => Consequence::Used(entry.meter.take(sample)),
            Tell::Ended(ended) => {
                entry.runner = None;
                entry.meter.close();
                let why = ended.record.as_ref().map(|record| record.detail.clone());
                let events = events_of(entry.state(), ended);
                match entry.observe(&events) {
                    Consequence::Changed if matches!(entry.state(), State::Starting { .. }) => {
                        tracing::info!(machine = %id, why, "a guest starts anew");
                        Consequence::StartAgain
                    }
                    other => other,
                }
            }
        }
    }
}

impl Entry {
    pub(crate) fn state(&self) -> State {
        self.life.borrow().clone()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<State> {
        self.life.subscribe()
    }

    pub(crate) fn used(&self) -> Used {
        self.meter.total()
    }

    pub(crate) fn last(&self) -> Option<&Sample> {
        self.meter.last.as_ref()
    }

    /// Takes the machine to the state after something that was asked.
    ///
    /// # Errors
    /// It has no meaning in this state.
    pub(crate) fn ask(&mut self, event: &Event) -> Result<(), Refused> {
        let next = self.life.borrow().after(event)?;
        self.life.send_replace(next);
        Ok(())
    }

    /// Puts the machine where it was found after a start of the host.
    pub(crate) fn found(&mut self, state: State) {
        self.meter.begins = state.has_memory();
        self.life.send_replace(state);
    }

    /// Notes what was observed. What has no meaning is a mistake of ours, and said.
    fn observe(&mut self, events: &[Event]) -> Consequence {
        let before = self.state();
        for event in events {
            if let Err(refused) = self.ask(event) {
                tracing::error!(machine = %self.name, tenant = %self.tenant_name, %refused,
                    "an observation does not fit");
            }
        }
        if self.state() == before {
            Consequence::Nothing
        } else {
            Consequence::Changed
        }
    }
}

/// What the end of a monitor means, given what was expected.
fn events_of(state: State, ended: Ended) -> Vec<Event> {
    let Ended { record, exit, seen } = ended;
    let gone = Event::Exited(exit.unwrap_or(Exit::Unknown));
    if let Some(seen) = seen {
        let failure = match state {
            State::Starting { .. } => Failure::Setup(seen),
            _ => Failure::Monitor(seen),
        };
        return vec![Event::Broke(failure)];
    }
    let Some(record) = record else {
        return vec![gone];
    };
    match (record.cause, &state) {
        (Cause::PoweredOff, State::Running { .. } | State::Stopping { .. }) => {
            vec![Event::PoweredOff, gone]
        }
        (Cause::Rebooted, State::Running { .. }) => vec![Event::Rebooted],
        (Cause::Reset, State::Running { .. } | State::Paused { .. }) => vec![Event::Reset],
        (Cause::Setup, _) => vec![Event::Broke(Failure::Setup(record.detail))],
        (Cause::Failed, _) => vec![Event::Broke(Failure::Guest(record.detail))],
        _ => vec![gone],
    }
}

/// The state of a machine after the host was away, of which the store says `stored`, and whose
/// monitor is gone. A guest that rebooted meanwhile is starting.
pub(crate) fn after_absence(stored: &State, ended: Ended) -> State {
    let mut state = stored.clone();
    for event in events_of(stored.clone(), ended) {
        match state.after(&event) {
            Ok(next) => state = next,
            Err(refused) => tracing::warn!(%refused, "an observation does not fit"),
        }
    }
    state
}

/// For [`Entry::ask`].
pub(crate) const BOOT: Event = Event::Start(Source::Boot);

#[cfg(test)]
mod tests {
    use insula_vmm::life::{MonitorPid, StopCause};
    use insula_vmm::monitor::protocol::{DeviceStatistics, EXIT_REASONS, Record, Statistics};

    use super::*;
    use crate::machines::times::Times;

    const ID: MachineId = MachineId::new(7);

    fn book(state: State) -> Book {
        let mut book = Book::default();
        let name = |text: &str| text.to_owned();
        let tenant = name("acme").parse().expect("a name");
        let machine = name("db").parse().expect("a name");
        let owner = (TenantId::new(3), tenant, machine);
        book.add(ID, owner, Bytes::mib(64), state);
        book
    }

    fn pid() -> MonitorPid {
        MonitorPid::new(77).expect("not zero")
    }

    fn running() -> State {
        State::Running { monitor: pid() }
    }

    fn sample(cpu_s: u64, disk_bytes: u64) -> Tell {
        Tell::Sample(Sample {
            times: Times {
                ran: Duration::from_secs(cpu_s),
                ..Times::default()
            },
            throttled: Duration::ZERO,
            statistics: Statistics {
                phase: Phase::Running,
                exits: [0; EXIT_REASONS.len()],
                console_written_bytes: 0,
                devices: vec![DeviceStatistics {
                    kind: "block".to_owned(),
                    read_bytes: disk_bytes,
                    written_bytes: 0,
                    failures: 0,
                    last_failure: None,
                }],
            },
            stored_bytes: 0,
            memory_kib_ms: 0,
        })
    }

    fn ended(cause: Option<Cause>) -> Tell {
        let record = cause.map(|cause| Record {
            cause,
            detail: "in its own words".to_owned(),
        });
        Tell::Ended(Ended {
            record,
            exit: Some(Exit::Signal(9)),
            seen: None,
        })
    }

    #[test]
    fn every_end_has_its_state() {
        let stopping = State::Stopping {
            monitor: pid(),
            cause: StopCause::Requested,
        };
        for (from, cause, wanted) in [
            (running(), Some(Cause::PoweredOff), "stopped"),
            (running(), Some(Cause::Rebooted), "starting"),
            (running(), Some(Cause::Reset), "starting"),
            (running(), Some(Cause::Failed), "failed"),
            (running(), None, "failed"),
            (
                State::Paused { monitor: pid() },
                Some(Cause::Reset),
                "starting",
            ),
            (stopping.clone(), Some(Cause::Stopped), "stopped"),
            (stopping.clone(), Some(Cause::PoweredOff), "stopped"),
            (stopping.clone(), Some(Cause::Rebooted), "stopped"),
            (stopping, None, "stopped"),
        ] {
            let mut book = book(from.clone());
            let consequence = book.tell(ID, ended(cause));
            let state = book.get(ID).expect("it is there").state();
            assert_eq!(state.word(), wanted, "{from:?} and {cause:?}");
            let again = matches!(state, State::Starting { .. });
            assert_eq!(again, consequence == Consequence::StartAgain);
        }
    }

    #[test]
    fn a_start_that_fails_says_why() {
        let mut book = book(State::Defined);
        let entry = book.get_mut(ID).expect("it is there");
        entry.ask(&BOOT).expect("a defined machine");
        assert_eq!(book.committed(None), 64 << 20);
        book.tell(ID, ended(Some(Cause::Setup)));
        let State::Failed { failure } = book.get(ID).expect("it is there").state() else {
            panic!("it did not start");
        };
        assert!(
            failure.to_string().contains("in its own words"),
            "{failure}"
        );
        assert_eq!(book.committed(None), 0);
    }

    #[test]
    fn what_was_used_is_told_once() {
        let mut book = book(State::Starting {
            origin: insula_vmm::life::Origin::Boot,
        });
        book.tell(ID, Tell::Entered(pid(), Phase::Running));
        let used = |consequence| match consequence {
            Consequence::Used(used) => (used.cpu.as_secs(), used.disk_read_bytes),
            other => panic!("{other:?}"),
        };
        assert_eq!(used(book.tell(ID, sample(2, 10))), (2, 10));
        assert_eq!(used(book.tell(ID, sample(5, 10))), (3, 0));
        // A new monitor counts from zero, and the machine goes on.
        book.tell(ID, ended(Some(Cause::Reset)));
        book.tell(ID, Tell::Entered(pid(), Phase::Running));
        assert_eq!(used(book.tell(ID, sample(1, 4))), (1, 4));
        let total = book.get(ID).expect("it is there").used();
        assert_eq!((total.cpu.as_secs(), total.disk_read_bytes), (6, 14));
    }

    #[test]
    fn a_machine_that_was_found_is_charged_from_there_on() {
        let mut book = book(running());
        let entry = book.get_mut(ID).expect("it is there");
        entry.found(State::Starting {
            origin: insula_vmm::life::Origin::Found,
        });
        book.tell(ID, Tell::Entered(pid(), Phase::Paused));
        let state = book.get(ID).expect("it is there").state();
        assert_eq!(state.word(), "paused");
        let first = book.tell(ID, sample(1_000, 1_000));
        assert_eq!(first, Consequence::Used(Used::default()));
    }

    #[test]
    fn what_happened_in_absence_is_found_out() {
        let gone = |cause: Option<Cause>| match ended(cause) {
            Tell::Ended(ended) => Ended {
                exit: None,
                ..ended
            },
            _ => panic!("an end"),
        };
        let killed = after_absence(&running(), gone(None));
        assert!(matches!(killed, State::Failed { .. }), "{killed:?}");
        let off = after_absence(&running(), gone(Some(Cause::PoweredOff)));
        assert_eq!(off.word(), "stopped");
        let reboot = after_absence(&running(), gone(Some(Cause::Rebooted)));
        assert_eq!(reboot.word(), "starting");
    }
}
