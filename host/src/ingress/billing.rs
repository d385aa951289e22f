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
//! Whose connections have had their part of a round [waits](crate::pool::connections) for a turn: the
//! worker then polls the connection itself, with its task's waker.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use insula_types::TenantId;

use crate::pool::Pool;
use crate::pool::connections::Ready;
use crate::pool::entries::{Payer, ServiceEntry};

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
}

impl Account {
    fn set(&self, service: &ServiceEntry) {
        let mut payer = self.payer.borrow_mut();
        if !payer.as_ref().is_some_and(|known| known.is(service)) {
            *payer = Some(service.payer());
        }
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

/// A task whose polls are charged, and come in turn.
pub(super) struct Billed<F> {
    work: Rc<Work<F>>,
    pool: Arc<Pool>,
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
        Self::new(pool, future, Account::default())
    }

    /// A stream of the connection whose task is polled now.
    pub(super) fn stream(pool: Arc<Pool>, future: F) -> Self {
        let account = Account {
            payer: RefCell::default(),
            connection: CURRENT.with_borrow(Clone::clone),
        };
        Self::new(pool, future, account)
    }

    fn new(pool: Arc<Pool>, future: F, account: Account) -> Self {
        let work = Work {
            account: Rc::new(account),
            future: RefCell::new(Some(future)),
            waits: RefCell::default(),
        };
        Self {
            work: Rc::new(work),
            pool,
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
        let Self { work, pool } = &*self;
        if let Some(waker) = &mut *work.waits.borrow_mut() {
            waker.clone_from(cx.waker());
            return Poll::Pending;
        }
        let owner = work.account.tenant();
        if !pool.begin_billed(owner) {
            *work.waits.borrow_mut() = Some(cx.waker().clone());
            pool.wait_for_turn(owner, Rc::clone(work) as Rc<dyn Ready>);
            return Poll::Pending;
        }
        let result = work.poll(cx.waker());
        // Without a payer it stays with what the worker does for the host.
        let payer = work.account.payer.borrow();
        pool.end_billed(payer.as_ref());
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
