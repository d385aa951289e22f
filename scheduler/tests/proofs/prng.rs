//! A seeded generator, and the loop over seeds that names the one that failed.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
#[derive(Clone, Debug)]
pub(crate) struct Prng(u64);

impl Prng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Uniform in `low..=high`.
    pub(crate) fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    /// True once in `n`.
    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }

    pub(crate) fn choose<T: Copy>(&mut self, from: &[T]) -> T {
        let last = u64::try_from(from.len()).unwrap() - 1;
        from[usize::try_from(self.within(0, last)).unwrap()]
    }
}

/// Runs `body` for `count` seeds (a quarter of them without optimisation), or
/// for the one in `INSULA_SIM_SEED`.
pub(crate) fn for_each_seed(count: u64, body: impl Fn(u64)) {
    let seeds = match std::env::var("INSULA_SIM_SEED") {
        Ok(text) => {
            let seed = text.parse().expect("INSULA_SIM_SEED is a number");
            seed..seed + 1
        }
        Err(_) if cfg!(debug_assertions) => 0..count.div_ceil(4),
        Err(_) => 0..count,
    };
    for seed in seeds {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(seed))) {
            eprintln!("failed with INSULA_SIM_SEED={seed}");
            resume_unwind(panic);
        }
    }
}
