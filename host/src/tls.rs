//! Certificates of the listeners, read again when their files change.
//!
//! ```text
//!  files ──▶ Certificate ──▶ rustls configuration, swapped whole ──▶ next handshake
//!    ▲            ▲
//!    └── looked at every second by `insula-tls` (Watch)
//! ```
//!
//! The ingress is in the data process, which reaches no file: control looks after the files and
//! hands over what they hold ([`Pem`]).
//!
//! A handshake takes the configuration that is there when it begins; connections keep theirs. When
//! what the files hold does not fit together, which is so for a moment while somebody replaces
//! both, the old certificate stays and the files are looked at again.
//!
//! Rustls is named only here. TLS 1.3, and for clients of services 1.2 as well; the algorithms are
//! those that rustls has on by default. Sessions are resumed by tickets whose keys change by
//! themselves.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::crypto::ring;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, SupportedProtocolVersion, version};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

/// How long a client may take for the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Largest file with certificates or a key.
const FILE_MAX_BYTES: u64 = 1 << 20;

/// A connection over TLS.
pub type TlsStream<S = TcpStream> = tokio_rustls::server::TlsStream<S>;

/// Where a certificate and its key are, both in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate, followed by those that lead to the root.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// What such files hold.
#[derive(Clone, Serialize, Deserialize)]
pub struct Pem {
    /// Certificates.
    pub certificate: Vec<u8>,
    /// The key of the first.
    pub key: Vec<u8>,
}

impl std::fmt::Debug for Pem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pem(..)")
    }
}

/// What a listener is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Services: all clients that are not too old; HTTP/2 where they want it.
    Ingress,
    /// The admin API.
    Admin,
}

impl Use {
    fn versions(self) -> &'static [&'static SupportedProtocolVersion] {
        static BOTH: [&SupportedProtocolVersion; 2] = [&version::TLS13, &version::TLS12];
        match self {
            Self::Ingress => &BOTH,
            Self::Admin => &BOTH[..1],
        }
    }

    fn protocols(self) -> Vec<Vec<u8>> {
        let names: &[&[u8]] = match self {
            Self::Ingress => &[b"h2", b"http/1.1"],
            Self::Admin => &[b"http/1.1"],
        };
        names.iter().map(|name| name.to_vec()).collect()
    }
}

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{path} cannot be read: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path} holds no {what} in PEM: {source}")]
    Pem {
        /// Which.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// What is wrong.
        source: pem::Error,
    },
    /// The two do not fit together, or are of a kind that is not known.
    #[error("{certificate} and {key} cannot be used together: {source}")]
    Refused {
        /// The file of the certificate.
        certificate: PathBuf,
        /// The file of the key.
        key: PathBuf,
        /// What is wrong.
        source: rustls::Error,
    },
}

/// Why a connection was not established.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// Too slow.
    #[error("no handshake within {} s", HANDSHAKE_TIMEOUT.as_secs())]
    Timeout,
    /// Not well done, or broken off.
    #[error("the handshake failed: {0}")]
    Failed(#[from] io::Error),
}

/// What tells one state of a file from another.
type Seen = Option<(u64, u64, i64, i64)>;

fn seen(path: &Path) -> Seen {
    let found = std::fs::metadata(path).ok()?;
    Some((found.ino(), found.len(), found.mtime(), found.mtime_nsec()))
}

/// A certificate as it is used, and as it was read.
#[derive(Debug)]
struct Loaded {
    config: Arc<ServerConfig>,
    pem: Pem,
    /// How many there were before.
    generation: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Certificate {
    /// Where it is read from; for one that was handed over, what errors call it.
    files: TlsFiles,
    usage: Use,
    current: ArcSwap<Loaded>,
    /// As the files were when they were last looked at.
    seen: Mutex<(Seen, Seen)>,
}

impl Certificate {
    /// Reads a certificate and its key.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn open(files: TlsFiles, usage: Use) -> Result<Arc<Self>, TlsError> {
        let now = (seen(&files.certificate), seen(&files.key));
        let pem = read(&files)?;
        Self::new(files, usage, pem, now)
    }

