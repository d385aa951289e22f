//! What a guest writes to its standard output and error becomes lines of its service's log.
//!
//! Bytes are collected until a newline, cut at [`LOG_LINE_MAX_BYTES`] and handed to a sink as text;
//! control bytes are escaped, so that nothing that a guest writes can forge a line or move a
//! terminal's cursor. The stream never blocks: what the sink has no room for is dropped there and
//! counted.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use tokio::io::AsyncWrite;
use wasmtime_wasi::async_trait;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};

use crate::messages::{LOG_LINE_MAX_BYTES, LogSource};

/// One line that a guest wrote.
#[derive(Debug)]
pub struct LogLine {
    /// Which stream.
    pub source: LogSource,
    /// The line, escaped, without its end.
    pub text: String,
}

impl LogLine {
    /// A line of these bytes, escaped and cut where it is too long.
    #[must_use]
    pub fn new(source: LogSource, bytes: &[u8]) -> Self {
        let text = escape(bytes);
        Self { source, text }
    }
}

/// Where the lines of one request go. Must not block.
pub trait LogSink: Send + Sync {
    /// Takes one line.
    fn line(&self, line: LogLine);
}

impl<F: Fn(LogLine) + Send + Sync> LogSink for F {
    fn line(&self, line: LogLine) {
        self(line);
    }
}

/// The two log streams of one request. Cheap to clone.
#[derive(Clone)]
pub(super) struct GuestLog(Arc<Inner>);

struct Inner {
    /// `None` between two requests.
    sink: Mutex<Option<Arc<dyn LogSink>>>,
    stdout: Mutex<Vec<u8>>,
    stderr: Mutex<Vec<u8>>,
}

impl std::fmt::Debug for GuestLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestLog").finish_non_exhaustive()
    }
}

impl GuestLog {
    /// Streams that hand their lines to `sink`.
    pub(super) fn new(sink: Option<Arc<dyn LogSink>>) -> Self {
        Self(Arc::new(Inner {
            sink: Mutex::new(sink),
            stdout: Mutex::default(),
            stderr: Mutex::default(),
        }))
    }

    /// The request is over: what it left of a line is its last one.
    pub(super) fn end(&self) {
        self.0.flush();
        *self.0.sink() = None;
    }

    /// Another request's lines follow.
    pub(super) fn begin(&self, sink: Arc<dyn LogSink>) {
        *self.0.sink() = Some(sink);
    }

    pub(super) fn stdout(&self) -> Stream {
        Stream(self.0.clone(), LogSource::Stdout)
    }

    pub(super) fn stderr(&self) -> Stream {
        Stream(self.0.clone(), LogSource::Stderr)
    }
}

impl Inner {
    fn buffer(&self, source: LogSource) -> &Mutex<Vec<u8>> {
        match source {
            LogSource::Stdout => &self.stdout,
            LogSource::Stderr | LogSource::Host => &self.stderr,
        }
    }

    fn emit(&self, source: LogSource, line: &[u8]) {
        if let Some(sink) = &*self.sink() {
            sink.line(LogLine::new(source, line));
        }
    }

    fn sink(&self) -> MutexGuard<'_, Option<Arc<dyn LogSink>>> {
        self.sink.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flush(&self) {
        for source in [LogSource::Stdout, LogSource::Stderr] {
            let mut buffer = self
                .buffer(source)
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let line = std::mem::take(&mut *buffer);
            if !line.is_empty() {
                self.emit(source, &line);
            }
        }
    }

    fn write(&self, source: LogSource, bytes: &[u8]) {
        let mut buffer = self
            .buffer(source)
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut rest = bytes;
        while let Some(end) = memchr::memchr(b'\n', rest) {
            let (line, after) = rest.split_at(end);
            rest = &after[1..];
            if buffer.is_empty() {
                self.emit(source, line);
            } else {
                keep(&mut buffer, line);
                self.emit(source, &buffer);
                buffer.clear();
            }
        }
        keep(&mut buffer, rest);
    }
}

