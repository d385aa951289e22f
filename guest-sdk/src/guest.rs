//! Between the handler and `wasi:http` 0.2.
//!
//! ```text
//! run ─▶ handler ─▶ head to the host ─▶ body, chunk by chunk ─▶ finish
//!          │                               │
//!          └ stalled: 500                  ├ client gone: quietly dropped
//!                                          └ body failed: dropped unfinished, logged;
//!                                            the host breaks the response off
//! ```

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::{self, HeaderName};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use http_body::Frame;
use wasip2::http::types::{
    Fields, FutureTrailers, IncomingBody, IncomingRequest, IncomingResponse, Method as WasiMethod,
    OutgoingBody, OutgoingResponse, ResponseOutparam, Scheme as WasiScheme,
};
use wasip2::io::streams::{InputStream, OutputStream, StreamError};

use crate::rt::{self, Wait};
use crate::{Body, Error, IntoResponse, Request, Response, Result, handler, log};

/// How much of a request's body is taken from the host at once.
const READ_BYTES: u64 = 64 * 1024;

/// Headers that belong to the connection, not to the response: the host sets
/// them, and refuses a guest that does (RFC 9110, section 7.6.1).
pub(crate) const HOP_BY_HOP: [HeaderName; 5] = [
    header::CONNECTION,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

/// What the component's export does.
#[doc(hidden)]
pub fn run<H, A, F>(request: IncomingRequest, to: ResponseOutparam, handler: H)
where
    H: FnOnce(A) -> F,
    A: From<Request>,
    F: Future<Output: IntoResponse>,
{
    log::panics();
    let request = Request::from_source(Source(request));
    let response =
        rt::block_on(handler::respond(handler, request)).unwrap_or_else(|rt::Stalled| {
            Error::internal("the handler waits for something that cannot happen").into_response()
        });
    if rt::block_on(send(response, to)).is_err() {
        log::error!("the response's body waits for something that cannot happen");
    }
}

/// A request of which nothing has been fetched yet.
pub(crate) struct Source(IncomingRequest);

impl Source {
    /// Copies the head over.
    ///
    /// # Panics
    /// When the host hands over what is not HTTP.
    pub(crate) fn fetch(self) -> http::Request<Body> {
        match head(&self.0) {
            Ok(head) => head.map(|()| Body::wrap(Incoming::new(Message::Request(self.0)))),
            Err(error) => panic!("the host's request is not HTTP: {error}"),
        }
    }
}

fn head(from: &IncomingRequest) -> http::Result<http::Request<()>> {
    let mut request = http::Request::new(());
    *request.method_mut() = method(from.method())?;
    let mut uri = Uri::builder();
    let path = from.path_with_query();
    let path: PathAndQuery = path.as_deref().unwrap_or("/").parse()?;
    if let Some(authority) = from.authority() {
        let authority: Authority = authority.parse()?;
        uri = uri.scheme(scheme(from.scheme())?).authority(authority);
    }
    *request.uri_mut() = uri.path_and_query(path).build()?;
    *request.headers_mut() = headers(&from.headers())?;
    Ok(request)
}

fn method(method: WasiMethod) -> http::Result<Method> {
    Ok(match method {
        WasiMethod::Get => Method::GET,
        WasiMethod::Head => Method::HEAD,
        WasiMethod::Post => Method::POST,
        WasiMethod::Put => Method::PUT,
        WasiMethod::Delete => Method::DELETE,
        WasiMethod::Connect => Method::CONNECT,
        WasiMethod::Options => Method::OPTIONS,
        WasiMethod::Trace => Method::TRACE,
        WasiMethod::Patch => Method::PATCH,
        WasiMethod::Other(name) => Method::from_bytes(name.as_bytes())?,
    })
}

fn scheme(scheme: Option<WasiScheme>) -> http::Result<Scheme> {
    Ok(match scheme {
        None | Some(WasiScheme::Http) => Scheme::HTTP,
        Some(WasiScheme::Https) => Scheme::HTTPS,
        Some(WasiScheme::Other(name)) => name.parse()?,
    })
}

pub(crate) fn headers(fields: &Fields) -> http::Result<HeaderMap> {
    let entries = fields.entries();
    let mut headers = HeaderMap::with_capacity(entries.len());
    for (name, value) in entries {
        headers.append(HeaderName::try_from(name)?, HeaderValue::try_from(value)?);
    }
    Ok(headers)
}

/// What a body came with.
pub(crate) enum Message {
    Request(IncomingRequest),
    Response(IncomingResponse),
}

impl Message {
    fn consume(&self) -> Result<IncomingBody, ()> {
        match self {
            Self::Request(request) => request.consume(),
            Self::Response(response) => response.consume(),
        }
    }

    fn broken(&self, why: &str) -> Error {
        let (status, what) = match self {
            Self::Request(_) => (StatusCode::BAD_REQUEST, "the request's body broke off"),
            Self::Response(_) => (StatusCode::BAD_GATEWAY, "the body of an answer broke off"),
        };
        Error::new(status, what).with_source(why.to_owned())
    }
}

/// The body of a request, or of the answer to one that was sent.
pub(crate) enum Incoming {
    Untouched(Message),
    Data(Data),
    Trailers(Trailing),
    Over,
}

/// The fields are in the order in which the host wants them dropped: a child
/// before its parent.
pub(crate) struct Data {
    wait: Option<Wait>,
    stream: InputStream,
    body: IncomingBody,
    message: Message,
}

/// As in [`Data`].
pub(crate) struct Trailing {
    wait: Option<Wait>,
    trailers: FutureTrailers,
    message: Message,
}

impl Data {
    fn open(message: Message) -> Result<Self> {
        let taken = |()| Error::internal("a body was taken already");
        let body = message.consume().map_err(taken)?;
        let stream = body.stream().map_err(taken)?;
        Ok(Self {
            wait: None,
            stream,
            body,
            message,
        })
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.wait
            .get_or_insert_with(|| Wait::new(self.stream.subscribe()))
            .poll(cx)
    }

    fn finish(self) -> Trailing {
        let Self {
            wait,
            stream,
            body,
            message,
        } = self;
        drop(wait);
        drop(stream);
        Trailing {
            wait: None,
            trailers: IncomingBody::finish(body),
            message,
        }
    }
}

impl Trailing {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.wait
            .get_or_insert_with(|| Wait::new(self.trailers.subscribe()))
            .poll(cx)
    }
}

