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
/// The longest word that is looked at: `transfer-encoding`.
const WORD_BYTES_MAX: usize = 17;

/// Why a connection is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Violation {
    /// Not `method SP target SP version`.
    #[error("the request line is malformed")]
    RequestLine,
    /// Longer than [`REQUEST_LINE_BYTES_MAX`].
    #[error("the request line is longer than {REQUEST_LINE_BYTES_MAX} bytes")]
    RequestLineTooLong,
    /// Not HTTP/1.0 or HTTP/1.1.
    #[error("the version is neither HTTP/1.0 nor HTTP/1.1")]
    Version,
    /// This is no proxy.
    #[error("CONNECT is not served here")]
    Connect,
    /// More than [`HEAD_BYTES_MAX`].
    #[error("the head is larger than {HEAD_BYTES_MAX} bytes")]
    HeadTooLarge,
    /// More than [`FIELDS_MAX`].
    #[error("there are more than {FIELDS_MAX} header or trailer lines")]
    TooManyFields,
    /// A LF without a CR before it.
    #[error("a line ends with a bare LF")]
    BareLf,
    /// A CR without a LF after it.
    #[error("a CR is not followed by LF")]
    BareCr,
    /// A header line that begins with white space.
    #[error("a header line is folded")]
    ObsFold,
    /// A header name that is empty, without a colon, or not a token.
    #[error("a header name is malformed")]
    FieldName,
    /// White space between a header name and its colon.
    #[error("there is white space before the colon of a header line")]
    SpaceBeforeColon,
    /// NUL or another control character in a value.
    #[error("a header value has a control character in it")]
    ControlInValue,
    /// HTTP/1.1 without `Host`.
    #[error("the Host header is missing")]
    HostMissing,
    /// Two `Host` headers, equal or not.
    #[error("there is more than one Host header")]
    HostDuplicate,
    /// A `Host` that cannot be a host and port.
    #[error("the Host header is malformed")]
    HostMalformed,
    /// A length that is not a plain decimal number.
    #[error("the Content-Length is malformed")]
    ContentLength,
    /// `5, 5` and the like.
    #[error("the Content-Length is a list")]
    ContentLengthList,
    /// Two lengths, equal or not.
    #[error("there is more than one Content-Length header")]
    ContentLengthDuplicate,
    /// A length that nobody can send.
    #[error("the Content-Length is too large")]
    ContentLengthTooLarge,
    /// A coding other than `chunked`.
    #[error("the Transfer-Encoding is not exactly `chunked`")]
    TransferEncoding,
    /// Two codings.
    #[error("there is more than one Transfer-Encoding header")]
    TransferEncodingDuplicate,
    /// HTTP/1.0 has none.
    #[error("HTTP/1.0 has no Transfer-Encoding")]
    TransferEncodingVersion,
    /// Two ways to find the end.
    #[error("there are both Content-Length and Transfer-Encoding")]
    LengthAndCoding,
    /// Chunk framing that is neither a size nor a CRLF where one must be.
    #[error("the chunked body is malformed")]
    Chunk,
    /// A chunk size above 64 bits.
    #[error("a chunk size has more than {CHUNK_SIZE_DIGITS_MAX} digits")]
    ChunkTooLarge,
    /// More than [`CHUNK_EXTENSION_BYTES_MAX`].
    #[error("the chunk extensions are larger than {CHUNK_EXTENSION_BYTES_MAX} bytes")]
    ChunkExtensionTooLarge,
    /// More than [`TRAILER_BYTES_MAX`].
    #[error("the trailers are larger than {TRAILER_BYTES_MAX} bytes")]
    TrailersTooLarge,
    /// A framing or routing header after the body.
    #[error("a trailer has a name that only a header can have")]
    TrailerForbidden,
}

impl Violation {
    /// The status to answer with, if an answer can be given.
    #[must_use]
    pub const fn status(self) -> u16 {
        match self {
            Self::ContentLengthTooLarge | Self::ChunkTooLarge | Self::ChunkExtensionTooLarge => 413,
            Self::RequestLineTooLong => 414,
            Self::HeadTooLarge | Self::TooManyFields | Self::TrailersTooLarge => 431,
            Self::Version => 505,
            _ => 400,
        }
    }
}

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
    /// HTTP/2, which is not looked into.
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

