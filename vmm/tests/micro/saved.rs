//! Machines that are saved, and go on elsewhere.

use std::fs::File;
use std::time::{Duration, Instant};

use insula_vmm::config::Console;
use insula_vmm::exit::{ExitReason, RebootBy};
use insula_vmm::machine::{BuildError, LifeError, Phase};
use insula_vmm::snapshot::{MachineState, Snapshot};
use insula_vmm::threads::Threads;
use insula_vmm::virtio::VirtioDevice;
use insula_vmm::virtio::rng::Rng;
use insula_vmm::{Hypervisor, Machine};

use crate::guest::{COUNTER, Guest, OFF, Screen, Step, end_of, hypervisor, until, word};

/// What a machine leaves: through bytes, as a host keeps it.
struct Saved {
    state: Vec<u8>,
    memory: File,
}

impl Saved {
    fn of(machine: &Machine) -> Self {
        let state = machine.save().expect("a paused machine");
        let memory = tempfile::tempfile().expect("a file");
        machine.save_memory(&memory).expect("room");
        Self {
            state: state.encode().expect("not too large"),
            memory,
        }
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot {
            state: MachineState::decode(&self.state).expect("its own"),
            memory: self.memory.try_clone().expect("open"),
        }
    }

    fn restore(&self, hypervisor: &Hypervisor, screen: &Screen) -> Machine {
        self.restore_with(hypervisor, screen, Vec::new())
            .unwrap_or_else(|error| panic!("{error}"))
    }

    fn restore_with(
        &self,
        hypervisor: &Hypervisor,
        screen: &Screen,
        devices: Vec<Box<dyn VirtioDevice>>,
    ) -> Result<Machine, BuildError> {
        let console = Console {
            output: Box::new(screen.clone()),
            input: None,
        };
        let snapshot = self.snapshot();
        Machine::restore(hypervisor, snapshot, console, devices, &Threads::default())
    }
}

#[test]
fn clones_go_on_where_it_was_and_apart() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    let guest = Guest::script([Step::Count(COUNTER)]).vcpus(2);
    let screen = guest.screen.clone();
    let mut first = guest.build(&hypervisor);
    first.resume().expect("a new machine");
    until("it counts", || word(&first, COUNTER) > 10);
    let running = first.save().expect_err("it runs");
    assert!(matches!(running, LifeError::Phase { .. }), "{running}");
    first.pause().expect("it runs");
    let at = word(&first, COUNTER);
    let saved = Saved::of(&first);
    assert_eq!(word(&first, COUNTER), at, "saving changes nothing");
    first.resume().expect("it is paused");

    let mut clones = [(); 2].map(|()| saved.restore(&hypervisor, &screen));
    for clone in &mut clones {
        assert_eq!(clone.phase(), Phase::Paused);
        assert_eq!(word(clone, COUNTER), at);
        clone.resume().expect("it is paused");
    }
    let [mut one, other] = clones;
    until("one goes on", || word(&one, COUNTER) > at);
    until("the other goes on", || word(&other, COUNTER) > at);
    until("the first goes on", || word(&first, COUNTER) > at);
    // What is written after it was saved is nobody else's.
    one.pause().expect("it runs");
    let (mine, theirs) = (word(&one, COUNTER), word(&other, COUNTER));
    until("the other goes on alone", || word(&other, COUNTER) > theirs);
    assert_eq!(word(&one, COUNTER), mine);
    let third = saved.restore(&hypervisor, &screen);
    assert_eq!(word(&third, COUNTER), at, "the file is as it was");
}

/// Saved and restored again and again while it prints, it loses nothing and says nothing twice.
#[test]
fn what_it_prints_continues() {
    const TURN: Duration = Duration::from_millis(1);
    const MOVES: u32 = 25;
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    let text: String = ('a'..='z').cycle().take(3000).collect();
    let letters = text.bytes().map(|letter| Step::Out8(0x3f8, letter));
    let guest = Guest::script(letters.chain([OFF]));
    let screen = guest.screen.clone();
    let mut machine = guest.build(&hypervisor);
    let mut moves = 0;
    // Each move looks at all of the memory; a few dozen say as much as a thousand.
    while moves < MOVES {
        machine.resume().expect("a paused machine");
        if let Some(reason) = machine.wait(Some(Instant::now() + TURN)) {
            assert_eq!(reason, ExitReason::Poweroff);
            break;
        }
        machine.pause().expect("a running machine");
        if machine.wait(Some(Instant::now())).is_some() {
            break;
        }
        let saved = Saved::of(&machine);
        drop(machine);
        machine = saved.restore(&hypervisor, &screen);
        moves += 1;
    }
    assert!(moves > 1, "it was moved on its way");
    if machine.phase() == Phase::Paused {
        machine.resume().expect("a paused machine");
        assert_eq!(end_of(&machine), ExitReason::Poweroff);
    }
    assert_eq!(screen.text(), text);
}

