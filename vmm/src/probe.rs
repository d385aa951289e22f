//! What kind of KVM this is, by trying: a file `/dev/kvm` says nothing about what is behind it.
//!
//! A guest of a few instructions counts down and turns its machine off; the same loop runs outside
//! for comparison. On hardware, and on a processor that emulates hardware for its whole system, both
//! take about the same time. Where each of the guest's instructions is emulated one by one, as some
//! sandboxes do it, the guest takes a hundred times as long, and dies on many instructions of an
//! ordinary kernel: no machine is worth starting there.

use std::fmt;
use std::time::{Duration, Instant};

use insula_types::Bytes;
use vm_memory::GuestAddress;

use crate::boot::{BootSource, FlatCode, ProcessorMode};
use crate::config::{Console, MachineConfig, VcpuCount};
use crate::exit::ExitReason;
use crate::kvm::Hypervisor;
use crate::machine::Machine;
use crate::memory::MemorySize;
use crate::threads::Threads;

/// Turns of the loop: a fraction of a millisecond on hardware.
const TURNS: u32 = 200_000;
/// How much longer than outside the loop may take in a guest, beside what entering and leaving the
/// guest takes.
const SLOWER_AT_MOST: u32 = 12;
const ENTERING: Duration = Duration::from_millis(25);
/// Other work on the machine does not slow a loop down so much: there is no need to try again.
const BEYOND_DOUBT: u32 = 4;
/// Nobody waits longer for an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// The best of so many: other work on the machine only ever makes a run longer.
const RUNS: usize = 3;

/// What machines can run on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Support {
    /// The processor runs the guest.
    Hardware,
    /// A program plays the processor.
    Emulated,
    /// There is none, and why.
    Absent(String),
}

impl Support {
    /// All words.
    pub const WORDS: [&'static str; 3] = ["hardware", "emulated", "absent"];

    /// In one word, as the metric has it.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Hardware => "hardware",
            Self::Emulated => "emulated",
            Self::Absent(_) => "absent",
        }
    }
}

impl fmt::Display for Support {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hardware => f.write_str("KVM runs guests on the processor itself"),
            Self::Emulated => f.write_str(
                "this KVM emulates every instruction of a guest, and no distribution's kernel runs on it",
            ),
            Self::Absent(why) => write!(f, "no KVM: {why}"),
        }
    }
}

/// Tries. Takes some milliseconds, or where each instruction is emulated up to some seconds.
#[must_use]
pub fn probe() -> Support {
    let hypervisor = match Hypervisor::open() {
        Ok(hypervisor) => hypervisor,
        Err(why) => return Support::Absent(why.to_string()),
    };
    let mut inside = Duration::MAX;
    for _ in 0..RUNS {
        match count_down(&hypervisor) {
            Ok(took) => inside = inside.min(took),
            Err(why) => return Support::Absent(format!("a guest of six instructions: {why}")),
        }
        let outside = (0..RUNS).map(|_| outside()).min().unwrap_or_default();
        let most = outside * SLOWER_AT_MOST + ENTERING;
        if inside <= most {
            return Support::Hardware;
        }
        if inside > most * BEYOND_DOUBT {
            return Support::Emulated;
        }
    }
    Support::Emulated
}

/// ```text
///    mov ecx, TURNS
/// 1: dec ecx; jnz 1b
///    mov dx, 0x601; mov al, 0x34; out dx, al     ; power off
/// ```
fn code() -> Vec<u8> {
    let mut code = vec![0x66, 0xb9];
    code.extend(TURNS.to_le_bytes());
    code.extend([
        0x66, 0x49, 0x75, 0xfc, 0xba, 0x01, 0x06, 0xb0, 0x34, 0xee, 0xf4,
    ]);
    code
}

fn count_down(hypervisor: &Hypervisor) -> Result<Duration, String> {
    let config = MachineConfig {
        vcpus: VcpuCount::ONE,
        memory: MemorySize::new(Bytes::mib(2)).map_err(|error| error.to_string())?,
        boot: BootSource::Flat(FlatCode {
            code: code(),
            address: GuestAddress(0x1000),
            mode: ProcessorMode::Real,
        }),
        console: Console::default(),
        devices: Vec::new(),
    };
    let machine = Machine::new(hypervisor, config, &Threads::default());
    let mut machine = machine.map_err(|error| error.to_string())?;
    let start = Instant::now();
    machine.resume().map_err(|error| error.to_string())?;
    let reason = machine.wait(Some(start + PATIENCE));
    let took = start.elapsed();
    match reason {
        Some(ExitReason::Poweroff) => Ok(took),
        Some(other) => Err(other.to_string()),
        None => Err(format!("did not end within {} s", PATIENCE.as_secs())),
    }
}

fn outside() -> Duration {
    let start = Instant::now();
    let mut left = TURNS;
    while std::hint::black_box(left) != 0 {
        left -= 1;
    }
    start.elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_agrees_with_what_opens() {
        let support = probe();
        assert!(Support::WORDS.contains(&support.word()));
        let opens = Hypervisor::open();
        match support {
            Support::Absent(why) if opens.is_err() => {
                assert!(why.contains("/dev/kvm") || why.contains("KVM"), "{why}");
            }
            Support::Absent(why) => panic!("KVM opens, and yet: {why}"),
            Support::Hardware | Support::Emulated => assert!(opens.is_ok()),
        }
    }
}
