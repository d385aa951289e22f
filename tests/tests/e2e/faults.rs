//! One system call on the data directory fails, the k-th of its kind, for k = 1, 2, … until a
//! whole scenario passes without it: no panic, no acknowledged change lost, none half done, what
//! is served goes on, and after an fsync that failed there is no further change.
//!
//! ```text
//!  k: change, change, ✗ change ─▶ compare ─▶ again, or state_stopped ─▶ kill -9, start ─▶ compare
//! ```
//!
//! `INSULA_TEST_FAULTS=all` asks for every k; without it each test takes every few, from another
//! beginning each time (`INSULA_TEST_SEED` for the same one again).

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use insula_tests::fault::{Call, Faults};
use insula_tests::wait::holds;
use insula_tests::{TestHost, until};
use rustix::io::Errno;

use crate::kills::model::{Change, Digests, Model};
use crate::kills::{digests, files_are_those_of, is_served, number_from};

const TENANT: &str = "left";
/// How long a test goes on by default. It ends earlier where it has tried all that it wants.
const TIME: Duration = Duration::from_secs(30);

/// Which k a test tries.
struct Numbers {
    next: u64,
    step: u64,
    until: Option<Instant>,
}

impl Numbers {
    fn new(step: u64) -> Self {
        if std::env::var_os("INSULA_TEST_FAULTS").is_some_and(|which| which == "all") {
            return Self {
                next: 1,
                step: 1,
                until: None,
            };
        }
        let seed = number_from("INSULA_TEST_SEED").unwrap_or_else(|| {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            now.map_or(0, |now| u64::from(now.subsec_micros()))
        });
        eprintln!("INSULA_TEST_SEED={seed}");
        Self {
            next: 1 + seed % step,
            step,
            until: Some(Instant::now() + TIME),
        }
    }

    fn take(&mut self) -> Option<u64> {
        if self.until.is_some_and(|until| Instant::now() > until) {
            eprintln!("time is over before k = {}", self.next);
            return None;
        }
        let number = self.next;
        self.next += self.step;
        Some(number)
    }
}

fn scenario() -> Vec<Change> {
    let deploy = |activate| Change::Deploy {
        service: "web",
        sample: 0,
        activate,
    };
    vec![
        Change::PutTenant(1),
        Change::PutService("web", 1),
        deploy(true),
        deploy(false),
        Change::Split("web", BTreeMap::from([(1, 60), (2, 40)])),
        Change::Rollback("web"),
        Change::PutService("web", 2),
        Change::PutTenant(2),
    ]
}

/// What one round has come to.
struct Round<'a> {
    host: &'a TestHost,
    digests: &'a Digests,
    model: Model,
    /// The change that failed last.
    failed: Option<Change>,
    stopped: bool,
    serial: u64,
}

impl Round<'_> {
    /// Asks for a change, once more where it failed and left nothing.
    fn change(&mut self, change: &Change) {
        for _ in 0..2 {
            self.serial += 1;
            let key = format!("{:?}-{}", Instant::now(), self.serial);
            let answer = change.ask(&self.host.admin(), TENANT, &key);
            let answer = answer.unwrap_or_else(|broken| panic!("{change:?}: {broken:?}"));
            let after = self.model.after(change, self.digests);
            if (200..300).contains(&answer.status) {
                self.model = after;
                return;
            }
            let code = answer.problem();
            let honest = matches!(answer.status, 500 | 503 | 507);
            assert!(honest, "{change:?}: {answer:?}");
            self.stopped = code == "state_stopped";
            let found = Model::observe(&self.host.admin(), TENANT);
            let whole = found == self.model || found == after;
            assert!(whole, "{change:?} was answered {code}: {found:#?}");
            self.failed = Some(change.clone());
            let done = found != self.model;
            if done && !self.stopped {
                // Stored and not confirmed; it is served within seconds all the same.
                until(Duration::from_secs(10), "what is stored is served", || {
                    served_as(self.host, &found)
                });
            }
            if self.stopped {
                return;
            }
            assert!(
                self.serial < 100,
                "one call failed, and changes fail again and again"
            );
            self.model = found;
            if done {
                return;
            }
        }
        panic!("{change:?} failed twice for one call that failed");
    }

    /// What was acknowledged is there; what failed is there whole or not at all.
    fn compare(&mut self) {
        let found = Model::observe(&self.host.admin(), TENANT);
        let after = self.failed.as_ref();
        let after = after.map(|change| self.model.after(change, self.digests));
        assert!(
            found == self.model || Some(&found) == after.as_ref(),
            "neither without nor with {:?}:\n{found:#?}\nacknowledged:\n{:#?}",
            self.failed,
            self.model
        );
        self.model = found;
    }
}

fn is_ready(host: &TestHost) {
    until(Duration::from_secs(20), "it is ready", || {
        let ready = host.admin_as(None).request("GET", "/readyz").send();
        holds(ready.status == 200, ready.text())
    });
}

/// Whether each service is served by a version that has a share.
fn served_as(host: &TestHost, model: &Model) -> Result<(), String> {
    for (name, service) in &model.services {
        let answer = host.request(&format!("{name}.{TENANT}.localhost"), "GET", "/");
        let answer = answer.header("te", "trailers").send();
        if service.traffic.is_empty() {
            continue;
        }
        holds(answer.status == 200, format!("{name}: {}", answer.status))?;
        let version = u32::try_from(answer.usage().version).expect("a version");
        let share = service.traffic.get(&version);
        holds(share > Some(&0), format!("{name}: {version}"))?;
    }
    Ok(())
}

