//! Records as callers of the [`Store`](super::Store) see them.

use insula_types::{
    Bytes, Digest, ServiceId, ServiceName, ServiceSpec, TenantId, TenantName, TenantSpec, Traffic,
    VersionNumber, VolumeId, VolumeName, VolumeSpec,
};

use super::volumes::VolumeDirectory;
use super::{Timestamp, UsageTotals};

/// A tenant as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// Never used twice.
    pub id: TenantId,
    /// Unique.
    pub name: TenantName,
    /// Its envelope.
    pub spec: TenantSpec,
    /// Rises with each change of the spec.
    pub generation: u64,
    /// When it was created.
    pub created: Timestamp,
}

/// A version that is kept ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Its number.
    pub number: VersionNumber,
    /// The component's digest.
    pub digest: Digest,
}

/// A service as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Never used twice.
    pub id: ServiceId,
    /// Whose.
    pub tenant: TenantId,
    /// Whose, by name.
    pub tenant_name: TenantName,
    /// Unique within the tenant.
    pub name: ServiceName,
    /// Limits, environment, routes.
    pub spec: ServiceSpec,
    /// Rises with each change of the spec.
    pub generation: u64,
    /// Which versions serve, and how much.
    pub traffic: Traffic,
    /// Versions to keep ready, by number: those that `traffic` lists and the newest.
    pub held: Vec<Held>,
    /// What a rollback goes back to.
    pub previous: Option<VersionNumber>,
    /// When it was created.
    pub created: Timestamp,
}

impl Service {
    /// The digest of a version that is kept ready.
    #[must_use]
    pub fn held(&self, number: VersionNumber) -> Option<Digest> {
        let held = self.held.iter().find(|held| held.number == number);
        held.map(|held| held.digest)
    }
}

/// A version as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// From 1, never used twice within the service.
    pub number: VersionNumber,
    /// The component's digest.
    pub digest: Digest,
    /// The component's size.
    pub size: Bytes,
    /// How long the compilation took; 0 when an earlier artefact was used.
    pub compile_ms: u64,
    /// When it was uploaded.
    pub created: Timestamp,
}

/// Whom a token speaks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// The host's administrator.
    Host,
    /// One tenant.
    Tenant(TenantId, TenantName),
}

/// What a token may do within its scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Look.
    Read,
    /// Look and change.
    Write,
}

/// The SHA-256 of a token's secret.
pub type TokenHash = [u8; 32];

/// A token as it is stored: without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Never used twice.
    pub id: u64,
    /// What its secret hashes to.
    pub hash: TokenHash,
    /// A word for people; need not be unique.
    pub name: String,
    /// Whom it speaks for.
    pub scope: Scope,
    /// What it may do.
    pub access: Access,
    /// When it was created.
    pub created: Timestamp,
    /// When it ends; `None` for never.
    pub expires: Option<Timestamp>,
}

/// A token to be stored.
#[derive(Debug, Clone)]
pub struct NewToken {
    /// What its secret hashes to.
    pub hash: TokenHash,
    /// A word for people.
    pub name: String,
    /// The tenant it speaks for; `None` for the host.
    pub tenant: Option<TenantName>,
    /// What it may do.
    pub access: Access,
    /// When it ends.
    pub expires: Option<Timestamp>,
}

/// A record after it was put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Put<T> {
    /// It is new.
    Created(T),
    /// It was there and has another spec now.
    Changed(T),
    /// It was there with this very spec.
    Unchanged(T),
}

impl<T> Put<T> {
    /// Whether anything is different from before.
    pub const fn is_change(&self) -> bool {
        !matches!(self, Self::Unchanged(_))
    }

    /// The record.
    pub const fn record(&self) -> &T {
        match self {
            Self::Created(record) | Self::Changed(record) | Self::Unchanged(record) => record,
        }
    }
}

/// Which part of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// What follows this item; `None` for the beginning.
    pub after: Option<String>,
    /// How many, at most.
    pub limit: u32,
}

/// A part of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed<T> {
    /// In the list's order.
    pub items: Vec<T>,
    /// The `after` of the next part; `None` at the end.
    pub next: Option<String>,
}

/// What is gone after a deletion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deleted<T> {
    /// The record as it was.
    pub record: T,
    /// Components that nothing refers to any more.
    pub unreferenced: Vec<Digest>,
}

/// A service whose traffic was set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Switched {
    /// The service, before.
    pub before: Service,
    /// The service, after.
    pub service: Service,
}

/// A version that was added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddedVersion {
    /// The service, before.
    pub before: Service,
    /// The service, after.
    pub service: Service,
    /// The version.
    pub version: Version,
    /// Components that nothing refers to any more, since old versions made room.
    pub unreferenced: Vec<Digest>,
}

/// What tenants together were promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Commitments {
    /// How many tenants.
    pub tenants: u64,
    /// How many services.
    pub services: u64,
    /// Sum of the CPU reservations.
    pub reserved_millicores: u64,
    /// Sum of the memory limits.
    pub memory_bytes: u64,
}

/// Sums of one service since its creation, or of one tenant's deleted services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredUsage {
    /// Whose.
    pub tenant: TenantId,
    /// The service; `None` for all of the tenant's deleted services together.
    pub service: Option<ServiceId>,
    /// The sums.
    pub totals: UsageTotals,
}

/// An answer that is given again when its request is repeated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remembered {
    /// Hash of caller, route and `Idempotency-Key`.
    pub key: [u8; 32],
    /// Hash of the request's body: a repetition has the same.
    pub body: [u8; 32],
    /// The status.
    pub status: u16,
    /// The JSON document.
    pub answer: String,
}

/// A volume as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Never used twice.
    pub id: VolumeId,
    /// Whose.
    pub tenant: TenantId,
    /// Whose, by name.
    pub tenant_name: TenantName,
    /// Unique within the tenant.
    pub name: VolumeName,
    /// How much it holds.
    pub spec: VolumeSpec,
    /// Where its content is.
    pub directory: VolumeDirectory,
    /// Whether it can only be read.
    pub read_only: bool,
    /// The name, at that time, of the volume that it was copied from.
    pub origin: Option<VolumeName>,
    /// Rises with each change of the spec.
    pub generation: u64,
    /// When it was created.
    pub created: Timestamp,
}

/// A volume to be stored. Of one that is there already only the spec counts.
#[derive(Debug, Clone)]
pub struct NewVolume {
    /// How much it holds.
    pub spec: VolumeSpec,
    /// Its directory, which is there.
    pub directory: VolumeDirectory,
    /// Whether it can only be read.
    pub read_only: bool,
    /// What it was copied from.
    pub origin: Option<VolumeName>,
}

/// An uploaded and compiled component.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewVersion {
    /// Its digest; the blob is in its place.
    pub digest: Digest,
    /// Its size.
    pub size: Bytes,
    /// How long the compilation took.
    pub compile_ms: u64,
}
