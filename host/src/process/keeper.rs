//! Control's side of the data process: starts it, carries messages, and starts it again.
//!
//! ```text
//!            ┌── died ◀──────────────┐
//!            ▼                       │
//!  ─▶ starting ── Ready ─▶ Up ─▶ carrying ── control lets go of the commands ─▶ ending ─▶ gone
//!            │ failed
//!            └─▶ the first time: the host does not start; later: again, after a pause
//! ```
//!
//! All of it is on one thread, `insula-keeper`, which lives as long as the host: the kernel kills
//! the data process when the thread that started it ends.
//!
//! The listeners stay open here too, so that a connection that comes while there is no data process
//! waits for the next one. They close when control lets data drain.

use std::ffi::OsString;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as Blocking;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use insula_types::quantity::Bytes;
use insula_types::spec::RequestLimits;
use insula_vmm::jail::spawn::in_pid_namespace;
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::inquest::Inquest;
use super::walls::Wall;
use super::{Assignment, Settings};
use crate::link::frame::FILES_MAX;
use crate::link::{LinkError, socket};
use crate::messages::{COMMAND_QUEUE, Command, DataEvent, FromData, REPORT_QUEUE, ToData};
use crate::outbound::Network;
use crate::pool::clock::child_cpu_ns;
use crate::pool::offload::Offload;
use crate::pool::worker::{self, WorkerError};
use crate::storage::can_shut_in;
use crate::tls::Certificate;

/// How long a data process may take until it takes commands.
const START_WITHIN: Duration = Duration::from_secs(20);
/// How long it may take to end when it is told to; it has drained by then.
const END_WITHIN: Duration = Duration::from_secs(5);
/// A process that lived this long did not die of its start.
const LONG_LIFE: Duration = Duration::from_secs(2);
/// The pause before the second attempt in a row, which doubles up to the last: a data process that
/// dies at once must not use up the machine, and one that works again must not be waited for. With
/// the start itself, which takes some 15 ms, that is well within a second.
const FIRST_PAUSE: Duration = Duration::from_millis(25);
const LAST_PAUSE: Duration = Duration::from_millis(400);

/// The program that is the data process.
#[derive(Debug, Clone)]
pub struct DataProgram {
    /// Its path; the host's own by default, as it is, even when its file was replaced.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

impl Default for DataProgram {
    fn default() -> Self {
        Self {
            program: PathBuf::from("/proc/self/exe"),
            arguments: vec![OsString::from("data-plane")],
        }
    }
}

/// What data processes are started with.
#[derive(Debug)]
pub struct DataSpec {
    /// What to run.
    pub program: DataProgram,
    /// What makes the ingress speak TLS.
    pub certificate: Option<Arc<Certificate>>,
    /// Services answer on `<service>.<tenant>.<domain>`.
    pub domain: String,
    /// Worker threads.
    pub workers: usize,
    /// No request gets more than this.
    pub ceiling: RequestLimits,
    /// Instances alive at once.
    pub instances: u32,
    /// How long code stays that nobody asks.
    pub code_idle: Duration,
    /// What all guests together may use.
    pub guest_memory: Bytes,
    /// Networks beside the Internet that guests may reach, where their services' lists do.
    pub outbound_networks: Vec<Network>,
    /// The key that artefacts are sealed with.
    pub artefact_key: [u8; 32],
    /// An empty directory, which becomes its root.
    pub root: PathBuf,
}

/// Why there is no data process.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No listener.
    #[error(transparent)]
    Listen(#[from] WorkerError),
    /// No process, or no socket to it.
    #[error("cannot start the data process: {0}")]
    Spawn(#[from] io::Error),
    /// No thread.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    /// The link to it.
    #[error("the data process does not answer: {0}")]
    Link(#[from] LinkError),
    /// It says why.
    #[error("the data process does not start: {0}")]
    Failed(String),
    /// It says nothing.
    #[error("the data process was not ready within {} s", START_WITHIN.as_secs())]
    Late,
}

/// Keeps a data process running for as long as it lives; joins its thread when dropped, which is
/// after control let go of the events.
#[derive(Debug)]
pub struct Keeper {
    ingress: SocketAddr,
    events: mpsc::WeakSender<DataEvent>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Where the ingress listens.
    #[must_use]
    pub const fn ingress(&self) -> SocketAddr {
        self.ingress
    }

    /// Where control hears of things.
    pub(crate) fn events(&self) -> mpsc::WeakSender<DataEvent> {
        self.events.clone()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the keeper of the data process panicked");
        }
    }
}

/// Opens the listeners, one for each worker as far as they can be sent at once.
///
/// # Errors
/// [`StartError::Listen`].
pub fn listen(address: SocketAddr, workers: usize) -> Result<Vec<TcpListener>, StartError> {
    Ok(worker::listeners(address, workers.min(FILES_MAX))?)
}

/// Starts the first data process with these listeners and waits until it takes commands.
///
/// # Errors
/// [`StartError`]; nothing is left of it then.
pub fn start(
    spec: DataSpec,
    listeners: Vec<TcpListener>,
) -> Result<(Keeper, mpsc::Receiver<DataEvent>), StartError> {
    let ingress = listeners.first().map(TcpListener::local_addr);
    let nothing = || io::Error::from(io::ErrorKind::InvalidInput);
    let ingress = ingress.ok_or_else(nothing)??;
    let (events, events_out) = mpsc::channel(REPORT_QUEUE);
    let weak = events.downgrade();
    let (started, start) = std::sync::mpsc::sync_channel(1);
    let keep = Keep {
        spec,
        offload: Arc::default(),
        listeners,
        events,
    };
    let thread = std::thread::Builder::new()
        .name("insula-keeper".to_owned())
        .spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_io()
                .enable_time()
                .build();
            match runtime {
                Ok(runtime) => runtime.block_on(keep.keep(&started)),
                Err(error) => {
                    let _ = started.send(Err(StartError::Thread(error)));
                }
            }
        })
        .map_err(StartError::Thread)?;
    let keeper = Keeper {
        ingress,
        events: weak,
        thread: Some(thread),
    };
    match start.recv() {
        Ok(Ok(())) => Ok((keeper, events_out)),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(StartError::Failed("its keeper has ended".to_owned())),
    }
}

