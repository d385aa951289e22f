//! Between [`fetch`](crate::fetch()) and `wasi:http/outgoing-handler` 0.2.
//!
//! The request's body is written while its answer is waited for and, where the answer comes first,
//! while its body is read: a server may answer before it has read everything.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::uri::Scheme;
use http::{Method, StatusCode, header};
use http_body::Frame;
use wasip2::http::outgoing_handler::handle;
use wasip2::http::types::{
    ErrorCode, FutureIncomingResponse, IncomingResponse, Method as WasiMethod, OutgoingBody,
    OutgoingRequest, Scheme as WasiScheme,
};

use crate::guest::{HOP_BY_HOP, Incoming, Message, fields, headers, write_body};
use crate::rt::Wait;
use crate::{Body, Error, FetchError, Response, Result};

type Writing = Pin<Box<dyn Future<Output = ()>>>;

/// Sends a request; the answer's head has come when this returns.
pub(crate) async fn send(request: http::Request<Body>) -> Result<Response, FetchError> {
    let (mut head, body) = request.into_parts();
    for name in HOP_BY_HOP {
        head.headers.remove(name);
    }
    head.headers.remove(header::HOST);
    if let Some(bytes) = body.in_memory_bytes()
        && (bytes > 0 || head.method == Method::POST || head.method == Method::PUT)
    {
        let entry = head.headers.entry(header::CONTENT_LENGTH);
        entry.or_insert(bytes.into());
    }
    let request = outgoing(&head)?;
    let to = request.body();
    let to = to.map_err(|()| FetchError::new("configuration-error"))?;
    let coming = handle(request, None).map_err(|code| failed(&code))?;
    let mut writing: Option<Writing> = Some(Box::pin(write(to, body)));
    let mut coming = Coming { wait: None, coming };
    let response = poll_fn(|cx| {
        writing.take_if(|writing| writing.as_mut().poll(cx).is_ready());
        coming.poll(cx)
    });
    let response = response.await?;
    let mut answer = http::Response::new(());
    let status = StatusCode::from_u16(response.status());
    let protocol_error = |_| FetchError::new("HTTP-protocol-error");
    *answer.status_mut() = status.map_err(|_| FetchError::new("HTTP-protocol-error"))?;
    *answer.headers_mut() = headers(&response.headers()).map_err(protocol_error)?;
    let body = Answer {
        writing,
        body: Incoming::new(Message::Response(response)),
    };
    Ok(answer.map(|()| Body::wrap(body)).into())
}

fn outgoing(head: &http::request::Parts) -> Result<OutgoingRequest, FetchError> {
    let refused = |()| FetchError::new("HTTP-request-URI-invalid");
    let fields = fields(&head.headers).map_err(|_| FetchError::new("HTTP-request-header-size"))?;
    let request = OutgoingRequest::new(fields);
    request.set_method(&method(&head.method)).map_err(refused)?;
    let scheme = match head.uri.scheme() {
        Some(scheme) if *scheme == Scheme::HTTP => WasiScheme::Http,
        Some(scheme) if *scheme == Scheme::HTTPS => WasiScheme::Https,
        _ => return Err(refused(())),
    };
    request.set_scheme(Some(&scheme)).map_err(refused)?;
    let authority = head.uri.authority().map(http::uri::Authority::as_str);
    request.set_authority(authority).map_err(refused)?;
    let path = head.uri.path_and_query();
    let path = path.map_or("/", http::uri::PathAndQuery::as_str);
    request.set_path_with_query(Some(path)).map_err(refused)?;
    Ok(request)
}

fn method(method: &Method) -> WasiMethod {
    match *method {
        Method::GET => WasiMethod::Get,
        Method::HEAD => WasiMethod::Head,
        Method::POST => WasiMethod::Post,
        Method::PUT => WasiMethod::Put,
        Method::DELETE => WasiMethod::Delete,
        Method::CONNECT => WasiMethod::Connect,
        Method::OPTIONS => WasiMethod::Options,
        Method::TRACE => WasiMethod::Trace,
        Method::PATCH => WasiMethod::Patch,
        _ => WasiMethod::Other(method.as_str().to_owned()),
    }
}

/// Writes a request's body. When it fails, the other side sees that it is cut off.
async fn write(to: OutgoingBody, body: Body) {
    let Ok(trailers) = write_body(&to, body).await else {
        return;
    };
    let trailers = trailers.as_ref().map(fields).transpose();
    if let Ok(trailers) = trailers {
        // What is wrong with it is told with the answer.
        let _ = OutgoingBody::finish(to, trailers);
    }
}

/// The answer that has not come yet. The fields are in the order in which the host wants them
/// dropped.
struct Coming {
    wait: Option<Wait>,
    coming: FutureIncomingResponse,
}

impl Coming {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<IncomingResponse, FetchError>> {
        loop {
            match self.coming.get() {
                Some(Ok(Ok(response))) => return Poll::Ready(Ok(response)),
                Some(Ok(Err(code))) => return Poll::Ready(Err(failed(&code))),
                Some(Err(())) => return Poll::Ready(Err(FetchError::new("internal-error"))),
                None => {
                    let wait = self
                        .wait
                        .get_or_insert_with(|| Wait::new(self.coming.subscribe()));
                    ready!(wait.poll(cx));
                }
            }
        }
    }
}

/// The body of an answer, and what is left to write of the request's.
struct Answer {
    writing: Option<Writing>,
    body: Incoming,
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>>>> {
        let this = &mut *self;
        this.writing
            .take_if(|writing| writing.as_mut().poll(cx).is_ready());
        Pin::new(&mut this.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

/// The error by its name in WIT.
fn failed(code: &ErrorCode) -> FetchError {
    let name = match code {
        ErrorCode::DnsTimeout => "DNS-timeout",
        ErrorCode::DnsError(_) => "DNS-error",
        ErrorCode::DestinationNotFound => "destination-not-found",
        ErrorCode::DestinationUnavailable => "destination-unavailable",
        ErrorCode::DestinationIpProhibited => "destination-IP-prohibited",
        ErrorCode::DestinationIpUnroutable => "destination-IP-unroutable",
        ErrorCode::ConnectionRefused => "connection-refused",
        ErrorCode::ConnectionTerminated => "connection-terminated",
        ErrorCode::ConnectionTimeout => "connection-timeout",
        ErrorCode::ConnectionReadTimeout => "connection-read-timeout",
        ErrorCode::ConnectionLimitReached => "connection-limit-reached",
        ErrorCode::TlsProtocolError => "TLS-protocol-error",
        ErrorCode::TlsCertificateError => "TLS-certificate-error",
        ErrorCode::TlsAlertReceived(_) => "TLS-alert-received",
        ErrorCode::HttpRequestDenied => "HTTP-request-denied",
        ErrorCode::HttpRequestMethodInvalid => "HTTP-request-method-invalid",
        ErrorCode::HttpRequestUriInvalid => "HTTP-request-URI-invalid",
        ErrorCode::HttpRequestUriTooLong => "HTTP-request-URI-too-long",
        ErrorCode::HttpRequestBodySize(_) => "HTTP-request-body-size",
        ErrorCode::HttpResponseIncomplete => "HTTP-response-incomplete",
        ErrorCode::HttpResponseHeaderSectionSize(_) => "HTTP-response-header-section-size",
        ErrorCode::HttpResponseBodySize(_) => "HTTP-response-body-size",
        ErrorCode::HttpResponseTimeout => "HTTP-response-timeout",
        ErrorCode::HttpProtocolError => "HTTP-protocol-error",
        other => return FetchError::new(format!("{other:?}")),
    };
    FetchError::new(name)
}
