//! The host's configuration, validated once and then frozen.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::control::MachinesConfig;
use insula_types::quantity::{Bytes, Fuel, Millis};
use insula_types::spec::RequestLimits;

use crate::outbound::Network;
use crate::process::keeper::DataProgram;
use crate::tls::TlsFiles;

/// What `insula serve` runs with. Made by the CLI from flags, environment and file.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// The data directory; created when missing.
    pub data_dir: PathBuf,
    /// The ingress listener; port 0 asks the kernel for one.
    pub listen: SocketAddr,
    /// The admin listener; port 0 asks the kernel for one.
    pub admin: SocketAddr,
    /// The certificate of the ingress listener, which speaks TLS then and nothing else.
    pub tls: Option<TlsFiles>,
    /// The certificate of the admin listener; needed where that is not a loopback address.
    pub admin_tls: Option<TlsFiles>,
    /// Services answer on `<service>.<tenant>.<domain>`.
    pub domain: String,
    /// Worker threads; as many as cores by default.
    pub workers: usize,
    /// No service gets more than this for one request.
    pub ceiling: RequestLimits,
    /// Instances that can be alive at once.
    pub instances: u32,
    /// Memory that all guests together may use; three quarters of the machine's when not given.
    pub guest_memory: Option<Bytes>,
    /// Networks beside the Internet that guests may send requests to; none by default.
    pub outbound_networks: Vec<Network>,
    /// How long the code of a version stays in memory that nobody asks.
    pub code_idle: Millis,
    /// How long requests may go on after SIGTERM.
    pub drain: Millis,
    /// What the data process runs.
    pub data_program: DataProgram,
    /// Machines: their program, their memory.
    pub machines: MachinesConfig,
}

/// How URLs begin that lead to a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UrlScheme {
    /// Without TLS.
    Http,
    /// With it.
    Https,
}

impl UrlScheme {
    /// That of a listener with or without a certificate.
    #[must_use]
    pub const fn of<T>(certificate: Option<&T>) -> Self {
        match certificate {
            None => Self::Http,
            Some(_) => Self::Https,
        }
    }

    /// The word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

/// Largest component that is accepted: honest ones made from Python or JavaScript are 10–20 MB.
pub const COMPONENT_MAX: Bytes = Bytes::mib(64);
/// Largest artefact that a compiler may make.
pub const ARTEFACT_MAX: Bytes = Bytes::mib(512);

/// The ceiling on one request when the operator sets none.
pub const DEFAULT_CEILING: RequestLimits = RequestLimits {
    memory: Bytes::mib(128),
    fuel: Fuel::constant(1_000_000_000_000),
    timeout: Millis::constant(300_000),
    request_body: Bytes::mib(1024),
};

/// How long unasked code stays when the operator sets nothing: loading a Rust guest's again costs
/// what a hundred requests cost, which once a minute is nothing.
pub const DEFAULT_CODE_IDLE: Millis = Millis::constant(60_000);

/// Instances that can be alive at once when the operator sets nothing: `vm.max_map_count` of a
/// stock kernel (65,530) divided by the handful of mappings that a pooled instance takes.
pub const DEFAULT_INSTANCES: u32 = 2_000;
