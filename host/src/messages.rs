//! All that crosses between control and data: one message type each way.
//!
//! ```text
//!            Command (seq, ToData)
//!  control ───────────────────────────▶ data
//!          ◀───────────────────────────
//!                  FromData
//! ```
//!
//! *Control* owns intent (tenants, services, versions, tokens) and never runs guest code. *Data*
//! owns the listeners and the pool and holds no database and no token. Today both live in one
//! process and the messages travel over bounded channels; everything in them is plain data or an
//! open file, so that they can travel over a Unix socket instead. For the same reason nothing
//! else is shared between the two.
//!
//! Commands are applied in order and each is answered by one [`FromData::Done`] or
//! [`FromData::Collected`] with its sequence number. They are idempotent: control repeats the
//! whole intent after data was restarted.

use std::fs::File;
use std::net::SocketAddr;
use std::time::SystemTime;

use insula_types::spec::{ServiceSpec, TenantSpec};
use insula_types::{
    Bytes, Digest, Outcome, ServiceId, ServiceName, TenantId, TenantName, Traffic, VersionNumber,
    VolumeId, VolumeSpec,
};

use crate::pool::conduct::Conduct;
use crate::storage::Usage;

/// Commands that wait in the channel, at most.
pub const COMMAND_QUEUE: usize = 64;
/// Reports that wait in the channel, at most; logs beyond that are counted and dropped.
pub const REPORT_QUEUE: usize = 256;

/// A command and the number that its answer will carry.
#[derive(Debug)]
pub struct Command {
    /// Chosen by control, rising.
    pub seq: u64,
    /// What to do.
    pub body: ToData,
}

/// From control to data.
#[derive(Debug)]
pub enum ToData {
    /// There is a tenant, with this envelope. Creates it or changes it.
    Tenant {
        /// Its id.
        id: TenantId,
        /// Its name, part of its services' host names.
        name: TenantName,
        /// Its resource envelope.
        spec: TenantSpec,
        /// Of its memory, what its machines were promised.
        promised: Bytes,
    },
    /// The tenant and its services are gone: running requests are cancelled, series removed.
    DropTenant(TenantId),
    /// There is a service. Creates it or changes it; answered when requests reach it.
    Service(Box<ServiceIntent>),
    /// The service is gone: running requests are cancelled, series removed.
    DropService(ServiceId),
    /// There is a volume. Creates it or changes its quota; comes after its tenant and before the
    /// services that mount it.
    Volume {
        /// Its id.
        id: VolumeId,
        /// Its tenant, known to data already.
        tenant: TenantId,
        /// How much it holds.
        spec: VolumeSpec,
        /// Its directory.
        directory: File,
    },
    /// The volume is gone, or will be: nothing mounts it.
    DropVolume(VolumeId),
    /// Copy what a volume holds at one moment into an empty directory, durably. Answered when that
    /// is done; commands after it are not held up.
    CopyVolume {
        /// Which.
        from: VolumeId,
        /// The directory.
        to: File,
        /// What the copy may take.
        spec: VolumeSpec,
    },
    /// The whole intent has been told: accept connections. Until then the kernel holds them, so
    /// that a restart answers late and not wrongly.
    Open,
    /// Answer with [`FromData::Collected`].
    Collect,
    /// Accept no connection any more, finish what runs until the deadline, then answer.
    Drain {
        /// When to cancel what still runs.
        deadline: std::time::Duration,
    },
}

/// A service as control wants it to be.
#[derive(Debug)]
pub struct ServiceIntent {
    /// Its id.
    pub id: ServiceId,
    /// Its tenant, known to data already.
    pub tenant: TenantId,
    /// Its name.
    pub name: ServiceName,
    /// Limits, environment, routes.
    pub spec: ServiceSpec,
    /// Which versions serve, and how much.
    pub traffic: Traffic,
    /// Versions to keep ready: all that `traffic` lists, and some that answer under their preview
    /// names only. The service is refused when one with a share cannot be loaded; others are left
    /// out.
    pub versions: Vec<IntendedVersion>,
    /// The volumes that `spec` uses, in the order of [`ServiceSpec::used_volumes`].
    pub mounts: Vec<VolumeId>,
}

/// A version to keep ready.
#[derive(Debug)]
pub struct IntendedVersion {
    /// Its number.
    pub number: VersionNumber,
    /// The digest of the uploaded component.
    pub digest: Digest,
    /// The compiled artefact, open for reading at offset 0. `None` where data has loaded this
    /// digest before and control believes that it still holds it; data answers
    /// [`Refusal::ArtefactMissing`] when it does not.
    pub artefact: Option<File>,
}

