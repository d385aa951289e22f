//! What all processors of a machine share: interrupt controllers, timer, clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::kvm::{KvmError, failed};

const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// Between two instructions.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    chips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
    clock_ns: u64,
}

impl std::fmt::Debug for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmState")
            .field("clock_ns", &self.clock_ns)
            .finish_non_exhaustive()
    }
}

impl VmState {
    /// Reads it all; the clock is what it was when the machine was paused.
    pub(crate) fn save(vm: &VmFd, clock: Option<kvm_clock_data>) -> Result<Self, KvmError> {
        let mut chips = Vec::new();
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip {
                chip_id,
                ..kvm_irqchip::default()
            };
            vm.get_irqchip(&mut chip)
                .map_err(failed("KVM_GET_IRQCHIP"))?;
            chips.push(chip);
        }
        let clock = match clock {
            Some(clock) => clock,
            None => vm.get_clock().map_err(failed("KVM_GET_CLOCK"))?,
        };
        Ok(Self {
            chips,
            pit: vm.get_pit2().map_err(failed("KVM_GET_PIT2"))?,
            clock_ns: clock.clock,
        })
    }

    /// Puts a new machine into this state; the clock is for its first [`resume`].
    ///
    /// [`resume`]: crate::Machine::resume
    pub(crate) fn restore(&self, vm: &VmFd) -> Result<kvm_clock_data, KvmError> {
        for chip in self.chips.iter().take(CHIPS.len()) {
            vm.set_irqchip(chip).map_err(failed("KVM_SET_IRQCHIP"))?;
        }
        vm.set_pit2(&self.pit).map_err(failed("KVM_SET_PIT2"))?;
        Ok(kvm_clock_data {
            clock: self.clock_ns,
            ..kvm_clock_data::default()
        })
    }
}
