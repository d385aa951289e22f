//! Control's end of the channel to the data plane.
//!
//! ```text
//!            Up                  `opened`
//!  Down ───────────▶ Telling ───────────────▶ Open
//!   ▲  ▲    a new life   │  all intent is told  │
//!   │  └─────────────────┘                      │
//!   └───────────────── died ────────────────────┘
//! ```
//!
//! Commands carry rising numbers; the pump ([`super::pump`]) hands each answer to whoever waits
//! for it. A caller that gives up loses nothing: the answer is taken and dropped, and usage in it
//! was added to the ledger before.
//!
//! A change ([`DataLink::apply`]) waits until all that was stored before has been told
//! ([`super::reconcile`], which uses [`DataLink::tell`]). When data dies before it has answered, the
//! change is sent again to the next one; it may have been told by then, which does no harm.
//!
//! On failure: while a data plane is told the intent, nobody gives up as long as it is there. A machine
//! that is starved of CPU or was suspended is late, and a start that ends over it begins again and is
//! later still. A change that data is late with is answered as stored and unconfirmed. Where data or
//! the pump is gone, all that wait for an answer hear of it at once.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::messages::{AtRest, Collect, Command, Refusal, ToData};
use crate::pool::clock::own_cpu_ns;

/// How long data may take to apply a change: it loads an artefact at most. While it is told the
/// intent, how often the log says that it takes long.
const APPLY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long data may take to answer with what it counted.
const COLLECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a command was not applied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// The data plane has died, or this life of it has.
    #[error("the data plane is gone")]
    Gone,
    /// No answer in time.
    #[error("the data plane did not answer in time")]
    Timeout,
    /// No descriptor for an artefact.
    #[error("an artefact cannot be handed over: {0}")]
    File(std::io::Error),
    /// It said no.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// An answer on its way to who waits for it.
#[derive(Debug)]
pub(crate) enum Answered {
    Done(Result<(), Refusal>),
    /// The data plane's families, where they were asked for.
    Collected(Option<String>),
}

/// Which data plane: they are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Life(u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Down,
    Telling,
    Open,
}

/// What becomes of a question whose answer is late.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Late {
    /// It is given up.
    GiveUp,
    /// The log says so, and the wait goes on: until data is gone, at the longest.
    Wait,
}

#[derive(Debug)]
pub(crate) struct DataLink {
    commands: RefCell<Option<mpsc::Sender<Command>>>,
    life: Cell<u64>,
    standing: watch::Sender<Standing>,
    next_seq: Cell<u64>,
    waiting: RefCell<HashMap<u64, oneshot::Sender<Answered>>>,
    /// The last collection: when it was begun, and the families.
    last: Mutex<(Option<Instant>, String)>,
    /// CPU time of data processes that have died: their books went with them.
    buried_ns: Cell<u64>,
}

impl DataLink {
    pub(crate) fn new() -> Self {
        Self {
            commands: RefCell::default(),
            life: Cell::new(0),
            standing: watch::Sender::new(Standing::Down),
            next_seq: Cell::new(1),
            waiting: RefCell::default(),
            last: Mutex::default(),
            buried_ns: Cell::new(0),
        }
    }

    /// There is a data plane, and it knows nothing.
    pub(crate) fn up(&self, commands: mpsc::Sender<Command>) {
        self.life.set(self.life.get() + 1);
        *self.commands.borrow_mut() = Some(commands);
        self.standing.send_replace(Standing::Telling);
    }

    /// The data plane is gone: who waits for its answers need not.
    pub(crate) fn down(&self, cpu_ns: u64) {
        self.buried_ns.set(self.buried_ns.get() + cpu_ns);
        self.commands.borrow_mut().take();
        self.standing.send_replace(Standing::Down);
        self.waiting.borrow_mut().clear();
    }

    /// How many data planes there were before this one.
    pub(crate) fn restarts(&self) -> u64 {
        self.life.get().saturating_sub(1)
    }

    /// Waits for a data plane.
    pub(crate) async fn alive(&self) -> Life {
        let mut standing = self.standing.subscribe();
        // The sender is ours, and so are we here.
        let _ = standing.wait_for(|now| *now != Standing::Down).await;
        Life(self.life.get())
    }

    /// All of the intent has been told to this one.
    pub(crate) fn opened(&self, life: Life) {
        if self.is(life) {
            self.standing.send_replace(Standing::Open);
        }
    }

    /// Whether this one still lives.
    pub(crate) fn is(&self, life: Life) -> bool {
        life.0 == self.life.get() && *self.standing.borrow() != Standing::Down
    }

    /// Hands an answer over.
    pub(crate) fn answer(&self, seq: u64, answered: Answered) {
        if let Some(waiting) = self.waiting.borrow_mut().remove(&seq) {
            // Whoever waited may have given up.
            let _ = waiting.send(answered);
        }
    }

