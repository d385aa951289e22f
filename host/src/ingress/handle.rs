//! One request, from its head to the head of its answer.

use std::borrow::Cow;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, HeaderValue, TRAILER};
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use http_body::{Body, Frame};
use hyper::body::Incoming;
use insula_metrics::ShedReason;
use insula_scheduler::WorkerId;
use insula_types::Outcome;

use super::Ingress;
use super::billing::{answers, pays, refuses};
use super::body::{Hold, OutBody, RequestBody};
use super::headers::{self, INSULA_USAGE};
use super::problem;
use super::routes::canonical_host;
use crate::config::UrlScheme;
use crate::engine::run::{Grant, Head, Invocation, ResponseBody, run};
use crate::engine::{Program, Shelf};
use crate::pool::admission::Shed;
use crate::pool::entries::ServiceEntry;
use crate::pool::exchange::{Answer, Exchange};
use crate::pool::request_id::RequestId;

/// A body that is complete by now and no longer than this goes out in one piece.
const WHOLE_MAX_BYTES: usize = 64 << 10;
/// How long an answer with `insula-usage` waits for its guest's end, to have it in the head.
const USAGE_WAIT: Duration = Duration::from_millis(50);

/// What a client that asks for a service which is still compiled waits before it asks again, in
/// seconds: what most services take; how many are before it, only control knows.
const COMPILES_FOR_S: u64 = 1;

/// Where a request came from.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    /// The client's address, without its port.
    pub(super) client: HeaderValue,
    pub(super) worker: WorkerId,
    pub(super) transport: Transport,
}

/// What carries a connection.
#[derive(Debug, Clone)]
pub(super) enum Transport {
    /// TCP.
    Plain,
    /// TLS, with the name that the client asked for, if it did.
    Tls(Option<Arc<str>>),
}

impl Origin {
    /// A connection that was just accepted.
    pub(super) const fn tcp(client: HeaderValue, worker: WorkerId) -> Self {
        Self {
            client,
            worker,
            transport: Transport::Plain,
        }
    }

    const fn scheme(&self) -> UrlScheme {
        match self.transport {
            Transport::Plain => UrlScheme::Http,
            Transport::Tls(_) => UrlScheme::Https,
        }
    }

    /// Whether a request is for another host than its connection was made for: its certificate was
    /// checked for that one (RFC 9110, 7.4).
    fn is_misdirected(&self, host: &str) -> bool {
        matches!(&self.transport, Transport::Tls(Some(name)) if **name != *host)
    }
}

/// Answers one request, whatever it is.
pub(super) async fn handle(
    ingress: Arc<Ingress>,
    origin: Origin,
    request: Request<Incoming>,
) -> Response<OutBody> {
    let began = Instant::now();
    let request_id = RequestId::new();
    let host = match host_of(&request) {
        Ok(host) => host,
        Err(message) => {
            ingress
                .metrics
                .unrouted()
                .request_ended(Outcome::BadRequest);
            let status = StatusCode::BAD_REQUEST;
            let mut refusal = problem::detailed(status, Outcome::BadRequest, message, request_id);
            if request.version() <= Version::HTTP_11 {
                // Whose request it is could not be agreed on: the next one is not trusted either.
                let close = HeaderValue::from_static("close");
                refusal.headers_mut().insert(CONNECTION, close);
            }
            return own(refusal);
        }
    };
    // A canonical host is ASCII.
    let name = host.to_str().unwrap_or_default();
    if origin.is_misdirected(name) {
        let nobody = ingress.metrics.unrouted();
        nobody.request_ended(Outcome::BadRequest);
        let (status, outcome) = (StatusCode::MISDIRECTED_REQUEST, Outcome::BadRequest);
        let message = "The connection was made for another host";
        return own(problem::detailed(status, outcome, message, request_id));
    }
    let routes = ingress.routes.load();
    let Some(found) = routes.find(name, request.uri().path()) else {
        ingress.metrics.unrouted().request_ended(Outcome::NotFound);
        return own(problem::problem(Outcome::NotFound, request_id));
    };
    let (service, preview) = (Arc::clone(found.service), found.preview);
    drop(routes);
    pays(&service);
    let Some(active) = service.version_for(preview, request.headers(), &request_id) else {
        if service.awaits(preview) {
            return come_again(&service, began, request_id);
        }
        return refuse(&service, Outcome::NotFound, began, request_id);
    };
    let length = declared_length(request.headers());
    if length.is_some_and(|length| length > service.limits.request_body.get()) {
        service.record_refusal(Outcome::BadRequest, began.elapsed(), 0);
        return own(too_large(&service, request_id));
    }
    let deadline = began + Duration::from(service.limits.timeout);
    // Before anything is made for it: a refusal has to be cheap.
    let room = service.tenant.memory.has_room().map_err(Shed::from);
    let admitted = room.and_then(|()| ingress.pool.admit(service.tenant.id, deadline));
    let admitted = match admitted {
        Ok(admitted) => admitted,
        Err(shed) => return shed_request(&service, shed, request.headers(), began, request_id),
    };
    let wants_body = *request.method() != Method::HEAD;
    let exchange = Exchange::new(Arc::clone(&service), active.number, request_id, began);
    answers(&exchange);
    exchange
        .bytes_in
        .store(headers::head_bytes(request.headers()), Ordering::Relaxed);
    let request = for_guest(request, &exchange, &origin, host);
    let request = (origin.scheme(), request);
    let code = (active.program.clone(), active.shelf.clone());
    let work = Box::pin(work(code, Arc::clone(&exchange), request));
    let submitted = Arc::clone(&exchange);
    let key = ingress
        .pool
        .submit(admitted, origin.worker, submitted, deadline, work);
    let hold = Hold::new(Arc::clone(&ingress.pool), key, exchange);
    answer(hold, wants_body).await
}

