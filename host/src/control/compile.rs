//! Compiling in child processes, a few at a time.
//!
//! ```text
//!  ticket (per tenant and in all, else 429/503) → upload → lane (one compile per tenant)
//!    → a free compiler thread → child: component on stdin, artefact on stdout → seal → fsync
//! ```
//!
//! The child limits its own memory and CPU and shuts itself in; this side limits its time and what it
//! may say, and ends it when the host stops.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use insula_types::{Digest, TenantId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::Deserialize;
use tokio::sync::Semaphore;

use super::problem::{Code, Problem};
use crate::config::ARTEFACT_MAX;
use crate::state::blobs::Unplaced;
use crate::state::{EngineName, Worker};

/// Compilations at once.
pub(crate) const COMPILES_MAX: usize = 2;
/// Uploads of one tenant that are received, wait or compile.
pub(crate) const UPLOADS_PER_TENANT_MAX: usize = 4;
/// Uploads of all tenants that are received, wait or compile.
pub(crate) const UPLOADS_MAX: usize = 32;
/// How much of the child's standard error is kept.
const STDERR_MAX_BYTES: usize = 64 << 10;
/// How much of an artefact is held while it is copied.
const COPIED_AT_ONCE: usize = 64 << 10;
/// The child's exit code for a component at fault.
const REFUSED: i32 = 3;

/// How to start the compiler.
#[derive(Debug, Clone)]
pub struct Compiler {
    /// The program; the host's own by default.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// How long it may take.
    pub timeout: Duration,
}

impl Default for Compiler {
    fn default() -> Self {
        Self {
            program: PathBuf::from("/proc/self/exe"),
            arguments: vec![OsString::from("compile-component")],
            timeout: Duration::from_secs(60),
        }
    }
}

/// Makes an artefact trustworthy: gives what goes before it, which
/// [`crate::engine::artefact::open`] checks.
pub type Seal =
    Arc<dyn Fn(&EngineName, &Digest, &mut dyn Read) -> std::io::Result<Vec<u8>> + Send + Sync>;

/// What is compiled for, and what compiles for it.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) engine: EngineName,
    compiler: Compiler,
    /// What `compiler` names, where that is a file which somebody else has opened.
    _program: Option<OwnedFd>,
}

impl Target {
    /// This host.
    pub(crate) const fn own(engine: EngineName, compiler: Compiler) -> Self {
        Self {
            engine,
            compiler,
            _program: None,
        }
    }

    /// A host that is to take over from this one, by its name for its engine and its open program.
    pub(crate) fn successor(engine: EngineName, program: OwnedFd) -> Self {
        let path = format!("/proc/self/fd/{}", program.as_raw_fd());
        let compiler = Compiler {
            program: path.into(),
            ..Compiler::default()
        };
        Self {
            engine,
            compiler,
            _program: Some(program),
        }
    }
}

/// Why there is no artefact.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CompileError {
    #[error("{detail}")]
    Refused { code: Code, detail: String },
    #[error("the compiler was stopped: {0}")]
    Limit(String),
    #[error("the compiler failed ({status}): {stderr}")]
    Failed { status: ExitStatus, stderr: String },
    #[error("the host is stopping")]
    Stopping,
    #[error("the compiler could not be run: {0}")]
    Io(#[from] std::io::Error),
}

impl From<CompileError> for Problem {
    fn from(error: CompileError) -> Self {
        match error {
            CompileError::Refused { code, detail } => Self::new(code, detail),
            CompileError::Limit(detail) => Self::new(Code::CompileLimit, detail),
            CompileError::Stopping => Self::new(Code::Stopping, error),
            CompileError::Io(error) => error.into(),
            CompileError::Failed { .. } => {
                tracing::error!(%error, "a compilation failed");
                Self::new(Code::CompileFailed, "the host's log says why")
            }
        }
    }
}

/// What one compiler thread owns.
struct Bench {
    seal: Seal,
    /// Ends, and so becomes readable, when the host stops.
    stop: PipeReader,
}

/// A job for a compiler thread: two empty files and the component.
pub(crate) struct CompileJob {
    pub(crate) target: Arc<Target>,
    pub(crate) component: File,
    pub(crate) digest: Digest,
    pub(crate) raw: Unplaced,
    pub(crate) sealed: Unplaced,
}

/// An artefact that is synced but not in its place.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub(crate) artefact: Unplaced,
    pub(crate) compile_ms: u64,
}

