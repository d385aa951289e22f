//! A second opinion on the framing of HTTP/1.1 requests.
//!
//! hyper parses leniently where RFC 9112 lets it: a bare LF ends a line, `Content-Length` beside
//! `Transfer-Encoding` is resolved, a request without `Host` is served. Each of these is where two
//! parsers can disagree on where one request ends and the next begins. [`HeadGuard`] follows the
//! same bytes on their way to hyper and refuses everything that is not framed the one canonical
//! way (threats T8, T10), so that what hyper sees has only one reading.
//!
//! ```text
//!            ┌────────────────────────── next message ──────────────────────────┐
//!            ▼                                                                  │
//!  Preface ─► Start ─► Method ─► Target ─► Version ─► FieldStart ⇄ Name ─► Value│
//!     │                                                   │                     │
//!     │                              empty line: ends the head (or the trailers)┤
//!     ▼                                                   │                     │
//!  PassThrough                         Content-Length ────┼───► Body ───────────┤
//!  (HTTP/2)                            chunked ───────────┘                     │
//!                                         └─► chunk size ─► data ─► … ─► trailers
//! ```
//!
//! It is pure: bytes in, verdict out; no I/O, no clock, no allocation. It keeps no head, only where
//! in it it is, so a connection costs about 100 bytes. Where the bytes are cut does not matter. The
//! first violation is final: the connection has no trustworthy next message.
//!
//! What it leaves to others: whether a host is known and equals the authority of an absolute-form
//! target (routing), how large a body may be (the service's limit), how long anything may take
//! ([`GuardedIo`](super::guarded_io::GuardedIo)).

mod text;
mod violation;

#[cfg(test)]
mod tests;

use text::{HOST, Word, text_run, token_run};
pub use violation::Violation;

use super::frame_guard::{Came, FrameGuard};

/// Most bytes of a head, from the method to the empty line.
pub const HEAD_BYTES_MAX: usize = 32 << 10;
/// Most bytes of a request line, its CRLF included.
pub const REQUEST_LINE_BYTES_MAX: usize = 16 << 10;
/// Most header lines of a head, and most trailer lines of a body.
pub const FIELDS_MAX: usize = 64;
/// Most bytes of all chunk extensions of one body, from `;` to before the CRLF.
pub const CHUNK_EXTENSION_BYTES_MAX: usize = 16 << 10;
/// Most bytes of a trailer section.
pub const TRAILER_BYTES_MAX: usize = 8 << 10;
/// Most digits of a chunk size: those of a `u64`.
const CHUNK_SIZE_DIGITS_MAX: u8 = 16;
/// Longest body that `Content-Length` can announce.
const CONTENT_LENGTH_MAX: u64 = i64::MAX.cast_unsigned();

/// What a client that speaks HTTP/2 without TLS sends first (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A violation, and how far the bytes were good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{violation}")]
pub struct Refused {
    /// What was wrong.
    pub violation: Violation,
    /// How many of the bytes just fed may be handed on. They never complete the refused head, and
    /// always contain its first byte if an earlier request may still be in progress: a parser that
    /// got them waits for the rest of a head, and finishes what came before.
    pub deliverable: usize,
}

/// What the client is sending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Nothing: between messages.
    Idle,
    /// A head.
    Head,
    /// A body, or its chunk framing or trailers.
    Body,
    /// HTTP/2, of which frames are counted and nothing is judged.
    PassThrough,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// How many bytes of [`PREFACE`] have been seen, and nothing else.
    Preface(u8),
    Start,
    EmptyLineLf,
    Method,
    Target,
    Version,
    RequestLineLf,
    FieldStart,
    Name,
    PlainValue,
    Value(Known, Stage),
    FieldLf,
    SectionLf,
    Body,
    ChunkStart,
    ChunkSize,
    ChunkSpace,
    ChunkExtension,
    ChunkSizeLf,
    ChunkData,
    ChunkDataCr,
    ChunkDataLf,
    PassThrough,
}

/// A header whose value is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    Host,
    ContentLength,
    TransferEncoding,
}

/// Where in a value whose surrounding white space does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Before,
    Within,
    After,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Section {
    Head,
    Trailers,
}

