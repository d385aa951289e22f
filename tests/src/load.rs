//! Many requests at once, from a few threads that each wait for an answer before they ask again.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::http::{Answer, Broken, Connection, Request};

/// What came of a load.
#[derive(Debug, Clone, Default)]
pub struct Load {
    /// Answers by status; 0 for those that did not come whole.
    pub statuses: BTreeMap<u16, u64>,
    /// Problems by code.
    pub problems: BTreeMap<String, u64>,
    /// How long each answer took, sorted.
    pub latencies: Vec<Duration>,
}

impl Load {
    /// The latency that this part (0 to 1) of the answers stayed below.
    ///
    /// # Panics
    /// When there was no answer.
    #[must_use]
    pub fn quantile(&self, part: f64) -> Duration {
        let ranks = 0..self.latencies.len();
        let rank = ranks
            .rev()
            .find(|rank| (*rank as f64) <= part * self.latencies.len() as f64);
        self.latencies[rank.expect("at least one answer")]
    }

    /// Requests in all.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.statuses.values().sum()
    }

    /// Answers with this status.
    #[must_use]
    pub fn status(&self, status: u16) -> u64 {
        self.statuses.get(&status).copied().unwrap_or(0)
    }

    fn count(&mut self, took: Duration, answer: &Result<Answer, Broken>) {
        self.latencies.push(took);
        let status = answer.as_ref().map_or(0, |answer| answer.status);
        *self.statuses.entry(status).or_default() += 1;
        let Ok(answer) = answer else { return };
        let kind = answer.header("content-type").unwrap_or_default();
        if kind.starts_with("application/problem+json") {
            *self.problems.entry(answer.problem()).or_default() += 1;
        }
    }

    fn add(&mut self, other: Self) {
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
        for (code, count) in other.problems {
            *self.problems.entry(code).or_default() += count;
        }
        self.latencies.extend(other.latencies);
        self.latencies.sort();
    }
}

/// Sends a request until `more` says no, on connections that stay open.
fn send(request: &Request, more: impl Fn() -> bool) -> Load {
    let mut load = Load::default();
    let mut connection: Option<Connection> = None;
    while more() {
        let began = Instant::now();
        let mut open = match connection.take() {
            Some(open) => open,
            None => request.connect().expect("a connection"),
        };
        let answer = open.exchange(request);
        load.count(began.elapsed(), &answer);
        let kept = |answer: &Answer| answer.header("connection") != Some("close");
        if answer.as_ref().is_ok_and(kept) && !open.is_closed_already() {
            connection = Some(open);
        }
    }
    load
}

fn from_threads(threads: usize, work: impl Fn() -> Load + Sync) -> Load {
    let mut sum = Load::default();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(&work)).collect();
        for thread in threads {
            sum.add(thread.join().expect("a client"));
        }
    });
    sum
}

/// Sends a request so many times, from so many connections at once.
///
/// # Panics
/// When the host does not take a connection.
#[must_use]
pub fn times(count: u64, connections: usize, request: &Request) -> Load {
    let taken = AtomicU64::new(0);
    let more = || taken.fetch_add(1, Ordering::Relaxed) < count;
    from_threads(connections, || send(request, more))
}

/// Sends a request so many times, from so many connections at once, and keeps every answer.
///
/// # Panics
/// When an answer does not come whole.
#[must_use]
pub fn answers(count: u64, connections: usize, request: &Request) -> Vec<Answer> {
    let taken = AtomicU64::new(0);
    let work = || {
        let mut answers = Vec::new();
        let mut connection = request.connect().expect("a connection");
        while taken.fetch_add(1, Ordering::Relaxed) < count {
            answers.push(connection.exchange(request).expect("a whole answer"));
        }
        answers
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..connections).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().expect("a client"))
            .collect()
    })
}

/// Sends a request from so many connections at once for as long as `more` says so.
///
/// # Panics
/// When the host does not take a connection.
#[must_use]
pub fn as_long_as(more: impl Fn() -> bool + Sync, connections: usize, request: &Request) -> Load {
    from_threads(connections, || send(request, &more))
}

/// Sends a request for so long, from so many connections at once.
///
/// # Panics
/// When the host does not take a connection.
#[must_use]
pub fn during(span: Duration, connections: usize, request: &Request) -> Load {
    let end = Instant::now() + span;
    from_threads(connections, || send(request, || Instant::now() < end))
}
