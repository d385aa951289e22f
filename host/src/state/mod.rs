//! Intent, kept safely: tenants, services, versions, tokens, usage checkpoints.
//!
//! ```text
//!  control ──(closures)──▶ Worker "insula-state" ──▶ dyn Store ──▶ SQLite   <data>/state.db
//!          ──(closures)──▶ Worker "insula-files" ──▶ Blobs     ──▶ <data>/{blobs,artefacts,tmp}
//! ```
//!
//! [`Store`] is what control relies on: records by name, optimistic concurrency by generation,
//! ids that are never used twice, answers only after the commit is durable. SQLite is the
//! embedded default ([`sqlite`]); a distributed store can take its place, which is why no caller
//! keeps a copy that it trusts, usage is *added* instead of overwritten, and every check that two
//! callers could race for (names, reservations, routes, generations) happens inside the store.
//!
//! On failure: a method that answers an error has changed nothing. A crash loses nothing that was
//! answered; files without a record are removed at the next start (see [`blobs`]). A disk that
//! fails stops all writes ([`health`]).
//!
//! *Invariant:* below the data directory nothing is reached by an ambient path ([`dir`]), and
//! names of tenants and services never become file names.

use std::collections::HashSet;

use insula_types::volume::VolumeKind;
use insula_types::{
    Digest, ImageName, ServiceId, ServiceName, ServiceSpec, TenantId, TenantName, TenantSpec,
    Traffic, VersionNumber, VolumeName,
};

pub mod audit;
pub mod backup;
pub mod blobs;
pub mod dir;
pub mod health;
pub mod machines;
mod records;
#[cfg(test)]
mod specification;
pub mod sqlite;
#[cfg(test)]
mod tests;
pub mod time;
pub mod usage;
pub mod volumes;
pub mod worker;

pub use audit::{Audit, AuditEntry};
pub use blobs::{Blobs, EngineName, NoEngineName};
pub use dir::{DataDir, TemporaryDir};
pub use health::{Health, Stopped};
pub use records::{
    Access, AddedVersion, Commitments, Deleted, Held, Listed, NewToken, NewVersion, NewVolume,
    Page, Put, Remembered, Scope, Service, StoredUsage, Switched, Tenant, Token, TokenHash,
    Version, Volume,
};
pub use sqlite::SqliteStore;
pub use time::Timestamp;
pub use usage::UsageTotals;
pub use worker::Worker;

/// Most tenants of one host.
pub const TENANTS_MAX: u64 = 10_000;
/// Most services of one tenant.
pub const SERVICES_PER_TENANT_MAX: u64 = 10_000;
/// Versions of a service that are kept; the oldest that are not in use make room for new ones.
pub const VERSIONS_KEPT: u64 = 100;
/// Most volumes of one tenant; each has a descriptor.
pub const VOLUMES_PER_TENANT_MAX: u64 = 32;
/// Most tokens of one host.
pub const TOKENS_MAX: u64 = 1_000;
/// Idempotency keys that are remembered, at most.
pub const REMEMBERED_MAX: u64 = 10_000;
/// Entries of the audit log that are kept.
pub const AUDIT_KEPT: u64 = 100_000;
/// How long an idempotency key is remembered.
pub const REMEMBERED_FOR: std::time::Duration = std::time::Duration::from_secs(24 * 3_600);

const fn contents(kind: VolumeKind) -> &'static str {
    match kind {
        VolumeKind::Files => "files, and is mounted with \"volumes\"",
        VolumeKind::Store => "keys and values, and is opened with \"stores\"",
    }
}

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such record.
    #[error("there is no such {0}")]
    NotFound(&'static str),
    /// The caller expected another generation.
    #[error("{}", precondition(.current))]
    Precondition {
        /// The generation that there is; `None` when there is no record.
        current: Option<u64>,
    },
    /// The reservations of all tenants would exceed the host.
    #[error(
        "cpu.reservation of {asked_millicores}m is more than the {free_millicores}m of \
         {capacity_millicores}m that other tenants have left"
    )]
    Reservation {
        /// Asked for.
        asked_millicores: u64,
        /// Not reserved by other tenants.
        free_millicores: u64,
        /// What the host has in all.
        capacity_millicores: u64,
    },
    /// Another service has this route, or another tenant has its host.
    #[error("the route {0:?} belongs to another service, or its host to another tenant")]
    RouteTaken(String),
    /// A service mounts a volume that there is not.
    #[error("volumes: the tenant has no volume {0:?}")]
    UnknownVolume(String),
    /// A service wants to write to a volume that can only be read.
    #[error("volumes: {0:?} is a snapshot and can only be mounted with \"mode\": \"ro\"")]
    VolumeReadOnly(String),
    /// A service wants files of a store, or keys and values of files.
    #[error("the volume {name:?} has {}", contents(*is))]
    WrongKind {
        /// The volume.
        name: String,
        /// What is in it.
        is: VolumeKind,
    },
    /// What is in a volume stays of its kind.
    #[error("a volume's kind stays what it was when the volume was created")]
    KindStays,
    /// A service mounts the volume.
    #[error("the service {service:?} mounts this volume")]
    VolumeInUse {
        /// One of those that do.
        service: String,
    },
    /// A machine names an image that there is not.
    #[error("there is no image {0}")]
    NoImage(ImageName),
    /// A tenant has machines, and cannot be deleted.
    #[error("the tenant has {count} machines; delete them first")]
    HasMachines {
        /// How many.
        count: u64,
    },
    /// A bound on the number of records.
    #[error("there are {max} {what} already, as many as there can be")]
    Full {
        /// Of what.
        what: &'static str,
        /// How many.
        max: u64,
    },
    /// Without this token nobody could administer the host any more.
    #[error("this is the last token that may administer the host; create another one first")]
    LastAdminToken,
    /// There is no room on the disk; nothing was changed.
    #[error("there is no room left where the state is kept")]
    NoSpace,
    /// The disk failed: the caller stops the state ([`Health`]).
    #[error("the state could not be read or written: {0}")]
    Disk(String),
    /// The disk failed before.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// The store itself failed, or holds what cannot be.
    #[error("the state could not be read or written: {0}")]
    Backend(Box<dyn std::error::Error + Send + Sync>),
}

