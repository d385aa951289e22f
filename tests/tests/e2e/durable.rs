//! What was acknowledged stays, and a disk that fails stops changes but not services.

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use insula_tests::fault::{Call, Faults};
use insula_tests::wait::holds;
use insula_tests::{Admin, TestHost, guests, until};
use rustix::io::Errno;
use serde_json::{Value, json};
use tempfile::TempDir;

const HELLO: &str = "/v1/tenants/a/services/hello";

fn refused(admin: &Admin) -> (u16, String) {
    let change = json!({"usage_header": true});
    let answer = admin.json("PUT", HELLO, &change).send();
    let code = if answer.status < 300 {
        String::new()
    } else {
        answer.problem()
    };
    (answer.status, code)
}

#[test]
fn after_a_failed_fsync_nothing_is_changed_and_everything_is_served() {
    let Some(faults) = Faults::new() else {
        return;
    };
    let host = faults.start(TestHost::plan());
    let service = host.tenant("a").create().deploy("hello");
    let admin = host.admin();
    let mut events = admin.request("GET", "/v1/events").open();
    faults.begin(Call::Sync, Errno::IO);
    let upload = service.upload(guests::bytes("echo"));
    assert_eq!(
        (upload.status, upload.problem().as_str()),
        (503, "state_stopped")
    );
    faults.end();
    assert_eq!(
        refused(&admin),
        (503, "state_stopped".to_owned()),
        "once is for good"
    );
    let ready = host.admin_as(None).request("GET", "/readyz").send();
    assert_eq!(
        (ready.status, ready.problem().as_str()),
        (503, "state_stopped")
    );
    let metrics = host.admin_as(None).request("GET", "/metrics").send().text();
    assert!(metrics.contains("\ninsula_state_stopped 1\n"));
    let mut told = String::new();
    while !told.contains("host.state_stopped") {
        let piece = events.piece().expect("events").expect("more events");
        told.push_str(&String::from_utf8(piece).expect("text"));
    }
    assert_eq!(service.get("/").send().status, 200, "serving goes on");
    assert_eq!(admin.get(HELLO)["active_version"], 1, "reading, too");
    host.crash_and_restart();
    assert_eq!(refused(&host.admin()).0, 200, "a restart mends it");
    assert_eq!(service.get("/").send().status, 200);
    assert_eq!(host.admin().get(HELLO)["active_version"], 1);
}

#[test]
fn a_full_disk_refuses_changes_and_heals_by_itself() {
    let Some(faults) = Faults::new() else {
        return;
    };
    let host = faults.start(TestHost::plan());
    let service = host.tenant("a").create().deploy("hello");
    let admin = host.admin();
    faults.begin(Call::Write, Errno::NOSPC);
    let upload = service.upload(guests::bytes("echo"));
    assert_eq!(
        (upload.status, upload.problem().as_str()),
        (507, "no_space")
    );
    assert_eq!(refused(&admin), (507, "no_space".to_owned()));
    assert_eq!(service.get("/").send().status, 200, "serving goes on");
    assert_eq!(
        admin.get(HELLO)["usage_header"],
        false,
        "nothing was changed"
    );
    faults.end();
    assert_eq!(refused(&admin).0, 200);
    assert_eq!(service.upload(guests::bytes("echo")).status, 201);
    let ready = host.admin_as(None).request("GET", "/readyz").send();
    assert_eq!(ready.status, 200);
    assert!(host.files("tmp").is_empty(), "nothing half is left");
}

#[test]
fn an_answer_is_remembered_with_its_change_over_a_crash() {
    let host = TestHost::start();
    let service = host.tenant("a").create().deploy("hello");
    let path = format!("{}/versions", service.path());
    let upload = || {
        let request = host.admin().upload(&path, guests::bytes("echo"));
        request.header("idempotency-key", "deploy-7").send()
    };
    let first = upload();
    assert_eq!(first.status, 201, "{}", first.text());
    host.crash_and_restart();
    let again = upload();
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    assert_eq!(first.json()["version"], again.json()["version"]);
    assert_eq!(
        host.admin().get(&path)["items"].as_array().map(Vec::len),
        Some(2)
    );
}

fn operations(admin: &Admin) -> Vec<(String, String)> {
    let log = admin.get("/v1/audit");
    let entries = log["items"].as_array().expect("a list").iter();
    let text = |entry: &Value, field: &str| entry[field].as_str().unwrap_or_default().to_owned();
    entries
        .map(|entry| (text(entry, "operation"), text(entry, "subject")))
        .collect()
}