/// Refuses a request that was not admitted.
fn shed_request(
    service: &ServiceEntry,
    shed: Shed,
    head: &HeaderMap,
    began: Instant,
    request_id: RequestId,
) -> Response<OutBody> {
    let (outcome, reason) = blame(shed);
    if outcome == Outcome::TenantOverloaded {
        refuses();
    }
    service.tenant.metrics.shed(reason);
    service.record_refusal(outcome, began.elapsed(), headers::head_bytes(head));
    own(problem::overloaded(outcome, request_id, shed.retry_after()))
}

/// Whose fault a refusal is, and the reason that is counted.
const fn blame(shed: Shed) -> (Outcome, ShedReason) {
    match shed {
        Shed::TenantFull { waiting: 0, .. } => (Outcome::TenantOverloaded, ShedReason::InFlight),
        Shed::TenantFull { .. } => (Outcome::TenantOverloaded, ShedReason::QueueFull),
        Shed::TenantRate { .. } => (Outcome::TenantOverloaded, ShedReason::Rate),
        Shed::TenantBehind { .. } => (Outcome::TenantOverloaded, ShedReason::Overload),
        Shed::TooLate { .. } => (Outcome::TenantOverloaded, ShedReason::Deadline),
        Shed::HostFull { .. } => (Outcome::HostOverloaded, ShedReason::HostQueue),
        Shed::TenantMemory => (Outcome::TenantOverloaded, ShedReason::Memory),
        Shed::HostMemory => (Outcome::HostOverloaded, ShedReason::HostMemory),
        Shed::TenantGone => (Outcome::NotFound, ShedReason::Draining),
    }
}

fn own(response: Response<Bytes>) -> Response<OutBody> {
    response.map(OutBody::host)
}

fn refuse(
    service: &ServiceEntry,
    outcome: Outcome,
    began: Instant,
    request_id: RequestId,
) -> Response<OutBody> {
    service.record_refusal(outcome, began.elapsed(), 0);
    own(problem::problem(outcome, request_id))
}

/// The code of what is asked for is still compiled, after a new engine.
fn come_again(service: &ServiceEntry, began: Instant, request_id: RequestId) -> Response<OutBody> {
    let outcome = Outcome::HostOverloaded;
    service.record_refusal(outcome, began.elapsed(), 0);
    let title = "The service is being compiled for this host; try again later";
    let status = problem::status(outcome);
    let response = problem::detailed(status, outcome, title, request_id);
    own(problem::retry(response, Some(COMPILES_FOR_S)))
}

fn too_large(service: &ServiceEntry, request_id: RequestId) -> Response<Bytes> {
    let limit = service.limits.request_body.get();
    let title = format!("The request body is larger than {limit} bytes");
    problem::detailed(
        StatusCode::PAYLOAD_TOO_LARGE,
        Outcome::BadRequest,
        &title,
        request_id,
    )
}

