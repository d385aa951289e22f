//! Insula's metrics: counters that the hot path can afford, and their Prometheus exposition.
//!
//! Whoever does the work holds a handle ([`ServiceMetrics`], [`TenantMetrics`]) and adds to plain
//! atomics; names, labels and seconds come in only when somebody scrapes. There is no global
//! registry: a [`DataMetrics`] belongs to the data plane that made it, a [`ControlMetrics`] to the
//! control plane. Their families are disjoint, so the two pages may simply be concatenated.
//!
//! *Invariant:* a dynamic label value is a [`TenantName`](insula_types::TenantName), a
//! [`ServiceName`](insula_types::ServiceName) or a variant of an enum of this crate or of
//! `insula-types`; never a path, a header, an id or a guest's string. This crate depends on
//! `insula-types` and the `prometheus` crate only; it knows no clock, no HTTP and no runtime.
//!
//! * [`data`]: the data plane's families and their handles
//! * [`control`]: what the host is and what it has promised
//! * [`labels`]: the fixed label values
//! * `cells`: nanosecond counters, histograms and integrals on atomics
//! * `page`: from cells to text
#![forbid(unsafe_code)]

mod cells;
pub mod control;
pub mod data;
pub mod labels;
mod page;

pub use control::{BuildInfo, ControlMetrics};
pub use data::{DataMetrics, InstanceGuard, ServiceMetrics, TenantMetrics, Unrouted};
pub use labels::{Direction, InstanceState, Kind, OutboundResult, ShedReason};
pub use page::CONTENT_TYPE;
