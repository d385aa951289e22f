//! One request, from the guest's word to the end of the answer's body.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::{HOST, HeaderName, TE, TRAILER};
use http::uri::{PathAndQuery, Scheme};
use http::{HeaderValue, Method, Request, Response, Uri};
use http_body_util::BodyExt;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use insula_metrics::{Direction, OutboundResult, TenantMetrics};
use insula_types::TenantId;
use insula_types::outbound::{Destination, OutboundHost, OutboundRule, OutboundScheme};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::body::{Received, Sent};
use super::place::{Place, Places};
use super::{Outbound, Unanswered, allows};
use crate::engine::outgoing::{Answered, Errand, OutgoingBody, Patience};
use crate::engine::run::BodyError;
use crate::engine::{LogLine, LogSink};
use crate::messages::{Found, LogSource, Question};

/// For a connection, TLS included; a guest may want less.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// For the head of the answer, and for each piece of its body; a guest may want less. Its own
/// deadline is shorter, as a rule.
const SILENCE_MAX: Duration = Duration::from_secs(300);
/// Addresses of one name that are tried.
const ADDRESSES_TRIED: usize = 4;
/// Longest path with query: what servers take (RFC 9110, 4.1, asks for 8,000).
const PATH_MAX_BYTES: usize = 16 << 10;
/// Largest head of an answer; hyper's smallest buffer is 8 KiB.
const HEAD_MAX_BYTES: usize = 32 << 10;
/// Header fields of an answer.
const FIELDS_MAX: usize = 128;

/// What a request needs of the one that it belongs to: its log, and somebody who pays.
pub trait Clerk: LogSink + Send + Sync {
    /// So much CPU time was used for it elsewhere.
    fn pays(&self, cpu_ns: u64);
}

/// Sends the requests of one instance.
pub struct Sender {
    /// The host's way out.
    pub host: Arc<Outbound>,
    /// The service's list.
    pub rules: Arc<[OutboundRule]>,
    /// Whose request it is.
    pub tenant: TenantId,
    /// The tenant's places.
    pub places: Arc<Places>,
    /// Where it is counted.
    pub metrics: Arc<TenantMetrics>,
    /// The request that the guest is answering.
    pub clerk: Arc<dyn Clerk>,
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sender")
            .field("rules", &self.rules)
            .finish_non_exhaustive()
    }
}

/// A request that may go, and all that goes with it.
struct Going {
    to: Destination,
    request: Request<Sent>,
    places: (Place, Place),
}

/// What a connection needs to be driven with.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

impl Sender {
    /// The whole errand. Whatever happens is told through `answer`; when nobody waits for that any
    /// more, the request is given up.
    pub async fn send(
        self,
        request: Request<OutgoingBody>,
        patience: Patience,
        mut answer: oneshot::Sender<Answered>,
    ) {
        // Either may win: the request is dropped with all that it holds.
        let begun = tokio::select! {
            biased;
            () = answer.closed() => None,
            begun = self.begin(request, patience) => Some(begun),
        };
        let Some(begun) = begun else {
            self.metrics.outbound_ended(OutboundResult::Abandoned);
            return;
        };
        match begun {
            Ok((response, rest)) => {
                self.metrics.outbound_ended(OutboundResult::Ok);
                if answer.send(Ok(response)).is_ok() {
                    rest.await;
                }
            }
            Err(error) => {
                self.metrics.outbound_ended(result_of(&error));
                // The guest may have gone meanwhile.
                let _ = answer.send(Err(error));
            }
        }
    }