/// The compiler threads and who waits for them.
pub(crate) struct Compilers {
    idle: RefCell<Vec<Worker<Bench>>>,
    permits: Semaphore,
    lanes: RefCell<HashMap<TenantId, (usize, Rc<Semaphore>)>>,
    uploads: Cell<usize>,
    stop: RefCell<Option<PipeWriter>>,
}

impl Compilers {
    pub(crate) fn start(seal: &Seal) -> std::io::Result<Self> {
        // The kernel keeps 15 bytes of a name.
        const NAMES: [&str; COMPILES_MAX] = ["insula-compile0", "insula-compile1"];
        let (reader, writer) = std::io::pipe()?;
        let mut idle = Vec::new();
        for name in NAMES {
            let bench = Bench {
                seal: Arc::clone(seal),
                stop: reader.try_clone()?,
            };
            idle.push(Worker::start(name, bench)?);
        }
        Ok(Self {
            permits: Semaphore::new(idle.len()),
            idle: RefCell::new(idle),
            lanes: RefCell::default(),
            uploads: Cell::new(0),
            stop: RefCell::new(Some(writer)),
        })
    }

    /// Ends the children that run.
    pub(crate) fn stop(&self) {
        self.stop.borrow_mut().take();
        self.permits.close();
    }

    /// A place for an upload, before its first byte is read.
    pub(crate) fn enter(self: &Rc<Self>, tenant: TenantId) -> Result<Ticket, Problem> {
        if self.uploads.get() >= UPLOADS_MAX {
            let detail = format!("{UPLOADS_MAX} uploads are in progress");
            return Err(Problem::new(Code::HostBusy, detail).retry_after(5));
        }
        let mut lanes = self.lanes.borrow_mut();
        let (users, lane) = lanes
            .entry(tenant)
            .or_insert_with(|| (0, Rc::new(Semaphore::new(1))));
        if *users >= UPLOADS_PER_TENANT_MAX {
            let detail = format!("{UPLOADS_PER_TENANT_MAX} uploads of this tenant are in progress");
            return Err(Problem::new(Code::TenantBusy, detail).retry_after(2));
        }
        *users += 1;
        let lane = Rc::clone(lane);
        self.uploads.set(self.uploads.get() + 1);
        Ok(Ticket {
            compilers: Rc::clone(self),
            tenant,
            lane,
        })
    }

    async fn run(&self, job: CompileJob, begins: impl FnOnce()) -> Result<Compiled, Problem> {
        let stopping = |_| Problem::from(CompileError::Stopping);
        let _permit = self.permits.acquire().await.map_err(stopping)?;
        // As many workers as permits; one that panicked is not put back, and its permit goes too.
        let worker = self.idle.borrow_mut().pop();
        let worker = worker.ok_or_else(|| Problem::internal(&"no compiler thread is left"))?;
        begins();
        let compiled = worker.run(move |bench| bench.compile(job)).await?;
        self.idle.borrow_mut().push(worker);
        Ok(compiled?)
    }
}

/// A place among the uploads; given back when dropped.
pub(crate) struct Ticket {
    compilers: Rc<Compilers>,
    tenant: TenantId,
    lane: Rc<Semaphore>,
}

impl Ticket {
    /// Compiles, after the tenant's other compilations, and when it is its turn among all; says when that
    /// is.
    pub(crate) async fn compile(
        &self,
        job: CompileJob,
        begins: impl FnOnce(),
    ) -> Result<Compiled, Problem> {
        let _turn = self
            .lane
            .acquire()
            .await
            .map_err(|error| Problem::internal(&error))?;
        self.compilers.run(job, begins).await
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.compilers.uploads.set(self.compilers.uploads.get() - 1);
        let mut lanes = self.compilers.lanes.borrow_mut();
        if let Some((users, _)) = lanes.get_mut(&self.tenant) {
            *users -= 1;
            if *users == 0 {
                lanes.remove(&self.tenant);
            }
        }
    }
}

