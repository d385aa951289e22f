//! HTTP for the admin API: connections, authentication, dispatch.
//!
//! Bounds: a permit per connection before it is accepted, a timer on the head, on each wait for a
//! body's bytes and on idle connections, caps on heads and bodies.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;

use super::Control;
use super::auth::{self, Need};
use super::http_types::{Body, Call};
use super::problem::{Answer, Problem};
use super::router;
use super::start::Stop;

/// Connections at once.
const CONNECTIONS_MAX: usize = 256;
/// Longest wait for a request's head, also on an idle connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Most header fields of a request.
const HEADERS_MAX: usize = 64;
/// Largest head.
const HEAD_MAX_BYTES: usize = 32 << 10;
/// How long connections may finish what they do when the host stops.
const GRACE: Duration = Duration::from_secs(5);
/// Pause after the system refused a connection, mostly for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `stop` comes; then lets running requests finish within [`GRACE`].
pub(super) async fn serve(
    control: Rc<Control>,
    listener: TcpListener,
    mut stop: oneshot::Receiver<Stop>,
) -> Stop {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    let stop = loop {
        // A connection that is accepted in the very moment of the stop is closed unread.
        tokio::select! {
            stop = &mut stop => break stop.unwrap_or_default(),
            accepted = accept(&listener, &permits) => {
                let Some((stream, peer, permit)) = accepted else { continue };
                let control = Rc::clone(&control);
                connections.spawn_local(async move {
                    welcome(control, stream, peer).await;
                    drop(permit);
                });
            }
            Some(_) = connections.join_next() => {}
        }
    };
    drop(listener);
    control.stopping.send_replace(true);
    let finished = tokio::time::timeout(GRACE, async {
        while connections.join_next().await.is_some() {}
    });
    if finished.await.is_err() {
        tracing::warn!(
            connections = connections.len(),
            "admin connections were cut"
        );
    }
    connections.shutdown().await;
    stop
}

/// The permit comes first: without one, connections wait in the kernel's queue.
async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> Option<(TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
    let permit = Arc::clone(permits).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, peer)) => Some((stream, peer, permit)),
        Err(error) => {
            tracing::warn!(%error, "an admin connection was not accepted");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}

async fn welcome(control: Rc<Control>, stream: TcpStream, peer: SocketAddr) {
    // Answers are written whole; waiting for more would only delay them.
    let _ = stream.set_nodelay(true);
    let Some(certificate) = control.config.certificate.clone() else {
        return connection(control, stream, peer).await;
    };
    match certificate.handshake(stream).await {
        Ok(stream) => connection(control, stream, peer).await,
        Err(error) => tracing::debug!(%peer, %error, "no TLS"),
    }
}

async fn connection<S>(control: Rc<Control>, stream: S, peer: SocketAddr)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut stopping = control.stopping.subscribe();
    let service = service_fn(move |request| {
        let control = Rc::clone(&control);
        async move { Ok::<_, Infallible>(respond(control, request, peer).await) }
    });
    let mut serving = std::pin::pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_headers(HEADERS_MAX)
            .max_buf_size(HEAD_MAX_BYTES)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
    );
    let result = tokio::select! {
        result = &mut serving => result,
        // The connection itself goes on below, to finish the request that it is at.
        _ = stopping.wait_for(|stopping| *stopping) => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%peer, %error, "an admin connection ended badly");
    }
}

async fn respond(
    control: Rc<Control>,
    request: Request<Incoming>,
    peer: SocketAddr,
) -> Response<Body> {
    let (answer, answered) = oneshot::channel();
    let background = Rc::clone(&control);
    // In a task of its own: a client that goes away does not leave a change half done.
    control.spawn(async move {
        // The client may be gone by now.
        let _ = answer.send(dispatch(background, request, peer).await);
    });
    let answer = answered.await;
    let answer = answer.unwrap_or_else(|_| Err(Problem::internal(&"a handler ended early")));
    match answer {
        Ok(reply) => reply.0,
        Err(problem) => problem.into_response(),
    }
}

async fn dispatch(control: Rc<Control>, request: Request<Incoming>, peer: SocketAddr) -> Answer {
    let (mut head, body) = request.into_parts();
    auth::check_origin(&head.headers)?;
    let found = router::find(&head.method, head.uri.path());
    let public = match found.as_ref().map(|found| found.route.need) {
        Ok(Need::Public) => true,
        Ok(Need::PublicOnLoopback) => control.admin.ip().is_loopback(),
        _ => false,
    };
    // Who has no token does not learn which paths and methods there are, nor what is wrong.
    let caller = if public {
        None
    } else {
        Some(auth::authenticate(&control, &head.headers).await?)
    };
    let found = found?;
    if let Some(caller) = &caller {
        auth::authorize(caller, found.route.need, found.params.tenant.as_ref())?;
    }
    let query = router::query(found.route, head.uri.query())?;
    let (id, token) = (found.route.id, caller.as_ref().map(|caller| caller.token));
    let changes = found.route.method != Method::GET;
    let call = Call {
        caller,
        peer,
        operation: id,
        method: head.method,
        path: head.uri.path().to_owned(),
        query,
        params: found.params,
        upgrade: head.extensions.remove::<OnUpgrade>(),
        headers: head.headers,
        body,
    };
    let path = changes.then(|| call.path.clone());
    let answer = (found.route.handler)(control, call).await;
    if let Some(path) = path {
        let result = match &answer {
            Ok(_) => "done",
            Err(problem) => problem.code().as_str(),
        };
        tracing::info!(target: "insula::audit", token, %peer, operation = id, path, result);
    }
    answer
}
