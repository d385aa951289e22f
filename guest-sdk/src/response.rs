//! The response, as a handler makes it.

use std::ops::{Deref, DerefMut};

use http::header::{CONTENT_TYPE, LOCATION};
use http::{HeaderName, HeaderValue, StatusCode};

use crate::{Body, Result, Writer};

/// An HTTP response: an [`http::Response<Body>`] with shortcuts for making one.
///
/// A body in memory gets its `content-length` by itself.
///
/// ```
/// use insula_sdk::{Response, Result, StatusCode};
///
/// fn teapot() -> Result<Response> {
///     Response::text("short and stout\n")
///         .with_status(StatusCode::IM_A_TEAPOT)
///         .with_header("cache-control", "no-store")
/// }
/// assert_eq!(teapot().unwrap().headers()["cache-control"], "no-store");
/// ```
#[derive(Debug, Default)]
pub struct Response(http::Response<Body>);

impl Response {
    /// 200 with this body and no headers.
    pub fn new(body: impl Into<Body>) -> Self {
        Self(http::Response::new(body.into()))
    }

    /// This status without a body.
    pub fn empty(status: StatusCode) -> Self {
        Self::new(Body::empty()).with_status(status)
    }

    /// 200 with plain text.
    pub fn text(text: impl Into<Body>) -> Self {
        Self::bytes("text/plain; charset=utf-8", text)
    }

    /// 200 with HTML.
    pub fn html(text: impl Into<Body>) -> Self {
        Self::bytes("text/html; charset=utf-8", text)
    }

    /// 200 with this content type.
    pub fn bytes(content_type: &'static str, body: impl Into<Body>) -> Self {
        let mut response = Self::new(body);
        response
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        response
    }

    /// 200 with a value as JSON.
    ///
    /// # Errors
    /// When the value cannot be JSON (a map whose keys are no strings).
    #[cfg(feature = "json")]
    pub fn json(value: &impl serde::Serialize) -> Result<Self> {
        Ok(Self::bytes("application/json", serde_json::to_vec(value)?))
    }

    /// 200 with a body that is written while it is sent; see [`Body::stream`].
    ///
    /// ```
    /// use std::time::Duration;
    /// use insula_sdk::{Request, Response, time};
    ///
    /// async fn handle(_: Request) -> Response {
    ///     Response::stream("text/event-stream", |mut writer| async move {
    ///         for n in 0..3 {
    ///             writer.write(format!("data: {n}\n\n")).await?;
    ///             time::sleep(Duration::from_millis(1)).await;
    ///         }
    ///         Ok(())
    ///     })
    /// }
    /// # use insula_sdk::test::{call, run};
    /// # let text = run(async { call(handle, Request::get("/")).await.body_mut().text().await.unwrap() });
    /// # assert_eq!(text, "data: 0\n\ndata: 1\n\ndata: 2\n\n");
    /// ```
    pub fn stream<F>(content_type: &'static str, write: impl FnOnce(Writer) -> F) -> Self
    where
        F: Future<Output = Result<()>> + 'static,
    {
        Self::bytes(content_type, Body::stream(write))
    }

    /// 303, so that the client fetches `location` instead.
    ///
    /// # Errors
    /// When `location` cannot be a header's value.
    pub fn redirect(location: &str) -> Result<Self> {
        let mut response = Self::empty(StatusCode::SEE_OTHER);
        response
            .headers_mut()
            .insert(LOCATION, location.try_into()?);
        Ok(response)
    }

    /// The same with another status.
    #[must_use]
    pub fn with_status(mut self, status: StatusCode) -> Self {
        *self.status_mut() = status;
        self
    }

    /// The same with this header, replacing those of the same name.
    ///
    /// # Errors
    /// When name or value are not allowed in HTTP.
    pub fn with_header(mut self, name: &str, value: &str) -> Result<Self> {
        let name = HeaderName::try_from(name)?;
        self.headers_mut().insert(name, value.try_into()?);
        Ok(self)
    }

    /// The response's body alone.
    pub fn into_body(self) -> Body {
        self.0.into_body()
    }

    /// The `http` crate's response.
    pub fn into_inner(self) -> http::Response<Body> {
        self.0
    }
}

impl Deref for Response {
    type Target = http::Response<Body>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Response {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl From<http::Response<Body>> for Response {
    fn from(response: http::Response<Body>) -> Self {
        Self(response)
    }
}

impl From<Response> for http::Response<Body> {
    fn from(response: Response) -> Self {
        response.0
    }
}
