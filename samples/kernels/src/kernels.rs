//! The computations. Each takes the number of its round, so that no two rounds
//! are the same and none can be computed ahead, and gives a number that depends
//! on all of its work.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::hash::BuildHasherDefault;
use std::hint::black_box;

const SIDE: usize = 64;
const SORTED: usize = 4_096;
const HASHED_BYTES: usize = 16 * 1024;
const ENTRIES: u64 = 1_024;
const FIBONACCI: u32 = 16;
const SIEVED: usize = 16_384;
const NUMBERS: u64 = 256;

/// Knuth's MMIX linear congruential generator.
fn step(state: u64) -> u64 {
    state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407)
}

/// The upper half, which is the better one.
fn next(state: &mut u64) -> u32 {
    *state = step(*state);
    u32::try_from(*state >> 32).unwrap_or(u32::MAX)
}

pub(crate) fn matmul(round: u64) -> u64 {
    let mut state = round;
    // Small whole numbers: sums stay exact, in whatever order they are made.
    let mut matrix = || -> Vec<f64> {
        (0..SIDE * SIDE)
            .map(|_| f64::from(next(&mut state) % 1_000))
            .collect()
    };
    let (left, right) = (matrix(), matrix());
    let mut product = vec![0.0_f64; SIDE * SIDE];
    for (row, sums) in left.chunks_exact(SIDE).zip(product.chunks_exact_mut(SIDE)) {
        for (factor, line) in row.iter().zip(right.chunks_exact(SIDE)) {
            for (sum, other) in sums.iter_mut().zip(line) {
                *sum += factor * other;
            }
        }
    }
    black_box(&product)
        .iter()
        .fold(0_u64, |sum, figure| step(sum ^ figure.to_bits()))
}

pub(crate) fn sort(round: u64) -> u64 {
    let mut state = round;
    let mut numbers: Vec<u32> = (0..SORTED).map(|_| next(&mut state)).collect();
    numbers.sort_unstable();
    black_box(&numbers)
        .iter()
        .fold(0_u64, |sum, number| step(sum ^ u64::from(*number)))
}

/// FNV-1a with 64 bits (RFC 9923).
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

pub(crate) fn hash(round: u64) -> u64 {
    let mut state = round;
    let bytes: Vec<u8> = (0..HASHED_BYTES / 4)
        .flat_map(|_| next(&mut state).to_le_bytes())
        .collect();
    fnv(black_box(&bytes))
}

pub(crate) fn map(round: u64) -> u64 {
    // Without random keys: the same work in every instance.
    let mut map: HashMap<u64, u64, BuildHasherDefault<DefaultHasher>> = HashMap::default();
    for key in 0..ENTRIES {
        map.insert(step(key ^ round), key);
    }
    let map = black_box(map);
    (0..ENTRIES)
        .filter_map(|key| map.get(&step(key ^ round)))
        .fold(round, |sum, value| step(sum ^ value))
}

fn fibonacci(n: u32) -> u64 {
    if n < 2 {
        u64::from(n)
    } else {
        fibonacci(n - 1) + fibonacci(n - 2)
    }
}

pub(crate) fn fib(_: u64) -> u64 {
    fibonacci(black_box(FIBONACCI))
}

pub(crate) fn sieve(_: u64) -> u64 {
    let mut composite = vec![false; black_box(SIEVED)];
    let mut primes = 0;
    for number in 2..composite.len() {
        if composite[number] {
            continue;
        }
        primes += 1;
        for multiple in (number * number..composite.len()).step_by(number) {
            composite[multiple] = true;
        }
    }
    primes
}

pub(crate) fn strings(round: u64) -> u64 {
    let mut state = round;
    let mut text = String::new();
    for _ in 0..NUMBERS {
        let _ = write!(text, "{:x};", next(&mut state));
    }
    let parsed: Vec<String> = black_box(&text)
        .split_terminator(';')
        .filter_map(|word| u32::from_str_radix(word, 16).ok())
        .map(|number| number.to_string())
        .collect();
    fnv(parsed
        .join(", ")
        .to_uppercase()
        .replace(", ", "\n")
        .as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        // Published test vectors, and what every table of primes says.
        assert_eq!(fnv(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv(b"foobar"), 0x8594_4171_f739_67e8);
        assert_eq!(fib(0), 987);
        assert_eq!(sieve(0), 1_900);
    }

    #[test]
    fn every_round_is_another_and_the_same_every_time() {
        for kernel in [matmul, sort, hash, map, strings] {
            assert_eq!(kernel(1), kernel(1));
            assert_ne!(kernel(1), kernel(2));
        }
    }
}
