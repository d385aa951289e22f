//! The power goes at a random instant: what was acknowledged is there, and nothing is there half.
//!
//! ```text
//!  clients, writer (here) ──▶ host ─▶ ext4 ─▶ disk's cache ─▶ disk │ in a machine that is emulated
//!                                                  │
//!                 the emulator is killed ──────────┴─▶ memory is gone, of the cache any part
//! ```
//!
//! The changes and comparisons are those of [`crate::kills`]. `cargo xtask vm-test power` makes what
//! the machine is made of and runs this; `INSULA_TEST_CUTS` asks for more than 3 cuts,
//! `INSULA_TEST_SEED` for the same choices again (the instants are the machine's). With
//! `INSULA_TEST_LYING_DISK` the disk only pretends to flush, to show that this would be found: the
//! test has to fail then.

mod disk;
mod machine;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use insula_tests::tools::skipped;

use self::disk::{Disk, Flush};
use self::machine::{Machine, Parts};
use crate::kills::random::Random;
use crate::kills::writer::{Ending, Writer};
use crate::kills::{Client, digests, is_served, number_from, seed};

const CUTS: u64 = 3;

/// From within a change to after several, on a processor that is some twenty times slower.
fn instant(random: &mut Random) -> Duration {
    let span = [3_000, 8_000, 15_000, 25_000][random.below(4)];
    Duration::from_millis(random.below(span) as u64)
}

/// The writes of a few changes.
const WRITES: u64 = 60;
/// As long as it takes until somebody writes.
const WRITES_WITHIN: Duration = Duration::from_secs(10);

/// Waits for the moment to cut the power: any, or between two writes that one flush makes last.
fn wait(disk: &Mutex<Disk>, random: &mut Random) {
    std::thread::sleep(instant(random));
    if random.below(4) == 0 {
        return;
    }
    let disk = || disk.lock().expect("a disk");
    disk().fail_after(1 + random.below(WRITES) as u64);
    let until = Instant::now() + WRITES_WITHIN;
    while !disk().has_failed() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_was_acknowledged_survives_a_power_cut_at_any_instant() {
    let Some(parts) = Parts::find() else {
        skipped("no machine to cut the power of: cargo xtask vm-test power makes it");
        return;
    };
    let cuts = number_from("INSULA_TEST_CUTS").unwrap_or(CUTS);
    let mut random = Random(seed());
    let flush = match std::env::var_os("INSULA_TEST_LYING_DISK") {
        Some(_) => Flush::Pretended,
        None => Flush::Honest,
    };
    let disk = Disk::new(parts.disk.clone(), flush);
    let disk = Arc::new(Mutex::new(disk));
    let mut machine = Machine::on(&parts, &disk);
    let mut admin = machine.ready();
    let digests = digests(&admin);
    let mut writer = Writer::new(&admin, Random(random.next()));
    let mut clients =
        ["left", "right"].map(|tenant| Client::new(tenant, Random(random.next()), &digests));
    for cut in 1..=cuts {
        let ended = AtomicBool::new(false);
        let ingress = machine.ingress();
        std::thread::scope(|scope| {
            let _ending = Ending(&ended);
            scope.spawn(|| writer.work(ingress, &ended));
            for client in &mut clients {
                scope.spawn(|| client.work(&admin));
            }
            wait(&disk, &mut random);
            machine.cut();
        });
        disk.lock().expect("a disk").cut(&mut random);
        machine = Machine::on(&parts, &disk);
        admin = machine.ready();
        for client in &mut clients {
            client.compare(&admin);
        }
        writer.compare(machine.ingress());
        for client in &clients {
            is_served(machine.ingress(), &client.tenant, &client.model);
        }
        let changes: u64 = clients.iter().map(|client| client.acknowledged).sum();
        eprintln!(
            "cut {cut}: {changes} acknowledged changes and {} writes of guests, none lost; {:?}",
            writer.acknowledged,
            disk.lock().expect("a disk").counts,
        );
    }
    machine.cut();
    let counts = disk.lock().expect("a disk").counts;
    assert!(counts.sectors_lost > 0, "{counts:?}: no cut cost anything");
    let changes: u64 = clients.iter().map(|client| client.acknowledged).sum();
    assert!(
        changes + writer.acknowledged > cuts,
        "hardly anything was tested"
    );
}