    /// Everything until the head of the answer is there; and what moves its body after that.
    async fn begin(
        &self,
        request: Request<OutgoingBody>,
        patience: Patience,
    ) -> Result<(Response<OutgoingBody>, Errand), BodyError> {
        let Going {
            to,
            request,
            places,
        } = self.check(request)?;
        let addresses = self.resolve(&to).await?;
        let connect = patience.connect.unwrap_or(CONNECT_MAX).min(CONNECT_MAX);
        let stream = timeout(connect, self.connect(&to, &addresses)).await;
        let stream = stream.map_err(|_| BodyError::ConnectionTimeout)??;
        let mut builder = http1::Builder::new();
        builder.max_buf_size(HEAD_MAX_BYTES).max_headers(FIELDS_MAX);
        let (mut sender, connection) = builder
            .handshake::<_, Sent>(TokioIo::new(stream))
            .await
            .map_err(|error| protocol_error(&error))?;
        let mut connection = Some(Box::pin(connection));
        let first = patience.first_byte.unwrap_or(SILENCE_MAX).min(SILENCE_MAX);
        let mut head = std::pin::pin!(timeout(first, sender.send_request(request)));
        let head = poll_fn(|cx| {
            // It may end first, where the answer came with its end.
            connection.take_if(|connection| connection.as_mut().poll(cx).is_ready());
            head.as_mut().poll(cx)
        });
        let response = head
            .await
            .map_err(|_| BodyError::HttpResponseTimeout)?
            .map_err(|error| protocol_error(&error))?;
        let fields = response.headers().iter();
        let bytes: usize = fields
            .map(|(name, value)| name.as_str().len() + value.len())
            .sum();
        self.metrics.add_outbound_bytes(Direction::In, bytes as u64);
        let between = patience
            .between_bytes
            .unwrap_or(SILENCE_MAX)
            .min(SILENCE_MAX);
        let metrics = Arc::clone(&self.metrics);
        let response = response.map(|body| Received::new(body, metrics, between).boxed_unsync());
        let rest: Errand = Box::pin(async move {
            if let Some(connection) = connection {
                // How it ends is told by the body.
                let _ = connection.await;
            }
            drop(places);
        });
        Ok((response, rest))
    }

    /// Whether the request may go at all, and how it reads then.
    fn check(&self, request: Request<OutgoingBody>) -> Result<Going, BodyError> {
        let (mut parts, body) = request.into_parts();
        let scheme = match parts.uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => OutboundScheme::Http,
            Some(scheme) if *scheme == Scheme::HTTPS => OutboundScheme::Https,
            _ => return Err(BodyError::HttpProtocolError),
        };
        let authority = parts.uri.authority();
        let authority = authority
            .map(http::uri::Authority::as_str)
            .unwrap_or_default();
        let to =
            Destination::new(scheme, authority).map_err(|_| BodyError::HttpRequestUriInvalid)?;
        if !allows(&self.rules, &to) {
            let (scheme, to) = (scheme.as_str(), to.authority());
            self.say(&format!(
                "outbound: {scheme}://{to} is not on the service's list"
            ));
            return Err(BodyError::HttpRequestDenied);
        }
        if parts.method == Method::CONNECT {
            return Err(BodyError::HttpRequestMethodInvalid);
        }
        let path = parts.uri.path_and_query().map_or("/", PathAndQuery::as_str);
        if path.len() > PATH_MAX_BYTES {
            return Err(BodyError::HttpRequestUriTooLong);
        }
        // The whole of it: "*" is for OPTIONS (RFC 9112, 3.2.4), a URI for proxies (3.2.2).
        let whole_server = path == "*" && parts.method == Method::OPTIONS;
        if !path.starts_with('/') && !whole_server {
            return Err(BodyError::HttpRequestUriInvalid);
        }
        let path: Uri = path.parse().map_err(|_| BodyError::HttpRequestUriInvalid)?;
        parts.uri = path;
        let host = HeaderValue::try_from(to.authority());
        let host = host.map_err(|_| BodyError::HttpRequestUriInvalid)?;
        parts.headers.insert(HOST, host);
        for name in [TE, TRAILER, HeaderName::from_static("proxy-connection")] {
            parts.headers.remove(name);
        }
        let fields = parts.headers.iter();
        let bytes: usize = fields
            .map(|(name, value)| name.as_str().len() + value.len())
            .sum();
        let places = self.places.take().zip(self.host.places.take());
        let places = places.ok_or(BodyError::ConnectionLimitReached)?;
        self.metrics
            .add_outbound_bytes(Direction::Out, bytes as u64);
        let body = Sent::new(body, Arc::clone(&self.metrics));
        Ok(Going {
            to,
            request: Request::from_parts(parts, body),
            places,
        })
    }

    fn say(&self, text: &str) {
        self.clerk
            .line(LogLine::new(LogSource::Host, text.as_bytes()));
    }

    /// The addresses of a destination, all of which are allowed.
    async fn resolve(&self, to: &Destination) -> Result<Vec<SocketAddr>, BodyError> {
        let port = to.port();
        if to.scheme() == OutboundScheme::Https && !self.host.tls.is_loaded() {
            let roots = match self.ask(Question::Roots).await? {
                Ok(Found::Roots(roots)) => roots,
                // It is asked again with the next request.
                _ => return Err(BodyError::InternalError(None)),
            };
            self.host.tls.load(roots);
        }
        let addresses = match to.host() {
            OutboundHost::Address(address) => vec![SocketAddr::new(*address, port)],
            OutboundHost::Name(name) => {
                let name = name.clone();
                match self.ask(Question::Addresses { name, port }).await? {
                    Ok(Found::Addresses(addresses)) => addresses,
                    other => {
                        tracing::debug!(?other, "a name could not be resolved");
                        return Err(BodyError::DnsError {
                            rcode: None,
                            info_code: None,
                        });
                    }
                }
            }
        };
        let policy = &self.host.policy;
        let closed = |address: &&SocketAddr| {
            let ip = address.ip();
            !policy.allows(ip) || (!policy.is_opened(ip) && is_own(**address))
        };
        if let Some(address) = addresses.iter().find(closed) {
            let (host, ip) = (to.host(), address.ip());
            self.say(&format!(
                "outbound: {host} is at {ip}, which is closed to guests"
            ));
            return Err(BodyError::DestinationIpProhibited);
        }
        Ok(addresses)
    }

    /// Asks the other process, at the tenant's expense.
    async fn ask(&self, question: Question) -> Result<Result<Found, String>, BodyError> {
        let answer = self.host.inquiries.ask(self.tenant, question).await;
        let answer = answer.map_err(|unanswered| match unanswered {
            Unanswered::Late => BodyError::DnsTimeout,
            Unanswered::Gone => BodyError::InternalError(None),
        })?;
        self.clerk.pays(answer.cpu_ns);
        Ok(answer.found)
    }

    /// Connects to the first address that answers.
    async fn connect(
        &self,
        to: &Destination,
        addresses: &[SocketAddr],
    ) -> Result<Box<dyn Stream>, BodyError> {
        let mut error = BodyError::DestinationNotFound;
        for address in addresses.iter().take(ADDRESSES_TRIED) {
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    // Heads are small and go out alone; a refusal costs time, nothing else.
                    let _ = stream.set_nodelay(true);
                    if to.scheme() == OutboundScheme::Http {
                        return Ok(Box::new(stream));
                    }
                    let name = match to.host() {
                        OutboundHost::Name(name) => name.clone(),
                        OutboundHost::Address(address) => address.to_string(),
                    };
                    let stream = self.host.tls.connect(&name, stream).await?;
                    return Ok(Box::new(stream));
                }
                Err(refused) => error = connect_error(&refused),
            }
        }
        Err(error)
    }
}

