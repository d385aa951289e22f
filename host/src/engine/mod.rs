//! The engine: the only place that names wasmtime.
//!
//! ```text
//!  control ── component ──▶ child process: scan ▸ validate ▸ link ▸ compile ──▶ raw artefact
//!          ── seal (MAC) ──▶ file
//!  data    ── file ──▶ open (MAC) ▸ load ──▶ Program ── run(request) ──▶ one instance ──▶ Verdict
//! ```
//!
//! * [`config`]: the one wasmtime configuration, and what it means for a stored artefact
//! * [`scan`]: what a component may contain at most, checked before the compiler sees it
//! * [`compile`]: the child process that compiles one component
//! * [`artefact`]: sealing and opening of compiled code
//! * `load`: the unsafe island that maps compiled code that was opened
//! * `program`: a component's code, in memory only while it is asked
//! * `files`: `wasi:filesystem` over volumes with quotas
//! * `keyvalue`: `wasi:keyvalue` over volumes of keys and values
//! * `guest`: what belongs to one instance: its WASI context, tables and memory meter
//! * [`outgoing`]: requests that a guest sends
//! * [`run`]: one request, from instantiation to the verdict
//! * `shelf`: instances that wait for the next request of a service that reuses them
//!
//! *Invariant:* nothing reaches `load` that [`artefact::open`] did not authenticate.

pub mod artefact;
pub mod compile;
pub mod config;
mod files;
mod guest;
mod guest_log;
mod keyvalue;
mod load;
mod memory;
pub mod outgoing;
mod program;
pub mod run;
pub mod scan;
mod shelf;

pub use compile::compile_child_main;
pub use config::{Engine, EngineError, EngineLimits, compatibility};
pub use files::{Mounted, Place};
pub use guest_log::{LogLine, LogSink};
pub use load::LoadError;
pub use memory::{HostMemory, Refused, TenantMemory};
pub use program::{Program, Vault};
pub use run::Offload;
pub use shelf::{Room, Shelf};