/// Appends what still fits one byte more than a line may have: that byte tells that it was cut.
fn keep(buffer: &mut Vec<u8>, bytes: &[u8]) {
    let room = (LOG_LINE_MAX_BYTES + 1).saturating_sub(buffer.len());
    buffer.extend_from_slice(&bytes[..bytes.len().min(room)]);
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.flush();
    }
}

/// The line as printable text: at most [`LOG_LINE_MAX_BYTES`] of it, control characters and what
/// is not UTF-8 escaped.
fn escape(line: &[u8]) -> String {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let cut = line.len() > LOG_LINE_MAX_BYTES;
    let kept = &line[..line.len().min(LOG_LINE_MAX_BYTES)];
    let mut text = String::with_capacity(kept.len());
    for chunk in kept.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() && c != '\t' {
                text.extend(c.escape_unicode());
            } else {
                text.push(c);
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    if cut {
        text.push('…');
    }
    text
}

/// One of the two streams, as WASI sees it.
pub(super) struct Stream(Arc<Inner>, LogSource);

impl IsTerminal for Stream {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Stream {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(Self(self.0.clone(), self.1))
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(Self(self.0.clone(), self.1))
    }
}

impl OutputStream for Stream {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.0.write(self.1, &bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(64 << 10)
    }
}

#[async_trait]
impl Pollable for Stream {
    async fn ready(&mut self) {}
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        self.0.write(self.1, bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(writes: &[&[u8]]) -> Vec<String> {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = seen.clone();
        let log = GuestLog::new(Some(Arc::new(move |line: LogLine| {
            sink.lock().unwrap().push(line.text);
        })));
        for bytes in writes {
            log.stdout().0.write(LogSource::Stdout, bytes);
        }
        drop(log);
        Arc::into_inner(seen).unwrap().into_inner().unwrap()
    }

    #[test]
    fn lines_are_put_together_and_the_last_one_needs_no_end() {
        assert_eq!(
            lines(&[b"a", b"b\nc", b"\r\n", b"\nend"]),
            ["ab", "c", "", "end"]
        );
    }

    #[test]
    fn what_a_request_leaves_of_a_line_is_its_own() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let of = |request: &'static str| -> Option<Arc<dyn LogSink>> {
            let seen = seen.clone();
            Some(Arc::new(move |line: LogLine| {
                seen.lock().unwrap().push((request, line.text));
            }))
        };
        let log = GuestLog::new(of("first"));
        let write = |bytes: &[u8]| log.stdout().0.write(LogSource::Stdout, bytes);
        write(b"a\nb");
        log.end();
        write(b"nobody's\n");
        log.begin(of("second").unwrap());
        write(b"c\n");
        let seen = seen.lock().unwrap().clone();
        let lines: Vec<_> = seen
            .iter()
            .map(|(request, line)| (*request, line.as_str()))
            .collect();
        assert_eq!(lines, [("first", "a"), ("first", "b"), ("second", "c")]);
    }

    #[test]
    fn nothing_forges_a_line_or_reaches_a_terminal() {
        assert_eq!(
            lines(&[b"a\x1b[2Jb\rc\0\xff\n"]),
            ["a\\u{1b}[2Jb\\u{d}c\\u{0}\\xff"]
        );
    }

    #[test]
    fn a_long_line_is_cut_and_marked_however_it_arrives() {
        let long = vec![b'x'; LOG_LINE_MAX_BYTES * 3];
        let whole = lines(&[&long, b"\n"]);
        let pieces: Vec<&[u8]> = long.chunks(1000).collect();
        assert_eq!(whole, lines(&pieces));
        assert_eq!(whole[0].chars().count(), LOG_LINE_MAX_BYTES + 1);
        assert!(whole[0].ends_with('…'));
        let fits = lines(&[&long[..LOG_LINE_MAX_BYTES], b"\n"]);
        assert!(!fits[0].ends_with('…'));
    }
}
