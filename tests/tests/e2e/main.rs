//! What Insula looks like from outside: real processes, real sockets, real files. A module per
//! feature; every test is a sentence that holds.

mod admin;
mod bad_bytes;
mod bombs;
mod canary;
mod cli;
mod cold;
mod curl;
mod durable;
mod faults;
mod fuel;
mod full;
mod handmade;
mod hostile;
mod ingress;
mod kills;
mod logs;
mod machines;
mod main_job;
mod measured;
mod operations;
mod outbound;
mod overload;
mod prometheus;
mod python;
mod reuse;
mod roles;
mod samples;
mod schema;
mod specification;
mod stores;
mod streaming;
mod tampered;
mod tls;
mod traffic;
mod volumes;
