//! Bodies, in both directions.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use futures_core::Stream;
use http::{HeaderMap, StatusCode};
use http_body::{Frame, SizeHint};

use crate::writer::Written;
use crate::{Error, Result, Writer};

/// The body of a request or a response: nothing, bytes in memory, or a stream.
///
/// ```
/// use insula_sdk::{Body, test};
///
/// let mut body = Body::stream(|mut writer| async move {
///     for n in 1..=3 {
///         writer.write(format!("{n} ")).await?;
///     }
///     Ok(())
/// });
/// test::run(async {
///     while let Some(chunk) = body.chunk().await.unwrap() {
///         assert_eq!(chunk.len(), 2);
///     }
/// });
/// ```
#[derive(Default)]
pub struct Body {
    kind: Kind,
    /// Read while looking for data.
    trailers: Option<HeaderMap>,
}

type Boxed = Pin<Box<dyn http_body::Body<Data = Bytes, Error = Error>>>;

#[derive(Default)]
enum Kind {
    #[default]
    Empty,
    Full(Bytes),
    Streamed(Boxed),
}

impl Body {
    /// No body.
    pub fn empty() -> Self {
        Self::default()
    }

    /// A body that `write` writes while it is sent. The function runs only as
    /// fast as the client reads, and is dropped when the client goes away. If it
    /// fails, the body ends there, and the client sees that it is cut off.
    pub fn stream<F>(write: impl FnOnce(Writer) -> F) -> Self
    where
        F: Future<Output = Result<()>> + 'static,
    {
        Self::wrap(Written::new(write))
    }

    /// A body out of a stream of chunks.
    pub fn from_stream<S, C, E>(stream: S) -> Self
    where
        S: Stream<Item = Result<C, E>> + 'static,
        C: Into<Bytes>,
        E: Into<Error>,
    {
        Self::wrap(Chunks(Box::pin(stream)))
    }

    /// Any other body.
    pub fn wrap<B>(body: B) -> Self
    where
        B: http_body::Body<Data = Bytes, Error = Error> + 'static,
    {
        Self {
            kind: Kind::Streamed(Box::pin(body)),
            trailers: None,
        }
    }

    /// The next chunk, or `None` at the end.
    ///
    /// # Errors
    /// When the body breaks off, for instance because the client went away.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>> {
        poll_fn(|cx| self.poll_chunk(cx)).await
    }

    /// All of what is left.
    ///
    /// # Errors
    /// As [`Body::chunk`].
    pub async fn bytes(&mut self) -> Result<Bytes> {
        self.bytes_up_to(usize::MAX).await
    }

    /// All of what is left, if that is no more than `limit_bytes`.
    ///
    /// # Errors
    /// As [`Body::chunk`], and with status 413 when it is more.
    pub async fn bytes_up_to(&mut self, limit_bytes: usize) -> Result<Bytes> {
        let first = self.chunk().await?.unwrap_or_default();
        let mut all = None::<BytesMut>;
        let mut size = first.len();
        while size <= limit_bytes {
            let Some(chunk) = self.chunk().await? else {
                return Ok(all.map_or(first, BytesMut::freeze));
            };
            size = size.saturating_add(chunk.len());
            all.get_or_insert_with(|| BytesMut::from(&first[..]))
                .extend_from_slice(&chunk);
        }
        Err(Error::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body is larger than {limit_bytes} bytes"),
        ))
    }

    /// All of what is left, as UTF-8.
    ///
    /// # Errors
    /// As [`Body::chunk`], and with status 400 when it is not UTF-8.
    pub async fn text(&mut self) -> Result<String> {
        String::from_utf8(self.bytes().await?.into())
            .map_err(|error| Error::bad_request("the body is not UTF-8").with_source(error))
    }

    /// The trailers, once the data is at its end; before that, the rest of the
    /// data is skipped.
    ///
    /// # Errors
    /// As [`Body::chunk`].
    pub async fn trailers(&mut self) -> Result<Option<HeaderMap>> {
        while self.chunk().await?.is_some() {}
        Ok(self.trailers.take())
    }

    /// Its size, if it is known before reading.
    pub fn size_bytes(&self) -> Option<u64> {
        http_body::Body::size_hint(self).exact()
    }

    /// Its size, if it is all in memory.
    #[cfg_attr(
        not(target_os = "wasi"),
        allow(dead_code, reason = "only a guest sends")
    )]
    pub(crate) fn in_memory_bytes(&self) -> Option<usize> {
        match &self.kind {
            Kind::Empty => Some(0),
            Kind::Full(bytes) => Some(bytes.len()),
            Kind::Streamed(_) => None,
        }
    }

    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>>> {
        loop {
            let frame = ready!(http_body::Body::poll_frame(Pin::new(&mut *self), cx)?);
            let Some(frame) = frame else {
                return Poll::Ready(Ok(None));
            };
            match frame.into_data() {
                Ok(data) if data.is_empty() => {}
                Ok(data) => return Poll::Ready(Ok(Some(data))),
                Err(frame) => self.trailers = frame.into_trailers().ok(),
            }
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>>>> {
        match &mut self.kind {
            Kind::Streamed(body) => body.as_mut().poll_frame(cx),
            kind => match std::mem::take(kind) {
                Kind::Full(bytes) if !bytes.is_empty() => Poll::Ready(Some(Ok(Frame::data(bytes)))),
                _ => Poll::Ready(None),
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Empty => true,
            Kind::Full(bytes) => bytes.is_empty(),
            Kind::Streamed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Empty => SizeHint::with_exact(0),
            Kind::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Kind::Streamed(body) => body.size_hint(),
        }
    }
}

/// The chunks, without the trailers.
impl Stream for Body {
    type Item = Result<Bytes>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll_chunk(cx).map(Result::transpose)
    }
}

/// A stream as a body.
struct Chunks<S>(Pin<Box<S>>);

impl<S, C, E> http_body::Body for Chunks<S>
where
    S: Stream<Item = Result<C, E>>,
    C: Into<Bytes>,
    E: Into<Error>,
{
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>>>> {
        let next = ready!(self.0.as_mut().poll_next(cx));
        Poll::Ready(next.map(|chunk| match chunk {
            Ok(chunk) => Ok(Frame::data(chunk.into())),
            Err(error) => Err(error.into()),
        }))
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self {
            kind: Kind::Full(bytes),
            trailers: None,
        }
    }
}

impl From<&'static str> for Body {
    fn from(text: &'static str) -> Self {
        Bytes::from(text).into()
    }
}

impl From<String> for Body {
    fn from(text: String) -> Self {
        Bytes::from(text).into()
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Self {
        Bytes::from(bytes).into()
    }
}

impl From<&'static [u8]> for Body {
    fn from(bytes: &'static [u8]) -> Self {
        Bytes::from(bytes).into()
    }
}

impl From<()> for Body {
    fn from((): ()) -> Self {
        Self::empty()
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::Empty => f.write_str("Body(empty)"),
            Kind::Full(bytes) => write!(f, "Body({} bytes)", bytes.len()),
            Kind::Streamed(_) => f.write_str("Body(streamed)"),
        }
    }
}
