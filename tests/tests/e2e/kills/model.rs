//! What a tenant must have after changes that were acknowledged, and how one is asked for.

use std::collections::BTreeMap;

use insula_tests::http::Broken;
use insula_tests::{Admin, Answer, guests};
use serde_json::{Value, json};

use super::random::Random;

pub(crate) const SAMPLES: [&str; 2] = ["hello", "echo"];
const SERVICES: [&str; 3] = ["api", "shop", "web"];
/// Most versions that a round of changes makes of one service, so that none makes room.
const VERSIONS_MAX: u32 = 60;

/// A service.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Service {
    /// A variable of its environment, different after each change of it.
    variable: String,
    /// The digest of each version.
    versions: BTreeMap<u32, String>,
    pub(crate) traffic: BTreeMap<u32, u8>,
    previous: Option<u32>,
}

/// Everything of one tenant.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Model {
    /// Its shares; `None` where there is no such tenant.
    shares: Option<u64>,
    pub(crate) services: BTreeMap<String, Service>,
    /// The last operation in the audit log.
    last: Option<String>,
}

/// A change.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    PutTenant(u64),
    DeleteTenant,
    PutService(&'static str, u64),
    DeleteService(&'static str),
    Deploy {
        service: &'static str,
        sample: usize,
        activate: bool,
    },
    Split(&'static str, BTreeMap<u32, u8>),
    Rollback(&'static str),
}

/// Digests of the samples, as the host told them.
pub(crate) type Digests = [String; SAMPLES.len()];

impl Service {
    /// What a rollback goes back to: the last version that had everything and has it no more.
    fn switch(&mut self, traffic: BTreeMap<u32, u8>) {
        let settled = |traffic: &BTreeMap<u32, u8>| {
            let mut whole = traffic.iter().filter(|(_, share)| **share == 100);
            whole.next().map(|(number, _)| *number)
        };
        let now = settled(&traffic);
        let other = |number: &u32| Some(*number) != now;
        let largest = self.traffic.iter().filter(|(number, _)| other(number));
        let largest = largest.max_by_key(|(number, share)| (**share, **number));
        self.previous = settled(&self.traffic)
            .filter(other)
            .or(self.previous.filter(other))
            .or(largest.map(|(number, _)| *number));
        self.traffic = traffic;
    }

    fn newest(&self) -> u32 {
        self.versions.keys().next_back().copied().unwrap_or(0)
    }
}

impl Model {
    /// A change that is possible now.
    pub(crate) fn choose(&self, random: &mut Random, serial: u64) -> Change {
        if self.shares.is_none() {
            return Change::PutTenant(serial);
        }
        let service = SERVICES[random.below(SERVICES.len() as u64)];
        let Some(known) = self.services.get(service) else {
            return Change::PutService(service, serial);
        };
        let deploy = |random: &mut Random| Change::Deploy {
            service,
            sample: random.below(2),
            activate: random.below(4) > 0,
        };
        match random.below(40) {
            0 => Change::DeleteTenant,
            1..=3 => Change::DeleteService(service),
            4..=7 => Change::PutTenant(serial),
            8..=13 => Change::PutService(service, serial),
            _ if known.newest() >= VERSIONS_MAX => Change::DeleteService(service),
            14..=23 => deploy(random),
            24..=31 if known.newest() > 1 => {
                let share = 1 + u8::try_from(random.below(99)).expect("small");
                let (old, new) = (known.newest() - 1, known.newest());
                Change::Split(service, BTreeMap::from([(old, 100 - share), (new, share)]))
            }
            _ if known.previous.is_some() => Change::Rollback(service),
            _ => deploy(random),
        }
    }

    /// What there is after a change.
    pub(crate) fn after(&self, change: &Change, digests: &Digests) -> Self {
        let mut model = self.clone();
        model.last = Some(change.operation().to_owned());
        let mut of = |name: &str| model.services.remove(name).unwrap_or_default();
        let (name, service) = match change {
            Change::PutTenant(shares) => {
                model.shares = Some(shares_of(*shares));
                return model;
            }
            Change::DeleteTenant => {
                return Self {
                    last: model.last,
                    ..Self::default()
                };
            }
            Change::DeleteService(name) => {
                model.services.remove(*name);
                return model;
            }
            Change::PutService(name, variable) => {
                let mut service = of(name);
                service.variable = variable.to_string();
                (name, service)
            }
            Change::Deploy {
                service: name,
                sample,
                activate,
            } => {
                let mut service = of(name);
                let number = service.newest() + 1;
                service.versions.insert(number, digests[*sample].clone());
                if *activate {
                    service.switch(BTreeMap::from([(number, 100)]));
                }
                (name, service)
            }
            Change::Split(name, shares) => {
                let mut service = of(name);
                service.switch(shares.clone());
                (name, service)
            }
            Change::Rollback(name) => {
                let mut service = of(name);
                let to = service.previous.expect("it was possible");
                service.switch(BTreeMap::from([(to, 100)]));
                (name, service)
            }
        };
        model.services.insert((*name).to_owned(), service);
        model
    }

    /// All digests that are referred to.
    pub(crate) fn digests(&self) -> impl Iterator<Item = &String> {
        let services = self.services.values();
        services.flat_map(|service| service.versions.values())
    }

    /// What a host says that there is.
    pub(crate) fn observe(admin: &Admin, tenant: &str) -> Self {
        let mut model = Self::default();
        let audit = admin.get("/v1/audit?limit=500");
        let mut entries = audit["items"].as_array().expect("a list").iter();
        let last = entries.find(|entry| entry["tenant"] == tenant);
        model.last = last.map(|entry| entry["operation"].as_str().expect("a word").to_owned());
        let path = format!("/v1/tenants/{tenant}");
        let answer = admin.request("GET", &path).send();
        if answer.status == 404 {
            return model;
        }
        model.shares = answer.json()["cpu"]["shares"].as_u64();
        for name in admin.names(&format!("{path}/services")) {
            let service = observe_service(admin, &format!("{path}/services/{name}"));
            model.services.insert(name, service);
        }
        model
    }
}

/// Different for each serial number, within what shares may be.
const fn shares_of(serial: u64) -> u64 {
    1 + serial % 9_000
}

fn number(value: &Value) -> u32 {
    let number = value.as_u64().expect("a number");
    u32::try_from(number).expect("a version")
}

fn observe_service(admin: &Admin, path: &str) -> Service {
    let document = admin.get(path);
    let mut service = Service {
        variable: document["env"]["N"].as_str().expect("a text").to_owned(),
        previous: Some(&document["previous_version"])
            .filter(|previous| !previous.is_null())
            .map(number),
        ..Service::default()
    };
    for (version, share) in document["traffic"].as_object().expect("shares") {
        let share = u8::try_from(number(share)).expect("a share");
        let version = version.parse().expect("a version");
        service.traffic.insert(version, share);
    }
    let versions = admin.get(&format!("{path}/versions?limit=500"));
    for version in versions["items"].as_array().expect("a list") {
        let digest = version["digest"].as_str().expect("a digest").to_owned();
        service.versions.insert(number(&version["version"]), digest);
    }
    service
}

impl Change {
    /// Its name in the API's description.
    const fn operation(&self) -> &'static str {
        match self {
            Self::PutTenant(_) => "putTenant",
            Self::DeleteTenant => "deleteTenant",
            Self::PutService(..) => "putService",
            Self::DeleteService(_) => "deleteService",
            Self::Deploy { .. } => "createVersion",
            Self::Split(..) => "putTraffic",
            Self::Rollback(_) => "rollback",
        }
    }

    /// Whether an `Idempotency-Key` makes it safe to ask twice.
    pub(crate) const fn is_keyed(&self) -> bool {
        matches!(self, Self::Deploy { .. } | Self::Rollback(_))
    }

    /// Asks for it.
    pub(crate) fn ask(&self, admin: &Admin, tenant: &str, key: &str) -> Result<Answer, Broken> {
        let of = |service: &str| format!("/v1/tenants/{tenant}/services/{service}");
        let request = match self {
            Self::PutTenant(serial) => {
                let spec = json!({"cpu": {"shares": shares_of(*serial)}});
                admin.json("PUT", &format!("/v1/tenants/{tenant}"), &spec)
            }
            Self::DeleteTenant => admin.request("DELETE", &format!("/v1/tenants/{tenant}")),
            Self::PutService(name, variable) => {
                let env = json!({"N": variable.to_string()});
                let spec = json!({"usage_header": true, "env": env});
                admin.json("PUT", &of(name), &spec)
            }
            Self::DeleteService(name) => admin.request("DELETE", &of(name)),
            Self::Deploy {
                service,
                sample,
                activate,
            } => {
                let path = format!("{}/versions?activate={activate}", of(service));
                admin.upload(&path, guests::bytes(SAMPLES[*sample]))
            }
            Self::Split(name, shares) => {
                let shares: Value = shares
                    .iter()
                    .map(|(number, share)| (number.to_string(), json!(share)))
                    .collect::<serde_json::Map<_, _>>()
                    .into();
                admin.json("PUT", &format!("{}/traffic", of(name)), &shares)
            }
            Self::Rollback(name) => {
                admin.json("POST", &format!("{}/rollback", of(name)), &json!({}))
            }
        };
        if self.is_keyed() {
            request.header("idempotency-key", key).try_send()
        } else {
            request.try_send()
        }
    }
}
