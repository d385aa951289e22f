//! What is asked: one request, or many, chosen at random with a fixed seed.

/// Requests, and how the next one is chosen.
#[derive(Debug, Clone)]
pub(crate) struct Targets {
    requests: Vec<Vec<u8>>,
    /// The sums of the weights up to each request; empty where there is one only.
    sums: Vec<f64>,
    state: u64,
}

/// Any will do, as long as it is the same in every run.
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// A GET without anything that it could do without.
pub(crate) fn get(path: &str, host: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes()
}

impl Targets {
    pub(crate) fn one(path: &str, host: &str) -> Self {
        Self {
            requests: vec![get(path, host)],
            sums: Vec::new(),
            state: SEED,
        }
    }

    /// Hosts of which the n-th is asked in proportion to 1/n (Zipf's law with exponent 1).
    pub(crate) fn zipf(path: &str, hosts: &[String]) -> Self {
        let mut sum = 0.0;
        let mut rank = 0.0;
        let sums = hosts.iter().map(|_| {
            rank += 1.0;
            sum += 1.0 / rank;
            sum
        });
        Self {
            sums: sums.collect(),
            requests: hosts.iter().map(|host| get(path, host)).collect(),
            state: SEED,
        }
    }

    /// The next request.
    pub(crate) fn next(&mut self) -> &[u8] {
        let index = match self.sums.last() {
            None => 0,
            Some(all) => {
                let point = unit(&mut self.state) * all;
                let index = self.sums.partition_point(|sum| *sum <= point);
                index.min(self.requests.len() - 1)
            }
        };
        &self.requests[index]
    }
}

/// A number from 0 to less than 1 (xorshift64*, Vigna 2016).
pub(crate) fn unit(state: &mut u64) -> f64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    let bits = state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11;
    #[allow(clippy::cast_precision_loss, reason = "53 bits fit")]
    let number = bits as f64;
    number / 9_007_199_254_740_992.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_asked_as_often_as_the_law_says() {
        let hosts: Vec<String> = (0..100).map(|index| format!("h{index}")).collect();
        let mut targets = Targets::zipf("/", &hosts);
        let first = get("/", "h0");
        let hits = (0..10_000).filter(|_| targets.next() == first).count();
        // 1 of the 100th harmonic number, 5.187.
        assert!((1_828..=2_028).contains(&hits), "{hits}");
    }

    #[test]
    fn one_is_always_the_same() {
        let mut targets = Targets::one("/x", "h");
        assert_eq!(targets.next(), b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n");
        assert_eq!(targets.next(), get("/x", "h"));
    }
}
