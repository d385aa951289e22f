//! Traffic divided among versions: shares, sticky keys, previews, and the way back.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use insula_tests::tenant::Service;
use insula_tests::wait::{holds, throughout};
use insula_tests::{TestHost, guests, load, until};
use serde_json::{Value, json};

/// A service with the sample `hello` as version 1 and `echo` as version 2, which gets `share`.
fn split(host: &TestHost, spec: Value, share: u8) -> Service {
    let mut spec = spec;
    spec["usage_header"] = json!(true);
    let service = host.tenant("a").create().service("web").spec(spec);
    let service = service.deploy("hello");
    let path = format!("{}/versions?activate=false", service.path());
    let dark = host.admin().upload(&path, guests::bytes("echo")).send();
    assert_eq!(dark.json()["version"], 2, "{}", dark.text());
    set(host, &service, &json!({"1": 100 - share, "2": share}));
    service
}

fn set(host: &TestHost, service: &Service, traffic: &Value) {
    let path = format!("{}/traffic", service.path());
    assert_eq!(&host.admin().put(&path, traffic), traffic);
}

/// The version that answered, of any request.
fn version(service: &Service, headers: &[(&str, &str)]) -> u64 {
    let mut request = service.get("/").header("te", "trailers");
    for (name, value) in headers {
        request = request.header(name, *value);
    }
    request.send().usage().version
}

#[test]
fn shares_come_out_and_change_while_requests_run() {
    let host = TestHost::start();
    let service = split(&host, json!({}), 10);
    let count = |requests: u64| {
        let answers = load::answers(requests, 2, &service.get("/"));
        let mut versions = BTreeMap::new();
        for answer in answers {
            *versions.entry(answer.usage().version).or_insert(0u64) += 1;
        }
        versions
    };
    // Binomial: 600 at 10 % are 60 ± 7.3, at 50 % 300 ± 12.2; six deviations either way.
    let tenth = count(600);
    assert!((16..=104).contains(&tenth[&2]), "{tenth:?}");
    set(&host, &service, &json!({"1": 50, "2": 50}));
    let half = count(600);
    assert!((226..=374).contains(&half[&2]), "{half:?}");
    set(&host, &service, &json!({"1": 0, "2": 100}));
    assert_eq!(count(100), BTreeMap::from([(2, 100)]));
    let rollback = format!("{}/rollback", service.path());
    let back = host.admin().post(&rollback, &json!({}));
    assert_eq!(back["traffic"], json!({"1": 100}));
    assert_eq!(count(100), BTreeMap::from([(1, 100)]));
}

#[test]
fn a_sticky_key_keeps_its_version_while_the_share_grows_and_over_a_restart() {
    let host = TestHost::start();
    let service = split(&host, json!({"sticky_header": "X-User"}), 30);
    let users: Vec<String> = (0..40).map(|user| format!("user-{user}")).collect();
    let now = || -> Vec<u64> {
        let of = |user: &String| version(&service, &[("x-user", user)]);
        users.iter().map(of).collect()
    };
    let first = now();
    assert_eq!(first, now(), "the same users, the same versions");
    assert!(first.contains(&1) && first.contains(&2), "{first:?}");
    set(&host, &service, &json!({"1": 40, "2": 60}));
    let wider = now();
    let lost = first
        .iter()
        .zip(&wider)
        .any(|(old, new)| *old == 2 && *new != 2);
    assert!(!lost, "{first:?} {wider:?}");
    assert_ne!(first, wider);
    host.restart();
    assert_eq!(wider, now(), "after a restart");
}

#[test]
fn every_version_that_is_kept_ready_has_a_preview_name() {
    let host = TestHost::start();
    let service = split(&host, json!({}), 0);
    let preview = |name: &str| {
        let request = host.request(name, "GET", "/?interval_ms=1");
        let request = request.header("te", "trailers");
        let answer = request.send();
        (
            answer.status,
            (answer.status == 200).then(|| answer.usage().version),
        )
    };
    assert_eq!(version(&service, &[]), 1);
    assert_eq!(preview("v1.web.a.localhost"), (200, Some(1)));
    assert_eq!(preview("v2.web.a.localhost"), (200, Some(2)));
    assert_eq!(preview("V2.Web.A.localhost:80"), (200, Some(2)));
    for nothing in [
        "v3.web.a.localhost",
        "v0.web.a.localhost",
        "v02.web.a.localhost",
        "v1.other.a.localhost",
        "v1.v1.web.a.localhost",
        "v1.a.localhost",
        "v1.localhost",
        "x1.web.a.localhost",
    ] {
        assert_eq!(preview(nothing), (404, None), "{nothing}");
    }
    // The newest is ready without being listed; what is older and not listed is not.
    let path = format!("{}/versions?activate=false", service.path());
    assert_eq!(
        host.admin()
            .upload(&path, guests::bytes("sse"))
            .send()
            .status,
        201
    );
    set(&host, &service, &json!({"1": 100}));
    assert_eq!(preview("v3.web.a.localhost"), (200, Some(3)));
    assert_eq!(preview("v2.web.a.localhost"), (404, None));
    let versions = host.admin().get(&format!("{}/versions", service.path()));
    let shown: Vec<bool> = (0..3)
        .map(|at| versions["items"][at]["preview_url"].is_string())
        .collect();
    assert_eq!(shown, [true, false, true], "{versions}");
    host.restart();
    assert_eq!(
        preview("v3.web.a.localhost"),
        (200, Some(3)),
        "after a restart"
    );
    assert_eq!(version(&service, &[]), 1);
}

