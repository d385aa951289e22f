//! What each route answers.

use std::io::{Read, Write};
use std::time::SystemTime;

use insula_types::{Outcome, ServiceId, TenantId, VersionNumber};
use serde_json::json;

use super::rig::{Rig, eventually};
use crate::messages::{LogRecord, LogSource, UsageDelta};

const WEB: &str = "/v1/tenants/acme/services/web";

#[test]
fn a_tenants_life() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(dir.path());
    let spec = r#"{"cpu":{"reservation":"250m"},"memory":{"limit":"512MiB"}}"#;
    let created = rig.put("/v1/tenants/acme", spec).expect(201);
    assert_eq!(created.headers["etag"], "\"1\"");
    assert_eq!(created.headers["location"], "/v1/tenants/acme");
    let read = rig.get("/v1/tenants/acme").expect(200).json();
    assert_eq!(read["name"], "acme");
    assert_eq!(read["cpu"]["reservation_millicores"], 250);
    assert!(read["created_at"].as_str().unwrap().ends_with('Z'));
    let same = rig.put("/v1/tenants/acme", &read.to_string()).expect(200);
    assert_eq!(
        same.headers["etag"], "\"1\"",
        "what was read can be put, and changes nothing"
    );

    let put = |precondition: &str| {
        let head = ["content-type: application/json", precondition];
        rig.send("PUT", "/v1/tenants/acme", &head, b"{}")
    };
    put("if-match: \"9\"").refused(412, "precondition_failed");
    put("if-none-match: *").refused(412, "precondition_failed");
    assert_eq!(put("if-match: \"1\"").expect(200).headers["etag"], "\"2\"");
    put("if-match: W/\"x\"").refused(400, "bad_request");

    let over = rig.put("/v1/tenants/b", r#"{"cpu":{"reservation":"2001m"}}"#);
    over.refused(409, "reservation_exceeds_host");
    assert!(over.json()["detail"].as_str().unwrap().contains("2000m"));
    rig.put("/v1/tenants/b", r#"{"name":"c"}"#)
        .refused(422, "name_mismatch");
    rig.put("/v1/tenants/b", "{}").expect(201);
    let list = rig.get("/v1/tenants?limit=1").expect(200).json();
    assert_eq!(
        (&list["items"][0]["name"], &list["next"]),
        (&json!("acme"), &json!("acme"))
    );
    let list = rig.get("/v1/tenants?limit=1&continue=acme").json();
    assert_eq!(
        (&list["items"][0]["name"], &list["next"]),
        (&json!("b"), &json!(null))
    );

    rig.put("/v1/tenants/acme/services/web", "{}").expect(201);
    assert_eq!(rig.delete("/v1/tenants/acme").expect(204).body, "");
    rig.delete("/v1/tenants/acme").refused(404, "not_found");
    assert_eq!(
        rig.seen(),
        [
            "open",
            "tenant acme",
            "tenant acme",
            "tenant acme",
            "tenant b",
            "service web dark",
            "drop tenant 1"
        ]
    );
}

#[test]
fn what_is_refused_and_how() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    rig.raw("GET", "/v1/host", &[], b"")
        .refused(401, "unauthorized");
    rig.raw("GET", "/v1/none", &[], b"")
        .refused(401, "unauthorized");
    let wrong = rig.raw("GET", "/v1/host", &["authorization: Bearer insula_x"], b"");
    assert_eq!(wrong.headers["www-authenticate"], "Bearer");
    rig.get("/v1/none").refused(404, "not_found");
    let method = rig.post("/v1/tenants/acme", "{}");
    method.refused(405, "method_not_allowed");
    assert_eq!(method.headers["allow"], "GET, HEAD, PUT, DELETE");
    rig.put("/v1/tenants/Acme", "{}")
        .refused(422, "invalid_name");
    rig.get("/v1/tenants/..").refused(404, "not_found");
    rig.put("/v1/tenants/acme", "{")
        .refused(400, "malformed_json");
    rig.put("/v1/tenants/acme", "[]")
        .refused(422, "invalid_spec");
    let unknown = rig.put("/v1/tenants/acme", r#"{"cpus":1}"#);
    unknown.refused(422, "invalid_spec");
    assert!(unknown.body.contains("cpus"));
    let text = ["content-type: text/plain"];
    rig.send("PUT", "/v1/tenants/acme", &text, b"{}")
        .refused(415, "unsupported_media_type");
    let foreign = ["origin: http://evil.example"];
    rig.send("GET", "/v1/host", &foreign, b"")
        .refused(403, "foreign_origin");
    rig.get("/v1/tenants?limits=1").refused(400, "bad_request");
    let large = "x".repeat((1 << 20) + 1);
    rig.put("/v1/tenants/acme", &large)
        .refused(413, "too_large");
    rig.put("/v1/tenants/none/services/web", "{}")
        .refused(404, "not_found");
    rig.get("/v1/tenants/acme/services/none/logs")
        .refused(404, "not_found");
    let routes = |tenant: &str, route: &str| {
        let spec = json!({"routes": [route]}).to_string();
        rig.put(&format!("/v1/tenants/{tenant}/services/web"), &spec)
    };
    routes("acme", "x.acme.localhost/*").refused(422, "route_reserved");
    routes("acme", "api.example.com/*").expect(200);
    rig.put("/v1/tenants/b", "{}").expect(201);
    routes("b", "api.example.com/v2/*").refused(409, "route_taken");
    let smuggled = ["content-length: 5", "transfer-encoding: chunked"];
    assert!(rig.raw("PUT", "/v1/tenants/acme", &smuggled, b"{}").status >= 400);
}

#[test]
fn guessers_are_slowed_and_valid_tokens_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(dir.path());
    let guess = || rig.raw("GET", "/v1/host", &["authorization: Bearer insula_0"], b"");
    let mut answers = (0..60).map(|_| guess());
    assert!(
        answers.any(|answer| answer.status == 429 && answer.headers.contains_key("retry-after"))
    );
    rig.get("/v1/host").expect(200);
}

