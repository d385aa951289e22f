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
//! byte is handed on before ([`Refused::deliverable`](super::head_guard::Refused)), and an answer
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

use super::head_guard::{HeadGuard, Phase, Violation};

/// Most bytes that are read and dropped after an answer of ours.
const LINGER_BYTES_MAX: usize = 256 << 10;

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
}

impl From<Ended> for io::Error {
    fn from(ended: Ended) -> Self {
        let kind = match ended {
            Ended::Violation(_) => io::ErrorKind::InvalidData,
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
        let result = Pin::new(&mut this.io).poll_write_vectored(cx, slices);
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
mod tests {
    use std::convert::Infallible;

    use http::{Request, Response};
    use http_body_util::{BodyExt, Full};
    use hyper::body::Incoming;
    use hyper::server::conn::http1;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::time::sleep;

    use super::*;

    const GET: &str = "GET /0 HTTP/1.1\r\nHost: a\r\n\r\n";

    /// How one connection went.
    struct Went {
        answers: String,
        served: Result<(), hyper::Error>,
        handle: ConnectionHandle,
        took: Duration,
    }

    impl Went {
        fn statuses(&self) -> Vec<&str> {
            self.answers
                .split("HTTP/1.1 ")
                .skip(1)
                .map(|answer| &answer[..3])
                .collect()
        }

        fn seconds(&self) -> u64 {
            self.took.as_secs()
        }
    }

    /// Serves one connection. `/<seconds>` answers after so long, without looking at the body;
    /// `/read/<seconds>` reads the body then, and answers its length or 422 if it failed;
    /// `/large` answers a mebibyte.
    async fn serve(buffer_bytes: usize, client: impl AsyncFnOnce(&mut DuplexStream)) -> Went {
        let began = Instant::now();
        let (mut near, far) = duplex(buffer_bytes);
        let (guarded, handle) = GuardedIo::new(far, Timeouts::default());
        let in_service = handle.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let in_progress = in_service.begin_request();
            async move {
                let response = respond(request).await;
                drop(in_progress);
                Ok::<_, Infallible>(response)
            }
        });
        let server = async {
            let served = http1::Builder::new()
                .serve_connection(TokioIo::new(guarded), service)
                .await;
            (served, began.elapsed())
        };
        let client = async move {
            client(&mut near).await;
            let mut answers = Vec::new();
            let _ = near.read_to_end(&mut answers).await;
            String::from_utf8(answers).unwrap()
        };
        let ((served, took), answers) = tokio::join!(server, client);
        Went {
            answers,
            served,
            handle,
            took,
        }
    }

    async fn respond(request: Request<Incoming>) -> Response<Full<Bytes>> {
        let path = request.uri().path().to_owned();
        let seconds = path.rsplit('/').next().and_then(|text| text.parse().ok());
        sleep(Duration::from_secs(seconds.unwrap_or(0))).await;
        let (status, body) = if path.starts_with("/read/") {
            match request.into_body().collect().await {
                Ok(body) => (200, body.to_bytes().len().to_string().into()),
                Err(_) => (422, Bytes::new()),
            }
        } else if path == "/large" {
            (200, vec![b'x'; 1 << 20].into())
        } else {
            (200, Bytes::new())
        };
        let mut response = Response::new(Full::new(body));
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        response
    }

    const HOUR: Duration = Duration::from_secs(3_600);

    async fn send(client: &mut DuplexStream, text: &str) {
        client.write_all(text.as_bytes()).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_connection_is_closed_silently() {
        let went = serve(4_096, async |client| send(client, GET).await).await;
        assert_eq!((went.statuses(), went.seconds()), (vec!["200"], 60));
        assert!(went.served.is_ok());
        assert_eq!(went.handle.ended(), Some(Ended::Idle));
        assert_eq!(went.handle.bytes_in(), GET.len() as u64);
        assert_eq!(went.handle.bytes_out(), went.answers.len() as u64);
        assert_eq!(went.handle.requests(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_never_spoke_is_idle() {
        let went = serve(4_096, async |_| ()).await;
        assert_eq!((went.statuses(), went.seconds()), (vec![], 60));
        assert!(went.served.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_not_idle_while_a_request_is_served() {
        let slow = "GET /200 HTTP/1.1\r\nHost: a\r\n\r\n";
        let went = serve(4_096, async |client| send(client, slow).await).await;
        assert_eq!((went.statuses(), went.seconds()), (vec!["200"], 260));
        assert!(went.served.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn each_request_begins_idleness_anew() {
        let client = async |client: &mut DuplexStream| {
            for _ in 0..10 {
                send(client, GET).await;
                sleep(Duration::from_secs(50)).await;
            }
        };
        let went = serve(4_096, client).await;
        assert_eq!((went.statuses().len(), went.seconds()), (10, 510));
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_head_is_answered_with_408() {
        let client = async |client: &mut DuplexStream| {
            for byte in GET.bytes().take(9) {
                client.write_all(&[byte]).await.unwrap();
                sleep(Duration::from_secs(1)).await;
            }
        };
        let went = serve(4_096, client).await;
        assert_eq!((went.statuses(), went.seconds()), (vec!["408"], 10));
        assert!(went.answers.contains("\r\nconnection: close\r\n"));
        assert!(went.served.is_err());
        assert_eq!(went.handle.ended(), Some(Ended::Head));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_stays_after_our_answer_is_left() {
        let client = async |client: &mut DuplexStream| {
            send(client, "GET").await;
            sleep(HOUR).await;
        };
        let went = serve(4_096, client).await;
        // 10 for the head, 1 to close.
        assert_eq!((went.statuses(), went.seconds()), (vec!["408"], 11));
    }

    #[tokio::test(start_paused = true)]
    async fn a_violation_is_answered_with_a_problem() {
        let bad = "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n";
        let went = serve(4_096, async |client| send(client, bad).await).await;
        assert_eq!(
            went.answers.as_bytes(),
            violation_response(&Violation::HostDuplicate)
        );
        let (head, body) = went.answers.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{head}");
        assert!(
            head.contains(&format!("content-length: {}\r\n", body.len())),
            "{head}"
        );
        assert_eq!(
            body,
            "{\"type\":\"about:blank\",\"title\":\"Bad Request\",\"status\":400,\
             \"code\":\"bad_request\",\"detail\":\"there is more than one Host header\"}"
        );
        assert_eq!(
            went.handle.ended(),
            Some(Ended::Violation(Violation::HostDuplicate))
        );
        assert!(went.served.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn tls_on_a_plain_port_is_answered() {
        let went = serve(4_096, async |client| send(client, "\x16\x03\x01").await).await;
        assert_eq!(
            went.answers.as_bytes(),
            violation_response(&Violation::RequestLine)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_came_before_a_violation_is_answered_first() {
        let get = "GET /5 HTTP/1.1\r\nHost: a\r\n\r\n";
        for bad in [
            "\0",
            "\n",
            "\r\r",
            "GET\0",
            "GET / HTTP/1.1\n",
            "GET / HTTP/1.1\r\n\r\n",
            "X: \n",
        ] {
            for split in [false, true] {
                let client = async |client: &mut DuplexStream| {
                    if split {
                        send(client, get).await;
                        sleep(Duration::from_secs(1)).await;
                        send(client, bad).await;
                    } else {
                        send(client, &format!("{get}{get}{bad}")).await;
                    }
                };
                let went = serve(4_096, client).await;
                let expected = if split {
                    vec!["200", "400"]
                } else {
                    vec!["200", "200", "400"]
                };
                assert_eq!(went.statuses(), expected, "{bad:?}");
                assert!(matches!(went.handle.ended(), Some(Ended::Violation(_))));
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_of_ours_waits_for_a_response_that_is_not_taken_yet() {
        let client = async |client: &mut DuplexStream| {
            send(client, "GET /large HTTP/1.1\r\nHost: a\r\n\r\nGET\0").await;
            sleep(Duration::from_secs(20)).await;
        };
        let went = serve(1_024, client).await;
        assert_eq!(went.statuses(), ["200", "400"]);
        let first = went.answers.split("HTTP/1.1 ").nth(1).unwrap();
        assert_eq!(first.split_once("\r\n\r\n").unwrap().1.len(), 1 << 20);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stalled_body_fails_while_it_is_read() {
        let head = "PUT /read/0 HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n";
        let client = async |client: &mut DuplexStream| {
            send(client, head).await;
            for _ in 0..3 {
                send(client, "x").await;
                sleep(Duration::from_secs(14)).await;
            }
        };
        let went = serve(4_096, client).await;
        assert_eq!((went.statuses(), went.seconds()), (vec!["422"], 28 + 15));
        assert_eq!(went.handle.ended(), Some(Ended::Body));
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_nobody_reads_does_not_stall() {
        let head = "PUT /read/100 HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n";
        let client = async |client: &mut DuplexStream| {
            send(client, head).await;
            send(client, &"x".repeat(1_000_000)).await;
        };
        let went = serve(4_096, client).await;
        assert_eq!((went.statuses(), went.seconds()), (vec!["200"], 160));
        assert!(
            went.answers.ends_with("\r\n\r\n1000000"),
            "{}",
            went.answers
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_violation_in_a_body_fails_the_body() {
        let head = "PUT /read/0 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        for bad in ["1\nx\r\n0\r\n\r\n", "1\r\nxy", "0\r\nHost: b\r\n\r\n"] {
            let client =
                async |client: &mut DuplexStream| send(client, &format!("{GET}{head}{bad}")).await;
            let went = serve(4_096, client).await;
            assert_eq!(went.statuses(), ["200", "422"], "{bad:?}");
            assert!(matches!(went.handle.ended(), Some(Ended::Violation(_))));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_left() {
        let client = async |client: &mut DuplexStream| {
            send(client, "GET /large HTTP/1.1\r\nHost: a\r\n\r\n").await;
            let mut some = [0; 512];
            for _ in 0..3 {
                sleep(Duration::from_secs(29)).await;
                client.read_exact(&mut some).await.unwrap();
            }
            sleep(Duration::from_secs(31)).await;
        };
        let went = serve(1_024, client).await;
        assert_eq!(
            (went.handle.ended(), went.seconds()),
            (Some(Ended::Write), 3 * 29 + 30)
        );
        assert!(went.served.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn http_2_passes_through() {
        let (mut near, far) = duplex(4_096);
        let (mut guarded, handle) = GuardedIo::new(far, Timeouts::default());
        let sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\n\n\0";
        near.write_all(sent).await.unwrap();
        let mut got = vec![0; sent.len()];
        guarded.read_exact(&mut got).await.unwrap();
        assert_eq!(got, sent);
        let busy = handle.begin_request();
        let waited = tokio::time::timeout(HOUR, guarded.read(&mut got)).await;
        assert!(waited.is_err(), "not idle");
        drop(busy);
        assert_eq!(guarded.read(&mut got).await.unwrap(), 0);
        assert_eq!(handle.ended(), Some(Ended::Idle));
    }

    proptest! {
        /// Whatever comes after some good requests, and in whatever pieces: all of them are
        /// answered, whole, before anything else is said, and nothing is said after a refusal.
        #[test]
        fn answers_are_never_mixed(
            good in 0..4usize,
            bad in "[\r\n\0 :A-Za-z0-9]{0,20}",
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..5),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .start_paused(true)
                .build()
                .unwrap();
            let stream = GET.replace("/0", "/1").repeat(good) + &bad;
            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
            cuts.push(stream.len());
            cuts.sort_unstable();
            let went = runtime.block_on(serve(128, async |client: &mut DuplexStream| {
                let mut from = 0;
                for cut in cuts {
                    // It may have been refused, and not be read any more.
                    let _ = client.write_all(&stream.as_bytes()[from..cut]).await;
                    from = cut;
                    sleep(Duration::from_millis(700)).await;
                }
            }));
            let statuses = went.statuses();
            prop_assert_eq!(statuses.iter().take_while(|status| **status == "200").count(), good);
            prop_assert!(statuses.len() <= good + 1, "{:?}", statuses);
        }
    }
}
