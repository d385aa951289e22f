//! Services that nobody asks: their code is not in memory, and comes back when somebody does.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use insula_tests::wait::{holds, until};
use insula_tests::{Service, TestHost, guests, load};

/// `hello` with a section appended that means nothing, so that it is another component and shares
/// nothing (WebAssembly Core Specification, "Custom Section").
fn distinct(number: u8) -> Vec<u8> {
    let mut bytes = guests::bytes("hello");
    bytes.extend_from_slice(&[0, 3, 1, b'n', number]);
    bytes
}

fn deploy_many(host: &TestHost, count: u8) -> Vec<Service> {
    let tenant = host.tenant("many").create();
    (0..count)
        .map(|number| {
            let service = tenant.service(&format!("s{number}"));
            service.deploy_bytes(distinct(number))
        })
        .collect()
}

#[test]
fn code_that_nobody_asks_leaves_memory_and_comes_back() {
    const SERVICES: u8 = 24;
    // Less than what one program takes beside what all share, more than what is left of one.
    const EACH: u64 = 200 << 10;
    let host = TestHost::plan().arg("--code-idle", "2s").start();
    let services = deploy_many(&host, SERVICES);
    // All are warm: they were deployed a moment ago, or are loaded for this.
    for service in &services {
        assert_eq!(service.get("/").send().status, 200);
    }
    let warm = host.rss_bytes();
    let cold = until(Duration::from_secs(20), "the code leaves", || {
        let now = host.rss_bytes();
        let left = warm.saturating_sub(now);
        holds(left >= u64::from(SERVICES) * EACH, format!("{left} bytes")).map(|()| now)
    });
    eprintln!("{SERVICES} services: {warm} bytes resident warm, {cold} cold");
    let before = host.metrics().fuel("many");
    for service in &services {
        assert_eq!(service.get("/").send().status, 200);
    }
    let ended = 2 * u64::from(SERVICES);
    let metrics = host.when_ended("many", ended);
    // Loading is CPU time of the tenant's, and no fuel.
    assert_eq!(metrics.fuel("many"), 2 * before);
}

#[test]
fn after_a_restart_the_first_requests_load_a_program_once() {
    let host = TestHost::start();
    let hello = host.tenant("a").create().deploy("hello");
    host.restart();
    let load = load::times(64, 16, &hello.get("/"));
    assert_eq!(load.status(200), 64, "{:?}", load.problems);
}

#[test]
fn an_artefact_that_was_damaged_is_not_loaded_but_made_again() {
    let host = TestHost::start();
    let hello = host.tenant("a").create().deploy("hello");
    host.restart();
    // In place: the host holds the file open, and has not loaded it yet.
    let artefact = host.files("artefacts").pop().expect("an artefact");
    let sealed = fs::read(&artefact).expect("readable");
    let file = OpenOptions::new().write(true).open(&artefact);
    let middle = sealed.len() / 2;
    let bent = [!sealed[middle]];
    file.and_then(|file| file.write_all_at(&bent, middle as u64))
        .expect("written");
    let answer = hello.get("/").send();
    assert_eq!(
        (answer.status, answer.problem().as_str()),
        (500, "host_error"),
        "{}",
        answer.text()
    );
    until(Duration::from_secs(30), "it is compiled again", || {
        let status = hello.get("/").send().status;
        holds(status == 200, format!("{status}"))
    });
    let made = host.files("artefacts").pop().expect("an artefact");
    assert_eq!(fs::read(made).expect("readable"), sealed);
}
