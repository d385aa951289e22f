//! When there is not enough: who waits, who is refused, what they are told, and that nobody else
//! feels it.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use insula_tests::http::{Connection, Request};
use insula_tests::wait::holds;
use insula_tests::{Service, TestHost, load};
use serde_json::json;

/// Begins requests that their guests will not answer for a while.
fn asleep(host: &TestHost, service: &Service, count: u32, ms: u32) -> Vec<Connection> {
    let request = service.get(&format!("/sleep?ms={ms}"));
    let begun = (0..count).map(|_| begin(service, &request)).collect();
    let labels = [("tenant", service.tenant()), ("state", "running")];
    host.metrics_when("they run", |metrics| {
        let running = metrics.sum("insula_instances", &labels);
        holds(running >= 1.0, format!("{running}"))
    });
    begun
}

fn begin(service: &Service, request: &Request) -> Connection {
    let mut connection = service.connect();
    connection.write(request).expect("sent");
    connection
}

#[test]
fn who_waits_past_its_deadline_is_told_that_there_was_no_place() {
    let host = TestHost::start();
    let one = json!({"requests": {"in_flight": 1, "queued": 10}});
    let tenant = host.tenant("narrow").spec(one).create();
    let slow = tenant.service("slow").deploy("echo");
    let quick = tenant
        .service("quick")
        .limits(json!({"timeout": "300ms"}))
        .deploy("echo");
    let held = asleep(&host, &slow, 1, 3_000);
    let began = Instant::now();
    let answer = quick.get("/").send();
    let waited = began.elapsed();
    // Not 504: its guest never had the time to be slow.
    assert_eq!(
        (answer.status, answer.problem().as_str()),
        (429, "tenant_overloaded")
    );
    assert!(waited >= Duration::from_millis(250), "{waited:?}");
    // Of the next one it is known beforehand: no place has come free for longer than it has.
    let began = Instant::now();
    let answer = quick.get("/").send();
    assert_eq!(answer.status, 429);
    assert!(began.elapsed() < Duration::from_millis(250));
    let retry: u64 = answer
        .header("retry-after")
        .and_then(|text| text.parse().ok())
        .expect("seconds");
    assert!((1..=60).contains(&retry), "{retry}");
    let late = [("tenant", "narrow"), ("reason", "deadline")];
    let metrics = host.metrics_when("both are counted", |metrics| {
        let shed = metrics.count("insula_shed_total", &late);
        holds(shed == 2, format!("{shed}"))
    });
    let starts = [("tenant", "narrow"), ("service", "quick")];
    let started = metrics.sum("insula_instance_start_seconds_count", &starts);
    assert!(started < 0.5, "no guest ran: {started}");
    drop(held);
}

#[test]
fn a_queue_that_stands_is_refused_at_once_and_heals() {
    let host = TestHost::start();
    let two = json!({"requests": {"in_flight": 2, "queued": 1_000}});
    let busy = host.tenant("busy").spec(two).create().deploy("echo");
    let other = host.tenant("other").create().deploy("hello");
    // Two places of 10 ms each; 40 clients that never pause are 20 times too many.
    let flood = load::during(Duration::from_secs(2), 40, &busy.get("/sleep?ms=10"));
    let served = flood.status(200);
    // Whoever was let in was served: half of the places would be 200.
    assert!(served >= 200, "{:?}", flood.statuses);
    assert!(flood.status(429) > served, "{:?}", flood.statuses);
    assert_eq!(served + flood.status(429), flood.total());
    let behind = [("tenant", "busy"), ("reason", "overload")];
    let metrics = host.metrics();
    assert!(metrics.count("insula_shed_total", &behind) > 100);
    assert_eq!(load::times(50, 1, &other.get("/")).status(200), 50);
    // It has forgotten the flood a moment later: a burst may queue.
    std::thread::sleep(Duration::from_millis(500));
    let burst = load::times(4, 4, &busy.get("/sleep?ms=1"));
    assert_eq!(burst.status(200), 4, "{:?}", burst.statuses);
}

