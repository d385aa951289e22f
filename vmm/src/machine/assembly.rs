//! Putting a machine together: its parts, its threads, its lines.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread;

use kvm_bindings::kvm_clock_data;
use kvm_ioctls::VcpuFd;

use super::{BuildError, Machine, Phase};
use crate::acpi;
use crate::boot::{self, BootSource, Entry};
use crate::config::{Console, VcpuCount};
use crate::devices::watchdog::{Watchdog, WatchdogSaved};
use crate::devices::{Devices, GenerationId, SerialPort, SerialSaved, feed};
use crate::exit::Ending;
use crate::kvm::{Hypervisor, VirtualMachine, cpuid, failed, msrs};
use crate::layout;
use crate::memory::{self, GuestMemory, MemorySize};
use crate::snapshot::MsrList;
use crate::threads::{ThreadKind, Threads, named};
use crate::vcpu::{self, Vcpu};
use crate::virtio::{MmioTransport, VirtioDevice};

/// What a machine is put together of, new or saved.
pub(super) struct Parts {
    pub(super) vm: VirtualMachine,
    pub(super) processors: Vec<VcpuFd>,
    pub(super) devices: Vec<MmioTransport>,
    pub(super) generation: GenerationId,
    pub(super) serial: Option<SerialSaved>,
    pub(super) watchdog: WatchdogSaved,
    pub(super) clock: Option<kvm_clock_data>,
}

impl Parts {
    /// Starts the threads that are left: the console's, and the processors', which are parked. All
    /// are behind their filters when this returns.
    pub(super) fn together(
        self,
        hypervisor: &Hypervisor,
        console: Console,
        threads: &Threads,
    ) -> Result<Machine, BuildError> {
        let vm = self.vm;
        let ending = Arc::new(Ending::new().map_err(BuildError::Console)?);
        let Console { output, input } = console;
        let line = vm.line(layout::COM1_GSI)?;
        let serial = SerialPort::new(line, output, self.serial.as_ref());
        let serial = Arc::new(serial.map_err(BuildError::Console)?);
        let watchdog = Arc::new(Watchdog::new(self.watchdog));
        let devices = Arc::new(Devices::new(serial, self.devices, watchdog));
        let mut vcpus = Vec::with_capacity(self.processors.len());
        for (number, fd) in (0..).zip(self.processors) {
            let (devices, ending) = (Arc::clone(&devices), Arc::clone(&ending));
            vcpus.push(Vcpu::spawn(number, fd, devices, ending, threads)?);
        }
        let mut machine = Machine {
            phase: Phase::Paused,
            vcpus,
            console: None,
            watching: None,
            devices,
            generation: self.generation,
            ending,
            power_button: vm.line(layout::POWER_BUTTON_GSI)?,
            msrs: Arc::new(MsrList::of(hypervisor)?),
            clock: self.clock,
            vm,
        };
        let watchdog = machine.devices.watchdog();
        let watching = watchdog.watch(Arc::clone(&machine.ending), threads);
        machine.watching = Some(watching.map_err(BuildError::Watchdog)?);
        if let Some(input) = input {
            let port = Arc::clone(machine.devices.serial());
            let console = threads.spawn(ThreadKind::Console, move || feed(&port, &input));
            machine.console = Some(console.map_err(BuildError::Console)?);
        }
        threads.ready().map_err(BuildError::Threads)?;
        Ok(machine)
    }
}

/// A new machine's parts, before the first instruction. The kernel takes about as long to make a
/// machine as we do to fill its memory, and neither needs the other: so that is done beside.
pub(super) fn make(
    hypervisor: &Hypervisor,
    vcpus: VcpuCount,
    size: MemorySize,
    source: &mut BootSource,
    devices: Vec<Box<dyn VirtioDevice>>,
    threads: &Threads,
) -> Result<(VirtualMachine, Vec<VcpuFd>, Vec<MmioTransport>), BuildError> {
    let memory = memory::create(size)?;
    let count = devices.len();
    thread::scope(|scope| {
        let filling = named("fill-memory")
            .spawn_scoped(scope, || fill(&memory, vcpus, size, source, count))
            .map_err(BuildError::Threads)?;
        let vm = VirtualMachine::new(hypervisor, memory.clone())?;
        let processors = processors(hypervisor, &vm, vcpus)?;
        let devices = start_devices(&vm, devices, threads)?;
        let entry = filling
            .join()
            .unwrap_or_else(|panic| resume_unwind(panic))?;
        // The others wait for the first one's INIT and SIPI.
        if let Some(first) = processors.first() {
            vcpu::set_registers(first, entry)?;
        }
        Ok((vm, processors, devices))
    })
}

/// What is in memory before the first instruction.
fn fill(
    memory: &GuestMemory,
    vcpus: VcpuCount,
    size: MemorySize,
    source: &mut BootSource,
    virtio_devices: usize,
) -> Result<Entry, BuildError> {
    let entry = boot::load(memory, size, source)?;
    boot::write_tables(memory)?;
    boot::write_reset_vector(memory)?;
    acpi::write(memory, vcpus, virtio_devices)?;
    Ok(entry)
}

/// New processors, but for the first one's registers.
fn processors(
    hypervisor: &Hypervisor,
    vm: &VirtualMachine,
    vcpus: VcpuCount,
) -> Result<Vec<VcpuFd>, BuildError> {
    let topology = cpuid::Topology::new(vcpus);
    let supported = cpuid::supported(hypervisor)?;
    let mut processors = Vec::with_capacity(usize::from(vcpus.get()));
    for number in 0..vcpus.get() {
        let fd = vm.create_vcpu(number)?;
        let leaves = cpuid::for_vcpu(&supported, topology, number);
        fd.set_cpuid2(&leaves.ok_or(BuildError::Cpuid)?)
            .map_err(failed("KVM_SET_CPUID2"))?;
        msrs::set_first(&fd)?;
        processors.push(fd);
    }
    Ok(processors)
}

pub(super) fn check(
    hypervisor: &Hypervisor,
    vcpus: VcpuCount,
    devices: usize,
) -> Result<(), BuildError> {
    let most = hypervisor.vcpus_max();
    if usize::from(vcpus.get()) > most {
        let count = vcpus.get();
        return Err(BuildError::Vcpus { count, most });
    }
    if devices > layout::VIRTIO_DEVICES_MAX {
        return Err(BuildError::Devices { count: devices });
    }
    Ok(())
}

/// Gives each device its slot, its line, and its notifications.
pub(super) fn start_devices(
    vm: &VirtualMachine,
    devices: Vec<Box<dyn VirtioDevice>>,
    threads: &Threads,
) -> Result<Vec<MmioTransport>, BuildError> {
    let count = devices.len();
    let mut started = Vec::with_capacity(count);
    for (slot, device) in devices.into_iter().enumerate() {
        let name = device.kind().name();
        let place = layout::virtio_slot(slot);
        let (base, gsi) = place.ok_or(BuildError::Devices { count })?;
        let line = vm.line(gsi)?;
        let transport = MmioTransport::new(device, vm.memory().clone(), line, threads);
        let transport = transport.map_err(|source| BuildError::Device {
            device: name,
            source,
        })?;
        for (queue, notification) in (0_u32..).zip(transport.notifications()) {
            vm.catch_writes(notification, MmioTransport::notify_address(base), queue);
        }
        started.push(transport);
    }
    Ok(started)
}
