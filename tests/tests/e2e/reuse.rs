//! Instances that serve more than one request, where a service asks for it.

use std::time::Duration;

use insula_tests::wait::{holds, until};
use insula_tests::{Service, TestHost, load};
use serde_json::{Value, json};

fn reusing(requests: u32) -> Value {
    json!({"reuse": {"requests": requests}, "usage_header": true})
}

/// What the instance says that answered: how many requests it has counted.
fn count(service: &Service) -> u64 {
    let answer = service.get("/count").send();
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.text().trim().parse().expect("a number")
}

/// How many instances wait or run, by what they hold.
fn when_nothing_is_held(host: &TestHost, tenant: &str) {
    host.metrics_when("its instances are gone", |metrics| {
        let held = metrics.sum("insula_memory_bytes", &[("tenant", tenant)]);
        holds(held == 0.0, format!("{held} bytes are held"))
    });
}

#[test]
fn an_instance_serves_as_many_requests_as_its_service_says() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let fresh = tenant.service("fresh").deploy("echo");
    let reused = tenant.service("reused").spec(reusing(3)).deploy("echo");
    assert_eq!(host.admin().get(&reused.path())["reuse"]["requests"], 3);
    assert!((0..10).all(|_| count(&fresh) == 1), "each has its own");
    let counts: Vec<u64> = (0..60).map(|_| count(&reused)).collect();
    assert_eq!(counts.iter().max(), Some(&3), "{counts:?}");
    // An answer may be read before its instance is ready for the next request.
    let again = counts.iter().filter(|count| **count > 1).count();
    assert!(again >= 20, "{counts:?}");
    let first = counts.iter().filter(|count| **count == 1).count();
    assert!(first >= 20, "{counts:?}");
}

#[test]
fn every_request_is_metered_by_itself() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let service = tenant.service("reused").spec(reusing(1_000)).deploy("echo");
    let burn = service.get("/burn?n=100000");
    let load = load::times(200, 1, &burn);
    assert_eq!(load.status(200), 200, "{:?}", load.problems);
    let metrics = host.when_ended("a", 200);
    // A hundred thousand steps burn several hundred thousand units, in the first request as in the last.
    let each = metrics.fuel("a") / 200;
    let one = service.get("/burn?n=100000").send();
    let fuel = one.usage().fuel;
    assert!(fuel >= 300_000, "{fuel}");
    assert!(fuel.abs_diff(each) < each / 10, "{fuel}, {each} on average");
}

#[test]
fn limits_hold_in_every_request() {
    const FUEL: u64 = 20_000_000;
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let mut spec = reusing(1_000);
    spec["limits"] = json!({"fuel": FUEL, "timeout": "1s"});
    let service = tenant.service("reused").spec(spec).deploy("echo");
    let burn = |steps: u64| service.get(&format!("/burn?n={steps}")).send();
    let probe = burn(10_000);
    assert_eq!(probe.status, 200);
    // Two thirds of the fuel of one request: two could not share it.
    let steps = 10_000 * (FUEL * 2 / 3) / probe.usage().fuel;
    for _ in 0..20 {
        assert_eq!(burn(steps).status, 200);
    }
    let answer = burn(2 * steps);
    assert_eq!(answer.problem(), "out_of_fuel", "{}", answer.text());
    assert_eq!(service.get("/sleep?ms=5000").send().problem(), "timeout");
    assert_eq!(count(&service), 1, "what was cut short serves nobody else");
    assert_eq!(service.get("/panic").send().problem(), "trap");
    let after = count(&service);
    assert!(after <= 2, "{after}");
}

#[test]
fn what_waits_is_on_its_tenants_account_and_does_not_wait_for_ever() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let service = tenant.service("reused").spec(reusing(1_000)).deploy("echo");
    let load = load::times(400, 16, &service.get("/"));
    assert_eq!(load.status(200), 400, "{:?}", load.problems);
    host.when_ended("a", 400);
    let held = host
        .metrics()
        .sum("insula_memory_bytes", &[("tenant", "a")]);
    assert!(held > 0.0, "instances wait");
    when_nothing_is_held(&host, "a");
}

#[test]
fn a_change_of_the_service_begins_with_fresh_instances() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let service = tenant.service("reused").spec(reusing(1_000)).deploy("echo");
    until(Duration::from_secs(5), "an instance is used again", || {
        let count = count(&service);
        holds(count > 1, format!("{count}"))
    });
    let mut changed = reusing(1_000);
    changed["env"] = json!({"K": "V"});
    host.admin().put(&service.path(), &changed);
    let info = service.get("/info").send().json();
    assert_eq!(info["env"]["K"], "V", "{info}");
    // A service of the same bytes, and even of the same name, never shares.
    let other = host
        .tenant("b")
        .create()
        .service("reused")
        .spec(reusing(1_000));
    assert_eq!(count(&other.deploy("echo")), 1);
}

#[test]
fn lines_belong_to_the_request_that_wrote_them() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let service = tenant.service("reused").spec(reusing(1_000)).deploy("echo");
    let mut ids = Vec::new();
    for number in 0..10 {
        let answer = service.get(&format!("/log?message=line-{number}")).send();
        ids.push(answer.header("x-request-id").expect("an id").to_owned());
    }
    let lines = until(Duration::from_secs(10), "all lines are there", || {
        let mut log = service.log();
        log.retain(|line| line["source"] == "stdout");
        holds(log.len() == 10, format!("{log:#?}")).map(|()| log)
    });
    for (number, (line, id)) in lines.iter().zip(&ids).enumerate() {
        assert_eq!(line["request_id"], Value::from(id.as_str()), "{line}");
        assert_eq!(line["message"], format!("stdout: line-{number}"));
    }
}
