//! Who runs next, who waits, who is held back: Insula's CPU scheduler as a pure
//! state machine. Events and a tick go in, commands come out.
//!
//! This crate must never depend on a clock, a thread, I/O, randomness, or
//! anything outside `std` but `insula-types`: so that a simulator can run years
//! of hostile workloads in seconds from a seed and check every step.
//!
//! One [`Scheduler`] is the host-wide run queue of all workers, held by the
//! dispatcher under one mutex. A worker [picks](Scheduler::pick) a job, runs it
//! for one slice and [charges](Scheduler::charge) the measured time.
//!
//! | rule | source |
//! |---|---|
//! | order by start tags, service over shares; S = max(F, v) on arrival | start-time fair queueing: Goyal, Vin, Cheng, SIGCOMM 1996 |
//! | weights that ask for more cores than a tenant has jobs earn no credit | surplus fair scheduling: Chandra, Adler, Goyal, Shenoy, OSDI 2000 |
//! | reservation first when due, limit even when idle, shares between | mClock: Gulati, Merchant, Varman, OSDI 2010 |
//! | the limit as a token bucket kept in one number | generic cell rate algorithm: ITU-T I.371 |
//! | a change of weight keeps the lag | Stoica et al., RTSS 1996 |
//!
//! Bounds (checked by `tests/`, with W workers, quantum q, and l the longest
//! slice of a tenant, m = max(l, q), b = (W−1)·m + l):
//! * two tenants with jobs always queued, weights w: over any interval
//!   |Δservice_i/w_i − Δservice_j/w_j| ≤ b_i/w_i + b_j/w_j; with one worker
//!   this is SFQ's own bound, l_i/w_i + l_j/w_j;
//! * usage over any t ≤ limit·t + burst + W·m;
//! * no worker idles while a tenant that is not held back has a queued job.

#![forbid(unsafe_code)]

mod account;
mod aside;
mod config;
mod error;
mod heap;
mod place;
mod queue;
mod scheduler;
mod slice;
mod tags;
mod tenant;
mod units;
mod view;

pub use account::{Account, Totals};
pub use aside::Aside;
pub use config::{Config, ConfigError, Params, WORKERS_MAX};
pub use error::{
    AddError, ChargeError, EnqueueError, NoSuchWorker, ParamsError, PickError, SetError,
    UnknownTenant,
};
pub use scheduler::{Class, Enqueued, Removed, Scheduler};
pub use slice::{Charged, Fate, Pick, SliceEnd};
pub use units::{JobId, Millicores, Nanos, OutOfRange, Shares, TenantId, WorkerId};
