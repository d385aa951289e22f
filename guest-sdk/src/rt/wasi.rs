//! The executor over `wasi:io/poll`.

use std::cell::RefCell;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use wasip2::clocks::monotonic_clock;
use wasip2::io::poll::{self, Pollable};

use super::Stalled;

thread_local! {
    /// The pollables that futures wait for. A [`Wait`] holds its place.
    static REACTOR: RefCell<Vec<Option<Entry>>> = const { RefCell::new(Vec::new()) };
}

struct Entry {
    pollable: Pollable,
    /// Whom to wake. `None` while nobody waits.
    waker: Option<Waker>,
    ready: bool,
}

/// A pollable that is registered. It must be dropped before the resource that
/// it came from: a pollable is the resource's child.
#[derive(Debug)]
pub(crate) struct Wait {
    place: usize,
}

impl Wait {
    pub(crate) fn new(pollable: Pollable) -> Self {
        let entry = Entry {
            pollable,
            waker: None,
            ready: false,
        };
        REACTOR.with_borrow_mut(|entries| {
            let place = entries
                .iter()
                .position(Option::is_none)
                .unwrap_or(entries.len());
            if place == entries.len() {
                entries.push(Some(entry));
            } else {
                entries[place] = Some(entry);
            }
            Self { place }
        })
    }

    /// Ready once the pollable was, since the last time this was ready.
    pub(crate) fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        REACTOR.with_borrow_mut(|entries| {
            let Some(Some(entry)) = entries.get_mut(self.place) else {
                return Poll::Ready(());
            };
            if std::mem::take(&mut entry.ready) {
                return Poll::Ready(());
            }
            entry.waker = Some(cx.waker().clone());
            Poll::Pending
        })
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        REACTOR.with_borrow_mut(|entries| {
            if let Some(entry) = entries.get_mut(self.place) {
                *entry = None;
            }
        });
    }
}

/// Whether the reactor may wait for an event or only look.
#[derive(PartialEq, Eq)]
enum Patience {
    Wait,
    Look,
}

/// Wakes whoever's pollable is ready.
fn turn(patience: Patience) -> Result<(), Stalled> {
    let woken = REACTOR.with_borrow_mut(|entries| {
        let mut waiting: Vec<&mut Entry> = entries
            .iter_mut()
            .flatten()
            .filter(|entry| entry.waker.is_some())
            .collect();
        let ready: Vec<usize> = if patience == Patience::Look {
            let ready =
                |(place, entry): (usize, &&mut Entry)| entry.pollable.ready().then_some(place);
            waiting.iter().enumerate().filter_map(ready).collect()
        } else if waiting.is_empty() {
            return Err(Stalled);
        } else {
            let pollables: Vec<&Pollable> = waiting.iter().map(|entry| &entry.pollable).collect();
            poll::poll(&pollables)
                .into_iter()
                .map(|place| place as usize)
                .collect()
        };
        let mut wakers = Vec::with_capacity(ready.len());
        for place in ready {
            if let Some(entry) = waiting.get_mut(place) {
                entry.ready = true;
                wakers.extend(entry.waker.take());
            }
        }
        Ok(wakers)
    })?;
    // Outside the borrow: a waker may drop a future, and with it a `Wait`.
    woken.into_iter().for_each(Waker::wake);
    Ok(())
}

/// Set when the main future is to be polled again.
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs a future to its end.
pub(crate) fn block_on<F: Future>(future: F) -> Result<F::Output, Stalled> {
    let mut future = pin!(future);
    let flag = Arc::new(Flag(AtomicBool::new(false)));
    let waker = Waker::from(flag.clone());
    let mut cx = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut cx) {
            return Ok(output);
        }
        if flag.0.swap(false, Ordering::Relaxed) {
            // A future that always wakes itself must not keep the others from
            // seeing their events.
            turn(Patience::Look)?;
            continue;
        }
        while !flag.0.swap(false, Ordering::Relaxed) {
            turn(Patience::Wait)?;
        }
    }
}

/// Ready after a while.
#[derive(Debug)]
pub(crate) struct Sleep(Wait);

impl Sleep {
    pub(crate) fn new(duration: Duration) -> Self {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self(Wait::new(monotonic_clock::subscribe_duration(nanoseconds)))
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.0.poll(cx)
    }
}
