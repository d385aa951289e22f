//! The monitor's first thread: listens to the host, and to the machine's end.
//!
//! ```text
//!  Waiting ── start ─▶ Alive ── the guest ends it, or "end" ─▶ record written, process over
//!     │                  ▲ │ pause, resume, statistics, console
//!     │                  └─┘
//!     └── nobody came, or the machine cannot be made ─▶ record written, process over
//! ```
//!
//! Connections come and go: a host that died is replaced by one that connects anew, and the machine
//! does not notice. Nothing here waits for a peer: a connection whose answer does not fit into its
//! socket is closed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

use super::alive::Alive;
use super::protocol::{self, Cause, Record, Reply, Request};
use super::wire::{self, Incoming};
use crate::exit::ExitReason;
use crate::jail::seccomp::Filters;

/// A host speaks over one; more are a host and its successor, and whoever debugs.
const CONNECTIONS_MAX: usize = 4;
/// A monitor that nobody starts within this time was forgotten.
const START_WITHIN: Duration = Duration::from_secs(60);

/// What is left to do after a request.
enum Next {
    Go,
    Over(Record),
}

/// The whole service.
pub(super) struct Service {
    listener: OwnedFd,
    connections: Vec<OwnedFd>,
    filters: Filters,
    alive: Option<Alive>,
    born: Instant,
}

impl Service {
    pub(super) fn new(listener: OwnedFd, filters: Filters) -> Self {
        Self {
            listener,
            connections: Vec::new(),
            filters,
            alive: None,
            born: Instant::now(),
        }
    }

    /// Serves until the machine is over.
    pub(super) fn run(mut self) -> Record {
        loop {
            match self.turn() {
                Ok(Next::Go) => {}
                Ok(Next::Over(record)) => return self.finish(record),
                Err(error) => {
                    let detail = format!("the monitor cannot wait for its host: {error}");
                    let cause = Cause::Failed;
                    return self.finish(Record { cause, detail });
                }
            }
        }
    }

    /// Ends the machine's threads; what ended it first stays the reason.
    fn finish(mut self, record: Record) -> Record {
        if let Some(mut alive) = self.alive.take() {
            alive.machine.stop();
        }
        record
    }

    /// Waits once, and does what is to be done.
    fn turn(&mut self) -> io::Result<Next> {
        let ready = self.wait()?;
        if let Some(alive) = &mut self.alive {
            alive.hub.turn();
            if let Some(reason) = alive.machine.wait(Some(Instant::now())) {
                return Ok(Next::Over(record_of(&reason)));
            }
        } else if self.born.elapsed() > START_WITHIN {
            let detail = format!("no host came within {} s", START_WITHIN.as_secs());
            let cause = Cause::Setup;
            return Ok(Next::Over(Record { cause, detail }));
        }
        let before = std::mem::take(&mut self.connections);
        for (number, connection) in before.into_iter().enumerate() {
            if !ready.contains(&number) {
                self.connections.push(connection);
                continue;
            }
            let (keep, next) = self.listen_to(&connection);
            if keep {
                self.connections.push(connection);
            }
            if let Next::Over(_) = next {
                return Ok(next);
            }
        }
        self.accept();
        Ok(Next::Go)
    }

    /// Which connections have something to say.
    fn wait(&self) -> io::Result<Vec<usize>> {
        let mut watched: Vec<(BorrowedFd<'_>, PollFlags)> = Vec::new();
        for connection in &self.connections {
            watched.push((connection.as_fd(), PollFlags::IN));
        }
        watched.push((self.listener.as_fd(), PollFlags::IN));
        let timeout = match &self.alive {
            Some(alive) => {
                watched.push((alive.machine.ended(), PollFlags::IN));
                watched.extend(alive.hub.interests());
                None
            }
            None => Some(Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            }),
        };
        let mut polled: Vec<_> = watched
            .iter()
            .map(|(descriptor, flags)| PollFd::new(descriptor, *flags))
            .collect();
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = polled.iter().take(self.connections.len()).enumerate();
        Ok(ready
            .filter(|(_, polled)| !polled.revents().is_empty())
            .map(|(number, _)| number)
            .collect())
    }

    fn accept(&mut self) {
        if self.connections.len() >= CONNECTIONS_MAX {
            // The oldest is of a host that is gone, or the newest would not be here.
            self.connections.remove(0);
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        if let Ok(connection) = accept_with(&self.listener, flags) {
            self.connections.push(connection);
        }
    }

    /// One packet. Says whether the connection stays, and what comes next.
    fn listen_to(&mut self, connection: &OwnedFd) -> (bool, Next) {
        let (bytes, with) = match wire::receive(connection) {
            Ok(Some(packet)) => packet,
            Ok(None) => return (false, Next::Go),
            Err(error) => {
                let again = matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                );
                return (again, Next::Go);
            }
        };
        let (reply, next, stays) = match protocol::decode(&bytes) {
            Ok(request) => {
                let (reply, next) = self.answer(request, with);
                (reply, next, true)
            }
            // Whoever speaks like this says nothing that could be understood later.
            Err(error) => (refused(&error), Next::Go, false),
        };
        let sent = protocol::encode(&reply)
            .map_err(io::Error::other)
            .and_then(|bytes| wire::send(connection.as_fd(), &bytes, &[]));
        (stays && sent.is_ok(), next)
    }

    fn answer(&mut self, request: Request, mut with: Incoming) -> (Reply, Next) {
        let Some(alive) = &mut self.alive else {
            return match request {
                Request::Start { machine } => {
                    match Alive::start(*machine, &mut with, &self.filters) {
                        Ok(alive) => {
                            self.alive = Some(alive);
                            (Reply::Done, Next::Go)
                        }
                        Err(error) => {
                            let detail = error.to_string();
                            let cause = Cause::Setup;
                            (refused(&error), Next::Over(Record { cause, detail }))
                        }
                    }
                }
                Request::End { cause } => {
                    let detail = "ended before it was started".to_owned();
                    (Reply::Done, Next::Over(Record { cause, detail }))
                }
                _ => (refused(&"the machine has not been started"), Next::Go),
            };
        };
        let done = |outcome: Result<(), crate::machine::LifeError>| match outcome {
            Ok(()) => Reply::Done,
            Err(error) => refused(&error),
        };
        let reply = match request {
            Request::Start { .. } => refused(&"the machine has been started before"),
            Request::Pause => done(alive.machine.pause()),
            Request::Resume => done(alive.machine.resume()),
            Request::PowerButton => {
                alive.machine.press_power_button();
                Reply::Done
            }
            Request::Statistics => Reply::Statistics {
                of: Box::new(alive.statistics()),
            },
            Request::Console => match with.only().map(|socket| alive.hub.attach(socket)) {
                Some(Ok(())) => Reply::Done,
                Some(Err(error)) => refused(&error),
                None => refused(&"a terminal is one descriptor beside the request"),
            },
            Request::End { cause } => {
                let detail = ExitReason::Stopped.to_string();
                return (Reply::Done, Next::Over(Record { cause, detail }));
            }
        };
        (reply, Next::Go)
    }
}

fn refused(why: &dyn std::fmt::Display) -> Reply {
    Reply::Refused {
        why: why.to_string(),
    }
}

fn record_of(reason: &ExitReason) -> Record {
    let cause = match reason {
        ExitReason::Poweroff => Cause::PoweredOff,
        ExitReason::Reboot(_) => Cause::Rebooted,
        ExitReason::Stopped => Cause::Stopped,
        _ => Cause::Failed,
    };
    let detail = reason.to_string();
    Record { cause, detail }
}
