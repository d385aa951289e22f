//! Full guests: their processes, their directories, their groups, and what they use.
//!
//! ```text
//!   control thread                         │ one thread per running machine   │ one process each
//!   ──────────────                         │ ──────────────────────────────   │ ────────────────
//!   Machines: a life for each machine ─ask─▶ runner ─── control socket ───────▶ monitor (vmm)
//!        ▲                                 │    │                             │
//!        └───────────── tell ──────────────┼────┘                             │
//! ```
//!
//! * [`book`]: every machine's life, and what control does with it
//! * [`runner`]: the thread that speaks with a monitor
//! * [`start`], [`place`], [`cgroups`]: what a monitor is born into
//! * [`network`]: what connects it with the rest
//! * [`saved`]: its snapshot, sealed
//! * [`times`]: what it uses
//!
//! *Invariant:* a monitor is known by its directory, not by its parent: whatever happens to this
//! process, the next one finds it there, or finds out why it ended.

use std::process::ExitCode;

pub(crate) mod book;
pub(crate) mod cgroups;
pub mod network;
pub(crate) mod place;
pub(crate) mod runner;
pub(crate) mod saved;
pub(crate) mod start;
pub(crate) mod times;

pub use insula_vmm::probe::{Support, probe};
pub use start::MONITOR_VERB;

/// The whole life of a monitor process, for the program's [`MONITOR_VERB`].
#[must_use]
pub fn monitor_main(orders: &str) -> ExitCode {
    insula_vmm::monitor::run(orders)
}