/// The one authority of a request, canonical. HTTP/1.1 has it in `Host` (RFC 9112, 3.2), HTTP/2 in
/// `:authority` (RFC 9113, 8.3.1); where there are two, they must agree.
fn authority(request: &Request<Incoming>) -> Result<Cow<'_, str>, &'static str> {
    let mut hosts = request.headers().get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err("The request has more than one Host");
    }
    let host = match host {
        Some(host) => {
            let text = host.to_str().map_err(|_| "Host is not a host name")?;
            Some(canonical_host(text).ok_or("Host is not a host name")?)
        }
        None => None,
    };
    let target = match request.uri().authority() {
        Some(authority) => {
            Some(canonical_host(authority.as_str()).ok_or("the authority is not a host name")?)
        }
        None => None,
    };
    match (host, target) {
        (Some(host), Some(target)) if host != target => Err("Host and the request target differ"),
        (None, Some(_)) if request.version() == Version::HTTP_11 => Err("The request has no Host"),
        (Some(host), _) | (None, Some(host)) => Ok(host),
        (None, None) => Err("The request has no Host"),
    }
}

/// The same, as the value of a header. What the client sent is shared where it is canonical, as it
/// nearly always is.
fn host_of(request: &Request<Incoming>) -> Result<HeaderValue, &'static str> {
    let host = authority(request)?;
    match request.headers().get(HOST) {
        Some(sent) if sent.as_bytes() == host.as_bytes() => Ok(sent.clone()),
        _ => HeaderValue::from_str(&host).map_err(|_| "Host is not a host name"),
    }
}

fn declared_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn for_guest(
    request: Request<Incoming>,
    exchange: &Arc<Exchange>,
    origin: &Origin,
    host: HeaderValue,
) -> Request<RequestBody> {
    let (mut parts, body) = request.into_parts();
    headers::prepare_request(
        &mut parts.headers,
        exchange.request_id,
        &origin.client,
        (origin.scheme(), &host),
    );
    if parts.uri.authority().is_none() {
        // What wasi:http calls the authority; HTTP/2 has it in the target already.
        parts.headers.insert(HOST, host);
    }
    Request::from_parts(parts, RequestBody::new(body, Arc::clone(exchange)))
}

/// The guest's part: what the pool polls.
async fn work(
    (program, shelf): (Program, Option<Arc<Shelf>>),
    exchange: Arc<Exchange>,
    (scheme, request): (UrlScheme, Request<RequestBody>),
) {
    exchange.starting();
    let service = &exchange.service;
    run(Invocation {
        program,
        request,
        scheme,
        shelf,
        grant: Grant {
            fuel: service.limits.fuel,
            memory: service.limits.memory,
            quantum: exchange.quantum,
        },
        tenant_memory: Arc::clone(&service.tenant.memory),
        env: Arc::clone(&service.env),
        mounts: Arc::clone(&service.mounts),
        events: Arc::clone(&exchange),
    })
    .await;
}

/// Waits for the head and turns it into a response.
async fn answer(hold: Hold, wants_body: bool) -> Response<OutBody> {
    let head = std::future::poll_fn(|cx| hold.exchange().poll_head(cx)).await;
    let (mut parts, body) = match head {
        Some(Head::Ok(response)) if !response.status().is_informational() => response.into_parts(),
        Some(Head::Ok(_)) => return bad_response(hold, "a status below 200"),
        Some(Head::Err(error)) => return bad_response(hold, &error),
        None => return failed(hold),
    };
    if parts.status.is_server_error() {
        hold.exchange().answered_5xx.store(true, Ordering::Relaxed);
    }
    headers::prepare_response(&mut parts.headers, hold.exchange().request_id);
    let bytes = headers::head_bytes(&parts.headers);
    hold.exchange()
        .bytes_out
        .fetch_add(bytes, Ordering::Relaxed);
    if !wants_body
        || matches!(
            parts.status,
            StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED
        )
    {
        drain(hold, body);
        if parts.status == StatusCode::NO_CONTENT {
            parts.headers.remove(CONTENT_LENGTH);
        }
        return Response::from_parts(parts, OutBody::host(Bytes::new()));
    }
    let usage = hold.exchange().service.usage_header;
    let gathered = gather(body, hold.exchange(), usage).await;
    if hold
        .exchange()
        .verdict()
        .is_some_and(|outcome| outcome != Outcome::Ok)
    {
        // Nothing was sent yet, so the client can still be told.
        return failed(hold);
    }
    let body = match gathered {
        Gathered::Whole(bytes) => {
            if !parts.headers.contains_key(CONTENT_LENGTH) {
                parts
                    .headers
                    .insert(CONTENT_LENGTH, HeaderValue::from(bytes.len()));
            }
            if usage {
                headers::set(&mut parts.headers, INSULA_USAGE, &hold.exchange().usage());
            }
            let declared = parts.headers.get(CONTENT_LENGTH).map(HeaderValue::as_bytes);
            if declared != Some(bytes.len().to_string().as_bytes()) {
                return bad_response(hold, "a Content-Length that is not that of the body");
            }
            OutBody::whole(bytes, hold)
        }
        Gathered::Broken => return failed(hold),
        Gathered::Open(first, rest) => {
            let length = declared_length(&parts.headers);
            if usage {
                // A body of declared length has no trailers (RFC 9112, 7.1.2); ours is checked
                // against it all the same.
                parts.headers.remove(CONTENT_LENGTH);
                parts
                    .headers
                    .insert(TRAILER, HeaderValue::from_static("insula-usage"));
            }
            OutBody::stream(rest, hold, first, usage, length)
        }
    };
    Response::from_parts(parts, body)
}

