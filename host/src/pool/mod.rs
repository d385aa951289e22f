//! The pool: worker threads shared by all tenants, and the dispatcher that polls their guests.
//!
//! ```text
//!  ingress (on worker w) ── submit(job, home = w)
//!                                     │
//!                                 admission ─▶ waits, or is refused
//!                                     │
//!                                     └─────────────▶ ┌──────────────┐
//!                                                     │  run queue   │  one for the host,
//!  wake (input arrived, timer) ── enqueue ──────────▶ │ (scheduler)  │  under one lock
//!                                                     └──────┬───────┘
//!        ┌──────────── pick ◀───────────────────────────────┘
//!        ▼
//!   poll for one slice, measured with the thread's CPU clock
//!        │
//!        ├─ Pending, not woken ─▶ parked until its waker is called
//!        ├─ Pending, woken ─────▶ preempted: queued again behind its tenant's other jobs
//!        └─ Ready, or killed ───▶ dropped here, inside the measured slice
//! ```
//!
//! A slice that may be long is polled by a [runner](runners) instead, to which the worker lends its
//! core; [`pace`] says which slices those are.
//!
//! Who owns what: [`dispatcher::Pool`] owns every job and its future; a worker borrows one future
//! for one slice; an [`exchange::Exchange`] is shared by a job and the connection that waits for
//! its answer, and writes the usage record when both are gone. A guest that panics the host code
//! below it loses its request (`host_error`), nothing else.
//!
//! *Invariant:* all time between two clock reads of a worker is charged, either to one tenant or
//! to the host.

pub mod admission;
mod batch;
pub mod clock;
pub mod conduct;
pub(crate) mod connections;
mod deadlines;
pub mod dispatcher;
pub mod entries;
pub mod exchange;
pub mod jobs;
pub mod offload;
pub mod pace;
pub mod request_id;
pub(crate) mod resting;
mod run_queue;
mod runners;
mod slot;
pub mod versions;
pub mod worker;

pub use dispatcher::Pool;
