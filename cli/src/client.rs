//! HTTP/1.1 to a host's admin API: one connection per call, everything bounded in time and size.

mod body;

use std::fmt;
use std::fs::File;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use insula_host::config::UrlScheme;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::access::{self, TokenSource};
use crate::args::Connection;
use crate::output::plain;
use crate::tls::Tls;

use body::{Body, FileBody, whole};

/// To establish a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// From the request to the whole answer; a large component takes its time to compile.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(600);
/// For an image of many gigabytes.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(4 * 3_600);
/// The largest answer that is read; lists are pages and far smaller.
const ANSWER_MAX_BYTES: usize = 64 << 20;

/// Why there is no answer to use.
#[derive(Debug)]
pub(crate) enum ClientError {
    /// Nobody answers.
    Connect {
        /// Whom we tried.
        address: String,
        /// Why not.
        reason: String,
    },
    /// The host refused. RFC 9457.
    Problem(Box<Problem>),
    /// Something else than the contract.
    Broken {
        /// What was asked.
        asked: String,
        /// What was wrong.
        reason: String,
    },
}

/// What the host said about a request that it refused.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    /// The status of the answer.
    pub(crate) status: StatusCode,
    /// The problem's stable name.
    pub(crate) code: String,
    /// In a few words.
    pub(crate) title: String,
    /// What exactly, and perhaps what to do.
    pub(crate) detail: Option<String>,
    /// Where the rejected token came from, if it was the token.
    pub(crate) token: Option<String>,
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect { address, reason } => write!(
                f,
                "no host answers at {address} ({reason})\n\
                 start one with `insula serve`, or name another with --admin"
            ),
            Self::Problem(problem) => problem.fmt(f),
            Self::Broken { asked, reason } => write!(f, "{asked}: {reason}"),
        }
    }
}

impl std::error::Error for ClientError {}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&plain(&self.title))?;
        if !self.code.is_empty() {
            write!(f, " ({})", plain(&self.code))?;
        }
        if let Some(detail) = self.detail.as_ref().filter(|detail| **detail != self.title) {
            write!(f, "\n{}", plain(detail))?;
        }
        if let Some(token) = &self.token {
            write!(f, "\n{token}")?;
        }
        Ok(())
    }
}

impl Problem {
    fn read(status: StatusCode, body: &[u8]) -> Self {
        let value: Value = serde_json::from_slice(body).unwrap_or_default();
        let text = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
        let reason = status.canonical_reason().unwrap_or("refused");
        Self {
            status,
            code: text("code").unwrap_or_default(),
            title: text("title").unwrap_or_else(|| format!("{} {reason}", status.as_u16())),
            detail: text("detail"),
            token: None,
        }
    }
}

impl ClientError {
    /// Whether the host said that there is no such thing.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Problem(problem) if problem.status == StatusCode::NOT_FOUND)
    }
}

/// An answer, read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    headers: HeaderMap,
    body: Bytes,
    asked: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Result<Value, ClientError> {
        if self.body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&self.body).map_err(|error| ClientError::Broken {
            asked: self.asked.clone(),
            reason: format!("the answer is not JSON: {error}"),
        })
    }

    pub(crate) fn etag(&self) -> Option<HeaderValue> {
        self.headers.get(header::ETAG).cloned()
    }
}

/// Speaks to one host.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    address: String,
    tls: Option<Tls>,
    token: Option<String>,
    /// Said when the host rejects the token, or its absence.
    token_source: TokenSource,
}

impl Client {
    /// A client for the host that the flags name, with the token that belongs to it.
    pub(crate) fn new(connection: &Connection) -> anyhow::Result<Self> {
        let admin = access::admin_address(&connection.admin)?;
        let address = admin.authority;
        let tls = match admin.scheme {
            UrlScheme::Http => None,
            UrlScheme::Https => Some(Tls::new(&address, connection.ca_cert.as_deref())?),
        };
        let (token, token_source) = access::find_token(
            &address,
            connection.token.as_deref(),
            connection.data.as_deref(),
        );
        Ok(Self {
            address,
            tls,
            token,
            token_source,
        })
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) async fn get(&self, path: &str) -> Result<Answer, ClientError> {
        self.call(Method::GET, path, &[], Bytes::new()).await
    }

