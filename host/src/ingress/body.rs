//! Bodies in both directions, counted and bounded.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use insula_types::Outcome;

use super::guarded_io::RequestInProgress;
use super::headers::{INSULA_USAGE, set};
use crate::engine::run::{BodyError, ResponseBody};
use crate::pool::Pool;
use crate::pool::exchange::{Answer, Exchange};
use crate::pool::jobs::JobKey;

/// A client's body on its way to the guest: counted, and cut at the service's limit.
#[derive(Debug)]
pub(super) struct RequestBody {
    inner: Incoming,
    exchange: Arc<Exchange>,
    left: u64,
}

impl RequestBody {
    pub(super) fn new(inner: Incoming, exchange: Arc<Exchange>) -> Self {
        let left = exchange.service.limits.request_body.get();
        Self {
            inner,
            exchange,
            left,
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = match std::task::ready!(Pin::new(&mut self.inner).poll_frame(cx)) {
            None => return Poll::Ready(None),
            Some(Ok(frame)) => frame,
            Some(Err(_)) => return Poll::Ready(Some(Err(BodyError::ConnectionTerminated))),
        };
        let bytes = frame.data_ref().map_or(0, |data| data.len() as u64);
        self.exchange.bytes_in.fetch_add(bytes, Ordering::Relaxed);
        let Some(left) = self.left.checked_sub(bytes) else {
            // The client hears of it at once, whatever the guest makes of the error.
            self.exchange.settle(Outcome::BadRequest);
            let limit = self.exchange.service.limits.request_body.get();
            return Poll::Ready(Some(Err(BodyError::HttpRequestBodySize(Some(limit)))));
        };
        self.left = left;
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Cancels a request whose connection lets go of it before its answer is complete.
#[derive(Debug)]
pub(super) struct Hold {
    pool: Arc<Pool>,
    key: JobKey,
    exchange: Arc<Exchange>,
    complete: bool,
}

impl Hold {
    pub(super) const fn new(pool: Arc<Pool>, key: JobKey, exchange: Arc<Exchange>) -> Self {
        Self {
            pool,
            key,
            exchange,
            complete: false,
        }
    }

    pub(super) fn exchange(&self) -> &Exchange {
        &self.exchange
    }

    /// Seconds after which a client may try again that was refused.
    pub(super) fn retry_after(&self) -> Option<u64> {
        self.pool.retry_after(self.exchange.service.tenant.id)
    }

    pub(super) fn answered(&mut self, answer: Answer) {
        self.exchange.answered(answer);
        self.complete = true;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if !self.complete {
            self.exchange.answered(Answer::Abandoned);
            self.exchange.abandon();
            self.pool.kill(self.key, Outcome::Canceled);
        }
    }
}

/// The body of an answer.
#[derive(Debug)]
pub struct OutBody {
    kind: Kind,
    /// Tells the connection that it is not idle.
    _in_progress: Option<RequestInProgress>,
}

#[derive(Debug)]
enum Kind {
    /// All of it is here.
    Ready {
        bytes: Option<Bytes>,
        hold: Option<Hold>,
    },
    /// It comes from a guest that may still run.
    Stream(Box<Stream>),
}

#[derive(Debug)]
struct Stream {
    inner: ResponseBody,
    hold: Hold,
    /// Frames that were taken from `inner` before.
    first: std::collections::VecDeque<Frame<Bytes>>,
    /// Whether the answer ends with a usage trailer.
    usage: bool,
    /// Bytes still to come, where the head has said how many.
    left: Option<u64>,
    state: StreamState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StreamState {
    Data,
    /// The guest's body is over; the usage is not final yet.
    Usage,
    End,
}

impl OutBody {
    const fn new(kind: Kind) -> Self {
        Self {
            kind,
            _in_progress: None,
        }
    }

    /// The same body, which keeps its connection from being idle.
    pub(super) fn during(self, in_progress: RequestInProgress) -> Self {
        Self {
            _in_progress: Some(in_progress),
            ..self
        }
    }

    /// A body of the host's own.
    pub(super) const fn host(bytes: Bytes) -> Self {
        Self::new(Kind::Ready {
            bytes: Some(bytes),
            hold: None,
        })
    }

    /// A guest's body that is complete.
    pub(super) fn whole(bytes: Bytes, mut hold: Hold) -> Self {
        let exchange = hold.exchange();
        exchange
            .bytes_out
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if bytes.is_empty() {
            // Nobody will ask for it.
            hold.answered(Answer::Whole);
        }
        Self::new(Kind::Ready {
            bytes: (!bytes.is_empty()).then_some(bytes),
            hold: Some(hold),
        })
    }

    /// A guest's body that goes on: `first` was taken from it already.
    pub(super) fn stream(
        inner: ResponseBody,
        hold: Hold,
        first: impl IntoIterator<Item = Frame<Bytes>>,
        usage: bool,
        length: Option<u64>,
    ) -> Self {
        Self::new(Kind::Stream(Box::new(Stream {
            inner,
            hold,
            first: first.into_iter().collect(),
            usage,
            left: length,
            state: StreamState::Data,
        })))
    }
}

impl Body for OutBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.kind {
            Kind::Ready { bytes, hold } => {
                if let Some(hold) = hold {
                    hold.answered(Answer::Whole);
                }
                Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes))))
            }
            Kind::Stream(stream) => stream.poll(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.kind, Kind::Ready { bytes: None, .. })
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Ready { bytes, .. } => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Kind::Stream(_) => SizeHint::default(),
        }
    }
}

