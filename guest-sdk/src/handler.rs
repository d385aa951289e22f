//! What a handler is, and what it may return.

use bytes::Bytes;
use http::StatusCode;

use crate::{Body, Error, Request, Response};

/// Anything that a handler may return.
///
/// Beside [`Response`] and [`http::Response`] there are texts, bytes, a status
/// with one of these, `()` for 204, and a `Result` of any of them.
pub trait IntoResponse {
    /// Makes the response.
    fn into_response(self) -> Response;
}

impl IntoResponse for Response {
    fn into_response(self) -> Response {
        self
    }
}

impl<B: Into<Body>> IntoResponse for http::Response<B> {
    fn into_response(self) -> Response {
        self.map(Into::into).into()
    }
}

impl IntoResponse for () {
    fn into_response(self) -> Response {
        Response::empty(StatusCode::NO_CONTENT)
    }
}

impl IntoResponse for StatusCode {
    fn into_response(self) -> Response {
        Response::empty(self)
    }
}

impl IntoResponse for &'static str {
    fn into_response(self) -> Response {
        Response::text(self)
    }
}

impl IntoResponse for String {
    fn into_response(self) -> Response {
        Response::text(self)
    }
}

impl IntoResponse for Bytes {
    fn into_response(self) -> Response {
        Response::bytes("application/octet-stream", self)
    }
}

impl IntoResponse for Vec<u8> {
    fn into_response(self) -> Response {
        Bytes::from(self).into_response()
    }
}

impl<T: IntoResponse> IntoResponse for (StatusCode, T) {
    fn into_response(self) -> Response {
        self.1.into_response().with_status(self.0)
    }
}

impl<T: IntoResponse, E: Into<Error>> IntoResponse for Result<T, E> {
    fn into_response(self) -> Response {
        match self {
            Ok(value) => value.into_response(),
            Err(error) => error.into().into_response(),
        }
    }
}

/// Calls a handler; an error becomes its response.
pub(crate) async fn respond<H, A, F>(handler: H, request: Request) -> Response
where
    H: FnOnce(A) -> F,
    A: From<Request>,
    F: Future<Output: IntoResponse>,
{
    handler(request.into()).await.into_response()
}

/// Has the compiler check natively that a function is a handler.
#[doc(hidden)]
pub fn check<H, A, F>(_: H)
where
    H: FnOnce(A) -> F,
    A: From<Request>,
    F: Future<Output: IntoResponse>,
{
}