    /// `None` where there is no such thing.
    pub(crate) async fn find(&self, path: &str) -> Result<Option<Answer>, ClientError> {
        match self.get(path).await {
            Ok(answer) => Ok(Some(answer)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) async fn put(
        &self,
        path: &str,
        body: &Value,
        if_match: Option<HeaderValue>,
    ) -> Result<Answer, ClientError> {
        let mut headers = vec![(header::CONTENT_TYPE, JSON)];
        headers.extend(if_match.map(|etag| (header::IF_MATCH, etag)));
        self.call(Method::PUT, path, &headers, body.to_string().into())
            .await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Result<Answer, ClientError> {
        let headers = [(header::CONTENT_TYPE, JSON)];
        self.call(Method::POST, path, &headers, body.to_string().into())
            .await
    }

    pub(crate) async fn post_component(
        &self,
        path: &str,
        component: Bytes,
    ) -> Result<Answer, ClientError> {
        let headers = [(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/wasm"),
        )];
        self.call(Method::POST, path, &headers, component).await
    }

    /// Sends a file as it is read.
    pub(crate) async fn put_file(&self, path: &str, file: File) -> Result<Answer, ClientError> {
        let headers = [(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/octet-stream"),
        )];
        let body = FileBody::new(file).map_err(|error| ClientError::Broken {
            asked: format!("PUT {path}"),
            reason: error.to_string(),
        })?;
        let body = Body::new(body);
        self.call_within(UPLOAD_TIMEOUT, Method::PUT, path, &headers, body)
            .await
    }

    /// Turns a connection into one of another protocol. It is driven as long as the returned set
    /// lives.
    pub(crate) async fn upgrade(
        &self,
        path: &str,
        protocol: &'static str,
    ) -> Result<(TokioIo<Upgraded>, JoinSet<()>), ClientError> {
        let headers = [
            (header::CONNECTION, HeaderValue::from_static("upgrade")),
            (header::UPGRADE, HeaderValue::from_static(protocol)),
        ];
        let body = whole(Bytes::new());
        let (response, driver) = self.send(&Method::GET, path, &headers, body).await?;
        let status = response.status();
        if status != StatusCode::SWITCHING_PROTOCOLS {
            let body = Limited::new(response.into_body(), ANSWER_MAX_BYTES)
                .collect()
                .await
                .map(http_body_util::Collected::to_bytes)
                .unwrap_or_default();
            return Err(self.problem(status, &body));
        }
        let upgraded = hyper::upgrade::on(response).await;
        let upgraded = upgraded.map_err(|error| ClientError::Broken {
            asked: format!("GET {path}"),
            reason: error.to_string(),
        })?;
        Ok((TokioIo::new(upgraded), driver))
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.call(Method::DELETE, path, &[], Bytes::new()).await?;
        Ok(())
    }

    /// Whether a host answers at all, whatever it says.
    pub(crate) async fn answers(&self) -> bool {
        match self.get("/healthz").await {
            Ok(_) | Err(ClientError::Problem(_)) => true,
            Err(ClientError::Connect { .. } | ClientError::Broken { .. }) => false,
        }
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        headers: &[(header::HeaderName, HeaderValue)],
        body: Bytes,
    ) -> Result<Answer, ClientError> {
        self.call_within(ANSWER_TIMEOUT, method, path, headers, whole(body))
            .await
    }

    async fn call_within(
        &self,
        patience: Duration,
        method: Method,
        path: &str,
        headers: &[(header::HeaderName, HeaderValue)],
        body: Body,
    ) -> Result<Answer, ClientError> {
        let asked = format!("{method} {path}");
        let broken = |reason: String| ClientError::Broken {
            asked: asked.clone(),
            reason,
        };
        let exchange = async {
            let (response, _connection) = self.send(&method, path, headers, body).await?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, ANSWER_MAX_BYTES)
                .collect()
                .await
                .map_err(|error| broken(format!("the answer broke off: {error}")))?
                .to_bytes();
            Ok((head, body))
        };
        let (head, body) = timeout(patience, exchange)
            .await
            .map_err(|_| broken(format!("no answer within {} s", patience.as_secs())))??;
        if !head.status.is_success() {
            return Err(self.problem(head.status, &body));
        }
        Ok(Answer {
            headers: head.headers,
            body,
            asked,
        })
    }

    /// An answer that is read while it comes.
    pub(crate) async fn stream(&self, path: &str) -> Result<Stream, ClientError> {
        let body = whole(Bytes::new());
        let (response, connection) = self.send(&Method::GET, path, &[], body).await?;
        let status = response.status();
        if !status.is_success() {
            let body = Limited::new(response.into_body(), ANSWER_MAX_BYTES)
                .collect()
                .await
                .map(http_body_util::Collected::to_bytes)
                .unwrap_or_default();
            return Err(self.problem(status, &body));
        }
        Ok(Stream {
            body: response.into_body(),
            buffer: Vec::new(),
            asked: format!("GET {path}"),
            _connection: connection,
        })
    }

    fn problem(&self, status: StatusCode, body: &[u8]) -> ClientError {
        let mut problem = Problem::read(status, body);
        if status == StatusCode::UNAUTHORIZED {
            problem.token = Some(self.token_source.to_string());
        }
        ClientError::Problem(Box::new(problem))
    }

    /// The connection is driven as long as the returned set lives.
    async fn send(
        &self,
        method: &Method,
        path: &str,
        headers: &[(header::HeaderName, HeaderValue)],
        body: Body,
    ) -> Result<(Response<Incoming>, JoinSet<()>), ClientError> {
        let refused = |reason: String| ClientError::Connect {
            address: self.address.clone(),
            reason,
        };
        let broken = |reason: String| ClientError::Broken {
            asked: format!("{method} {path}"),
            reason,
        };
        let tcp = timeout(CONNECT_TIMEOUT, TcpStream::connect(&self.address))
            .await
            .map_err(|_| {
                refused(format!(
                    "no connection within {} s",
                    CONNECT_TIMEOUT.as_secs()
                ))
            })?
            .map_err(|error| refused(error.to_string()))?;
        let mut driver = JoinSet::new();
        let opened = match &self.tls {
            None => open(tcp, &mut driver).await,
            Some(tls) => match timeout(CONNECT_TIMEOUT, tls.connect(tcp)).await {
                Ok(Ok(stream)) => open(stream, &mut driver).await,
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("no TLS within {} s", CONNECT_TIMEOUT.as_secs())),
            },
        };
        let mut sender = opened.map_err(refused)?;
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.address)
            .header(
                header::USER_AGENT,
                concat!("insula/", env!("CARGO_PKG_VERSION")),
            )
            .header(
                header::ACCEPT,
                "application/json, application/problem+json, */*;q=0.1",
            );
        for (name, value) in headers {
            request = request.header(name, value);
        }
        if let Some(token) = &self.token {
            let mut value = HeaderValue::try_from(format!("Bearer {token}"))
                .map_err(|_| broken("the token holds a character that no token has".to_owned()))?;
            value.set_sensitive(true);
            request = request.header(header::AUTHORIZATION, value);
        }
        let request = request
            .body(body)
            .map_err(|error| broken(error.to_string()))?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| broken(format!("no answer: {error}")))?;
        Ok((response, driver))
    }
}

