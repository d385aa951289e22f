//! What the admin API answers when it does not do what it was asked: RFC 9457 problems.
//!
//! [`Code`] is the one table of codes, statuses and titles; the `From` implementations below are
//! the one place where errors of other rooms become answers. What came from a database or a file
//! system is logged, not shown.

use std::fmt::Write as _;

use http::header::{ALLOW, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{Response, StatusCode};

use super::http_types::{Body, Reply, full};
use super::link::LinkError;
use crate::state::health::is_full;
use crate::state::worker::WorkerGone;
use crate::state::{Stopped, StoreError};

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $status:literal $code:literal $title:literal;)*) => {
        /// Why a request was refused. Codes are stable; titles and details may be reworded.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Code { $(#[doc = $title] $name,)* }

        impl Code {
            /// Every code, for the OpenAPI document.
            pub(crate) const ALL: &[Self] = &[$(Self::$name),*];

            /// The stable word.
            pub(crate) const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $code),* }
            }

            /// The HTTP status.
            pub(crate) const fn status(self) -> u16 {
                match self { $(Self::$name => $status),* }
            }

            const fn title(self) -> &'static str {
                match self { $(Self::$name => $title),* }
            }
        }
    };
}

codes! {
    MalformedJson = 400 "malformed_json" "The body is not JSON";
    BadRequest = 400 "bad_request" "The request cannot be understood";
    BodyIncomplete = 400 "body_incomplete" "The body ended early";
    Unauthorized = 401 "unauthorized" "A valid bearer token is needed";
    Forbidden = 403 "forbidden" "The token does not allow this";
    ForeignOrigin = 403 "foreign_origin" "Requests from other web sites are refused";
    NotFound = 404 "not_found" "There is no such thing";
    MethodNotAllowed = 405 "method_not_allowed" "The method does not apply here";
    BodyTimeout = 408 "body_timeout" "The body took too long";
    ReservationExceedsHost = 409 "reservation_exceeds_host" "The host cannot honour this reservation";
    RouteTaken = 409 "route_taken" "The route is taken";
    LimitReached = 409 "limit_reached" "There cannot be more of these";
    VolumeInUse = 409 "volume_in_use" "The volume is in use";
    StorageFull = 409 "storage_full" "There is no room for this";
    LastAdminToken = 409 "last_admin_token" "The last administrator's token stays";
    NoPreviousVersion = 409 "no_previous_version" "There is nothing to go back to";
    MachineState = 409 "machine_state" "The machine is in a state in which this has no meaning";
    NoSnapshot = 409 "no_snapshot" "The machine has no snapshot";
    OtherMachine = 409 "other_machine" "The snapshot is of a machine of another kind";
    HasMachines = 409 "has_machines" "The tenant still has machines";
    TenantMemory = 409 "tenant_memory" "The tenant has no memory left for this machine";
    NoKvm = 409 "no_kvm" "This host cannot run machines";
    PortTaken = 409 "port_taken" "The port cannot lead to this machine";
    InProgress = 409 "idempotency_in_progress" "The same request is being worked on";
    PreconditionFailed = 412 "precondition_failed" "Somebody else was faster";
    TooLarge = 413 "too_large" "The body is too large";
    UnsupportedMediaType = 415 "unsupported_media_type" "The body has the wrong type";
    InvalidSpec = 422 "invalid_spec" "The document is not valid";
    InvalidName = 422 "invalid_name" "The name is not valid";
    NameMismatch = 422 "name_mismatch" "The document names something else than the path";
    RouteReserved = 422 "route_reserved" "The route's host is the host's own";
    Unsupported = 422 "unsupported" "This version of insula cannot do that";
    UnknownVolume = 422 "unknown_volume" "The tenant has no such volume";
    VolumeReadOnly = 422 "volume_read_only" "The volume can only be read";
    VolumeKind = 422 "volume_kind" "The volume is of another kind";
    UnknownVersion = 422 "unknown_version" "The service has no such version";
    UnknownImage = 422 "unknown_image" "There is no such image";
    InvalidImage = 422 "invalid_image" "The image cannot be used";
    IdempotencyMismatch = 422 "idempotency_mismatch" "The key was used for another request";
    InvalidComponent = 422 "invalid_component" "The component is not valid";
    UnsupportedImport = 422 "unsupported_import" "The component imports what the host does not have";
    WrongWorld = 422 "wrong_world" "The component does not export an HTTP handler";
    TooComplex = 422 "too_complex" "The component is beyond a limit";
    CompileLimit = 422 "compile_limit" "Compiling the component reached a limit";
    UpgradeNeeded = 426 "upgrade_needed" "The connection has to be upgraded";
    AuthRateLimited = 429 "auth_rate_limited" "Too many invalid tokens";
    TenantBusy = 429 "tenant_busy" "The tenant has enough uploads in progress";
    Internal = 500 "internal" "The host failed";
    CompileFailed = 500 "compile_failed" "The compiler failed";
    NotActivated = 500 "not_activated" "The version is stored but does not serve";
    SnapshotBroken = 500 "snapshot_broken" "The snapshot cannot be trusted";
    MachineFailed = 500 "machine_failed" "The machine failed";
    NotApplied = 500 "not_applied" "The change is stored but not in effect";
    HostMemory = 503 "host_memory" "The host has no memory left for this machine";
    HostBusy = 503 "host_busy" "The host has enough to do";
    StateStopped = 503 "state_stopped" "The host takes no more changes";
    DataUnavailable = 503 "data_unavailable" "The data plane does not answer";
    NotReady = 503 "not_ready" "The host is not ready";
    Stopping = 503 "stopping" "The host is stopping";
    NoSpace = 507 "no_space" "The host's disk is full";
}

