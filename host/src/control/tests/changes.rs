//! Changes leave their mark: the audit log, remembered answers, what the host does by itself.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use insula_types::{ServiceId, VersionNumber};
use serde_json::{Value, json};

use super::rig::{Rig, eventually};
use crate::control::router::ROUTES;
use crate::messages::VersionDelta;
use crate::pool::conduct::{Conduct, STEPS};

const WEB: &str = "/v1/tenants/acme/services/web";
const VERSIONS: &str = "/v1/tenants/acme/services/web/versions";

fn operations(rig: &Rig) -> Vec<String> {
    let log = rig.get("/v1/audit?limit=500").expect(200).json();
    let entries = log["items"].as_array().unwrap().iter();
    entries
        .map(|entry| entry["operation"].as_str().unwrap().to_owned())
        .collect()
}

/// These need a monitor; the end-to-end tests find them in the log.
const OF_MACHINES_THAT_RUN: [&str; 6] = [
    "startMachine",
    "pauseMachine",
    "resumeMachine",
    "resetMachine",
    "snapshotMachine",
    "restoreMachine",
];

/// A route that changes something, and what is told of it. Of machines that run, and of what is
/// compiled again, the end-to-end tests hear.
const TOLD: [(&str, &[&str]); 17] = [
    ("putTenant", &["tenant.created", "tenant.updated"]),
    ("deleteTenant", &["tenant.deleted"]),
    ("putService", &["service.created", "service.updated"]),
    ("deleteService", &["service.deleted"]),
    (
        "createVersion",
        &[
            "version.queued",
            "version.compiling",
            "version.created",
            "version.activated",
        ],
    ),
    ("putTraffic", &["traffic.split"]),
    ("rollback", &["version.activated"]),
    ("putVolume", &["volume.created", "volume.updated"]),
    ("snapshotVolume", &["volume.snapshot"]),
    ("cloneVolume", &["volume.cloned"]),
    ("deleteVolume", &["volume.deleted"]),
    ("putMachine", &["machine.defined", "machine.updated"]),
    ("deleteMachine", &["machine.deleted"]),
    ("putImage", &["image.created", "image.updated"]),
    ("deleteImage", &["image.deleted"]),
    ("createToken", &["token.created"]),
    ("deleteToken", &["token.deleted"]),
];

