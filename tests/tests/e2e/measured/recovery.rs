//! How long a host that was killed is away, as a whole or its data process.

use std::time::{Duration, Instant};

use insula_tests::{Service, TestHost, guests};
use serde_json::json;

use crate::two_processes::answered_after;

const SERVICES: usize = 100;
const READY_WITHIN: Duration = Duration::from_secs(1);

/// A hundred services in a hundred and fifty versions.
fn street(host: &TestHost) -> Vec<Service> {
    let tenant = host.tenant("a").create();
    let services: Vec<_> = (0..SERVICES)
        .map(|n| {
            let service = tenant.service(&format!("s{n}"));
            service.deploy(["hello", "echo", "markdown"][n % 3])
        })
        .collect();
    // One more version each, so that most have two to keep ready.
    for service in &services[..SERVICES / 2] {
        assert_eq!(service.upload(guests::bytes("sse")).status, 201);
        let path = format!("{}/traffic", service.path());
        host.admin().put(&path, &json!({"1": 90, "2": 10}));
    }
    services
}

/// The status of one answer, whichever version gives it: `sse` sends one event and ends.
fn asked(service: &Service) -> u16 {
    service.get("/?count=1").send().status
}

#[test]
fn a_killed_host_with_100_services_is_ready_again_within_a_second() {
    let host = TestHost::measured().start();
    let services = street(&host);
    host.kill();
    let began = Instant::now();
    host.start_again();
    let ready = host.admin_as(None).request("GET", "/readyz").send();
    let took = began.elapsed();
    assert_eq!(ready.status, 200, "{}", ready.text());
    for service in &services {
        assert_ne!(asked(service), 404, "{}", service.name());
    }
    eprintln!("{SERVICES} services: ready {took:?} after the start of the process");
    assert!(took < READY_WITHIN, "{took:?}");
}

#[test]
fn after_its_data_process_was_killed_a_host_with_100_services_answers_within_a_second() {
    let host = TestHost::measured().start();
    let services = street(&host);
    // It has one version, which answers in one piece.
    let one = &services[SERVICES - 1];
    let mut longest = Duration::ZERO;
    for _ in 0..5 {
        host.kill_data();
        let killed = Instant::now();
        longest = longest.max(answered_after(one, killed));
        for service in &services {
            assert_ne!(asked(service), 404, "{}", service.name());
        }
    }
    eprintln!("{SERVICES} services: answered at most {longest:?} after the kill");
    assert!(longest < READY_WITHIN, "{longest:?}");
}
