//! New versions on trial: is one worse than its predecessor?
//!
//! ```text
//!  traffic changes ─▶ switched() ─▶ a trial of the new version against what a rollback goes to
//!  every second    ─▶ absorb()   ─▶ counts of all versions
//!                     verdicts() ─▶ versions to take back, with the reason
//! ```
//!
//! Pure: no clock, no store. Counts are windows of requests, not of time: when a sum has grown
//! past its window it is halved, so that a service with ten requests a minute is judged by the same
//! rule as one with ten thousand a second, only later.
//!
//! A verdict needs `min_requests` and then evidence beyond doubt: the lower bound of the Wilson
//! score interval (three deviations, 1 in 700 by chance) of the new version's failure rate must be
//! above the predecessor's rate plus the margin. Slowness is judged in the same way: of the new
//! version's requests, more than a hundredth take longer than the predecessor's p99 times the
//! allowed factor. What a predecessor without requests did is unknown: it counts as having had no
//! failures, and its speed is not compared.
//!
//! Only versions newer than what a rollback would go to are tried: going back is never undone by
//! the host, so that it cannot swing between two bad versions. Trials live in memory; a restart
//! ends them.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use insula_types::{AutoRollback, ServiceId, VersionNumber};

use crate::messages::VersionDelta;
use crate::pool::conduct::{Conduct, STEPS};
use crate::state::Service;

/// Requests that a new version is judged by, at least: its last few hundred.
const CANDIDATE_WINDOW: u64 = 400;
/// Requests that a predecessor is known by.
const PREDECESSOR_WINDOW: u64 = 10_000;
/// Requests of both that a comparison of p99 needs, whatever `min_requests` says.
const P99_MIN_REQUESTS: u64 = 100;
/// Deviations of the score interval.
const Z: f64 = 3.0;

/// Sums of one version.
#[derive(Debug, Clone, Copy)]
struct Sums {
    failed: u64,
    ended: [u64; STEPS],
}

impl Default for Sums {
    fn default() -> Self {
        Self {
            failed: 0,
            ended: [0; STEPS],
        }
    }
}

impl Sums {
    fn total(&self) -> u64 {
        self.ended.iter().sum()
    }

    fn add(&mut self, conduct: &Conduct, window: u64) {
        while self.total() > window {
            self.failed /= 2;
            self.ended.iter_mut().for_each(|count| *count /= 2);
        }
        self.failed += u64::from(conduct.failed);
        for (sum, count) in self.ended.iter_mut().zip(conduct.ended) {
            *sum += u64::from(count);
        }
    }

    fn failure_rate(&self) -> f64 {
        ratio(self.failed, self.total())
    }

    /// The step of the slowest hundredth's fastest.
    fn p99_step(&self) -> usize {
        let total = self.total();
        let mut slower = 0;
        for (step, count) in self.ended.iter().enumerate().rev() {
            slower += count;
            if slower * 100 > total {
                return step;
            }
        }
        0
    }

    fn slower_than(&self, step: usize) -> u64 {
        self.ended.iter().skip(step + 1).sum()
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

/// E. B. Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
fn wilson_lower(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    let (n, p) = (whole as f64, ratio(part, whole));
    let center = p + Z * Z / (2.0 * n);
    let spread = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    (center - spread) / (1.0 + Z * Z / n)
}

#[derive(Debug)]
struct Trial {
    candidate: VersionNumber,
    predecessor: VersionNumber,
    rules: AutoRollback,
    until: Duration,
}

#[derive(Debug, Default)]
struct Watched {
    versions: BTreeMap<VersionNumber, Sums>,
    trial: Option<Trial>,
}

/// A version to take back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) service: ServiceId,
    pub(crate) candidate: VersionNumber,
    pub(crate) predecessor: VersionNumber,
    pub(crate) reason: String,
}

/// See the module's documentation. Times are since any fixed moment.
#[derive(Debug, Default)]
pub(crate) struct Trials {
    services: HashMap<ServiceId, Watched>,
}

impl Trials {
    /// The service is gone.
    pub(crate) fn remove(&mut self, service: ServiceId) {
        self.services.remove(&service);
    }

