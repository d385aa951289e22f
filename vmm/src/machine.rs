//! A machine: what belongs together, and its life.
//!
//! ```text
//!              resume                pause
//!   Paused ───────────▶ Running ───────────▶ Paused
//!     │                    │
//!     └────── stop ────────┴──▶ Stopped          (also when the guest ends it: see `ending`)
//! ```
//!
//! A new machine is paused: all its threads exist, filters and all, and no instruction has run.
//!
//! *Pause*, in this order: vCPUs are parked; the guest's watchdog stands still; devices are brought to
//! rest; the guest's clock is read. *Resume* is the reverse: the clock goes on from where it was read,
//! devices work, the watchdog goes on, vCPUs run. *Stop* ends vCPU threads, then the console's and the
//! watchdog's, then the devices': nobody is left who could notify them.

mod assembly;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use kvm_bindings::kvm_clock_data;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion};

use assembly::{Parts, check, make, start_devices};

use crate::acpi::AcpiError;
use crate::boot::BootError;
use crate::config::{Console, MachineConfig, VcpuCount};
use crate::devices::watchdog::WatchdogSaved;
use crate::devices::{ConsoleCounts, Devices, GenerationError, GenerationId};
use crate::exit::{Ending, ExitReason};
use crate::kvm::{Hypervisor, KvmError, VirtualMachine, failed};
use crate::layout;
use crate::memory::{GuestMemory, MemoryError, MemorySize};
use crate::snapshot::{self, MachineState, MsrList, Snapshot, VmState};
use crate::threads::Threads;
use crate::vcpu::{ExitCounts, Vcpu, VcpuError};
use crate::virtio::{InterruptLine, RestoreError, VirtioDevice, WorkerError};

/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Nothing to boot.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// No room for its tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// A device could not be started.
    #[error("virtio-{device}: {source}")]
    Device {
        /// Which.
        device: &'static str,
        /// Why.
        source: WorkerError,
    },
    /// No generation id.
    #[error(transparent)]
    Generation(#[from] GenerationError),
    /// A vCPU could not be started.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// More devices than lines.
    #[error(
        "{count} virtio devices, and a machine has lines for {}",
        layout::VIRTIO_DEVICES_MAX
    )]
    Devices {
        /// How many.
        count: usize,
    },
    /// More vCPUs than this KVM gives.
    #[error("{count} vCPUs, and this KVM gives a machine {most}")]
    Vcpus {
        /// How many.
        count: u8,
        /// The most.
        most: usize,
    },
    /// What each vCPU says of itself does not fit KVM's table.
    #[error("this host's processor has more CPUID leaves than KVM takes")]
    Cpuid,
    /// The state is of no such machine.
    #[error("the saved state has {0}")]
    State(&'static str),
    /// A device does not take its saved state.
    #[error("virtio-{device}: {source}")]
    Restore {
        /// Which.
        device: &'static str,
        /// Why.
        source: RestoreError,
    },
    /// A descriptor or a thread for the console.
    #[error("starting the console: {0}")]
    Console(io::Error),
    /// A thread for the watchdog.
    #[error("starting the watchdog: {0}")]
    Watchdog(io::Error),
    /// Any thread, or what is to run first on it.
    #[error("starting the machine's threads: {0}")]
    Threads(io::Error),
}

/// Why a machine does not pause or resume.
#[derive(Debug, thiserror::Error)]
pub enum LifeError {
    /// Not from here.
    #[error("the machine is {phase}, and cannot {wanted}")]
    Phase {
        /// Where it is.
        phase: Phase,
        /// What was wanted.
        wanted: &'static str,
    },
    /// A vCPU's thread is gone.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A device's thread is gone.
    #[error(transparent)]
    Device(#[from] WorkerError),
    /// The clock, or something else that the kernel keeps.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The file for the memory.
    #[error("writing the memory: {0}")]
    Memory(io::Error),
}

/// Where a machine is in its life, as the host wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// No instruction runs.
    Paused,
    /// It runs; or it did, and the guest has ended it.
    Running,
    /// Its threads are gone.
    Stopped,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Paused => "paused",
            Self::Running => "running",
            Self::Stopped => "stopped",
        })
    }
}

/// What a machine did so far.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MachineStatistics {
    /// Of all vCPUs.
    pub exits: ExitCounts,
    /// Of the console.
    pub console: ConsoleCounts,
    /// For each device: its name, how often it stopped because its driver broke the rules or its
    /// host side failed, and why it did last.
    pub device_failures: Vec<(&'static str, u64, Option<String>)>,
}

