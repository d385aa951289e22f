//! Bodies stream both ways, with back-pressure, within limits, and for as long as somebody is
//! there.

use std::time::Duration;

use insula_tests::wait::{holds, throughout};
use insula_tests::{Connection, TestHost, load, until};
use serde_json::json;

const MIB: u64 = 1 << 20;

#[test]
fn a_request_body_reaches_the_guest_before_it_is_complete() {
    let host = TestHost::start();
    let echo = host.tenant("a").create().deploy("echo");
    let mut connection = echo.connect();
    let head = format!(
        "POST / HTTP/1.1\r\nhost: {}\r\ntransfer-encoding: chunked\r\n\r\n",
        echo.host_name()
    );
    connection.raw(head.as_bytes()).expect("sent");
    connection.raw(&Connection::chunk(b"first")).expect("sent");
    let mut answer = connection.streaming("POST");
    assert_eq!(answer.head.status, 200);
    assert_eq!(
        answer.piece().expect("a chunk").as_deref(),
        Some(&b"first"[..])
    );
    for piece in ["second", "third"] {
        // Only now: so nothing but the guest can have sent what comes back.
        answer
            .connection
            .raw(&Connection::chunk(piece.as_bytes()))
            .expect("sent");
        assert_eq!(
            answer.piece().expect("a chunk").as_deref(),
            Some(piece.as_bytes())
        );
    }
    answer.connection.raw(b"0\r\n\r\n").expect("sent");
    assert_eq!(answer.piece().expect("an end"), None);
    assert_eq!(host.when_ended("a", 1).requests("a", "ok"), 1);
}

#[test]
fn a_large_body_comes_back_whole() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let limits = json!({"request_body": "64MiB", "fuel": "100G"});
    let echo = tenant.service("echo").limits(limits).deploy("echo");
    let body: Vec<u8> = (0..32 * MIB)
        .map(|n| u8::try_from(n * n % 251).unwrap_or(0))
        .collect();
    let sent = body.clone();
    // Sends and receives at once, as a client of an echo must.
    let mut writer = echo.connect();
    let head = format!(
        "POST / HTTP/1.1\r\nhost: {}\r\ncontent-length: {}\r\n\r\n",
        echo.host_name(),
        body.len()
    );
    writer.raw(head.as_bytes()).expect("sent");
    let half = writer.second_writer();
    let sender = std::thread::spawn(move || half.write_all(&sent));
    let answer = writer.answer("POST").expect("a whole answer");
    sender.join().expect("a sender").expect("all was sent");
    assert_eq!(answer.status, 200);
    assert!(
        answer.body == body,
        "{} of {} bytes, or others",
        answer.body.len(),
        body.len()
    );
    let metrics = host.when_ended("a", 1);
    for direction in ["in", "out"] {
        let labels = [("tenant", "a"), ("direction", direction)];
        let bytes = metrics.count("insula_ingress_bytes_total", &labels);
        let heads = 4096;
        assert!(
            (32 * MIB..32 * MIB + heads).contains(&bytes),
            "{direction}: {bytes}"
        );
    }
}

#[test]
fn chunks_of_a_response_arrive_as_they_are_produced() {
    let host = TestHost::start();
    let sse = host.tenant("a").create().deploy("sse");
    let mut stream = sse.get("/?count=0&interval_ms=10").open();
    for n in 1..=5 {
        let event = stream.piece().expect("a chunk").expect("an event");
        assert!(
            event.starts_with(format!("id: {n}\n").as_bytes()),
            "{event:?}"
        );
    }
    // It has no end: whatever came was produced while the guest still runs.
    let running = [("tenant", "a"), ("state", "running")];
    assert_eq!(host.metrics().sum("insula_instances", &running), 1.0);
}

