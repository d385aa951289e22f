//! Names, quantities and resource envelopes of Insula.
//!
//! Everything that two rooms of the house talk about is defined here once: parsed, checked and
//! printed, without any I/O. This crate depends on nothing of ours and never will; it knows no
//! HTTP, no wasmtime and no clock.
//!
//! * [`machine`]: what a caller asks of a machine
//! * [`name`]: names of tenants and services, digests, version numbers, internal ids
//! * [`outbound`]: where a service's guests may send requests to
//! * [`quantity`]: CPU, bytes, fuel and durations, in the notation of Kubernetes
//! * [`spec`]: what a caller asks for (tenant and service specs), checked with all mistakes at once
//! * [`rollback`]: when the host takes a new version back by itself
//! * [`traffic`]: how a service's requests are divided among its versions
//! * [`volume`]: what a tenant keeps between requests
//! * [`outcome`]: how a request can end, in the words that metrics, logs and problems share
#![forbid(unsafe_code)]

#[cfg(test)]
mod fuzz;
pub mod machine;
pub mod name;
pub mod outbound;
pub mod outcome;
pub mod quantity;
pub mod rollback;
pub mod spec;
pub mod traffic;
pub mod volume;

pub use machine::MachineSpec;
pub use name::{
    Digest, ImageName, MachineId, MachineName, ServiceId, ServiceName, TenantId, TenantName,
    VersionNumber, VolumeId, VolumeName,
};
pub use outcome::Outcome;
pub use quantity::{Bytes, Fuel, Millicores, Millis, Shares};
pub use rollback::AutoRollback;
pub use spec::{ServiceSpec, TenantSpec};
pub use traffic::{StickyHeader, Traffic};
pub use volume::VolumeSpec;