/// The beginning of a word: enough to know it when it ends.
#[derive(Debug, Clone, Copy)]
struct Word {
    bytes: [u8; WORD_BYTES_MAX],
    /// More than [`WORD_BYTES_MAX`] where the word is longer, and so none of ours.
    len: usize,
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
            State::PassThrough => Ok(bytes.len()),
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

impl Word {
    const fn new() -> Self {
        Self {
            bytes: [0; WORD_BYTES_MAX],
            len: 0,
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        if let Some(free) = self.bytes.get_mut(self.len..) {
            for (to, from) in free.iter_mut().zip(bytes) {
                *to = *from;
            }
        }
        self.len = self.len.saturating_add(bytes.len()).min(WORD_BYTES_MAX + 1);
    }

    fn as_bytes(&self) -> Option<&[u8]> {
        self.bytes.get(..self.len)
    }

    fn is(&self, word: &[u8]) -> bool {
        self.as_bytes() == Some(word)
    }

    fn is_like(&self, word: &[u8]) -> bool {
        self.as_bytes()
            .is_some_and(|bytes| bytes.eq_ignore_ascii_case(word))
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

/// A set of ASCII characters.
struct Set([bool; 256]);

impl Set {
    /// Letters, digits and these.
    const fn alphanumeric_and(others: &[u8]) -> Self {
        let mut set = [false; 256];
        let mut byte: u8 = 0;
        while byte < 0x80 {
            set[byte as usize] = byte.is_ascii_alphanumeric();
            byte += 1;
        }
        let mut at = 0;
        while at < others.len() {
            set[others[at] as usize] = true;
            at += 1;
        }
        Self(set)
    }

    const fn has(&self, byte: u8) -> bool {
        self.0[byte as usize]
    }
}

/// What a token is made of (RFC 9110, 5.6.2).
static TOKEN: Set = Set::alphanumeric_and(b"!#$%&'*+-.^_`|~");
/// What a host and port are made of (RFC 3986, 3.2.2 and 3.2.3); neither user information nor a
/// path.
static HOST: Set = Set::alphanumeric_and(b"-._~%!$&'()*+,;=:[]");

fn token_run(bytes: &[u8]) -> usize {
    bytes
        .iter()
        .position(|byte| !TOKEN.has(*byte))
        .unwrap_or(bytes.len())
}

/// How many bytes come before the first one below `BELOW` or equal to DEL.
///
/// Eight at a time, by the test of "Bit Twiddling Hacks" (Anderson, "Determine if a word has a byte
/// less than n"). Its borrow only runs towards higher bytes, so the lowest mark is always true, and
/// the lowest byte of a little-endian word is the first.
fn text_run<const BELOW: u8>(bytes: &[u8]) -> usize {
    const ONES: u64 = u64::from_le_bytes([1; 8]);
    const TOPS: u64 = u64::from_le_bytes([0x80; 8]);
    let (words, rest) = bytes.as_chunks::<8>();
    for (index, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        let low = word.wrapping_sub(ONES * u64::from(BELOW)) & !word;
        let del = word ^ (ONES * 0x7f);
        let del = del.wrapping_sub(ONES) & !del;
        let marks = (low | del) & TOPS;
        if marks != 0 {
            return index * 8 + marks.trailing_zeros() as usize / 8;
        }
    }
    let tail = rest.iter().position(|byte| *byte < BELOW || *byte == 0x7f);
    words.len() * 8 + tail.unwrap_or(rest.len())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::convert::Infallible;
    use std::rc::Rc;

    use bytes::Bytes;
    use http_body_util::{BodyExt, Empty};
    use hyper_util::rt::TokioIo;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// The violation in a stream fed whole, if any.
    fn verdict(stream: &[u8]) -> Result<HeadGuard, Violation> {
        let mut guard = HeadGuard::new();
        match guard.feed(stream) {
            Ok(()) => Ok(guard),
            Err(refused) => Err(refused.violation),
        }
    }

    /// A request with these lines after the request line.
    fn with_fields(fields: &str) -> Vec<u8> {
        format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n").into_bytes()
    }

    fn chunked(body: &str) -> Vec<u8> {
        format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}")
            .into_bytes()
    }

    #[test]
    fn what_is_refused_in_a_head() {
        use Violation as V;
        let table: &[(&str, V)] = &[
            ("GET / HTTP/1.1\nHost: a\r\n\r\n", V::BareLf),
            ("GET / HTTP/1.1\r\nHost: a\n\r\n", V::BareLf),
            ("GET / HTTP/1.1\r\nHost: a\r\n\n", V::BareLf),
            ("GET / HTTP/1.1\r\nHost: a\r\nX\n: b\r\n\r\n", V::BareLf),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: b\n\r\n", V::BareLf),
            ("\nGET / HTTP/1.1\r\n", V::BareLf),
            ("\r\n\nGET / HTTP/1.1\r\n", V::BareLf),
            ("\r\rGET / HTTP/1.1\r\n", V::BareCr),
            ("GET / HTTP/1.1\rHost: a\r\n\r\n", V::BareCr),
            ("GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n", V::BareCr),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: b\rc\r\n\r\n", V::BareCr),
            ("GET / HTTP/1.1\r\nHost: a\r\n\rX: b\r\n\r\n", V::BareCr),
            ("\r\n\r\nGET / HTTP/1.1\r\n", V::RequestLine),
            (" GET / HTTP/1.1\r\n", V::RequestLine),
            ("GET  / HTTP/1.1\r\n", V::RequestLine),
            ("GET /  HTTP/1.1\r\n", V::RequestLine),
            ("GET / HTTP/1.1 \r\n", V::RequestLine),
            ("GET\t/ HTTP/1.1\r\n", V::RequestLine),
            ("GET /\0 HTTP/1.1\r\n", V::RequestLine),
            ("GET /\x7f HTTP/1.1\r\n", V::RequestLine),
            ("GET /\r\n", V::RequestLine),
            ("GET\r\n", V::RequestLine),
            ("G(T / HTTP/1.1\r\n", V::RequestLine),
            ("\x16\x03\x01\x02\0\x01", V::RequestLine),
            ("GET / HTTP/1.2\r\n", V::Version),
            ("GET / HTTP/2.0\r\n", V::Version),
            ("GET / http/1.1\r\n", V::Version),
            ("GET / HTTP/1.1.1\r\n", V::Version),
            ("GET / HTTP/11\r\n", V::Version),
            ("GET / X\r\n", V::Version),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\rX", V::Version),
            ("PRI * HTTP/2.0\r\nHost: a\r\n\r\n", V::Version),
            ("\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", V::Version),
            ("CONNECT a:443 HTTP/1.1\r\n", V::Connect),
            ("GET / HTTP/1.1\r\n Host: a\r\n\r\n", V::ObsFold),
            ("GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", V::ObsFold),
            ("GET / HTTP/1.1\r\nHost: a\r\n\tb\r\n\r\n", V::ObsFold),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n",
                V::ObsFold,
            ),
            ("GET / HTTP/1.1\r\nHost : a\r\n\r\n", V::SpaceBeforeColon),
            ("GET / HTTP/1.1\r\nHost\t: a\r\n\r\n", V::SpaceBeforeColon),
            ("GET / HTTP/1.1\r\n: a\r\n\r\n", V::FieldName),
            ("GET / HTTP/1.1\r\nHost\r\n\r\n", V::FieldName),
            ("GET / HTTP/1.1\r\nHo\0st: a\r\n\r\n", V::FieldName),
            ("GET / HTTP/1.1\r\nHo\u{e4}st: a\r\n\r\n", V::FieldName),
            ("GET / HTTP/1.1\r\n\r\n", V::HostMissing),
            (
                "GET / HTTP/1.1\r\nX-Host: a\r\nHos: a\r\n\r\n",
                V::HostMissing,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
                V::HostDuplicate,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nhOST: b\r\n\r\n",
                V::HostDuplicate,
            ),
            (
                "GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n",
                V::HostDuplicate,
            ),
            (
                "GET http://a/ HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
                V::HostDuplicate,
            ),
            ("GET / HTTP/1.1\r\nHost:\r\n\r\n", V::HostMalformed),
            ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", V::HostMalformed),
            ("GET / HTTP/1.1\r\nHost: user@a\r\n\r\n", V::HostMalformed),
            ("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", V::HostMalformed),
            ("GET / HTTP/1.1\r\nHost: a\\b\r\n\r\n", V::HostMalformed),
            ("GET / HTTP/1.1\r\nHost: a?b\r\n\r\n", V::HostMalformed),
            (
                "GET / HTTP/1.1\r\nHost: \u{fc}.example\r\n\r\n",
                V::HostMalformed,
            ),
            (
                "GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
                V::TransferEncodingVersion,
            ),
        ];
        for (stream, violation) in table {
            assert_eq!(
                verdict(stream.as_bytes()).err(),
                Some(*violation),
                "{stream:?}"
            );
        }
    }

    #[test]
    fn what_is_refused_in_a_header() {
        use Violation as V;
        let table: &[(&str, V)] = &[
            ("X: \0\r\n", V::ControlInValue),
            ("X: a\0b\r\n", V::ControlInValue),
            ("X: 1234567\x7f9abcdef\r\n", V::ControlInValue),
            ("X: 1234567\x1b9abcdef\r\n", V::ControlInValue),
            ("Content-Length: 1\x0b\r\n", V::ControlInValue),
            ("Transfer-Encoding: \x0bchunked\r\n", V::ControlInValue),
            ("Content-Length:\r\n", V::ContentLength),
            ("Content-Length: \t\r\n", V::ContentLength),
            ("Content-Length: +5\r\n", V::ContentLength),
            ("Content-Length: -5\r\n", V::ContentLength),
            ("Content-Length: 0x5\r\n", V::ContentLength),
            ("Content-Length: 5 5\r\n", V::ContentLength),
            ("Content-Length: 5.0\r\n", V::ContentLength),
            ("Content-Length: \"5\"\r\n", V::ContentLength),
            ("Content-Length: \u{0665}\r\n", V::ContentLength),
            ("Content-Length: 5,5\r\n", V::ContentLengthList),
            ("Content-Length: 5 , 5\r\n", V::ContentLengthList),
            ("Content-Length: ,5\r\n", V::ContentLengthList),
            (
                "Content-Length: 5\r\nContent-Length: 5\r\n",
                V::ContentLengthDuplicate,
            ),
            (
                "Content-Length: 5\r\ncontent-length: 6\r\n",
                V::ContentLengthDuplicate,
            ),
            (
                "Content-Length: 9223372036854775808\r\n",
                V::ContentLengthTooLarge,
            ),
            (
                "Content-Length: 18446744073709551616\r\n",
                V::ContentLengthTooLarge,
            ),
            (
                "Content-Length: 18446744073709551621\r\n",
                V::ContentLengthTooLarge,
            ),
            (
                "Content-Length: 99999999999999999999999999\r\n",
                V::ContentLengthTooLarge,
            ),
            (
                "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n",
                V::LengthAndCoding,
            ),
            (
                "Transfer-Encoding: chunked\r\nContent-Length: 0\r\n",
                V::LengthAndCoding,
            ),
            (
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
                V::TransferEncodingDuplicate,
            ),
            (
                "Transfer-Encoding: chunked\r\nTRANSFER-ENCODING: identity\r\n",
                V::TransferEncodingDuplicate,
            ),
            ("Transfer-Encoding:\r\n", V::TransferEncoding),
            ("Transfer-Encoding: identity\r\n", V::TransferEncoding),
            ("Transfer-Encoding: gzip, chunked\r\n", V::TransferEncoding),
            (
                "Transfer-Encoding: chunked, chunked\r\n",
                V::TransferEncoding,
            ),
            ("Transfer-Encoding: chunked,\r\n", V::TransferEncoding),
            ("Transfer-Encoding: xchunked\r\n", V::TransferEncoding),
            ("Transfer-Encoding: chunkedx\r\n", V::TransferEncoding),
            ("Transfer-Encoding: chunked;q=1\r\n", V::TransferEncoding),
            ("Transfer-Encoding: \"chunked\"\r\n", V::TransferEncoding),
            ("Transfer-Encoding: chun ked\r\n", V::TransferEncoding),
            (
                "Transfer-Encoding: chunkedchunkedchunked\r\n",
                V::TransferEncoding,
            ),
            ("Transfer-Encoding : chunked\r\n", V::SpaceBeforeColon),
            ("Transfer-Encoding\r\n: chunked\r\n", V::FieldName),
        ];
        for (fields, violation) in table {
            assert_eq!(
                verdict(&with_fields(fields)).err(),
                Some(*violation),
                "{fields:?}"
            );
        }
    }

    #[test]
    fn what_is_refused_in_a_chunked_body() {
        use Violation as V;
        let long_extension = format!("1;{}\r\na\r\n", "e".repeat(CHUNK_EXTENSION_BYTES_MAX));
        let many_extensions = format!("1;{}\r\na\r\n", "e".repeat(999)).repeat(17);
        let long_trailers = format!("0\r\nX: {}\r\n\r\n", "t".repeat(TRAILER_BYTES_MAX));
        let many_trailers = format!("0\r\n{}\r\n", "x: y\r\n".repeat(FIELDS_MAX + 1));
        let table: &[(&str, V)] = &[
            ("\r\n", V::Chunk),
            ("g\r\n", V::Chunk),
            (" 1\r\na\r\n", V::Chunk),
            ("+1\r\na\r\n", V::Chunk),
            ("0x1\r\na\r\n", V::Chunk),
            ("1 \r\na\r\n", V::Chunk),
            ("1\ta\r\n", V::Chunk),
            ("1;a\0\r\n", V::Chunk),
            ("1\r\nab\r\n", V::Chunk),
            (";a\r\n", V::Chunk),
            ("1\n", V::BareLf),
            ("1;a\n", V::BareLf),
            ("1 \n", V::BareLf),
            ("1\r\na\n", V::BareLf),
            ("\n", V::BareLf),
            ("0\r\n\n", V::BareLf),
            ("1\ra\r\n", V::BareCr),
            ("1;a\rb\r\n", V::BareCr),
            ("1\r\na\r1", V::BareCr),
            ("0\r\n\rX", V::BareCr),
            ("10000000000000000\r\n", V::ChunkTooLarge),
            ("00000000000000001\r\n", V::ChunkTooLarge),
            ("fffffffffffffffff\r\n", V::ChunkTooLarge),
            (&long_extension, V::ChunkExtensionTooLarge),
            (&many_extensions, V::ChunkExtensionTooLarge),
            (&long_trailers, V::TrailersTooLarge),
            (&many_trailers, V::TooManyFields),
            ("0\r\nContent-Length: 5\r\n\r\n", V::TrailerForbidden),
            (
                "0\r\nTransfer-Encoding: chunked\r\n\r\n",
                V::TrailerForbidden,
            ),
            ("0\r\nHost: b\r\n\r\n", V::TrailerForbidden),
            ("0\r\nX: y\r\n z\r\n\r\n", V::ObsFold),
            ("0\r\nX : y\r\n\r\n", V::SpaceBeforeColon),
            ("0\r\nX: \0\r\n\r\n", V::ControlInValue),
            ("0\r\nGET / HTTP/1.1\r\n", V::SpaceBeforeColon),
        ];
        for (body, violation) in table {
            let result = verdict(&chunked(body));
            assert_eq!(result.err(), Some(*violation), "{body:?}");
        }
    }

    #[test]
    fn limits_are_where_they_are_said_to_be() {
        let target = |bytes| format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "t".repeat(bytes));
        let line_rest = "GET / HTTP/1.1\r\n".len();
        assert!(verdict(target(REQUEST_LINE_BYTES_MAX - line_rest).as_bytes()).is_ok());
        let long = verdict(target(REQUEST_LINE_BYTES_MAX - line_rest + 1).as_bytes());
        assert_eq!(long.err(), Some(Violation::RequestLineTooLong));

        let value = |bytes| with_fields(&format!("X: {}\r\n", "v".repeat(bytes)));
        let head_rest = with_fields("X: \r\n").len();
        assert!(verdict(&value(HEAD_BYTES_MAX - head_rest)).is_ok());
        let large = verdict(&value(HEAD_BYTES_MAX - head_rest + 1));
        assert_eq!(large.err(), Some(Violation::HeadTooLarge));

        let fields = |count| with_fields(&"x: y\r\n".repeat(count));
        assert!(verdict(&fields(FIELDS_MAX - 1)).is_ok());
        assert_eq!(
            verdict(&fields(FIELDS_MAX)).err(),
            Some(Violation::TooManyFields)
        );

        let extension = |bytes| chunked(&format!("1{}\r\na\r\n0\r\n\r\n", ";".repeat(bytes)));
        assert!(verdict(&extension(CHUNK_EXTENSION_BYTES_MAX)).is_ok());
        let large = verdict(&extension(CHUNK_EXTENSION_BYTES_MAX + 1));
        assert_eq!(large.err(), Some(Violation::ChunkExtensionTooLarge));

        let trailer = |bytes| chunked(&format!("0\r\nx:{}\r\n\r\n", "t".repeat(bytes)));
        assert!(verdict(&trailer(TRAILER_BYTES_MAX - "x:\r\n\r\n".len())).is_ok());
        let large = verdict(&trailer(TRAILER_BYTES_MAX - "x:\r\n\r\n".len() + 1));
        assert_eq!(large.err(), Some(Violation::TrailersTooLarge));

        assert!(verdict(&with_fields("Content-Length: 9223372036854775807\r\n")).is_ok());
        assert!(verdict(&chunked("ffffffffffffffff\r\na")).is_ok());
    }