#[test]
fn a_live_device_goes_on() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    // Waits for a word that nobody writes before it is saved; then asks the device.
    let go = 0x24_0000;
    let steps = crate::hostile::rng_driver(64, [Step::Wait32(0x21_2000, 0x0001_0000), OFF]);
    let steps = [Step::Wait32(go, 1)].into_iter().chain(steps);
    let guest = Guest::script(steps).device(Rng::default());
    let screen = guest.screen.clone();
    let mut machine = guest.build(&hypervisor);
    machine.resume().expect("a new machine");
    machine.pause().expect("it runs");
    let saved = Saved::of(&machine);
    drop(machine);
    let none = saved.restore_with(&hypervisor, &screen, Vec::new());
    assert!(matches!(none, Err(BuildError::State(_))));
    let rng: Box<dyn VirtioDevice> = Box::new(Rng::default());
    let machine = saved.restore_with(&hypervisor, &screen, vec![rng]);
    let mut machine = machine.unwrap_or_else(|error| panic!("{error}"));
    use vm_memory::Bytes as _;
    machine
        .memory()
        .write_obj(1_u32, vm_memory::GuestAddress(go))
        .expect("memory");
    machine.resume().expect("it is paused");
    assert_eq!(end_of(&machine), ExitReason::Poweroff);
    assert_eq!(machine.statistics().device_failures, [("rng", 0, None)]);
}

/// Bytes that were changed are refused, or make a machine that harms nobody: never a panic. What a
/// processor or an interrupt controller holds is read here, and not given to the kernel changed: a
/// host seals what it saves, and how a kernel fares with registers that no processor has is the
/// kernel's.
#[test]
fn a_state_that_was_tampered_with_harms_nobody() {
    const PLACES: usize = 60;
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    let guest = Guest::script([Step::Count(COUNTER)]);
    let screen = guest.screen.clone();
    let mut machine = guest.build(&hypervisor);
    machine.resume().expect("a new machine");
    machine.pause().expect("it runs");
    let saved = Saved::of(&machine);
    drop(machine);
    let find = |name: &[u8]| {
        let mut windows = saved.state.windows(name.len());
        windows.position(|window| window == name).expect("a field")
    };
    let kernels = find(b"\"vcpus\":")..find(b"\"serial\":");
    let (theirs, ours): (Vec<_>, Vec<_>) =
        (12..saved.state.len()).partition(|place| kernels.contains(place));
    let mut refused = 0;
    for places in [theirs, ours] {
        for place in places.iter().step_by(places.len().div_ceil(PLACES)) {
            let mut state = saved.state.clone();
            state[*place] = if state[*place] == b'9' { b'1' } else { b'9' };
            let Ok(state) = MachineState::decode(&state) else {
                refused += 1;
                continue;
            };
            if kernels.contains(place) {
                continue;
            }
            let memory = saved.memory.try_clone().expect("open");
            let snapshot = Snapshot { state, memory };
            let console = Console {
                output: Box::new(screen.clone()),
                input: None,
            };
            let threads = Threads::default();
            match Machine::restore(&hypervisor, snapshot, console, Vec::new(), &threads) {
                Ok(mut machine) => {
                    machine.resume().expect("it is paused");
                    let _ = machine.wait(Some(Instant::now() + Duration::from_millis(2)));
                    machine.stop();
                }
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > 0, "nothing was refused");
}

/// What was left of its time is saved with it.
#[test]
fn a_watchdog_goes_on_where_it_was() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    let guest = Guest::watched(10);
    let screen = guest.screen.clone();
    let mut machine = guest.build(&hypervisor);
    machine.resume().expect("a new machine");
    until("it counts", || word(&machine, COUNTER) > 0);
    machine.pause().expect("it runs");
    let mut clone = Saved::of(&machine).restore(&hypervisor, &screen);
    let longer = Instant::now() + Duration::from_millis(1500);
    assert_eq!(clone.wait(Some(longer)), None, "it stands still");
    clone.resume().expect("it is paused");
    let reason = end_of(&clone);
    assert_eq!(reason, ExitReason::Reboot(RebootBy::Watchdog));
}
