//! A request and its answer, as handlers see them.

use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::Stream;
use http::header::{CONTENT_TYPE, ETAG, HeaderName, HeaderValue};
use http::{HeaderMap, Method, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::upgrade::OnUpgrade;
use insula_types::{ImageName, MachineName, ServiceName, TenantName, VolumeName};
use serde_json::{Map, Value};

use super::auth::Caller;
use super::changes::Actor;
use super::problem::{Code, Problem};
use crate::state::{Page, Precondition};

/// Largest JSON document that is read.
pub(crate) const JSON_MAX_BYTES: usize = 1 << 20;
/// Longest wait for the next bytes of a body.
pub(crate) const BODY_IDLE: Duration = Duration::from_secs(15);
/// Longest time for a whole JSON body.
const JSON_TOTAL: Duration = Duration::from_secs(30);
/// Items in one part of a list when the caller sets no `limit`, and at most.
const PAGE_DEFAULT: u32 = 100;
pub(crate) const PAGE_MAX: u32 = 500;

/// The body of an answer. Never leaves the control thread.
pub(crate) type Body = Pin<Box<dyn http_body::Body<Data = Bytes, Error = std::io::Error>>>;

pub(crate) fn full(content: impl Into<Bytes>) -> Body {
    Box::pin(Full::new(content.into()).map_err(|never| match never {}))
}

/// An answer.
pub(crate) struct Reply(pub(crate) Response<Body>);

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Reply").field(&self.0.status()).finish()
    }
}

impl Reply {
    fn with_type(status: StatusCode, content_type: &'static str, body: Body) -> Self {
        let mut response = Response::new(body);
        *response.status_mut() = status;
        response
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        Self(response)
    }

    pub(crate) fn json(status: StatusCode, document: &Value) -> Self {
        Self::with_type(status, "application/json", full(document.to_string()))
    }

    /// JSON that was written down earlier.
    pub(crate) fn json_text(status: StatusCode, document: String) -> Self {
        Self::with_type(status, "application/json", full(document))
    }

    pub(crate) fn ok(document: &Value) -> Self {
        Self::json(StatusCode::OK, document)
    }

    pub(crate) fn text(content_type: &'static str, text: String) -> Self {
        Self::with_type(StatusCode::OK, content_type, full(text))
    }

    pub(crate) fn no_content() -> Self {
        let mut response = Response::new(full(Bytes::new()));
        *response.status_mut() = StatusCode::NO_CONTENT;
        Self(response)
    }

    /// The connection is the handler's from here on.
    pub(crate) fn switching_protocols() -> Self {
        let mut response = Response::new(full(Bytes::new()));
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        Self(response)
    }

    pub(crate) fn stream(
        content_type: &'static str,
        chunks: impl Stream<Item = Bytes> + 'static,
    ) -> Self {
        Self::try_stream(content_type, futures::StreamExt::map(chunks, Ok))
    }

    /// A stream that can fail; the connection breaks off then, so that nobody takes a part for
    /// the whole.
    pub(crate) fn try_stream(
        content_type: &'static str,
        chunks: impl Stream<Item = std::io::Result<Bytes>> + 'static,
    ) -> Self {
        let frames = futures::StreamExt::map(chunks, |chunk| chunk.map(Frame::data));
        let body = Box::pin(StreamBody::new(frames));
        Self::with_type(StatusCode::OK, content_type, body)
    }

    pub(crate) fn header(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.0.headers_mut().insert(name, value);
        }
        self
    }

    pub(crate) fn etag(self, generation: u64) -> Self {
        self.header(ETAG, &format!("\"{generation}\""))
    }
}

/// The variable parts of a path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Params {
    pub(crate) tenant: Option<TenantName>,
    pub(crate) service: Option<ServiceName>,
    pub(crate) volume: Option<VolumeName>,
    pub(crate) machine: Option<MachineName>,
    pub(crate) image: Option<ImageName>,
    pub(crate) id: Option<u64>,
}

/// A request that was routed and whose caller is known.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) caller: Option<Caller>,
    pub(crate) peer: SocketAddr,
    /// The operation's name in the API's description.
    pub(crate) operation: &'static str,
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) query: Vec<(String, String)>,
    pub(crate) params: Params,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Incoming,
    /// The connection itself, where the client offers it for another protocol.
    pub(crate) upgrade: Option<OnUpgrade>,
}

