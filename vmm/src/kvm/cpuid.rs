//! What each vCPU says of itself: what the host's KVM supports, less what a guest must not have
//! (nested virtualization, performance counters, enclaves), with the topology of this machine.
//!
//! Sources: Intel SDM volume 2A, CPUID; AMD64 APM volume 3, appendix E; KVM, `cpuid.rst`.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

use super::{Hypervisor, KvmError, failed};
use crate::config::VcpuCount;

/// Every vCPU is a core with one thread, and all are in one package.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Topology {
    vcpus: VcpuCount,
}

impl Topology {
    pub(crate) fn new(vcpus: VcpuCount) -> Self {
        Self { vcpus }
    }

    fn count(self) -> u32 {
        u32::from(self.vcpus.get())
    }

    /// Bits of an APIC id that number the cores.
    fn core_bits(self) -> u32 {
        self.count().next_power_of_two().trailing_zeros()
    }
}

/// What KVM supports on this host.
pub(crate) fn supported(hypervisor: &Hypervisor) -> Result<CpuId, KvmError> {
    hypervisor
        .kvm()
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("KVM_GET_SUPPORTED_CPUID"))
}

/// The leaves of one vCPU.
pub(crate) fn for_vcpu(supported: &CpuId, topology: Topology, number: u8) -> Option<CpuId> {
    let mut leaves: Vec<_> = supported
        .as_slice()
        .iter()
        .filter(|leaf| !matches!(leaf.function, 0xb | 0x1f))
        .copied()
        .collect();
    for leaf in &mut leaves {
        adapt(leaf, topology, number);
    }
    let highest = leaves
        .iter()
        .find(|leaf| leaf.function == 0)
        .map(|leaf| leaf.eax);
    if highest.is_some_and(|highest| highest >= 0xb) {
        leaves.extend(extended_topology(topology, number));
    }
    CpuId::from_entries(&leaves).ok()
}

fn adapt(leaf: &mut kvm_cpuid_entry2, topology: Topology, number: u8) {
    let id = u32::from(number);
    let count = topology.count();
    match (leaf.function, leaf.index) {
        (0x1, _) => {
            // EBX: APIC id, logical processors, and the length of CLFLUSH as it is.
            leaf.ebx = leaf.ebx & 0x0000_ffff | id << 24 | count << 16;
            clear(&mut leaf.ecx, &[ecx1::VMX, ecx1::PDCM]);
            set(&mut leaf.ecx, &[ecx1::TSC_DEADLINE, ecx1::HYPERVISOR]);
            let several = u32::from(count > 1);
            leaf.edx = leaf.edx & !(1 << 28) | several << 28;
        }
        // Deterministic caches: the first two levels belong to a core, the third to all.
        (0x4, _) => {
            let shared = if leaf.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
            leaf.eax = leaf.eax & 0x3fff | shared << 14 | (count - 1) << 26;
        }
        (0x6, _) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (4, 0, 0, 0),
        // SGX and processor trace.
        (0x7, 0) => clear(&mut leaf.ebx, &[2, 25]),
        (0xa | 0x12 | 0x14 | 0x8000_000a | 0x8000_001b | 0x8000_0022, _) => {
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
        }
        // SVM; and the performance counters of core, north bridge and last-level cache.
        (0x8000_0001, _) => clear(&mut leaf.ecx, &[2, 10, 23, 24, 28]),
        (0x8000_0008, _) => {
            leaf.ecx = leaf.ecx & !0xf0ff | topology.core_bits() << 12 | (count - 1);
        }
        (0x8000_001d, _) => {
            let shared = if leaf.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
            leaf.eax = leaf.eax & !(0xfff << 14) | shared << 14;
        }
        (0x8000_001e, _) => (leaf.eax, leaf.ebx, leaf.ecx) = (id, id, 0),
        _ => {}
    }
}

/// Bits of leaf 1, ECX.
mod ecx1 {
    pub(super) const VMX: u32 = 5;
    pub(super) const PDCM: u32 = 15;
    /// KVM has it with its in-kernel APIC always, and says so elsewhere (KVM API, 4.46).
    pub(super) const TSC_DEADLINE: u32 = 24;
    pub(super) const HYPERVISOR: u32 = 31;
}

fn clear(register: &mut u32, bits: &[u32]) {
    for bit in bits {
        *register &= !(1 << bit);
    }
}

fn set(register: &mut u32, bits: &[u32]) {
    for bit in bits {
        *register |= 1 << bit;
    }
}

/// Leaf 0xb: threads of a core, then cores of the package, then nothing.
fn extended_topology(topology: Topology, number: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |index, eax, ebx, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        // The answer depends on ECX (KVM API, 4.20).
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: index | kind << 8,
        edx: u32::from(number),
        ..kvm_cpuid_entry2::default()
    };
    [
        level(0, 0, 1, 1),
        level(1, topology.core_bits(), topology.count(), 2),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..kvm_cpuid_entry2::default()
        }
    }

    fn of(number: u8, count: u8) -> Vec<kvm_cpuid_entry2> {
        let all = [
            0,
            1,
            4,
            7,
            0xa,
            0xb,
            0x12,
            0x8000_0001,
            0x8000_000a,
            0x8000_001e,
        ];
        let host: Vec<_> = all.iter().map(|function| leaf(*function, 0)).collect();
        let host = CpuId::from_entries(&host).expect("few entries");
        let topology = Topology::new(VcpuCount::new(count).expect("a count"));
        let guest = for_vcpu(&host, topology, number).expect("few entries");
        guest.as_slice().to_vec()
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let matching = |leaf: &&kvm_cpuid_entry2| leaf.function == function && leaf.index == index;
        *leaves.iter().find(matching).expect("the leaf")
    }

    #[test]
    fn nesting_counters_and_enclaves_are_hidden() {
        let leaves = of(0, 1);
        assert_eq!(find(&leaves, 1, 0).ecx & (1 << 5), 0, "VMX");
        assert_eq!(find(&leaves, 0x8000_0001, 0).ecx & (1 << 2), 0, "SVM");
        assert_ne!(find(&leaves, 1, 0).ecx & (1 << 31), 0, "hypervisor");
        for function in [0xa, 0x12, 0x8000_000a] {
            let leaf = find(&leaves, function, 0);
            assert_eq!((leaf.eax, leaf.ebx, leaf.ecx, leaf.edx), (0, 0, 0, 0));
        }
    }

    #[test]
    fn every_vcpu_has_its_own_id_everywhere() {
        for number in 0..6 {
            let leaves = of(number, 6);
            let id = u32::from(number);
            assert_eq!(find(&leaves, 1, 0).ebx >> 24, id);
            assert_eq!(find(&leaves, 1, 0).ebx >> 16 & 0xff, 6);
            assert_eq!(find(&leaves, 0xb, 1).edx, id);
            assert_eq!(find(&leaves, 0xb, 1).ebx, 6);
            assert_eq!(find(&leaves, 0xb, 1).eax, 3, "six cores take three bits");
            assert_eq!(find(&leaves, 0x8000_001e, 0).eax, id);
        }
    }
}
