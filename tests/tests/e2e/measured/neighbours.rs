//! A tenant that behaves badly is nobody else's concern.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use insula_tests::wait::holds;
use insula_tests::{TestHost, load};
use serde_json::json;

use crate::kills::writer::Ending;

#[test]
fn a_service_keeps_answering_beside_eight_endless_loops_on_two_workers() {
    let host = TestHost::measured().start();
    let victim = host.tenant("victim").create().deploy("hello");
    let span = Duration::from_secs(6);
    let alone = load::during(Duration::from_secs(2), 1, &victim.get("/"));
    let loops: Vec<_> = (0..8)
        .map(|n| {
            let tenant = host.tenant(&format!("loop-{n}")).create();
            // Half of them end by their fuel, half by their time.
            let limits = match n % 2 {
                0 => json!({"fuel": "120G", "timeout": "60s"}),
                _ => json!({"fuel": "1T", "timeout": "10s"}),
            };
            tenant.service("spin").limits(limits).deploy("spin")
        })
        .collect();
    std::thread::scope(|scope| {
        let running: Vec<_> = loops
            .iter()
            .map(|spin| {
                let request = spin.get("/").patience(Duration::from_secs(120));
                scope.spawn(move || {
                    let began = Instant::now();
                    (request.send(), began.elapsed())
                })
            })
            .collect();
        host.metrics_when("all loops run", |metrics| {
            let now = metrics.sum("insula_instances", &[("state", "running")]);
            holds(now == 8.0, format!("{now}"))
        });
        let load = load::during(span, 1, &victim.get("/"));
        assert_eq!(
            load.status(200),
            load.total(),
            "{:?} {:?}",
            load.statuses,
            load.problems
        );
        let running_still = host
            .metrics()
            .sum("insula_instances", &[("state", "running")]);
        assert_eq!(running_still, 8.0, "all of them ran all the time");
        let (p50, p99) = (load.quantile(0.5), load.quantile(0.99));
        eprintln!(
            "hello alone: p50 {:?}, p99 {:?}; beside 8 loops: {} answers, p50 {p50:?}, p99 {p99:?}, worst {:?}",
            alone.quantile(0.5),
            alone.quantile(0.99),
            load.total(),
            load.quantile(1.0),
        );
        assert!(p99 <= Duration::from_millis(20), "p99 {p99:?}");
        assert!(load.total() > 100, "{}", load.total());
        for (n, ended) in running.into_iter().enumerate() {
            let (answer, took) = ended.join().expect("a client");
            let expected = if n % 2 == 0 { "out_of_fuel" } else { "timeout" };
            assert_eq!(
                (answer.status, answer.problem().as_str()),
                (504, expected),
                "{n}"
            );
            if expected == "timeout" {
                let late = took.saturating_sub(Duration::from_secs(10));
                assert!(
                    took >= Duration::from_millis(9_900),
                    "{n} was given {took:?}"
                );
                assert!(late < Duration::from_millis(500), "{n} was given {took:?}");
            }
        }
    });
    for n in 0..8 {
        let tenant = format!("loop-{n}");
        let metrics = host.when_ended(&tenant, 1);
        let limit = if n % 2 == 0 {
            120_000_000_000
        } else {
            1_000_000_000_000
        };
        assert!(
            metrics.fuel(&tenant) <= limit,
            "{tenant}: {}",
            metrics.fuel(&tenant)
        );
        assert!(
            metrics.cpu_seconds(&tenant) > 1.0,
            "{tenant}: {}",
            metrics.cpu_seconds(&tenant)
        );
    }
    assert_eq!(victim.get("/").send().status, 200);
}

#[test]
fn the_admin_api_never_waits_behind_a_guest() {
    let host = TestHost::measured().start();
    let tenant = host.tenant("a").create();
    let limits = json!({"fuel": "1T", "timeout": "5m"});
    let spin = tenant.service("spin").limits(limits).deploy("spin");
    let _loops: Vec<_> = (0..16)
        .map(|_| {
            let mut connection = spin.connect();
            connection.write(&spin.get("/")).expect("sent");
            connection
        })
        .collect();
    host.metrics_when("the loops run", |metrics| {
        let now = metrics.sum("insula_instances", &[("state", "running")]);
        holds(now == 16.0, format!("{now}"))
    });
    let request = host.admin().request("GET", "/v1/tenants");
    let load = load::during(Duration::from_secs(4), 1, &request);
    assert_eq!(load.status(200), load.total(), "{:?}", load.statuses);
    let p99 = load.quantile(0.99);
    eprintln!(
        "admin API beside 16 loops: p50 {:?}, p99 {p99:?}",
        load.quantile(0.5)
    );
    assert!(p99 < Duration::from_millis(100), "{p99:?}");
    // And deploys go on.
    let hello = host.tenant("b").create().deploy("hello");
    assert_eq!(hello.get("/").send().status, 200);
}

/// Sends requests faster than they can be refused until it is told to stop, and counts the answers.
fn flood(
    to: &insula_tests::http::Request,
    address: std::net::SocketAddr,
    stop: &AtomicBool,
    refused: &AtomicU64,
) {
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("a patience");
    let batch = to.head_bytes().repeat(64);
    let mut answers = vec![0; 1 << 16];
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(&batch).expect("sent");
        // A head ends with an empty line, and no body has one.
        let (mut seen, mut ends) = (0, 0);
        while seen < 64 {
            let read = stream.read(&mut answers).expect("answers");
            assert!(read > 0, "closed");
            for byte in &answers[..read] {
                ends = match byte {
                    b'\n' => ends + 1,
                    b'\r' => ends,
                    _ => 0,
                };
                seen += u64::from(ends == 2);
            }
        }
        refused.fetch_add(seen, Ordering::Relaxed);
    }
}

