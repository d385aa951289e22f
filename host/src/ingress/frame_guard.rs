//! What an HTTP/2 client sends that is neither a request nor a body, and how much of that it may.
//!
//! ```text
//!  bytes after the preface ─▶ FrameGuard: nine bytes of head, payload skipped ─▶ idle frames, credit
//!                                                        │
//!                             Budget: refilled by time, by requests, by bytes that are carried
//!                                                        └─ overdrawn: the connection ends
//! ```
//!
//! The parser (`h2`) bounds streams, resets and header lists, and ends connections over them. But
//! SETTINGS, PING, PRIORITY, WINDOW_UPDATE, empty DATA and frames of a kind that nobody knows it
//! takes for as long as they come, at nobody's expense: RFC 9113, 10.5, leaves it to us to say when
//! that is too much. An honest client acknowledges a response with a few of these for what it
//! carries, and asks now and then whether we are there.
//!
//! Nothing here judges frames: those that are wrong are the parser's to refuse.

use std::time::Duration;

/// Of a frame, before its payload (RFC 9113, 4.1).
const HEAD: usize = 9;

/// Idle frames that may come at once.
const BURST: u64 = 2_000;
/// For every second.
const PER_SECOND: u64 = 100;
/// For every request: the window of its response, its end, its priority.
const PER_REQUEST: u64 = 4;
/// One for every so many bytes that are carried, in either direction: the most eager of clients
/// open two windows for each 4 KiB.
const BYTES_PER_FRAME: u64 = 1 << 10;

/// Kinds of frames (RFC 9113, 6).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
/// Of DATA: it ends the stream.
const END_STREAM: u8 = 1;

/// What came since it was last asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Came {
    idle: u64,
    requests: u64,
    data_bytes: u64,
}

/// Follows the frames of one connection.
#[derive(Debug, Clone)]
pub(super) struct FrameGuard {
    head: [u8; HEAD],
    /// Bytes of it that have come.
    have: usize,
    /// Bytes of the payload that are still to come.
    payload_left: usize,
    came: Came,
}

impl FrameGuard {
    pub(super) const fn new() -> Self {
        Self {
            head: [0; HEAD],
            have: 0,
            payload_left: 0,
            came: Came {
                idle: 0,
                requests: 0,
                data_bytes: 0,
            },
        }
    }

    /// The next bytes of the connection.
    pub(super) fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let payload = self.payload_left.min(bytes.len());
            self.payload_left -= payload;
            bytes = &bytes[payload..];
            let head = (HEAD - self.have).min(bytes.len());
            self.head[self.have..self.have + head].copy_from_slice(&bytes[..head]);
            self.have += head;
            bytes = &bytes[head..];
            if self.have == HEAD {
                self.have = 0;
                self.frame();
            }
        }
    }

    fn frame(&mut self) {
        let [l0, l1, l2, kind, flags, ..] = self.head;
        let length = u32::from_be_bytes([0, l0, l1, l2]);
        // 24 bits.
        self.payload_left = usize::try_from(length).unwrap_or(usize::MAX);
        match kind {
            HEADERS => self.came.requests += 1,
            DATA if length > 0 || flags & END_STREAM != 0 => {
                self.came.data_bytes += u64::from(length);
            }
            _ => self.came.idle += 1,
        }
    }

    /// What came since this was called last.
    pub(super) fn take(&mut self) -> Came {
        std::mem::take(&mut self.came)
    }
}

/// How many idle frames may come.
#[derive(Debug)]
pub(super) struct Budget {
    left: u64,
    /// Bytes that have not made a frame yet.
    bytes: u64,
    /// Of the connection's time, for how much there was given something.
    paid: Duration,
}

impl Budget {
    pub(super) const fn new() -> Self {
        Self {
            left: BURST,
            bytes: 0,
            paid: Duration::ZERO,
        }
    }

