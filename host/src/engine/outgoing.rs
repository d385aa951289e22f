//! Requests that a guest sends.
//!
//! ```text
//!  guest ── wasi:http/outgoing-handler ──▶ hooks ──▶ an errand, made by the way out
//!    ▲                                                  │ polled in the guest's own job
//!    └──────────── head, then body ◀────────────────────┘
//! ```
//!
//! wasi-http would run the transfer as a task of the worker's runtime. Here it is part of the job
//! that the guest is: what a handshake costs is measured, charged and scheduled like the guest
//! itself, and ends with it. What wasi-http spawns only waits for the head.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::oneshot;
use wasmtime_wasi_http::{RequestOptions, WasiBody};

use super::config::caps;
use super::guest_log::LogSink;
use super::run::{BodyError, Offload};

/// A body on its way to or from a destination.
pub type OutgoingBody = WasiBody;
/// What comes of a request.
pub type Answered = Result<http::Response<OutgoingBody>, BodyError>;
/// The whole of a request: until the answer's body was read, or is wanted no more.
pub type Errand = Pin<Box<dyn Future<Output = ()> + Send>>;

/// How long a guest wants to wait, where it said so.
#[derive(Debug, Clone, Copy, Default)]
pub struct Patience {
    /// For a connection.
    pub connect: Option<Duration>,
    /// For the answer's head.
    pub first_byte: Option<Duration>,
    /// For the next piece of its body.
    pub between_bytes: Option<Duration>,
}

impl From<Option<RequestOptions>> for Patience {
    fn from(options: Option<RequestOptions>) -> Self {
        let options = options.unwrap_or_default();
        Self {
            connect: options.connect_timeout,
            first_byte: options.first_byte_timeout,
            between_bytes: options.between_bytes_timeout,
        }
    }
}

/// Decides where a guest's requests may go, and takes them there.
pub trait WayOut: Send + Sync {
    /// Makes the errand of one request. It does nothing until it is polled.
    fn errand(
        self: Arc<Self>,
        request: http::Request<OutgoingBody>,
        patience: Patience,
        answer: oneshot::Sender<Answered>,
    ) -> Errand;
}

/// The request that a guest answers: its log, its way out, and threads for what blocks.
pub trait Patron: LogSink + WayOut + Offload {}

impl<T: LogSink + WayOut + Offload> Patron for T {}

/// The errands of one request.
#[derive(Default)]
pub(super) struct Errands {
    new: Mutex<Vec<Errand>>,
    open: AtomicU32,
}

impl Errands {
    fn unbegun(&self) -> std::sync::MutexGuard<'_, Vec<Errand>> {
        self.new.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more, unless there are too many. It begins when the guest waits, or has had its turn.
    pub(super) fn begin(&self, make: impl FnOnce() -> Errand) -> Result<(), BodyError> {
        if self.open.load(Ordering::Relaxed) >= caps::OUTGOING {
            return Err(BodyError::ConnectionLimitReached);
        }
        self.open.fetch_add(1, Ordering::Relaxed);
        self.unbegun().push(make());
        Ok(())
    }
}

/// Runs a guest's call, and its errands beside it. They end with it. The call is large, and stays
/// where its caller has it.
pub(super) async fn beside<T>(errands: &Errands, mut call: Pin<&mut impl Future<Output = T>>) -> T {
    let mut running: Option<FuturesUnordered<Errand>> = None;
    poll_fn(|cx| {
        if let Poll::Ready(result) = call.as_mut().poll(cx) {
            return Poll::Ready(result);
        }
        let mut new = errands.unbegun();
        if !new.is_empty() {
            running.get_or_insert_default().extend(new.drain(..));
        }
        drop(new);
        if let Some(running) = &mut running {
            while let Poll::Ready(Some(())) = running.poll_next_unpin(cx) {
                errands.open.fetch_sub(1, Ordering::Relaxed);
            }
        }
        Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    #[tokio::test]
    async fn errands_run_beside_the_call_and_make_room_when_they_end() {
        let errands = Errands::default();
        let (done, wait) = oneshot::channel();
        let call = async {
            for _ in 1..caps::OUTGOING {
                errands.begin(|| Box::pin(std::future::pending())).unwrap();
            }
            let last = async move {
                let _ = done.send(7);
            };
            errands.begin(|| Box::pin(last)).unwrap();
            let more = errands.begin(|| Box::pin(async {}));
            assert!(matches!(more, Err(BodyError::ConnectionLimitReached)));
            let said = wait.await.unwrap();
            // The errand has said it, and is over by the next poll.
            tokio::task::yield_now().await;
            errands.begin(|| Box::pin(async {})).unwrap();
            said
        };
        assert_eq!(beside(&errands, pin!(call)).await, 7);
    }
}
