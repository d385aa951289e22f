//! The harness of the end-to-end tests: real processes, real sockets, real files.
//!
//! ```no_run
//! # use insula_tests::TestHost;
//! # use serde_json::json;
//! let host = TestHost::start();
//! let tenant = host.tenant("a").memory("512MiB").create();
//! let hello = tenant.service("hello").limits(json!({"fuel": "1G"})).deploy("hello");
//! let answer = hello.get("/").send();
//! assert_eq!((answer.status, answer.text()), (200, "Hello from Insula\n".to_owned()));
//! ```
//!
//! * [`host`]: the process under test: started, restarted, killed, looked at from outside
//! * [`tenant`]: tenants and services, created and deployed through the admin API
//! * [`proc`]: what the kernel says of a process
//! * [`http`]: a blocking HTTP/1.1 client that shows what is on the wire
//! * [`admin`]: the admin API
//! * [`metrics`]: the Prometheus text format, read
//! * [`load`]: many requests at once
//! * [`guests`]: the components that are deployed
//! * [`tools`]: programs of others, and what a test says when they are missing
//! * [`wait`]: polling with a deadline
//! * [`alone`]: tests that measure run beside nothing else
//!
//! Everything here panics when it fails: a test that cannot be set up has failed. It knows
//! nothing of the host's insides and must never link `insula-host`: what it sees, users see.
#![forbid(unsafe_code)]

pub mod admin;
pub mod alone;
pub mod fault;
pub mod guests;
pub mod host;
pub mod http;
pub mod load;
pub mod metrics;
pub mod proc;
pub mod tenant;
pub mod tools;
pub mod wait;

pub use admin::Admin;
pub use host::TestHost;
pub use http::{Answer, Connection};
pub use metrics::Metrics;
pub use tenant::{Service, Tenant};
pub use wait::until;
