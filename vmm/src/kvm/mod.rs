//! The kernel's side: opening KVM, a virtual machine with its interrupt controllers, and what
//! a processor says of itself.

pub(crate) mod cpuid;
pub(crate) mod msrs;
mod vm;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use kvm_ioctls::{Cap, Kvm};

pub(crate) use vm::VirtualMachine;

/// The only version that there has been since 2007 (KVM API, 4.1).
const API_VERSION: i32 = 12;

/// Capabilities without which there is no machine, and their names.
const NEEDED: [(Cap, &str); 11] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// A call of the kernel that failed: which, and why.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct KvmError {
    /// The call's name.
    pub what: &'static str,
    /// The kernel's reason.
    pub source: io::Error,
}

/// For `map_err`: names the call.
pub(crate) fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError {
        what,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}

/// Why KVM is not to be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is not there, or not for us.
    #[error("opening /dev/kvm: {0}")]
    Open(io::Error),
    /// Not the KVM that we know.
    #[error("this KVM speaks version {found} of its interface, not {API_VERSION}")]
    Version {
        /// What it speaks.
        found: i32,
    },
    /// Too old, or a part of it only.
    #[error("this KVM lacks {name}")]
    Lacks {
        /// The capability.
        name: &'static str,
    },
}

/// KVM, checked to have what a machine needs.
#[derive(Debug)]
pub struct Hypervisor {
    kvm: Kvm,
}

impl Hypervisor {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// It is not there, not for us, or not enough.
    pub fn open() -> Result<Self, OpenError> {
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map_err(OpenError::Open)?;
        Self::from_device(device.into())
    }

    /// Takes `/dev/kvm` as it was opened by another, outside the jail.
    ///
    /// # Errors
    /// It is not KVM, or not enough.
    pub fn from_device(device: OwnedFd) -> Result<Self, OpenError> {
        let kvm = adopt::kvm(device);
        let found = kvm.get_api_version();
        if found != API_VERSION {
            return Err(OpenError::Version { found });
        }
        for (capability, name) in NEEDED {
            if !kvm.check_extension(capability) {
                return Err(OpenError::Lacks { name });
            }
        }
        Ok(Self { kvm })
    }

    pub(crate) fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// How many vCPUs this KVM gives one machine.
    #[must_use]
    pub fn vcpus_max(&self) -> usize {
        self.kvm.get_max_vcpus()
    }
}

/// The only way into KVM's crate for a descriptor that is open.
mod adopt {
    #![allow(unsafe_code, reason = "the crate takes a descriptor as a bare number")]

    use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

    use kvm_ioctls::Kvm;

    pub(super) fn kvm(device: OwnedFd) -> Kvm {
        // SAFETY: the descriptor is open, and given away here by its only owner. That it is KVM is
        // checked by the first call on it: another device answers that with an error.
        unsafe { Kvm::from_raw_fd(device.into_raw_fd()) }
    }
}
