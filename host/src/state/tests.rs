//! What every [`Store`] promises, shown on the embedded one with real files.

use insula_types::Bytes;

use super::*;

const CAPACITY: u64 = 2_000;

fn open(path: &std::path::Path) -> (DataDir, SqliteStore) {
    let data = DataDir::open(path).unwrap();
    let store = SqliteStore::open(&data, Health::default()).unwrap();
    (data, store)
}

fn now() -> Timestamp {
    Timestamp::from_millis(1_700_000_000_000)
}

fn name<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().unwrap()
}

fn tenant_spec(json: &str) -> TenantSpec {
    serde_json::from_str(json).unwrap()
}

fn put_tenant(store: &mut SqliteStore, tenant: &str, json: &str) -> Result<Tenant, StoreError> {
    let put = store.put_tenant(
        &name(tenant),
        &tenant_spec(json),
        Precondition::None,
        CAPACITY,
        now(),
    )?;
    Ok(put.record().clone())
}

fn put_service(
    store: &mut SqliteStore,
    tenant: &str,
    service: &str,
    json: &str,
) -> Result<Service, StoreError> {
    let spec = serde_json::from_str(json).unwrap();
    let put = store.put_service(
        &name(tenant),
        &name(service),
        &spec,
        Precondition::None,
        now(),
    )?;
    Ok(put.record().clone())
}

fn upload(content: u8) -> NewVersion {
    NewVersion {
        digest: Digest::new([content; 32]),
        size: Bytes::mib(1),
        compile_ms: 7,
    }
}

fn whole(version: u32) -> Traffic {
    Traffic::whole(VersionNumber::new(version).unwrap())
}

const ALL: Page = Page {
    after: None,
    limit: 500,
};

