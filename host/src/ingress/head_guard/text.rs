//! The characters and words of a head.

/// The longest word that is looked at: `transfer-encoding`.
const WORD_BYTES_MAX: usize = 17;

/// The beginning of a word: enough to know it when it ends.
#[derive(Debug, Clone, Copy)]
pub(super) struct Word {
    bytes: [u8; WORD_BYTES_MAX],
    /// More than [`WORD_BYTES_MAX`] where the word is longer, and so none of ours.
    pub(super) len: usize,
}

impl Word {
    pub(super) const fn new() -> Self {
        Self {
            bytes: [0; WORD_BYTES_MAX],
            len: 0,
        }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        if let Some(free) = self.bytes.get_mut(self.len..) {
            for (to, from) in free.iter_mut().zip(bytes) {
                *to = *from;
            }
        }
        self.len = self.len.saturating_add(bytes.len()).min(WORD_BYTES_MAX + 1);
    }

    pub(super) fn as_bytes(&self) -> Option<&[u8]> {
        self.bytes.get(..self.len)
    }

    pub(super) fn is(&self, word: &[u8]) -> bool {
        self.as_bytes() == Some(word)
    }

    pub(super) fn is_like(&self, word: &[u8]) -> bool {
        self.as_bytes()
            .is_some_and(|bytes| bytes.eq_ignore_ascii_case(word))
    }
}

/// A set of ASCII characters.
pub(super) struct Set([bool; 256]);

impl Set {
    /// Letters, digits and these.
    pub(super) const fn alphanumeric_and(others: &[u8]) -> Self {
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

    pub(super) const fn has(&self, byte: u8) -> bool {
        self.0[byte as usize]
    }
}

/// What a token is made of (RFC 9110, 5.6.2).
static TOKEN: Set = Set::alphanumeric_and(b"!#$%&'*+-.^_`|~");
/// What a host and port are made of (RFC 3986, 3.2.2 and 3.2.3); neither user information nor a
/// path.
pub(super) static HOST: Set = Set::alphanumeric_and(b"-._~%!$&'()*+,;=:[]");

pub(super) fn token_run(bytes: &[u8]) -> usize {
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
pub(super) fn text_run<const BELOW: u8>(bytes: &[u8]) -> usize {
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
