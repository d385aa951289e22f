//! A machine that runs in this process, and what belongs to it.

use std::fs::File;
use std::io::{self, Write};

use super::console::Hub;
use super::description::{Begin, DescriptionError, MachineDescription, Meter, Parts};
use super::protocol::{DeviceStatistics, EXIT_REASONS, Statistics};
use super::wire::{Incoming, SlotError};
use crate::config::{Console, MachineConfig};
use crate::jail::seccomp::{Filters, SeccompError};
use crate::jail::syscalls::Kind;
use crate::kvm::{Hypervisor, OpenError};
use crate::machine::{BuildError, LifeError, Machine};
use crate::snapshot::FormatError;
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

/// Why a machine was not saved.
#[derive(Debug, thiserror::Error)]
pub(super) enum SaveError {
    #[error(transparent)]
    Life(#[from] LifeError),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error("writing the state: {0}")]
    File(#[from] io::Error),
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
            begin,
            devices,
            meters,
        } = description.realize(with)?;
        let (hub, printed, input) = Hub::new()?;
        let console = Console {
            output: Box::new(printed),
            input: Some(input),
        };
        let threads = behind(filters);
        let mut machine = match begin {
            Begin::Boot {
                vcpus,
                memory,
                boot,
            } => {
                let config = MachineConfig {
                    vcpus,
                    memory,
                    boot,
                    console,
                    devices,
                };
                Machine::new(&hypervisor, config, &threads)?
            }
            Begin::Snapshot(snapshot) => {
                Machine::restore(&hypervisor, *snapshot, console, devices, &threads)?
            }
        };
        filters.install(Kind::Api)?;
        machine.resume()?;
        Ok(Self {
            machine,
            hub,
            meters,
        })
    }

    /// Writes state and memory into these files; returns when both are durable.
    pub(super) fn save(&self, state: &mut File, memory: &File) -> Result<(), SaveError> {
        let saved = self.machine.save()?;
        self.machine.save_memory(memory)?;
        state.write_all(&saved.encode()?)?;
        state.sync_data()?;
        Ok(())
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
            ThreadKind::Device(_) | ThreadKind::Console | ThreadKind::Watchdog => Kind::Device,
        };
        filters.install(kind).map_err(io::Error::other)
    })
}

/// In the order of [`EXIT_REASONS`].
fn by_reason(exits: ExitCounts) -> [u64; EXIT_REASONS.len()] {
    [
        exits.port_read,
        exits.port_write,
        exits.memory_read,
        exits.memory_write,
        exits.interrupted,
        exits.other,
    ]
}