impl Incoming {
    pub(crate) const fn new(message: Message) -> Self {
        Self::Untouched(message)
    }
}

impl http_body::Body for Incoming {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>>>> {
        loop {
            // `Over` stays if anything below fails: a broken body has ended.
            match std::mem::replace(&mut *self, Self::Over) {
                Self::Untouched(message) => *self = Self::Data(Data::open(message)?),
                Self::Data(mut data) => match data.stream.read(READ_BYTES) {
                    Ok(bytes) if bytes.is_empty() => {
                        let ready = data.poll_ready(cx);
                        *self = Self::Data(data);
                        ready!(ready);
                    }
                    Ok(bytes) => {
                        *self = Self::Data(data);
                        return Poll::Ready(Some(Ok(Frame::data(bytes.into()))));
                    }
                    Err(StreamError::Closed) => *self = Self::Trailers(data.finish()),
                    Err(StreamError::LastOperationFailed(error)) => {
                        let error = data.message.broken(&error.to_debug_string());
                        return Poll::Ready(Some(Err(error)));
                    }
                },
                Self::Trailers(mut trailing) => match trailing.trailers.get() {
                    None => {
                        let ready = trailing.poll_ready(cx);
                        *self = Self::Trailers(trailing);
                        ready!(ready);
                    }
                    Some(Ok(Ok(Some(fields)))) => {
                        return Poll::Ready(Some(Ok(Frame::trailers(headers(&fields)?))));
                    }
                    Some(Ok(Err(error))) => {
                        let error = trailing.message.broken(&format!("{error:?}"));
                        return Poll::Ready(Some(Err(error)));
                    }
                    Some(Ok(Ok(None)) | Err(())) => return Poll::Ready(None),
                },
                Self::Over => return Poll::Ready(None),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Over)
    }
}

/// Gives the response to the host, and its body as fast as the host takes it.
async fn send(response: Response, to: ResponseOutparam) {
    let (mut head, body) = response.into_inner().into_parts();
    let response = match outgoing(&mut head, &body) {
        Ok(response) => response,
        Err(error) => {
            log::error!("the response is not sent: {error}");
            let plain = OutgoingResponse::new(Fields::new());
            let _ = plain.set_status_code(StatusCode::INTERNAL_SERVER_ERROR.as_u16());
            ResponseOutparam::set(to, Ok(plain));
            return;
        }
    };
    let Ok(outgoing) = response.body() else {
        return;
    };
    ResponseOutparam::set(to, Ok(response));
    let written = match write_body(&outgoing, body).await {
        Ok(trailers) => trailers.as_ref().map(fields).transpose(),
        Err(Stopped::ClientGone) => return,
        Err(Stopped::Failed(error)) => Err(error),
    };
    match written {
        Ok(trailers) => {
            if let Err(error) = OutgoingBody::finish(outgoing, trailers) {
                log::error!(
                    "the response's body is not whole",
                    error = log::debug(&error)
                );
            }
        }
        // Dropping the body without finishing it tells the host that it is cut off.
        Err(error) if error.status().is_client_error() => {
            log::warn!("the response's body broke off: {error}");
        }
        Err(error) => log::error!("the response's body failed: {error}"),
    }
}

fn outgoing(head: &mut http::response::Parts, body: &Body) -> Result<OutgoingResponse> {
    for name in &HOP_BY_HOP {
        head.headers.remove(name);
    }
    let bodiless = head.status.is_informational()
        || head.status == StatusCode::NO_CONTENT
        || head.status == StatusCode::NOT_MODIFIED;
    if let (Some(bytes), false) = (body.in_memory_bytes(), bodiless) {
        head.headers
            .entry(header::CONTENT_LENGTH)
            .or_insert(HeaderValue::from(bytes));
    }
    let response = OutgoingResponse::new(fields(&head.headers)?);
    let code = head.status.as_u16();
    if code != 200 {
        response
            .set_status_code(code)
            .map_err(|()| Error::internal(format!("the host refuses status {code}")))?;
    }
    Ok(response)
}

pub(crate) fn fields(headers: &HeaderMap) -> Result<Fields> {
    let entries: Vec<(String, Vec<u8>)> = headers
        .iter()
        .map(|(name, value)| (name.as_str().to_owned(), value.as_bytes().to_owned()))
        .collect();
    Fields::from_list(&entries)
        .map_err(|error| Error::internal(format!("the host refuses a header: {error:?}")))
}

/// Why a body was not written to its end.
pub(crate) enum Stopped {
    ClientGone,
    Failed(Error),
}

impl From<StreamError> for Stopped {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Closed => Self::ClientGone,
            StreamError::LastOperationFailed(error) => {
                Self::Failed(Error::internal(error.to_debug_string()))
            }
        }
    }
}

