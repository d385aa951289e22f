//! A saved machine with something changed: it is refused, or goes on standing still.
//!
//! What the state says of processors and interrupt controllers is KVM's to check, and is read here
//! but never given to it changed.

use std::fs::File;

use insula_types::Bytes;
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::Value;
use vm_memory::GuestAddress;

use super::driver::change;
use super::random::Random;
use super::{repeat, say};
use crate::boot::{BootSource, FlatCode, ProcessorMode};
use crate::config::{Console, MachineConfig, VcpuCount};
use crate::memory::MemorySize;
use crate::snapshot::{MachineState, Snapshot};
use crate::threads::Threads;
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::Balloon;
use crate::virtio::rng::Rng;
use crate::{Hypervisor, Machine};

/// Magic and version.
const HEAD_BYTES: usize = 12;

fn size() -> MemorySize {
    MemorySize::new(Bytes::mib(2)).expect("a size")
}

fn devices() -> Vec<Box<dyn VirtioDevice>> {
    let balloon = Balloon::new(size()).expect("descriptors");
    vec![Box::new(Rng::default()), Box::new(balloon)]
}

/// A machine that has not run, saved.
fn saved(hypervisor: &Hypervisor) -> (Vec<u8>, File) {
    let config = MachineConfig {
        vcpus: VcpuCount::ONE,
        memory: size(),
        boot: BootSource::Flat(FlatCode {
            code: vec![0xf4],
            address: GuestAddress(0x1000),
            mode: ProcessorMode::Real,
        }),
        console: Console::default(),
        devices: devices(),
    };
    let mut machine = Machine::new(hypervisor, config, &Threads::default()).expect("a machine");
    machine.resume().expect("a new machine");
    machine.pause().expect("it runs");
    let state = machine.save().expect("it is paused");
    let memory = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a file");
    let memory = File::from(memory);
    machine.save_memory(&memory).expect("room");
    (state.encode().expect("small"), memory)
}

#[test]
fn snapshot() {
    let hypervisor = match Hypervisor::open() {
        Ok(hypervisor) => hypervisor,
        Err(why) => {
            say(&format!("skipped: {why}"));
            return;
        }
    };
    let (state, memory) = saved(&hypervisor);
    let content: Value = serde_json::from_slice(&state[HEAD_BYTES..]).expect("its own");
    repeat("snapshot", |random| {
        changed_bytes(&state, random);
        let mut content = content.clone();
        for _ in 0..=random.below(3) {
            change(&mut content, random);
        }
        let _ = serde_json::from_value::<MachineState>(content.clone());
        for kept in ["vcpus", "vm"] {
            content[kept] = serde_json::from_slice::<Value>(&state[HEAD_BYTES..])
                .expect("its own")
                .get(kept)
                .cloned()
                .expect("it has them");
        }
        let Ok(state) = serde_json::from_value::<MachineState>(content) else {
            return;
        };
        let snapshot = Snapshot {
            state,
            memory: memory.try_clone().expect("a descriptor"),
        };
        let (console, threads) = (Console::default(), Threads::default());
        // Whether it is one or not: nothing panics, and nothing hangs when it goes.
        let _ = Machine::restore(&hypervisor, snapshot, console, devices(), &threads);
    });
}

/// Anything at all instead of some of its bytes, or less of them.
fn changed_bytes(state: &[u8], random: &mut Random) {
    let mut bytes = state.to_vec();
    for _ in 0..=random.below(4) {
        let at = usize::try_from(random.below(bytes.len() as u64)).expect("within");
        bytes[at] = random.byte();
    }
    if random.one_in(4) {
        let length = random.below(bytes.len() as u64);
        bytes.truncate(usize::try_from(length).expect("within"));
    }
    let _ = MachineState::decode(&bytes);
}
