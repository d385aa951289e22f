//! Those who only press: many connections, each with one request under way, asking again as soon as
//! the answer has come, and again when they were refused or cut off.
//!
//! ```text
//!  open ─▶ ask ─▶ whole answer ─▶ ask …
//!                 endless answer ─▶ read and thrown away
//!                 closed, failed ─▶ open again, after a moment
//! ```
//!
//! A thread of its own, until it is told to stop. Bounded in connections; not in requests, for that
//! is what it is for.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use rustix::event::epoll;
use rustix::time::Timespec;

use crate::cores::{Cores, Priority};
use crate::response;
use crate::wire::{Received, Wire};

pub(crate) const CONNECTIONS_MAX: usize = 4_096;
/// So many are being opened at a time: a listener's backlog is not what is tested.
const OPENING_MAX: usize = 64;
const TICK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 5_000_000,
};

/// What becomes of answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answers {
    /// Each is read whole, and is followed by the next request.
    Counted,
    /// They have no end; all of it is thrown away.
    Endless,
}

/// Which request a connection asks next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turns {
    /// The n-th connection always asks the n-th, counted round.
    Own,
    /// All connections together go through all of them, and begin again.
    Rotating,
}

/// Who asks what.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) address: SocketAddr,
    pub(crate) requests: Vec<Vec<u8>>,
    pub(crate) turns: Turns,
    pub(crate) connections: usize,
    pub(crate) answers: Answers,
    pub(crate) cores: Cores,
    pub(crate) priority: Priority,
}

/// What they saw so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Answers of whatever kind but refusals.
    pub(crate) answers: u64,
    /// 429 and 503.
    pub(crate) refusals: u64,
    /// Connections that ended, or brought something that made no sense.
    pub(crate) failures: u64,
}

#[derive(Debug, Default)]
struct Counters {
    stop: AtomicBool,
    answers: AtomicU64,
    refusals: AtomicU64,
    failures: AtomicU64,
    open: AtomicU64,
}

/// A crowd at work.
#[derive(Debug)]
pub(crate) struct Crowd {
    counters: Arc<Counters>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Crowd {
    pub(crate) fn start(plan: Plan) -> Result<Self> {
        if plan.requests.is_empty() || plan.connections == 0 {
            bail!("a crowd of nobody");
        }
        if plan.connections > CONNECTIONS_MAX {
            bail!("at most {CONNECTIONS_MAX} connections in a crowd");
        }
        let counters = Arc::new(Counters::default());
        let shared = Arc::clone(&counters);
        let thread = std::thread::Builder::new()
            .name("crowd".to_owned())
            .spawn(move || {
                plan.cores.bind()?;
                // Refused, it presses as an ordinary process would.
                let _ = plan.priority.take();
                Client::new(&plan, &shared)?.run()
            })?;
        Ok(Self {
            counters,
            thread: Some(thread),
        })
    }

    pub(crate) fn seen(&self) -> Seen {
        Seen {
            answers: self.counters.answers.load(Ordering::Relaxed),
            refusals: self.counters.refusals.load(Ordering::Relaxed),
            failures: self.counters.failures.load(Ordering::Relaxed),
        }
    }

    /// How many connections are open now.
    pub(crate) fn open(&self) -> u64 {
        self.counters.open.load(Ordering::Relaxed)
    }

    /// Closes all connections.
    pub(crate) fn end(mut self) -> Result<Seen> {
        self.stop()?;
        Ok(self.seen())
    }

    fn stop(&mut self) -> Result<()> {
        self.counters.stop.store(true, Ordering::Relaxed);
        match self.thread.take() {
            Some(thread) => thread
                .join()
                .unwrap_or_else(|_| bail!("the crowd's thread panicked")),
            None => Ok(()),
        }
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        // Where it was not ended, something else failed, and that is what is told.
        let _ = self.stop();
    }
}

struct Client<'a> {
    plan: &'a Plan,
    counters: &'a Counters,
    epoll: OwnedFd,
    wires: Vec<Wire>,
    opening: usize,
    /// Requests asked so far.
    asked: usize,
}

impl<'a> Client<'a> {
    fn new(plan: &'a Plan, counters: &'a Counters) -> Result<Self> {
        let now = Instant::now();
        Ok(Self {
            plan,
            counters,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            wires: (0..plan.connections).map(|_| Wire::new(now)).collect(),
            opening: 0,
            asked: 0,
        })
    }

