//! An upgrade in place: one host hands its data directory and its listeners over to the next.
//!
//! ```text
//!  old host                                              new host (new program, same directory)
//!  ────────                                              ────────────────────────────────────────
//!  <data>/handover ◀───── Take, with its program ─────── the directory is locked
//!  compiles with that what the other engine
//!  has no code of; all goes on meanwhile
//!                  ───────────── Preparing ────────────▶ says how far it is
//!                  ───── Offer, with all listeners ────▶
//!  admin API stops, state is closed, lock is let go
//!                  ───────────── Released ─────────────▶ opens the state, starts its data process,
//!  data serves on                                        tells it everything, accepts
//!                  ◀──────────── Serving ───────────────
//!  data accepts no more, answers what its connections
//!  still ask, closes them when they are at rest
//!                  ─────────────── Usage ──────────────▶ adds it to its books
//!  ends
//! ```
//!
//! Both accept from the same sockets, so that no connection is lost between them: one that comes
//! while neither accepts waits in the kernel. Requests to the admin API wait there for the moment
//! between `Released` and `Serving`.
//!
//! **Failure paths.** The new host fails before `Offer`: nothing has happened. What cannot be compiled
//! for it holds nothing up: it says so, and is not served until it is. It fails between
//! `Released` and `Serving`: the old one has let go of its state; it drains and ends with an error,
//! and whatever started it starts it again. The old host fails: its data process goes with it, and
//! with that the requests that it had.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::control::Progress;
use crate::link::LinkError;
use crate::link::socket::{self, Inbox};
use crate::link::wire::{Message, MessageError, Parcel};
use crate::messages::UsageDelta;
use crate::state::EngineName;

/// The socket's name in the data directory, to which nobody else has access.
const SOCKET: &str = "handover";
/// How long the other may take for a word that needs no work.
const WORD_WITHIN: Duration = Duration::from_secs(5);
/// How long it may say nothing while it compiles. Its end is noticed at once.
const PREPARING_WITHIN: Duration = Duration::from_secs(60);
/// How often the old host says how far it is with compiling.
const SAY_EVERY: Duration = Duration::from_secs(1);
/// How long the old host may take to let go of its state: requests to the admin API end first.
const RELEASE_WITHIN: Duration = Duration::from_secs(60);
/// How long the new one may take to serve. It may have to compile what was uploaded in the last moment;
/// the old data process serves meanwhile.
const SERVE_WITHIN: Duration = Duration::from_secs(120);