/// Longest detail that is sent: part of it may quote the caller or a compiler.
const DETAIL_MAX_CHARS: usize = 2_000;

/// An answer that says what went wrong.
#[derive(Debug)]
pub(crate) struct Problem {
    code: Code,
    detail: String,
    header: Option<(HeaderName, HeaderValue)>,
}

impl Problem {
    pub(crate) fn new(code: Code, detail: impl std::fmt::Display) -> Self {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = write!(text, "{detail}");
        if let Some((end, _)) = text.char_indices().nth(DETAIL_MAX_CHARS) {
            text.truncate(end);
            text.push('…');
        }
        let header = match code {
            Code::Unauthorized => Some((WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))),
            _ => None,
        };
        Self {
            code,
            detail: text,
            header,
        }
    }

    /// Says after how many seconds a repetition is worth while.
    pub(crate) fn retry_after(mut self, seconds: u32) -> Self {
        self.header = Some((RETRY_AFTER, HeaderValue::from(seconds)));
        self
    }

    pub(crate) fn method_not_allowed(allow: &str) -> Self {
        let mut problem = Self::new(
            Code::MethodNotAllowed,
            format_args!("this resource knows {allow}"),
        );
        problem.header = HeaderValue::from_str(allow)
            .ok()
            .map(|value| (ALLOW, value));
        problem
    }

    pub(crate) fn not_found(what: &str) -> Self {
        Self::new(Code::NotFound, format_args!("there is no such {what}"))
    }

    /// Our own fault: the caller learns that much, the log learns why.
    pub(crate) fn internal(error: &dyn std::fmt::Display) -> Self {
        tracing::error!(%error, "a request to the admin API failed");
        Self::new(Code::Internal, "the host's log says why")
    }

    fn no_space() -> Self {
        tracing::warn!("a change was refused: no room left in the data directory");
        let detail = "nothing was changed, and what runs is served; make room, and try again";
        Self::new(Code::NoSpace, detail).retry_after(10)
    }

    pub(crate) fn state_stopped(reason: &str) -> Self {
        Self::new(Code::StateStopped, Stopped(reason.to_owned()))
    }

    pub(crate) const fn code(&self) -> Code {
        self.code
    }

    pub(crate) fn detail(&self) -> &str {
        &self.detail
    }

    pub(crate) fn into_response(self) -> Response<Body> {
        let status = self.code.status();
        let document = serde_json::json!({
            "type": format!("urn:insula:problem:{}", self.code.as_str()),
            "title": self.code.title(),
            "status": status,
            "detail": self.detail,
            "code": self.code.as_str(),
        });
        let mut response = Response::new(full(document.to_string()));
        *response.status_mut() =
            StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        response.headers_mut().insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if let Some((name, value)) = self.header {
            response.headers_mut().insert(name, value);
        }
        response
    }
}

/// What a handler answers.
pub(crate) type Answer = Result<Reply, Problem>;

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        let code = match &error {
            StoreError::NotFound(_) => Code::NotFound,
            StoreError::Precondition { .. } => Code::PreconditionFailed,
            StoreError::Reservation { .. } => Code::ReservationExceedsHost,
            StoreError::RouteTaken(_) => Code::RouteTaken,
            StoreError::Full { .. } => Code::LimitReached,
            StoreError::UnknownVolume(_) => Code::UnknownVolume,
            StoreError::VolumeReadOnly(_) => Code::VolumeReadOnly,
            StoreError::WrongKind { .. } | StoreError::KindStays => Code::VolumeKind,
            StoreError::VolumeInUse { .. } => Code::VolumeInUse,
            StoreError::NoImage(_) => Code::UnknownImage,
            StoreError::HasMachines { .. } => Code::HasMachines,
            StoreError::LastAdminToken => Code::LastAdminToken,
            StoreError::NoSpace => return Self::no_space(),
            StoreError::Stopped(stopped) => return Self::state_stopped(&stopped.0),
            StoreError::Disk(reason) => return Self::state_stopped(reason),
            StoreError::Backend(_) => return Self::internal(&error),
        };
        Self::new(code, error)
    }
}

impl From<WorkerGone> for Problem {
    fn from(error: WorkerGone) -> Self {
        Self::internal(&error)
    }
}

impl From<std::io::Error> for Problem {
    fn from(error: std::io::Error) -> Self {
        if is_full(&error) {
            return Self::no_space();
        }
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
        if let Some(Stopped(reason)) = inner {
            return Self::state_stopped(reason);
        }
        Self::internal(&error)
    }
}

impl From<LinkError> for Problem {
    fn from(error: LinkError) -> Self {
        match error {
            LinkError::Refused(refusal) => {
                tracing::error!(%refusal, "the data plane refused what the state admitted");
                Self::new(Code::NotApplied, refusal)
            }
            LinkError::Gone | LinkError::Timeout | LinkError::File(_) => {
                tracing::error!(%error, "a change is stored but not confirmed");
                Self::new(
                    Code::DataUnavailable,
                    format_args!("{error}; the change is stored and takes effect when it is back"),
                )
                .retry_after(1)
            }
        }
    }
}
