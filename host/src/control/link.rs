//! Control's end of the channel to the data plane.
//!
//! Commands carry rising numbers; the pump ([`super::pump`]) hands each answer to whoever waits
//! for it. A caller that gives up loses nothing: the answer is taken and dropped, and usage in it
//! was added to the ledger before.
//!
//! On failure: while the host starts, nobody gives up as long as data is there. A machine that is
//! starved of CPU or was suspended is late, and a start that ends over it begins again and is later
//! still. Once the host has started, a change that data is late with is answered as stored and
//! unconfirmed. Where data or the pump is gone, all that wait hear of it at once.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::Instant;

use crate::messages::{Command, Refusal, ToData};

/// How long data may take to apply a change: it loads an artefact at most. While the host starts,
/// how often the log says that it takes long.
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

/// Whether there is somebody to whom a late answer can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Starting,
    Started,
    /// Nobody hands answers over any more.
    Gone,
}

#[derive(Debug)]
pub(crate) struct DataLink {
    commands: mpsc::Sender<Command>,
    stage: Cell<Stage>,
    next_seq: Cell<u64>,
    waiting: RefCell<HashMap<u64, oneshot::Sender<Answered>>>,
    /// The last collection: when it was begun, and the families.
    last: Mutex<(Option<Instant>, String)>,
}

impl DataLink {
    pub(crate) fn new(commands: mpsc::Sender<Command>) -> Self {
        Self {
            commands,
            stage: Cell::new(Stage::Starting),
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

    /// From now on a late answer is an error.
    pub(crate) fn started(&self) {
        if self.stage.get() == Stage::Starting {
            self.stage.set(Stage::Started);
        }
    }

    /// The data plane is gone: nobody will be answered any more.
    pub(crate) fn close(&self) {
        self.stage.set(Stage::Gone);
        self.waiting.borrow_mut().clear();
    }

    async fn ask(&self, body: ToData, timeout: Duration) -> Result<Answered, LinkError> {
        if self.stage.get() == Stage::Gone {
            return Err(LinkError::Gone);
        }
        let seq = self.next_seq.get();
        self.next_seq.set(seq + 1);
        let (answer, answered) = oneshot::channel();
        self.waiting.borrow_mut().insert(seq, answer);
        let asking = async {
            let sent = self.commands.send(Command { seq, body }).await;
            sent.map_err(|_| LinkError::Gone)?;
            answered.await.map_err(|_| LinkError::Gone)
        };
        let mut asking = std::pin::pin!(asking);
        let result = loop {
            match tokio::time::timeout(timeout, &mut asking).await {
                Ok(result) => break result,
                Err(_) if self.stage.get() == Stage::Starting => {
                    tracing::warn!(
                        after = ?timeout,
                        "the data plane is late; the host goes on starting as long as it is there"
                    );
                }
                Err(_) => break Err(LinkError::Timeout),
            }
        };
        self.waiting.borrow_mut().remove(&seq);
        result
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

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use insula_types::TenantId;

    use super::*;

    /// A data plane that takes each command and answers it after some time, or never.
    fn link(answers_after: Option<Duration>) -> Rc<DataLink> {
        let (commands, mut taken) = mpsc::channel(4);
        let link = Rc::new(DataLink::new(commands));
        let answering = Rc::clone(&link);
        tokio::task::spawn_local(async move {
            while let Some(command) = taken.recv().await {
                if let Some(after) = answers_after {
                    tokio::time::sleep(after).await;
                    answering.answer(command.seq, Answered::Done(Ok(())));
                }
            }
        });
        link
    }

    fn change() -> ToData {
        ToData::DropTenant(TenantId::new(1))
    }

    async fn in_virtual_time(test: impl Future<Output = ()>) {
        tokio::time::pause();
        tokio::task::LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn a_start_waits_for_a_data_plane_that_is_late() {
        in_virtual_time(async {
            let link = link(Some(APPLY_TIMEOUT * 20));
            link.apply(change()).await.expect("it is there");
            link.started();
            let late = link.apply(change()).await;
            assert!(matches!(late, Err(LinkError::Timeout)), "{late:?}");
        })
        .await;
    }

    #[tokio::test]
    async fn whoever_waits_hears_that_data_is_gone() {
        in_virtual_time(async {
            let link = link(None);
            let closing = Rc::clone(&link);
            tokio::task::spawn_local(async move {
                tokio::time::sleep(APPLY_TIMEOUT * 2).await;
                closing.close();
            });
            let began = Instant::now();
            let ended = link.apply(change()).await;
            assert!(matches!(ended, Err(LinkError::Gone)), "{ended:?}");
            assert!(began.elapsed() < APPLY_TIMEOUT * 3, "at once");
            // Commands are still taken; their answers would come to nobody.
            link.started();
            let ended = link.apply(change()).await;
            assert!(matches!(ended, Err(LinkError::Gone)), "{ended:?}");
        })
        .await;
    }
}
