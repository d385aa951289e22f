//! Connections: accepted, divided among the workers, bounded, watched, drained.
//!
//! The kernel divides new connections by a hash of their addresses, which leaves one worker with
//! half as many again as another now and then. Its requests then run on the other's core, where
//! nothing of them is in the cache: 40 µs a request instead of 32. So a worker that has a few more
//! than the one with the fewest hands what it accepts on to that one.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use http::header::CONNECTION;
use http::{HeaderValue, Version};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use insula_metrics::{DataMetrics, ShedReason};
use insula_scheduler::WorkerId;
use insula_types::Outcome;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;

use super::billing::Billed;
use super::guarded_io::{ConnectionHandle, Ended, GuardedIo, Timeouts};
use super::handle::{Origin, Transport, handle};
use super::routes::RouteTable;
use super::socket::Socket;
use crate::pool::Pool;
use crate::pool::worker::Phase;
use crate::tls::{self, Certificate};

const NO_ADDRESS: HeaderValue = HeaderValue::from_static("unknown");

/// Connections that a host holds at once.
const CONNECTIONS_MAX: usize = 20_000;
/// A client that keeps a connection, and asks nothing for so long, is let go when data drains in
/// favour of another: far more than what a request takes that is on its way.
const REST_MAX: Duration = Duration::from_secs(5);
/// How often it is looked whether it asks.
const REST_LOOK: Duration = Duration::from_millis(100);
const CLOSE: HeaderValue = HeaderValue::from_static("close");
/// Pause after the kernel refused a connection for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// Connections accepted before others come in turn; some ten microseconds each.
const ACCEPTED_AT_ONCE: u64 = 16;
/// Buffer of an HTTP/1.1 head: more than the guard lets through, so that the guard answers first.
const HEAD_BUFFER: usize = 40 << 10;
/// Streams of one HTTP/2 connection.
const H2_STREAMS: u32 = 100;
/// Resets that an HTTP/2 client may have waiting, and errors that it may provoke.
const H2_PENDING_RESETS: usize = 20;
const H2_LOCAL_RESETS: usize = 64;
/// Header list of one HTTP/2 request.
const H2_HEADER_LIST: u32 = 16 << 10;
/// How often an idle HTTP/2 connection is asked whether it is there, and how long it may take.
const H2_PING: Duration = Duration::from_secs(30);
const H2_PONG: Duration = Duration::from_secs(15);

/// The ingress of all workers.
pub struct Ingress {
    pub(super) routes: ArcSwap<RouteTable>,
    pub(super) pool: Arc<Pool>,
    pub(super) metrics: DataMetrics,
    /// Speaks TLS where there is one.
    certificate: Option<Arc<Certificate>>,
    connections: AtomicUsize,
    /// Connections are to end, but with an answer to what is on its way.
    retiring: AtomicBool,
    desks: Box<[Desk]>,
}

/// What the workers know of each other's connections.
struct Desk {
    connections: AtomicUsize,
    /// Accepted by another worker.
    handed: UnboundedSender<Handed>,
    /// Until the worker has it.
    inbox: Mutex<Option<UnboundedReceiver<Handed>>>,
}

/// A connection on its way to another worker.
struct Handed {
    stream: std::net::TcpStream,
    client: HeaderValue,
    place: Place,
}

impl Desk {
    fn new() -> Self {
        let (handed, inbox) = unbounded_channel();
        Self {
            connections: AtomicUsize::new(0),
            handed,
            inbox: Mutex::new(Some(inbox)),
        }
    }
}

impl std::fmt::Debug for Ingress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ingress").finish_non_exhaustive()
    }
}

