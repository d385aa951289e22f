//! A whole host: the control plane in this process, the data plane in a child.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use insula_types::quantity::Bytes;

use crate::config::{HostConfig, UrlScheme};
use crate::control::Steps;
use crate::control::machine::Machine;
use crate::control::{self, Compiler, ControlConfig, ControlPlane, Seal};
use crate::engine::artefact::{self, ArtefactKey};
use crate::engine::config::wasmtime_version;
use crate::handover::{self, HandoverError, Listeners, Predecessor, Successor, Waiting};
use crate::messages::DataEvent;
use crate::process::keeper::{self, DataSpec, Keeper};
use crate::state::dir::DataDirError;
use crate::state::{DataDir, EngineName, NoEngineName};
use crate::storage::has_openat2;
use crate::tls::{self, Certificate, TlsError, TlsFiles, Use};

/// The file with the key that seals artefacts.
const KEY_FILE: &str = "artefact.key";
/// The directory that becomes the data process's root.
const ROOT_DIR: &str = "empty";

/// Why the host did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The kernel cannot resolve a path below a directory in one step.
    #[error(
        "this kernel has no openat2 (Linux 5.6), or a sandbox refuses it: tenants' files could not be \
         kept apart"
    )]
    NoOpenat2,
    /// The engine.
    #[error(transparent)]
    Engine(#[from] NoEngineName),
    /// The data directory.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The key of artefacts.
    #[error("the artefact key cannot be read or made: {0}")]
    Key(std::io::Error),
    /// The directory that the data process is shut into.
    #[error("the data process's empty root cannot be made: {0}")]
    Root(std::io::Error),
    /// The listeners, or the socket where the next host asks.
    #[error("the listeners cannot be shared: {0}")]
    Listeners(std::io::Error),
    /// The host that holds the data directory.
    #[error(transparent)]
    Handover(#[from] HandoverError),
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
    /// Where the next host asks. Holds the listeners too, and so goes first of all.
    waiting: Option<Waiting>,
    // In this order: control lets go of data, then its keeper waits for its end.
    control: ControlPlane,
    data: Keeper,
    _heir: Option<Heir>,
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
        let ingress_certificate = certificate(config.tls.clone(), Use::Ingress)?;
        let admin_certificate = certificate(config.admin_tls.clone(), Use::Admin)?;
        let certificates: Vec<_> = [&ingress_certificate, &admin_certificate]
            .into_iter()
            .flatten()
            .cloned()
            .collect();
        let schemes = Schemes {
            ingress: UrlScheme::of(ingress_certificate.as_ref()),
            admin: UrlScheme::of(admin_certificate.as_ref()),
        };
        let engine = EngineName::try_from(crate::engine::compatibility())?;
        let (directory, inherited) = open(&config.data_dir, &engine, &compiler.program)?;
        let (predecessor, listeners) = inherited.unzip();
        let listeners = self::listeners(&config, listeners, admin_certificate.as_ref())?;
        let offered = Listeners {
            ingress: dup(&listeners.ingress)?,
            admin: listeners.admin.try_clone().map_err(StartError::Listeners)?,
        };
        let root = directory.dir().map_err(StartError::Key)?;
        if !has_openat2(&root) {
            return Err(StartError::NoOpenat2);
        }
        let key = directory.key(KEY_FILE).map_err(StartError::Key)?;
        let seal: Seal = {
            let key = ArtefactKey::from_bytes(key);
            Arc::new(move |engine, digest, artefact| {
                artefact::seal(&key, engine.as_str(), digest, artefact).map(|head| head.to_vec())
            })
        };
        let (data, events) = keeper::start(
            DataSpec {
                program: config.data_program,
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
                outbound_networks: config.outbound_networks.clone(),
            },
            listeners.ingress,
        )?;
        // If this fails, the events are closed by then and `data` joins its thread.
        let control = control::start(
            ControlConfig {
                certificate: admin_certificate,
                ingress: data.ingress(),
                ingress_certificate,
                ingress_scheme: schemes.ingress,
                domain: config.domain,
                workers: config.workers,
                instances: config.instances,
                ceiling: config.ceiling,
                engine_version: wasmtime_version().to_owned(),
                engine,
                inherits: predecessor.is_some(),
                compiler,
                seal,
                machines: config.machines,
            },
            directory,
            events,
            listeners.admin,
        )?;
        let heir = predecessor
            .map(|from| Heir::start(from, &data))
            .transpose()?;
        let waiting = Waiting::open(&config.data_dir, offered).map_err(StartError::Listeners)?;
        let watch = (!certificates.is_empty()).then(|| tls::Watch::start(certificates));
        Ok(Self {
            waiting: Some(waiting),
            control,
            data,
            _heir: heir,
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
    pub fn shutdown(mut self) {
        self.waiting.take();
        self.control.shutdown(self.drain);
        drop(self.data);
    }

    /// Waits until another host asks to take over ([`crate::handover`]), and everything is compiled for
    /// it. May be dropped at any time.
    pub async fn successor(&self) -> Successor {
        match &self.waiting {
            Some(waiting) => {
                let prepare = |engine, program| self.control.prepare(engine, program);
                waiting.successor(prepare).await
            }
            None => std::future::pending().await,
        }
    }

    /// Hands over, and blocks until the last connection is closed.
    ///
    /// # Errors
    /// [`HandoverError`] when the other host does not do its part; this one has stopped all the same.
    pub fn hand_over(mut self, mut successor: Successor) -> Result<(), HandoverError> {
        self.waiting.take();
        let Steps {
            released,
            serves,
            usage,
        } = self.control.hand_over(self.drain);
        let handed = || -> Result<(), HandoverError> {
            let ended = |_| HandoverError::OutOfTurn("nothing: this host's control has ended");
            released.blocking_recv().map_err(ended)?;
            successor.release()?;
            successor.serves()?;
            // Gone already: control has ended, which the next step tells.
            let _ = serves.send(());
            successor.leave(usage.blocking_recv().map_err(ended)?)
        };
        let handed = handed();
        drop(self.control);
        drop(self.data);
        handed
    }
}

/// Opens the data directory, or has it handed over by the host that holds it.
fn open(
    path: &Path,
    engine: &EngineName,
    program: &Path,
) -> Result<(DataDir, Option<(Predecessor, Listeners)>), StartError> {
    let locked = match DataDir::open(path) {
        Ok(directory) => return Ok((directory, None)),
        Err(error @ DataDirError::Locked(_)) => error,
        Err(error) => return Err(error.into()),
    };
    let Some((predecessor, listeners)) = handover::take(path, engine, program)? else {
        return Err(locked.into());
    };
    tracing::info!("the host that was here hands over");
    Ok((DataDir::open(path)?, Some((predecessor, listeners))))
}

/// Those that were handed over, where they are the ones that this host is to have; others are
/// opened.
fn listeners(
    config: &HostConfig,
    inherited: Option<Listeners>,
    certificate: Option<&Arc<Certificate>>,
) -> Result<Listeners, StartError> {
    let (ingress, admin) = inherited.map_or((Vec::new(), None), |inherited| {
        (inherited.ingress, Some(inherited.admin))
    });
    // One that no worker accepts from would keep connections waiting for ever.
    let same = ingress.len() == config.workers
        && ingress.iter().all(|one| handover::fits(one, config.listen));
    let ingress = if same {
        ingress
    } else {
        keeper::listen(config.listen, config.workers)?
    };
    let admin = match admin.filter(|one| handover::fits(one, config.admin)) {
        Some(admin) => admin,
        None => control::listen(config.admin, certificate)?,
    };
    Ok(Listeners { ingress, admin })
}

fn dup(listeners: &[TcpListener]) -> Result<Vec<TcpListener>, StartError> {
    let all: std::io::Result<_> = listeners.iter().map(TcpListener::try_clone).collect();
    all.map_err(StartError::Listeners)
}

/// Waits for what the host before this one has still to tell.
#[derive(Debug)]
struct Heir {
    line: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Heir {
    fn start(predecessor: Predecessor, data: &Keeper) -> Result<Self, StartError> {
        predecessor.serving()?;
        let line = predecessor.hang_up().map_err(StartError::Listeners)?;
        let events = data.events();
        let thread = std::thread::Builder::new()
            .name("insula-heir".to_owned())
            .spawn(move || {
                let usage = predecessor.usage();
                match &usage {
                    Ok(_) => tracing::info!("the host that was here has ended"),
                    Err(error) => {
                        tracing::warn!(%error, "what the last host used at its end is not known");
                    }
                }
                if let Some(events) = events.upgrade() {
                    // Where control is gone, it has stored what it could.
                    let usage = usage.unwrap_or_default();
                    let _ = events.blocking_send(DataEvent::Inherited(usage));
                }
            });
        Ok(Self {
            line,
            thread: Some(thread.map_err(StartError::Thread)?),
        })
    }
}

impl Drop for Heir {
    fn drop(&mut self) {
        // Closed already, as a rule.
        let _ = self.line.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that waits for the last host panicked");
        }
    }
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
