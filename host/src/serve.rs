//! A whole host in one process: data plane and control plane, wired by two channels.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use insula_types::quantity::Bytes;

use crate::config::{HostConfig, UrlScheme};
use crate::control::machine::Machine;
use crate::control::{self, Compiler, ControlConfig, ControlPlane, Seal};
use crate::data::{self, DataConfig, DataPlane};
use crate::engine::artefact::{self, ArtefactKey};
use crate::engine::config::WASMTIME_VERSION;
use crate::messages::{COMMAND_QUEUE, REPORT_QUEUE};
use crate::state::DataDir;
use crate::state::dir::DataDirError;
use crate::storage::has_openat2;
use crate::tls::{self, Certificate, TlsError, TlsFiles, Use};

/// The file with the key that seals artefacts.
const KEY_FILE: &str = "artefact.key";

/// Why the host did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The kernel cannot resolve a path below a directory in one step.
    #[error(
        "this kernel has no openat2 (Linux 5.6), or a sandbox refuses it: tenants' files could not be \
         kept apart"
    )]
    NoOpenat2,
    /// The data directory.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The key of artefacts.
    #[error("the artefact key cannot be read or made: {0}")]
    Key(std::io::Error),
    /// The data plane.
    #[error(transparent)]
    Data(#[from] data::StartError),
    /// The control plane.
    #[error(transparent)]
    Control(#[from] control::StartError),
    /// A certificate.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

/// A running host. Dropping it is a shutdown without a drain.
#[derive(Debug)]
pub struct Host {
    // In this order: control says goodbye to data, then data's threads are joined.
    control: ControlPlane,
    data: DataPlane,
    drain: Duration,
    schemes: Schemes,
    /// Looks after the certificates.
    _watch: Option<tls::Watch>,
}

/// How URLs of the two listeners begin.
#[derive(Debug, Clone, Copy)]
struct Schemes {
    ingress: UrlScheme,
    admin: UrlScheme,
}

impl Host {
    /// Starts a host and blocks until both listeners are ready and data serves what is intended.
    ///
    /// # Errors
    /// [`StartError`]; whatever was started is stopped again.
    pub fn start(config: HostConfig) -> Result<Self, StartError> {
        Self::start_with(config, Compiler::default())
    }

    /// Starts a host with another compiler child than the program itself, for tests whose program
    /// is not the host's.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start_with(config: HostConfig, compiler: Compiler) -> Result<Self, StartError> {
        let certificate = |files: Option<TlsFiles>, usage| {
            files
                .map(|files| Certificate::open(files, usage))
                .transpose()
        };
        let ingress_certificate = certificate(config.tls, Use::Ingress)?;
        let admin_certificate = certificate(config.admin_tls, Use::Admin)?;
        let certificates: Vec<_> = [&ingress_certificate, &admin_certificate]
            .into_iter()
            .flatten()
            .cloned()
            .collect();
        let schemes = Schemes {
            ingress: UrlScheme::of(ingress_certificate.as_ref()),
            admin: UrlScheme::of(admin_certificate.as_ref()),
        };
        let directory = DataDir::open(&config.data_dir)?;
        let root = directory.dir().map_err(StartError::Key)?;
        if !has_openat2(&root) {
            return Err(StartError::NoOpenat2);
        }
        let key = directory.key(KEY_FILE).map_err(StartError::Key)?;
        let seal: Seal = {
            let key = ArtefactKey::from_bytes(key);
            Arc::new(move |digest, artefact| {
                artefact::seal(&key, digest, artefact).map(|head| head.to_vec())
            })
        };
        let (commands, commands_in) = mpsc::channel(COMMAND_QUEUE);
        let (reports_out, reports) = mpsc::channel(REPORT_QUEUE);
        let data = data::start(
            DataConfig {
                listen: config.listen,
                certificate: ingress_certificate,
                domain: config.domain.clone(),
                workers: config.workers,
                ceiling: config.ceiling,
                instances: config.instances,
                code_idle: config.code_idle.into(),
                guest_memory: config.guest_memory.unwrap_or_else(default_guest_memory),
                outbound_networks: config.outbound_networks.clone(),
                artefact_key: ArtefactKey::from_bytes(key),
            },
            commands_in,
            reports_out,
        )?;
        // If this fails, the command channel is closed by then and `data` joins its threads.
        let control = control::start(
            ControlConfig {
                admin: config.admin,
                certificate: admin_certificate,
                ingress_scheme: schemes.ingress,
                domain: config.domain,
                workers: config.workers,
                instances: config.instances,
                ceiling: config.ceiling,
                engine_version: WASMTIME_VERSION.to_owned(),
                compatibility: crate::engine::compatibility(),
                compiler,
                seal,
                machines: config.machines,
            },
            directory,
            commands,
            reports,
        )?;
        let watch = (!certificates.is_empty()).then(|| tls::Watch::start(certificates));
        Ok(Self {
            control,
            data,
            drain: config.drain.into(),
            schemes,
            _watch: watch.transpose().map_err(StartError::Thread)?,
        })
    }

    /// Where services answer.
    #[must_use]
    pub const fn ingress(&self) -> SocketAddr {
        self.data.ingress()
    }

    /// Where the admin API answers.
    #[must_use]
    pub const fn admin(&self) -> SocketAddr {
        self.control.admin()
    }

    /// The URL where services answer.
    #[must_use]
    pub fn ingress_url(&self) -> String {
        format!("{}://{}", self.schemes.ingress.as_str(), self.ingress())
    }

    /// The URL where the admin API answers.
    #[must_use]
    pub fn admin_url(&self) -> String {
        format!("{}://{}", self.schemes.admin.as_str(), self.admin())
    }

    /// Stops in order and blocks until everything is stored and closed:
    /// 1. to 4. as in [`control::start`]: admin API, drain of data, last usage, state;
    /// 5. the data plane's threads are joined.
    pub fn shutdown(self) {
        self.control.shutdown(self.drain);
        drop(self.data);
    }
}

/// Three quarters of the machine, so that the rest is left to the host, its caches and the system.
fn default_guest_memory() -> Bytes {
    match Machine::look().memory_bytes {
        0 => Bytes::MAX,
        bytes => Bytes::constant(bytes / 4 * 3),
    }
}
