//! The Insula host: many tenants' services on one machine.
//!
//! * [`config`]: what the host runs with
//! * [`machines`]: full guests, a process each
//! * [`messages`]: all that crosses between control and data
//! * [`link`]: how it crosses
//! * [`process`]: the data plane as a process of its own
//! * [`engine`]: the only place that names wasmtime
//! * [`pool`]: worker threads and the dispatcher that polls guests in the scheduler's order
//! * [`ingress`]: HTTP from clients
//! * [`control`]: the admin API
//! * [`data`]: the data plane, put together
//! * [`outbound`]: HTTP from guests to the world
//! * [`state`]: intent, kept in SQLite and blobs
//! * [`storage`]: volumes and their quotas
//! * [`tls`]: certificates of the listeners
//! * [`serve`]: both planes, started and drained
//! * [`handover`]: from one host to the next, in place
#![deny(unsafe_code)]

pub mod config;
pub mod control;
pub mod data;
pub mod engine;
pub mod handover;
pub mod ingress;
pub mod link;
pub mod machines;
pub mod messages;
pub mod outbound;
pub mod pool;
pub mod process;
pub mod serve;
pub mod state;
pub mod storage;
pub mod tls;
