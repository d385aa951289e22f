//! Independent measurements of what the scheduler promised. None of them knows
//! how it works inside; all arithmetic is exact.

/// Everything here is in nanoseconds, signed and wide.
pub(crate) type Wide = i128;

/// The most that the service of one tenant strays from w·v, in each direction
/// together: (W−1)·max(l, q) + l, with l the longest slice. See `lib.rs`.
pub(crate) fn stray(workers: usize, longest: u64, quantum: u64) -> Wide {
    let spread = Wide::try_from(workers).unwrap() - 1;
    spread * Wide::from(longest.max(quantum)) + Wide::from(longest)
}

/// SFQ's pairwise bound over every interval (Goyal et al. 1996, widened
/// to W workers): the difference D = S_i/w_i − S_j/w_j may move by at most
/// b_i/w_i + b_j/w_j between any two moments. Kept multiplied by w_i·w_j.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PairMeter {
    least: Wide,
    most: Wide,
}

impl PairMeter {
    pub(crate) fn new() -> Self {
        Self {
            least: Wide::MAX,
            most: Wide::MIN,
        }
    }

    /// `a`, `b`: (service so far, weight, stray). Returns how much of the
    /// bound has been used, in thousandths.
    pub(crate) fn observe(&mut self, a: (Wide, u32, Wide), b: (Wide, u32, Wide)) -> Wide {
        let (wa, wb) = (Wide::from(a.1), Wide::from(b.1));
        let difference = a.0 * wb - b.0 * wa;
        self.least = self.least.min(difference);
        self.most = self.most.max(difference);
        let bound = a.2 * wb + b.2 * wa;
        let moved = self.most - self.least;
        // One nanosecond of rounding a side: tags carry 48 bits of fraction.
        assert!(
            moved <= bound + wa + wb,
            "pair {a:?} {b:?}: moved {moved}, bound {bound}"
        );
        if bound == 0 { 0 } else { moved * 1_000 / bound }
    }
}

/// A leaky bucket: usage over *every* interval t is ≤ rate·t + burst + excess
/// exactly when the level never exceeds burst + excess.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LimitMeter {
    millicores: Wide,
    burst: Wide,
    /// In thousandths of a nanosecond.
    level: Wide,
    at: u64,
}

impl LimitMeter {
    pub(crate) fn new(millicores: u32, burst: u64, now: u64) -> Self {
        Self {
            millicores: millicores.into(),
            burst: burst.into(),
            level: 0,
            at: now,
        }
    }

    pub(crate) fn use_up(&mut self, used: u64, now: u64, excess: Wide) {
        self.level = self.level_at(now) + 1_000 * Wide::from(used);
        self.at = now;
        let most = 1_000 * (self.burst + excess);
        assert!(
            self.level <= most,
            "over the limit: level {} of {most}",
            self.level
        );
    }

    /// Whether the tenant could not complain of being held back now, with
    /// `margin` for what is still running.
    pub(crate) fn justifies_holding(&self, now: u64, margin: Wide) -> bool {
        self.level_at(now) + 1_000 * margin >= 1_000 * self.burst
    }

    fn level_at(&self, now: u64) -> Wide {
        (self.level - self.millicores * Wide::from(now - self.at)).max(0)
    }
}

/// A reservation: service over every interval t is ≥ rate·t − slack.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReservationMeter {
    millicores: Wide,
    since: u64,
    best: Wide,
}

impl ReservationMeter {
    pub(crate) fn new(millicores: u32, now: u64) -> Self {
        Self {
            millicores: millicores.into(),
            since: now,
            best: Wide::MIN,
        }
    }

    pub(crate) fn observe(&mut self, service: Wide, now: u64, slack: Wide) {
        let lead = 1_000 * service - self.millicores * Wide::from(now - self.since);
        self.best = self.best.max(lead);
        assert!(
            self.best - lead <= 1_000 * slack,
            "reservation missed by {} of {slack}",
            (self.best - lead) / 1_000
        );
    }
}

/// Rates in the ideal fluid: each tenant gets w_i·λ cores but at most as many
/// as it has jobs, with λ such that all cores are used (generalised processor
/// sharing: Parekh, Gallager 1993; with the weights readjusted as in surplus
/// fair scheduling). `wants`: (weight, jobs).
pub(crate) fn fluid_rates(workers: usize, wants: &[(u32, usize)]) -> Vec<f64> {
    let mut rates = vec![0.0; wants.len()];
    let mut open: Vec<usize> = (0..wants.len()).collect();
    let mut cores = f64::from(u32::try_from(workers).unwrap());
    loop {
        let weight: f64 = open.iter().map(|&i| f64::from(wants[i].0)).sum();
        let jobs = |i: usize| f64::from(u32::try_from(wants[i].1).unwrap());
        let share = |i: usize| cores * f64::from(wants[i].0) / weight;
        let capped: Vec<usize> = open
            .iter()
            .copied()
            .filter(|&i| share(i) > jobs(i))
            .collect();
        if capped.is_empty() {
            for &i in &open {
                rates[i] = share(i);
            }
            return rates;
        }
        for i in capped {
            rates[i] = jobs(i);
            cores -= jobs(i);
            open.retain(|&other| other != i);
        }
    }
}

/// Jain, Chiu, Hawe 1984: 1 when all are equal.
pub(crate) fn jain(values: &[f64]) -> f64 {
    let count = f64::from(u32::try_from(values.len()).unwrap());
    let sum: f64 = values.iter().sum();
    let squares: f64 = values.iter().map(|value| value * value).sum();
    sum * sum / (count * squares)
}
