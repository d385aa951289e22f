//! How long a host that was killed is away.

use std::time::{Duration, Instant};

use insula_tests::{TestHost, guests};
use serde_json::json;

const SERVICES: usize = 100;
const READY_WITHIN: Duration = Duration::from_secs(1);

#[test]
fn a_killed_host_with_100_services_is_ready_again_within_a_second() {
    let host = TestHost::measured().start();
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
    host.kill();
    let began = Instant::now();
    host.start_again();
    let ready = host.admin_as(None).request("GET", "/readyz").send();
    let took = began.elapsed();
    assert_eq!(ready.status, 200, "{}", ready.text());
    for service in &services {
        assert_ne!(service.get("/").send().status, 404, "{}", service.name());
    }
    eprintln!("{SERVICES} services: ready {took:?} after the start of the process");
    assert!(took < READY_WITHIN, "{took:?}");
}