#[test]
fn a_client_that_goes_away_cancels_its_guest_and_is_billed() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let limits = json!({"timeout": "60s", "fuel": "1T"});
    let sse = tenant.service("sse").limits(limits.clone()).deploy("sse");
    let spin = tenant.service("spin").limits(limits).deploy("spin");

    // In the middle of an answer.
    let mut stream = sse.get("/?count=0&interval_ms=10").open();
    let _ = stream.piece().expect("a chunk").expect("an event");
    drop(stream);
    let metrics = host.when_ended("a", 1);
    assert_eq!(
        metrics.requests("a", "canceled"),
        1,
        "{:?}",
        metrics.outcomes("a")
    );
    let fuel = metrics.fuel("a");
    assert!(fuel > 0 && metrics.cpu_seconds("a") > 0.0);

    // Before there is any answer, while the guest computes.
    let mut connection = spin.connect();
    connection.write(&spin.get("/")).expect("sent");
    let running = [("tenant", "a"), ("service", "spin"), ("state", "running")];
    host.metrics_when("the guest runs", |metrics| {
        holds(metrics.sum("insula_instances", &running) > 0.0, "not yet")
    });
    drop(connection);
    let metrics = host.when_ended("a", 2);
    assert_eq!(
        metrics.requests("a", "canceled"),
        2,
        "{:?}",
        metrics.outcomes("a")
    );
    assert!(metrics.fuel("a") > fuel, "what it burned is charged");
    let cpu = metrics.cpu_seconds("a");
    throughout(Duration::from_millis(300), || {
        assert!(
            (host.metrics().cpu_seconds("a") - cpu).abs() < 0.001,
            "it still runs"
        );
    });
}

#[test]
fn a_client_that_does_not_read_holds_its_guest_back_and_not_the_hosts_memory() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let limits = json!({"timeout": "60s", "fuel": "1T"});
    let endless = tenant
        .service("endless")
        .limits(limits)
        .deploy("endless-body");
    let hello = tenant.deploy("hello");
    assert_eq!(hello.get("/").send().status, 200);
    let before = host.rss_bytes();
    let clients: Vec<_> = (0..8).map(|_| endless.get("/").open()).collect();
    for client in &clients {
        assert_eq!(client.head.status, 200);
    }
    // The kernel's buffers fill, and then the guests stand still.
    let cpu = until(Duration::from_secs(20), "the guests are held back", || {
        let first = host.metrics().cpu_seconds("a");
        std::thread::sleep(Duration::from_millis(100));
        let second = host.metrics().cpu_seconds("a");
        holds(
            second - first < 0.001,
            format!("{first} s, then {second} s"),
        )
        .map(|()| second)
    });
    let mut most = 0;
    throughout(Duration::from_secs(2), || most = most.max(host.rss_bytes()));
    let grown = most.saturating_sub(before);
    eprintln!("8 clients that do not read: {} KiB more", grown >> 10);
    assert!(
        grown < 32 * MIB,
        "{} MiB more for 8 clients that do not read",
        grown >> 20
    );
    let later = host.metrics().cpu_seconds("a");
    assert!(
        later - cpu < 0.01,
        "{cpu} s, then {later} s: a guest that is held back computes"
    );
    // What one reads after all is there, and the guest goes on.
    let mut clients = clients;
    let mut one = clients.remove(0);
    let mut read = 0;
    while read < 64 * MIB {
        read += one
            .piece()
            .expect("a chunk")
            .expect("a body without end")
            .len() as u64;
    }
    drop((one, clients));
    let metrics = host.when_ended("a", 9);
    let out = [("tenant", "a"), ("direction", "out")];
    assert!(metrics.count("insula_ingress_bytes_total", &out) >= 64 * MIB);
    assert_eq!(
        metrics.requests("a", "canceled"),
        8,
        "{:?}",
        metrics.outcomes("a")
    );
}

#[test]
fn a_body_beyond_the_limit_is_refused_declared_or_not() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let limits = json!({"request_body": "64KiB"});
    let echo = tenant.service("markdown").limits(limits).deploy("markdown");
    let fits = vec![b'x'; 64 << 10];
    assert_eq!(echo.post("/", fits.clone()).send().status, 200);
    assert_eq!(
        echo.request("POST", "/")
            .chunks([fits.clone()])
            .send()
            .status,
        200
    );

    let declared = echo.post("/", vec![b'x'; (64 << 10) + 1]).send();
    assert_eq!(
        (declared.status, declared.problem().as_str()),
        (413, "bad_request")
    );
    let chunked = echo.request("POST", "/").chunks([&fits[..], b"x"]).send();
    assert_eq!(
        (chunked.status, chunked.problem().as_str()),
        (413, "bad_request")
    );

    // Declared only: it is refused before the body is sent.
    let mut connection = echo.connect();
    let head = format!(
        "POST / HTTP/1.1\r\nhost: {}\r\ncontent-length: 1000000\r\n\r\n",
        echo.host_name()
    );
    connection.raw(head.as_bytes()).expect("sent");
    assert_eq!(connection.answer("POST").expect("an answer").status, 413);
    let metrics = host.when_ended("a", 5);
    assert_eq!(
        metrics.requests("a", "bad_request"),
        3,
        "{:?}",
        metrics.outcomes("a")
    );
    assert!(host.runs());
}

