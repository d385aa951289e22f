//! kill -9 at random instants: what was acknowledged is there, what was not is there whole or
//! not at all, and what is there is served.
//!
//! ```text
//!  client 0 ── change, change, change … ┐
//!  client 1 ── change, change, change … ├─ kill -9 ─▶ (start, kill -9) ─▶ start ─▶ compare
//!  writer ──── file, key, sum, file … ──┤
//!  (kill -9 of data,) a random instant ─┘
//! ```
//!
//! The data process alone is killed in between, and no client may notice that; the writer, whose
//! requests go to that process, asks again.
//!
//! `INSULA_TEST_KILLS` asks for more than 200 kills; `INSULA_TEST_SEED` for the same choices
//! again (the instants are the machine's).

pub(crate) mod model;
pub(crate) mod random;
pub(crate) mod writer;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

use insula_tests::http::Request;
use insula_tests::wait::holds;
use insula_tests::{Admin, TestHost, guests, until};
use serde_json::json;

use self::model::{Change, Digests, Model, SAMPLES};
use self::random::Random;
use self::writer::{Ending, Writer};

const KILLS: u64 = 200;

pub(crate) fn number_from(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable}={text:?} is not a number")),
    )
}

/// The seed that was asked for, or another one each time.
pub(crate) fn seed() -> u64 {
    let seed = number_from("INSULA_TEST_SEED").unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        now.map_or(0, |now| u64::from(now.subsec_nanos()))
    });
    eprintln!("INSULA_TEST_SEED={seed}");
    seed
}

/// Somebody who changes a tenant, one change after another.
pub(crate) struct Client {
    pub(crate) tenant: String,
    /// What was acknowledged.
    pub(crate) model: Model,
    /// What was asked for and never answered.
    pending: Option<(Change, String)>,
    random: Random,
    serial: u64,
    digests: Digests,
    pub(crate) acknowledged: u64,
}

impl Client {
    /// Of a tenant that is not there yet.
    pub(crate) fn new(tenant: &str, random: Random, digests: &Digests) -> Self {
        Self {
            tenant: tenant.to_owned(),
            model: Model::default(),
            pending: None,
            random,
            serial: 0,
            digests: digests.clone(),
            acknowledged: 0,
        }
    }

    /// Makes changes until the host is gone.
    pub(crate) fn work(&mut self, admin: &Admin) {
        loop {
            self.serial += 1;
            let change = self.model.choose(&mut self.random, self.serial);
            let key = format!("{}-{}", self.tenant, self.serial);
            match change.ask(admin, &self.tenant, &key) {
                // The other client deleted the last identical version in this very moment.
                Ok(answer) if answer.status == 503 && answer.problem() == "host_busy" => {}
                Ok(answer) => {
                    let accepted = (200..300).contains(&answer.status);
                    assert!(accepted, "{change:?} of {:?}: {answer:?}", self.model);
                    self.model = self.model.after(&change, &self.digests);
                    self.acknowledged += 1;
                }
                Err(_) => {
                    self.pending = Some((change, key));
                    return;
                }
            }
        }
    }

    /// Compares with what a host has after a kill, and takes over what became of the change that
    /// was under way.
    pub(crate) fn compare(&mut self, admin: &Admin) {
        let found = Model::observe(admin, &self.tenant);
        let Some((change, key)) = self.pending.take() else {
            panic!("the client outlived its host");
        };
        let after = self.model.after(&change, &self.digests);
        assert!(
            found == self.model || found == after,
            "neither without nor with {change:?}:\n{found:#?}\nacknowledged:\n{:#?}",
            self.model
        );
        self.model = found;
        if change.is_keyed() && self.random.below(2) == 0 {
            // Whoever heard nothing asks again, and it is done once.
            let answer = change.ask(admin, &self.tenant, &key).expect("an answer");
            let replayed = answer.header("idempotency-replayed").is_some();
            assert!(
                (200..300).contains(&answer.status),
                "{change:?}: {answer:?}"
            );
            assert_eq!(replayed, self.model == after, "{change:?}: {answer:?}");
            assert_eq!(Model::observe(admin, &self.tenant), after, "{change:?}");
            self.model = after;
        }
    }
}

/// What has a version with a share answers, and with that version.
pub(crate) fn is_served(ingress: SocketAddr, tenant: &str, model: &Model) {
    for (name, service) in &model.services {
        let host_name = format!("{name}.{tenant}.localhost");
        let answer = Request::new(ingress, &host_name, "GET", "/");
        let answer = answer.header("te", "trailers").send();
        if service.traffic.is_empty() {
            assert_eq!(answer.status, 404, "{host_name}: {answer:?}");
            continue;
        }
        assert_eq!(answer.status, 200, "{host_name}: {answer:?}");
        let version = u32::try_from(answer.usage().version).expect("a version");
        let share = service.traffic.get(&version);
        assert!(share > Some(&0), "{host_name}: {version} of {service:?}");
    }
}