    /// Whether there was enough left for what came. `sent_bytes` is what went out since the last
    /// time, `age` how long there is the connection.
    pub(super) fn covers(&mut self, came: Came, sent_bytes: u64, age: Duration) -> bool {
        let owed = age.saturating_sub(self.paid).as_millis();
        let by_time = u64::try_from(owed)
            .unwrap_or(u64::MAX)
            .saturating_mul(PER_SECOND)
            / 1_000;
        if by_time > 0 {
            self.paid = age;
        }
        let bytes = self.bytes + came.data_bytes + sent_bytes;
        self.bytes = bytes % BYTES_PER_FRAME;
        let more = by_time
            .saturating_add(came.requests * PER_REQUEST)
            .saturating_add(bytes / BYTES_PER_FRAME);
        // What is carried in this piece may be what its own frames are for.
        let Some(left) = self.left.saturating_add(more).checked_sub(came.idle) else {
            return false;
        };
        self.left = left.min(BURST);
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut frame = length[1..].to_vec();
        frame.extend([kind, flags, 0, 0, 0, 1]);
        frame.extend(payload);
        frame
    }

    fn came(idle: u64, requests: u64, data_bytes: u64) -> Came {
        Came {
            idle,
            requests,
            data_bytes,
        }
    }

    proptest! {
        #[test]
        fn frames_are_the_same_however_they_are_cut(
            frames in prop::collection::vec(
                (0..12u8, 0..2u8, prop::collection::vec(any::<u8>(), 0..40)), 0..20),
            cuts in prop::collection::vec(1..30usize, 1..20),
        ) {
            let mut expected = Came::default();
            let mut stream = Vec::new();
            for (kind, flags, payload) in &frames {
                stream.extend(frame(*kind, *flags, payload));
                match kind {
                    1 => expected.requests += 1,
                    0 if !payload.is_empty() || *flags == 1 => {
                        expected.data_bytes += payload.len() as u64;
                    }
                    _ => expected.idle += 1,
                }
            }
            let mut guard = FrameGuard::new();
            let (mut rest, mut cuts) = (&stream[..], cuts.into_iter().cycle());
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(cuts.next().unwrap().min(rest.len()));
                guard.feed(piece);
                rest = after;
            }
            prop_assert_eq!(guard.take(), expected);
            prop_assert_eq!(guard.take(), Came::default());
        }

        #[test]
        fn any_bytes_are_followed(bytes in prop::collection::vec(any::<u8>(), 0..2_000)) {
            let mut guard = FrameGuard::new();
            guard.feed(&bytes);
            prop_assert!(guard.take().idle <= bytes.len() as u64 / 9);
        }
    }

    #[test]
    fn a_flood_is_over_after_its_burst_and_what_is_carried_pays() {
        let mut budget = Budget::new();
        let second = Duration::from_secs(1);
        assert!(budget.covers(came(BURST, 0, 0), 0, Duration::ZERO));
        assert!(!budget.covers(came(1, 0, 0), 0, Duration::ZERO));
        assert!(budget.covers(came(PER_SECOND, 0, 0), 0, second));
        assert!(!budget.covers(came(1, 0, 0), 0, second));
        assert!(budget.covers(came(PER_REQUEST, 1, 0), 0, second));
        assert!(budget.covers(came(2, 0, BYTES_PER_FRAME), BYTES_PER_FRAME, second));
        assert!(!budget.covers(came(1, 0, BYTES_PER_FRAME - 1), 0, second));
        assert!(budget.covers(came(1, 0, 1), 0, second));
        // Nobody saves up for a flood.
        let day = Duration::from_secs(86_400);
        assert!(budget.covers(came(0, 1_000_000, 1 << 40), 0, day));
        assert!(!budget.covers(came(BURST + 1, 0, 0), 0, day));
        // Time is not lost in pieces that are too small for a frame.
        let mut budget = Budget::new();
        assert!(budget.covers(came(BURST, 0, 0), 0, Duration::ZERO));
        for ms in 1..=10 {
            assert!(budget.covers(Came::default(), 0, Duration::from_millis(ms)));
        }
        assert!(budget.covers(came(1, 0, 0), 0, Duration::from_millis(10)));
    }
}
