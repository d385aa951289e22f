//! A machine that runs in this process, and what belongs to it.

use std::io;

use super::console::Hub;
use super::description::{DescriptionError, MachineDescription, Meter, Parts};
use super::protocol::{DeviceStatistics, Statistics};
use super::wire::{Incoming, SlotError};
use crate::config::{Console, MachineConfig};
use crate::jail::seccomp::{Filters, SeccompError};
use crate::jail::syscalls::Kind;
use crate::kvm::{Hypervisor, OpenError};
use crate::machine::{BuildError, LifeError, Machine};
use crate::threads::{ThreadKind, Threads};
use crate::vcpu::ExitCounts;

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error(transparent)]
    Description(#[from] DescriptionError),
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error(transparent)]
    Kvm(#[from] OpenError),
    #[error("the console: {0}")]
    Console(#[from] io::Error),
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Filter(#[from] SeccompError),
    #[error(transparent)]
    Life(#[from] LifeError),
}

/// The machine, its console's other side, and its meters.
pub(super) struct Alive {
    pub(super) machine: Machine,
    pub(super) hub: Hub,
    meters: Vec<Meter>,
}

impl Alive {
    /// Makes the machine, puts every thread behind its filter, the calling one last, and lets the
    /// guest run.
    pub(super) fn start(
        description: MachineDescription,
        with: &mut Incoming,
        filters: &Filters,
    ) -> Result<Self, StartError> {
        let hypervisor = Hypervisor::from_device(with.take(description.kvm)?)?;
        let Parts {
            vcpus,
            memory,
            boot,
            devices,
            meters,
        } = description.realize(with)?;
        let (hub, printed, input) = Hub::new()?;
        let config = MachineConfig {
            vcpus,
            memory,
            boot,
            console: Console {
                output: Box::new(printed),
                input: Some(input),
            },
            devices,
        };
        let mut machine = Machine::new(&hypervisor, config, &behind(filters))?;
        filters.install(Kind::Api)?;
        machine.resume()?;
        Ok(Self {
            machine,
            hub,
            meters,
        })
    }

    pub(super) fn statistics(&self) -> Statistics {
        let of = self.machine.statistics();
        let devices = of.device_failures.into_iter().zip(&self.meters);
        Statistics {
            phase: self.machine.phase(),
            exits: by_reason(of.exits),
            console_written_bytes: of.console.written,
            devices: devices
                .map(|((kind, failures, last_failure), meter)| {
                    let (read_bytes, written_bytes) = meter.read();
                    DeviceStatistics {
                        kind: kind.to_owned(),
                        read_bytes,
                        written_bytes,
                        failures,
                        last_failure,
                    }
                })
                .collect(),
        }
    }
}

/// Every thread installs the filter of its kind before it does anything else.
fn behind(filters: &Filters) -> Threads {
    let filters = filters.clone();
    Threads::new(move |thread| {
        let kind = match thread {
            ThreadKind::Vcpu(_) => Kind::Vcpu,
            ThreadKind::Device(_) | ThreadKind::Console => Kind::Device,
        };
        filters.install(kind).map_err(io::Error::other)
    })
}

fn by_reason(exits: ExitCounts) -> Vec<(String, u64)> {
    let named = [
        ("port_read", exits.port_read),
        ("port_write", exits.port_write),
        ("memory_read", exits.memory_read),
        ("memory_write", exits.memory_write),
        ("interrupted", exits.interrupted),
        ("other", exits.other),
    ];
    named.map(|(name, count)| (name.to_owned(), count)).to_vec()
}