/// Counts one connection for as long as it lives.
struct Place {
    ingress: Arc<Ingress>,
    worker: WorkerId,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.ingress.connections.fetch_sub(1, Ordering::Relaxed);
        let desk = &self.ingress.desks[self.worker.index()];
        desk.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Ingress {
    /// An ingress of so many workers, with an empty route table.
    #[must_use]
    pub fn new(
        pool: Arc<Pool>,
        metrics: DataMetrics,
        workers: usize,
        certificate: Option<Arc<Certificate>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            desks: (0..workers).map(|_| Desk::new()).collect(),
            routes: ArcSwap::default(),
            pool,
            metrics,
            certificate,
            connections: AtomicUsize::new(0),
            retiring: AtomicBool::new(false),
        })
    }

    /// Replaces the route table.
    pub fn swap_routes(&self, table: RouteTable) {
        self.routes.store(Arc::new(table));
    }

    /// From now on the next answer of a connection is its last, and draining waits for that.
    pub fn retire(&self) {
        self.retiring.store(true, Ordering::Relaxed);
    }

    fn is_retiring(&self) -> bool {
        self.retiring.load(Ordering::Relaxed)
    }

    /// Connections now.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Accepts while the phase is [`Phase::Serving`]. Runs on a worker's own runtime.
    pub async fn accept(
        self: Arc<Self>,
        listener: std::net::TcpListener,
        worker: WorkerId,
        phase: watch::Receiver<Phase>,
    ) {
        let pool = Arc::clone(&self.pool);
        let accepting = Box::pin(self.accept_all(listener, worker, phase));
        Billed::connection(pool, accepting).await;
    }

    async fn accept_all(
        self: Arc<Self>,
        listener: std::net::TcpListener,
        worker: WorkerId,
        mut phase: watch::Receiver<Phase>,
    ) {
        let listener = match TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(%error, "a worker cannot use its listener");
                return;
            }
        };
        while *phase.borrow_and_update() == Phase::Starting {
            if phase.changed().await.is_err() {
                return;
            }
        }
        let desk = &self.desks[worker.index()];
        let inbox = desk.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut inbox) = { inbox }.take() else {
            return;
        };
        for accepted in 1_u64.. {
            if accepted.is_multiple_of(ACCEPTED_AT_ONCE) {
                tokio::task::yield_now().await;
            }
            // Both are cancel-safe: a connection is either taken or still where it was.
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(handed) = inbox.recv() => {
                    self.seat_handed(handed, worker, &phase);
                    continue;
                }
                _ = phase.changed() => break,
            };
            match accepted {
                Ok((stream, client)) => {
                    let client = client.ip().to_string();
                    // An address is printed in ASCII.
                    let client = HeaderValue::try_from(client).unwrap_or(NO_ADDRESS);
                    let origin = Origin::tcp(client, worker);
                    self.welcome(stream, origin, &phase);
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(listener);
        // What others accepted before they heard of it. Ends with the worker.
        while let Some(handed) = inbox.recv().await {
            self.seat_handed(handed, worker, &phase);
        }
    }

    fn welcome(
        self: &Arc<Self>,
        stream: TcpStream,
        origin: Origin,
        phase: &watch::Receiver<Phase>,
    ) {
        if self.connections.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
            self.connections.fetch_sub(1, Ordering::Relaxed);
            let nobody = self.metrics.unrouted();
            nobody.shed(ShedReason::Connections);
            nobody.request_ended(Outcome::HostOverloaded);
            return;
        }
        // A failure costs latency only.
        let _ = stream.set_nodelay(true);
        let worker = self.least_busy(origin.worker);
        let desk = &self.desks[worker.index()];
        desk.connections.fetch_add(1, Ordering::Relaxed);
        let place = Place {
            ingress: Arc::clone(self),
            worker,
        };
        if worker == origin.worker {
            self.seat(stream, place, origin, phase);
        } else if let Ok(stream) = stream.into_std() {
            let client = origin.client;
            // A worker that has ended drops it.
            let _ = desk.handed.send(Handed {
                stream,
                client,
                place,
            });
        }
    }

    /// The worker that takes a connection that `accepting` has: itself, unless it has notably more
    /// than another one.
    fn least_busy(&self, accepting: WorkerId) -> WorkerId {
        let count = |desk: &Desk| desk.connections.load(Ordering::Relaxed);
        let own = count(&self.desks[accepting.index()]);
        let least = self.desks.iter().map(count).enumerate();
        match least.min_by_key(|(_, connections)| *connections) {
            Some((index, connections)) if own >= connections + 2 + connections / 8 => {
                u16::try_from(index).map_or(accepting, WorkerId::new)
            }
            _ => accepting,
        }
    }

    /// Serves a connection that another worker accepted.
    fn seat_handed(
        self: &Arc<Self>,
        handed: Handed,
        worker: WorkerId,
        phase: &watch::Receiver<Phase>,
    ) {
        let Handed {
            stream,
            client,
            place,
        } = handed;
        if let Ok(stream) = TcpStream::from_std(stream) {
            self.seat(stream, place, Origin::tcp(client, worker), phase);
        }
    }

    /// Serves a connection on the calling worker.
    fn seat(
        self: &Arc<Self>,
        stream: TcpStream,
        place: Place,
        origin: Origin,
        phase: &watch::Receiver<Phase>,
    ) {
        let ingress = Arc::clone(self);
        let phase = phase.clone();
        let pool = Arc::clone(&self.pool);
        let socket = Socket::Live(stream);
        let serving = Box::pin(async move {
            match ingress.certificate.clone() {
                None => ingress.serve(socket, origin, phase).await,
                // Apart, since it is larger and others need not keep room for it.
                Some(certificate) => {
                    Box::pin(ingress.serve_tls(certificate, socket, origin, phase)).await;
                }
            }
            drop(place);
        });
        // Ends with its runtime at the latest; counted by its place.
        tokio::task::spawn_local(Billed::connection(pool, serving));
    }

    async fn serve_tls(
        self: Arc<Self>,
        certificate: Arc<Certificate>,
        socket: Socket,
        origin: Origin,
        mut phase: watch::Receiver<Phase>,
    ) {
        let secured = tokio::select! {
            secured = certificate.handshake(socket) => secured,
            // Nothing was asked for yet.
            () = self.told_to_close(&mut phase) => return,
        };
        match secured {
            Ok(stream) => {
                let transport = Transport::Tls(tls::server_name(&stream));
                let origin = Origin {
                    transport,
                    ..origin
                };
                self.serve(stream, origin, phase).await;
            }
            Err(error) => tracing::debug!(%error, client = ?origin.client, "no TLS"),
        }
    }

    async fn serve<S>(self: Arc<Self>, stream: S, origin: Origin, mut phase: watch::Receiver<Phase>)
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let (io, connection) = GuardedIo::new(stream, Timeouts::default());
        let http2 = Cell::new(false);
        let service = service_fn(|request| {
            let (ingress, origin) = (Arc::clone(&self), origin.clone());
            let in_progress = connection.begin_request();
            let version = request.version();
            http2.set(version == Version::HTTP_2);
            let last = version == Version::HTTP_11 && self.is_retiring();
            async move {
                let mut response = handle(ingress, origin, request).await;
                if last {
                    response.headers_mut().insert(CONNECTION, CLOSE);
                }
                Ok::<_, std::convert::Infallible>(response.map(|body| body.during(in_progress)))
            }
        });
        let builder = protocol(SameThread(Arc::clone(&self.pool)));
        let mut serving = std::pin::pin!(builder.serve_connection(TokioIo::new(io), service));
        let result = tokio::select! {
            result = serving.as_mut() => result,
            () = self.told_to_end(&mut phase, &connection, &http2) => {
                serving.as_mut().graceful_shutdown();
                serving.as_mut().await
            }
        };
        if let Some(Ended::Violation(_) | Ended::Head) = connection.ended() {
            self.metrics.unrouted().request_ended(Outcome::BadRequest);
        }
        if let Err(error) = result {
            tracing::trace!(error, client = ?origin.client, "connection ended");
        }
    }
}