#[test]
fn a_request_ends_on_the_version_that_it_began_with() {
    let host = TestHost::start();
    let service = host.tenant("a").create().service("web").usage_header();
    let service = service.deploy("sse");
    let request = service.get("/?count=30&interval_ms=50");
    let mut stream = request.header("te", "trailers").open();
    assert!(stream.piece().expect("the first event").is_some());
    assert_eq!(service.upload(guests::bytes("hello")).status, 201);
    assert_eq!(
        version(&service, &[]),
        2,
        "new requests get the new version"
    );
    let mut text = String::new();
    while let Some(piece) = stream.piece().expect("the old version goes on") {
        text.push_str(&String::from_utf8(piece).expect("events"));
    }
    assert!(text.contains("id: 30\n"), "to its end: {text}");
    let usage = stream.trailers();
    let usage = usage.get("insula-usage").expect("a usage").to_owned();
    assert!(usage.ends_with("version=1"), "{usage}");
}

#[test]
fn shares_that_cannot_be_are_refused_and_change_nothing() {
    let host = TestHost::start();
    let service = split(&host, json!({}), 10);
    let path = format!("{}/traffic", service.path());
    for (traffic, code) in [
        (json!({}), "invalid_spec"),
        (json!({"1": 90}), "invalid_spec"),
        (json!({"1": 90, "2": 11}), "invalid_spec"),
        (json!({"1": 90, "x": 10}), "invalid_spec"),
        (json!({"1": 90, "9": 10}), "unknown_version"),
    ] {
        let answer = host.admin().json("PUT", &path, &traffic).send();
        assert_eq!(
            (answer.status, answer.problem().as_str()),
            (422, code),
            "{traffic}"
        );
    }
    let document = host.admin().get(&service.path());
    assert_eq!(document["traffic"], json!({"1": 90, "2": 10}));
    let foreign = json!({"sticky_header": "not a header"});
    let answer = host.admin().json("PUT", &service.path(), &foreign).send();
    assert_eq!(
        (answer.status, answer.problem().as_str()),
        (422, "invalid_spec")
    );
}

/// Sends requests until the service's active version is another one; gives how long that took.
fn rolled_back(host: &TestHost, service: &Service, broken: u64) -> Duration {
    let request = service.get("/");
    let began = Instant::now();
    loop {
        let _ = load::times(20, 2, &request);
        if host.admin().get(&service.path())["active_version"] != broken {
            return began.elapsed();
        }
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "version {broken} stays"
        );
    }
}

#[test]
fn a_broken_version_rolls_itself_back() {
    let host = TestHost::start();
    let service = host.tenant("a").create().service("web").deploy("hello");
    assert_eq!(load::times(100, 2, &service.get("/")).status(200), 100);
    let mut events = host.admin().request("GET", "/v1/events").open();
    assert_eq!(service.upload(guests::bytes("trap")).status, 201);
    let took = rolled_back(&host, &service, 2);
    assert!(took < Duration::from_secs(5), "{took:?}");
    // What is shown is what is intended; it is in effect a moment later.
    until(Duration::from_secs(2), "version 1 serves", || {
        let status = service.get("/").send().status;
        holds(status == 200, status.to_string())
    });
    assert_eq!(load::times(50, 2, &service.get("/")).status(200), 50);
    let mut told = String::new();
    while !told.contains("version.rolled_back") {
        let piece = events.piece().expect("events").expect("more events");
        told.push_str(&String::from_utf8(piece).expect("text"));
    }
    assert!(
        told.contains("\"reason\":") && told.contains("failed"),
        "{told}"
    );
    let log = service.log();
    let said = log.iter().any(|line| {
        line["source"] == "host"
            && line["message"]
                .as_str()
                .is_some_and(|text| text.starts_with("rolled back to version 1"))
    });
    assert!(said, "{log:?}");
}

#[test]
fn a_broken_canary_rolls_itself_back_and_one_that_may_fail_stays() {
    let host = TestHost::start();
    let service = host.tenant("a").create().service("web").deploy("hello");
    let dark = format!("{}/versions?activate=false", service.path());
    let upload = |sample| {
        host.admin()
            .upload(&dark, guests::bytes(sample))
            .send()
            .json()
    };
    assert_eq!(upload("trap")["version"], 2);
    set(&host, &service, &json!({"1": 50, "2": 50}));
    let request = service.get("/");
    until(Duration::from_secs(20), "the canary is gone", || {
        let _ = load::times(40, 2, &request);
        let now = host.admin().get(&service.path())["traffic"].clone();
        holds(now == json!({"1": 100}), now.to_string())
    });
    host.admin().put(
        &service.path(),
        &json!({"auto_rollback": {"enabled": false}}),
    );
    set(&host, &service, &json!({"2": 100}));
    assert_eq!(load::times(200, 2, &request).status(502), 200);
    // Two collections at least.
    throughout(Duration::from_millis(2_500), || {
        assert_eq!(host.admin().get(&service.path())["active_version"], 2);
    });
}
