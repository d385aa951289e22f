//! The scheduler's simulator and proofs.
//!
//! * [`streams`]: hostile workloads from a seed, every invariant checked after
//!   every step;
//! * [`fairness`]: distance from the ideal fluid, in the known bounds;
//! * [`longrun`]: what an operator would measure;
//! * [`small`]: every event sequence of a small host, against [`model`];
//! * [`api`]: random use of the whole API against the same model.
//!
//! A failing seed is printed; `INSULA_SIM_SEED=<seed> cargo test -p
//! insula-scheduler <test>` replays it alone.

#![forbid(unsafe_code)]

mod api;
mod fairness;
mod habit;
mod longrun;
mod meters;
mod model;
mod model_parts;
mod prng;
mod sim;
mod small;
mod streams;