impl Ingress {
    /// Waits until connections on which nothing was asked yet are to be closed.
    async fn told_to_close(&self, phase: &mut watch::Receiver<Phase>) {
        let _ = phase.changed().await;
        if self.is_retiring() {
            tokio::time::sleep(REST_MAX).await;
        }
    }

    /// Waits until a connection is to end. HTTP/2 says so in a way that loses no request. HTTP/1.1
    /// does not: there, where that matters, the end comes with an answer, or when nobody has asked
    /// for a while.
    async fn told_to_end(
        &self,
        phase: &mut watch::Receiver<Phase>,
        connection: &ConnectionHandle,
        http2: &Cell<bool>,
    ) {
        let _ = phase.changed().await;
        let mut seen = connection.at_rest();
        let mut since = Instant::now();
        while self.is_retiring() && !http2.get() && since.elapsed() < REST_MAX {
            tokio::time::sleep(REST_LOOK).await;
            let now = connection.at_rest();
            if now.is_none() || now != seen {
                since = Instant::now();
                seen = now;
            }
        }
    }
}

/// Runs what hyper spawns (HTTP/2 streams) on the worker's own thread.
#[derive(Clone)]
struct SameThread(Arc<Pool>);

impl<F> hyper::rt::Executor<F> for SameThread
where
    F: Future<Output: 'static> + 'static,
{
    fn execute(&self, future: F) {
        let pool = Arc::clone(&self.0);
        tokio::task::spawn_local(Billed::stream(pool, Box::pin(future)));
    }
}

fn protocol(executor: SameThread) -> auto::Builder<SameThread> {
    let mut builder = auto::Builder::new(executor);
    // The fields of a head are counted by the guard; hyper's own bound of 100 is never reached, and
    // one that is set costs an allocation and a copy per request.
    builder
        .http1()
        .header_read_timeout(None)
        .max_buf_size(HEAD_BUFFER)
        .half_close(false);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(H2_STREAMS)
        .max_pending_accept_reset_streams(H2_PENDING_RESETS)
        .max_local_error_reset_streams(H2_LOCAL_RESETS)
        .max_header_list_size(H2_HEADER_LIST)
        .keep_alive_interval(H2_PING)
        .keep_alive_timeout(H2_PONG);
    builder
}