/// What must be true of a host whose state was stopped.
fn is_stopped(host: &TestHost) {
    let ready = host.admin_as(None).request("GET", "/readyz").send();
    assert_eq!(
        (ready.status, ready.problem().as_str()),
        (503, "state_stopped")
    );
    let change = Change::PutTenant(7).ask(&host.admin(), "other", "key");
    assert_eq!(change.expect("an answer").problem(), "state_stopped");
}

/// Lets the k-th call of a kind fail during the scenario. Says whether there was one.
fn round(
    faults: &Faults,
    host: &TestHost,
    digests: &Digests,
    fault: (Call, Errno),
    k: u64,
) -> bool {
    let (call, error) = fault;
    let mut round = Round {
        host,
        digests,
        model: Model::observe(&host.admin(), TENANT),
        failed: None,
        stopped: false,
        serial: 0,
    };
    faults.nth(call, k, error);
    for change in scenario() {
        round.change(&change);
        if round.stopped {
            break;
        }
    }
    is_served(host.ingress(), TENANT, &round.model);
    let seen = faults.seen();
    let what = format!("{call:?} {k} with {error:?}: {}", seen.last);
    if round.stopped {
        is_stopped(host);
    } else if seen.failed > 0 && call == Call::Sync {
        panic!("{what}: an fsync failed, and changes go on");
    }
    faults.end();
    if seen.failed > 0 {
        host.crash_and_restart();
        is_ready(host);
    }
    round.compare();
    files_are_those_of(host, round.model.digests());
    is_served(host.ingress(), TENANT, &round.model);
    let said = host.said();
    assert!(!said.contains("panicked"), "{what}:\n{said}");
    let gone = Change::DeleteTenant.ask(&host.admin(), TENANT, "");
    let gone = gone.expect("an answer").status;
    assert!(matches!(gone, 204 | 404), "{what}: {gone}");
    seen.failed > 0
}

fn each_fails(call: Call, errors: &[Errno], step: u64) {
    let Some(faults) = Faults::new() else { return };
    let host = faults.start(TestHost::plan());
    let digests = digests(&host.admin());
    let mut numbers = Numbers::new(step);
    let mut tried = 0;
    while let Some(k) = numbers.take() {
        let hits = errors
            .iter()
            .filter(|error| round(&faults, &host, &digests, (call, **error), k))
            .count();
        tried += hits;
        if hits == 0 {
            assert!(tried > 0, "no call of {call:?} was seen");
            eprintln!("{tried} calls failed; the scenario has fewer than {k} of {call:?}");
            return;
        }
    }
    assert!(tried > 0);
}

#[test]
fn an_fsync_that_fails_stops_changes_and_loses_none() {
    each_fails(Call::Sync, &[Errno::IO], 2);
}

#[test]
fn a_write_that_fails_loses_nothing() {
    each_fails(Call::Write, &[Errno::IO, Errno::NOSPC], 9);
}

#[test]
fn a_name_that_cannot_be_changed_loses_nothing() {
    each_fails(Call::Name, &[Errno::IO, Errno::NOSPC], 2);
}

#[test]
fn a_file_that_cannot_be_opened_loses_nothing() {
    each_fails(Call::Open, &[Errno::IO, Errno::MFILE], 3);
}

#[test]
fn a_call_that_fails_at_the_start_is_told_and_loses_nothing() {
    let Some(faults) = Faults::new() else { return };
    let host = faults.start(TestHost::plan());
    let digests = digests(&host.admin());
    let mut model = Model::default();
    for (number, change) in scenario().into_iter().enumerate() {
        let key = number.to_string();
        let answer = change.ask(&host.admin(), TENANT, &key).expect("an answer");
        assert!(
            (200..300).contains(&answer.status),
            "{change:?}: {answer:?}"
        );
        model = model.after(&change, &digests);
    }
    let mut numbers = Numbers::new(5);
    let mut left: Vec<Call> = Call::ALL.to_vec();
    let (mut refused, mut tried) = (0, 0);
    while let Some(k) = numbers.take() {
        left.retain(|call| {
            host.kill();
            faults.nth(*call, k, Errno::IO);
            let started = host.try_start_again();
            let seen = faults.seen();
            faults.end();
            if let Err(said) = &started {
                assert!(seen.failed > 0, "{call:?} {k}: {said}");
                assert!(!said.contains("panicked"), "{call:?} {k}: {said}");
                assert!(said.contains("error: "), "{call:?} {k}: {said}");
                host.start_again();
                refused += 1;
            }
            is_ready(&host);
            assert_eq!(Model::observe(&host.admin(), TENANT), model, "{call:?} {k}");
            is_served(host.ingress(), TENANT, &model);
            tried += seen.failed;
            seen.failed > 0
        });
        if left.is_empty() {
            break;
        }
    }
    eprintln!("{tried} calls failed at the start, {refused} hosts said so and ended");
    assert!(tried > 0 && refused > 0);
    let said = host.said();
    assert!(!said.contains("panicked"), "{said}");
}