    async fn ask(
        &self,
        body: ToData,
        timeout: Duration,
        late: Late,
    ) -> Result<Answered, LinkError> {
        let commands = self.commands.borrow().clone().ok_or(LinkError::Gone)?;
        let seq = self.next_seq.get();
        self.next_seq.set(seq + 1);
        let (answer, answered) = oneshot::channel();
        self.waiting.borrow_mut().insert(seq, answer);
        let asking = async {
            let sent = commands.send(Command { seq, body }).await;
            sent.map_err(|_| LinkError::Gone)?;
            answered.await.map_err(|_| LinkError::Gone)
        };
        let mut asking = std::pin::pin!(asking);
        let result = loop {
            match tokio::time::timeout(timeout, &mut asking).await {
                Ok(result) => break result,
                Err(_) if late == Late::Wait => {
                    tracing::warn!(
                        after = ?timeout,
                        "the data plane is late; it is waited for as long as it is there"
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
        match self.ask(body, timeout, Late::GiveUp).await? {
            Answered::Done(result) => Ok(result?),
            Answered::Collected(_) => Ok(()),
        }
    }

    /// Tells a data plane that knows nothing what it has to know; for nobody else.
    pub(crate) async fn tell(&self, life: Life, body: ToData) -> Result<(), LinkError> {
        if !self.is(life) {
            return Err(LinkError::Gone);
        }
        match self.ask(body, APPLY_TIMEOUT, Late::Wait).await? {
            Answered::Done(result) => Ok(result?),
            Answered::Collected(_) => Ok(()),
        }
    }

    /// Sends a change and waits until it is in effect.
    pub(crate) async fn apply(&self, body: ToData) -> Result<(), LinkError> {
        let shared = |file| Ok::<_, LinkError>(Arc::new(file));
        let body: ToData<Arc<File>> = body.map_files(&mut { shared })?;
        let until = Instant::now() + APPLY_TIMEOUT;
        let applying = async {
            loop {
                let mut standing = self.standing.subscribe();
                let _ = standing.wait_for(|now| *now == Standing::Open).await;
                let copy = |file: Arc<File>| file.try_clone().map_err(LinkError::File);
                let body = body.clone().map_files(&mut { copy })?;
                match self.apply_within(body, APPLY_TIMEOUT).await {
                    // The pump hears of it, too, and soon there is another.
                    Err(LinkError::Gone) => tokio::task::yield_now().await,
                    applied => return applied,
                }
            }
        };
        tokio::time::timeout_at(until, applying)
            .await
            .unwrap_or(Err(LinkError::Timeout))
    }

    /// Waits until data knows all that is stored, for what cannot be sent again.
    pub(crate) async fn settled(&self) -> Result<(), LinkError> {
        let mut standing = self.standing.subscribe();
        let open = standing.wait_for(|now| *now == Standing::Open);
        let waited = tokio::time::timeout(APPLY_TIMEOUT, open).await;
        waited.map(drop).map_err(|_| LinkError::Timeout)
    }

    /// Lets running requests finish until the deadline.
    pub(crate) async fn drain(&self, deadline: Duration, at_rest: AtRest) -> Result<(), LinkError> {
        // Cancelling what is left at the deadline takes a moment too.
        self.apply_within(
            ToData::Drain { deadline, at_rest },
            deadline + Duration::from_secs(5),
        )
        .await
    }

    async fn collected(&self, what: Collect) -> Result<Option<String>, LinkError> {
        let control_cpu_ns = own_cpu_ns().saturating_sub(self.buried_ns.get());
        let body = ToData::Collect {
            what,
            control_cpu_ns,
        };
        match self.ask(body, COLLECT_TIMEOUT, Late::GiveUp).await? {
            Answered::Collected(families) => Ok(families),
            Answered::Done(result) => Err(result.err().map_or(LinkError::Gone, Into::into)),
        }
    }

    /// What data counted up to now goes to the ledger.
    pub(crate) async fn collect(&self) -> Result<(), LinkError> {
        self.collected(Collect::Usage).await.map(drop)
    }

    /// The same, and answers data's families. Callers that come while one collection runs share
    /// the next.
    pub(crate) async fn families(&self) -> Result<String, LinkError> {
        let asked = Instant::now();
        let mut last = self.last.lock().await;
        if last.0.is_some_and(|begun| begun > asked) {
            return Ok(last.1.clone());
        }
        let begun = Instant::now();
        let families = self.collected(Collect::Families).await?;
        *last = (Some(begun), families.unwrap_or_default());
        Ok(last.1.clone())
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
        let link = Rc::new(DataLink::new());
        link.up(commands);
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
    async fn telling_waits_for_a_data_plane_that_is_late() {
        in_virtual_time(async {
            let link = link(Some(APPLY_TIMEOUT * 20));
            let life = link.alive().await;
            link.tell(life, change()).await.expect("it is there");
            link.opened(life);
            let late = link.apply(change()).await;
            assert!(matches!(late, Err(LinkError::Timeout)), "{late:?}");
        })
        .await;
    }

    #[tokio::test]
    async fn whoever_tells_hears_that_data_is_gone() {
        in_virtual_time(async {
            let link = link(None);
            let life = link.alive().await;
            let ending = Rc::clone(&link);
            tokio::task::spawn_local(async move {
                tokio::time::sleep(APPLY_TIMEOUT * 2).await;
                ending.down(0);
            });
            let began = Instant::now();
            let ended = link.tell(life, change()).await;
            assert!(matches!(ended, Err(LinkError::Gone)), "{ended:?}");
            assert!(began.elapsed() < APPLY_TIMEOUT * 3, "at once");
            let ended = link.tell(life, change()).await;
            assert!(matches!(ended, Err(LinkError::Gone)), "{ended:?}");
        })
        .await;
    }

    #[tokio::test]
    async fn a_change_waits_for_the_next_data_plane() {
        in_virtual_time(async {
            let link = link(None);
            link.opened(link.alive().await);
            let next = Rc::clone(&link);
            tokio::task::spawn_local(async move {
                tokio::time::sleep(APPLY_TIMEOUT / 4).await;
                next.down(0);
                tokio::time::sleep(APPLY_TIMEOUT / 4).await;
                let (commands, mut taken) = mpsc::channel(4);
                next.up(commands);
                next.opened(next.alive().await);
                let command = taken.recv().await.expect("sent again");
                next.answer(command.seq, Answered::Done(Ok(())));
            });
            link.apply(change()).await.expect("told to the second");
        })
        .await;
    }
}