pub(crate) async fn write_body(
    to: &OutgoingBody,
    body: Body,
) -> Result<Option<HeaderMap>, Stopped> {
    if body.in_memory_bytes() == Some(0) {
        return Ok(None);
    }
    let Ok(stream) = to.write() else {
        return Err(Stopped::ClientGone);
    };
    let mut out = Out { wait: None, stream };
    let mut body = pin!(body);
    while let Some(frame) = poll_fn(|cx| http_body::Body::poll_frame(body.as_mut(), cx)).await {
        let frame = frame.map_err(Stopped::Failed)?;
        match frame.into_data() {
            Ok(data) => out.write(data).await?,
            Err(frame) => return Ok(frame.into_trailers().ok()),
        }
        if !http_body::Body::is_end_stream(&*body) {
            // What was written must not wait for what may come much later.
            out.stream.flush()?;
        }
    }
    Ok(None)
}

struct Out {
    // Dropped before the stream that it came from.
    wait: Option<Wait>,
    stream: OutputStream,
}

impl Out {
    async fn write(&mut self, mut data: Bytes) -> Result<(), Stopped> {
        while !data.is_empty() {
            let permit = self.stream.check_write()?;
            if permit == 0 {
                let wait = self
                    .wait
                    .get_or_insert_with(|| Wait::new(self.stream.subscribe()));
                poll_fn(|cx| wait.poll(cx)).await;
                continue;
            }
            let most = usize::try_from(permit)
                .unwrap_or(usize::MAX)
                .min(data.len());
            self.stream.write(&data.split_to(most))?;
        }
        Ok(())
    }
}