/// Makes a byte stream one of HTTP, driven by a task.
async fn open<S>(stream: S, driver: &mut JoinSet<()>) -> Result<SendRequest<Body>, String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let opened = http1::handshake(TokioIo::new(stream)).await;
    let (sender, connection) = opened.map_err(|error| error.to_string())?;
    driver.spawn(async move {
        // What goes wrong here is seen by whoever waits for the answer.
        let _ = connection.with_upgrades().await;
    });
    Ok(sender)
}

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// Longest line of a stream; the host's own bound on a log line is far below.
const LINE_MAX_BYTES: usize = 1 << 20;

/// Lines, as they come.
#[derive(Debug)]
pub(crate) struct Stream {
    body: Incoming,
    buffer: Vec<u8>,
    asked: String,
    _connection: JoinSet<()>,
}

impl Stream {
    /// The next bytes; `None` when the host has sent all.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => {
                    return Err(ClientError::Broken {
                        asked: self.asked.clone(),
                        reason: format!("the stream broke off: {error}"),
                    });
                }
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// The next line without its end; `None` when the host has said all. May be cancelled: what
    /// was read of a line is kept.
    pub(crate) async fn line(&mut self) -> Result<Option<String>, ClientError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Ok(Some(String::from_utf8_lossy(&line[..end]).into_owned()));
            }
            let broken = |reason: String| ClientError::Broken {
                asked: self.asked.clone(),
                reason,
            };
            if self.buffer.len() > LINE_MAX_BYTES {
                return Err(broken("a line without an end".to_owned()));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
                Some(Err(error)) => return Err(broken(format!("the stream broke off: {error}"))),
                None if self.buffer.is_empty() => return Ok(None),
                None => {
                    let rest = std::mem::take(&mut self.buffer);
                    return Ok(Some(String::from_utf8_lossy(&rest).into_owned()));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_read_from_any_body() {
        let body = br#"{"title":"No such tenant","detail":"there is none named x","code":"tenant_not_found"}"#;
        let problem = Problem::read(StatusCode::NOT_FOUND, body);
        assert_eq!(
            problem.to_string(),
            "No such tenant (tenant_not_found)\nthere is none named x"
        );
        let plain = Problem::read(StatusCode::BAD_GATEWAY, b"<html>");
        assert_eq!(plain.to_string(), "502 Bad Gateway");
    }
}
