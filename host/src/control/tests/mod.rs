//! The admin API against a fake data plane, with real sockets, files and child processes.

mod api;
mod lifecycle;
mod rig;
