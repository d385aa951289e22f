//! A client's connection as hyper may see it: framed one way only, and never waited for too long.
//!
//! ```text
//!  socket ──bytes──► GuardedIo ──► TokioIo ──► hyper ──► service
//!                     │  HeadGuard: what is the client in the middle of? is it well framed?
//!                     │  one Sleep: for how long has it said or taken nothing?
//!                     └─ ConnectionHandle: byte counts, requests in progress, why it ended
//! ```
//!
//! Hand [`TokioIo`](hyper_util::rt::TokioIo)`::new(GuardedIo)` to hyper, without hyper's own
//! `header_read_timeout` and without `pipeline_flush` (see below), and keep a
//! [`RequestInProgress`] for as long as a response is being made and sent.
//!
//! | while the client … | it may take | then |
//! |---|---|---|
//! | sends nothing between requests | [`Timeouts::idle`] | end of file: hyper closes, silently |
//! | sends a head | [`Timeouts::head`] for all of it | 408, close |
//! | sends a body that is being read | [`Timeouts::body`] from byte to byte | the body fails |
//! | does not take what is written | [`Timeouts::write`] from byte to byte | the connection fails |
//! | speaks HTTP/2 | frames that carry nothing, within a budget (`frame_guard`) | the connection fails |
//!
//! A body is being read while hyper asks for more of it, which it does one frame ahead of the
//! service; behind that frame a service may take its time.
//!
//! A violation of framing in a head is answered with [`violation_response`]; in a body it fails the
//! body, and the service answers what it likes.
//!
//! # Why an answer of ours cannot come in the middle of one of hyper's
//!
//! Our answer is written from within `poll_read`. hyper polls for bytes with part of a head in its
//! buffer only when it wants the rest of that head, and it wants that only once it has encoded the
//! whole of the response before and tried to write it all. So of a head that is refused at least one
//! byte is handed on before ([`Refused::deliverable`](crate::ingress::head_guard::Refused)), and an answer
//! waits while the last write has been refused by the socket. (`pipeline_flush` would break the
//! second half of this.)
//!
//! After our answer the sending side is closed, and what the client still sends is read and dropped
//! for a moment: closing a socket with unread bytes in it resets the connection, and the client
//! might never see the answer.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::ingress::frame_guard::Budget;
use crate::ingress::head_guard::{HeadGuard, Phase, Violation};

/// Most bytes that are read and dropped after an answer of ours.
const LINGER_BYTES_MAX: usize = 256 << 10;

/// Pieces that are no longer than this together are copied and go out as one: the kernel takes longer
/// for several, by about a hundredth of a small request.
const JOINED_BYTES_MAX: usize = 1 << 10;

/// For how long a client may keep us waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Between requests, and before the first.
    pub idle: Duration,
    /// For a whole head, from its first byte.
    pub head: Duration,
    /// For the next bytes of a body, while somebody reads it.
    pub body: Duration,
    /// For taking some of what is written.
    pub write: Duration,
    /// For taking an answer of ours and closing.
    pub linger: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(60),
            head: Duration::from_secs(10),
            body: Duration::from_secs(15),
            write: Duration::from_secs(30),
            linger: Duration::from_secs(1),
        }
    }
}

/// Why the guard ended a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// The client's bytes are not framed as they must be.
    #[error("refused: {0}")]
    Violation(#[from] Violation),
    /// Nothing came between requests.
    #[error("no request came in time")]
    Idle,
    /// A head was not complete in time.
    #[error("the request head did not come in time")]
    Head,
    /// A body stalled.
    #[error("the request body stalled")]
    Body,
    /// The client took nothing of what was written.
    #[error("the client does not take the response")]
    Write,
    /// More frames of HTTP/2 than what they carry is reason for.
    #[error("too many frames that carry nothing")]
    Flood,
}

impl From<Ended> for io::Error {
    fn from(ended: Ended) -> Self {
        let kind = match ended {
            Ended::Violation(_) | Ended::Flood => io::ErrorKind::InvalidData,
            Ended::Idle | Ended::Head | Ended::Body | Ended::Write => io::ErrorKind::TimedOut,
        };
        Self::new(kind, ended)
    }
}

/// What both the connection and those who serve it look at.
#[derive(Debug, Clone)]
pub struct ConnectionHandle {
    shared: Rc<Shared>,
}

