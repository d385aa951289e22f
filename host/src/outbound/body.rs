//! Bodies of requests that guests send, and of the answers: counted, limited, and given up where
//! nothing comes.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use insula_metrics::{Direction, TenantMetrics};
use tokio::time::{Instant, Sleep};

use crate::engine::outgoing::OutgoingBody;
use crate::engine::run::BodyError;

/// Largest body of one request or of one answer.
pub const BODY_MAX_BYTES: u64 = 256 << 20;

/// Counts what passes; says whether it may.
struct Meter {
    metrics: Arc<TenantMetrics>,
    direction: Direction,
    left: u64,
}

impl Meter {
    fn new(metrics: Arc<TenantMetrics>, direction: Direction) -> Self {
        Self {
            metrics,
            direction,
            left: BODY_MAX_BYTES,
        }
    }

    fn passes(&mut self, frame: &Frame<Bytes>) -> bool {
        let bytes = frame.data_ref().map_or(0, Bytes::len) as u64;
        self.metrics.add_outbound_bytes(self.direction, bytes);
        match self.left.checked_sub(bytes) {
            Some(left) => self.left = left,
            None => return false,
        }
        true
    }
}

/// The body of a request on its way out.
pub(super) struct Sent {
    body: OutgoingBody,
    meter: Meter,
}

impl Sent {
    pub(super) fn new(body: OutgoingBody, metrics: Arc<TenantMetrics>) -> Self {
        let meter = Meter::new(metrics, Direction::Out);
        Self { body, meter }
    }
}

impl Body for Sent {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && !self.meter.passes(frame)
        {
            let error = BodyError::HttpRequestBodySize(Some(BODY_MAX_BYTES));
            return Poll::Ready(Some(Err(error)));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The body of an answer.
pub(super) struct Received {
    body: Incoming,
    meter: Meter,
    patience: Duration,
    /// Set while nothing has come.
    waiting: Option<Pin<Box<Sleep>>>,
}

impl Received {
    pub(super) fn new(body: Incoming, metrics: Arc<TenantMetrics>, patience: Duration) -> Self {
        Self {
            body,
            meter: Meter::new(metrics, Direction::In),
            patience,
            waiting: None,
        }
    }
}

impl Body for Received {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let frame = match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Ready(frame) => frame,
            Poll::Pending => {
                let until = this.patience;
                let waiting = this.waiting.get_or_insert_with(|| {
                    Box::pin(tokio::time::sleep_until(Instant::now() + until))
                });
                ready!(waiting.as_mut().poll(cx));
                return Poll::Ready(Some(Err(BodyError::ConnectionReadTimeout)));
            }
        };
        this.waiting = None;
        Poll::Ready(match frame {
            Some(Ok(frame)) if this.meter.passes(&frame) => Some(Ok(frame)),
            Some(Ok(_)) => Some(Err(BodyError::HttpResponseBodySize(Some(BODY_MAX_BYTES)))),
            Some(Err(error)) if error.is_incomplete_message() => {
                Some(Err(BodyError::HttpResponseIncomplete))
            }
            Some(Err(_)) => Some(Err(BodyError::HttpProtocolError)),
            None => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
