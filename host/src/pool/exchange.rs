//! One request and its answer, from admission to the usage record.
//!
//! An [`Exchange`] is shared by the job (which runs the guest) and the connection (which waits
//! for the head and then for the body). Either side can end first; the record is written once,
//! when the last of them lets go.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use insula_metrics::{InstanceGuard, InstanceState};
use insula_types::{Outcome, VersionNumber};
use tokio::sync::oneshot;

use super::entries::ServiceEntry;
use super::offload::Payer;
use super::request_id::RequestId;
use crate::engine::outgoing::{Answered, Errand, OutgoingBody, Patience, WayOut};
use crate::engine::run::{Head, Ledger, RunEvents, Verdict};
use crate::engine::{LogLine, LogSink, Offload};
use crate::messages::LogSource;
use crate::outbound::{Clerk, Sender};

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

/// Where the head of the answer is.
#[derive(Debug)]
enum HeadPlace {
    /// The guest may still set it.
    Awaited,
    /// The guest has set it.
    Here(Head),
    /// The connection has it, or there will be none.
    Over,
}

/// What the job leaves for the connection.
#[derive(Debug)]
struct Handover {
    head: HeadPlace,
    /// The instance is gone and the ledger complete.
    done: bool,
    /// The connection's task, when it waits for one of the two.
    waker: Option<Waker>,
    /// Counts the instance for as long as it is there.
    instance: Option<InstanceGuard>,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Exchange {
    /// Whose request it is.
    pub service: Arc<ServiceEntry>,
    /// Which of its versions answers it.
    pub version: VersionNumber,
    /// Whether the guest itself answered with a status from 500 on.
    pub answered_5xx: AtomicBool,
    /// For logs and headers.
    pub request_id: RequestId,
    /// Fuel of one slice.
    pub quantum: u64,
    /// CPU time charged so far, in nanoseconds.
    pub cpu_ns: AtomicU64,
    /// Part of it that the scheduler does not know of yet: work on other threads.
    owed_ns: AtomicU64,
    /// Bytes of the request so far.
    pub bytes_in: AtomicU64,
    /// Bytes of the answer so far.
    pub bytes_out: AtomicU64,
    began: Instant,
    ledger: Ledger,
    verdict: OnceLock<Outcome>,
    answer: AtomicU8,
    handover: Mutex<Handover>,
}

impl Exchange {
    /// A new exchange.
    #[must_use]
    pub fn new(
        service: Arc<ServiceEntry>,
        version: VersionNumber,
        request_id: RequestId,
        began: Instant,
    ) -> Arc<Self> {
        let quantum = service.stats.pace.quantum();
        Arc::new(Self {
            service,
            version,
            answered_5xx: AtomicBool::new(false),
            quantum,
            request_id,
            cpu_ns: AtomicU64::new(0),
            owed_ns: AtomicU64::new(0),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            began,
            ledger: Ledger::default(),
            verdict: OnceLock::new(),
            answer: AtomicU8::new(Answer::None as u8),
            handover: Mutex::new(Handover {
                head: HeadPlace::Awaited,
                done: false,
                waker: None,
                instance: None,
            }),
        })
    }