#[derive(Debug)]
struct Shared {
    bytes_in: Cell<u64>,
    bytes_out: Cell<u64>,
    requests: Cell<u64>,
    in_progress: Cell<u32>,
    ended: Cell<Option<Ended>>,
}

impl ConnectionHandle {
    /// Bytes received so far, of heads, bodies and everything else.
    #[must_use]
    pub fn bytes_in(&self) -> u64 {
        self.shared.bytes_in.get()
    }

    /// Bytes that the socket took so far.
    #[must_use]
    pub fn bytes_out(&self) -> u64 {
        self.shared.bytes_out.get()
    }

    /// HTTP/1 heads accepted so far.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.shared.requests.get()
    }

    /// Why the guard ended the connection, if it did.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        self.shared.ended.get()
    }

    /// The requests so far, when none is being answered.
    #[must_use]
    pub fn at_rest(&self) -> Option<u64> {
        (self.shared.in_progress.get() == 0).then(|| self.shared.requests.get())
    }

    /// Says that a request is being served: until the guard is dropped the connection is not idle.
    #[must_use]
    pub fn begin_request(&self) -> RequestInProgress {
        self.shared.in_progress.update(|count| count + 1);
        RequestInProgress {
            shared: Rc::clone(&self.shared),
        }
    }
}

/// Keeps a connection from being idle; belongs into the response's body.
#[derive(Debug)]
pub struct RequestInProgress {
    shared: Rc<Shared>,
}

impl Drop for RequestInProgress {
    fn drop(&mut self) {
        self.shared.in_progress.update(|count| count - 1);
    }
}

/// A guarded connection; see the module.
#[derive(Debug)]
pub struct GuardedIo<S> {
    io: S,
    guard: HeadGuard,
    /// Of frames of HTTP/2; what had gone out when it was looked at last; when it began.
    budget: Budget,
    budget_bytes_out: u64,
    since: Instant,
    shared: Rc<Shared>,
    timeouts: Timeouts,
    life: Life,
    /// The connection's only timer. It is moved only to an earlier time, or when it has fired.
    sleep: Option<Pin<Box<Sleep>>>,
    /// When a reader first found nothing since the last bytes came; outside a body, when the client
    /// last took something if that was later.
    read_waits_since: Option<Instant>,
    /// When a reader first found nothing of the rest of the present head.
    head_waits_since: Option<Instant>,
    /// When a writer was first refused since some of it was last taken.
    write_waits_since: Option<Instant>,
}

#[derive(Debug)]
enum Life {
    Serving,
    /// hyper has been given all it may have of a refused head, and gets to know it when it asks.
    Refused {
        answer: Bytes,
        ended: Ended,
    },
    /// Our answer is going out, or has gone out and the client has not closed yet.
    Answering {
        answer: Bytes,
        ended: Ended,
        closed: bool,
        dropped_bytes: usize,
        until: Instant,
    },
    /// Nobody between requests: end of file.
    Silent,
    Failed(Ended),
}

impl<S> GuardedIo<S> {
    /// Guards a connection from its first byte.
    pub fn new(io: S, timeouts: Timeouts) -> (Self, ConnectionHandle) {
        let shared = Rc::new(Shared {
            bytes_in: Cell::new(0),
            bytes_out: Cell::new(0),
            requests: Cell::new(0),
            in_progress: Cell::new(0),
            ended: Cell::new(None),
        });
        let guarded = Self {
            io,
            guard: HeadGuard::new(),
            budget: Budget::new(),
            budget_bytes_out: 0,
            since: Instant::now(),
            shared: Rc::clone(&shared),
            timeouts,
            life: Life::Serving,
            sleep: None,
            read_waits_since: None,
            head_waits_since: None,
            write_waits_since: None,
        };
        (guarded, ConnectionHandle { shared })
    }

    /// Whether `deadline` has passed; if not, the task is woken when it does.
    fn poll_deadline(&mut self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        let sleep = self
            .sleep
            .get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if sleep.deadline() > deadline {
            sleep.as_mut().reset(deadline);
        }
        loop {
            ready!(sleep.as_mut().poll(cx));
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            // It had been set for something that has happened in time.
            sleep.as_mut().reset(deadline);
        }
    }