    /// Takes what was read elsewhere.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn handed_over(pem: Pem, usage: Use) -> Result<Arc<Self>, TlsError> {
        let files = TlsFiles {
            certificate: PathBuf::from("the certificate"),
            key: PathBuf::from("its key"),
        };
        Self::new(files, usage, pem, (None, None))
    }

    fn new(
        files: TlsFiles,
        usage: Use,
        pem: Pem,
        now: (Seen, Seen),
    ) -> Result<Arc<Self>, TlsError> {
        let loaded = Loaded {
            config: Arc::new(configure(&files, &pem, usage)?),
            pem,
            generation: 0,
        };
        Ok(Arc::new(Self {
            current: ArcSwap::new(Arc::new(loaded)),
            seen: Mutex::new(now),
            files,
            usage,
        }))
    }

    /// Another certificate for all handshakes from now on.
    ///
    /// # Errors
    /// [`TlsError`]; the old one stays.
    pub fn replace(&self, pem: Pem) -> Result<(), TlsError> {
        let config = Arc::new(configure(&self.files, &pem, self.usage)?);
        let generation = self.current.load().generation + 1;
        self.current.store(Arc::new(Loaded {
            config,
            pem,
            generation,
        }));
        Ok(())
    }

    /// What is in use, and how many there were before.
    #[must_use]
    pub fn pem(&self) -> (u64, Pem) {
        let current = self.current.load();
        (current.generation, current.pem.clone())
    }

    /// Makes a connection secure.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub async fn handshake<S>(&self, stream: S) -> Result<TlsStream<S>, HandshakeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let acceptor = TlsAcceptor::from(Arc::clone(&self.current.load().config));
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
            Ok(accepted) => Ok(accepted?),
            Err(_) => Err(HandshakeError::Timeout),
        }
    }

    /// Reads the files again if they have changed; says whether there is a new certificate.
    ///
    /// # Errors
    /// [`TlsError`], once for each state of the files; the old certificate stays.
    pub fn refresh(&self) -> Result<bool, TlsError> {
        let now = (seen(&self.files.certificate), seen(&self.files.key));
        let before = {
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *seen, now)
        };
        if before == now {
            return Ok(false);
        }
        self.replace(read(&self.files)?)?;
        Ok(true)
    }
}

/// The name that the client asked for, lower case.
#[must_use]
pub fn server_name<S>(stream: &TlsStream<S>) -> Option<Arc<str>> {
    let (_, connection) = stream.get_ref();
    let name = connection.server_name()?;
    Some(name.to_ascii_lowercase().into())
}

fn read(files: &TlsFiles) -> Result<Pem, TlsError> {
    Ok(Pem {
        certificate: small(&files.certificate)?,
        key: small(&files.key)?,
    })
}

fn configure(files: &TlsFiles, pem: &Pem, usage: Use) -> Result<ServerConfig, TlsError> {
    let wrong = |path: &Path, what| {
        let path = path.to_owned();
        move |source| TlsError::Pem { path, what, source }
    };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem.certificate).collect();
    let chain = chain.map_err(wrong(&files.certificate, "certificate"))?;
    let key = PrivateKeyDer::from_pem_slice(&pem.key);
    let key = key.map_err(wrong(&files.key, "private key"))?;
    let refused = |source| TlsError::Refused {
        certificate: files.certificate.clone(),
        key: files.key.clone(),
        source,
    };
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(usage.versions())
        .map_err(refused)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(refused)?;
    config.alpn_protocols = usage.protocols();
    config.ticketer = ring::Ticketer::new().map_err(refused)?;
    Ok(config)
}

fn small(path: &Path) -> Result<Vec<u8>, TlsError> {
    let mut content = Vec::new();
    let read =
        File::open(path).and_then(|file| file.take(FILE_MAX_BYTES).read_to_end(&mut content));
    match read {
        Ok(_) => Ok(content),
        Err(source) => Err(TlsError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Looks at files for as long as it lives.
#[derive(Debug)]
pub struct Watch {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts the thread.
    ///
    /// # Errors
    /// When there is none to be had.
    pub fn start(certificates: Vec<Arc<Certificate>>) -> io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("insula-tls".to_owned())
            .spawn(move || {
                while stopped.recv_timeout(LOOK_EVERY) == Err(mpsc::RecvTimeoutError::Timeout) {
                    certificates
                        .iter()
                        .for_each(|certificate| look(certificate));
                }
            })?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

fn look(certificate: &Certificate) {
    let path = certificate.files.certificate.display();
    match certificate.refresh() {
        Ok(false) => {}
        Ok(true) => tracing::info!(%path, "a new certificate is in use"),
        Err(error) => tracing::error!(%error, "the certificate in use stays the old one"),
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that looks after certificates panicked");
        }
    }
}
