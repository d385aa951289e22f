//! The floor under every HTTP server in Rust: hyper, a current-thread runtime per core, one
//! listener each (SO_REUSEPORT), and an answer that is ready before it is asked for.
//!
//! The answer has the same fields and the same body as Insula's, so that both write the same bytes.

use std::convert::Infallible;
use std::net::SocketAddr;

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::task::{LocalSet, spawn_local};

use crate::cores::Cores;

const BODY: &[u8] = b"Hello from Insula\n";
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const BACKLOG: i32 = 1024;

/// What the floor is started with.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Where to listen
    #[arg(long)]
    listen: SocketAddr,
    /// Threads
    #[arg(long)]
    workers: usize,
}

/// Serves until it is ended.
pub(crate) fn run(options: &Options) -> Result<()> {
    let cores = Cores::allowed()?;
    let workers: Vec<_> = (0..options.workers)
        .map(|index| {
            let (core, address) = (cores.one(index), options.listen);
            std::thread::spawn(move || {
                core.bind()?;
                worker(address)
            })
        })
        .collect();
    for worker in workers {
        worker
            .join()
            .unwrap_or_else(|_| anyhow::bail!("a worker panicked"))?;
    }
    Ok(())
}

fn worker(address: SocketAddr) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    LocalSet::new().block_on(&runtime, async {
        let listener = tokio::net::TcpListener::from_std(listen(address)?)?;
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            // Ends with its client, or with the process.
            spawn_local(async move {
                let service = service_fn(|_| async { Ok::<_, Infallible>(answer()) });
                // A client that goes away is no event here.
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    })
}

fn answer() -> hyper::Response<Full<Bytes>> {
    let mut response = hyper::Response::new(Full::new(Bytes::from_static(BODY)));
    let fields = response.headers_mut();
    fields.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    fields.insert(REQUEST_ID, HeaderValue::from_static("0123456789abcdef"));
    response
}

fn listen(address: SocketAddr) -> Result<std::net::TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket
        .bind(&address.into())
        .with_context(|| format!("listening on {address}"))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}
