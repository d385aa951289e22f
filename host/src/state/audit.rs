//! Who changed what: the audit log.
//!
//! An entry is part of the transaction of the change that it tells of, so that there is never one
//! without the other.

use insula_types::{TenantId, TenantName};
use serde_json::Value;

use super::Timestamp;

/// A change to be written down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Audit {
    /// The token that was used; `None` for the host itself.
    pub token: Option<u64>,
    /// That token's name, or `host`.
    pub actor: String,
    /// Where the call came from.
    pub peer: Option<String>,
    /// What was done: the API's operation, or what the host did by itself.
    pub operation: String,
    /// Whose it is; `None` for what concerns the host.
    pub tenant: Option<(TenantId, TenantName)>,
    /// What was changed, such as `acme/hello`.
    pub subject: String,
    /// As it was; `None` for what was not there.
    pub before: Option<Value>,
    /// As it is; `None` for what is gone.
    pub after: Option<Value>,
}

/// An entry as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditEntry {
    /// Rising, never used twice.
    pub id: u64,
    /// When.
    pub time: Timestamp,
    /// What.
    pub audit: Audit,
}
