//! A body that is written while it is sent.

use std::cell::RefCell;
use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::HeaderMap;
use http_body::Frame;

use crate::{Error, Result};

/// The writing end of a streamed body; see [`Body::stream`](crate::Body::stream).
///
/// It holds one chunk at most: [`Writer::write`] waits until the one before is
/// on its way to the client, so a slow client slows the guest down.
pub struct Writer {
    slot: Weak<RefCell<Slot>>,
}

#[derive(Default)]
struct Slot {
    frame: Option<Frame<Bytes>>,
    writer: Option<Waker>,
}

impl Writer {
    /// Sends a chunk. An empty one is left out.
    ///
    /// # Errors
    /// When nobody reads any more: the body was dropped.
    pub async fn write(&mut self, chunk: impl Into<Bytes>) -> Result<()> {
        let chunk = chunk.into();
        if chunk.is_empty() {
            return Ok(());
        }
        self.put(Frame::data(chunk)).await
    }

    /// Sends the trailers; nothing comes after them.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub async fn trailers(mut self, trailers: HeaderMap) -> Result<()> {
        self.put(Frame::trailers(trailers)).await
    }

    async fn put(&mut self, frame: Frame<Bytes>) -> Result<()> {
        let mut frame = Some(frame);
        poll_fn(|cx| {
            let Some(slot) = self.slot.upgrade() else {
                return Poll::Ready(Err(Error::internal("the body was abandoned")));
            };
            let mut slot = slot.borrow_mut();
            if slot.frame.is_some() {
                slot.writer = Some(cx.waker().clone());
                return Poll::Pending;
            }
            slot.frame = frame.take();
            Poll::Ready(Ok(()))
        })
        .await
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").finish_non_exhaustive()
    }
}

/// The reading end: drives the writing function when it is asked for a frame.
pub(crate) struct Written {
    slot: Rc<RefCell<Slot>>,
    function: Option<Pin<Box<dyn Future<Output = Result<()>>>>>,
    /// How the function failed, to be told after its last chunk.
    failure: Option<Error>,
}

impl Written {
    pub(crate) fn new<F>(write: impl FnOnce(Writer) -> F) -> Self
    where
        F: Future<Output = Result<()>> + 'static,
    {
        let slot = Rc::new(RefCell::new(Slot::default()));
        let function = write(Writer {
            slot: Rc::downgrade(&slot),
        });
        Self {
            slot,
            function: Some(Box::pin(function)),
            failure: None,
        }
    }

    fn take(&self) -> Option<Frame<Bytes>> {
        let (frame, writer) = {
            let mut slot = self.slot.borrow_mut();
            (slot.frame.take(), slot.writer.take())
        };
        if let Some(writer) = writer {
            writer.wake();
        }
        frame
    }
}

impl http_body::Body for Written {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>>>> {
        if let Some(frame) = self.take() {
            return Poll::Ready(Some(Ok(frame)));
        }
        let ended = match &mut self.function {
            None => return Poll::Ready(self.failure.take().map(Err)),
            Some(function) => function.as_mut().poll(cx),
        };
        if let Poll::Ready(result) = ended {
            self.function = None;
            self.failure = result.err();
        }
        match (self.take(), &self.function) {
            (Some(frame), _) => Poll::Ready(Some(Ok(frame))),
            (None, Some(_)) => Poll::Pending,
            (None, None) => Poll::Ready(self.failure.take().map(Err)),
        }
    }
}

#[cfg(all(test, not(target_os = "wasi")))]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::{Body, test};

    #[test]
    fn the_function_runs_only_as_fast_as_it_is_read() {
        let written = Rc::new(Cell::new(0));
        let counter = written.clone();
        let mut body = Body::stream(|mut writer| async move {
            loop {
                writer.write("x").await?;
                counter.set(counter.get() + 1);
            }
        });
        test::run(async {
            for n in 1..=5 {
                assert_eq!(body.chunk().await.unwrap().unwrap(), "x");
                assert!(
                    written.get() <= n + 1,
                    "{} written, {n} read",
                    written.get()
                );
            }
        });
        drop(body);
    }

    #[test]
    fn a_failure_comes_after_what_was_written_before_it() {
        let mut body = Body::stream(|mut writer| async move {
            writer.write("last words").await?;
            Err(Error::internal("over"))
        });
        test::run(async {
            assert_eq!(body.chunk().await.unwrap().unwrap(), "last words");
            assert_eq!(body.chunk().await.unwrap_err().to_string(), "over");
            assert!(body.chunk().await.unwrap().is_none());
        });
    }

    #[test]
    fn writing_to_a_dropped_body_fails_and_trailers_arrive() {
        let kept = Rc::new(RefCell::new(None));
        let keep = kept.clone();
        let mut body = Body::stream(|writer| async move {
            *keep.borrow_mut() = Some(writer);
            Ok(())
        });
        test::run(async {
            assert!(body.chunk().await.unwrap().is_none());
            drop(body);
            let mut writer = kept.borrow_mut().take().unwrap();
            assert!(writer.write("x").await.is_err());

            let mut body = Body::stream(|mut writer| async move {
                writer.write("data").await?;
                let mut trailers = HeaderMap::new();
                trailers.insert("checksum", "1".try_into()?);
                writer.trailers(trailers).await
            });
            assert_eq!(body.trailers().await.unwrap().unwrap()["checksum"], "1");
        });
    }
}
