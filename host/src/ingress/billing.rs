//! Who pays for the work on a connection: parsing, routing, copying, sending.
//!
//! Whose request it is shows only when its head has been parsed and routed; all of that happens in
//! one poll of the connection's task. So a poll is paid for by whom it was found to be for, or, where
//! nothing was routed in it, by whom the connection was for last. Before the first request the host
//! pays.
//!
//! ```text
//!   boundary ─▶ poll: read, parse, route ─▶ [`pays`](service) ─▶ … ─▶ boundary: charged
//! ```
//!
//! The streams of an HTTP/2 connection are tasks of their own, each with its own payer; what the
//! connection does for all of them is paid for by the one that was routed last.
//!
//! A stream whose client opens no window is not polled, and so is nothing of its answer. While its
//! guest runs, that has its deadline; afterwards the stream is let go when nothing of it was taken for
//! [`STALL_MAX`].
//!
//! Whose connections have had their part of a round [waits](crate::pool::connections) for a turn: the
//! worker then polls the connection itself, with its task's waker.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use insula_types::TenantId;
use tokio::time::{Instant, Sleep, sleep};

use crate::pool::Pool;
use crate::pool::connections::Ready;
use crate::pool::entries::{Payer, ServiceEntry};
use crate::pool::exchange::Exchange;
use crate::pool::resting;

/// How long a stream of HTTP/2 may take nothing of an answer that its guest has ended. It is looked
/// at as often, so it may be twice that.
const STALL_MAX: Duration = Duration::from_secs(15);

thread_local! {
    /// The account of the connection that is polled now.
    static CURRENT: RefCell<Option<Rc<Account>>> = const { RefCell::new(None) };
}

/// On whose account a task runs.
#[derive(Default)]
struct Account {
    payer: RefCell<Option<Payer>>,
    /// The connection of a stream.
    connection: Option<Rc<Account>>,
    /// The request of a stream, once it has one; a connection has many.
    exchange: Option<RefCell<Weak<Exchange>>>,
}

impl Account {
    fn set(&self, service: &ServiceEntry) {
        let mut payer = self.payer.borrow_mut();
        if !payer.as_ref().is_some_and(|known| known.is(service)) {
            *payer = Some(service.payer());
        }
    }

    /// Whether no guest works on the answer any more, if ever one did.
    fn is_answered(&self) -> bool {
        let exchange = self.exchange.as_ref();
        let exchange = exchange.and_then(|exchange| exchange.borrow().upgrade());
        exchange.is_none_or(|exchange| exchange.verdict().is_some())
    }

    fn tenant(&self) -> Option<TenantId> {
        self.payer.borrow().as_ref().map(Payer::tenant)
    }
}

/// What the calling task does is for this service, from the beginning of this poll on.
pub(super) fn pays(service: &ServiceEntry) {
    CURRENT.with_borrow(|current| {
        if let Some(account) = current {
            account.set(service);
            if let Some(connection) = &account.connection {
                connection.set(service);
            }
        }
    });
}

/// The calling task answers this request. To be remembered where it is a stream.
pub(super) fn answers(exchange: &Arc<Exchange>) {
    CURRENT.with_borrow(|current| {
        if let Some(place) = current
            .as_ref()
            .and_then(|account| account.exchange.as_ref())
        {
            *place.borrow_mut() = Arc::downgrade(exchange);
        }
    });
}

/// The calling task refuses what it was asked for, as more than its tenant may have.
pub(super) fn refuses() {
    if let Some(tenant) = current_tenant() {
        resting::refused(tenant);
    }
}

/// Whether something of the tenant that the calling task works for was refused lately.
pub(super) fn is_refused() -> bool {
    current_tenant().is_some_and(resting::is_refused)
}

fn current_tenant() -> Option<TenantId> {
    CURRENT.with_borrow(|current| current.as_ref().and_then(|account| account.tenant()))
}

/// A task whose polls are charged, and come in turn.
pub(super) struct Billed<F> {
    work: Rc<Work<F>>,
    pool: Arc<Pool>,
    stall: Option<Stall>,
}

/// Of a stream: when it was polled last, and when that is looked at.
struct Stall {
    polled: Instant,
    polls: u32,
    look: Option<Pin<Box<Sleep>>>,
}

impl Stall {
    fn new() -> Self {
        Self {
            polled: Instant::now(),
            polls: 0,
            look: None,
        }
    }

