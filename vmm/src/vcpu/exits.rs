//! What happens when the guest leaves the processor.

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
};
use kvm_ioctls::VcpuExit;

use super::counts::Counters;
use super::kick::Kickable;
use crate::devices::Devices;
use crate::exit::ExitReason;

/// How one stay in the guest ended.
pub(super) enum Turn {
    /// The guest's access was answered, and it goes on.
    Again,
    /// A kick, or a signal of others: look at the commands.
    Interrupted,
    /// The machine is over.
    End(ExitReason),
}

/// Enters the guest, and answers what it left for.
pub(super) fn run_once(
    number: u8,
    vcpu: &mut Kickable,
    devices: &Devices,
    counters: &Counters,
) -> Turn {
    let unknown = match vcpu.vcpu().run() {
        Ok(VcpuExit::IoIn(port, data)) => {
            counters.port_read.count();
            devices.port_read(port, data);
            return Turn::Again;
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            counters.port_write.count();
            return devices
                .port_write(port, data)
                .map_or(Turn::Again, Turn::End);
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            counters.memory_read.count();
            devices.memory_read(address, data);
            return Turn::Again;
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            counters.memory_write.count();
            devices.memory_write(address, data);
            return Turn::Again;
        }
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {
            counters.interrupted.count();
            return Turn::Interrupted;
        }
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
            counters.interrupted.count();
            return Turn::Interrupted;
        }
        Ok(VcpuExit::Shutdown) => return Turn::End(ExitReason::TripleFault { vcpu: number }),
        Ok(VcpuExit::FailEntry(reason, _)) => {
            let vcpu = number;
            return Turn::End(ExitReason::EntryFailed { vcpu, reason });
        }
        Ok(VcpuExit::InternalError) => None,
        Ok(other) => Some(format!("{other:?}")),
        Err(error) => {
            let reason = std::io::Error::from_raw_os_error(error.errno()).to_string();
            return Turn::End(ExitReason::Run {
                vcpu: number,
                reason,
            });
        }
    };
    counters.other.count();
    Turn::End(match unknown {
        Some(what) => ExitReason::Unknown { vcpu: number, what },
        None => internal(number, vcpu),
    })
}

/// Puts KVM's internal error into words.
fn internal(number: u8, vcpu: &mut Kickable) -> ExitReason {
    let (kind, data) = vcpu.internal_error();
    let words = match kind {
        KVM_INTERNAL_ERROR_EMULATION => "it cannot emulate the instruction there",
        KVM_INTERNAL_ERROR_SIMUL_EX => "an exception came while it delivered another",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an event could not be delivered",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "the hardware gave a reason it does not know",
        _ => "an internal error",
    };
    let numbers: Vec<String> = data.iter().map(|number| format!("{number:#x}")).collect();
    ExitReason::Internal {
        vcpu: number,
        rip: vcpu.vcpu().get_regs().map_or(0, |regs| regs.rip),
        what: format!("{words} (kind {kind}; {})", numbers.join(" ")),
    }
}
