//! What Insula looks like from outside: real processes, real sockets, real files. A module per
//! feature; every test is a sentence that holds.

mod admin;
mod bad_bytes;
mod cli;
mod cold;
mod curl;
mod durable;
mod fuel;
mod hostile;
mod ingress;
mod kills;
mod logs;
mod machines;
mod main_job;
mod measured;
mod operations;
mod overload;
mod prometheus;
mod python;
mod reuse;
mod roles;
mod samples;
mod streaming;
mod tls;
mod traffic;
mod two_processes;
