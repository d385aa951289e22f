//! A component's code, in memory only while it is asked.
//!
//! A Rust guest's code takes some 400 KiB beside what all share, a Python guest's 100 MiB, and of ten
//! thousand services few are asked at any time. So a program is its artefact's open file, and the
//! code is loaded when somebody asks:
//!
//! ```text
//!   open ──▶ warm ◀── first request: read ▸ authenticate ▸ map ▸ link ──┐
//!              └──── nobody asked for a while ──────▶ cold ────────────┤
//!                                                                       └──▶ broken: told to control
//! ```
//!
//! What is loaded is authenticated every time, in this process's own copy: whoever can write to the
//! file between two loads gains nothing. Loading takes milliseconds of CPU time; it happens inside
//! the job of the request that asked, so it is measured, charged and preempted like the guest
//! itself. Requests that come meanwhile wait for it.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use insula_types::Digest;
use tokio::sync::Mutex;

use super::artefact::ArtefactKey;
use super::config::{Engine, compatibility};
use super::load::{Code, LoadError};

/// Where programs come from: the engine, and what opens artefacts.
pub struct Vault {
    engine: Engine,
    key: ArtefactKey,
    compat: String,
    born: Instant,
}

impl std::fmt::Debug for Vault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vault").finish_non_exhaustive()
    }
}

impl Vault {
    /// Programs of this engine, sealed with this key.
    #[must_use]
    pub fn new(engine: Engine, key: ArtefactKey) -> Arc<Self> {
        Arc::new(Self {
            engine,
            key,
            compat: compatibility(),
            born: Instant::now(),
        })
    }

    /// The program in a sealed artefact. It is loaded, which shows that it can be; `keep` says
    /// whether the code stays until it was idle for long enough.
    ///
    /// # Errors
    /// [`LoadError`]; nothing of the artefact stays mapped then.
    pub fn open(
        self: &Arc<Self>,
        digest: Digest,
        artefact: File,
        keep: bool,
    ) -> Result<Program, LoadError> {
        let program = Program(Arc::new(Inner {
            vault: Arc::clone(self),
            digest,
            artefact,
            code: ArcSwapOption::empty(),
            loading: Mutex::new(()),
            asked: AtomicU64::new(0),
            broken: AtomicBool::new(false),
        }));
        let code = program.load()?;
        if keep {
            program.touch(Instant::now());
            program.0.code.store(Some(Arc::new(code)));
        }
        Ok(program)
    }
}

struct Inner {
    vault: Arc<Vault>,
    digest: Digest,
    artefact: File,
    code: ArcSwapOption<Code>,
    /// Held by whoever loads.
    loading: Mutex<()>,
    /// When it was last asked for, in seconds of the vault's life.
    asked: AtomicU64,
    broken: AtomicBool,
}

/// See the module's documentation. Cheap to clone.
#[derive(Clone)]
pub struct Program(Arc<Inner>);

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Program")
            .field("digest", &self.0.digest)
            .field("warm", &self.is_warm())
            .finish_non_exhaustive()
    }
}

impl Program {
    /// Whether it can be instantiated at once.
    #[must_use]
    pub fn is_warm(&self) -> bool {
        self.0.code.load().is_some()
    }

    /// Whether its artefact could not be loaded any more. It stays so: a new one is needed.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.0.broken.load(Ordering::Relaxed)
    }

    /// Lets go of the code if nobody asked for it for so long. Instances that run keep it.
    pub fn cool(&self, now: Instant, idle: Duration) {
        let asked = Duration::from_secs(self.0.asked.load(Ordering::Relaxed));
        let age = now.saturating_duration_since(self.0.vault.born);
        if self.is_warm() && age.saturating_sub(asked) >= idle {
            self.0.code.store(None);
        }
    }

    /// The code; loads it where that is needed, for which one poll takes milliseconds.
    ///
    /// # Errors
    /// [`LoadError`]; the program is broken then.
    pub(super) async fn code(&self, now: Instant) -> Result<Arc<Code>, LoadError> {
        self.touch(now);
        if let Some(code) = self.0.code.load_full() {
            return Ok(code);
        }
        let _loading = self.0.loading.lock().await;
        if let Some(code) = self.0.code.load_full() {
            return Ok(code);
        }
        if self.is_broken() {
            return Err(LoadError::Broken);
        }
        match self.load() {
            Ok(code) => {
                let code = Arc::new(code);
                self.0.code.store(Some(Arc::clone(&code)));
                Ok(code)
            }
            Err(error) => {
                self.0.broken.store(true, Ordering::Relaxed);
                Err(error)
            }
        }
    }

    fn load(&self) -> Result<Code, LoadError> {
        let Inner {
            vault,
            digest,
            artefact,
            ..
        } = &*self.0;
        let size = usize::try_from(artefact.metadata()?.len()).unwrap_or(usize::MAX);
        let mut sealed = vec![0; size];
        artefact.read_exact_at(&mut sealed, 0)?;
        vault
            .engine
            .load(&vault.key, digest, &vault.compat, &sealed)
    }

    fn touch(&self, now: Instant) {
        let age = now.saturating_duration_since(self.0.vault.born).as_secs();
        // Written once a second: workers share the line.
        if self.0.asked.load(Ordering::Relaxed) != age {
            self.0.asked.store(age, Ordering::Relaxed);
        }
    }
}