    #[test]
    fn what_is_let_through() {
        let table: &[(&[u8], u64, Phase)] = &[
            (b"", 0, Phase::Idle),
            (b"P", 0, Phase::Head),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r", 0, Phase::Head),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x12\n", 0, Phase::PassThrough),
            (b"PROPFIND / HTTP/1.1\r\nHost: a\r\n\r\n", 1, Phase::Idle),
            (b"GET / HTTP/1.0\r\n\r\n", 1, Phase::Idle),
            (b"GET / HTTP/1.1\r\nhost:A.example.:8080\t \r\n\r\n", 1, Phase::Idle),
            (b"GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", 1, Phase::Idle),
            (b"GET http://a:80/b HTTP/1.1\r\nHost: a:80\r\n\r\n", 1, Phase::Idle),
            (b"OPTIONS * HTTP/1.1\r\nHost: a\r\nX:\r\n\r\n", 1, Phase::Idle),
            (b"connect / HTTP/1.1\r\nHost: a\r\n\r\n", 1, Phase::Idle),
            (b"GET /\xc3\xa4 HTTP/1.1\r\nHost: a\r\nX: \xc3\xa4\tb\x80\r\n\r\n", 1, Phase::Idle),
            (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", 1, Phase::Idle),
            (b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 2, Phase::Idle),
            (b"PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 002 \r\n\r\na", 1, Phase::Body),
            (b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n\0\n\rGE", 1, Phase::Head),
            (b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", 1, Phase::Idle),
            (b"PUT / HTTP/1.1\r\nHost: a\r\ntransfer-encoding:\tCHUNKED \r\n\r\n1 \t;a=\"b\tc\";d\r\n\n\r\n0;z\r\nX: y\r\n\r\n", 1, Phase::Idle),
            (b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n00\r\nX: y\r\n", 1, Phase::Body),
        ];
        for (stream, requests, phase) in table {
            let guard =
                verdict(stream).map_err(|violation| (violation, stream.escape_ascii().to_string()));
            let guard = guard.unwrap();
            let shown = stream.escape_ascii();
            assert_eq!(
                (guard.requests(), guard.phase()),
                (*requests, *phase),
                "{shown}"
            );
        }
    }

    #[test]
    fn a_refusal_is_final_and_says_what_may_be_handed_on() {
        let mut guard = HeadGuard::new();
        let stream = b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\n\0GET /2";
        let refused = Refused {
            violation: Violation::RequestLine,
            deliverable: 29,
        };
        assert_eq!(guard.feed(stream), Err(refused));
        assert_eq!(
            guard.feed(b"GET / HTTP/1.1\r\n"),
            Err(Refused {
                deliverable: 0,
                ..refused
            })
        );

        let mut guard = HeadGuard::new();
        let stream = b"GET / HTTP/1.1\r\nX: y\r\n\r\n";
        let refused = Refused {
            violation: Violation::HostMissing,
            deliverable: stream.len() - 1,
        };
        assert_eq!(guard.feed(stream), Err(refused));
    }

    #[test]
    fn every_status_fits_its_violation() {
        assert_eq!(Violation::HeadTooLarge.status(), 431);
        assert_eq!(Violation::RequestLineTooLong.status(), 414);
        assert_eq!(Violation::ContentLengthTooLarge.status(), 413);
        assert_eq!(Violation::BareLf.status(), 400);
    }

    #[test]
    fn a_run_of_text_ends_at_the_first_control_byte() {
        for length in 0..40 {
            let mut text = vec![b'a'; length];
            assert_eq!(text_run::<0x20>(&text), length);
            for at in 0..length {
                for (byte, ends) in [
                    (0, true),
                    (0x1f, true),
                    (b' ', false),
                    (0x7f, true),
                    (0x80, false),
                    (0xff, false),
                ] {
                    text[at] = byte;
                    let expected = if ends { at } else { length };
                    assert_eq!(
                        text_run::<0x20>(&text),
                        expected,
                        "{byte:#x} at {at} of {length}"
                    );
                }
                text[at] = b'~';
            }
        }
    }

    /// One valid request as bytes.
    fn request() -> impl Strategy<Value = Vec<u8>> {
        let field = (
            "x-[a-zA-Z0-9_~-]{0,12}",
            "[ \t]{0,2}",
            "[!-~]{0,30}( [!-~]{1,5}){0,2}",
            "[ \t]{0,2}",
        )
            .prop_map(|(name, before, value, after)| format!("{name}:{before}{value}{after}\r\n"));
        let fields = prop::collection::vec(field, 0..5).prop_map(|fields| fields.concat());
        let trailer = ("x-[a-z]{1,8}", "[!-~]{1,20}")
            .prop_map(|(name, value)| format!("{name}: {value}\r\n"));
        let trailers = prop::collection::vec(trailer, 0..3).prop_map(|trailers| trailers.concat());
        let data = prop::collection::vec(any::<u8>(), 1..60);
        let chunk = (
            data,
            "(;[a-z]{1,5}(=[a-z0-9]{1,5})?){0,2}",
            "0{0,3}",
            any::<bool>(),
        )
            .prop_map(|(data, extension, zeros, upper)| {
                let size = if upper {
                    format!("{:X}", data.len())
                } else {
                    format!("{:x}", data.len())
                };
                [
                    format!("{zeros}{size}{extension}\r\n").as_bytes(),
                    &data,
                    b"\r\n",
                ]
                .concat()
            });
        let chunks = prop::collection::vec(chunk, 0..4).prop_map(|chunks| chunks.concat());
        let body = prop_oneof![
            Just((String::new(), Vec::new())),
            prop::collection::vec(any::<u8>(), 0..100)
                .prop_map(|body| (format!("Content-Length: {}\r\n", body.len()), body)),
            (chunks, trailers).prop_map(|(chunks, trailers)| {
                let last = format!("0\r\n{trailers}\r\n");
                (
                    "Transfer-Encoding: chunked\r\n".to_owned(),
                    [&chunks, last.as_bytes()].concat(),
                )
            }),
        ];
        let line = (
            "(\r\n)?",
            "GET|POST|PUT|DELETE|PATCH|OPTIONS",
            "/[a-z0-9/._~%-]{0,20}",
            "[a-z]{1,8}(:80)?",
        );
        (line, fields.clone(), body, fields).prop_map(|((empty, method, target, host), before, (framing, body), after)| {
            // A stray percent is no valid escape to everybody.
            let target = target.replace('%', "%41");
            let head = format!("{empty}{method} {target} HTTP/1.1\r\n{before}Host: {host}\r\n{framing}{after}\r\n");
            [head.as_bytes(), &body].concat()
        })
    }

    /// Valid requests, one after the other, and how many.
    fn pipeline() -> impl Strategy<Value = (Vec<u8>, u64)> {
        prop::collection::vec(request(), 1..5)
            .prop_map(|requests| (requests.concat(), requests.len() as u64))
    }

    /// A pipeline with a few bytes changed to those that matter to framing.
    fn mutated() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop::sample::select(vec![
            "\r",
            "\n",
            "\r\n",
            " ",
            "\t",
            ":",
            ";",
            ",",
            "0",
            "5",
            "a",
            "\0",
            "\x7f",
            "\u{e4}",
            "Host: b\r\n",
            "Content-Length: 3\r\n",
            "Transfer-Encoding: chunked\r\n",
            "\r\n\r\n",
            "GET /x HTTP/1.1\r\n",
            "1.0",
        ]);
        let change = (any::<prop::sample::Index>(), 0..4usize, piece);
        (pipeline(), prop::collection::vec(change, 0..4)).prop_map(|((mut stream, _), changes)| {
            for (at, removed, piece) in changes {
                let at = at.index(stream.len() + 1);
                let end = (at + removed).min(stream.len());
                stream.splice(at..end, piece.bytes());
            }
            stream
        })
    }

    /// The verdict on a stream fed in pieces.
    fn verdict_in_pieces(stream: &[u8], cuts: &[usize]) -> Result<(u64, Phase), Violation> {
        let mut guard = HeadGuard::new();
        let mut from = 0;
        for cut in cuts.iter().copied().chain([stream.len()]) {
            let piece = &stream[from.min(cut)..cut];
            if let Err(refused) = guard.feed(piece) {
                assert!(refused.deliverable <= piece.len());
                return Err(refused.violation);
            }
            from = from.max(cut);
        }
        Ok((guard.requests(), guard.phase()))
    }

    /// The request lines that the guard sees, up to where it refuses.
    fn targets_for_guard(stream: &[u8]) -> (Vec<String>, Option<Violation>) {
        let mut guard = HeadGuard::new();
        let (mut targets, mut head) = (Vec::new(), Vec::new());
        for byte in stream {
            let before = guard.requests();
            if let Err(refused) = guard.feed(&[*byte]) {
                return (targets, Some(refused.violation));
            }
            head.push(*byte);
            if guard.requests() > before {
                let text = String::from_utf8_lossy(&head).trim_start().to_owned();
                targets.push(text.split(' ').nth(1).unwrap().to_owned());
            }
            if guard.phase() != Phase::Head {
                head.clear();
            }
        }
        (targets, None)
    }

    /// The requests that hyper serves from a stream, and whether it was content with it.
    fn targets_for_hyper(stream: &[u8]) -> (Vec<String>, bool) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let targets = Rc::new(RefCell::new(Vec::new()));
        let seen = Rc::clone(&targets);
        let service =
            hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                let seen = Rc::clone(&seen);
                async move {
                    seen.borrow_mut().push(request.uri().to_string());
                    let _whole = request.into_body().collect().await;
                    Ok::<_, Infallible>(http::Response::new(Empty::<Bytes>::new()))
                }
            });
        let (mut client, server) = tokio::io::duplex(1 << 20);
        let content = runtime.block_on(async {
            client.write_all(stream).await.unwrap();
            client.shutdown().await.unwrap();
            let served = hyper::server::conn::http1::Builder::new()
                .half_close(true)
                .serve_connection(TokioIo::new(server), service)
                .await;
            let mut answers = Vec::new();
            client.read_to_end(&mut answers).await.unwrap();
            served.is_ok() && !answers.windows(13).any(|window| window == b"HTTP/1.1 400 ")
        });
        (targets.take(), content)
    }