/// Follows one connection; see the module.
#[derive(Debug, Clone)]
pub struct HeadGuard {
    state: State,
    refused: Option<Violation>,
    section: Section,
    /// Bytes that the head or the trailers may still have.
    section_left: usize,
    /// Bytes that the request line may still have.
    line_left: usize,
    /// Lines of the section so far.
    fields: usize,
    word: Word,
    /// One empty line before a request line is ignored (RFC 9112, 2.2), no more.
    empty_line_seen: bool,
    target_seen: bool,
    version_1_0: bool,
    host_seen: bool,
    chunked: bool,
    content_length: Option<u64>,
    /// Bytes of the body or chunk that are still to come; the chunk's size while it is read.
    body_left: u64,
    chunk_size_digits: u8,
    extension_left: usize,
    requests: u64,
    frames: FrameGuard,
}

impl Default for HeadGuard {
    fn default() -> Self {
        Self::new()
    }
}

impl HeadGuard {
    /// A guard at the beginning of a connection.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            state: State::Preface(0),
            refused: None,
            section: Section::Head,
            section_left: HEAD_BYTES_MAX,
            line_left: REQUEST_LINE_BYTES_MAX,
            fields: 0,
            word: Word::new(),
            empty_line_seen: false,
            target_seen: false,
            version_1_0: false,
            host_seen: false,
            chunked: false,
            content_length: None,
            body_left: 0,
            chunk_size_digits: 0,
            extension_left: 0,
            requests: 0,
            frames: FrameGuard::new(),
        }
    }

    /// What the client is in the middle of; after a violation, what it was in the middle of.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        match self.state {
            State::Preface(0) | State::Start => Phase::Idle,
            State::Preface(_)
            | State::EmptyLineLf
            | State::Method
            | State::Target
            | State::Version
            | State::RequestLineLf => Phase::Head,
            State::FieldStart
            | State::Name
            | State::PlainValue
            | State::Value(..)
            | State::FieldLf
            | State::SectionLf => match self.section {
                Section::Head => Phase::Head,
                Section::Trailers => Phase::Body,
            },
            State::Body
            | State::ChunkStart
            | State::ChunkSize
            | State::ChunkSpace
            | State::ChunkExtension
            | State::ChunkSizeLf
            | State::ChunkData
            | State::ChunkDataCr
            | State::ChunkDataLf => Phase::Body,
            State::PassThrough => Phase::PassThrough,
        }
    }

    /// Heads accepted so far.
    #[must_use]
    pub const fn requests(&self) -> u64 {
        self.requests
    }

    /// The frames of HTTP/2 since this was called last.
    pub(in crate::ingress) fn frames(&mut self) -> Came {
        self.frames.take()
    }

    /// Follows the next bytes of the connection.
    ///
    /// # Errors
    ///
    /// The first violation; every later call repeats it.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), Refused> {
        if let Some(violation) = self.refused {
            return Err(Refused {
                violation,
                deliverable: 0,
            });
        }
        let mut at = 0;
        while at < bytes.len() {
            match self.step(&bytes[at..]) {
                Ok(consumed) => at += consumed,
                Err(violation) => {
                    self.refused = Some(violation);
                    let nothing_of_it_yet = match self.state {
                        State::Start => true,
                        State::Method => self.section_left == HEAD_BYTES_MAX,
                        _ => false,
                    };
                    let first_byte_too = nothing_of_it_yet && self.requests > 0;
                    let deliverable = at + usize::from(first_byte_too);
                    return Err(Refused {
                        violation,
                        deliverable,
                    });
                }
            }
        }
        Ok(())
    }

    /// Takes what belongs to the present state, of at least one byte; returns how many bytes that
    /// were, none only where the state changed.
    fn step(&mut self, bytes: &[u8]) -> Result<usize, Violation> {
        match self.state {
            State::Preface(matched) => self.preface(usize::from(matched), bytes),
            State::Start => self.start(bytes[0]),
            State::EmptyLineLf => {
                let consumed = line_feed(bytes)?;
                self.state = State::Start;
                self.empty_line_seen = true;
                Ok(consumed)
            }
            State::Method | State::Target | State::Version | State::RequestLineLf => {
                let window = within(bytes, self.line_left).ok_or(Violation::RequestLineTooLong)?;
                let consumed = self.request_line(window)?;
                self.line_left -= consumed;
                self.section_left -= consumed;
                Ok(consumed)
            }
            State::FieldStart
            | State::Name
            | State::PlainValue
            | State::Value(..)
            | State::FieldLf
            | State::SectionLf => {
                let window = within(bytes, self.section_left).ok_or(match self.section {
                    Section::Head => Violation::HeadTooLarge,
                    Section::Trailers => Violation::TrailersTooLarge,
                })?;
                let consumed = self.field(window)?;
                self.section_left -= consumed;
                Ok(consumed)
            }
            State::Body | State::ChunkData => Ok(self.body(bytes)),
            State::ChunkSpace | State::ChunkExtension => self.chunk_extension(bytes),
            State::ChunkStart
            | State::ChunkSize
            | State::ChunkSizeLf
            | State::ChunkDataCr
            | State::ChunkDataLf => self.chunk(bytes),
            State::PassThrough => {
                self.frames.feed(bytes);
                Ok(bytes.len())
            }
        }
    }

    fn preface(&mut self, matched: usize, bytes: &[u8]) -> Result<usize, Violation> {
        let expected = &PREFACE[matched..];
        let same = expected
            .iter()
            .zip(bytes)
            .take_while(|(a, b)| a == b)
            .count();
        let matched = matched + same;
        if matched == PREFACE.len() {
            self.state = State::PassThrough;
        } else if same == bytes.len() {
            // Below PREFACE.len(), 24.
            self.state = State::Preface(u8::try_from(matched).unwrap_or(u8::MAX));
        } else {
            // An HTTP/1 request after all, which began like the preface.
            self.state = State::Start;
            let mut at = 0;
            while at < matched {
                at += self.step(&PREFACE[at..matched])?;
            }
        }
        Ok(same)
    }

    fn start(&mut self, byte: u8) -> Result<usize, Violation> {
        match byte {
            b'\r' if !self.empty_line_seen => {
                self.state = State::EmptyLineLf;
                Ok(1)
            }
            b'\n' => Err(Violation::BareLf),
            _ => {
                *self = Self {
                    state: State::Method,
                    requests: self.requests,
                    ..Self::new()
                };
                Ok(0)
            }
        }
    }

    fn request_line(&mut self, bytes: &[u8]) -> Result<usize, Violation> {
        let run = match self.state {
            State::Method => token_run(bytes),
            State::RequestLineLf => {
                self.state = State::FieldStart;
                return line_feed(bytes);
            }
            // Bytes above 0x7f are left to the URI parser.
            _ => text_run::<0x21>(bytes),
        };
        if self.state == State::Target {
            self.target_seen |= run > 0;
        } else {
            self.word.push(&bytes[..run]);
        }
        let Some(end) = bytes.get(run) else {
            return Ok(run);
        };
        self.state = match (self.state, end) {
            (_, b'\n') => return Err(Violation::BareLf),
            (State::Method, b' ') if self.word.len > 0 => {
                if self.word.is(b"CONNECT") {
                    return Err(Violation::Connect);
                }
                self.word = Word::new();
                State::Target
            }
            (State::Target, b' ') if self.target_seen => State::Version,
            (State::Version, b'\r') => {
                self.version_1_0 = self.word.is(b"HTTP/1.0");
                if !self.version_1_0 && !self.word.is(b"HTTP/1.1") {
                    return Err(Violation::Version);
                }
                State::RequestLineLf
            }
            _ => return Err(Violation::RequestLine),
        };
        Ok(run + 1)
    }

    fn field(&mut self, bytes: &[u8]) -> Result<usize, Violation> {
        match self.state {
            State::FieldStart => self.field_start(bytes[0]),
            State::Name => self.field_name(bytes),
            State::PlainValue => {
                let run = text_run::<0x20>(bytes);
                match bytes.get(run) {
                    None => return Ok(run),
                    Some(b'\r') => self.state = State::FieldLf,
                    Some(b'\n') => return Err(Violation::BareLf),
                    Some(b'\t') => {}
                    Some(_) => return Err(Violation::ControlInValue),
                }
                Ok(run + 1)
            }
            State::Value(known, stage) => self.value(known, stage, bytes),
            State::FieldLf => {
                self.state = State::FieldStart;
                line_feed(bytes)
            }
            _ => {
                line_feed(bytes)?;
                self.section_ended()?;
                Ok(1)
            }
        }
    }

    fn field_start(&mut self, byte: u8) -> Result<usize, Violation> {
        match byte {
            b'\r' => {
                self.state = State::SectionLf;
                Ok(1)
            }
            b'\n' => Err(Violation::BareLf),
            b' ' | b'\t' => Err(Violation::ObsFold),
            _ if self.fields == FIELDS_MAX => Err(Violation::TooManyFields),
            _ => {
                self.fields += 1;
                self.word = Word::new();
                self.state = State::Name;
                Ok(0)
            }
        }
    }

    fn field_name(&mut self, bytes: &[u8]) -> Result<usize, Violation> {
        let run = token_run(bytes);
        self.word.push(&bytes[..run]);
        match bytes.get(run) {
            None => return Ok(run),
            Some(b':') if self.word.len > 0 => {}
            Some(b' ' | b'\t') => return Err(Violation::SpaceBeforeColon),
            Some(b'\n') => return Err(Violation::BareLf),
            Some(_) => return Err(Violation::FieldName),
        }
        let known = match self.word.len {
            4 if self.word.is_like(b"host") => Known::Host,
            14 if self.word.is_like(b"content-length") => Known::ContentLength,
            17 if self.word.is_like(b"transfer-encoding") => Known::TransferEncoding,
            _ => {
                self.state = State::PlainValue;
                return Ok(run + 1);
            }
        };
        self.known_field(known)?;
        self.word = Word::new();
        self.state = State::Value(known, Stage::Before);
        Ok(run + 1)
    }

    /// Whether a header that is looked at may come here at all.
    fn known_field(&mut self, known: Known) -> Result<(), Violation> {
        if self.section == Section::Trailers {
            return Err(Violation::TrailerForbidden);
        }
        match known {
            Known::Host if self.host_seen => return Err(Violation::HostDuplicate),
            Known::Host => self.host_seen = true,
            Known::ContentLength if self.chunked => return Err(Violation::LengthAndCoding),
            Known::ContentLength if self.content_length.is_some() => {
                return Err(Violation::ContentLengthDuplicate);
            }
            Known::ContentLength => self.content_length = Some(0),
            Known::TransferEncoding if self.content_length.is_some() => {
                return Err(Violation::LengthAndCoding);
            }
            Known::TransferEncoding if self.chunked => {
                return Err(Violation::TransferEncodingDuplicate);
            }
            Known::TransferEncoding if self.version_1_0 => {
                return Err(Violation::TransferEncodingVersion);
            }
            Known::TransferEncoding => self.chunked = true,
        }
        Ok(())
    }

    /// A value that is looked at: these are short, so byte by byte.
    fn value(&mut self, known: Known, stage: Stage, bytes: &[u8]) -> Result<usize, Violation> {
        let mut stage = stage;
        for (at, &byte) in bytes.iter().enumerate() {
            match byte {
                b' ' | b'\t' if stage == Stage::Within => stage = Stage::After,
                b' ' | b'\t' => {}
                b'\r' => {
                    let whole = match known {
                        Known::TransferEncoding => self.word.is_like(b"chunked"),
                        Known::Host | Known::ContentLength => stage != Stage::Before,
                    };
                    if !whole {
                        return Err(known.malformed());
                    }
                    self.state = State::FieldLf;
                    return Ok(at + 1);
                }
                b'\n' => return Err(Violation::BareLf),
                ..0x20 | 0x7f => return Err(Violation::ControlInValue),
                b',' if known == Known::ContentLength => return Err(Violation::ContentLengthList),
                _ if stage == Stage::After => return Err(known.malformed()),
                _ => {
                    stage = Stage::Within;
                    self.value_byte(known, byte)?;
                }
            }
        }
        self.state = State::Value(known, stage);
        Ok(bytes.len())
    }

    fn value_byte(&mut self, known: Known, byte: u8) -> Result<(), Violation> {
        match known {
            Known::Host if HOST.has(byte) => {}
            Known::Host => return Err(Violation::HostMalformed),
            Known::TransferEncoding => self.word.push(&[byte]),
            Known::ContentLength => {
                if !byte.is_ascii_digit() {
                    return Err(Violation::ContentLength);
                }
                let length = self
                    .content_length
                    .and_then(|length| length.checked_mul(10))
                    .and_then(|length| length.checked_add(u64::from(byte - b'0')))
                    .filter(|length| *length <= CONTENT_LENGTH_MAX)
                    .ok_or(Violation::ContentLengthTooLarge)?;
                self.content_length = Some(length);
            }
        }
        Ok(())
    }

    /// After the LF of the empty line.
    fn section_ended(&mut self) -> Result<(), Violation> {
        self.empty_line_seen = false;
        self.state = State::Start;
        if self.section == Section::Trailers {
            return Ok(());
        }
        if !self.host_seen && !self.version_1_0 {
            // Still in the head, whose last byte is not handed on.
            self.state = State::SectionLf;
            return Err(Violation::HostMissing);
        }
        self.requests += 1;
        if self.chunked {
            self.extension_left = CHUNK_EXTENSION_BYTES_MAX;
            self.state = State::ChunkStart;
        } else if let Some(length @ 1..) = self.content_length {
            self.body_left = length;
            self.state = State::Body;
        }
        Ok(())
    }

    /// Skips what is data.
    fn body(&mut self, bytes: &[u8]) -> usize {
        let consumed =
            usize::try_from(self.body_left).map_or(bytes.len(), |left| left.min(bytes.len()));
        // At most `body_left`, which is 64 bits wide.
        self.body_left -= consumed as u64;
        if self.body_left == 0 {
            self.state = match self.state {
                State::ChunkData => State::ChunkDataCr,
                _ => State::Start,
            };
        }
        consumed
    }

    /// The framing round a chunk's data.
    fn chunk(&mut self, bytes: &[u8]) -> Result<usize, Violation> {
        let byte = bytes[0];
        match (self.state, byte) {
            (State::ChunkStart, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                self.body_left = 0;
                self.chunk_size_digits = 0;
                self.state = State::ChunkSize;
                return Ok(0);
            }
            (State::ChunkSize, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                if self.chunk_size_digits == CHUNK_SIZE_DIGITS_MAX {
                    return Err(Violation::ChunkTooLarge);
                }
                self.chunk_size_digits += 1;
                let digit = match byte {
                    b'0'..=b'9' => byte - b'0',
                    _ => (byte | 0x20) - b'a' + 10,
                };
                self.body_left = self.body_left << 4 | u64::from(digit);
            }
            (State::ChunkSize, b' ' | b'\t' | b';') => {
                self.state = State::ChunkSpace;
                return Ok(0);
            }
            (State::ChunkSize, b'\r') => self.state = State::ChunkSizeLf,
            (State::ChunkSizeLf, b'\n') if self.body_left > 0 => self.state = State::ChunkData,
            (State::ChunkSizeLf, b'\n') => {
                self.section = Section::Trailers;
                self.section_left = TRAILER_BYTES_MAX;
                self.fields = 0;
                self.state = State::FieldStart;
            }
            (State::ChunkDataCr, b'\r') => self.state = State::ChunkDataLf,
            (State::ChunkDataLf, b'\n') => self.state = State::ChunkStart,
            (State::ChunkSizeLf | State::ChunkDataLf, _) => return Err(Violation::BareCr),
            (_, b'\n') => return Err(Violation::BareLf),
            _ => return Err(Violation::Chunk),
        }
        Ok(1)
    }

    /// From after the chunk size to the CR. White space there is bad but must be parsed (RFC 9112,
    /// 7.1.1), though only before a `;`.
    fn chunk_extension(&mut self, bytes: &[u8]) -> Result<usize, Violation> {
        if bytes[0] == b'\r' && self.state == State::ChunkExtension {
            self.state = State::ChunkSizeLf;
            return Ok(1);
        }
        let window = within(bytes, self.extension_left).ok_or(Violation::ChunkExtensionTooLarge)?;
        let consumed = match (self.state, window[0]) {
            (_, b'\n') => return Err(Violation::BareLf),
            (State::ChunkSpace, b' ' | b'\t') | (State::ChunkExtension, b'\t') => 1,
            (State::ChunkSpace, b';') => {
                self.state = State::ChunkExtension;
                1
            }
            (State::ChunkSpace, _) => return Err(Violation::Chunk),
            _ => match text_run::<0x20>(window) {
                0 => return Err(Violation::Chunk),
                run => run,
            },
        };
        self.extension_left -= consumed;
        Ok(consumed)
    }
}

impl Known {
    const fn malformed(self) -> Violation {
        match self {
            Self::Host => Violation::HostMalformed,
            Self::ContentLength => Violation::ContentLength,
            Self::TransferEncoding => Violation::TransferEncoding,
        }
    }
}

/// The part of `bytes` that is allowed, or nothing if not even one byte is.
fn within(bytes: &[u8], left: usize) -> Option<&[u8]> {
    (left > 0).then(|| &bytes[..bytes.len().min(left)])
}

/// Takes the LF that must follow a CR.
fn line_feed(bytes: &[u8]) -> Result<usize, Violation> {
    match bytes[0] {
        b'\n' => Ok(1),
        _ => Err(Violation::BareCr),
    }
}