/// Whether an address is one of this host's: the kernel goes there from there. Sends nothing.
fn is_own(address: SocketAddr) -> bool {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let from = || {
        let socket = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        rustix::net::connect(&socket, &address)?;
        SocketAddr::try_from(rustix::net::getsockname(&socket)?)
    };
    from().is_ok_and(|from| from.ip() == address.ip())
}

fn connect_error(error: &std::io::Error) -> BodyError {
    use std::io::ErrorKind as Kind;
    match error.kind() {
        Kind::ConnectionRefused => BodyError::ConnectionRefused,
        Kind::TimedOut => BodyError::ConnectionTimeout,
        Kind::NetworkUnreachable | Kind::HostUnreachable => BodyError::DestinationIpUnroutable,
        _ => BodyError::DestinationUnavailable,
    }
}

fn protocol_error(error: &hyper::Error) -> BodyError {
    if error.is_parse_too_large() {
        return BodyError::HttpResponseHeaderSectionSize(u32::try_from(HEAD_MAX_BYTES).ok());
    }
    if error.is_incomplete_message() {
        return BodyError::HttpResponseIncomplete;
    }
    if error.is_user() || error.is_parse() {
        return BodyError::HttpProtocolError;
    }
    BodyError::ConnectionTerminated
}

/// How an error is counted.
const fn result_of(error: &BodyError) -> OutboundResult {
    use BodyError as E;
    match error {
        E::HttpRequestDenied
        | E::HttpRequestUriInvalid
        | E::HttpRequestUriTooLong
        | E::HttpRequestMethodInvalid => OutboundResult::Denied,
        E::DestinationIpProhibited => OutboundResult::Prohibited,
        E::ConnectionLimitReached => OutboundResult::Limited,
        E::DnsError { .. } | E::DnsTimeout => OutboundResult::Dns,
        E::ConnectionRefused
        | E::DestinationIpUnroutable
        | E::DestinationUnavailable
        | E::DestinationNotFound => OutboundResult::Connect,
        E::TlsCertificateError | E::TlsProtocolError | E::TlsAlertReceived { .. } => {
            OutboundResult::Tls
        }
        E::ConnectionTimeout | E::HttpResponseTimeout | E::ConnectionReadTimeout => {
            OutboundResult::Timeout
        }
        _ => OutboundResult::Protocol,
    }
}