    proptest! {
        #[test]
        fn valid_requests_are_never_refused((stream, requests) in pipeline()) {
            prop_assert_eq!(verdict_in_pieces(&stream, &[]), Ok((requests, Phase::Idle)));
        }

        #[test]
        fn cuts_do_not_matter(stream in mutated(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6)) {
            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
            cuts.sort_unstable();
            let bytewise: Vec<_> = (0..stream.len()).collect();
            let whole = verdict_in_pieces(&stream, &[]);
            prop_assert_eq!(verdict_in_pieces(&stream, &cuts), whole);
            prop_assert_eq!(verdict_in_pieces(&stream, &bytewise), whole);
        }

        #[test]
        fn no_bytes_make_it_panic(stream in prop::collection::vec(any::<u8>(), 0..300), cut in any::<prop::sample::Index>()) {
            let cut = cut.index(stream.len() + 1);
            prop_assert_eq!(verdict_in_pieces(&stream, &[cut]), verdict_in_pieces(&stream, &[]));
        }

        #[test]
        fn hyper_sees_the_same_requests((stream, requests) in pipeline()) {
            let (targets, content) = targets_for_hyper(&stream);
            prop_assert!(content);
            prop_assert_eq!(targets.len() as u64, requests);
            prop_assert_eq!(targets, targets_for_guard(&stream).0);
        }

        /// What the guard lets through has one reading: hyper finds no other requests in it. It
        /// may find fewer, where it refuses what the guard leaves to it, or closes.
        #[test]
        fn hyper_reads_what_is_let_through_the_same_way(stream in mutated()) {
            let mut guard = HeadGuard::new();
            let handed_on = match guard.feed(&stream) {
                Ok(()) => &stream[..],
                Err(refused) => &stream[..refused.deliverable],
            };
            let (hyper, content) = targets_for_hyper(handed_on);
            let (guarded, violation) = targets_for_guard(&stream);
            prop_assert!(guarded.starts_with(&hyper), "hyper {:?}, guard {:?}", hyper, guarded);
            if content && violation.is_none() && guard.phase() == Phase::Idle && !stream.windows(3).any(|w| w == b"1.0") {
                prop_assert_eq!(hyper.len(), guarded.len());
            }
        }
    }
}