    /// A service's traffic changed and is in effect.
    pub(crate) fn switched(&mut self, before: &Service, after: &Service, now: Duration) {
        let watched = self.services.entry(after.id).or_default();
        let serves = |service: &Service, number| service.traffic.share(number).unwrap_or(0) > 0;
        watched
            .versions
            .retain(|number, _| serves(after, *number) || after.previous == Some(*number));
        let serving = after.traffic.shares().filter(|(_, percent)| *percent > 0);
        let newest = serving.map(|(number, _)| number).max();
        let rules = after.spec.auto_rollback;
        let (Some(candidate), Some(predecessor)) = (newest, after.previous) else {
            watched.trial = None;
            return;
        };
        if !rules.enabled || candidate <= predecessor {
            watched.trial = None;
            return;
        }
        if !serves(before, candidate) {
            // It may have served before and been judged then.
            watched.versions.remove(&candidate);
            watched.trial = Some(Trial {
                candidate,
                predecessor,
                rules,
                until: now + Duration::from(rules.watch),
            });
        } else if let Some(trial) = &mut watched.trial {
            // The share of a version on trial grows: the trial begins anew with what is known.
            trial.predecessor = predecessor;
            trial.until = now + Duration::from(rules.watch);
        }
    }

    /// Takes what data counted.
    pub(crate) fn absorb(&mut self, deltas: &[VersionDelta]) {
        for delta in deltas {
            let watched = self.services.entry(delta.service).or_default();
            let on_trial = |trial: &Trial| trial.candidate == delta.version;
            let window = if watched.trial.as_ref().is_some_and(on_trial) {
                CANDIDATE_WINDOW
            } else {
                PREDECESSOR_WINDOW
            };
            let sums = watched.versions.entry(delta.version).or_default();
            sums.add(&delta.conduct, window);
        }
    }

    /// Ends trials that are over, and those that are lost; answers the latter.
    pub(crate) fn verdicts(&mut self, now: Duration) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        for (service, watched) in &mut self.services {
            let Some(trial) = &watched.trial else {
                continue;
            };
            let sums = |number| watched.versions.get(&number).copied().unwrap_or_default();
            let (new, old) = (sums(trial.candidate), sums(trial.predecessor));
            if let Some(reason) = worse(trial, &new, &old) {
                verdicts.push(Verdict {
                    service: *service,
                    candidate: trial.candidate,
                    predecessor: trial.predecessor,
                    reason,
                });
                watched.trial = None;
            } else if now >= trial.until {
                watched.trial = None;
            }
        }
        verdicts
    }
}

