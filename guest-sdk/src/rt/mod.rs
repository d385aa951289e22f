//! The executor: one future, polled until it is done, on the one thread that a
//! guest has.
//!
//! ```text
//! block_on ── polls ──▶ the handler ── reads, writes, sleeps ──▶ Wait (registers a pollable)
//!    ▲                                                              │
//!    └──────── wakes ◀── wasi:io/poll over all registered ◀─────────┘
//! ```
//!
//! Combinators (join, select, `FuturesUnordered`) work, as every wait has its own
//! waker. If the future waits for nothing that could ever happen, `block_on`
//! says [`Stalled`] instead of hanging. Natively the same function parks the
//! thread.

#[cfg(target_os = "wasi")]
mod wasi;
#[cfg(target_os = "wasi")]
pub(crate) use wasi::{Sleep, Wait, block_on};

#[cfg(not(target_os = "wasi"))]
mod native;
#[cfg(not(target_os = "wasi"))]
pub(crate) use native::{Sleep, block_on};

/// The future waits, and nothing is left that could wake it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stalled;
