//! Why a connection is refused.

use super::{
    CHUNK_EXTENSION_BYTES_MAX, CHUNK_SIZE_DIGITS_MAX, FIELDS_MAX, HEAD_BYTES_MAX,
    REQUEST_LINE_BYTES_MAX, TRAILER_BYTES_MAX,
};

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