#[test]
fn a_flood_of_refused_requests_takes_its_tenants_share_and_no_more() {
    let host = TestHost::measured().start();
    let bounds = json!({"requests": {"per_second": 1}});
    let flooder = host.tenant("flooder").spec(bounds).create().deploy("hello");
    let busy = host.tenant("busy").create();
    let limits = json!({"fuel": "1T", "timeout": "60s"});
    let spin = busy.service("spin").limits(limits).deploy("spin");
    let hello = host.tenant("victim").create().deploy("hello");
    let loops: Vec<_> = (0..4)
        .map(|_| {
            let mut connection = spin.connect();
            connection.write(&spin.get("/")).expect("sent");
            connection
        })
        .collect();
    let (stop, refused) = (AtomicBool::new(false), AtomicU64::new(0));
    let request = flooder.get("/");
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| flood(&request, host.ingress(), &stop, &refused));
        }
        std::thread::sleep(Duration::from_secs(1));
        let (before, first) = (host.metrics(), refused.load(Ordering::Relaxed));
        let load = load::during(Duration::from_secs(4), 1, &hello.get("/"));
        let (after, last) = (host.metrics(), refused.load(Ordering::Relaxed));
        stop.store(true, Ordering::Relaxed);
        let cpu = |tenant: &str| after.cpu_seconds(tenant) - before.cpu_seconds(tenant);
        let part = cpu("busy") / (cpu("busy") + cpu("flooder"));
        eprintln!(
            "{} refusals beside loops: the loops get {:.1} % of {:.2} s; hello p50 {:?}, p99 {:?}",
            last - first,
            part * 100.0,
            cpu("busy") + cpu("flooder"),
            load.quantile(0.5),
            load.quantile(0.99),
        );
        assert_eq!(load.status(200), load.total(), "{:?}", load.statuses);
        assert!(last - first > 1_000, "{}", last - first);
        assert!(part >= 0.45, "{} s and {} s", cpu("busy"), cpu("flooder"));
    });
    drop(loops);
}

/// How far above another a p99 may be, or so short that nobody minds.
const RATIO_MAX: f64 = 2.0;
const SHORT: Duration = Duration::from_millis(5);

/// Checks how far one p99 is above the other.
fn within(name: &str, beside: Duration, alone: Duration) {
    let ratio = beside.as_secs_f64() / alone.as_secs_f64();
    eprintln!("{name}: p99 {beside:?}, and {alone:?} without: {ratio:.2}");
    assert!(
        ratio <= RATIO_MAX || beside <= SHORT,
        "{name}: {beside:?} and {alone:?}"
    );
}

#[test]
fn a_compilation_without_end_leaves_others_their_latency() {
    let host = TestHost::measured().start();
    let hello = host.tenant("victim").create().deploy("hello");
    let service = host.tenant("left").create().service("bad").create();
    let measure = || load::during(Duration::from_secs(2), 1, &hello.get("/"));
    let _ = measure();
    let alone = measure().quantile(0.99);
    let (name, bytes) = crate::bombs::endless_bombs().remove(0);
    let path = format!("{}/versions", service.path());
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let compiling = scope.spawn(|| {
            let mut uploads = 0;
            while !ended.load(Ordering::Relaxed) {
                let upload = host.admin().upload(&path, bytes.clone());
                let answer = upload.patience(Duration::from_secs(120)).send();
                assert_eq!(answer.status, 422);
                uploads += 1;
            }
            uploads
        });
        // Until the compiler is at it.
        std::thread::sleep(Duration::from_millis(500));
        let beside = {
            let _ending = Ending(&ended);
            measure()
        };
        let uploads = compiling.join().expect("uploads");
        assert!(uploads < 10, "{uploads} times: not what takes without end");
        assert_eq!(beside.status(200), beside.total(), "{:?}", beside.statuses);
        within(name, beside.quantile(0.99), alone);
    });
}

/// Somebody who reads what comes and closes after a while, as a host does with a flood, and as long as
/// this is there.
fn sink() -> std::net::SocketAddr {
    const READ_MAX: usize = 256 << 10;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (mut stream, mut waste, mut read) = (stream, [0; 16 << 10], 0);
            while read < READ_MAX
                && let Ok(count @ 1..) = stream.read(&mut waste)
            {
                read += count;
            }
        }
    });
    address
}

#[test]
fn floods_of_http2_leave_others_their_latency() {
    use crate::floods::{FLOODS, closed_after};

    let host = TestHost::measured().start();
    let hello = host.tenant("victim").create().deploy("hello");
    let echo = host.tenant("other").create().deploy("echo");
    let measure = || load::during(Duration::from_secs(2), 1, &hello.get("/"));
    let _ = measure();
    // Whoever floods needs a core for it, here of the same machine.
    let beside = |to: std::net::SocketAddr, piece| {
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let flooder = scope.spawn(|| {
                let mut floods = 0;
                while !ended.load(Ordering::Relaxed) {
                    closed_after(to, &echo.host_name(), piece).expect("closed");
                    floods += 1;
                    std::thread::sleep(Duration::from_millis(5));
                }
                floods
            });
            let load = {
                let _ending = Ending(&ended);
                measure()
            };
            assert_eq!(load.status(200), load.total(), "{:?}", load.statuses);
            (load.quantile(0.99), flooder.join().expect("a flooder"))
        })
    };
    let sink = sink();
    for (name, piece) in FLOODS {
        let (elsewhere, _) = beside(sink, piece);
        let (here, floods): (_, u32) = beside(host.ingress(), piece);
        within(&format!("{name}, {floods} times"), here, elsewhere);
    }
}
