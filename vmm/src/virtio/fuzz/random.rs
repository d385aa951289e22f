//! Random numbers that replay: splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
//! number generators", 2014), and values that are likely to matter.

/// A seed gives the same numbers every time.
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `bound`, which is not zero.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(super) fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }

    pub(super) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        let index = usize::try_from(self.below(of.len() as u64)).expect("an index");
        of[index]
    }

    pub(super) fn bytes(&mut self, most: u64) -> Vec<u8> {
        let length = self.below(most + 1);
        (0..length).map(|_| self.byte()).collect()
    }

    pub(super) fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    pub(super) fn half(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// Small, at an edge, or anything.
    pub(super) fn word(&mut self) -> u32 {
        match self.below(4) {
            0 => u32::from(self.byte()) & 7,
            1 => self.pick(&[0, 1, 1 << 16, 1 << 30, 1 << 31, u32::MAX - 1, u32::MAX]),
            2 => 1 << self.below(32),
            _ => u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()]),
        }
    }

    /// Lengths of buffers: mostly such as drivers use.
    pub(super) fn length(&mut self) -> u32 {
        match self.below(8) {
            0 => self.word(),
            1 => self.pick(&[
                0, 1, 11, 12, 13, 15, 16, 17, 43, 44, 45, 511, 512, 513, 65_536,
            ]),
            _ => u32::from(self.half()) % 5000,
        }
    }
}
