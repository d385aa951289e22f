//! Frames: how a message lies on the stream.
//!
//! ```text
//!   0         2         4                   8
//!   ┌─────────┬─────────┬───────────────────┬──────────────┐
//!   │ version │  files  │ length of payload │ payload      │   little-endian
//!   └─────────┴─────────┴───────────────────┴──────────────┘
//! ```
//!
//! The files of a frame are sent with its first byte, so they are there when it is complete.

/// The version of frames and messages. Both ends are the same program as a rule; where they are
/// not, they find out with the first frame.
pub const VERSION: u16 = 1;
/// Largest payload: the page of metrics of a host with very many services.
pub const PAYLOAD_MAX: usize = 128 << 20;
/// Most files of one frame: what the kernel sends at once (`SCM_MAX_FD` of `include/net/scm.h`).
pub const FILES_MAX: usize = 253;
/// Bytes before the payload.
pub const HEADER_BYTES: usize = 8;

/// What came is no frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The peer speaks another version, or something else altogether.
    #[error("the other process speaks version {0} of the protocol, and this one {VERSION}")]
    Version(u16),
    /// Too large.
    #[error("a message of {0} bytes; {PAYLOAD_MAX} are allowed")]
    TooLong(usize),
    /// Too many files.
    #[error("a message with {0} files; {FILES_MAX} are allowed")]
    TooManyFiles(usize),
}

/// What a frame begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// How many files belong to it.
    pub files: usize,
    /// How long the payload is.
    pub length: usize,
}

impl Header {
    /// Checks the bounds.
    ///
    /// # Errors
    /// [`FrameError`].
    pub fn new(files: usize, length: usize) -> Result<Self, FrameError> {
        if length > PAYLOAD_MAX {
            return Err(FrameError::TooLong(length));
        }
        if files > FILES_MAX {
            return Err(FrameError::TooManyFiles(files));
        }
        Ok(Self { files, length })
    }

    fn parse(bytes: [u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let [v0, v1, f0, f1, length @ ..] = bytes;
        let version = u16::from_le_bytes([v0, v1]);
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        Self::new(usize::from(u16::from_le_bytes([f0, f1])), length)
    }

    fn bytes(self) -> [u8; HEADER_BYTES] {
        // Both are within the bounds, which are far below what the fields hold.
        let files = u16::try_from(self.files).unwrap_or(u16::MAX).to_le_bytes();
        let length = u32::try_from(self.length).unwrap_or(u32::MAX).to_le_bytes();
        let [v0, v1] = VERSION.to_le_bytes();
        let [l0, l1, l2, l3] = length;
        [v0, v1, files[0], files[1], l0, l1, l2, l3]
    }
}

/// The bytes of a frame.
///
/// # Errors
/// [`FrameError`] when it would be too large.
pub fn encode(payload: &[u8], files: usize) -> Result<Vec<u8>, FrameError> {
    let header = Header::new(files, payload.len())?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend_from_slice(&header.bytes());
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// A frame that has arrived.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame {
    /// How many files belong to it.
    pub files: usize,
    /// The message.
    pub payload: Vec<u8>,
}

/// Cuts a stream into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    received: Vec<u8>,
}

impl Decoder {
    /// More of the stream. To be followed by [`Decoder::next`] until that has no more: so the
    /// decoder never holds more than one frame and the piece that completed it.
    pub fn push(&mut self, bytes: &[u8]) {
        self.received.extend_from_slice(bytes);
    }

    /// The next frame, when it is complete.
    ///
    /// # Errors
    /// [`FrameError`], as soon as the header is there; the stream is of no use then.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator's end is for ever, and this one's is not"
    )]
    pub fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some(header) = self.received.first_chunk() else {
            return Ok(None);
        };
        let Header { files, length } = Header::parse(*header)?;
        let end = HEADER_BYTES + length;
        let Some(payload) = self.received.get(HEADER_BYTES..end) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.received.drain(..end);
        if self.received.is_empty() {
            // A large one is not kept for the small ones that follow.
            self.received = Vec::new();
        }
        Ok(Some(Frame { files, payload }))
    }

    /// Whether the stream may end here.
    #[must_use]
    pub fn is_between_frames(&self) -> bool {
        self.received.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn frames_survive_any_cutting(
            frames in prop::collection::vec(
                (prop::collection::vec(any::<u8>(), 0..300), 0..=FILES_MAX), 0..8),
            cuts in prop::collection::vec(1usize..200, 1..40),
        ) {
            let mut stream = Vec::new();
            for (payload, files) in &frames {
                stream.extend(encode(payload, *files).unwrap());
            }
            let mut decoder = Decoder::default();
            let (mut got, mut rest) = (Vec::new(), &stream[..]);
            let mut cuts = cuts.into_iter().cycle();
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(cuts.next().unwrap().min(rest.len()));
                rest = after;
                decoder.push(piece);
                while let Some(Frame { files, payload }) = decoder.next().unwrap() {
                    got.push((payload, files));
                }
            }
            prop_assert_eq!(got, frames);
            prop_assert!(decoder.is_between_frames());
        }

        #[test]
        fn garbage_is_refused_or_waited_for(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            // Each frame takes its header at least, so this ends.
            while let Ok(Some(frame)) = decoder.next() {
                prop_assert!(frame.payload.len() <= bytes.len());
            }
        }
    }

    #[test]
    fn bounds_hold_before_the_payload_is_there() {
        let refused = |version: u16, files: u16, length: u32| {
            let mut decoder = Decoder::default();
            decoder.push(&version.to_le_bytes());
            decoder.push(&files.to_le_bytes());
            decoder.push(&length.to_le_bytes());
            decoder.next().unwrap_err()
        };
        assert_eq!(refused(2, 0, 0), FrameError::Version(2));
        let most = u16::try_from(FILES_MAX).unwrap();
        assert_eq!(
            refused(VERSION, most + 1, 0),
            FrameError::TooManyFiles(FILES_MAX + 1)
        );
        assert_eq!(
            refused(VERSION, 0, u32::MAX),
            FrameError::TooLong(u32::MAX as usize)
        );
        assert!(encode(&[], FILES_MAX + 1).is_err());
    }
}
