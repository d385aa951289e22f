//! One virtual machine, as the kernel knows it.
#![allow(
    unsafe_code,
    reason = "telling KVM where guest memory is mapped in this process"
)]

use std::sync::Arc;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, VcpuFd, VmFd};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Hypervisor, KvmError, failed};
use crate::event::Event;
use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS};
use crate::memory::GuestMemory;
use crate::virtio::InterruptLine;

/// Memory and interrupt controllers. Keeps the memory mapped as long as the kernel knows of it.
#[derive(Debug)]
pub(crate) struct VirtualMachine {
    fd: Arc<VmFd>,
    /// Dropped after `fd`; vCPUs hold the machine alive in the kernel, and are joined before.
    memory: GuestMemory,
}

impl VirtualMachine {
    /// A machine with memory, local APICs, I/O APIC and timer, and no processor.
    pub(crate) fn new(hypervisor: &Hypervisor, memory: GuestMemory) -> Result<Self, KvmError> {
        let fd = hypervisor.kvm().create_vm();
        let fd = Arc::new(fd.map_err(failed("KVM_CREATE_VM"))?);
        let machine = Self { fd, memory };
        machine.set_memory()?;
        let fd = &machine.fd;
        fd.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(KVM_TSS)
            .map_err(failed("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        // Port 0x61 with it: kernels read it to calibrate.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..kvm_pit_config::default()
        };
        fd.create_pit2(pit).map_err(failed("KVM_CREATE_PIT2"))?;
        Ok(machine)
    }

    fn set_memory(&self) -> Result<(), KvmError> {
        for (slot, region) in (0_u32..).zip(self.memory.iter()) {
            let address = region.get_host_address(vm_memory::MemoryRegionAddress(0));
            let address = address.map_err(|_| KvmError {
                what: "KVM_SET_USER_MEMORY_REGION",
                source: std::io::ErrorKind::InvalidInput.into(),
            })?;
            let description = kvm_userspace_memory_region {
                slot,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: address as u64,
                flags: 0,
            };
            // SAFETY: the region is mapped readable and writable, with this length, and stays so
            // until `self.memory` is dropped, which is after the machine and all its vCPUs are
            // closed. Nothing in this process treats it as anything but bytes that change at any
            // time. Slots and ranges do not overlap, as regions do not.
            unsafe { self.fd.set_user_memory_region(description) }
                .map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    pub(crate) fn create_vcpu(&self, number: u8) -> Result<VcpuFd, KvmError> {
        self.fd
            .create_vcpu(u64::from(number))
            .map_err(failed("KVM_CREATE_VCPU"))
    }

    /// A line into the interrupt controllers: through irqfd, or where KVM has none, by calls.
    pub(crate) fn line(&self, gsi: u32) -> Result<InterruptLine, KvmError> {
        if self.fd.check_extension(Cap::Irqfd) {
            let event = Event::new().map_err(|source| KvmError {
                what: "eventfd",
                source,
            })?;
            if self.fd.register_irqfd(event.eventfd(), gsi).is_ok() {
                return Ok(InterruptLine::Irqfd(event));
            }
        }
        let machine = Arc::clone(&self.fd);
        Ok(InterruptLine::Call(Box::new(move || {
            // An edge. It fails only where there is no such line, which was looked at when the
            // machine was laid out.
            let _ = machine.set_irq_line(gsi, true);
            let _ = machine.set_irq_line(gsi, false);
        })))
    }

    /// Lets KVM turn a 4-byte write of `value` at `address` into an event, without waking us.
    /// Where it cannot, the write arrives as any other, and nothing else changes.
    pub(crate) fn catch_writes(&self, event: &Event, address: GuestAddress, value: u32) -> bool {
        let address = IoEventAddress::Mmio(address.0);
        self.fd.check_extension(Cap::Ioeventfd)
            && self
                .fd
                .register_ioevent(event.eventfd(), &address, value)
                .is_ok()
    }
}