/// One full guest. Dropping it stops it.
#[derive(Debug)]
pub struct Machine {
    phase: Phase,
    vcpus: Vec<Vcpu>,
    console: Option<JoinHandle<Option<()>>>,
    watching: Option<JoinHandle<Option<()>>>,
    devices: Arc<Devices>,
    generation: GenerationId,
    ending: Arc<Ending>,
    power_button: InterruptLine,
    /// What to save of each processor.
    msrs: Arc<MsrList>,
    /// The guest's clock, while it is paused and has run before.
    clock: Option<kvm_clock_data>,
    /// Last: memory stays mapped until all that uses it is gone.
    vm: VirtualMachine,
}

impl Machine {
    /// Makes the machine, paused before its first instruction.
    ///
    /// # Errors
    /// What is missing or refused; nothing is left behind.
    pub fn new(
        hypervisor: &Hypervisor,
        config: MachineConfig,
        threads: &Threads,
    ) -> Result<Self, BuildError> {
        let MachineConfig {
            vcpus,
            memory: size,
            boot: mut source,
            console,
            devices,
        } = config;
        check(hypervisor, vcpus, devices.len())?;
        let (vm, processors, devices) =
            make(hypervisor, vcpus, size, &mut source, devices, threads)?;
        let generation = GenerationId::new(vm.line(layout::EVENT_GSI)?);
        generation.set(vm.memory())?;
        let parts = Parts {
            vm,
            processors,
            devices,
            generation,
            serial: None,
            watchdog: WatchdogSaved::default(),
            clock: None,
        };
        parts.together(hypervisor, console, threads)
    }

    /// Makes a machine as it was saved, paused where it was. The devices are to be of the same kinds
    /// as those that were saved, with the same features.
    ///
    /// # Errors
    /// What is missing or refused, or the state is not of such a machine; nothing is left behind.
    pub fn restore(
        hypervisor: &Hypervisor,
        snapshot: Snapshot,
        console: Console,
        devices: Vec<Box<dyn VirtioDevice>>,
        threads: &Threads,
    ) -> Result<Self, BuildError> {
        let Snapshot { state, memory } = snapshot;
        let wrong = BuildError::State;
        let vcpus = u8::try_from(state.vcpus.len()).ok();
        let vcpus = vcpus.and_then(|count| VcpuCount::new(count).ok());
        let vcpus = vcpus.ok_or(wrong("a number of processors that no machine has"))?;
        if devices.len() != state.devices.len() {
            return Err(wrong("another number of devices"));
        }
        check(hypervisor, vcpus, devices.len())?;
        let size = insula_types::Bytes::new(state.memory_bytes).ok();
        let size = size.ok_or(wrong("a memory that no machine has"))?;
        let memory = snapshot::map(MemorySize::new(size)?, memory)?;
        let vm = VirtualMachine::new(hypervisor, memory)?;
        let mut processors = Vec::with_capacity(state.vcpus.len());
        for (number, vcpu) in (0..vcpus.get()).zip(&state.vcpus) {
            let fd = vm.create_vcpu(number)?;
            snapshot::restore_vcpu(&fd, vcpu)?;
            processors.push(fd);
        }
        let clock = state.vm.restore(vm.fd())?;
        let mut devices = start_devices(&vm, devices, threads)?;
        threads.ready().map_err(BuildError::Threads)?;
        // After the interrupt controllers: a device that goes live may interrupt at once.
        for (device, saved) in devices.iter_mut().zip(&state.devices) {
            let name = device.kind().name();
            let unfit = |source| BuildError::Restore {
                device: name,
                source,
            };
            device.hold().map_err(|error| unfit(error.into()))?;
            device.restore(saved).map_err(unfit)?;
        }
        // Whoever goes on from this snapshot as well must not draw the same random numbers.
        let generation = GenerationId::new(vm.line(layout::EVENT_GSI)?);
        generation.renew(vm.memory())?;
        let parts = Parts {
            vm,
            processors,
            devices,
            generation,
            serial: Some(state.serial),
            watchdog: state.watchdog,
            clock: Some(clock),
        };
        parts.together(hypervisor, console, threads)
    }