    /// The socket has nothing to read.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let phase = self.guard.phase();
        if phase == Phase::Head {
            let since = *self.head_waits_since.get_or_insert_with(Instant::now);
            ready!(self.poll_deadline(cx, since + self.timeouts.head));
            self.refuse(Ended::Head);
            return Poll::Ready(());
        }
        let busy = self.shared.in_progress.get() > 0 || self.write_waits_since.is_some();
        if busy && phase != Phase::Body {
            // The end of the request need not wake us, so some deadline stays set; when it has
            // passed, the true one is looked at. Which it is does not matter, and the one that is
            // set already costs nothing.
            let probe = match &self.sleep {
                Some(sleep) if !sleep.is_elapsed() => sleep.deadline(),
                _ => Instant::now() + self.timeouts.idle,
            };
            return self.poll_deadline(cx, probe);
        }
        let since = *self.read_waits_since.get_or_insert_with(Instant::now);
        if phase == Phase::Body {
            ready!(self.poll_deadline(cx, since + self.timeouts.body));
            self.end(Ended::Body);
            self.life = Life::Failed(Ended::Body);
            return Poll::Ready(());
        }
        ready!(self.poll_deadline(cx, since + self.timeouts.idle));
        self.end(Ended::Idle);
        self.life = Life::Silent;
        Poll::Ready(())
    }

    /// Ends the connection with an answer of ours.
    fn refuse(&mut self, ended: Ended) {
        self.end(ended);
        let answer = match ended {
            Ended::Violation(violation) => violation_response(&violation),
            _ => problem(StatusCode::REQUEST_TIMEOUT, &ended.to_string()),
        };
        self.life = Life::Refused { answer, ended };
    }

    fn end(&self, ended: Ended) {
        self.shared.ended.set(Some(ended));
    }

    fn frames_are_covered(&mut self) -> bool {
        let out = self.shared.bytes_out.get();
        let sent = out - self.budget_bytes_out;
        self.budget_bytes_out = out;
        let age = self.since.elapsed();
        self.budget.covers(self.guard.frames(), sent, age)
    }

    fn received(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len();
        self.shared.bytes_in.update(|sum| sum + count as u64);
        self.read_waits_since = None;
        let result = self.guard.feed(bytes);
        if self.guard.phase() != Phase::Head || self.shared.requests.get() != self.guard.requests()
        {
            self.head_waits_since = None;
            self.shared.requests.set(self.guard.requests());
        }
        match result {
            Ok(()) if self.guard.phase() == Phase::PassThrough && !self.frames_are_covered() => {
                self.end(Ended::Flood);
                self.life = Life::Failed(Ended::Flood);
                0
            }
            Ok(()) => count,
            Err(refused) => {
                let ended = Ended::Violation(refused.violation);
                if self.guard.phase() == Phase::Body {
                    self.end(ended);
                    self.life = Life::Failed(ended);
                } else {
                    self.refuse(ended);
                }
                refused.deliverable
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> GuardedIo<S> {
    /// Sends our answer and waits a moment for the client to close.
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Life::Answering {
            answer,
            closed,
            dropped_bytes,
            until,
            ..
        } = &mut self.life
        else {
            return Poll::Ready(());
        };
        let until = *until;
        let sent = loop {
            if answer.has_remaining() {
                match Pin::new(&mut self.io).poll_write(cx, answer) {
                    Poll::Ready(Ok(count @ 1..)) => {
                        answer.advance(count);
                        self.shared.bytes_out.update(|sum| sum + count as u64);
                    }
                    Poll::Ready(_) => break Poll::Ready(()),
                    Poll::Pending => break Poll::Pending,
                }
            } else if !*closed {
                match Pin::new(&mut self.io).poll_shutdown(cx) {
                    Poll::Ready(Ok(())) => *closed = true,
                    Poll::Ready(Err(_)) => break Poll::Ready(()),
                    Poll::Pending => break Poll::Pending,
                }
            } else {
                let mut waste = [0; 4 << 10];
                let mut waste = ReadBuf::new(&mut waste);
                match Pin::new(&mut self.io).poll_read(cx, &mut waste) {
                    Poll::Ready(Ok(())) if !waste.filled().is_empty() => {
                        let count = waste.filled().len();
                        self.shared.bytes_in.update(|sum| sum + count as u64);
                        *dropped_bytes += count;
                        if *dropped_bytes > LINGER_BYTES_MAX {
                            break Poll::Ready(());
                        }
                    }
                    Poll::Ready(_) => break Poll::Ready(()),
                    Poll::Pending => break Poll::Pending,
                }
            }
        };
        match sent {
            Poll::Ready(()) => Poll::Ready(()),
            Poll::Pending => self.poll_deadline(cx, until),
        }
    }

    /// Watches how a write went.
    fn watch<T>(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if result.is_ready() {
            if self.write_waits_since.take().is_some() && matches!(self.life, Life::Refused { .. })
            {
                // The reader was told to wait for this.
                cx.waker().wake_by_ref();
            }
            return result;
        }
        let since = *self.write_waits_since.get_or_insert_with(Instant::now);
        ready!(self.poll_deadline(cx, since + self.timeouts.write));
        self.end(Ended::Write);
        Poll::Ready(Err(Ended::Write.into()))
    }

    fn wrote(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(count)) = &result {
            let count = *count as u64;
            self.shared.bytes_out.update(|sum| sum + count);
            if self.guard.phase() != Phase::Body {
                // Whoever takes a response is not idle.
                self.read_waits_since = Some(Instant::now());
            }
        }
        self.watch(cx, result)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for GuardedIo<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match &mut this.life {
                Life::Serving => {
                    let before = buffer.filled().len();
                    match Pin::new(&mut this.io).poll_read(cx, buffer) {
                        Poll::Ready(Ok(())) if buffer.filled().len() > before => {
                            let deliverable = this.received(&buffer.filled()[before..]);
                            buffer.set_filled(before + deliverable);
                            if deliverable > 0 {
                                return Poll::Ready(Ok(()));
                            }
                        }
                        Poll::Ready(result) => return Poll::Ready(result),
                        Poll::Pending => ready!(this.poll_silence(cx)),
                    }
                }
                Life::Refused { answer, ended } => {
                    if this.write_waits_since.is_some() {
                        return Poll::Pending;
                    }
                    this.life = Life::Answering {
                        answer: answer.clone(),
                        ended: *ended,
                        closed: false,
                        dropped_bytes: 0,
                        until: Instant::now() + this.timeouts.linger,
                    };
                }
                Life::Answering { ended, .. } => {
                    let ended = *ended;
                    ready!(this.poll_answer(cx));
                    this.life = Life::Failed(ended);
                }
                Life::Silent => return Poll::Ready(Ok(())),
                Life::Failed(ended) => return Poll::Ready(Err((*ended).into())),
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for GuardedIo<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.io).poll_write(cx, bytes);
        this.wrote(cx, result)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let length: usize = slices.iter().map(|slice| slice.len()).sum();
        let result = if length <= JOINED_BYTES_MAX {
            let mut joined = [0; JOINED_BYTES_MAX];
            Pin::new(&mut this.io).poll_write(cx, join(slices, &mut joined))
        } else {
            Pin::new(&mut this.io).poll_write_vectored(cx, slices)
        };
        this.wrote(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.io).poll_flush(cx);
        this.watch(cx, result)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.io).poll_shutdown(cx);
        this.watch(cx, result)
    }
}

