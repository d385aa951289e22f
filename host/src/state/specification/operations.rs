//! Operations as data, so that a failing run shrinks to the few that matter.

use std::time::Duration;

use insula_types::volume::VolumeKind;
use insula_types::{Digest, Outcome, ServiceId, TenantId, Traffic, VersionNumber, VolumeSpec};
use proptest::prelude::*;
use serde_json::json;

use crate::state::{
    Access, Audit, NewToken, NewVersion, NewVolume, Precondition, Remembered, Store, StoreError,
    Timestamp, UsageTotals,
};

/// What all tenants can reserve together.
const CAPACITY_MILLICORES: u64 = 2_000;
const TENANTS: [&str; 3] = ["a", "b", "c-3"];
const SERVICES: [&str; 2] = ["api", "web"];
const TENANT_SPECS: [&str; 4] = [
    "{}",
    r#"{"cpu":{"reservation":"250m"}}"#,
    r#"{"cpu":{"reservation":"1500m","limit":"2"},"memory":{"limit":"64MiB"}}"#,
    r#"{"memory":{"limit":"1GiB"},"requests":{"in_flight":1}}"#,
];
const VOLUMES: [&str; 3] = ["data", "snap", "keys"];
/// Of the sizes that volumes have, the largest is of a store's.
const STORE_MIB: u64 = 3;
const SERVICE_SPECS: [&str; 9] = [
    "{}",
    r#"{"usage_header":true,"env":{"K":"V"}}"#,
    r#"{"routes":["x.example/*"]}"#,
    r#"{"routes":["x.example/*","x.example/a/*"],"sticky_header":"x-user"}"#,
    r#"{"routes":["y.example/*"],"auto_rollback":{"enabled":false}}"#,
    r#"{"volumes":[{"name":"data","path":"/data"}]}"#,
    r#"{"volumes":[{"name":"snap","path":"/s","mode":"ro"},{"name":"data","path":"/d"}]}"#,
    r#"{"stores":[{"name":"keys"}]}"#,
    r#"{"volumes":[{"name":"data","path":"/d"}],"stores":[{"name":"keys","mode":"ro"}]}"#,
];

/// A change. Numbers beyond what there is stand for what is not there.
#[derive(Debug, Clone)]
pub(super) enum Change {
    PutTenant(usize, usize, Precondition),
    DeleteTenant(usize, Precondition),
    PutService(usize, usize, usize, Precondition),
    DeleteService(usize, usize, Precondition),
    /// Service, content, whether to activate.
    Upload(u64, u8, bool),
    /// Enough that old versions make room.
    UploadMany(u64, u8),
    Switch(u64, Vec<(u32, u8)>),
    SwitchAndTakeBack(u64, Vec<(u32, u8)>),
    /// Tenant, access, seconds to live.
    AddToken(Option<usize>, Access, Option<u64>),
    DeleteToken(u64, Option<u64>),
    Use(u64, u64, u64),
    Remember(u8, u8),
    Forget(u8),
    /// Tenant, volume, size in MiB, whether it can only be read.
    PutVolume(usize, usize, u64, bool, Precondition),
    DeleteVolume(usize, usize, Precondition),
    Audit(Option<u64>),
}

