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

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::messages::{AtRest, Collect, Command, Refusal, ToData};
use crate::pool::clock::{children_cpu_ns, process_cpu_ns};

/// How long data may take to apply a change: it loads an artefact at most.
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

    async fn ask(&self, body: ToData, timeout: Duration) -> Result<Answered, LinkError> {
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
        let result = tokio::time::timeout(timeout, asking).await;
        self.waiting.borrow_mut().remove(&seq);
        result.unwrap_or(Err(LinkError::Timeout))
    }

    async fn apply_within(&self, body: ToData, timeout: Duration) -> Result<(), LinkError> {
        match self.ask(body, timeout).await? {
            Answered::Done(result) => Ok(result?),
            Answered::Collected(_) => Ok(()),
        }
    }

    /// Tells a data plane that knows nothing what it has to know; for nobody else.
    pub(crate) async fn tell(&self, life: Life, body: ToData) -> Result<(), LinkError> {
        if !self.is(life) {
            return Err(LinkError::Gone);
        }
        self.apply_within(body, APPLY_TIMEOUT).await
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
        let control_cpu_ns =
            (process_cpu_ns() + children_cpu_ns()).saturating_sub(self.buried_ns.get());
        let body = ToData::Collect {
            what,
            control_cpu_ns,
        };
        match self.ask(body, COLLECT_TIMEOUT).await? {
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
