//! Fuel is deterministic, and a limit is a limit.

use std::collections::BTreeMap;

use insula_tests::http::Request;
use insula_tests::{TestHost, load};
use serde_json::json;

const TIMES: u64 = 1_000;

/// Sends a request a thousand times and gives the fuel that each of them burned.
fn burned(host: &TestHost, tenant: &str, request: &Request) -> u64 {
    let mut seen = BTreeMap::<u64, u64>::new();
    for answer in load::answers(TIMES, 4, request) {
        assert_eq!(answer.status, 200, "{}", answer.text());
        *seen.entry(answer.usage().fuel).or_default() += 1;
    }
    assert_eq!(seen.len(), 1, "fuel, and how often it was burned: {seen:?}");
    let fuel = seen.keys().copied().next().unwrap_or_default();
    assert!(fuel > 0);
    let charged = host.when_ended(tenant, TIMES).fuel(tenant);
    assert_eq!(charged, fuel * TIMES, "what is shown is what is charged");
    fuel
}

#[test]
fn the_same_request_burns_the_same_fuel_a_thousand_times() {
    let host = TestHost::start();
    let hello = host
        .tenant("a")
        .create()
        .service("hello")
        .usage_header()
        .deploy("hello");
    let plain = burned(&host, "a", &hello.get("/"));
    let echo = host
        .tenant("b")
        .create()
        .service("echo")
        .usage_header()
        .deploy("echo");
    let work = burned(&host, "b", &echo.get("/burn?n=10000"));
    assert!(work > plain, "{work} and {plain}");
    let markdown = host
        .tenant("c")
        .create()
        .service("markdown")
        .usage_header()
        .deploy("markdown");
    let text = "# Title\n\n* one\n* two\n\n`code` and *words*\n".repeat(20);
    let _ = burned(&host, "c", &markdown.post("/", text));
}

#[test]
fn fuel_grows_with_the_work_and_with_nothing_else() {
    let host = TestHost::start();
    let echo = host
        .tenant("a")
        .create()
        .service("echo")
        .usage_header()
        .deploy("echo");
    let fuel = |n: u64| echo.get(&format!("/burn?n={n}")).send().usage().fuel;
    // Numbers of as many digits, so that reading them is the same work.
    let (one, two, three) = (fuel(1_000_000), fuel(2_000_000), fuel(3_000_000));
    let (first, second) = (two - one, three - two);
    // Their decimal forms differ by a digit's value here and there.
    assert!(
        first.abs_diff(second) * 1_000 < first,
        "{one} {two} {three}"
    );
}

#[test]
fn a_request_gets_its_fuel_and_not_more() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let limit = 50_000_000;
    let spec = json!({"limits": {"fuel": limit}, "usage_header": true});
    let echo = tenant.service("echo").spec(spec).deploy("echo");
    assert_eq!(echo.get("/burn?n=1000000").send().status, 200);
    let before = host.when_ended("a", 1).fuel("a");
    let answer = echo.get("/burn?n=1000000000").send();
    assert_eq!(
        (answer.status, answer.problem().as_str()),
        (504, "out_of_fuel")
    );
    let metrics = host.when_ended("a", 2);
    assert_eq!(
        metrics.fuel("a") - before,
        limit,
        "all of it is charged, and no more"
    );
    assert_eq!(metrics.requests("a", "out_of_fuel"), 1);
}

#[test]
fn the_tightest_limit_counts() {
    let host = TestHost::plan()
        .arg("--max-fuel", "30M")
        .arg("--max-timeout", "2s")
        .start();
    let tenant = host.tenant("a").memory("16MiB").create();
    let limits = json!({"fuel": "1T", "timeout": "5m", "memory": "128MiB"});
    let echo = tenant.service("echo").limits(limits).deploy("echo");
    let ends = |path: &str| {
        let answer = echo.get(path).send();
        if answer.status == 200 {
            "ok".to_owned()
        } else {
            answer.problem()
        }
    };
    assert_eq!(ends("/burn?n=1000000"), "ok");
    assert_eq!(
        ends("/burn?n=10000000"),
        "out_of_fuel",
        "the host's limit on fuel"
    );
    assert_eq!(ends("/alloc?mib=8"), "ok");
    assert_eq!(
        ends("/alloc?mib=24"),
        "out_of_memory",
        "the tenant's limit on memory"
    );
    assert_eq!(ends("/sleep?ms=100"), "ok");
    assert_eq!(
        ends("/sleep?ms=60000"),
        "timeout",
        "the host's limit on time"
    );
    let metrics = host.when_ended("a", 6);
    assert_eq!(metrics.sum("insula_memory_bytes", &[("tenant", "a")]), 0.0);
}