/// The guest gave an answer that is none.
fn bad_response(mut hold: Hold, why: &str) -> Response<OutBody> {
    hold.answered(Answer::Broken);
    let exchange = hold.exchange();
    tracing::debug!(request_id = %exchange.request_id, why, "bad response");
    own(problem::problem(Outcome::BadResponse, exchange.request_id))
}

/// The guest ended without an answer.
fn failed(mut hold: Hold) -> Response<OutBody> {
    let exchange = hold.exchange();
    let outcome = match exchange.verdict() {
        None | Some(Outcome::Ok) => Outcome::BadResponse,
        Some(outcome) => outcome,
    };
    let response = match outcome {
        Outcome::BadRequest => too_large(&exchange.service, exchange.request_id),
        Outcome::TenantOverloaded | Outcome::HostOverloaded => {
            let retry = hold.retry_after();
            problem::overloaded(outcome, exchange.request_id, retry)
        }
        _ => problem::problem(outcome, exchange.request_id),
    };
    hold.answered(Answer::Broken);
    own(response)
}

/// Reads a body that nobody wants, so that its guest can come to its end.
fn drain(mut hold: Hold, mut body: ResponseBody) {
    tokio::task::spawn_local(async move {
        while let Some(Ok(_)) = next_frame(&mut body).await {}
        hold.answered(Answer::Whole);
    });
}

async fn next_frame<B: Body + Unpin>(body: &mut B) -> Option<Result<Frame<B::Data>, B::Error>> {
    std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await
}

enum Gathered {
    /// The whole body.
    Whole(Bytes),
    /// It ended in an error before anything was sent.
    Broken,
    /// What is there so far; more may come.
    Open(Vec<Frame<Bytes>>, ResponseBody),
}

/// Takes what the guest has written by now. A small answer is complete here and needs neither
/// chunks nor a second write. With `usage`, waits a little for the guest's end as well.
async fn gather(mut body: ResponseBody, exchange: &Exchange, usage: bool) -> Gathered {
    let mut frames: Vec<Frame<Bytes>> = Vec::new();
    let mut bytes = 0;
    let mut patience = usage.then(|| Box::pin(tokio::time::sleep(USAGE_WAIT)));
    let ended = std::future::poll_fn(|cx| {
        loop {
            match Pin::new(&mut body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    bytes += frame.data_ref().map_or(0, Bytes::len);
                    let more = frame.is_data() && bytes <= WHOLE_MAX_BYTES;
                    frames.push(frame);
                    if !more {
                        return Poll::Ready(Some(false));
                    }
                }
                Poll::Ready(Some(Err(_))) => return Poll::Ready(None),
                Poll::Ready(None) if !usage => return Poll::Ready(Some(true)),
                Poll::Ready(None) => {
                    // The body is whole; its usage is final when the instance is gone.
                    return match exchange.poll_done(cx) {
                        Poll::Ready(()) => Poll::Ready(Some(true)),
                        Poll::Pending => wait(&mut patience, cx),
                    };
                }
                Poll::Pending => return wait(&mut patience, cx),
            }
        }
    })
    .await;
    match ended {
        None => Gathered::Broken,
        Some(true) if frames.iter().all(Frame::is_data) => Gathered::Whole(join(frames)),
        _ => Gathered::Open(frames, body),
    }
}

fn wait(
    patience: &mut Option<Pin<Box<tokio::time::Sleep>>>,
    cx: &mut std::task::Context<'_>,
) -> Poll<Option<bool>> {
    match patience {
        None => Poll::Ready(Some(false)),
        Some(patience) => patience.as_mut().poll(cx).map(|()| Some(false)),
    }
}

fn join(frames: Vec<Frame<Bytes>>) -> Bytes {
    let mut pieces = frames
        .into_iter()
        .filter_map(|frame| frame.into_data().ok());
    let Some(first) = pieces.next() else {
        return Bytes::new();
    };
    let Some(second) = pieces.next() else {
        return first;
    };
    let mut whole = BytesMut::from(first);
    whole.extend_from_slice(&second);
    for piece in pieces {
        whole.extend_from_slice(&piece);
    }
    whole.freeze()
}
