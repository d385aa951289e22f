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

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::pool::Pool;
use crate::pool::entries::{Payer, ServiceEntry};

thread_local! {
    /// The account of the task that is polled now.
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

/// A task whose polls are charged.
pub(super) struct Billed<F> {
    future: F,
    account: Rc<Account>,
    pool: Arc<Pool>,
}

impl<F> Billed<F> {
    /// A connection.
    pub(super) fn connection(pool: Arc<Pool>, future: F) -> Self {
        Self {
            future,
            account: Rc::default(),
            pool,
        }
    }

    /// A stream of the connection whose task is polled now.
    pub(super) fn stream(pool: Arc<Pool>, future: F) -> Self {
        let connection = CURRENT.with_borrow(Clone::clone);
        let account = Rc::new(Account {
            payer: RefCell::default(),
            connection,
        });
        Self {
            future,
            account,
            pool,
        }
    }
}

impl<F: Future + Unpin> Future for Billed<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.pool.begin_billed();
        CURRENT.set(Some(Rc::clone(&self.account)));
        let result = Pin::new(&mut self.future).poll(cx);
        CURRENT.set(None);
        // Without a payer it stays with what the worker does for the host.
        if let Some(payer) = &*self.account.payer.borrow() {
            payer.charge(self.pool.end_billed());
        }
        result
    }
}
