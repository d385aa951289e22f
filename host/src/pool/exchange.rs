//! One request and its answer, from admission to the usage record.
//!
//! An [`Exchange`] is shared by the job (which runs the guest) and the connection (which waits
//! for the head and then for the body). Either side can end first; the record is written once,
//! when the last of them lets go.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use insula_types::{Outcome, VersionNumber};
use tokio::sync::oneshot;

use super::conduct::VersionStats;
use super::entries::ServiceEntry;
use super::versions::Active;
use crate::engine::run::{Head, Ledger};

/// What one request used and how it ended.
#[derive(Debug)]
pub struct Record {
    /// How it ended.
    pub outcome: Outcome,
    /// Fuel consumed.
    pub fuel: u64,
    /// Byte-milliseconds of guest memory.
    pub memory_byte_ms: u64,
    /// Request head and body.
    pub bytes_in: u64,
    /// Response head and body.
    pub bytes_out: u64,
    /// From the request's head to the end of the answer.
    pub duration: Duration,
}

/// How far the answer got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Answer {
    /// Nothing was sent.
    None = 0,
    /// The body went out whole.
    Whole = 1,
    /// The guest ended its body early, or with an error.
    Broken = 2,
    /// The client went away before the end.
    Abandoned = 3,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Exchange {
    /// Whose request it is.
    pub service: Arc<ServiceEntry>,
    /// Which of its versions runs.
    pub version: VersionNumber,
    /// Whether the guest itself answered with a status from 500 on.
    pub answered_5xx: AtomicBool,
    conduct: Arc<VersionStats>,
    /// For logs and headers.
    pub request_id: String,
    /// What the instance used; complete once its future is gone.
    pub ledger: Arc<Ledger>,
    /// CPU time charged so far, in nanoseconds.
    pub cpu_ns: AtomicU64,
    /// Bytes of the request so far.
    pub bytes_in: AtomicU64,
    /// Bytes of the answer so far.
    pub bytes_out: AtomicU64,
    began: Instant,
    verdict: OnceLock<Outcome>,
    answer: AtomicU8,
    head: Mutex<Option<oneshot::Sender<Head>>>,
    done: Mutex<Option<oneshot::Sender<()>>>,
}

/// The connection's ends of an exchange.
#[derive(Debug)]
pub struct Waiting {
    /// Gets the head of the answer; closed when there will be none.
    pub head: oneshot::Receiver<Head>,
    /// Closed when the instance is gone and the ledger complete.
    pub done: oneshot::Receiver<()>,
}

impl Exchange {
    /// A new exchange, and what its connection waits on.
    #[must_use]
    pub fn new(
        service: Arc<ServiceEntry>,
        active: &Active,
        request_id: String,
        began: Instant,
    ) -> (Arc<Self>, Waiting) {
        let (head_sender, head) = oneshot::channel();
        let (done_sender, done) = oneshot::channel();
        let exchange = Self {
            service,
            version: active.number,
            answered_5xx: AtomicBool::new(false),
            conduct: Arc::clone(&active.stats),
            request_id,
            ledger: Arc::default(),
            cpu_ns: AtomicU64::new(0),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            began,
            verdict: OnceLock::new(),
            answer: AtomicU8::new(Answer::None as u8),
            head: Mutex::new(Some(head_sender)),
            done: Mutex::new(Some(done_sender)),
        };
        (Arc::new(exchange), Waiting { head, done })
    }

    fn take<T>(slot: &Mutex<Option<T>>) -> Option<T> {
        slot.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Hands the head to the connection. Later heads, and those after a verdict, are dropped.
    pub fn send_head(&self, head: Head) {
        if let Some(sender) = Self::take(&self.head) {
            // The connection may be gone already: then nobody wants it.
            let _ = sender.send(head);
        }
    }

    /// Says how the guest ended. The first word counts. Must come before the guest's body is
    /// dropped: that is how a cut-off body is told from a finished one.
    pub fn settle(&self, outcome: Outcome) {
        let _ = self.verdict.set(outcome);
        drop(Self::take(&self.head));
    }

    /// How the guest ended, once it has.
    pub fn verdict(&self) -> Option<Outcome> {
        self.verdict.get().copied()
    }

    /// The instance is gone.
    pub fn finish(&self) {
        drop(Self::take(&self.done));
    }

    /// Charges measured CPU time.
    pub fn charge_cpu(&self, ns: u64) {
        self.cpu_ns.fetch_add(ns, Ordering::Relaxed);
        self.service.charge_cpu(ns);
    }

    /// Says how far the answer got. The first word counts.
    pub fn answered(&self, answer: Answer) {
        let _ = self.answer.compare_exchange(
            Answer::None as u8,
            answer as u8,
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
    }

    /// The `insula-usage` value. Final once [`Waiting::done`] is closed.
    #[must_use]
    pub fn usage(&self) -> String {
        format!(
            "fuel={};cpu_us={};memory_peak={};version={}",
            self.ledger.fuel.load(Ordering::Relaxed),
            self.cpu_ns.load(Ordering::Relaxed) / 1000,
            self.ledger.memory_peak.load(Ordering::Relaxed),
            self.version,
        )
    }

    fn outcome(&self) -> Outcome {
        let answer = self.answer.load(Ordering::Relaxed);
        match self.verdict() {
            Some(Outcome::Ok) if answer == Answer::Broken as u8 => Outcome::BadResponse,
            Some(Outcome::Ok) if answer == Answer::Abandoned as u8 => Outcome::Canceled,
            Some(Outcome::Ok) if answer == Answer::None as u8 => Outcome::BadResponse,
            Some(outcome) => outcome,
            None => Outcome::HostError,
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let record = Record {
            outcome: self.outcome(),
            fuel: self.ledger.fuel.load(Ordering::Relaxed),
            memory_byte_ms: self.ledger.memory_byte_ms.load(Ordering::Relaxed),
            bytes_in: self.bytes_in.load(Ordering::Relaxed),
            bytes_out: self.bytes_out.load(Ordering::Relaxed),
            duration: self.began.elapsed(),
        };
        let answered_5xx = self.answered_5xx.load(Ordering::Relaxed);
        self.conduct
            .ended(record.outcome, answered_5xx, record.duration);
        self.service.record(&record);
    }
}
