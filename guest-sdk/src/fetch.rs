//! Requests to other servers.

use std::borrow::Cow;
use std::fmt;

use crate::{Request, Response};

/// Sends a request and waits for the head of the answer; its body comes as it is read.
///
/// The URI is absolute: `https://api.example.com/v1/items`. On Insula a service reaches what its
/// `outbound` list names, and nothing else. Redirects are not followed, cookies not kept. When the
/// future is dropped, so is the request.
///
/// ```
/// use insula_sdk::{Request, Response, Result};
///
/// async fn handle(req: Request) -> Result<Response> {
///     let items = Request::post("https://api.example.com/v1/items", req.into_body());
///     insula_sdk::fetch(items).await.map_err(Into::into)
/// }
/// ```
///
/// # Errors
/// [`FetchError`] when there is no answer. An answer of any status is one.
pub async fn fetch(request: impl Into<Request>) -> Result<Response, FetchError> {
    #[cfg(target_os = "wasi")]
    return crate::outgoing::send(request.into().into_inner()).await;
    #[cfg(not(target_os = "wasi"))]
    crate::test::fetched(request.into())
        .await
        .ok_or_else(|| FetchError::new("nothing answers in this test: see test::answer_fetches"))
}

/// Why there is no answer.
#[derive(Clone, PartialEq, Eq)]
pub struct FetchError(Cow<'static, str>);

impl FetchError {
    pub(crate) fn new(code: impl Into<Cow<'static, str>>) -> Self {
        Self(code.into())
    }

    /// The error's name in `wasi:http/types`, such as `HTTP-request-denied` (the destination is not
    /// on the service's list), `destination-IP-prohibited`, `DNS-error`, `connection-refused`,
    /// `connection-timeout`, `connection-limit-reached` or `TLS-certificate-error`.
    #[must_use]
    pub fn code(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for FetchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no answer: {}", self.0)
    }
}

impl fmt::Debug for FetchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for FetchError {}