#[test]
fn tokens_and_scopes() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    rig.put("/v1/tenants/other", "{}").expect(201);
    let make = |json: &str| {
        let token = rig.post("/v1/tokens", json).expect(201).json();
        (
            token["id"].as_u64().unwrap(),
            token["secret"].as_str().unwrap().to_owned(),
        )
    };
    let (id, own) = make(r#"{"name":"ci","tenant":"acme","access":"write"}"#);
    let (_, reader) = make(r#"{"name":"look","scope":"host"}"#);
    let with = |secret: &str, method: &str, path: &str, body: &str| {
        let auth = format!("authorization: Bearer {secret}");
        rig.raw(
            method,
            path,
            &[&auth, "content-type: application/json"],
            body.as_bytes(),
        )
    };
    with(&own, "PUT", WEB, r#"{"usage_header":true}"#).expect(200);
    with(&own, "PUT", "/v1/tenants/acme", "{}").refused(403, "forbidden");
    with(&own, "GET", "/v1/host", "").refused(403, "forbidden");
    with(&own, "GET", "/v1/tenants/other", "").refused(404, "not_found");
    with(&own, "PUT", "/v1/tenants/other", "{}").refused(404, "not_found");
    let list = with(&own, "GET", "/v1/tenants", "").expect(200).json();
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
    with(&own, "POST", "/v1/tokens", r#"{"name":"x"}"#).refused(403, "forbidden");
    with(
        &own,
        "POST",
        "/v1/tokens",
        r#"{"name":"x","tenant":"acme"}"#,
    )
    .expect(201);
    assert_eq!(
        with(&own, "GET", "/v1/tokens", "").json()["items"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    with(&own, "DELETE", "/v1/tokens/1", "").refused(404, "not_found");
    with(&reader, "GET", "/v1/tenants/other", "").expect(200);
    with(&reader, "DELETE", "/v1/tenants/other", "").refused(403, "forbidden");

    rig.delete("/v1/tokens/1").refused(409, "last_admin_token");
    rig.delete(&format!("/v1/tokens/{id}")).expect(204);
    with(&own, "GET", WEB, "").refused(401, "unauthorized");
    let list = rig.get("/v1/tokens").body;
    assert!(!list.contains("secret") && !list.contains("hash"), "{list}");
    for bad in [
        r#"{"name":""}"#,
        r#"{"name":"x","scope":"tenant"}"#,
        r#"{"name":"x","ttl_seconds":0}"#,
    ] {
        rig.post("/v1/tokens", bad).refused(422, "invalid_spec");
    }
    let database = std::fs::read(rig.path.join("state.db-wal")).unwrap();
    let secret = own.as_bytes();
    assert!(
        !database.windows(secret.len()).any(|part| part == secret),
        "only hashes are stored"
    );
}

#[test]
fn versions_switch() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    let post = |path: &str| rig.send("POST", &format!("{WEB}/{path}"), &[], b"");
    let traffic = |json: &str| rig.put(&format!("{WEB}/traffic"), json);
    post("rollback").refused(409, "no_previous_version");
    let first = rig.upload("one").expect(201).json();
    assert_eq!(
        (&first["version"], &first["active"]),
        (&json!(1), &json!(true))
    );
    assert_eq!(first["size_bytes"], 3);
    assert_eq!(first["url"], "http://web.acme.localhost:8080/");
    let dark = ["content-type: application/wasm"];
    let second = rig.send(
        "POST",
        &format!("{WEB}/versions?activate=false"),
        &dark,
        b"two",
    );
    assert_eq!(second.expect(201).json()["active"], false);
    assert_eq!(rig.get(WEB).json()["active_version"], 1);
    traffic(r#"{"2":100}"#).expect(200);
    traffic(r#"{"1":50,"2":49}"#).refused(422, "invalid_spec");
    traffic(r#"{"9":100}"#).refused(422, "unknown_version");
    assert_eq!(post("rollback").expect(200).json()["active_version"], 1);
    let versions = rig.get(&format!("{WEB}/versions")).json();
    let shown: Vec<_> = versions["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|version| {
            (
                version["version"].as_u64().unwrap(),
                version["active"].as_bool().unwrap(),
            )
        })
        .collect();
    assert_eq!(shown, [(2, false), (1, true)]);
    assert_eq!(
        rig.seen()[3..],
        [
            "service web v1 sealed:compiled:one",
            "service web v1 sealed:compiled:one v2=preview sealed:compiled:two",
            "service web v2 sealed:compiled:two",
            "service web v1 sealed:compiled:one v2=preview sealed:compiled:two"
        ]
    );
}

#[test]
fn traffic_is_split() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    for component in ["one", "two", "three"] {
        rig.upload(component).expect(201);
    }
    let path = format!("{WEB}/traffic");
    let split = json!({"1": 0, "2": 90, "3": 10});
    assert_eq!(rig.put(&path, &split.to_string()).expect(200).json(), split);
    assert_eq!(
        rig.seen().last().unwrap(),
        "service web v1=0 sealed:compiled:one v2=90 sealed:compiled:two v3=10 sealed:compiled:three"
    );
    let service = rig.get(WEB).json();
    assert_eq!(service["traffic"], split);
    assert_eq!(
        (&service["active_version"], &service["previous_version"]),
        (&json!(2), &json!(3)),
        "version 3 had everything before"
    );
    // The document that was read can be put.
    rig.put(WEB, &service.to_string()).expect(200);
    let versions = rig.get(&format!("{WEB}/versions")).json();
    let shown = &versions["items"];
    assert_eq!(
        (&shown[0]["percent"], &shown[0]["active"]),
        (&json!(10), &json!(true))
    );
    assert_eq!(
        (&shown[2]["percent"], &shown[2]["active"]),
        (&json!(0), &json!(false))
    );
    assert_eq!(
        shown[2]["preview_url"],
        "http://v1.web.acme.localhost:8080/"
    );
    rig.fake
        .refuse
        .store(true, std::sync::atomic::Ordering::SeqCst);
    rig.put(&path, r#"{"1":100}"#).refused(500, "not_activated");
    assert_eq!(rig.get(WEB).json()["traffic"], split, "taken back");
    rig.stop();

    let rig = Rig::start(dir.path());
    assert_eq!(rig.get(WEB).json()["traffic"], split, "survives a restart");
}

#[test]
fn usage_and_metrics_are_of_this_moment() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    let used = |fuel| {
        let mut requests = [0; Outcome::ALL.len()];
        requests[Outcome::Trap.index()] = 2;
        let (tenant, service) = (TenantId::new(1), ServiceId::new(1));
        let delta = UsageDelta {
            tenant,
            service,
            requests,
            fuel,
            cpu_ns: 1_500_000_000,
            memory_byte_ms: 3_000,
            bytes_in: 10,
            bytes_out: 20,
        };
        rig.fake.usage.lock().unwrap().push(delta);
    };
    used(7);
    let usage = rig.get("/v1/tenants/acme/usage").expect(200).json();
    assert_eq!(
        (&usage["fuel"], &usage["cpu_seconds"]),
        (&json!(7), &json!(1.5))
    );
    assert_eq!(usage["memory_byte_seconds"], 3.0);
    assert_eq!(usage["requests"]["total"], 2);
    assert_eq!(usage["requests"]["trap"], 2);
    assert_eq!(usage["ingress_bytes"], json!({"in": 10, "out": 20}));
    assert_eq!(usage["services"][0]["name"], "web");
    assert_eq!(usage["services"][0]["fuel"], 7);
    used(1);
    rig.delete(WEB).expect(204);
    let usage = rig.get("/v1/tenants/acme/usage").json();
    assert_eq!(
        usage["fuel"], 8,
        "what a deleted service used last counts too"
    );
    assert_eq!(usage["services"], json!([]));

    let spec = r#"{"cpu":{"reservation":"250m"},"memory":{"limit":1024}}"#;
    rig.put("/v1/tenants/acme", spec).expect(200);
    let metrics = rig.raw("GET", "/metrics", &[], b"").expect(200).body;
    for line in [
        "insula_host_cpu_capacity_cores 2.000",
        "insula_host_cpu_reserved_cores 0.250",
        "insula_host_memory_committed_bytes 1024",
        "fake 1",
    ] {
        assert!(
            metrics.lines().any(|known| known == line),
            "{line} is missing in {metrics}"
        );
    }
    assert_eq!(
        rig.get("/v1/host").json()["committed"]["cpu_reservation_millicores"],
        250
    );
    rig.raw("GET", "/healthz", &[], b"").expect(200);
    rig.raw("GET", "/readyz", &[], b"").expect(200);
    assert_eq!(rig.get("/v1/openapi.json").json()["openapi"], "3.1.0");
}

fn line(text: &str) -> LogRecord {
    LogRecord {
        service: ServiceId::new(1),
        version: VersionNumber::new(1).unwrap(),
        time: SystemTime::now(),
        request_id: "r1".to_owned(),
        source: LogSource::Stderr,
        text: text.to_owned(),
        dropped: 0,
    }
}

#[test]
fn logs_and_events_are_followed_until_the_host_stops() {
    let dir = tempfile::tempdir().unwrap();
    let mut rig = Rig::with_service(dir.path());
    rig.log(line("first"));
    let logs = format!("{WEB}/logs");
    eventually("the first line", || rig.get(&logs).body.contains("first"));
    assert_eq!(rig.get(&format!("{logs}?tail=0")).body, "");
    let open = |path: &str| {
        let mut stream = rig.connect();
        let head = format!(
            "GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\r\n",
            rig.token
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream
    };
    let read_until = |stream: &mut std::net::TcpStream, wanted: &str| {
        let (mut seen, mut chunk) = (String::new(), [0; 4096]);
        while !seen.contains(wanted) {
            let count = stream.read(&mut chunk).unwrap();
            assert!(count > 0, "ended before {wanted:?}: {seen}");
            seen.push_str(std::str::from_utf8(&chunk[..count]).unwrap());
        }
        seen
    };
    let mut follower = open(&format!("{logs}?follow=true"));
    read_until(&mut follower, "first");
    let mut events = open("/v1/events");
    read_until(&mut events, "listening");
    rig.log(line(
        r#"{"level":"info","message":"second","request_id":"forged"}"#,
    ));
    let seen = read_until(&mut follower, "second");
    assert!(
        seen.contains(r#""level":"info""#) && seen.contains(r#""request_id":"r1""#),
        "{seen}"
    );
    rig.upload("one").expect(201);
    let seen = read_until(&mut events, "version.activated");
    assert!(
        seen.contains("version.created") && seen.contains(r#""service":"web""#),
        "{seen}"
    );

    rig.control
        .take()
        .unwrap()
        .shutdown(std::time::Duration::ZERO);
    for mut stream in [follower, events] {
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert!(
            rest.ends_with("0\r\n\r\n"),
            "a whole answer, not a cut one: {rest:?}"
        );
    }
}

#[test]
fn a_repeated_post_is_done_once() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    let post = |path: &str, kind: &str, key: &str, body: &str| {
        let head = [
            format!("content-type: {kind}"),
            format!("idempotency-key: {key}"),
        ];
        rig.send("POST", path, &[&head[0], &head[1]], body.as_bytes())
    };
    let versions = format!("{WEB}/versions");
    let upload = |key: &str, body: &str| post(&versions, "application/wasm", key, body);
    let first = upload("k1", "one").expect(201);
    let again = upload("k1", "one").expect(201);
    assert_eq!(first.json(), again.json());
    assert_eq!(again.headers["idempotency-replayed"], "true");
    upload("k1", "two").refused(422, "idempotency_mismatch");
    assert_eq!(upload("k2", "one").expect(201).json()["version"], 2);
    let token = r#"{"name":"x"}"#;
    let first = post("/v1/tokens", "application/json", "k1", token)
        .expect(201)
        .json();
    let again = post("/v1/tokens", "application/json", "k1", token)
        .expect(201)
        .json();
    assert_eq!(first["id"], again["id"]);
    assert!(first["secret"].is_string() && again.get("secret").is_none());
}