#[test]
fn a_restart_gives_the_same_content() {
    let path = tempfile::tempdir().unwrap();
    let (data, mut store) = open(path.path());
    put_tenant(&mut store, "a", r#"{"cpu":{"reservation":"250m"}}"#).unwrap();
    let service = put_service(&mut store, "a", "web", r#"{"routes":["x.example/*"]}"#).unwrap();
    store
        .add_version(service.id, &upload(1), true, now())
        .unwrap();
    let added = store
        .add_version(service.id, &upload(2), true, now())
        .unwrap();
    let token = NewToken {
        hash: [9; 32],
        name: "admin".to_owned(),
        tenant: None,
        access: Access::Write,
        expires: None,
    };
    let token = store.add_token(&token, now()).unwrap();
    let used = UsageTotals {
        fuel: 5,
        memory_byte_ms: 1 << 70,
        ..UsageTotals::default()
    };
    store
        .add_usage(&[(service.tenant, service.id, used)])
        .unwrap();
    drop((store, data));

    let (_data, mut store) = open(path.path());
    let tenant = store.tenant(&name("a")).unwrap();
    assert_eq!(
        tenant
            .spec
            .cpu
            .reservation
            .map(insula_types::Millicores::get),
        Some(250)
    );
    assert_eq!(
        store.service(&name("a"), &name("web")).unwrap(),
        added.service
    );
    assert_eq!(added.service.traffic, whole(2));
    assert_eq!(added.service.previous.unwrap().get(), 1);
    assert_eq!(store.versions(service.id, &ALL).unwrap().items.len(), 2);
    assert_eq!(store.token_by_hash(&[9; 32]).unwrap(), Some(token));
    let usage = StoredUsage {
        tenant: service.tenant,
        service: Some(service.id),
        totals: used,
    };
    assert_eq!(store.usage().unwrap(), [usage]);
}

#[test]
fn ids_and_numbers_are_never_used_twice() {
    let path = tempfile::tempdir().unwrap();
    let (data, mut store) = open(path.path());
    let first = put_tenant(&mut store, "a", "{}").unwrap();
    let service = put_service(&mut store, "a", "web", "{}").unwrap();
    store
        .delete_service(&name("a"), &name("web"), Precondition::None)
        .unwrap();
    let again = put_service(&mut store, "a", "web", "{}").unwrap();
    assert!(again.id > service.id);
    store.delete_tenant(&name("a"), Precondition::None).unwrap();
    drop((store, data));
    let (_data, mut store) = open(path.path());
    assert!(put_tenant(&mut store, "a", "{}").unwrap().id > first.id);
    assert!(put_service(&mut store, "a", "web", "{}").unwrap().id > again.id);
}

#[test]
fn generations_and_preconditions() {
    let path = tempfile::tempdir().unwrap();
    let (_data, mut store) = open(path.path());
    let mut put = |json: &str, precondition| {
        store.put_tenant(
            &name("a"),
            &tenant_spec(json),
            precondition,
            CAPACITY,
            now(),
        )
    };
    assert!(matches!(
        put("{}", Precondition::Exists),
        Err(StoreError::Precondition { .. })
    ));
    assert!(matches!(
        put("{}", Precondition::Absent),
        Ok(Put::Created(_))
    ));
    assert!(matches!(
        put("{}", Precondition::Absent),
        Err(StoreError::Precondition { .. })
    ));
    assert!(matches!(
        put("{}", Precondition::Generation(1)),
        Ok(Put::Unchanged(_))
    ));
    let other = r#"{"memory":{"limit":"1MiB"}}"#;
    let changed = put(other, Precondition::Generation(1)).unwrap();
    assert!(matches!(&changed, Put::Changed(tenant) if tenant.generation == 2));
    let stale = put("{}", Precondition::Generation(1)).unwrap_err();
    assert!(matches!(
        stale,
        StoreError::Precondition { current: Some(2) }
    ));
}

#[test]
fn reservations_never_exceed_the_host() {
    let path = tempfile::tempdir().unwrap();
    let (_data, mut store) = open(path.path());
    put_tenant(&mut store, "a", r#"{"cpu":{"reservation":"1500m"}}"#).unwrap();
    let refused = put_tenant(&mut store, "b", r#"{"cpu":{"reservation":"600m"}}"#).unwrap_err();
    assert!(
        matches!(
            refused,
            StoreError::Reservation {
                asked_millicores: 600,
                free_millicores: 500,
                ..
            }
        ),
        "{refused}"
    );
    assert!(store.tenant(&name("b")).is_err(), "nothing was stored");
    put_tenant(&mut store, "a", r#"{"cpu":{"reservation":"2000m"}}"#).unwrap();
    put_tenant(&mut store, "b", "{}").unwrap();
    assert_eq!(store.commitments().unwrap().reserved_millicores, 2_000);
}

#[test]
fn a_host_belongs_to_one_tenant_and_a_route_to_one_service() {
    let path = tempfile::tempdir().unwrap();
    let (_data, mut store) = open(path.path());
    put_tenant(&mut store, "a", "{}").unwrap();
    put_tenant(&mut store, "b", "{}").unwrap();
    put_service(&mut store, "a", "one", r#"{"routes":["x.example/v1/*"]}"#).unwrap();
    put_service(&mut store, "a", "two", r#"{"routes":["x.example/v2/*"]}"#).unwrap();
    for (tenant, service, routes) in [
        ("b", "one", r#"{"routes":["x.example/v3/*"]}"#),
        ("a", "three", r#"{"routes":["x.example/v2/*"]}"#),
    ] {
        let taken = put_service(&mut store, tenant, service, routes).unwrap_err();
        assert!(matches!(taken, StoreError::RouteTaken(_)), "{taken}");
        assert!(
            store.service(&name(tenant), &name(service)).is_err(),
            "rolled back"
        );
    }
    store.delete_tenant(&name("a"), Precondition::None).unwrap();
    put_service(&mut store, "b", "one", r#"{"routes":["x.example/v3/*"]}"#).unwrap();
}

#[test]
fn usage_of_a_deleted_service_stays_with_its_tenant() {
    let path = tempfile::tempdir().unwrap();
    let (_data, mut store) = open(path.path());
    let tenant = put_tenant(&mut store, "a", "{}").unwrap().id;
    let service = put_service(&mut store, "a", "web", "{}").unwrap().id;
    let part = UsageTotals {
        fuel: 3,
        memory_byte_ms: 1_500,
        ..UsageTotals::default()
    };
    store.add_usage(&[(tenant, service, part)]).unwrap();
    store
        .delete_service(&name("a"), &name("web"), Precondition::None)
        .unwrap();
    store.add_usage(&[(tenant, service, part)]).unwrap();
    let usage = store.usage().unwrap();
    assert_eq!(usage.len(), 1);
    assert_eq!((usage[0].service, usage[0].totals.fuel), (None, 6));
    assert_eq!(usage[0].totals.memory_byte_ms, 3_000);
    store.delete_tenant(&name("a"), Precondition::None).unwrap();
    store.add_usage(&[(tenant, service, part)]).unwrap();
    assert!(store.usage().unwrap().is_empty());
}

#[test]
fn digests_are_unreferenced_only_when_the_last_user_is_gone() {
    let path = tempfile::tempdir().unwrap();
    let (_data, mut store) = open(path.path());
    put_tenant(&mut store, "a", "{}").unwrap();
    let one = put_service(&mut store, "a", "one", "{}").unwrap().id;
    let two = put_service(&mut store, "a", "two", "{}").unwrap().id;
    store.add_version(one, &upload(1), true, now()).unwrap();
    store.add_version(two, &upload(1), true, now()).unwrap();
    store.add_version(two, &upload(2), true, now()).unwrap();
    let gone = store
        .delete_service(&name("a"), &name("one"), Precondition::None)
        .unwrap();
    assert!(gone.unreferenced.is_empty());
    let mut gone = store
        .delete_tenant(&name("a"), Precondition::None)
        .unwrap()
        .unreferenced;
    gone.sort();
    assert_eq!(gone, [upload(1).digest, upload(2).digest]);
    assert!(store.digests().unwrap().is_empty());
}

#[test]
fn old_versions_make_room_but_not_those_in_use() {
    let path = tempfile::tempdir().unwrap();
    let (_data, mut store) = open(path.path());
    put_tenant(&mut store, "a", "{}").unwrap();
    let service = put_service(&mut store, "a", "web", "{}").unwrap().id;
    store
        .add_version(service, &upload(255), true, now())
        .unwrap();
    for round in 0..VERSIONS_KEPT {
        let content = u8::try_from(round % 200).unwrap();
        let added = store
            .add_version(service, &upload(content), false, now())
            .unwrap();
        assert!(added.unreferenced.is_empty());
    }
    let added = store
        .add_version(service, &upload(250), false, now())
        .unwrap();
    assert_eq!(
        added.unreferenced,
        [upload(0).digest],
        "version 2, the oldest that is not active"
    );
    assert_eq!(added.service.traffic, whole(1));
    assert_eq!(u64::from(added.version.number.get()), VERSIONS_KEPT + 2);
    let page = Page {
        after: None,
        limit: 3,
    };
    let newest = store.versions(service, &page).unwrap();
    assert_eq!(newest.items[0].number, added.version.number);
    assert_eq!(newest.next, Some((VERSIONS_KEPT).to_string()));
}

#[test]
fn the_last_admin_token_stays() {
    let path = tempfile::tempdir().unwrap();
    let (_data, mut store) = open(path.path());
    put_tenant(&mut store, "a", "{}").unwrap();
    let mut add = |hash: u8, tenant: Option<&str>, access| {
        let token = NewToken {
            hash: [hash; 32],
            name: "t".to_owned(),
            tenant: tenant.map(name),
            access,
            expires: None,
        };
        store.add_token(&token, now()).unwrap()
    };
    let admin = add(1, None, Access::Write);
    add(2, None, Access::Read);
    let tenant = add(3, Some("a"), Access::Write);
    let refused = store.delete_token(admin.id, None, now()).unwrap_err();
    assert!(matches!(refused, StoreError::LastAdminToken));
    assert!(
        store.token_by_hash(&[1; 32]).unwrap().is_some(),
        "rolled back"
    );
    store.delete_tenant(&name("a"), Precondition::None).unwrap();
    assert!(
        store.token_by_hash(&tenant.hash).unwrap().is_none(),
        "went with its tenant"
    );
}

#[test]
fn lists_come_in_pages() {
    let path = tempfile::tempdir().unwrap();
    let (_data, mut store) = open(path.path());
    for tenant in ["c", "a", "b"] {
        put_tenant(&mut store, tenant, "{}").unwrap();
    }
    let first = store
        .tenants(&Page {
            after: None,
            limit: 2,
        })
        .unwrap();
    let names: Vec<_> = first
        .items
        .iter()
        .map(|tenant| tenant.name.as_str())
        .collect();
    assert_eq!((names, first.next.as_deref()), (vec!["a", "b"], Some("b")));
    let last = store
        .tenants(&Page {
            after: first.next,
            limit: 2,
        })
        .unwrap();
    assert_eq!((last.items.len(), last.next), (1, None));
}

#[test]
fn answers_are_remembered_for_a_day() {
    let path = tempfile::tempdir().unwrap();
    let (_data, mut store) = open(path.path());
    let answer = Remembered {
        key: [1; 32],
        body: [2; 32],
        status: 201,
        answer: "{}".to_owned(),
    };
    store.remember(&answer, now()).unwrap();
    assert_eq!(store.remembered(&[1; 32], now()).unwrap(), Some(answer));
    let tomorrow = now().after(REMEMBERED_FOR);
    assert_eq!(store.remembered(&[1; 32], tomorrow).unwrap(), None);
}

#[test]
fn traffic_is_split_among_versions_that_there_are() {
    let path = tempfile::tempdir().unwrap();
    let (data, mut store) = open(path.path());
    put_tenant(&mut store, "a", "{}").unwrap();
    let service = put_service(&mut store, "a", "web", "{}").unwrap().id;
    for content in 1..=4 {
        let activate = content == 1;
        store
            .add_version(service, &upload(content), activate, now())
            .unwrap();
    }
    let read = |text: &str| serde_json::from_str::<Traffic>(text).unwrap();
    let split = read(r#"{"1":90,"2":10,"3":0}"#);
    let switched = store.set_traffic(service, &split).unwrap();
    assert_eq!(switched.before.traffic, whole(1));
    assert_eq!(switched.service.previous, VersionNumber::new(1));
    let unknown = store.set_traffic(service, &read(r#"{"1":90,"9":10}"#));
    assert!(matches!(unknown, Err(StoreError::NotFound("version"))));
    drop((store, data));

    let (_data, mut store) = open(path.path());
    let found = store.service(&name("a"), &name("web")).unwrap();
    assert_eq!(found, switched.service);
    let held: Vec<u32> = found.held.iter().map(|held| held.number.get()).collect();
    assert_eq!(held, [1, 2, 3, 4], "what is listed, and the newest");
    let two = VersionNumber::new(2).unwrap();
    assert_eq!(found.held(two), Some(upload(2).digest));
    let restored = store.restore_traffic(&switched.before).unwrap();
    assert_eq!((restored.traffic, restored.previous), (whole(1), None));
    let deleted = store.delete_service(&name("a"), &name("web"), Precondition::None);
    assert_eq!(deleted.unwrap().unreferenced.len(), 4);
}

#[test]
fn a_version_with_a_share_is_never_pruned() {
    let path = tempfile::tempdir().unwrap();
    let (_data, mut store) = open(path.path());
    put_tenant(&mut store, "a", "{}").unwrap();
    let service = put_service(&mut store, "a", "web", "{}").unwrap().id;
    for _ in 0..3 {
        store.add_version(service, &upload(1), true, now()).unwrap();
    }
    let split = serde_json::from_str(r#"{"1":50,"2":50,"3":0}"#).unwrap();
    store.set_traffic(service, &split).unwrap();
    for _ in 0..VERSIONS_KEPT + 5 {
        store
            .add_version(service, &upload(2), false, now())
            .unwrap();
    }
    assert_eq!(
        store.service(&name("a"), &name("web")).unwrap().traffic,
        split
    );
    let versions = store.versions(service, &ALL).unwrap().items;
    let oldest: Vec<u32> = versions
        .iter()
        .rev()
        .map(|v| v.number.get())
        .take(4)
        .collect();
    assert_eq!(oldest[..3], [1, 2, 3]);
    assert!(oldest[3] > 4, "{oldest:?}");
}

#[test]
fn several_changes_are_one_or_none() {
    let path = tempfile::tempdir().unwrap();
    let (data, mut sqlite) = open(path.path());
    let store: &mut dyn Store = &mut sqlite;
    let spec = tenant_spec("{}");
    let put = |store: &mut dyn Store, tenant: &str| {
        store.put_tenant(&name(tenant), &spec, Precondition::Absent, CAPACITY, now())
    };
    let answer = Remembered {
        key: [1; 32],
        body: [2; 32],
        status: 201,
        answer: "{}".to_owned(),
    };
    let failed = store.in_one(|store| {
        put(store, "a")?;
        store.remember(&answer, now())?;
        put(store, "a").map(drop)
    });
    assert!(matches!(failed, Err(StoreError::Precondition { .. })));
    assert!(store.tenant(&name("a")).is_err(), "nothing of it was kept");
    assert_eq!(store.remembered(&[1; 32], now()).unwrap(), None);
    store
        .in_one(|store| {
            put(store, "a")?;
            assert!(put(store, "a").is_err(), "a part can fail by itself");
            store.remember(&answer, now())
        })
        .unwrap();
    put(store, "b").unwrap();
    drop((sqlite, data));
    let (_data, mut store) = open(path.path());
    assert!(store.tenant(&name("a")).is_ok() && store.tenant(&name("b")).is_ok());
    assert_eq!(store.remembered(&[1; 32], now()).unwrap(), Some(answer));
    store.forget(&[1; 32]).unwrap();
    assert_eq!(store.remembered(&[1; 32], now()).unwrap(), None);
}

#[test]
fn a_stopped_state_is_read_and_not_written() {
    let path = tempfile::tempdir().unwrap();
    let data = DataDir::open(path.path()).unwrap();
    let health = Health::default();
    let mut store = SqliteStore::open(&data, health.clone()).unwrap();
    put_tenant(&mut store, "a", "{}").unwrap();
    health.stop("on purpose");
    let refused = put_tenant(&mut store, "b", "{}").unwrap_err();
    assert!(refused.to_string().contains("on purpose"), "{refused}");
    let store: &mut dyn Store = &mut store;
    assert!(matches!(
        store.in_one(|_| Ok(())),
        Err(StoreError::Stopped(_))
    ));
    assert!(store.tenant(&name("a")).is_ok());
    let mut files =
        Blobs::open(&data, EngineName::try_from("c".to_owned()).unwrap(), health).unwrap();
    assert!(files.create().is_err());
}

#[test]
fn the_audit_log_is_read_newest_first_and_by_tenant() {
    let path = tempfile::tempdir().unwrap();
    let (_data, mut store) = open(path.path());
    let entry = |operation: &str, tenant: Option<u64>| Audit {
        token: Some(1),
        actor: "admin".to_owned(),
        peer: Some("127.0.0.1:1".to_owned()),
        operation: operation.to_owned(),
        tenant: tenant.map(|id| (TenantId::new(id), name("a"))),
        subject: "a/web".to_owned(),
        before: None,
        after: Some(serde_json::json!({"x": 1})),
    };
    for (operation, tenant) in [("one", Some(1)), ("two", None), ("three", Some(2))] {
        store.audit(&entry(operation, tenant), now()).unwrap();
    }
    let page = Page {
        after: None,
        limit: 2,
    };
    let first = store.audits(None, &page).unwrap();
    assert_eq!(first.items[0].audit, entry("three", Some(2)));
    let after = first.next;
    let rest = store.audits(None, &Page { after, limit: 2 }).unwrap();
    assert_eq!((rest.items.len(), rest.next), (1, None));
    let own = store.audits(Some(TenantId::new(1)), &ALL).unwrap();
    assert_eq!(own.items.len(), 1);
}
