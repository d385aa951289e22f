//! Model-specific registers: what the first instruction finds, and what a snapshot keeps.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{KvmError, failed};

/// Intel SDM volume 4, table 2-2. MTRRs enabled, and all memory write-back unless said otherwise.
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
/// Fast string operations.
const MISC_ENABLE: u32 = 0x1a0;
const MISC_FAST_STRING: u64 = 1;

/// As firmware leaves them: kernels take for granted that memory is cached.
pub(crate) fn set_first(vcpu: &VcpuFd) -> Result<(), KvmError> {
    for (index, data) in [
        (MTRR_DEF_TYPE, MTRR_WRITE_BACK),
        (MISC_ENABLE, MISC_FAST_STRING),
    ] {
        let entry = kvm_msr_entry {
            index,
            data,
            ..kvm_msr_entry::default()
        };
        let Ok(list) = Msrs::from_entries(&[entry]) else {
            continue;
        };
        // A count below one says that this KVM does not know the register: then it keeps what
        // it had after reset.
        vcpu.set_msrs(&list).map_err(failed("KVM_SET_MSRS"))?;
    }
    Ok(())
}
