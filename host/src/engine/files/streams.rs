//! Streams of files.
//!
//! A reader asks for the next piece when somebody waits for it, a writer hands a piece on when it
//! gets one; each has one piece on its way at most.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::oneshot;
use wasmtime_wasi::async_trait;
use wasmtime_wasi::p2::bindings::filesystem::types::ErrorCode;
use wasmtime_wasi::p2::{
    FsError, FsResult, InputStream, OutputStream, Pollable, StreamError, StreamResult,
};

use super::view::write_at;
use super::{OpenPlace, begin};
use crate::engine::outgoing::Patron;
use crate::storage::Handle;

/// What is read or written at once.
const PIECE_BYTES: usize = 64 << 10;

/// What both kinds need.
pub(super) struct Target {
    pub(super) patron: Arc<dyn Patron>,
    pub(super) file: Arc<std::fs::File>,
    pub(super) handle: Arc<Handle>,
    /// Kept although its descriptor is closed.
    pub(super) _open: Arc<OpenPlace>,
    /// Held as long as the stream is there: there are so many.
    pub(super) _place: Arc<()>,
}

type OnItsWay<T> = oneshot::Receiver<FsResult<T>>;

fn said(error: FsError) -> StreamError {
    match error.downcast() {
        Ok(code) => StreamError::LastOperationFailed(code.into()),
        Err(trap) => StreamError::Trap(trap),
    }
}

/// Reads a file from an offset on.
pub(super) struct Reader {
    target: Target,
    offset: u64,
    state: Reading,
}

enum Reading {
    Idle,
    Waiting(OnItsWay<Vec<u8>>),
    Here(Bytes),
    Failed(StreamError),
    Over,
}

impl Reader {
    pub(super) const fn new(target: Target, offset: u64) -> Self {
        Self {
            target,
            offset,
            state: Reading::Idle,
        }
    }

    fn ask(&self) -> OnItsWay<Vec<u8>> {
        let (file, handle) = (
            Arc::clone(&self.target.file),
            Arc::clone(&self.target.handle),
        );
        let offset = self.offset;
        begin(&self.target.patron, move |_| {
            let mut buffer = vec![0; PIECE_BYTES];
            let read = file.read_at(&mut buffer, offset)?;
            buffer.truncate(read);
            drop(handle);
            Ok(buffer)
        })
    }
}

#[async_trait]
impl InputStream for Reader {
    fn read(&mut self, size: usize) -> StreamResult<Bytes> {
        match std::mem::replace(&mut self.state, Reading::Over) {
            Reading::Over => Err(StreamError::Closed),
            Reading::Failed(error) => Err(error),
            Reading::Here(mut bytes) => {
                let piece = bytes.split_to(size.min(bytes.len()));
                self.state = if bytes.is_empty() {
                    Reading::Idle
                } else {
                    Reading::Here(bytes)
                };
                Ok(piece)
            }
            Reading::Idle => {
                if size > 0 {
                    self.state = Reading::Waiting(self.ask());
                } else {
                    self.state = Reading::Idle;
                }
                Ok(Bytes::new())
            }
            waiting @ Reading::Waiting(_) => {
                self.state = waiting;
                Ok(Bytes::new())
            }
        }
    }
}

#[async_trait]
impl Pollable for Reader {
    async fn ready(&mut self) {
        if let Reading::Idle = self.state {
            self.state = Reading::Waiting(self.ask());
        }
        if let Reading::Waiting(piece) = &mut self.state {
            self.state = match piece.await {
                Ok(Ok(bytes)) if bytes.is_empty() => Reading::Over,
                Ok(Ok(bytes)) => {
                    self.offset = self.offset.saturating_add(bytes.len() as u64);
                    Reading::Here(bytes.into())
                }
                Ok(Err(error)) => Reading::Failed(said(error)),
                Err(_) => Reading::Failed(said(ErrorCode::Io.into())),
            };
        }
    }
}

/// Writes a file from an offset on, or at its end.
pub(super) struct Writer {
    target: Target,
    /// `None` for the end.
    offset: Option<u64>,
    state: Writing,
}

enum Writing {
    Ready,
    Waiting(OnItsWay<u64>),
    Failed(StreamError),
    Over,
}

impl Writer {
    pub(super) const fn new(target: Target, offset: Option<u64>) -> Self {
        Self {
            target,
            offset,
            state: Writing::Ready,
        }
    }

    /// The error of the last piece, once.
    fn failure(&mut self) -> StreamResult<()> {
        match self.state {
            Writing::Ready | Writing::Waiting(_) => Ok(()),
            Writing::Over => Err(StreamError::Closed),
            Writing::Failed(_) => match std::mem::replace(&mut self.state, Writing::Over) {
                Writing::Failed(error) => Err(error),
                _ => Err(StreamError::Closed),
            },
        }
    }
}

#[async_trait]
impl OutputStream for Writer {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        if !matches!(self.state, Writing::Ready) || bytes.len() > PIECE_BYTES {
            let unasked = wasmtime::format_err!("more was written than was permitted");
            return Err(StreamError::Trap(unasked));
        }
        let (file, handle) = (
            Arc::clone(&self.target.file),
            Arc::clone(&self.target.handle),
        );
        let from = self.offset;
        let piece = begin(&self.target.patron, move |_| {
            let mut written = 0;
            while written < bytes.len() {
                let offset = from.map(|from| from.saturating_add(written as u64));
                let rest = &bytes[written..];
                let more = write_at(handle.volume(), &handle, &file, rest, offset)?;
                if more == 0 {
                    return Err(ErrorCode::InsufficientSpace.into());
                }
                written += usize::try_from(more).unwrap_or(rest.len());
            }
            Ok(written as u64)
        });
        self.state = Writing::Waiting(piece);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        self.failure()
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        self.failure()?;
        match self.state {
            Writing::Ready => Ok(PIECE_BYTES),
            _ => Ok(0),
        }
    }

    /// What is on its way gets there before the guest goes on.
    async fn cancel(&mut self) {
        self.ready().await;
    }
}

#[async_trait]
impl Pollable for Writer {
    async fn ready(&mut self) {
        if let Writing::Waiting(piece) = &mut self.state {
            self.state = match piece.await {
                Ok(Ok(written)) => {
                    let next = |offset: u64| offset.saturating_add(written);
                    self.offset = self.offset.map(next);
                    Writing::Ready
                }
                Ok(Err(error)) => Writing::Failed(said(error)),
                Err(_) => Writing::Failed(said(ErrorCode::Io.into())),
            };
        }
    }
}