impl Call {
    /// The tenant of the path. The router has checked that the pattern has one.
    pub(crate) fn tenant(&self) -> Result<TenantName, Problem> {
        self.params
            .tenant
            .clone()
            .ok_or_else(|| Problem::not_found("tenant"))
    }

    /// The service of the path.
    pub(crate) fn service(&self) -> Result<ServiceName, Problem> {
        self.params
            .service
            .clone()
            .ok_or_else(|| Problem::not_found("service"))
    }

    /// The volume of the path.
    pub(crate) fn volume(&self) -> Result<VolumeName, Problem> {
        let volume = self.params.volume.clone();
        volume.ok_or_else(|| Problem::not_found("volume"))
    }

    /// The machine of the path.
    pub(crate) fn machine(&self) -> Result<MachineName, Problem> {
        let machine = self.params.machine.clone();
        machine.ok_or_else(|| Problem::not_found("machine"))
    }

    /// The image of the path.
    pub(crate) fn image(&self) -> Result<ImageName, Problem> {
        let image = self.params.image.clone();
        image.ok_or_else(|| Problem::not_found("image"))
    }

    /// Who calls. The router has authenticated all but the public routes.
    pub(crate) fn caller(&self) -> Result<&Caller, Problem> {
        let missing = || Problem::new(Code::Unauthorized, "a token is needed");
        self.caller.as_ref().ok_or_else(missing)
    }

    /// Who makes the change that this call asks for.
    pub(crate) fn actor(&self) -> Result<Actor, Problem> {
        let caller = self.caller()?;
        let peer = self.peer.to_string();
        Ok(Actor::caller(
            caller.token,
            &caller.name,
            peer,
            self.operation,
        ))
    }

    pub(crate) fn parameter(&self, name: &str) -> Option<&str> {
        let found = self.query.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }

    pub(crate) fn flag(&self, name: &str, default: bool) -> Result<bool, Problem> {
        match self.parameter(name) {
            None => Ok(default),
            Some("" | "true" | "1") => Ok(true),
            Some("false" | "0") => Ok(false),
            Some(other) => Err(Problem::new(
                Code::BadRequest,
                format_args!("{name} is true or false, not {other:?}"),
            )),
        }
    }

    pub(crate) fn number(&self, name: &str, max: u32) -> Result<Option<u32>, Problem> {
        let Some(text) = self.parameter(name) else {
            return Ok(None);
        };
        match text.parse() {
            Ok(number) if number <= max => Ok(Some(number)),
            _ => Err(Problem::new(
                Code::BadRequest,
                format_args!("{name} is a number up to {max}, not {text:?}"),
            )),
        }
    }

    pub(crate) fn page(&self) -> Result<Page, Problem> {
        let limit = self
            .number("limit", PAGE_MAX)?
            .unwrap_or(PAGE_DEFAULT)
            .max(1);
        let after = self.parameter("continue").map(str::to_owned);
        Ok(Page { after, limit })
    }

    /// `If-Match` and `If-None-Match: *`.
    pub(crate) fn precondition(&self) -> Result<Precondition, Problem> {
        let bad = |name: &str| {
            Problem::new(
                Code::BadRequest,
                format_args!("{name} is one ETag of this host, or *"),
            )
        };
        if let Some(value) = self.headers.get("if-match") {
            let value = value.to_str().map_err(|_| bad("If-Match"))?.trim();
            if value == "*" {
                return Ok(Precondition::Exists);
            }
            let quoted = value
                .strip_prefix('"')
                .and_then(|rest| rest.strip_suffix('"'));
            let generation = quoted
                .unwrap_or(value)
                .parse()
                .map_err(|_| bad("If-Match"))?;
            return Ok(Precondition::Generation(generation));
        }
        match self.headers.get("if-none-match") {
            None => Ok(Precondition::None),
            Some(value) if value == "*" => Ok(Precondition::Absent),
            Some(_) => Err(bad("If-None-Match")),
        }
    }

