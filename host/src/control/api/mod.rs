//! The handlers, one file per resource.

pub(super) mod audit;
pub(super) mod backup;
pub(super) mod host;
pub(super) mod images;
pub(super) mod machines;
pub(super) mod services;
pub(super) mod streams;
pub(super) mod tenants;
pub(super) mod tokens;
pub(super) mod usage;
pub(super) mod versions;
pub(super) mod volumes;