/// Why a handover failed.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The connection.
    #[error("the other host cannot be spoken to: {0}")]
    Link(#[from] LinkError),
    /// It says something else.
    #[error("the other host says {0} out of turn")]
    OutOfTurn(&'static str),
    /// A descriptor, a file.
    #[error("handing over: {0}")]
    Io(#[from] io::Error),
}

#[derive(Debug, Serialize, Deserialize)]
enum Word {
    Take { engine: EngineName },
    Preparing(Progress),
    Offer { ingress: usize },
    Released,
    Serving,
    Usage(Vec<UsageDelta>),
}

impl Word {
    const fn name(&self) -> &'static str {
        match self {
            Self::Take { .. } => "take",
            Self::Preparing(_) => "preparing",
            Self::Offer { .. } => "offer",
            Self::Released => "released",
            Self::Serving => "serving",
            Self::Usage(_) => "usage",
        }
    }
}

struct Note {
    word: Word,
    files: Vec<OwnedFd>,
}

impl Message for Note {
    fn pack(self) -> Result<Parcel, MessageError> {
        Ok(Parcel {
            payload: serde_json::to_vec(&self.word)?,
            files: self.files,
        })
    }

    fn unpack(parcel: Parcel) -> Result<Self, MessageError> {
        Ok(Self {
            word: serde_json::from_slice(&parcel.payload)?,
            files: parcel.files,
        })
    }
}

impl From<Word> for Note {
    fn from(word: Word) -> Self {
        let files = Vec::new();
        Self { word, files }
    }
}

/// One end of the conversation.
#[derive(Debug)]
struct Line {
    stream: UnixStream,
    inbox: Inbox,
}

impl Line {
    fn new(stream: UnixStream) -> Self {
        let inbox = Inbox::default();
        Self { stream, inbox }
    }

    fn say(&self, note: impl Into<Note>) -> Result<(), HandoverError> {
        Ok(socket::send_blocking(&self.stream, note.into())?)
    }

    fn hear(&mut self, within: Duration) -> Result<Note, HandoverError> {
        self.stream.set_read_timeout(Some(within))?;
        Ok(socket::receive_blocking(&self.stream, &mut self.inbox)?)
    }
}

/// All sockets that clients connect to.
#[derive(Debug)]
pub(crate) struct Listeners {
    pub(crate) ingress: Vec<TcpListener>,
    pub(crate) admin: TcpListener,
}

/// Reaches a socket below a directory whose path may be longer than a socket's address.
fn reach(data: &Path) -> io::Result<(std::fs::File, String)> {
    let dir = std::fs::File::open(data)?;
    let path = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
    Ok((dir, path))
}

/// Where a host waits for its successor.
#[derive(Debug)]
pub(crate) struct Waiting {
    socket: UnixListener,
    listeners: Listeners,
}

impl Waiting {
    /// Opens the socket. The data directory is locked by this host, so what is there is old.
    pub(crate) fn open(data: &Path, listeners: Listeners) -> io::Result<Self> {
        let (_dir, path) = reach(data)?;
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let socket = UnixListener::bind(&path)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, listeners })
    }

    /// Waits until a new host has asked, everything was compiled for its engine, with its program, and
    /// it was made the offer. `prepare` does that, and tells how far it is until it is done. May be
    /// dropped at any time.
    pub(crate) async fn successor(
        &self,
        prepare: impl Fn(EngineName, OwnedFd) -> watch::Receiver<Progress>,
    ) -> Successor {
        loop {
            let taken = async {
                let socket = tokio::net::UnixListener::from_std(self.socket.try_clone()?)?;
                let (stream, _) = socket.accept().await?;
                self.offer(stream.into_std()?, &prepare).await
            };
            match taken.await {
                Ok(successor) => return successor,
                Err(error) => {
                    tracing::warn!(%error, "a handover was not begun");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn offer(
        &self,
        stream: UnixStream,
        prepare: impl Fn(EngineName, OwnedFd) -> watch::Receiver<Progress>,
    ) -> Result<Successor, HandoverError> {
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(WORD_WITHIN))?;
        let mut line = Line::new(stream);
        let Note { word, mut files } = line.hear(WORD_WITHIN)?;
        let (Word::Take { engine }, Some(program)) = (&word, files.pop()) else {
            return Err(HandoverError::OutOfTurn(word.name()));
        };
        let mut progress = prepare(engine.clone(), program);
        // An error says that the other host is gone, and ends the preparation.
        while let Ok(Ok(())) | Err(_) = tokio::time::timeout(SAY_EVERY, progress.changed()).await {
            let now = *progress.borrow_and_update();
            line.say(Word::Preparing(now))?;
        }
        let mut files = Vec::with_capacity(self.listeners.ingress.len() + 1);
        for listener in &self.listeners.ingress {
            files.push(OwnedFd::from(listener.try_clone()?));
        }
        files.push(OwnedFd::from(self.listeners.admin.try_clone()?));
        let ingress = self.listeners.ingress.len();
        let word = Word::Offer { ingress };
        line.say(Note { word, files })?;
        Ok(Successor(line))
    }
}

/// A host that takes over from this one.
#[derive(Debug)]
pub struct Successor(Line);

impl Successor {
    /// The state is closed and unlocked.
    pub(crate) fn release(&self) -> Result<(), HandoverError> {
        self.0.say(Word::Released)
    }

    /// Waits until it serves.
    pub(crate) fn serves(&mut self) -> Result<(), HandoverError> {
        match self.0.hear(SERVE_WITHIN)?.word {
            Word::Serving => Ok(()),
            other => Err(HandoverError::OutOfTurn(other.name())),
        }
    }

    /// What was used since the state was closed.
    pub(crate) fn leave(self, usage: Vec<UsageDelta>) -> Result<(), HandoverError> {
        self.0.say(Word::Usage(usage))
    }
}

/// A host that this one takes over from.
#[derive(Debug)]
pub(crate) struct Predecessor(Line);

/// Asks the host that holds a data directory to hand over to one with this engine and program. `None`
/// where it does not wait for that.
///
/// # Errors
/// [`HandoverError`] when it does, and then fails.
pub(crate) fn take(
    data: &Path,
    engine: &EngineName,
    program: &Path,
) -> Result<Option<(Predecessor, Listeners)>, HandoverError> {
    let (_dir, path) = reach(data)?;
    let Ok(stream) = UnixStream::connect(path) else {
        return Ok(None);
    };
    let mut line = Line::new(stream);
    let word = Word::Take {
        engine: engine.clone(),
    };
    let files = vec![OwnedFd::from(std::fs::File::open(program)?)];
    line.say(Note { word, files })?;
    let mut before = Progress::default();
    let (word, mut files) = loop {
        match line.hear(PREPARING_WITHIN)? {
            Note {
                word: Word::Preparing(progress),
                ..
            } => {
                if progress != before {
                    tracing::info!("{progress}");
                }
                before = progress;
            }
            Note { word, files } => break (word, files),
        }
    };
    let (ingress, admin) = match (word, files.pop()) {
        (Word::Offer { ingress }, Some(admin)) if ingress == files.len() => (files, admin),
        (other, _) => return Err(HandoverError::OutOfTurn(other.name())),
    };
    let listeners = Listeners {
        ingress: ingress.into_iter().map(TcpListener::from).collect(),
        admin: TcpListener::from(admin),
    };
    match line.hear(RELEASE_WITHIN)?.word {
        Word::Released => Ok(Some((Predecessor(line), listeners))),
        other => Err(HandoverError::OutOfTurn(other.name())),
    }
}

impl Predecessor {
    /// This host serves; the other one drains.
    pub(crate) fn serving(&self) -> Result<(), HandoverError> {
        self.0.say(Word::Serving)
    }

    /// Lets go of the conversation from another thread.
    pub(crate) fn hang_up(&self) -> io::Result<UnixStream> {
        self.0.stream.try_clone()
    }

    /// Waits for what the other host's last requests used.
    pub(crate) fn usage(mut self) -> Result<Vec<UsageDelta>, HandoverError> {
        self.0.stream.set_read_timeout(None)?;
        match socket::receive_blocking(&self.0.stream, &mut self.0.inbox)? {
            Note {
                word: Word::Usage(usage),
                ..
            } => Ok(usage),
            Note { word, .. } => Err(HandoverError::OutOfTurn(word.name())),
        }
    }
}

/// Whether listeners that were handed over are those that were asked for.
pub(crate) fn fits(listener: &TcpListener, asked: SocketAddr) -> bool {
    let is = listener.local_addr().ok();
    is.is_some_and(|is| is == asked || (asked.port() == 0 && asked.ip() == is.ip()))
}
