//! The executor for tests: parks the thread; sleepers wake it from threads of
//! their own.

use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use super::Stalled;

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a future to its end. It never finds out that nothing can wake it.
pub(crate) fn block_on<F: Future>(future: F) -> Result<F::Output, Stalled> {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut cx = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut cx) {
            return Ok(output);
        }
        thread::park();
    }
}

/// Ready after a while.
#[derive(Debug)]
pub(crate) struct Sleep {
    duration: Duration,
    state: Option<Arc<Mutex<State>>>,
}

#[derive(Debug)]
enum State {
    Waiting(Waker),
    Over,
}

impl Sleep {
    pub(crate) fn new(duration: Duration) -> Self {
        Self {
            duration,
            state: None,
        }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let waker = cx.waker().clone();
        if let Some(state) = &self.state {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            return match &mut *state {
                State::Over => Poll::Ready(()),
                State::Waiting(old) => {
                    *old = waker;
                    Poll::Pending
                }
            };
        }
        let duration = self.duration;
        let state = Arc::new(Mutex::new(State::Waiting(waker)));
        self.state = Some(state.clone());
        thread::spawn(move || {
            thread::sleep(duration);
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            if let State::Waiting(waker) = std::mem::replace(&mut *state, State::Over) {
                waker.wake();
            }
        });
        Poll::Pending
    }
}