/// Why a version is to be taken back, if it is.
fn worse(trial: &Trial, new: &Sums, old: &Sums) -> Option<String> {
    let rules = &trial.rules;
    let (ended, known) = (new.total(), old.total());
    if ended < u64::from(rules.min_requests) {
        return None;
    }
    let (candidate, predecessor) = (trial.candidate, trial.predecessor);
    let allowed = old.failure_rate() + f64::from(rules.error_margin_percent) / 100.0;
    if wilson_lower(new.failed, ended) > allowed {
        return Some(format!(
            "{} of the last {ended} requests to version {candidate} failed, {} of {known} to \
             version {predecessor} before",
            new.failed, old.failed
        ));
    }
    let p99_percent = rules.p99_percent?;
    if ended.min(known) < P99_MIN_REQUESTS {
        return None;
    }
    // Two steps are an octave. Rounded up: in doubt, for the new version.
    let octaves = (f64::from(p99_percent) / 100.0).log2();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 1.5 and 1000 times is between 1 and 20 steps"
    )]
    let steps = (octaves * 2.0).ceil() as usize;
    let limit = old.p99_step() + steps;
    let slow = new.slower_than(limit);
    (wilson_lower(slow, ended) > 0.01).then(|| {
        format!(
            "{slow} of the last {ended} requests to version {candidate} took longer than \
             {p99_percent} % of the p99 of version {predecessor}"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Held, Timestamp};
    use insula_types::{Digest, TenantId, Traffic};

    const NOW: Duration = Duration::from_secs(100);

    fn version(number: u32) -> VersionNumber {
        VersionNumber::new(number).unwrap()
    }

    fn service(traffic: &str, previous: Option<u32>, rules: &str) -> Service {
        let spec = format!(r#"{{"auto_rollback":{rules}}}"#);
        Service {
            id: ServiceId::new(1),
            tenant: TenantId::new(1),
            tenant_name: "a".parse().unwrap(),
            name: "web".parse().unwrap(),
            spec: serde_json::from_str(&spec).unwrap(),
            generation: 1,
            traffic: match traffic {
                "" => Traffic::none(),
                text => serde_json::from_str(text).unwrap(),
            },
            held: Vec::<Held>::from([Held {
                number: version(1),
                digest: Digest::new([0; 32]),
            }]),
            previous: previous.map(version),
            created: Timestamp::from_millis(0),
        }
    }

    fn delta(number: u32, failed: u32, ended: u32, step: usize) -> VersionDelta {
        let mut conduct = Conduct {
            failed,
            ended: [0; STEPS],
        };
        conduct.ended[step] = ended;
        VersionDelta {
            service: ServiceId::new(1),
            version: version(number),
            conduct,
        }
    }

    /// Version 2 after version 1, with these rules.
    fn trial(rules: &str) -> Trials {
        let mut trials = Trials::default();
        trials.switched(
            &service(r#"{"1":100}"#, None, rules),
            &service(r#"{"2":100}"#, Some(1), rules),
            NOW,
        );
        trials
    }

    fn judged(trials: &mut Trials, deltas: &[VersionDelta]) -> bool {
        trials.absorb(deltas);
        let verdicts = trials.verdicts(NOW + Duration::from_secs(1));
        for verdict in &verdicts {
            let numbers = (verdict.candidate.get(), verdict.predecessor.get());
            assert_eq!(numbers, (2, 1), "{verdict:?}");
        }
        !verdicts.is_empty()
    }

    #[test]
    fn a_version_that_fails_goes_back_once_there_are_enough_requests() {
        let mut trials = trial("{}");
        assert!(
            !judged(&mut trials, &[delta(2, 19, 19, 5)]),
            "too few to say"
        );
        assert!(judged(&mut trials, &[delta(2, 1, 1, 5)]));
        assert!(!judged(&mut trials, &[delta(2, 50, 50, 5)]), "said once");
    }

    #[test]
    fn a_version_no_worse_than_its_predecessor_stays() {
        for (old, new) in [(0, 10), (50, 55), (100, 100), (30, 40)] {
            let mut trials = trial("{}");
            assert!(!judged(&mut trials, &[delta(1, old * 5, 500, 5)]));
            assert!(
                !judged(&mut trials, &[delta(2, new, 100, 5)]),
                "{old} {new}"
            );
        }
    }

    #[test]
    fn bad_luck_of_a_few_requests_is_no_proof() {
        // 8 of 20 failed: with a true rate of 20 %, that happens to one version in thirty.
        assert!(!judged(&mut trial("{}"), &[delta(2, 8, 20, 5)]));
        // 160 of 400 cannot be chance.
        assert!(judged(&mut trial("{}"), &[delta(2, 160, 400, 5)]));
    }

    #[test]
    fn a_version_that_was_good_for_long_and_then_breaks_goes_back_soon() {
        let mut trials = trial("{}");
        for _ in 0..100 {
            assert!(!judged(&mut trials, &[delta(2, 0, 1_000, 5)]));
        }
        let seconds = (1..10).find(|_| judged(&mut trials, &[delta(2, 100, 100, 5)]));
        assert!(seconds.is_some_and(|seconds| seconds <= 5), "{seconds:?}");
    }

    #[test]
    fn slowness_counts_where_it_is_asked_for() {
        let (fast, slow) = (10, 16);
        let known = delta(1, 0, 1_000, fast);
        let mut asked = trial(r#"{"p99_percent":200}"#);
        assert!(!judged(&mut asked, &[known]));
        assert!(
            !judged(&mut asked, &[delta(2, 0, 150, fast + 2)]),
            "twice as slow is allowed"
        );
        assert!(judged(&mut asked, &[delta(2, 0, 15, slow)]));
        let mut not_asked = trial("{}");
        assert!(!judged(&mut not_asked, &[known, delta(2, 0, 500, slow)]));
        let mut unknown = trial(r#"{"p99_percent":200}"#);
        assert!(
            !judged(&mut unknown, &[delta(2, 0, 500, slow)]),
            "no predecessor to compare with"
        );
    }

    #[test]
    fn what_is_tried_and_what_is_not() {
        let failing = [delta(1, 100, 100, 5), delta(2, 100, 100, 5)];
        let from_to = |before: (&str, Option<u32>), after: (&str, Option<u32>), rules: &str| {
            let mut trials = Trials::default();
            let (before, after) = (
                service(before.0, before.1, rules),
                service(after.0, after.1, rules),
            );
            trials.switched(&before, &after, NOW);
            trials.absorb(&failing[1..]);
            !trials.verdicts(NOW).is_empty()
        };
        let (one, two) = (r#"{"1":100}"#, r#"{"2":100}"#);
        let split = r#"{"1":90,"2":10}"#;
        assert!(from_to((one, None), (two, Some(1)), "{}"));
        assert!(from_to((one, None), (split, Some(1)), "{}"), "a canary");
        assert!(
            !from_to(("", None), (two, None), "{}"),
            "nothing to go back to"
        );
        assert!(
            !from_to((two, Some(1)), (one, Some(2)), "{}"),
            "going back is not undone"
        );
        assert!(!from_to(
            (one, None),
            (two, Some(1)),
            r#"{"enabled":false}"#
        ));
        assert!(
            !from_to((two, Some(1)), (two, Some(1)), "{}"),
            "nothing changed"
        );
    }

    #[test]
    fn a_trial_goes_on_while_the_share_grows_and_ends_in_time() {
        let mut trials = trial(r#"{"watch":"10s"}"#);
        let split = service(r#"{"1":50,"2":50}"#, Some(1), r#"{"watch":"10s"}"#);
        let whole = service(r#"{"2":100}"#, Some(1), r#"{"watch":"10s"}"#);
        trials.switched(&split, &whole, NOW + Duration::from_secs(8));
        assert!(trials.verdicts(NOW + Duration::from_secs(12)).is_empty());
        trials.absorb(&[delta(2, 30, 30, 5)]);
        assert_eq!(trials.verdicts(NOW + Duration::from_secs(17)).len(), 1);
        let mut trials = trial(r#"{"watch":"10s"}"#);
        assert!(trials.verdicts(NOW + Duration::from_secs(10)).is_empty());
        trials.absorb(&[delta(2, 30, 30, 5)]);
        assert!(
            trials.verdicts(NOW + Duration::from_secs(11)).is_empty(),
            "it is over"
        );
        trials.remove(ServiceId::new(1));
        assert!(trials.services.is_empty());
    }

    #[test]
    fn the_score_interval() {
        assert_eq!(wilson_lower(0, 0), 0.0);
        assert!(wilson_lower(0, 1_000) < 1e-9);
        // By hand: n = z² = 9, p = 1 gives (1 + 1/2 - 1/2) / 2.
        assert!((wilson_lower(9, 9) - 0.5).abs() < 1e-9);
    }
}