#[test]
fn every_change_is_in_the_audit_log_and_a_tenant_sees_its_own() {
    let host = TestHost::start();
    let service = host.tenant("a").create().deploy("hello");
    let _other = host.tenant("b").create();
    let admin = host.admin();
    let made = admin.post(
        "/v1/tokens",
        &json!({"name": "of a", "tenant": "a", "access": "write"}),
    );
    let own = host.admin_as(made["secret"].as_str());
    own.put(&service.path(), &json!({"usage_header": true}));
    own.put(&service.path(), &json!({"usage_header": true}));
    let log = admin.get("/v1/audit");
    let newest = &log["items"][0];
    assert_eq!(
        (&newest["operation"], &newest["actor"]),
        (&json!("putService"), &json!("of a"))
    );
    assert_eq!(newest["before"]["usage_header"], false);
    assert_eq!(newest["after"]["usage_header"], true);
    let named = |operation: &str, subject: &str| (operation.to_owned(), subject.to_owned());
    let expected = [
        named("putService", "a/hello"),
        named("createToken", "token 2"),
        named("putTenant", "b"),
        named("createVersion", "a/hello"),
        named("putService", "a/hello"),
        named("putTenant", "a"),
        named("makeAdminToken", "token 1"),
    ];
    assert_eq!(
        operations(&admin),
        expected,
        "what changed nothing is not there"
    );
    let seen = operations(&own);
    assert!(
        seen.contains(&expected[0]) && seen.contains(&expected[5]),
        "{seen:?}"
    );
    assert!(
        !seen.contains(&expected[2]) && !seen.contains(&expected[6]),
        "{seen:?}"
    );
    let text = log.to_string();
    assert!(!text.contains(made["secret"].as_str().expect("a secret")));
    host.crash_and_restart();
    assert_eq!(operations(&host.admin()), expected);
}

#[test]
fn a_revoked_token_ends_its_open_streams_within_a_second() {
    let host = TestHost::start();
    let service = host.tenant("a").create().deploy("hello");
    let made = host
        .admin()
        .post("/v1/tokens", &json!({"name": "t", "tenant": "a"}));
    let own = host.admin_as(made["secret"].as_str());
    let logs = format!("{}/logs?follow=true", service.path());
    let streams = ["/v1/events", logs.as_str()].map(|path| own.request("GET", path).open());
    host.admin().delete(&format!("/v1/tokens/{}", made["id"]));
    for mut stream in streams {
        stream.connection.patience(Duration::from_secs(1));
        // Bytes that were on their way may come; then the end, and not the second's.
        while let Some(piece) = stream.piece().expect("the end within a second") {
            assert!(piece.len() < 1_000, "{piece:?}");
        }
    }
    let expiring = json!({"name": "t", "tenant": "a", "ttl_seconds": 1});
    let made = host.admin().post("/v1/tokens", &expiring);
    let own = host.admin_as(made["secret"].as_str());
    let mut stream = own.request("GET", "/v1/events").open();
    stream.connection.patience(Duration::from_secs(3));
    while stream.piece().expect("the end after its time").is_some() {}
    until(Duration::from_secs(1), "it is refused", || {
        let status = own.request("GET", "/v1/tenants").send().status;
        holds(status == 401, status.to_string())
    });
}

fn insula(args: &[&str]) -> (bool, String) {
    let mut command = Command::new(guests::insula());
    command.args(args).stdin(Stdio::null());
    let output = command.output().expect("the program");
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

#[test]
fn a_backup_of_a_running_host_becomes_another_host() {
    let host = TestHost::start();
    let service = host.tenant("a").create().service("web").usage_header();
    let service = service.deploy("hello");
    assert_eq!(service.upload(guests::bytes("echo")).status, 201);
    let token = host.token();
    let admin = host.admin_address().to_string();
    let place = TempDir::with_prefix("insula-test-").expect("a directory");
    let folder = place.path().display().to_string();
    let backup = ["backup", &folder, "--admin", &admin, "--token", &token];
    let (done, said) = insula(&backup);
    assert!(done, "{said}");
    let file = std::fs::read_dir(place.path()).expect("a directory").next();
    let file = file.expect("a file").expect("a file").path();
    let mode = file.metadata().expect("a file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let bytes = std::fs::read(&file).expect("the backup");
    let secret = token.as_bytes();
    assert!(
        !bytes.windows(secret.len()).any(|part| part == secret),
        "no secret in it"
    );
    // What comes after the backup is not in it, and what is removed meanwhile does no harm.
    service.delete();
    let data = place.path().join("restored").display().to_string();
    let file = file.display().to_string();
    let (done, said) = insula(&["restore", &file, "--data", &data]);
    assert!(done, "{said}");
    let (again, said) = insula(&["restore", &file, "--data", &data]);
    assert!(!again && said.contains("not empty"), "{said}");

    let other = TestHost::plan().data(&data).start();
    let until_served = || {
        let answer = other.request("web.a.localhost", "GET", "/info").send();
        holds(answer.status == 200, answer.status.to_string())
    };
    until(
        Duration::from_secs(30),
        "it is compiled and served",
        until_served,
    );
    let known = other.admin_as(Some(&token));
    let restored = known.get("/v1/tenants/a/services/web");
    assert_eq!(
        (&restored["active_version"], &restored["previous_version"]),
        (&json!(2), &json!(1))
    );
    known.post("/v1/tenants/a/services/web/rollback", &json!({}));
    let answer = other.request("web.a.localhost", "GET", "/").send();
    assert_eq!(answer.usage().version, 1, "{answer:?}");
    // A tenant's token cannot take all that.
    let made = host.admin().post(
        "/v1/tokens",
        &json!({"name": "t", "tenant": "a", "access": "write"}),
    );
    let own = host.admin_as(made["secret"].as_str());
    assert_eq!(own.request("GET", "/v1/backup").send().status, 403);
}
