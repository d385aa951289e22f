//! Ids of requests.

use std::cell::Cell;
use std::fmt;

use http::HeaderValue;

/// An id for one request: 16 lower-case hexadecimal digits, unique for logs, and no secret.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RequestId([u8; 16]);

impl RequestId {
    /// A new one.
    #[must_use]
    pub fn new() -> Self {
        Self(hex(random()))
    }

    /// Its digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        // Hexadecimal digits are always text.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }

    /// Its digits, as bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// As the value of a header.
    #[must_use]
    pub fn header(&self) -> HeaderValue {
        header(&self.0)
    }
}

impl Default for RequestId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A new `traceparent`, not sampled (W3C Trace Context, 3.2).
#[must_use]
pub fn new_traceparent() -> HeaderValue {
    let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
    text[3..19].copy_from_slice(&hex(random()));
    text[19..35].copy_from_slice(&hex(random() | 1));
    text[36..52].copy_from_slice(&hex(random() | 1));
    header(&text)
}

fn header(digits: &[u8]) -> HeaderValue {
    // Digits and dashes are visible ASCII, which every header value may be.
    HeaderValue::from_bytes(digits).unwrap_or(HeaderValue::from_static(""))
}

fn hex(value: u64) -> [u8; 16] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = [0; 16];
    for (place, byte) in text.chunks_exact_mut(2).zip(value.to_be_bytes()) {
        place[0] = DIGITS[usize::from(byte >> 4)];
        place[1] = DIGITS[usize::from(byte & 15)];
    }
    text
}

/// 64 bits from a splitmix64 generator per thread (Steele, Lea, Flood, OOPSLA 2014), seeded by
/// the kernel. Ids only.
fn random() -> u64 {
    thread_local! {
        static STATE: Cell<u64> = {
            let mut seed = [0; 8];
            // Without entropy ids may repeat across threads, which confuses nobody but a reader.
            let _ = getrandom::fill(&mut seed);
            Cell::new(u64::from_ne_bytes(seed))
        };
    }
    STATE.with(|state| {
        let next = state.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        state.set(next);
        let mixed = (next ^ (next >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_those_of_the_number() {
        assert_eq!(hex(0x0123_4567_89ab_cdef), *b"0123456789abcdef");
        assert_ne!(RequestId::new(), RequestId::new());
        assert_eq!(RequestId(hex(10)).to_string(), "000000000000000a");
    }
}