fn precondition(current: &Option<u64>) -> String {
    match current {
        Some(generation) => format!("it is at generation {generation} now; read it again"),
        None => "it does not exist".to_owned(),
    }
}

/// What must hold before a record is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precondition {
    /// Nothing.
    #[default]
    None,
    /// The record exists.
    Exists,
    /// The record does not exist.
    Absent,
    /// The record is at this generation.
    Generation(u64),
}

impl Precondition {
    /// Checks against the record's generation, `None` when there is no record.
    ///
    /// # Errors
    /// [`StoreError::Precondition`].
    pub fn check(self, current: Option<u64>) -> Result<(), StoreError> {
        let holds = match self {
            Self::None => true,
            Self::Exists => current.is_some(),
            Self::Absent => current.is_none(),
            Self::Generation(expected) => current == Some(expected),
        };
        if holds {
            Ok(())
        } else {
            Err(StoreError::Precondition { current })
        }
    }
}

impl dyn Store + '_ {
    /// [`Store::atomically`] for a job that answers something.
    ///
    /// # Errors
    /// Those of the job and of the commit.
    pub fn in_one<T>(
        &mut self,
        job: impl FnOnce(&mut dyn Store) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut job = Some(job);
        let mut answer = None;
        self.atomically(&mut |store| {
            if let Some(job) = job.take() {
                answer = Some(job(store)?);
            }
            Ok(())
        })?;
        answer.ok_or_else(|| StoreError::Backend("a change was committed without its job".into()))
    }
}

/// Where intent is kept. Blocking; owned by one thread. See the module's head for what every
/// implementation promises; each method answers [`StoreError`].
#[expect(clippy::missing_errors_doc, reason = "said once for all, above")]
pub trait Store: machines::MachineStore + Send {
    /// Runs several changes as one: all of them are kept when `job` answers `Ok`, none otherwise.
    /// Not to be nested.
    fn atomically(
        &mut self,
        job: &mut dyn FnMut(&mut dyn Store) -> Result<(), StoreError>,
    ) -> Result<(), StoreError>;

    /// Tenants by name.
    fn tenants(&mut self, page: &Page) -> Result<Listed<Tenant>, StoreError>;
    /// One tenant.
    fn tenant(&mut self, name: &TenantName) -> Result<Tenant, StoreError>;
    /// Creates a tenant or replaces its spec, if all reservations together stay within
    /// `capacity_millicores`.
    fn put_tenant(
        &mut self,
        name: &TenantName,
        spec: &TenantSpec,
        precondition: Precondition,
        capacity_millicores: u64,
        now: Timestamp,
    ) -> Result<Put<Tenant>, StoreError>;
    /// Deletes a tenant, its services and its tokens.
    fn delete_tenant(
        &mut self,
        name: &TenantName,
        precondition: Precondition,
    ) -> Result<Deleted<Tenant>, StoreError>;
    /// What was promised so far.
    fn commitments(&mut self) -> Result<Commitments, StoreError>;

    /// A tenant's services by name.
    fn services(&mut self, tenant: &TenantName, page: &Page)
    -> Result<Listed<Service>, StoreError>;
    /// One service.
    fn service(&mut self, tenant: &TenantName, name: &ServiceName) -> Result<Service, StoreError>;
    /// The service with this id.
    fn service_by_id(&mut self, id: ServiceId) -> Result<Service, StoreError>;
    /// Creates a service or replaces its spec.
    fn put_service(
        &mut self,
        tenant: &TenantName,
        name: &ServiceName,
        spec: &ServiceSpec,
        precondition: Precondition,
        now: Timestamp,
    ) -> Result<Put<Service>, StoreError>;
    /// Deletes a service and its versions; what it used stays with its tenant.
    fn delete_service(
        &mut self,
        tenant: &TenantName,
        name: &ServiceName,
        precondition: Precondition,
    ) -> Result<Deleted<Service>, StoreError>;