#[test]
fn connections_of_who_is_refused_lose_nothing() {
    let host = TestHost::start();
    let two = json!({"requests": {"in_flight": 2, "queued": 4}});
    let busy = host.tenant("busy").spec(two).create().deploy("echo");
    // More than the kernel holds of a connection.
    let body: Vec<u8> = (0..=255).flat_map(|byte| [byte; 8 << 10]).collect();
    let post = busy.post("/", body.clone());
    let (served, refused) = (AtomicU32::new(0), AtomicU32::new(0));
    let until = Instant::now() + Duration::from_secs(60);
    let more = || served.load(Relaxed) < 20 && Instant::now() < until;
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| load::as_long_as(more, 12, &busy.get("/sleep?ms=5")));
        let mut connection = busy.connect();
        while more() {
            match connection.exchange(&post) {
                Ok(answer) if answer.status == 200 => {
                    assert!(answer.body == body);
                    served.fetch_add(1, Relaxed);
                }
                Ok(answer) => assert_eq!(answer.status, 429),
                // Who is refused before its body is read is closed with it unread.
                Err(_) => connection = busy.connect(),
            }
        }
        let flood = flood.join().expect("the flood");
        assert_eq!(flood.status(200) + flood.status(429), flood.total());
        refused.store(flood.status(429).try_into().expect("few"), Relaxed);
    });
    assert_eq!(served.load(Relaxed), 20);
    assert!(refused.load(Relaxed) > 100);
}

#[test]
fn the_hosts_last_instances_are_for_those_who_have_few() {
    let host = TestHost::plan().arg("--instances", 16).start();
    let many = host.tenant("many").create().deploy("echo");
    let few = host.tenant("few").create().deploy("hello");
    let held = asleep(&host, &many, 40, 4_000);
    let running = [("tenant", "many"), ("state", "running")];
    host.metrics_when("all run that may", |metrics| {
        let now = metrics.sum("insula_instances", &running);
        holds(now >= 14.0, format!("{now}"))
    });
    let answers = load::times(100, 2, &few.get("/"));
    let metrics = host.metrics();
    assert_eq!(
        answers.status(200),
        100,
        "{:?} {:?}",
        answers.statuses,
        few.log()
    );
    let now = metrics.sum("insula_instances", &running);
    assert!((now - 14.0).abs() < 0.5, "seven eighths of 16, not {now}");
    drop(held);
}

#[test]
fn the_hosts_last_memory_is_for_those_who_have_little() {
    let host = TestHost::plan().arg("--guest-memory", "32MiB").start();
    let much = host.tenant("much").create().deploy("echo");
    let little = host.tenant("little").create().deploy("hello");
    // More than a mebibyte each.
    let held = asleep(&host, &much, 60, 4_000);
    let family = "insula_host_guest_memory_bytes";
    host.metrics_when("the host is pressed", |metrics| {
        let now = metrics.sum(family, &[]);
        holds(now > 26e6, format!("{now}"))
    });
    let answer = much.get("/").send();
    assert_eq!(
        (answer.status, answer.problem().as_str()),
        (503, "host_overloaded")
    );
    assert_eq!(answer.header("retry-after"), Some("1"));
    let answers = load::times(100, 1, &little.get("/"));
    assert_eq!(answers.status(200), 100, "{:?}", answers.statuses);
    let metrics = host.metrics();
    assert!(metrics.sum(family, &[]) <= 32.0 * 1_048_576.0);
    let budget = metrics.sum("insula_host_guest_memory_budget_bytes", &[]);
    assert!((budget - 32.0 * 1_048_576.0).abs() < 0.5, "{budget}");
    let refused = [("tenant", "much"), ("reason", "host")];
    assert!(metrics.count("insula_memory_refused_total", &refused) >= 1);
    drop(held);
}