    fn handover(&self) -> MutexGuard<'_, Handover> {
        self.handover.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what the connection waits for and wakes it.
    fn hand_over(&self, change: impl FnOnce(&mut Handover)) {
        let mut handover = self.handover();
        change(&mut handover);
        let waker = handover.waker.take();
        drop(handover);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The head of the answer, once; `None` when there will be none. One task waits at a time.
    pub fn poll_head(&self, cx: &Context<'_>) -> Poll<Option<Head>> {
        let mut handover = self.handover();
        match std::mem::replace(&mut handover.head, HeadPlace::Over) {
            HeadPlace::Here(head) => Poll::Ready(Some(head)),
            HeadPlace::Over => Poll::Ready(None),
            HeadPlace::Awaited => {
                handover.head = HeadPlace::Awaited;
                handover.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Ready when the instance is gone and the ledger complete. One task waits at a time.
    pub fn poll_done(&self, cx: &Context<'_>) -> Poll<()> {
        let mut handover = self.handover();
        if handover.done {
            return Poll::Ready(());
        }
        handover.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// The connection wants nothing any more.
    pub fn abandon(&self) {
        let head = std::mem::replace(&mut self.handover().head, HeadPlace::Over);
        // Outside of the lock: it may hold a body that wakes somebody.
        drop(head);
    }

    /// Says how the guest ended. The first word counts. Must come before the guest's body is
    /// dropped: that is how a cut-off body is told from a finished one.
    pub fn settle(&self, outcome: Outcome) {
        let _ = self.verdict.set(outcome);
        self.hand_over(|handover| {
            if matches!(handover.head, HeadPlace::Awaited) {
                handover.head = HeadPlace::Over;
            }
        });
    }

    /// How the guest ended, once it has.
    pub fn verdict(&self) -> Option<Outcome> {
        self.verdict.get().copied()
    }

    /// The instance is about to be made.
    pub fn starting(&self) {
        let instance = self.service.metrics().instance(InstanceState::Starting);
        self.handover().instance = Some(instance);
    }

    /// The instance is gone.
    pub fn finish(&self) {
        self.hand_over(|handover| {
            handover.done = true;
            handover.instance = None;
        });
    }

    /// Charges measured CPU time.
    pub fn charge_cpu(&self, ns: u64) {
        self.cpu_ns.fetch_add(ns, Ordering::Relaxed);
        self.service.charge_cpu(ns);
    }

    /// CPU time of other threads that was charged since this was asked last.
    pub(super) fn take_owed(&self) -> u64 {
        self.owed_ns.swap(0, Ordering::Relaxed)
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

    /// The `insula-usage` value. Final once [`Exchange::poll_done`] is ready.
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

impl LogSink for Exchange {
    fn line(&self, line: LogLine) {
        let log = &self.service.stats.log;
        log.line(line, self.version, self.request_id.as_str());
    }
}

impl Payer for Exchange {
    fn pays(&self, cpu_ns: u64) {
        self.charge_cpu(cpu_ns);
        self.owed_ns.fetch_add(cpu_ns, Ordering::Relaxed);
    }
}

impl Clerk for Exchange {
    fn pays(&self, cpu_ns: u64) {
        Payer::pays(self, cpu_ns);
    }
}

impl Offload for Exchange {
    fn offload(self: Arc<Self>, piece: Box<dyn FnOnce() + Send>) {
        let tenant = Arc::clone(&self.service.tenant);
        tenant.offload.submit(tenant.id, Some(self), piece);
    }
}

impl WayOut for Exchange {
    fn errand(
        self: Arc<Self>,
        request: http::Request<OutgoingBody>,
        patience: Patience,
        answer: oneshot::Sender<Answered>,
    ) -> Errand {
        let service = &self.service;
        let sender = Sender {
            host: Arc::clone(&service.outbound),
            rules: Arc::clone(&service.outbound_rules),
            tenant: service.tenant.id,
            places: Arc::clone(&service.tenant.places),
            metrics: Arc::clone(&service.tenant.metrics),
            clerk: self,
        };
        Box::pin(sender.send(request, patience, answer))
    }
}

impl Exchange {
    /// Whether its next slice loads the program first.
    pub(super) fn is_cold(&self) -> bool {
        let version = self.service.versions.get(self.version);
        version.is_some_and(|version| !version.program.is_warm())
    }
}

impl RunEvents for Exchange {
    fn started(&self, took: Duration) {
        self.service.metrics().instance_started(took);
        if let Some(instance) = &mut self.handover().instance {
            instance.set(InstanceState::Running);
        }
    }

    /// Later heads, and those after a verdict, are dropped.
    fn head(&self, head: Head) {
        self.hand_over(|handover| {
            if matches!(handover.head, HeadPlace::Awaited) {
                handover.head = HeadPlace::Here(head);
            }
        });
    }

    fn ended(&self, verdict: &Verdict) {
        if let Some(detail) = &verdict.detail {
            let text = format!("{}: {detail}", verdict.outcome);
            self.line(LogLine::new(LogSource::Host, text.as_bytes()));
        }
        self.settle(verdict.outcome);
    }

    fn ledger(&self) -> &Ledger {
        &self.ledger
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
        if let Some(version) = self.service.versions.get(self.version) {
            let answered_5xx = self.answered_5xx.load(Ordering::Relaxed);
            version
                .stats
                .ended(record.outcome, answered_5xx, record.duration);
        }
        self.service.record(&record);
    }
}
