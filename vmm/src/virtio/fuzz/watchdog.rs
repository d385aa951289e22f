//! The watchdog's registers, and states of it with something changed. It is no virtio device, and as
//! reachable for a guest as one.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::driver::change;
use super::random::Random;
use super::repeat;
use crate::devices::watchdog::{
    COUNT, COUNTS_MIN_MAX, LEFT, PERIOD_MS, REGISTERS_BYTES, RUN, Watchdog, WatchdogSaved,
};
use crate::exit::Ending;
use crate::threads::Threads;

struct Machine {
    watchdog: Arc<Watchdog>,
    ending: Arc<Ending>,
    waiting: JoinHandle<Option<()>>,
    /// Since the first one that it goes on from.
    since: Instant,
    /// The state that it goes on from was changed: then little may be left from the beginning.
    changed: bool,
}

impl Machine {
    fn new(saved: WatchdogSaved, since: Instant, changed: bool) -> Self {
        let ending = Arc::new(Ending::new().expect("a descriptor"));
        let watchdog = Arc::new(Watchdog::new(saved));
        let waiting = watchdog.watch(Arc::clone(&ending), &Threads::default());
        Self {
            watchdog,
            ending,
            waiting: waiting.expect("a thread"),
            since,
            changed,
        }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.watchdog.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn check(&self) {
        let (least, most) = COUNTS_MIN_MAX;
        assert!(self.read(RUN) <= 1);
        assert!((least..=most).contains(&self.read(COUNT)));
        assert!(self.read(LEFT) <= most);
        let shortest = Duration::from_millis(u64::from(least * PERIOD_MS));
        if !self.changed && self.since.elapsed() < shortest {
            assert_eq!(self.ending.reason(), None, "no guest has less than this");
        }
    }

    /// Its thread ends, whatever it waited for.
    fn end(self) -> WatchdogSaved {
        let saved = self.watchdog.save();
        self.watchdog.stop();
        assert_eq!(self.waiting.join().expect("no panic"), Some(()));
        saved
    }
}

fn sequence(random: &mut Random) {
    let mut machine = Machine::new(WatchdogSaved::default(), Instant::now(), false);
    for _ in 0..random.below(100) {
        match random.below(12) {
            0 => machine.watchdog.go(),
            1 => machine.watchdog.stand(),
            2 => machine = restored(machine, random),
            3 => {
                let mut data = random.bytes(9);
                machine.watchdog.read(offset(random), &mut data);
            }
            4 => machine.watchdog.write(offset(random), &random.bytes(9)),
            _ => {
                let (offset, value) = (offset(random), random.word());
                machine.watchdog.write(offset, &value.to_le_bytes());
            }
        }
        machine.check();
    }
    machine.end();
}

/// Mostly one that is a register.
fn offset(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => random.next(),
        1 => random.below(2 * REGISTERS_BYTES),
        _ => random.below(REGISTERS_BYTES / 4) * 4,
    }
}

fn restored(machine: Machine, random: &mut Random) -> Machine {
    let (since, before) = (machine.since, machine.changed);
    let saved = machine.end();
    let mut content = serde_json::to_value(saved).expect("a state");
    let changed = random.one_in(2);
    if changed {
        change(&mut content, random);
    }
    match serde_json::from_value(content) {
        Ok(saved) => Machine::new(saved, since, before || changed),
        Err(_) => Machine::new(saved, since, before),
    }
}

#[test]
fn watchdog() {
    repeat("watchdog", sequence);
}