/// Copies pieces behind one another into a buffer that is long enough.
fn join<'a>(pieces: &[io::IoSlice<'_>], buffer: &'a mut [u8]) -> &'a [u8] {
    let mut length = 0;
    for piece in pieces {
        let begin = length;
        length += piece.len();
        buffer[begin..length].copy_from_slice(piece);
    }
    &buffer[..length]
}

/// The whole answer to a violation, after which the connection closes.
#[must_use]
pub fn violation_response(violation: &Violation) -> Bytes {
    let status = StatusCode::from_u16(violation.status()).unwrap_or(StatusCode::BAD_REQUEST);
    problem(status, &violation.to_string())
}

/// A problem (RFC 9457) as bytes. `detail` is one of our own sentences and needs no escapes.
fn problem(status: StatusCode, detail: &str) -> Bytes {
    debug_assert!(!detail.contains(['"', '\\']), "{detail}");
    let title = status.canonical_reason().unwrap_or("Bad Request");
    let code = status.as_u16();
    let body = format!(
        r#"{{"type":"about:blank","title":"{title}","status":{code},"code":"bad_request","detail":"{detail}"}}"#
    );
    let length = body.len();
    format!(
        "HTTP/1.1 {code} {title}\r\n\
         content-type: application/problem+json\r\n\
         cache-control: no-store\r\n\
         content-length: {length}\r\n\
         connection: close\r\n\r\n{body}"
    )
    .into()
}

#[cfg(test)]
mod tests;