/// From data to control.
#[derive(Debug)]
pub enum FromData {
    /// The ingress listens.
    Ready {
        /// Where.
        ingress: SocketAddr,
    },
    /// The answer to a command.
    Done {
        /// Of which command.
        seq: u64,
        /// Whether it took effect.
        result: Result<(), Refusal>,
    },
    /// The answer to [`ToData::Collect`].
    Collected {
        /// Of which command.
        seq: u64,
        /// What was counted.
        collected: Box<Collected>,
    },
    /// Lines that guests wrote, and what the host has to say about their requests.
    Logs(Vec<LogRecord>),
}

/// Why data did not apply a command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The intent names a tenant that data does not know.
    #[error("tenant {0} is not known to the data plane")]
    UnknownTenant(TenantId),
    /// An artefact is needed, and none was sent.
    #[error("the artefact of {0} is not loaded")]
    ArtefactMissing(Digest),
    /// The artefact was not made by this host with this engine, or was changed since.
    #[error("the artefact of {digest} was refused: {reason}")]
    ArtefactRefused {
        /// Of which component.
        digest: Digest,
        /// What was wrong with it.
        reason: String,
    },
    /// The intent names a volume that data does not know.
    #[error("volume {0} is not known to the data plane")]
    UnknownVolume(VolumeId),
    /// A volume could not be copied.
    #[error("the volume was not copied: {0}")]
    Storage(String),
    /// The tenant's envelope does not fit the host.
    #[error("the tenant's envelope does not fit: {0}")]
    Envelope(String),
}

/// What data counted since it was asked last (`usage`, moved out: each count is delivered once)
/// and what it shows now (`metrics`).
#[derive(Debug, Default)]
pub struct Collected {
    /// One entry per service that did something.
    pub usage: Vec<UsageDelta>,
    /// One entry per version that ended requests.
    pub versions: Vec<VersionDelta>,
    /// Services whose artefact could not be loaded any more when a request came. Each is told once.
    pub broken: Vec<(TenantName, ServiceName)>,
    /// What each volume takes that was counted.
    pub volumes: Vec<(VolumeId, Usage)>,
    /// The data plane's families, in the Prometheus text format.
    pub metrics: String,
}

/// What a service used since the last collection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageDelta {
    /// Its tenant.
    pub tenant: TenantId,
    /// The service.
    pub service: ServiceId,
    /// Requests, by [`Outcome::index`].
    pub requests: [u64; Outcome::ALL.len()],
    /// Fuel consumed.
    pub fuel: u64,
    /// CPU time charged, in nanoseconds.
    pub cpu_ns: u64,
    /// Integral of guest memory over time, in byte-milliseconds.
    pub memory_byte_ms: u64,
    /// Request heads and bodies.
    pub bytes_in: u64,
    /// Response heads and bodies.
    pub bytes_out: u64,
}

/// How a version behaved since the last collection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VersionDelta {
    /// The service.
    pub service: ServiceId,
    /// Which of its versions.
    pub version: VersionNumber,
    /// What was counted.
    pub conduct: Conduct,
}

/// Where a log line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogSource {
    /// The guest's standard output.
    Stdout,
    /// The guest's standard error.
    Stderr,
    /// Insula itself, about a request of this service.
    Host,
}

impl LogSource {
    /// The word used in the log's JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Host => "host",
        }
    }
}

/// One line of a service's log. Its text is the guest's: hostile, length-limited, never a label.
#[derive(Clone)]
pub struct LogRecord {
    /// The service.
    pub service: ServiceId,
    /// The version that ran.
    pub version: VersionNumber,
    /// When the line was complete.
    pub time: SystemTime,
    /// The request that it belongs to.
    pub request_id: String,
    /// Where it came from.
    pub source: LogSource,
    /// The line, without its end; at most [`LOG_LINE_MAX_BYTES`], control bytes escaped.
    pub text: String,
    /// Lines of this service that were dropped since the record before this one.
    pub dropped: u64,
}

/// Longest log line kept; the rest of a longer one is dropped and marked with `…`.
pub const LOG_LINE_MAX_BYTES: usize = 8 << 10;

impl std::fmt::Debug for LogRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogRecord")
            .field("service", &self.service)
            .field("source", &self.source)
            .field("text_bytes", &self.text.len())
            .finish_non_exhaustive()
    }
}