/// A data process that takes commands.
struct Life {
    child: Buried,
    link: UnixStream,
    inbox: socket::Inbox,
    began: Instant,
    walls: Vec<Wall>,
}

/// How a life ended.
enum Ended {
    /// Control wants no more of it.
    Dismissed,
    /// By itself, or because of what it sent.
    Died(LinkError),
}

type Started = std::sync::mpsc::SyncSender<Result<(), StartError>>;

/// The state of the keeper's thread.
struct Keep {
    spec: DataSpec,
    /// For what the data process asks.
    offload: Arc<Offload>,
    listeners: Vec<TcpListener>,
    events: mpsc::Sender<DataEvent>,
}

impl Keep {
    async fn keep(mut self, started: &Started) {
        let mut life = match self.begin().await {
            Ok(life) => life,
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        say_what_is_missing(&life.walls);
        let _ = started.send(Ok(()));
        let mut pause = Duration::ZERO;
        loop {
            let began = life.began;
            let (mut child, ended) = self.live(life).await;
            let error = match ended {
                Ended::Dismissed => return child.end_within(END_WITHIN).await,
                Ended::Died(error) => error,
            };
            let cpu_ns = child.bury();
            tracing::error!(%error, status = %child.status(), "the data process has died");
            if self.events.send(DataEvent::Down { cpu_ns }).await.is_err() {
                return;
            }
            if began.elapsed() > LONG_LIFE {
                pause = Duration::ZERO;
            }
            life = loop {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).clamp(FIRST_PAUSE, LAST_PAUSE);
                if self.events.is_closed() || self.listeners.is_empty() {
                    return;
                }
                match self.begin().await {
                    Ok(life) => break life,
                    Err(error) => tracing::error!(%error, "no data process"),
                }
            };
            tracing::info!("there is a new data process");
        }
    }

    /// Starts a process and waits until it is ready.
    async fn begin(&self) -> Result<Life, StartError> {
        let (ours, theirs) = Blocking::pair()?;
        let program = &self.spec.program;
        let mut command = std::process::Command::new(&program.program);
        command
            .args(&program.arguments)
            .env_clear()
            .current_dir("/")
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            // A terminal's signals are for control.
            .process_group(0);
        // Whether it has one of its own, it says itself.
        let (child, _) = in_pid_namespace(&mut command)?;
        // With it goes our copy of the child's end: one that dies before it is ready is noticed.
        drop(command);
        let child = Buried {
            child,
            status: None,
        };
        ours.set_nonblocking(true)?;
        let link = UnixStream::from_std(ours)?;
        let mut inbox = socket::Inbox::default();
        let began = Instant::now();
        let listeners: io::Result<Vec<_>> =
            self.listeners.iter().map(TcpListener::try_clone).collect();
        let assignment = Assignment {
            settings: self.settings(),
            listeners: listeners?,
        };
        let assigned = async {
            socket::send(&link, assignment).await?;
            socket::receive::<FromData>(&link, &mut inbox).await
        };
        match tokio::time::timeout(START_WITHIN, assigned).await {
            Err(_) => Err(StartError::Late),
            Ok(Err(error)) => Err(error.into()),
            Ok(Ok(FromData::Ready(mut walls))) => {
                walls.push(self.wall_of_volumes());
                Ok(Life {
                    child,
                    link,
                    inbox,
                    began,
                    walls,
                })
            }
            Ok(Ok(FromData::Failed(reason))) => Err(StartError::Failed(reason)),
            Ok(Ok(_)) => Err(StartError::Failed("it says something else".to_owned())),
        }
    }

