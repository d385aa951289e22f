//! The request, as a handler gets it.

use std::cell::OnceCell;
use std::fmt;
use std::ops::{Deref, DerefMut};

use bytes::Bytes;
use http::{HeaderMap, Method};

use crate::{Body, Result};

/// An HTTP request: an [`http::Request<Body>`] with a few shortcuts.
///
/// In a guest the head is fetched from the host when it is first looked at, so
/// that a handler which does not care pays nothing for it.
///
/// ```
/// use insula_sdk::{Method, Request};
///
/// let req = Request::post("http://shop.example/items/7?colour=dark%20blue", "{}");
/// assert_eq!(req.method(), Method::POST);
/// assert_eq!(req.uri().path(), "/items/7");
/// assert_eq!(req.query("colour").as_deref(), Some("dark blue"));
/// assert_eq!(req.header("accept"), None);
/// ```
pub struct Request {
    inner: OnceCell<http::Request<Body>>,
    #[cfg(target_os = "wasi")]
    source: std::cell::Cell<Option<crate::guest::Source>>,
}

impl Request {
    /// A GET request, for tests.
    ///
    /// # Panics
    /// When `uri` is none.
    pub fn get(uri: &str) -> Self {
        Self::with(Method::GET, uri, Body::empty())
    }

    /// A POST request, for tests.
    ///
    /// # Panics
    /// When `uri` is none.
    pub fn post(uri: &str, body: impl Into<Body>) -> Self {
        Self::with(Method::POST, uri, body.into())
    }

    fn with(method: Method, uri: &str, body: Body) -> Self {
        let uri: http::Uri = match uri.parse() {
            Ok(uri) => uri,
            Err(error) => panic!("{uri:?} is no URI: {error}"),
        };
        let mut request = http::Request::new(body);
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        request.into()
    }

    #[cfg(target_os = "wasi")]
    pub(crate) fn from_source(source: crate::guest::Source) -> Self {
        Self {
            inner: OnceCell::new(),
            source: std::cell::Cell::new(Some(source)),
        }
    }

    /// Puts the same header on it, replacing those of the same name.
    ///
    /// # Errors
    /// When name or value are not allowed in HTTP.
    pub fn with_header(mut self, name: &str, value: &str) -> Result<Self> {
        let name = http::HeaderName::try_from(name)?;
        self.headers_mut().insert(name, value.try_into()?);
        Ok(self)
    }

    /// A header's value, if it is there once or more (then the first) and is
    /// plain ASCII.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers().get(name)?.to_str().ok()
    }

    /// The first value of a parameter in the query, decoded.
    pub fn query(&self, name: &str) -> Option<String> {
        self.query_pairs()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value)
    }

    /// All parameters in the query, decoded.
    pub fn query_pairs(&self) -> impl Iterator<Item = (String, String)> {
        let query = self.uri().query().unwrap_or_default();
        query
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                (decode(key), decode(value))
            })
    }

    /// The next chunk of the body; see [`Body::chunk`].
    ///
    /// # Errors
    /// As [`Body::chunk`].
    pub async fn chunk(&mut self) -> Result<Option<Bytes>> {
        self.body_mut().chunk().await
    }

    /// The whole body; see [`Body::bytes`].
    ///
    /// # Errors
    /// As [`Body::bytes`].
    pub async fn bytes(&mut self) -> Result<Bytes> {
        self.body_mut().bytes().await
    }

    /// The whole body as text; see [`Body::text`].
    ///
    /// # Errors
    /// As [`Body::text`].
    pub async fn text(&mut self) -> Result<String> {
        self.body_mut().text().await
    }

    /// The whole body, parsed as JSON.
    ///
    /// # Errors
    /// As [`Body::bytes`], and with status 400 when it does not parse.
    #[cfg(feature = "json")]
    pub async fn json<T: serde::de::DeserializeOwned>(&mut self) -> Result<T> {
        serde_json::from_slice(&self.bytes().await?).map_err(|error| {
            crate::Error::bad_request(format!("the body is not the JSON expected: {error}"))
        })
    }

    /// The request's body alone.
    pub fn into_body(self) -> Body {
        self.into_inner().into_body()
    }

    /// The `http` crate's request.
    pub fn into_inner(self) -> http::Request<Body> {
        let _ = self.fetched();
        self.inner.into_inner().unwrap_or_default()
    }

    fn fetched(&self) -> &http::Request<Body> {
        self.inner.get_or_init(|| {
            #[cfg(target_os = "wasi")]
            if let Some(source) = self.source.take() {
                return source.fetch();
            }
            http::Request::default()
        })
    }
}

impl Deref for Request {
    type Target = http::Request<Body>;

    fn deref(&self) -> &Self::Target {
        self.fetched()
    }
}

impl DerefMut for Request {
    fn deref_mut(&mut self) -> &mut Self::Target {
        let _ = self.fetched();
        match self.inner.get_mut() {
            Some(request) => request,
            None => unreachable!("it was fetched just now"),
        }
    }
}

impl<B: Into<Body>> From<http::Request<B>> for Request {
    fn from(request: http::Request<B>) -> Self {
        Self {
            inner: request.map(Into::into).into(),
            #[cfg(target_os = "wasi")]
            source: std::cell::Cell::default(),
        }
    }
}

impl From<Request> for http::Request<Body> {
    fn from(request: Request) -> Self {
        request.into_inner()
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let headers: &HeaderMap = self.headers();
        f.debug_struct("Request")
            .field("method", self.method())
            .field("uri", self.uri())
            .field("headers", headers)
            .field("body", self.body())
            .finish()
    }
}

/// Percent-decoding as in forms (WHATWG URL, `application/x-www-form-urlencoded`).
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        match (first, tail) {
            (b'+', _) => bytes.push(b' '),
            (b'%', [high, low, after @ ..]) => match (hex(*high), hex(*low)) {
                (Some(high), Some(low)) => {
                    bytes.push(high << 4 | low);
                    rest = after;
                }
                _ => bytes.push(b'%'),
            },
            _ => bytes.push(*first),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn hex(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded() {
        let req = Request::get("/?a=1&b=x+y%2Fz&flag&c=%C3%A4%zz%4&a=2");
        assert_eq!(req.query("a").unwrap(), "1");
        assert_eq!(req.query("b").unwrap(), "x y/z");
        assert_eq!(req.query("flag").unwrap(), "");
        assert_eq!(req.query("c").unwrap(), "ä%zz%4");
        assert_eq!(req.query("d"), None);
    }
}
