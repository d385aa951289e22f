//! Control's end of the channel to the data plane.
//!
//! Commands carry rising numbers; the pump ([`super::pump`]) hands each answer to whoever waits
//! for it. A caller that gives up loses nothing: the answer is taken and dropped, and usage in it
//! was added to the ledger before.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::Instant;

use crate::messages::{Command, Refusal, ToData};

/// How long data may take to apply a change: it loads an artefact at most.
const APPLY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long data may take to answer with what it counted.
const COLLECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a command was not applied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// The channel is closed.
    #[error("the data plane is gone")]
    Gone,
    /// No answer in time.
    #[error("the data plane did not answer in time")]
    Timeout,
    /// It said no.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// An answer on its way to who waits for it.
#[derive(Debug)]
pub(crate) enum Answered {
    Done(Result<(), Refusal>),
    /// The data plane's families.
    Collected(String),
}

#[derive(Debug)]
pub(crate) struct DataLink {
    commands: mpsc::Sender<Command>,
    next_seq: Cell<u64>,
    waiting: RefCell<HashMap<u64, oneshot::Sender<Answered>>>,
    /// The last collection: when it was begun, and the families.
    last: Mutex<(Option<Instant>, String)>,
}

impl DataLink {
    pub(crate) fn new(commands: mpsc::Sender<Command>) -> Self {
        Self {
            commands,
            next_seq: Cell::new(1),
            waiting: RefCell::default(),
            last: Mutex::default(),
        }
    }

    /// Hands an answer over.
    pub(crate) fn answer(&self, seq: u64, answered: Answered) {
        if let Some(waiting) = self.waiting.borrow_mut().remove(&seq) {
            // Whoever waited may have given up.
            let _ = waiting.send(answered);
        }
    }

    /// The data plane is gone: nobody will be answered any more.
    pub(crate) fn close(&self) {
        self.waiting.borrow_mut().clear();
    }

    async fn ask(&self, body: ToData, timeout: Duration) -> Result<Answered, LinkError> {
        let seq = self.next_seq.get();
        self.next_seq.set(seq + 1);
        let (answer, answered) = oneshot::channel();
        self.waiting.borrow_mut().insert(seq, answer);
        let asking = async {
            let sent = self.commands.send(Command { seq, body }).await;
            sent.map_err(|_| LinkError::Gone)?;
            answered.await.map_err(|_| LinkError::Gone)
        };
        let result = tokio::time::timeout(timeout, asking).await;
        self.waiting.borrow_mut().remove(&seq);
        result.unwrap_or(Err(LinkError::Timeout))
    }

    /// Sends a change and waits until it is in effect, for as long as that may take.
    pub(crate) async fn apply_within(
        &self,
        body: ToData,
        timeout: Duration,
    ) -> Result<(), LinkError> {
        match self.ask(body, timeout).await? {
            Answered::Done(result) => Ok(result?),
            Answered::Collected(_) => Ok(()),
        }
    }

    /// Sends a change and waits until it is in effect.
    pub(crate) async fn apply(&self, body: ToData) -> Result<(), LinkError> {
        self.apply_within(body, APPLY_TIMEOUT).await
    }

    /// Lets running requests finish until the deadline.
    pub(crate) async fn drain(&self, deadline: Duration) -> Result<(), LinkError> {
        // Cancelling what is left at the deadline takes a moment too.
        self.apply_within(
            ToData::Drain { deadline },
            deadline + Duration::from_secs(5),
        )
        .await
    }

    /// What data counted up to now goes to the ledger; answers its families. Callers that come
    /// while one collection runs share the next.
    pub(crate) async fn collect(&self) -> Result<String, LinkError> {
        let asked = Instant::now();
        let mut last = self.last.lock().await;
        if last.0.is_some_and(|begun| begun > asked) {
            return Ok(last.1.clone());
        }
        let begun = Instant::now();
        match self.ask(ToData::Collect, COLLECT_TIMEOUT).await? {
            Answered::Collected(metrics) => {
                *last = (Some(begun), metrics);
                Ok(last.1.clone())
            }
            Answered::Done(result) => Err(result.err().map_or(LinkError::Gone, Into::into)),
        }
    }
}