    /// The content type without its parameters, lower case.
    pub(crate) fn content_type(&self) -> String {
        let value = self
            .headers
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok());
        let essence = value
            .and_then(|value| value.split(';').next())
            .unwrap_or("");
        essence.trim().to_ascii_lowercase()
    }

    /// Refuses a body that is not what the route takes.
    pub(crate) fn expect_type(&self, wanted: &str) -> Result<(), Problem> {
        let given = self.content_type();
        if given != wanted {
            return Err(Problem::new(
                Code::UnsupportedMediaType,
                format_args!("send Content-Type: {wanted}, not {given:?}"),
            ));
        }
        match self.headers.get("content-encoding") {
            Some(value) if value != "identity" => Err(Problem::new(
                Code::UnsupportedMediaType,
                "send the body as it is, without Content-Encoding",
            )),
            _ => Ok(()),
        }
    }

    /// The declared length, when it is beyond what is taken.
    pub(crate) fn expect_length(&self, max: u64) -> Result<(), Problem> {
        let declared = http_body::Body::size_hint(&self.body).lower();
        if declared > max {
            Err(too_large(max))
        } else {
            Ok(())
        }
    }

    /// The whole body, up to [`JSON_MAX_BYTES`].
    pub(crate) async fn small_body(&mut self) -> Result<Bytes, Problem> {
        self.expect_length(JSON_MAX_BYTES as u64)?;
        let reading = async {
            let mut content = BytesMut::new();
            while let Some(chunk) = next_chunk(&mut self.body).await? {
                if content.len() + chunk.len() > JSON_MAX_BYTES {
                    return Err(too_large(JSON_MAX_BYTES as u64));
                }
                content.extend_from_slice(&chunk);
            }
            Ok(content.freeze())
        };
        let timeout = tokio::time::timeout(JSON_TOTAL, reading).await;
        timeout.unwrap_or_else(|_| Err(body_timeout()))
    }

    /// A JSON object, and the hash of its bytes.
    pub(crate) async fn json(&mut self) -> Result<(Map<String, Value>, [u8; 32]), Problem> {
        self.expect_type("application/json")?;
        let content = self.small_body().await?;
        let document = serde_json::from_slice(&content)
            .map_err(|error| Problem::new(Code::MalformedJson, error))?;
        match document {
            Value::Object(object) => Ok((object, super::sha256(&content))),
            _ => Err(Problem::new(
                Code::InvalidSpec,
                "the document is not an object",
            )),
        }
    }

    /// A spec that is put: what [`Call::json`] gives, without the fields that answers add.
    pub(crate) async fn spec<T: serde::de::DeserializeOwned>(
        &mut self,
        name: &str,
        read_only: &[&str],
    ) -> Result<T, Problem> {
        let (mut document, _) = self.json().await?;
        if let Some(given) = document.remove("name")
            && given != name
        {
            return Err(Problem::new(
                Code::NameMismatch,
                format_args!("the path names {name:?}, the document {given}"),
            ));
        }
        for field in read_only {
            document.remove(*field);
        }
        serde_json::from_value(Value::Object(document))
            .map_err(|error| Problem::new(Code::InvalidSpec, error))
    }
}

/// The next bytes of a body; `None` at its end.
pub(crate) async fn next_chunk(body: &mut Incoming) -> Result<Option<Bytes>, Problem> {
    loop {
        let frame = tokio::time::timeout(BODY_IDLE, body.frame()).await;
        match frame.map_err(|_| body_timeout())? {
            None => return Ok(None),
            Some(Err(error)) => return Err(Problem::new(Code::BodyIncomplete, error)),
            // Trailers mean nothing here.
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

fn body_timeout() -> Problem {
    Problem::new(
        Code::BodyTimeout,
        "the rest of the body did not come in time",
    )
}

pub(crate) fn too_large(max: u64) -> Problem {
    Problem::new(
        Code::TooLarge,
        format_args!("at most {max} bytes are taken"),
    )
}

/// A list in the form that all lists have.
pub(crate) fn list(items: Vec<Value>, next: Option<String>) -> Reply {
    Reply::ok(&serde_json::json!({"items": items, "next": next}))
}
