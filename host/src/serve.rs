//! A whole host: the control plane in this process, the data plane in a child.

use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use insula_types::quantity::Bytes;

use crate::config::{HostConfig, UrlScheme};
use crate::control::machine::Machine;
use crate::control::{self, Compiler, ControlConfig, ControlPlane, Seal};
use crate::engine::artefact::{self, ArtefactKey};
use crate::engine::config::WASMTIME_VERSION;
use crate::process::keeper::{self, DataSpec, Keeper};
use crate::state::DataDir;
use crate::state::dir::DataDirError;
use crate::tls::{self, Certificate, TlsError, TlsFiles, Use};

/// The file with the key that seals artefacts.
const KEY_FILE: &str = "artefact.key";
/// The directory that becomes the data process's root.
const ROOT_DIR: &str = "empty";

/// Why the host did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The key of artefacts.
    #[error("the artefact key cannot be read or made: {0}")]
    Key(std::io::Error),
    /// The directory that the data process is shut into.
    #[error("the data process's empty root cannot be made: {0}")]
    Root(std::io::Error),
    /// The data plane.
    #[error(transparent)]
    Data(#[from] keeper::StartError),
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
    // In this order: control lets go of data, then its keeper waits for its end.
    control: ControlPlane,
    data: Keeper,
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
        let key = artefact_key(&directory).map_err(StartError::Key)?;
        let seal: Seal = {
            let key = ArtefactKey::from_bytes(key);
            Arc::new(move |digest, artefact| artefact::seal(&key, digest, artefact))
        };
        let (data, events) = keeper::start(DataSpec {
            program: config.data_program,
            listen: config.listen,
            certificate: ingress_certificate.clone(),
            domain: config.domain.clone(),
            workers: config.workers,
            ceiling: config.ceiling,
            instances: config.instances,
            code_idle: config.code_idle.into(),
            guest_memory: config.guest_memory.unwrap_or_else(default_guest_memory),
            artefact_key: key,
            root: std::path::absolute(&config.data_dir)
                .and_then(|data| empty_root(&data))
                .map_err(StartError::Root)?,
        })?;
        // If this fails, the events are closed by then and `data` joins its thread.
        let control = control::start(
            ControlConfig {
                admin: config.admin,
                certificate: admin_certificate,
                ingress: data.ingress(),
                ingress_certificate,
                ingress_scheme: schemes.ingress,
                domain: config.domain,
                workers: config.workers,
                instances: config.instances,
                ceiling: config.ceiling,
                engine_version: WASMTIME_VERSION.to_owned(),
                compatibility: crate::engine::compatibility(),
                compiler,
                seal,
            },
            directory,
            events,
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
    /// 5. the data process is waited for.
    pub fn shutdown(self) {
        self.control.shutdown(self.drain);
        drop(self.data);
    }
}

/// The key that seals artefacts, made at the first start.
fn artefact_key(directory: &DataDir) -> std::io::Result<[u8; 32]> {
    if let Some(key) = directory.read(KEY_FILE)? {
        return key.try_into().map_err(|_| {
            std::io::Error::other(format!(
                "{KEY_FILE} is not 32 bytes; delete it, and everything is compiled again"
            ))
        });
    }
    let mut key = [0; 32];
    getrandom::fill(&mut key).map_err(std::io::Error::other)?;
    directory.write_secret(KEY_FILE, &key)?;
    Ok(key)
}

/// A directory that is empty and stays so: nobody may write there, and the data process, which has
/// it for its root, sees it through a mount that is read-only.
fn empty_root(data: &Path) -> std::io::Result<PathBuf> {
    let root = data.join(ROOT_DIR);
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o500).create(&root)?;
    Ok(root)
}

/// Three quarters of the machine, so that the rest is left to the host, its caches and the system.
fn default_guest_memory() -> Bytes {
    match Machine::look().memory_bytes {
        0 => Bytes::MAX,
        bytes => Bytes::constant(bytes / 4 * 3),
    }
}