    /// Whether nothing has happened for too long. To be asked at every poll of the stream.
    fn is_over(&mut self, cx: &mut Context<'_>, answered: impl FnOnce() -> bool) -> bool {
        let Some(look) = &mut self.look else {
            self.polled = Instant::now();
            return false;
        };
        if look.as_mut().poll(cx).is_pending() {
            self.polled = Instant::now();
            return false;
        }
        // Woken by the time and by nothing else, as far as anybody knows.
        if self.polled.elapsed() >= STALL_MAX && answered() {
            return true;
        }
        self.look = None;
        self.arm(cx);
        false
    }

    /// The stream waits. Most do so once, for their guest, and need no timer.
    fn waits(&mut self, cx: &mut Context<'_>, answered: impl FnOnce() -> bool) {
        self.polls = self.polls.saturating_add(1);
        if self.look.is_none() && (self.polls > 1 || answered()) {
            self.arm(cx);
        }
    }

    fn arm(&mut self, cx: &mut Context<'_>) {
        let look = self.look.insert(Box::pin(sleep(STALL_MAX)));
        // It is some time away; this is how it knows whom to wake.
        let _ = look.as_mut().poll(cx);
    }
}

struct Work<F> {
    account: Rc<Account>,
    /// `None` when it is over.
    future: RefCell<Option<F>>,
    /// Its task's, while it waits for its turn.
    waits: RefCell<Option<Waker>>,
}

impl<F> Billed<F> {
    /// A connection.
    pub(super) fn connection(pool: Arc<Pool>, future: F) -> Self {
        Self::new(pool, future, Account::default(), None)
    }

    /// A stream of the connection whose task is polled now.
    pub(super) fn stream(pool: Arc<Pool>, future: F) -> Self {
        let account = Account {
            payer: RefCell::default(),
            connection: CURRENT.with_borrow(Clone::clone),
            exchange: Some(RefCell::default()),
        };
        Self::new(pool, future, account, Some(Stall::new()))
    }

    fn new(pool: Arc<Pool>, future: F, account: Account, stall: Option<Stall>) -> Self {
        let work = Work {
            account: Rc::new(account),
            future: RefCell::new(Some(future)),
            waits: RefCell::default(),
        };
        Self {
            work: Rc::new(work),
            pool,
            stall,
        }
    }
}

impl<F: Future + Unpin> Work<F> {
    fn poll(&self, waker: &Waker) -> Poll<()> {
        let mut future = self.future.borrow_mut();
        let Some(polled) = &mut *future else {
            return Poll::Ready(());
        };
        CURRENT.set(Some(Rc::clone(&self.account)));
        let result = Pin::new(polled).poll(&mut Context::from_waker(waker));
        CURRENT.set(None);
        if result.is_ready() {
            *future = None;
        }
        result.map(drop)
    }
}

impl<F: Future + Unpin + 'static> Future for Billed<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { work, pool, stall } = self.get_mut();
        let answered = || work.account.is_answered();
        if let Some(stall) = stall {
            let its_own_fault = || work.waits.borrow().is_none() && answered();
            if stall.is_over(cx, its_own_fault) {
                drop(work.future.take());
                return Poll::Ready(());
            }
        }
        if let Some(waker) = &mut *work.waits.borrow_mut() {
            waker.clone_from(cx.waker());
            return Poll::Pending;
        }
        let owner = work.account.tenant();
        if !pool.begin_billed(owner) {
            *work.waits.borrow_mut() = Some(cx.waker().clone());
            if let Some(stall) = stall {
                stall.waits(cx, answered);
            }
            pool.wait_for_turn(owner, Rc::clone(work) as Rc<dyn Ready>);
            return Poll::Pending;
        }
        let result = work.poll(cx.waker());
        // Without a payer it stays with what the worker does for the host.
        pool.end_billed(work.account.payer.borrow().as_ref());
        if let (Some(stall), Poll::Pending) = (stall, &result) {
            stall.waits(cx, answered);
        }
        result
    }
}

impl<F: Future + Unpin> Ready for Work<F> {
    fn run(&self) {
        let Some(waker) = self.waits.take() else {
            return;
        };
        match catch_unwind(AssertUnwindSafe(|| self.poll(&waker))) {
            Ok(Poll::Pending) => {}
            Ok(Poll::Ready(())) => waker.wake(),
            Err(_) => {
                CURRENT.set(None);
                tracing::error!("the host panicked below a connection");
                // What is left of it may panic again.
                let broken = self.future.take();
                let _ = catch_unwind(AssertUnwindSafe(|| drop(broken)));
                waker.wake();
            }
        }
    }

    fn with_payer(&self, show: &mut dyn FnMut(Option<&Payer>)) {
        show(self.account.payer.borrow().as_ref());
    }
}

/// The task is gone: so is what waits for its turn.
impl<F> Drop for Billed<F> {
    fn drop(&mut self) {
        drop(self.work.future.take());
    }
}