/// Digests of the samples.
pub(crate) fn digests(admin: &Admin) -> Digests {
    let tenant = "/v1/tenants/samples";
    admin.put(tenant, &json!({}));
    let service = format!("{tenant}/services/web");
    admin.put(&service, &json!({}));
    let digests = SAMPLES.map(|sample| {
        let answer = admin.upload(&format!("{service}/versions"), guests::bytes(sample));
        let answer = answer.patience(Duration::from_secs(120)).send();
        let digest = answer.json()["digest"].as_str().map(str::to_owned);
        digest.unwrap_or_else(|| panic!("{answer:?}"))
    });
    admin.delete(tenant);
    digests
}

/// No file is there without a record, and none is missing.
pub(crate) fn files_are_those_of<'a>(host: &TestHost, digests: impl Iterator<Item = &'a String>) {
    let wanted: BTreeSet<String> = digests
        .map(|digest| digest.trim_start_matches("sha256:").to_owned())
        .collect();
    let names = |folder: &str| -> BTreeSet<String> {
        let files = host.files(folder).into_iter();
        let name = |path: std::path::PathBuf| path.file_name().map(std::ffi::OsStr::to_owned);
        files
            .filter_map(name)
            .map(|name| {
                name.to_string_lossy()
                    .split('-')
                    .next()
                    .unwrap_or_default()
                    .to_owned()
            })
            .collect()
    };
    assert_eq!(names("blobs"), wanted);
    assert_eq!(names("artefacts"), wanted);
    assert!(host.files("tmp").is_empty(), "{:?}", host.files("tmp"));
}

/// Mostly within the span of one or two changes, often enough within that of a compilation.
fn instant(random: &mut Random) -> Duration {
    let span = [8_000, 30_000, 120_000, 300_000][random.below(4)];
    Duration::from_micros(random.below(span) as u64)
}

#[test]
fn what_was_acknowledged_survives_kill_9_at_any_instant() {
    let kills = number_from("INSULA_TEST_KILLS").unwrap_or(KILLS);
    let mut random = Random(seed());
    let host = TestHost::start();
    let digests = digests(&host.admin());
    let mut writer = Writer::new(&host.admin(), Random(random.next()));
    let mut clients =
        ["left", "right"].map(|tenant| Client::new(tenant, Random(random.next()), &digests));
    let (mut done, mut data_deaths) = (0, 0);
    while done < kills {
        let (admin, ingress) = (host.admin(), host.ingress());
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _ending = Ending(&ended);
            scope.spawn(|| writer.work(ingress, &ended));
            for client in &mut clients {
                let admin = &admin;
                scope.spawn(move || client.work(admin));
            }
            // Control makes good that its data process dies: clients hear nothing of it.
            while random.below(4) == 0 {
                std::thread::sleep(instant(&mut random));
                host.kill_data();
                data_deaths += 1;
            }
            std::thread::sleep(instant(&mut random));
            host.kill();
        });
        done += 1;
        // Recovery itself is not spared.
        while random.below(4) == 0 {
            host.kill_while_it_starts(instant(&mut random) / 4);
            done += 1;
        }
        host.start_again();
        until(Duration::from_secs(20), "it is ready", || {
            let ready = host.admin_as(None).request("GET", "/readyz").send();
            holds(ready.status == 200, ready.text())
        });
        // Before the first change, so that nothing but the start has cleared away.
        let admin = host.admin();
        for client in &mut clients {
            client.compare(&admin);
        }
        writer.compare(host.ingress());
        let models = clients.iter().flat_map(|client| client.model.digests());
        files_are_those_of(&host, models.chain(&writer.digests));
        for client in &clients {
            is_served(host.ingress(), &client.tenant, &client.model);
        }
    }
    let acknowledged: u64 = clients.iter().map(|client| client.acknowledged).sum();
    eprintln!(
        "{done} kills of control, {data_deaths} of data alone, {acknowledged} acknowledged changes \
         and {} writes of guests, none lost",
        writer.acknowledged
    );
    assert!(writer.acknowledged > kills, "{}", writer.acknowledged);
    assert!(
        acknowledged > kills,
        "{acknowledged}: hardly anything was tested"
    );
    let left = host.admin().put("/v1/tenants/left", &json!({}));
    assert_eq!(left["name"], "left", "it still takes changes");
}
