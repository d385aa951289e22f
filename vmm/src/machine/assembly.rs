//! Putting a machine together: its parts, its threads, its lines.

use std::sync::Arc;

use kvm_bindings::kvm_clock_data;
use kvm_ioctls::VcpuFd;

use super::{BuildError, Machine, Phase};
use crate::boot::Entry;
use crate::config::{Console, VcpuCount};
use crate::devices::watchdog::{Watchdog, WatchdogSaved};
use crate::devices::{Devices, GenerationId, SerialPort, SerialSaved, feed};
use crate::exit::Ending;
use crate::kvm::{Hypervisor, VirtualMachine, cpuid, failed, msrs};
use crate::layout;
use crate::snapshot::MsrList;
use crate::threads::{ThreadKind, Threads};
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
    /// Starts the threads that are left: the console's, and the processors', which are parked.
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
        Ok(machine)
    }
}

/// New processors, as they are before the first instruction.
pub(super) fn processors(
    hypervisor: &Hypervisor,
    vm: &VirtualMachine,
    vcpus: VcpuCount,
    entry: Entry,
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
        // The others wait for the first one's INIT and SIPI.
        if number == 0 {
            vcpu::set_registers(&fd, entry)?;
        }
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