    /// This one is made here: of what is handed over.
    fn wall_of_volumes(&self) -> Wall {
        let root = std::fs::File::open(&self.spec.root);
        Wall::new("nothing above volumes", root.and_then(can_shut_in))
    }

    fn settings(&self) -> Settings {
        let spec = &self.spec;
        Settings {
            domain: spec.domain.clone(),
            workers: spec.workers,
            ceiling: spec.ceiling.into(),
            instances: spec.instances,
            code_idle: spec.code_idle,
            guest_memory: spec.guest_memory,
            outbound_networks: spec.outbound_networks.clone(),
            artefact_key: spec.artefact_key,
            certificate: spec.certificate.as_ref().map(|now| now.pem().1),
            root: spec.root.clone(),
        }
    }

    /// Carries messages both ways until one side has had enough.
    async fn live(&mut self, life: Life) -> (Buried, Ended) {
        let Life {
            child,
            link,
            mut inbox,
            walls,
            ..
        } = life;
        let (commands, mut commands_out) = mpsc::channel::<Command>(COMMAND_QUEUE);
        let up = DataEvent::Up { commands, walls };
        if self.events.send(up).await.is_err() {
            return (child, Ended::Dismissed);
        }
        let (inquest, mut answers) = Inquest::new(Arc::clone(&self.offload));
        let (listeners, events) = (&mut self.listeners, &self.events);
        let incoming = async {
            loop {
                match socket::receive(&link, &mut inbox).await {
                    Ok(FromData::Asks {
                        id,
                        tenant,
                        question,
                    }) => {
                        if !inquest.begin(id, tenant, question) {
                            return Ended::Died(LinkError::Insistent);
                        }
                    }
                    Ok(report) => {
                        if events.send(DataEvent::Says(report)).await.is_err() {
                            return Ended::Dismissed;
                        }
                    }
                    Err(error) => return Ended::Died(error),
                }
            }
        };
        let outgoing = async {
            loop {
                // Both are cancel-safe: what was not received stays.
                let (command, _place) = tokio::select! {
                    command = commands_out.recv() => match command {
                        Some(command) => (command, None),
                        None => return Ended::Dismissed,
                    },
                    // Its other end is here, in `inquest`.
                    Some((answer, place)) = answers.recv() => {
                        let body = ToData::Answer(answer);
                        (Command { seq: 0, body }, Some(place))
                    }
                };
                if matches!(command.body, ToData::Drain { .. }) {
                    // Data closes its own.
                    listeners.clear();
                }
                match socket::send(&link, command).await {
                    Ok(()) => {}
                    // Nothing was sent of it; whoever waits for the answer will wait in vain.
                    Err(error @ (LinkError::Message(_) | LinkError::Frame(_))) => {
                        tracing::error!(%error, "a command cannot be sent");
                    }
                    Err(error) => return Ended::Died(error),
                }
            }
        };
        // Whichever ends first ends this life; what the other one was at is of no use then.
        let ended = tokio::select! {
            ended = incoming => ended,
            ended = outgoing => ended,
        };
        (child, ended)
    }
}

fn say_what_is_missing(walls: &[Wall]) {
    let missing = walls.iter().filter_map(|wall| {
        let why = wall.missing.as_ref()?;
        Some(format!("{} ({why})", wall.name))
    });
    let missing: Vec<_> = missing.collect();
    if !missing.is_empty() {
        tracing::warn!(missing = missing.join("; "), "the data process lacks walls");
    }
}

/// A child that is killed and waited for whatever happens.
struct Buried {
    child: Child,
    status: Option<io::Result<std::process::ExitStatus>>,
}

impl Buried {
    /// Kills it if it is there, and says what CPU time it had used.
    fn bury(&mut self) -> u64 {
        if self.status.is_some() {
            return 0;
        }
        // Fails only where it has ended.
        let _ = self.child.kill();
        let pid = self.child.id();
        if let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
            // Its books are complete when it has ended, and gone when it was waited for.
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            let _ = waitid(WaitId::Pid(raw), options);
        }
        let cpu_ns = child_cpu_ns(pid);
        self.status = Some(self.child.wait());
        cpu_ns
    }

    fn status(&self) -> String {
        match &self.status {
            None => "it runs".to_owned(),
            Some(Ok(status)) => status.to_string(),
            Some(Err(error)) => error.to_string(),
        }
    }

    /// Waits for its end, and makes one after a while.
    async fn end_within(mut self, limit: Duration) {
        let until = Instant::now() + limit;
        while let Ok(None) = self.child.try_wait() {
            if Instant::now() > until {
                tracing::warn!("the data process does not end; it is killed");
                break;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl Drop for Buried {
    fn drop(&mut self) {
        self.bury();
    }
}
