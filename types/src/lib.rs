//! Names, quantities and resource envelopes of Insula.
//!
//! Everything that two rooms of the house talk about is defined here once: parsed, checked and
//! printed, without any I/O. This crate depends on nothing of ours and never will; it knows no
//! HTTP, no wasmtime and no clock.
//!
//! * [`machine`]: what a caller asks of a machine
//! * [`name`]: names of tenants and services, digests, version numbers, internal ids
//! * [`quantity`]: CPU, bytes, fuel and durations, in the notation of Kubernetes
//! * [`spec`]: what a caller asks for (tenant and service specs), checked with all mistakes at once
//! * [`outcome`]: how a request can end, in the words that metrics, logs and problems share
#![forbid(unsafe_code)]

pub mod machine;
pub mod name;
pub mod outcome;
pub mod quantity;
pub mod spec;

pub use machine::MachineSpec;
pub use name::{
    Digest, ImageName, MachineId, MachineName, ServiceId, ServiceName, TenantId, TenantName,
    VersionNumber,
};
pub use outcome::Outcome;
pub use quantity::{Bytes, Fuel, Millicores, Millis, Shares};
pub use spec::{ServiceSpec, TenantSpec};