    fn run(mut self) -> Result<()> {
        let mut events = Vec::with_capacity(self.wires.len());
        let mut opened = Instant::now();
        self.open_due(opened)?;
        while !self.counters.stop.load(Ordering::Relaxed) {
            events.clear();
            let space = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, space, Some(&TICK)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("waiting for answers"),
            }
            for event in &events {
                // `data` lies unaligned in the kernel's record.
                let data = event.data;
                self.ready(usize::try_from(data.u64())?)?;
            }
            // Looking through all of them at every event would cost more than the events.
            let now = Instant::now();
            if now.duration_since(opened).subsec_millis() > 0 {
                opened = now;
                self.open_due(now)?;
            }
        }
        Ok(())
    }

    fn open_due(&mut self, now: Instant) -> Result<()> {
        let mut open = 0;
        for (index, wire) in self.wires.iter_mut().enumerate() {
            if wire.is_due(now) {
                // One that did not come to be open gives its place to its successor.
                let again = wire.is_connecting();
                if again || self.opening < OPENING_MAX {
                    wire.open(&self.epoll, index as u64, self.plan.address, now)?;
                    self.opening -= usize::from(again);
                    self.opening += usize::from(wire.is_connecting());
                }
            }
            open += u64::from(wire.is_open());
        }
        self.counters.open.store(open, Ordering::Relaxed);
        Ok(())
    }

    fn ready(&mut self, index: usize) -> Result<()> {
        let wire = &mut self.wires[index];
        if wire.is_connecting() {
            self.opening -= 1;
            let now = Instant::now();
            if wire.connected(&self.epoll, index as u64, now)? {
                self.ask(index);
            }
            return Ok(());
        }
        match self.receive(index) {
            Ok(false) => {}
            Ok(true) => self.ask(index),
            Err(_) => self.failed(index),
        }
        Ok(())
    }

    /// Whether it is time to ask again.
    fn receive(&mut self, index: usize) -> Result<bool> {
        let wire = &mut self.wires[index];
        if wire.receive()? == Received::Nothing {
            return Ok(false);
        }
        if self.plan.answers == Answers::Endless {
            wire.clear();
            return Ok(false);
        }
        let Some(response) = response::parse(wire.bytes())? else {
            return Ok(false);
        };
        let counter = match response.status {
            429 | 503 => &self.counters.refusals,
            _ => &self.counters.answers,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        if response.close || response.length != wire.bytes().len() {
            wire.down(Instant::now());
            return Ok(false);
        }
        wire.clear();
        Ok(true)
    }

    fn ask(&mut self, index: usize) {
        let turn = match self.plan.turns {
            Turns::Own => index,
            Turns::Rotating => self.asked,
        };
        self.asked = self.asked.wrapping_add(1);
        let request = &self.plan.requests[turn % self.plan.requests.len()];
        if self.wires[index].send(request).is_err() {
            self.failed(index);
        }
    }

    fn failed(&mut self, index: usize) {
        self.counters.failures.fetch_add(1, Ordering::Relaxed);
        self.wires[index].down(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::time::Duration;

    use super::*;
    use crate::targets;

    /// Answers each request with the next of these, and begins again.
    fn server(answers: &'static [&'static [u8]]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                std::thread::spawn(move || {
                    let mut request = [0; 1024];
                    for answer in answers.iter().cycle() {
                        if !matches!(stream.read(&mut request), Ok(1..))
                            || stream.write_all(answer).is_err()
                        {
                            return;
                        }
                    }
                });
            }
        });
        address
    }

    fn crowd(address: SocketAddr, answers: Answers) -> Crowd {
        let plan = Plan {
            address,
            requests: vec![targets::get("/", "test")],
            turns: Turns::Own,
            connections: 100,
            answers,
            cores: Cores::allowed().unwrap(),
            priority: Priority::Ordinary,
        };
        Crowd::start(plan).unwrap()
    }

    fn until(crowd: &Crowd, holds: impl Fn(Seen, u64) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !holds(crowd.seen(), crowd.open()) {
            assert!(
                Instant::now() < deadline,
                "{:?} {}",
                crowd.seen(),
                crowd.open()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn answers_and_refusals_are_told_apart_and_closed_connections_come_back() {
        let address = server(&[
            b"HTTP/1.1 502 Bad\r\ncontent-length: 2\r\n\r\nno",
            b"HTTP/1.1 429 Slow\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        ]);
        let crowd = crowd(address, Answers::Counted);
        until(&crowd, |seen, _| seen.answers > 300 && seen.refusals > 300);
        let seen = crowd.end().unwrap();
        assert!(seen.answers >= seen.refusals, "{seen:?}");
    }

    #[test]
    fn all_are_asked_as_often_where_they_take_turns() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let plan = |turns| Plan {
            address: listener.local_addr().unwrap(),
            requests: ["a", "b", "c"].map(|host| targets::get("/", host)).to_vec(),
            turns,
            connections: 1,
            answers: Answers::Counted,
            cores: Cores::allowed().unwrap(),
            priority: Priority::Ordinary,
        };
        for (turns, expected) in [(Turns::Own, "aaaa"), (Turns::Rotating, "abca")] {
            let crowd = Crowd::start(plan(turns)).unwrap();
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = String::new();
            for _ in 0..expected.len() {
                let mut request = [0; 1024];
                let count = stream.read(&mut request).unwrap();
                let text = String::from_utf8_lossy(&request[..count]).into_owned();
                asked += text.split_once("Host: ").unwrap().1.trim();
                stream
                    .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                    .unwrap();
            }
            assert_eq!(asked, expected);
            crowd.end().unwrap();
        }
    }

    #[test]
    fn an_answer_without_end_is_never_followed_by_a_request() {
        let address = server(&[b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n"]);
        let crowd = crowd(address, Answers::Endless);
        until(&crowd, |_, open| open == 100);
        assert_eq!(crowd.end().unwrap(), Seen::default());
    }
}
