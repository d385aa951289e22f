//! The monitor of one full guest under KVM: memory, vCPUs, firmware tables, devices, and the loop
//! that runs them. One process per machine, plain threads, no runtime.
//!
//! Must never depend on the host: it is told everything by values and by open descriptors, opens
//! no path, and knows no tenant.
//!
//! **The guest is hostile from its first instruction.** Every value that it writes is checked
//! where it is used, nothing that it does may panic the monitor, and what it does too often costs
//! it its own time.
//!
//! * [`machine`]: what belongs together: pause, resume, stop
//! * [`config`]: what a machine is to be
//! * [`boot`]: kernels, and what is in memory before the first instruction
//! * [`acpi`]: the firmware tables
//! * [`exit`]: why a machine ended
//! * [`event`]: what threads and KVM wake each other with
//! * [`jail`]: what the process does to itself before the first guest instruction
//! * [`layout`]: what is where in guest-physical memory
//! * [`life`]: the life of a machine, one enum and one transition function
//! * [`memory`]: guest memory, and the vectors through which files are read into it
//! * [`monitor`]: the process that runs one machine, and how its host speaks with it
//! * [`probe`]: what kind of KVM this is, by trying
//! * [`rate_limiter`]: token buckets for bytes and operations
//! * [`threads`]: how threads are started, and where the jail hooks in
//! * [`virtio`]: the MMIO transport, the queues, and the trait that a device implements
#![deny(unsafe_code)]

pub mod acpi;
pub mod boot;
pub mod config;
mod devices;
pub mod event;
pub mod exit;
pub mod jail;
mod kvm;
pub mod layout;
pub mod life;
pub mod machine;
pub mod memory;
pub mod monitor;
pub mod probe;
pub mod rate_limiter;
pub mod threads;
mod vcpu;
pub mod virtio;

pub use devices::{ConsoleCounts, GenerationError};
pub use kvm::{Hypervisor, KvmError, OpenError};
pub use machine::Machine;
pub use vcpu::{ExitCounts, VcpuError};
