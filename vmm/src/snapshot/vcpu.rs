//! One processor: everything that KVM keeps of it (KVM API, section 4).

use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::kvm::{Hypervisor, KvmError, failed};

/// `IA32_TSC_DEADLINE` (Intel SDM volume 4, table 2-2): takes effect only once the local APIC and the
/// time stamp counter are as they were, so it comes last.
const TSC_DEADLINE: u32 = 0x6e0;
/// KVM takes so many in one call (`MAX_IO_MSRS`).
const MSRS_AT_ONCE: usize = 256;
/// As many as any processor has of these.
const MSRS_MAX: usize = 4_096;

/// The model-specific registers that KVM can save.
#[derive(Debug, Clone, Default)]
pub(crate) struct MsrList(Vec<u32>);

impl MsrList {
    /// To be asked while `/dev/kvm` is at hand.
    pub(crate) fn of(hypervisor: &Hypervisor) -> Result<Self, KvmError> {
        let list = hypervisor.kvm().get_msr_index_list();
        let list = list.map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
        let mut indices: Vec<u32> = list.as_slice().to_vec();
        indices.sort_by_key(|index| (*index == TSC_DEADLINE, *index));
        Ok(Self(indices))
    }
}

/// A processor between two instructions.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// Reads it all. The processor must be parked, and nothing of its last exit unfinished.
pub(crate) fn save(vcpu: &VcpuFd, list: &MsrList) -> Result<VcpuState, KvmError> {
    // First: it lets the local APIC take what is pending.
    let mp_state = vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
    let cpuid = vcpu
        .get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("KVM_GET_CPUID2"))?;
    Ok(VcpuState {
        cpuid: cpuid.as_slice().to_vec(),
        mp_state,
        regs: vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?,
        sregs: vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?,
        xsave: vcpu.get_xsave().map_err(failed("KVM_GET_XSAVE"))?,
        xcrs: vcpu.get_xcrs().map_err(failed("KVM_GET_XCRS"))?,
        debug: vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
        lapic: vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?,
        msrs: save_msrs(vcpu, &list.0)?,
        events: vcpu
            .get_vcpu_events()
            .map_err(failed("KVM_GET_VCPU_EVENTS"))?,
    })
}

/// Those that this processor has: KVM stops at the first that it cannot read.
fn save_msrs(vcpu: &VcpuFd, mut indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut saved = Vec::with_capacity(indices.len());
    while !indices.is_empty() {
        let some = &indices[..indices.len().min(MSRS_AT_ONCE)];
        let entries: Vec<_> = some
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..kvm_msr_entry::default()
            })
            .collect();
        let mut list = msrs(&entries)?;
        let read = vcpu.get_msrs(&mut list).map_err(failed("KVM_GET_MSRS"))?;
        saved.extend(list.as_slice().iter().take(read));
        // Past those that were read, and past the one that was not.
        let done = if read < some.len() { read + 1 } else { read };
        indices = &indices[done..];
    }
    Ok(saved)
}

fn msrs(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|_| KvmError {
        what: "KVM_SET_MSRS",
        source: std::io::ErrorKind::InvalidInput.into(),
    })
}

/// Puts a new processor into this state.
pub(crate) fn restore(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), KvmError> {
    let invalid = |what| KvmError {
        what,
        source: std::io::ErrorKind::InvalidInput.into(),
    };
    let cpuid = CpuId::from_entries(&state.cpuid).map_err(|_| invalid("KVM_SET_CPUID2"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
    vcpu.set_mp_state(state.mp_state)
        .map_err(failed("KVM_SET_MP_STATE"))?;
    vcpu.set_regs(&state.regs).map_err(failed("KVM_SET_REGS"))?;
    vcpu.set_sregs(&state.sregs)
        .map_err(failed("KVM_SET_SREGS"))?;
    set_xsave(vcpu, &state.xsave)?;
    // A processor without XSAVE has none, and does not take none.
    if state.xcrs.nr_xcrs != 0 {
        vcpu.set_xcrs(&state.xcrs).map_err(failed("KVM_SET_XCRS"))?;
    }
    vcpu.set_debug_regs(&state.debug)
        .map_err(failed("KVM_SET_DEBUGREGS"))?;
    vcpu.set_lapic(&state.lapic)
        .map_err(failed("KVM_SET_LAPIC"))?;
    if state.msrs.len() > MSRS_MAX {
        return Err(invalid("KVM_SET_MSRS"));
    }
    restore_msrs(vcpu, &state.msrs)?;
    vcpu.set_vcpu_events(&state.events)
        .map_err(failed("KVM_SET_VCPU_EVENTS"))
}

#[allow(
    unsafe_code,
    reason = "the crate leaves it to the caller that no larger state was asked for"
)]
fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), KvmError> {
    // SAFETY: the kernel reads more than the 4096 bytes of the structure only where a process has
    // asked for larger features (arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM), which nobody here does.
    unsafe { vcpu.set_xsave(xsave) }.map_err(failed("KVM_SET_XSAVE"))
}

/// Some registers can be read and not be written; that is well where they have their value already.
fn restore_msrs(vcpu: &VcpuFd, mut entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    while !entries.is_empty() {
        let some = &entries[..entries.len().min(MSRS_AT_ONCE)];
        let written = vcpu.set_msrs(&msrs(some)?);
        let written = written.map_err(failed("KVM_SET_MSRS"))?;
        let mut done = written;
        if let Some(refused) = some.get(written) {
            let asked = kvm_msr_entry {
                index: refused.index,
                ..kvm_msr_entry::default()
            };
            let mut list = msrs(&[asked])?;
            let read = vcpu.get_msrs(&mut list).map_err(failed("KVM_GET_MSRS"))?;
            let is = list.as_slice().first().map(|entry| entry.data);
            if read != 1 || is != Some(refused.data) {
                return Err(KvmError {
                    what: "KVM_SET_MSRS",
                    source: std::io::Error::other(format!(
                        "register {:#x} does not take {:#x}",
                        refused.index, refused.data
                    )),
                });
            }
            done += 1;
        }
        entries = &entries[done..];
    }
    Ok(())
}