    /// Its state, while it is paused; what it wrote to disks is durable then. The memory is written
    /// by [`save_memory`](Self::save_memory).
    ///
    /// # Errors
    /// It is not paused, or something does not give its state.
    pub fn save(&self) -> Result<MachineState, LifeError> {
        self.expect(Phase::Paused, "be saved")?;
        let memory = self.vm.memory().iter().map(GuestMemoryRegion::len);
        let vcpus = self.vcpus.iter().map(|vcpu| vcpu.save(&self.msrs));
        let devices = self.devices.virtio().map(|device| device.save());
        Ok(MachineState {
            memory_bytes: memory.sum(),
            vcpus: vcpus.collect::<Result<_, _>>()?,
            vm: VmState::save(self.vm.fd(), self.clock)?,
            serial: self.devices.serial().save(),
            watchdog: self.devices.watchdog().save(),
            devices: devices.collect::<Result<_, _>>()?,
        })
    }

    /// Writes its memory into an empty file, while it is paused.
    ///
    /// # Errors
    /// It is not paused, or the file's.
    pub fn save_memory(&self, file: &File) -> Result<(), LifeError> {
        self.expect(Phase::Paused, "be saved")?;
        snapshot::write(self.vm.memory(), file).map_err(LifeError::Memory)
    }

    /// Runs, for the first time or again.
    ///
    /// # Errors
    /// It is not paused, or a thread is gone.
    pub fn resume(&mut self) -> Result<(), LifeError> {
        self.expect(Phase::Paused, "resume")?;
        if let Some(clock) = self.clock.take() {
            let clock = kvm_clock_data {
                clock: clock.clock,
                ..kvm_clock_data::default()
            };
            let set = self.vm.fd().set_clock(&clock);
            set.map_err(failed("KVM_SET_CLOCK"))?;
        }
        for device in self.devices.virtio() {
            device.release()?;
        }
        self.devices.watchdog().go();
        for vcpu in &self.vcpus {
            vcpu.run()?;
        }
        self.phase = Phase::Running;
        Ok(())
    }

    /// Brings all to rest. The guest's clock stands still.
    ///
    /// # Errors
    /// It is not running, or a thread is gone.
    pub fn pause(&mut self) -> Result<(), LifeError> {
        self.expect(Phase::Running, "pause")?;
        let parking: Result<Vec<_>, _> = self.vcpus.iter().map(Vcpu::park).collect();
        for parking in parking? {
            parking.wait()?;
        }
        self.devices.watchdog().stand();
        for device in self.devices.virtio() {
            device.hold()?;
        }
        let clock = self.vm.fd().get_clock();
        self.clock = Some(clock.map_err(failed("KVM_GET_CLOCK"))?);
        self.phase = Phase::Paused;
        Ok(())
    }

    /// Presses its power button. Whether the guest listens is the guest's.
    pub fn press_power_button(&self) {
        self.power_button.pulse();
    }

    /// Waits until the machine is over, by guest or host. `None` if it is not by then.
    #[must_use]
    pub fn wait(&self, deadline: Option<Instant>) -> Option<ExitReason> {
        self.ending.wait(deadline)
    }

    /// Readable once the machine is over: for a loop that also listens to others.
    #[must_use]
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.ending.event().as_fd()
    }

    /// Ends it, if it is not over, and all its threads. Returns why it ended first.
    pub fn stop(&mut self) -> ExitReason {
        self.ending.end(ExitReason::Stopped);
        self.vcpus.clear();
        self.devices.serial().stop();
        self.devices.watchdog().stop();
        for thread in [self.watching.take(), self.console.take()] {
            let _ = thread.map(JoinHandle::join);
        }
        self.phase = Phase::Stopped;
        self.ending.reason().unwrap_or(ExitReason::Stopped)
    }

    /// Gives it another generation id, and tells the guest: for a machine whose state was used
    /// before, so that it draws other random numbers than the one that used it.
    ///
    /// # Errors
    /// There is no entropy.
    pub fn renew_generation(&self) -> Result<(), GenerationError> {
        self.generation.renew(self.vm.memory())
    }

    /// Its memory, which the guest may change at any time.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        self.vm.memory()
    }

    /// Where it is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// What it did so far. After [`stop`](Self::stop) the exits are gone with the vCPUs.
    #[must_use]
    pub fn statistics(&self) -> MachineStatistics {
        let exits = self.vcpus.iter().map(Vcpu::exits);
        let failures = self.devices.virtio().map(|device| {
            let (count, why) = device.failures();
            (device.kind().name(), count, why)
        });
        MachineStatistics {
            exits: exits.fold(ExitCounts::default(), |sum, one| sum + one),
            console: self.devices.serial().counts(),
            device_failures: failures.collect(),
        }
    }

    fn expect(&self, phase: Phase, wanted: &'static str) -> Result<(), LifeError> {
        if self.phase == phase {
            return Ok(());
        }
        Err(LifeError::Phase {
            phase: self.phase,
            wanted,
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}
