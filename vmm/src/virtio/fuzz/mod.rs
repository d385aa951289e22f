//! Hostile drivers by chance: for each device, sequences of register writes, rings and requests
//! from a seed, some as they should be and some not, with a host side that misbehaves as well.
//!
//! What must hold after every sequence: the device's thread lives and comes to rest when it is
//! told to; it works again after a reset; nothing leaves the network device with another's address.
//!
//! Each target runs for half a second with the other tests, and for longer with
//! `cargo xtask fuzz TARGET --seconds N`. A failure names the seed and the number of its sequence;
//! with `INSULA_FUZZ_SEED` they come again.

mod driver;
mod random;
mod snapshot;
mod targets;
mod watchdog;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::device::VirtioDevice;
use driver::Hostile;
use random::Random;

const BRIEFLY: Duration = Duration::from_millis(500);
/// A sequence takes milliseconds: one that is the same at so many looks hangs. Looks are counted,
/// not time, since whoever stops this process stops them as well.
const LOOKS: u32 = 300;
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// The host's side of a device.
trait Host {
    /// What a driver of this device would say.
    fn request(&mut self, random: &mut Random) -> Vec<u8>;

    /// Something happens on the host.
    fn act(&mut self, random: &mut Random);

    /// What must hold at the end.
    fn check(&mut self) {}
}

type Target = (Box<dyn VirtioDevice>, Box<dyn Host>);

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().expect("a number"))
}

/// Runs sequences of hostile drivers.
fn fuzz(name: &str, target: impl Fn(&mut Random) -> Target) {
    repeat(name, |random| sequence(&target, random));
}

/// Runs sequences until the time is over.
fn repeat(name: &str, sequence: impl Fn(&mut Random)) {
    let seconds = number("INSULA_FUZZ_SECONDS");
    let time = seconds.map_or(BRIEFLY, Duration::from_secs);
    let seed = number("INSULA_FUZZ_SEED").unwrap_or_else(|| {
        let mut seed = [0; 8];
        crate::entropy::fill(&mut seed).expect("entropy");
        u64::from_le_bytes(seed)
    });
    let done = Arc::new(AtomicU64::new(0));
    watch(name, seed, &done);
    let end = Instant::now() + time;
    let mut sequences = 0_u64;
    while Instant::now() < end {
        let mut random = Random::new(seed ^ sequences.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let outcome = catch_unwind(AssertUnwindSafe(|| sequence(&mut random)));
        if let Err(panic) = outcome {
            say(&format!("{name}: seed {seed}, sequence {sequences} failed"));
            resume_unwind(panic);
        }
        sequences += 1;
        done.store(sequences, Ordering::Relaxed);
    }
    done.store(u64::MAX, Ordering::Relaxed);
    say(&format!("{name}: {sequences} sequences from seed {seed}"));
}

fn sequence(target: &impl Fn(&mut Random) -> Target, random: &mut Random) {
    let (device, mut host) = target(random);
    let mut driver = Hostile::new(device, random);
    for _ in 0..random.below(100) {
        driver.step(random, &mut *host);
    }
    driver.finish();
    host.check();
}

/// Ends the process when a sequence does not.
fn watch(name: &str, seed: u64, done: &Arc<AtomicU64>) {
    let (name, done) = (name.to_owned(), Arc::clone(done));
    thread::spawn(move || {
        let (mut last, mut looks) = (0, 0);
        loop {
            thread::sleep(LOOK_EVERY);
            let now = done.load(Ordering::Relaxed);
            if now == u64::MAX {
                return;
            }
            looks = if now == last { looks + 1 } else { 0 };
            last = now;
            if looks > LOOKS {
                say(&format!("{name}: seed {seed}, sequence {now} hangs"));
                std::process::abort();
            }
        }
    });
}

fn say(line: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[test]
fn rng() {
    fuzz("rng", targets::rng);
}

#[test]
fn block() {
    fuzz("block", targets::block);
}

#[test]
fn overlay() {
    fuzz("overlay", targets::overlay);
}

#[test]
fn net() {
    fuzz("net", targets::net);
}

#[test]
fn vsock() {
    fuzz("vsock", targets::vsock);
}

#[test]
fn balloon() {
    fuzz("balloon", targets::balloon);
}
