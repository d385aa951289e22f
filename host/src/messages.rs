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
//! owns the pool and holds no database and no token. They are two processes, and nothing else is
//! shared between the two: everything in a message is plain data or an open file. How messages
//! travel is [`crate::link`]'s business; the parameter `F` is what stands for a file there.
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

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::pool::conduct::Conduct;
use crate::process::walls::Wall;
use crate::storage::Usage;
use crate::tls::Pem;

/// Commands that wait in the channel, at most.
pub const COMMAND_QUEUE: usize = 64;
/// Reports that wait in the channel, at most; logs beyond that are counted and dropped.
pub const REPORT_QUEUE: usize = 256;

/// What control hears of the data plane.
#[derive(Debug)]
pub enum DataEvent {
    /// There is one, and it knows nothing yet.
    Up {
        /// Where it takes commands. A new one after every restart, so that no command meant for
        /// the one before reaches it.
        commands: mpsc::Sender<Command>,
        /// What it has given up.
        walls: Vec<Wall>,
    },
    /// It says something.
    Says(FromData),
    /// The host before this one is gone, and had not stored this when it handed over.
    Inherited(Vec<UsageDelta>),
    /// It has died; another is on its way.
    Down {
        /// The CPU time that it had used.
        cpu_ns: u64,
    },
}

/// A command and the number that its answer will carry.
#[derive(Debug, Serialize, Deserialize)]
pub struct Command<F = File> {
    /// Chosen by control, rising.
    pub seq: u64,
    /// What to do.
    pub body: ToData<F>,
}

/// From control to data.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ToData<F = File> {
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
    Service(Box<ServiceIntent<F>>),
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
        directory: F,
    },
    /// The volume is gone, or will be: nothing mounts it.
    DropVolume(VolumeId),
    /// Another process that changed volumes is gone: count them anew.
    Recount,
    /// Copy what a volume holds at one moment into an empty directory, durably. Answered when that
    /// is done; commands after it are not held up.
    CopyVolume {
        /// Which.
        from: VolumeId,
        /// The directory.
        to: F,
        /// What the copy may take.
        spec: VolumeSpec,
    },
    /// The whole intent has been told: accept connections. Until then the kernel holds them, so
    /// that a restart answers late and not wrongly.
    Open,
    /// Answer with [`FromData::Collected`].
    Collect {
        /// What to collect.
        what: Collect,
        /// CPU time of control and of the children that it has waited for.
        control_cpu_ns: u64,
    },
    /// The answer to a question of data's ([`FromData::Asks`]). It is answered by nothing.
    Answer(Answer),
    /// The ingress has another certificate from now on.
    Certificate(Pem),
    /// Accept no connection any more, finish what runs until the deadline, then answer.
    Drain {
        /// When to cancel what still runs.
        deadline: std::time::Duration,
        /// What becomes of connections on which nothing runs.
        at_rest: AtRest,
    },
}

/// What becomes of a connection on which nothing runs, when data drains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AtRest {
    /// It is closed; a request that is on its way meets a closed connection.
    Close,
    /// One more request is answered, and its client told to connect anew. Who asks for nothing for a
    /// while is let go.
    AnswerOnce,
}

/// What to answer a collection with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Collect {
    /// What was counted since the last time.
    Usage,
    /// That, and the families for the page of metrics.
    Families,
}

/// A service as control wants it to be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServiceIntent<F = File> {
    /// Its id.
    pub id: ServiceId,
    /// Its tenant, known to data already.
    pub tenant: TenantId,
    /// Its name.
    pub name: ServiceName,
    /// Limits, environment, routes.
    pub spec: ServiceSpec,
    /// Which versions serve, and how much.
    #[serde(with = "traffic_or_none")]
    pub traffic: Traffic,
    /// Versions to keep ready: all that `traffic` lists, and some that answer under their preview
    /// names only. The service is refused when one with a share cannot be loaded; others are left
    /// out.
    pub versions: Vec<IntendedVersion<F>>,
    /// Versions that there is no code for yet: whoever asks for one is to come again.
    pub awaited: Vec<VersionNumber>,
    /// The volumes that `spec` uses, in the order of [`ServiceSpec::used_volumes`].
    pub mounts: Vec<VolumeId>,
}

/// A version to keep ready.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct IntendedVersion<F = File> {
    /// Its number.
    pub number: VersionNumber,
    /// The digest of the uploaded component.
    pub digest: Digest,
    /// The compiled artefact, open for reading, at any offset. `None` where data has loaded this
    /// digest before and control believes that it still holds it; data answers
    /// [`Refusal::ArtefactMissing`] when it does not.
    pub artefact: Option<F>,
}

impl<F> Command<F> {
    /// The same with other stand-ins for its files.
    ///
    /// # Errors
    /// The first that `change` has.
    pub fn map_files<G, E>(
        self,
        change: &mut impl FnMut(F) -> Result<G, E>,
    ) -> Result<Command<G>, E> {
        Ok(Command {
            seq: self.seq,
            body: self.body.map_files(change)?,
        })
    }
}

