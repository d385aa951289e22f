//! The admin API against a fake data plane, with real sockets, files and child processes.

mod api;
mod changes;
mod lifecycle;
mod rig;
