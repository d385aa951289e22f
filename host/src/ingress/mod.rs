//! HTTP from clients: connections, heads, routes, bodies.
//!
//! ```text
//!  accept ▸ guarded connection ▸ hyper ▸ [`handle`]: authority ▸ route ▸ limits ▸ submit
//!                                                         ▲                     │
//!                     [`routes`], swapped whole ──────────┘      job in the pool│
//!  client ◀── hyper ◀── [`body`]: head and frames as they come ◀────────────────┘
//! ```
//!
//! * `connection`: accepting, draining, limits on connections
//! * `billing`: whose account the work on a connection goes to
//! * `guarded_io`, `head_guard`, `frame_guard`: what hyper would let through, and timers on every phase
//! * `socket`: what it does on a connection of a tenant that asks for too much
//! * [`handle`]: one request
//! * [`routes`]: which service a request belongs to
//! * `headers`: what the host takes out of and puts into heads
//! * [`body`]: bodies in both directions
//! * [`problem`]: how a refusal looks
//! * [`logs`]: from guest lines to reports
//!
//! *Invariant:* no problem body shows anything of another tenant or of the host's insides.

mod billing;
pub mod body;
mod connection;
mod frame_guard;
pub mod guarded_io;
pub mod handle;
pub mod head_guard;
mod headers;
pub mod logs;
pub mod problem;
pub mod routes;
mod socket;

pub use connection::Ingress;