/// A step of a run.
#[derive(Debug, Clone)]
pub(super) enum Step {
    One(Change),
    /// Several changes as one, which is kept or thrown away in the end.
    Together(Vec<Change>, Keep),
    /// Time passes.
    Hours(u64),
    /// The store is closed and opened again.
    Reopen,
    /// Its process is killed between two changes.
    Crash,
    /// Its process is killed before several changes are committed.
    CrashWithin(Vec<Change>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    Kept,
    Dropped,
}

fn precondition() -> impl Strategy<Value = Precondition> {
    prop_oneof![
        6 => Just(Precondition::None),
        1 => Just(Precondition::Exists),
        1 => Just(Precondition::Absent),
        2 => (1..4u64).prop_map(Precondition::Generation),
    ]
}

/// Shares of two versions, or all for one.
fn shares() -> impl Strategy<Value = Vec<(u32, u8)>> {
    (1..7u32, 1..7u32, prop_oneof![Just(0), Just(10), Just(50)]).prop_map(|(all, some, share)| {
        if all == some {
            vec![(all, 100)]
        } else {
            vec![(all, 100 - share), (some, share)]
        }
    })
}

fn change() -> impl Strategy<Value = Change> {
    use Change::{
        AddToken, Audit, DeleteService, DeleteTenant, DeleteToken, DeleteVolume, Forget,
        PutService, PutTenant, PutVolume, Remember, Switch, SwitchAndTakeBack, Upload, UploadMany,
        Use,
    };
    let tenant = || 0..TENANTS.len();
    let service = || 0..SERVICES.len();
    let service_id = || 1..6u64;
    let access = prop_oneof![Just(Access::Read), Just(Access::Write)];
    prop_oneof![
        6 => (tenant(), 0..TENANT_SPECS.len(), precondition())
            .prop_map(|(tenant, spec, p)| PutTenant(tenant, spec, p)),
        1 => (tenant(), precondition()).prop_map(|(tenant, p)| DeleteTenant(tenant, p)),
        8 => (tenant(), service(), 0..SERVICE_SPECS.len(), precondition())
            .prop_map(|(tenant, service, spec, p)| PutService(tenant, service, spec, p)),
        2 => (tenant(), service(), precondition())
            .prop_map(|(tenant, service, p)| DeleteService(tenant, service, p)),
        8 => (service_id(), 0..5u8, any::<bool>())
            .prop_map(|(service, content, activate)| Upload(service, content, activate)),
        1 => (service_id(), 40..70u8).prop_map(|(service, count)| UploadMany(service, count)),
        5 => (service_id(), shares()).prop_map(|(service, shares)| Switch(service, shares)),
        1 => (service_id(), shares())
            .prop_map(|(service, shares)| SwitchAndTakeBack(service, shares)),
        4 => (proptest::option::of(tenant()), access, proptest::option::of(1..100_000u64))
            .prop_map(|(tenant, access, ttl)| AddToken(tenant, access, ttl)),
        2 => (1..6u64, proptest::option::weighted(0.3, 1..4u64))
            .prop_map(|(id, tenant)| DeleteToken(id, tenant)),
        3 => (1..4u64, service_id(), 0..u64::from(u32::MAX))
            .prop_map(|(tenant, service, amount)| Use(tenant, service, amount)),
        2 => (0..3u8, any::<u8>()).prop_map(|(key, body)| Remember(key, body)),
        1 => (0..3u8).prop_map(Forget),
        4 => (tenant(), 0..VOLUMES.len(), 1..4u64, any::<bool>(), precondition())
            .prop_map(|(owner, name, mib, ro, p)| PutVolume(owner, name, mib, ro, p)),
        2 => (tenant(), 0..VOLUMES.len(), precondition())
            .prop_map(|(owner, name, p)| DeleteVolume(owner, name, p)),
        2 => proptest::option::of(1..4u64).prop_map(Audit),
    ]
}

pub(super) fn step() -> impl Strategy<Value = Step> {
    let several = || proptest::collection::vec(change(), 1..6);
    prop_oneof![
        24 => change().prop_map(Step::One),
        3 => several().prop_map(|changes| Step::Together(changes, Keep::Kept)),
        2 => several().prop_map(|changes| Step::Together(changes, Keep::Dropped)),
        2 => (1..20u64).prop_map(Step::Hours),
        1 => Just(Step::Reopen),
        2 => Just(Step::Crash),
        1 => several().prop_map(Step::CrashWithin),
    ]
}

fn digest(content: u8) -> Digest {
    Digest::new([content; 32])
}

fn upload(content: u8) -> NewVersion {
    NewVersion {
        digest: digest(content),
        size: insula_types::Bytes::mib(u64::from(content) + 1),
        compile_ms: u64::from(content),
    }
}

fn traffic(shares: &[(u32, u8)]) -> Traffic {
    let shares = shares.iter().map(|(number, percent)| {
        let number = VersionNumber::new(*number).unwrap();
        (number, *percent)
    });
    Traffic::new(shares.collect()).unwrap()
}

fn used(amount: u64) -> UsageTotals {
    let mut requests = [0; Outcome::ALL.len()];
    requests[Outcome::Ok.index()] = 1;
    requests[Outcome::Trap.index()] = amount % 3;
    UsageTotals {
        requests,
        fuel: amount,
        cpu_ns: amount / 2,
        // Beyond 64 bits after some of them.
        memory_byte_ms: u128::from(amount) << 31,
        bytes_in: 1,
        bytes_out: amount,
    }
}

/// Says what came of something, in a form that does not depend on the order of sets, nor on the
/// words in which a store tells that it failed.
fn told<T: std::fmt::Debug>(result: &Result<T, StoreError>) -> String {
    match result {
        Err(StoreError::Backend(_) | StoreError::Disk(_)) => "the store failed".to_owned(),
        other => format!("{other:?}"),
    }
}

impl Change {
    /// Makes the change and says what came of it. `serial` is never the same twice.
    pub(super) fn make(&self, store: &mut dyn Store, now: Timestamp, serial: u64) -> String {
        let tenant = |index: usize| TENANTS[index].parse().unwrap();
        let service = |index: usize| SERVICES[index].parse().unwrap();
        match self {
            Self::PutTenant(name, spec, precondition) => {
                let spec = serde_json::from_str(TENANT_SPECS[*spec]).unwrap();
                let capacity = CAPACITY_MILLICORES;
                told(&store.put_tenant(&tenant(*name), &spec, *precondition, capacity, now))
            }
            Self::DeleteTenant(name, precondition) => {
                let mut deleted = store.delete_tenant(&tenant(*name), *precondition);
                if let Ok(deleted) = &mut deleted {
                    deleted.unreferenced.sort_unstable();
                }
                told(&deleted)
            }
            Self::PutService(owner, name, spec, precondition) => {
                let spec = serde_json::from_str(SERVICE_SPECS[*spec]).unwrap();
                let (owner, name) = (tenant(*owner), service(*name));
                told(&store.put_service(&owner, &name, &spec, *precondition, now))
            }
            Self::DeleteService(owner, name, precondition) => {
                let (owner, name) = (tenant(*owner), service(*name));
                let mut deleted = store.delete_service(&owner, &name, *precondition);
                if let Ok(deleted) = &mut deleted {
                    deleted.unreferenced.sort_unstable();
                }
                told(&deleted)
            }
            Self::Upload(id, content, activate) => {
                let mut added =
                    store.add_version(ServiceId::new(*id), &upload(*content), *activate, now);
                if let Ok(added) = &mut added {
                    added.unreferenced.sort_unstable();
                }
                told(&added)
            }
            Self::UploadMany(..) | Self::SwitchAndTakeBack(..) => self.make_parts(store, now),
            Self::Switch(id, shares) => {
                told(&store.set_traffic(ServiceId::new(*id), &traffic(shares)))
            }
            Self::AddToken(owner, access, ttl_seconds) => {
                let mut hash = [0; 32];
                hash[..8].copy_from_slice(&serial.to_le_bytes());
                let token = NewToken {
                    hash,
                    name: format!("t{serial}"),
                    tenant: owner.map(tenant),
                    access: *access,
                    expires: ttl_seconds.map(|ttl| now.after(Duration::from_secs(ttl))),
                };
                told(&store.add_token(&token, now))
            }
            Self::DeleteToken(id, owner) => {
                told(&store.delete_token(*id, owner.map(TenantId::new), now))
            }
            Self::Use(owner, id, amount) => {
                let part = (TenantId::new(*owner), ServiceId::new(*id), used(*amount));
                told(&store.add_usage(&[part]))
            }
            Self::Remember(key, body) => {
                let answer = Remembered {
                    key: [*key; 32],
                    body: [*body; 32],
                    status: 201,
                    answer: format!("{{\"serial\":{serial}}}"),
                };
                told(&store.remember(&answer, now))
            }
            Self::PutVolume(owner, name, mib, read_only, precondition) => {
                let new = NewVolume {
                    spec: VolumeSpec {
                        size: insula_types::Bytes::mib(*mib),
                        kind: if *mib == STORE_MIB {
                            VolumeKind::Store
                        } else {
                            VolumeKind::Files
                        },
                        ..VolumeSpec::default()
                    },
                    directory: format!("{serial:032x}").parse().unwrap(),
                    read_only: *read_only,
                    origin: read_only.then(|| "data".parse().unwrap()),
                };
                let name = VOLUMES[*name].parse().unwrap();
                told(&store.put_volume(&tenant(*owner), &name, &new, *precondition, now))
            }
            Self::DeleteVolume(owner, name, precondition) => {
                let name = VOLUMES[*name].parse().unwrap();
                told(&store.delete_volume(&tenant(*owner), &name, *precondition))
            }
            Self::Forget(key) => told(&store.forget(&[*key; 32])),
            Self::Audit(owner) => {
                let audit = Audit {
                    token: owner.map(|id| id + 7),
                    actor: format!("t{serial}"),
                    peer: None,
                    operation: "test".to_owned(),
                    tenant: owner.map(|id| (TenantId::new(id), tenant(0))),
                    subject: "a/web".to_owned(),
                    before: None,
                    after: Some(json!({"serial": serial, "ä": [null, 1.5]})),
                };
                told(&store.audit(&audit, now))
            }
        }
    }

    /// Changes that are made of several.
    fn make_parts(&self, store: &mut dyn Store, now: Timestamp) -> String {
        match self {
            Self::UploadMany(id, count) => {
                let mut gone = Vec::new();
                for content in 0..*count {
                    // Half of them have a content that no other has.
                    let content = if content % 2 == 0 { content } else { 255 };
                    let added =
                        store.add_version(ServiceId::new(*id), &upload(content), false, now);
                    match added {
                        Ok(added) => gone.extend(added.unreferenced),
                        failed => return told(&failed),
                    }
                }
                format!("gone: {gone:?}")
            }
            Self::SwitchAndTakeBack(id, shares) => {
                let switched = store.set_traffic(ServiceId::new(*id), &traffic(shares));
                match switched {
                    Ok(switched) => told(&store.restore_traffic(&switched.before)),
                    failed => told(&failed),
                }
            }
            other => unreachable!("{other:?} is one change"),
        }
    }
}