impl Stream {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.state == StreamState::Data {
            let next = match self.first.pop_front() {
                Some(frame) => Some(Ok(frame)),
                None => std::task::ready!(Pin::new(&mut self.inner).poll_frame(cx)),
            };
            match next {
                Some(Ok(frame)) => {
                    let bytes = frame.data_ref().map_or(0, |data| data.len() as u64);
                    if let Some(left) = &mut self.left {
                        let Some(rest) = left.checked_sub(bytes) else {
                            let error = self.broken(BodyError::HttpResponseBodySize(Some(bytes)));
                            return Poll::Ready(Some(Err(error)));
                        };
                        *left = rest;
                    }
                    let exchange = self.hold.exchange();
                    exchange.bytes_out.fetch_add(bytes, Ordering::Relaxed);
                    if self.left == Some(0) && !self.usage {
                        // All is here, and nobody will ask for its end.
                        self.hold.answered(Answer::Whole);
                    }
                    return Poll::Ready(Some(Ok(frame)));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(self.broken(error)))),
                None if self.cut_off() || self.left.is_some_and(|left| left > 0) => {
                    let error = self.broken(BodyError::HttpResponseIncomplete);
                    return Poll::Ready(Some(Err(error)));
                }
                None => self.state = StreamState::Usage,
            }
        }
        if self.state == StreamState::Usage {
            if self.usage {
                std::task::ready!(self.hold.exchange().poll_done(cx));
            }
            self.state = StreamState::End;
            self.hold.answered(Answer::Whole);
            if self.usage {
                let mut trailers = HeaderMap::with_capacity(1);
                set(&mut trailers, INSULA_USAGE, &self.hold.exchange().usage());
                return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
            }
        }
        Poll::Ready(None)
    }

    /// A guest that ends badly drops its body, which looks like its end from here. It is told
    /// apart by the verdict, which is always there before the body is dropped.
    fn cut_off(&self) -> bool {
        let verdict = self.hold.exchange().verdict();
        verdict.is_some_and(|outcome| outcome != Outcome::Ok)
    }

    fn broken(&mut self, error: BodyError) -> BodyError {
        self.state = StreamState::End;
        self.hold.answered(Answer::Broken);
        error
    }
}