impl<F> ToData<F> {
    /// The same with other stand-ins for its files, which are met in a fixed order.
    ///
    /// # Errors
    /// The first that `change` has.
    pub fn map_files<G, E>(
        self,
        change: &mut impl FnMut(F) -> Result<G, E>,
    ) -> Result<ToData<G>, E> {
        Ok(match self {
            Self::Service(intent) => ToData::Service(Box::new(intent.map_files(change)?)),
            Self::Tenant {
                id,
                name,
                spec,
                promised,
            } => ToData::Tenant {
                id,
                name,
                spec,
                promised,
            },
            Self::Volume {
                id,
                tenant,
                spec,
                directory,
            } => ToData::Volume {
                id,
                tenant,
                spec,
                directory: change(directory)?,
            },
            Self::DropVolume(id) => ToData::DropVolume(id),
            Self::Recount => ToData::Recount,
            Self::CopyVolume { from, to, spec } => ToData::CopyVolume {
                from,
                to: change(to)?,
                spec,
            },
            Self::Answer(answer) => ToData::Answer(answer),
            Self::DropTenant(id) => ToData::DropTenant(id),
            Self::DropService(id) => ToData::DropService(id),
            Self::Open => ToData::Open,
            Self::Collect {
                what,
                control_cpu_ns,
            } => ToData::Collect {
                what,
                control_cpu_ns,
            },
            Self::Certificate(pem) => ToData::Certificate(pem),
            Self::Drain { deadline, at_rest } => ToData::Drain { deadline, at_rest },
        })
    }
}

impl<F> ServiceIntent<F> {
    fn map_files<G, E>(
        self,
        change: &mut impl FnMut(F) -> Result<G, E>,
    ) -> Result<ServiceIntent<G>, E> {
        let mut versions = Vec::with_capacity(self.versions.len());
        for version in self.versions {
            versions.push(IntendedVersion {
                number: version.number,
                digest: version.digest,
                artefact: version.artefact.map(&mut *change).transpose()?,
            });
        }
        Ok(ServiceIntent {
            id: self.id,
            tenant: self.tenant,
            name: self.name,
            spec: self.spec,
            traffic: self.traffic,
            versions,
            awaited: self.awaited,
            mounts: self.mounts,
        })
    }
}

/// Traffic is never empty in a document that somebody sends; here it may be.
mod traffic_or_none {
    use insula_types::Traffic;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(
        traffic: &Traffic,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        Some(traffic)
            .filter(|traffic| !traffic.is_none())
            .serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Traffic, D::Error> {
        Option::deserialize(deserializer).map(Option::unwrap_or_default)
    }
}

/// From data to control.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromData {
    /// It runs, behind these walls, and takes commands. The first that it says, once.
    Ready(Vec<Wall>),
    /// It could not start, and ends.
    Failed(String),
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
    /// It wants to know what only a process with files can.
    Asks {
        /// Comes back with the [`Answer`].
        id: u64,
        /// Whose work it is.
        tenant: TenantId,
        /// What.
        question: Question,
    },
    /// Lines that guests wrote, and what the host has to say about their requests.
    Logs(Vec<LogRecord>),
}

/// What guests' requests need and the data process cannot find out: it opens no file of the system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// The addresses of a name, as the system resolves it.
    Addresses {
        /// The name.
        name: String,
        /// The port that they are wanted with.
        port: u16,
    },
    /// The certificates that the system trusts.
    Roots,
}

/// The answer to a question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Of the question.
    pub id: u64,
    /// CPU time that it took, which whoever asked pays for.
    pub cpu_ns: u64,
    /// What was found out, or why nothing was.
    pub found: Result<Found, String>,
}

/// What was found out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Found {
    /// Each once.
    Addresses(Vec<SocketAddr>),
    /// In DER.
    Roots(Vec<Vec<u8>>),
}

/// Why data did not apply a command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
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
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Collected {
    /// One entry per service that did something.
    pub usage: Vec<UsageDelta>,
    /// One entry per version that ended requests.
    pub versions: Vec<VersionDelta>,
    /// Services whose artefact could not be loaded any more when a request came. Each is told once.
    pub broken: Vec<(TenantName, ServiceName)>,
    /// What each volume takes that was counted.
    pub volumes: Vec<(VolumeId, Usage)>,
    /// The data plane's families, in the Prometheus text format, where they were asked for.
    pub metrics: Option<String>,
}

/// What a service used since the last collection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionDelta {
    /// The service.
    pub service: ServiceId,
    /// Which of its versions.
    pub version: VersionNumber,
    /// What was counted.
    pub conduct: Conduct,
}

/// Where a log line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Serialize, Deserialize)]
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