impl Bench {
    fn compile(&self, mut job: CompileJob) -> Result<Compiled, CompileError> {
        let begun = Instant::now();
        let target = &job.target;
        self.run_child(&target.compiler, job.component, job.raw.writer()?)?;
        if job.raw.reader()?.metadata()?.len() > ARTEFACT_MAX.get() {
            let detail = format!(
                "the compiled code is larger than {} bytes",
                ARTEFACT_MAX.get()
            );
            return Err(CompileError::Limit(detail));
        }
        // Read twice, and never held as a whole: it is as large as its sender wanted it. Were it
        // not the same both times, it would not open.
        let head = (self.seal)(&target.engine, &job.digest, &mut job.raw.reader()?)?;
        job.sealed.write(&head)?;
        let mut artefact = job.raw.reader()?;
        let mut piece = vec![0; COPIED_AT_ONCE];
        loop {
            let length = artefact.read(&mut piece)?;
            if length == 0 {
                break;
            }
            job.sealed.write(&piece[..length])?;
        }
        job.sealed.sync()?;
        let compile_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(Compiled {
            artefact: job.sealed,
            compile_ms,
        })
    }

    fn run_child(
        &self,
        compiler: &Compiler,
        component: File,
        artefact: File,
    ) -> Result<(), CompileError> {
        let child = Command::new(&compiler.program)
            .args(&compiler.arguments)
            .env_clear()
            .current_dir("/")
            .stdin(component)
            .stdout(artefact)
            .stderr(Stdio::piped())
            .spawn()?;
        let mut child = Reaped(child);
        let stderr = self.watch(&mut child, compiler.timeout)?;
        let status = child.0.wait()?;
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        match (status.code(), status.signal()) {
            (Some(0), _) => Ok(()),
            (Some(REFUSED), _) => Err(refusal(status, stderr)),
            (None, Some(signal)) => Err(CompileError::Limit(format!(
                "it was ended by signal {signal}: the component needs more memory or CPU time to \
                 compile than is allowed"
            ))),
            _ => Err(CompileError::Failed { status, stderr }),
        }
    }

    /// Reads standard error until the child has ended, it takes too long or the host stops.
    fn watch(&self, child: &mut Reaped, limit: Duration) -> Result<Vec<u8>, CompileError> {
        let deadline = Instant::now() + limit;
        let pid = i32::try_from(child.0.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| std::io::Error::other("a child without a pid"))?;
        let ended = pidfd_open(pid, PidfdFlags::empty()).map_err(std::io::Error::from)?;
        let piped = child.0.stderr.take();
        let mut stderr = piped.ok_or_else(|| std::io::Error::other("stderr is not piped"))?;
        let (mut kept, mut chunk) = (Vec::new(), [0; 4096]);
        let mut open = true;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let limit = limit.as_secs_f32();
                return Err(CompileError::Limit(format!(
                    "it took longer than {limit} s"
                )));
            }
            let timeout = Timespec::try_from(left).map_err(std::io::Error::other)?;
            let mut fds = [
                PollFd::new(&ended, PollFlags::IN),
                PollFd::new(&self.stop, PollFlags::IN),
                PollFd::new(&stderr, PollFlags::IN),
            ];
            let watched = if open { &mut fds[..] } else { &mut fds[..2] };
            match poll(watched, Some(&timeout)) {
                Err(rustix::io::Errno::INTR) => continue,
                result => result.map_err(std::io::Error::from)?,
            };
            let [ended, stop, said] = fds.map(|fd| !fd.revents().is_empty());
            if stop {
                return Err(CompileError::Stopping);
            }
            // What was said is read before the end is believed, so that nothing is lost.
            if open && said {
                let count = stderr.read(&mut chunk)?;
                open = count > 0;
                let room = STDERR_MAX_BYTES - kept.len();
                kept.extend_from_slice(&chunk[..count.min(room)]);
            } else if ended {
                return Ok(kept);
            }
        }
    }
}

/// A child that is killed and reaped whatever happens.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // Both fail only when it has ended and was reaped.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[derive(Deserialize)]
struct Report {
    code: String,
    detail: String,
}

/// The child's last line says what is wrong with the component.
fn refusal(status: ExitStatus, stderr: String) -> CompileError {
    let last = stderr.lines().rev().find(|line| !line.trim().is_empty());
    let Some(report) = last.and_then(|line| serde_json::from_str::<Report>(line).ok()) else {
        return CompileError::Failed { status, stderr };
    };
    let known = [
        Code::UnsupportedImport,
        Code::WrongWorld,
        Code::TooComplex,
        Code::CompileLimit,
    ];
    let code = known.into_iter().find(|code| code.as_str() == report.code);
    CompileError::Refused {
        code: code.unwrap_or(Code::InvalidComponent),
        detail: report.detail,
    }
}