    /// A tenant's volumes by name.
    fn volumes(&mut self, tenant: &TenantName, page: &Page) -> Result<Listed<Volume>, StoreError>;
    /// One volume.
    fn volume(&mut self, tenant: &TenantName, name: &VolumeName) -> Result<Volume, StoreError>;
    /// Creates a volume, or changes how much it holds and nothing else of it.
    fn put_volume(
        &mut self,
        tenant: &TenantName,
        name: &VolumeName,
        new: &NewVolume,
        precondition: Precondition,
        now: Timestamp,
    ) -> Result<Put<Volume>, StoreError>;
    /// Deletes a volume that no service mounts.
    fn delete_volume(
        &mut self,
        tenant: &TenantName,
        name: &VolumeName,
        precondition: Precondition,
    ) -> Result<Volume, StoreError>;
    /// The directories of all volumes.
    fn volume_directories(&mut self) -> Result<HashSet<String>, StoreError>;

    /// A service's versions, newest first.
    fn versions(&mut self, service: ServiceId, page: &Page) -> Result<Listed<Version>, StoreError>;
    /// One version.
    fn version(&mut self, service: ServiceId, number: VersionNumber)
    -> Result<Version, StoreError>;
    /// Adds a version (its number is chosen here); with `activate` it gets all traffic.
    fn add_version(
        &mut self,
        service: ServiceId,
        upload: &NewVersion,
        activate: bool,
        now: Timestamp,
    ) -> Result<AddedVersion, StoreError>;
    /// Sets which versions serve, and with that what a rollback goes back to
    /// ([`Traffic::previous_after`]).
    fn set_traffic(
        &mut self,
        service: ServiceId,
        traffic: &Traffic,
    ) -> Result<Switched, StoreError>;
    /// Takes a change of traffic back: both as they were in `before`.
    fn restore_traffic(&mut self, before: &Service) -> Result<Service, StoreError>;
    /// The digests of all that is referred to: by versions, by images, by machines.
    fn digests(&mut self) -> Result<HashSet<Digest>, StoreError>;

    /// Tokens by id: all, or those of one tenant.
    fn tokens(
        &mut self,
        tenant: Option<TenantId>,
        page: &Page,
    ) -> Result<Listed<Token>, StoreError>;
    /// The token whose secret hashes to this, expired or not.
    fn token_by_hash(&mut self, hash: &TokenHash) -> Result<Option<Token>, StoreError>;
    /// Whether a token is there and has not expired.
    fn token_is_valid(&mut self, id: u64, now: Timestamp) -> Result<bool, StoreError>;
    /// Adds a token.
    fn add_token(&mut self, token: &NewToken, now: Timestamp) -> Result<Token, StoreError>;
    /// Deletes a token: any, or only one of a tenant.
    fn delete_token(
        &mut self,
        id: u64,
        tenant: Option<TenantId>,
        now: Timestamp,
    ) -> Result<Token, StoreError>;
    /// Whether somebody can administer the host: an unexpired host token that may write.
    fn has_admin_token(&mut self, now: Timestamp) -> Result<bool, StoreError>;

    /// A copy of everything as of this moment, as one SQLite file without a name.
    fn copy(&mut self, temporary: &TemporaryDir) -> Result<std::fs::File, StoreError>;

    /// All sums.
    fn usage(&mut self) -> Result<Vec<StoredUsage>, StoreError>;
    /// Adds to the sums. What a deleted service used is added to its tenant's; what a deleted
    /// tenant used is forgotten.
    fn add_usage(&mut self, parts: &[(TenantId, ServiceId, UsageTotals)])
    -> Result<(), StoreError>;

    /// The answer to an earlier request with this key, if it is still remembered.
    fn remembered(
        &mut self,
        key: &[u8; 32],
        now: Timestamp,
    ) -> Result<Option<Remembered>, StoreError>;
    /// Remembers an answer; forgets old ones.
    fn remember(&mut self, answer: &Remembered, now: Timestamp) -> Result<(), StoreError>;
    /// Forgets an answer that turned out not to be true.
    fn forget(&mut self, key: &[u8; 32]) -> Result<(), StoreError>;

    /// Adds to the audit log: entries are never changed, and the newest [`AUDIT_KEPT`] stay.
    fn audit(&mut self, audit: &Audit, now: Timestamp) -> Result<(), StoreError>;
    /// The audit log, newest first: all of it, or what concerns one tenant.
    fn audits(
        &mut self,
        tenant: Option<TenantId>,
        page: &Page,
    ) -> Result<Listed<AuditEntry>, StoreError>;
}