#[test]
fn every_route_that_changes_something_is_told_to_who_follows() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(dir.path());
    let mut events = rig.follow("/v1/events");
    let put = |path: &str, json: &str| assert!(rig.put(path, json).status < 300, "{path}");
    put("/v1/tenants/acme", "{}");
    put("/v1/tenants/acme", r#"{"memory":{"limit":"1GiB"}}"#);
    put(WEB, "{}");
    put(WEB, r#"{"usage_header":true}"#);
    rig.upload("one").expect(201);
    rig.upload("two").expect(201);
    put(&format!("{WEB}/traffic"), r#"{"1":50,"2":50}"#);
    rig.post(&format!("{WEB}/rollback"), "").expect(200);
    let volumes = "/v1/tenants/acme/volumes";
    put(&format!("{volumes}/data"), "{}");
    put(&format!("{volumes}/data"), r#"{"size":"1MiB"}"#);
    for (copy, what) in [("still", "snapshot"), ("twin", "clone")] {
        let name = json!({"name": copy}).to_string();
        let copied = rig.post(&format!("{volumes}/data/{what}"), &name);
        copied.expect(201);
    }
    rig.delete(&format!("{volumes}/data")).expect(204);
    let image = ["content-type: application/octet-stream"];
    for content in [&b"an image"[..], b"another"] {
        let sent = rig.send("PUT", "/v1/images/kernel", &image, content);
        assert!(sent.status < 300, "{sent:?}");
    }
    let machine = "/v1/tenants/acme/machines/db";
    put(machine, r#"{"kernel":"kernel"}"#);
    put(machine, r#"{"kernel":"kernel","vcpus":2}"#);
    rig.delete(machine).expect(204);
    rig.delete("/v1/images/kernel").expect(204);
    let token = rig.post("/v1/tokens", r#"{"name":"t"}"#).expect(201).json();
    let token = format!("/v1/tokens/{}", token["id"]);
    rig.delete(&token).expect(204);
    rig.delete(WEB).expect(204);
    rig.delete("/v1/tenants/acme").expect(204);
    let seen = events.until("tenant.deleted");
    for (id, kinds) in TOLD {
        for kind in kinds {
            let told = seen.contains(&format!("event: {kind}\n"));
            assert!(told, "{id}: no {kind} in {seen}");
        }
    }
    let elsewhere = [
        &OF_MACHINES_THAT_RUN[..],
        &["stopMachine", "startRecompilation"],
    ]
    .concat();
    let changing = ROUTES
        .iter()
        .filter(|route| route.method != http::Method::GET);
    for route in changing.filter(|route| !elsewhere.contains(&route.id)) {
        let known = TOLD.iter().any(|(id, _)| *id == route.id);
        assert!(known, "nothing is told of {}", route.id);
    }
}

#[test]
fn every_route_that_changes_something_is_audited() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    rig.upload("one").expect(201);
    rig.upload("two").expect(201);
    rig.put(&format!("{WEB}/traffic"), r#"{"1":50,"2":50}"#)
        .expect(200);
    rig.post(&format!("{WEB}/rollback"), "").expect(200);
    let token = rig.post("/v1/tokens", r#"{"name":"t"}"#).expect(201).json();
    rig.delete(&format!("/v1/tokens/{}", token["id"]))
        .expect(204);
    let image = ["content-type: application/octet-stream"];
    rig.send("PUT", "/v1/images/kernel", &image, b"an image")
        .expect(201);
    let machine = "/v1/tenants/acme/machines/db";
    rig.put(machine, r#"{"kernel":"kernel"}"#).expect(201);
    rig.post(&format!("{machine}/stop"), "").expect(200);
    rig.delete("/v1/tenants/acme").refused(409, "has_machines");
    rig.delete(machine).expect(204);
    rig.delete("/v1/images/kernel").expect(204);
    rig.post("/v1/recompilation", "").expect(200);
    let volumes = "/v1/tenants/acme/volumes";
    rig.put(&format!("{volumes}/data"), "{}").expect(201);
    for (copy, what) in [("still", "snapshot"), ("twin", "clone")] {
        let name = json!({"name": copy}).to_string();
        rig.post(&format!("{volumes}/data/{what}"), &name)
            .expect(201);
        rig.delete(&format!("{volumes}/{copy}")).expect(204);
    }
    rig.delete(&format!("{volumes}/data")).expect(204);
    rig.delete(WEB).expect(204);
    rig.delete("/v1/tenants/acme").expect(204);
    let seen: BTreeSet<String> = operations(&rig).into_iter().collect();
    let changing = ROUTES
        .iter()
        .filter(|route| route.method != http::Method::GET)
        .filter(|route| !OF_MACHINES_THAT_RUN.contains(&route.id));
    for route in changing {
        assert!(seen.contains(route.id), "{} is not audited", route.id);
    }
    let log = rig.get("/v1/audit?limit=500").json();
    let entry = |operation: &str| -> Value {
        let mut entries = log["items"].as_array().unwrap().iter();
        entries
            .find(|entry| entry["operation"] == operation)
            .unwrap()
            .clone()
    };
    let traffic = entry("putTraffic");
    assert_eq!(traffic["before"], json!({"traffic": {"2": 100}}));
    assert_eq!(traffic["after"], json!({"traffic": {"1": 50, "2": 50}}));
    assert_eq!(traffic["tenant"], "acme");
    assert_eq!(entry("deleteService")["after"], Value::Null);
    assert_eq!(entry("createToken")["after"]["name"], "t");
    assert!(entry("createToken")["after"].get("secret").is_none());
}

#[test]
fn what_changes_nothing_leaves_no_entry() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    let before = operations(&rig);
    rig.put(WEB, "{}").expect(200);
    rig.put("/v1/tenants/acme", "{}").expect(200);
    rig.put(WEB, r#"{"nonsense":1}"#)
        .refused(422, "invalid_spec");
    rig.put(&format!("{WEB}/traffic"), r#"{"1":100}"#)
        .refused(422, "unknown_version");
    rig.delete("/v1/tenants/nobody").refused(404, "not_found");
    assert_eq!(operations(&rig), before);
}

#[test]
fn the_audit_log_holds_no_value_of_an_environment() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    let spec = |value: &str| json!({"env": {"DATABASE_PASSWORD": value}}).to_string();
    rig.put(WEB, &spec("hunter2")).expect(200);
    rig.put(WEB, &spec("correct horse")).expect(200);
    rig.delete(WEB).expect(204);
    let log = rig.get("/v1/audit?limit=500").expect(200);
    assert!(!log.body.contains("hunter2") && !log.body.contains("correct horse"));
    let log = log.json();
    let withheld = json!({"DATABASE_PASSWORD": "(withheld)"});
    assert_eq!(log["items"][0]["operation"], "deleteService");
    assert_eq!(log["items"][0]["before"]["env"], withheld);
    let change = &log["items"][1];
    assert_eq!(
        (&change["before"]["env"], &change["after"]["env"]),
        (&withheld, &withheld)
    );
    assert_ne!(
        change["before"]["generation"], change["after"]["generation"],
        "that something was changed is told"
    );
}

#[test]
fn an_answer_that_turned_out_untrue_is_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    rig.upload("one").expect(201);
    let head = ["content-type: application/wasm", "idempotency-key: k"];
    rig.fake.refuse.store(true, Ordering::SeqCst);
    rig.send("POST", VERSIONS, &head, b"two")
        .refused(500, "not_activated");
    rig.fake.refuse.store(false, Ordering::SeqCst);
    let again = rig.send("POST", VERSIONS, &head, b"two").expect(201);
    assert!(!again.headers.contains_key("idempotency-replayed"));
    assert_eq!(
        (&again.json()["version"], &again.json()["active"]),
        (&json!(3), &json!(true))
    );
    let replayed = rig.send("POST", VERSIONS, &head, b"two").expect(201);
    assert_eq!(replayed.headers["idempotency-replayed"], "true");
    assert!(operations(&rig).contains(&"takeActivationBack".to_owned()));
}

#[test]
fn a_version_that_loses_its_trial_is_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    rig.upload("one").expect(201);
    rig.upload("two").expect(201);
    let mut conduct = Conduct {
        failed: 50,
        ended: [0; STEPS],
    };
    conduct.ended[3] = 50;
    rig.fake.conduct.lock().unwrap().push(VersionDelta {
        service: ServiceId::new(1),
        version: VersionNumber::new(2).unwrap(),
        conduct,
    });
    eventually("the rollback", || {
        rig.get(WEB).json()["active_version"] == 1
    });
    // The state knows it before the data plane is told.
    let told = "service web v1 sealed:compiled:one v2=preview sealed:compiled:two";
    eventually("the data plane is told", || {
        rig.seen().last().unwrap() == told
    });
    let newest = rig.get("/v1/audit?limit=1").json()["items"][0].clone();
    assert_eq!(
        (&newest["operation"], &newest["actor"]),
        (&json!("automaticRollback"), &json!("host"))
    );
    assert!(
        newest["after"]["reason"]
            .as_str()
            .unwrap()
            .contains("50 of the last 50")
    );
    let log = rig.get(&format!("{WEB}/logs")).body;
    assert!(log.contains("rolled back to version 1"), "{log}");
}