#[test]
fn a_body_that_breaks_off_ends_its_request() {
    let host = TestHost::start();
    let echo = host.tenant("a").create().deploy("echo");
    let mut connection = echo.connect();
    let head = format!(
        "POST / HTTP/1.1\r\nhost: {}\r\ncontent-length: 1000\r\n\r\nhalf",
        echo.host_name()
    );
    connection.raw(head.as_bytes()).expect("sent");
    drop(connection);
    let metrics = host.when_ended("a", 1);
    assert_eq!(
        metrics.requests("a", "ok"),
        0,
        "{:?}",
        metrics.outcomes("a")
    );
    assert_eq!(metrics.sum("insula_instances", &[("tenant", "a")]), 0.0);
}

#[test]
fn a_head_request_gets_the_head_alone() {
    let host = TestHost::start();
    let hello = host.tenant("a").create().deploy("hello");
    let mut connection = hello.connect();
    for _ in 0..3 {
        let answer = connection
            .exchange(&hello.request("HEAD", "/"))
            .expect("an answer");
        assert_eq!((answer.status, answer.body.len()), (200, 0));
    }
    // The connection is still in step.
    let answer = connection.exchange(&hello.get("/")).expect("an answer");
    assert_eq!(answer.text(), "Hello from Insula\n");
    assert_eq!(host.when_ended("a", 4).requests("a", "ok"), 4);
}

#[test]
fn a_tenants_bounds_are_its_own() {
    let host = TestHost::start();
    let bounds = json!({"requests": {"in_flight": 2, "queued": 1}});
    let small = host.tenant("small").spec(bounds).create();
    let slow = small
        .service("slow")
        .limits(json!({"timeout": "60s"}))
        .deploy("echo");
    let other = host.tenant("other").create().deploy("hello");
    let waiting: Vec<_> = (0..3)
        .map(|_| {
            let mut connection = slow.connect();
            connection
                .write(&slow.get("/sleep?ms=60000"))
                .expect("sent");
            connection
        })
        .collect();
    let running = [("tenant", "small"), ("state", "running")];
    host.metrics_when("two run", |metrics| {
        let now = metrics.sum("insula_instances", &running);
        holds(now == 2.0, format!("{now}"))
    });
    // The third may have come last of all: until it is queued there is room for one more.
    let refused = until(Duration::from_secs(10), "a request is refused", || {
        let answer = slow
            .get("/")
            .patience(Duration::from_millis(500))
            .try_send();
        answer.map_err(|broken| broken.error.to_string())
    });
    assert_eq!(
        (refused.status, refused.problem().as_str()),
        (429, "tenant_overloaded")
    );
    assert!(refused.header("retry-after").is_some());
    assert_eq!(
        other.get("/").send().status,
        200,
        "it is nobody else's bound"
    );
    assert!(
        host.metrics()
            .sum("insula_shed_total", &[("tenant", "small")])
            >= 1.0
    );
    drop(waiting);
    until(Duration::from_secs(10), "there is room again", || {
        let status = slow.get("/").send().status;
        holds(status == 200, format!("{status}"))
    });
}

#[test]
fn requests_beyond_a_tenants_rate_are_refused_before_any_guest_runs() {
    let host = TestHost::start();
    let rate = json!({"requests": {"per_second": 10}});
    let slow = host.tenant("slow").spec(rate).create().deploy("hello");
    let other = host.tenant("other").create().deploy("hello");
    let load = load::times(200, 1, &slow.get("/"));
    assert_eq!(
        load.status(200) + load.status(429),
        200,
        "{:?}",
        load.statuses
    );
    // Ten saved up, and ten for each second that it took.
    let took: Duration = load.latencies.iter().sum();
    let most = 12 + 10 * (took.as_secs() + 1);
    assert!(
        (10..=most).contains(&load.status(200)),
        "{:?} in {took:?}",
        load.statuses
    );
    let metrics = host.when_ended("slow", 200);
    let shed = [("tenant", "slow"), ("reason", "rate")];
    assert_eq!(metrics.count("insula_shed_total", &shed), load.status(429));
    let starts = [("tenant", "slow")];
    let started = metrics.count("insula_instance_start_seconds_count", &starts);
    assert_eq!(started, load.status(200));
    assert_eq!(load::times(200, 1, &other.get("/")).status(200), 200);
}
