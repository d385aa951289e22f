//! HTTP/2 connections that only cost: each is closed, nobody else is served worse, and the host
//! keeps little of what was sent.

pub(crate) mod frames;

use std::net::SocketAddr;
use std::time::Duration;

use insula_tests::wait::{holds, until};
use insula_tests::{TestHost, load};
use serde_json::json;

use self::frames::*;

/// Longest that a flood may go on, on a machine that does something else as well.
const CLOSED_WITHIN: Duration = Duration::from_secs(20);
/// What one flood may leave in memory.
const MEMORY_MAX: u64 = 32 << 20;

/// Makes the next piece of a flood: of its number, for a service.
type Piece = fn(u32, &str) -> Vec<u8>;

/// A stream that a client may open, the n-th.
const fn stream(n: u32) -> u32 {
    2 * n + 1
}

fn request(n: u32, to: &str) -> Vec<u8> {
    frame(
        HEADERS,
        END_HEADERS | END_STREAM,
        stream(n),
        &head("GET", to),
    )
}

/// What floods there are; all are closed.
pub(crate) const FLOODS: [(&str, Piece); 13] = [
    // CVE-2023-44487.
    ("rapid reset", |n, to| {
        [
            request(n, to),
            frame(RST_STREAM, 0, stream(n), &8_u32.to_be_bytes()),
        ]
        .concat()
    }),
    // CVE-2025-8671: the host resets, because a window is opened by nothing.
    ("made you reset", |n, to| {
        [request(n, to), frame(WINDOW_UPDATE, 0, stream(n), &[0; 4])].concat()
    }),
    // CVE-2024-24549 and others.
    ("CONTINUATION", |n, to| match n {
        0 => frame(HEADERS, END_STREAM, 1, &head("GET", to)),
        _ => frame(
            CONTINUATION,
            0,
            1,
            &literal("x-more", &"x".repeat(100)).repeat(100),
        ),
    }),
    ("empty CONTINUATION", |n, to| match n {
        0 => frame(HEADERS, END_STREAM, 1, &head("GET", to)),
        _ => frame(CONTINUATION, 0, 1, &[]).repeat(100),
    }),
    // CVE-2019-9515.
    ("SETTINGS", |_, _| frame(SETTINGS, 0, 0, &[]).repeat(100)),
    ("SETTINGS that change windows", |n, _| {
        let size = 1_000 + n % 1_000;
        let setting = [&4_u16.to_be_bytes()[..], &size.to_be_bytes()].concat();
        frame(SETTINGS, 0, 0, &setting).repeat(100)
    }),
    // CVE-2019-9512.
    ("PING", |_, _| frame(PING, 0, 0, &[7; 8]).repeat(100)),
    // CVE-2019-9513.
    ("PRIORITY", |n, _| {
        frame(PRIORITY, 0, stream(n % 1_000), &[0, 0, 0, 0, 9]).repeat(100)
    }),
    ("WINDOW_UPDATE", |_, _| {
        frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]).repeat(100)
    }),
    // CVE-2019-9518.
    ("empty DATA", |n, to| match n {
        0 => frame(HEADERS, END_HEADERS, 1, &head("POST", to)),
        _ => frame(DATA, 0, 1, &[]).repeat(100),
    }),
    ("a kind that nobody knows", |_, _| {
        frame(UNKNOWN, 0, 0, &[7; 8]).repeat(100)
    }),
    ("GOAWAY", |_, _| frame(GOAWAY, 0, 0, &[0; 8]).repeat(100)),
    ("more streams than there may be", |n, to| {
        frame(HEADERS, END_HEADERS, stream(n), &head("POST", to))
    }),
];

/// One flood, until its connection is closed.
pub(crate) fn closed_after(host: SocketAddr, service: &str, piece: Piece) -> Option<u64> {
    let mut stream = begin(host, &[]).expect("a connection");
    forget_answers(&stream);
    let mut n = 0;
    flood(&mut stream, CLOSED_WITHIN, || {
        n += 1;
        piece(n - 1, service)
    })
}

#[test]
fn each_flood_is_closed_and_leaves_no_memory() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let hello = tenant.deploy("hello");
    let echo = tenant.deploy("echo");
    let _ = load::times(200, 4, &hello.get("/"));
    let before = host.rss_bytes();
    for (name, piece) in FLOODS {
        let sent = closed_after(host.ingress(), &echo.host_name(), piece);
        let sent = sent.unwrap_or_else(|| panic!("{name}: not closed within {CLOSED_WITHIN:?}"));
        let grown = host.rss_bytes().saturating_sub(before);
        eprintln!(
            "{name}: closed after {sent} bytes; {} KiB more in memory",
            grown >> 10
        );
        assert!(grown < MEMORY_MAX, "{name}: {grown} bytes");
        assert_eq!(hello.get("/").send().status, 200, "after {name}");
    }
    host.metrics_when("all instances are gone", |metrics| {
        let now = metrics.sum("insula_instances", &[("state", "running")]);
        holds(now == 0.0, format!("{now}"))
    });
    assert!(!host.said().contains("panicked"), "{}", host.said());
}

#[test]
fn a_header_list_that_grows_when_it_is_unpacked_is_refused() {
    let host = TestHost::start();
    let hello = host.tenant("a").create().deploy("hello");
    assert_eq!(hello.get("/").send().status, 200);
    let before = host.rss_bytes();
    let mut stream = begin(host.ingress(), &[]).expect("a connection");
    forget_answers(&stream);
    // Into the dynamic table, 4 KB of it; then 16,000 times the same, a byte each.
    let mut bomb = head("GET", &hello.host_name());
    bomb.extend([0x40, 6]);
    bomb.extend(b"x-bomb");
    // 3,900 as 127 in seven bits, and 3,773 in the two bytes that follow (RFC 7541, 5.1).
    bomb.extend([0x7f, 0x80 | 61, 29]);
    bomb.extend(vec![b'x'; 3_900]);
    bomb.extend(vec![0x80 | 62; 12_000]);
    let mut n = 0;
    let _ = flood(&mut stream, Duration::from_secs(3), || {
        n += 1;
        frame(HEADERS, END_HEADERS | END_STREAM, 2 * n - 1, &bomb)
    });
    let grown = host.rss_bytes().saturating_sub(before);
    eprintln!(
        "{n} lists of 46 MB each, unpacked: {} KiB more in memory",
        grown >> 10
    );
    assert!(grown < MEMORY_MAX, "{grown}");
    // No guest saw one of them.
    assert_eq!(hello.get("/").send().status, 200);
    let metrics = host.metrics_when("the good ones are counted", |metrics| {
        let good = metrics.requests("a", "ok");
        holds(good == 2, format!("{good}"))
    });
    assert_eq!(metrics.requests("a", "ok"), 2);
}

#[test]
fn who_opens_no_window_holds_a_connection_no_longer_than_the_requests() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let hello = tenant.deploy("hello");
    let limits = json!({"timeout": "1s"});
    let sse = tenant.service("sse").limits(limits).deploy("sse");
    let before = host.rss_bytes();
    // `SETTINGS_INITIAL_WINDOW_SIZE`: nothing may be sent.
    let mut stream = begin(host.ingress(), &[(4, 0)]).expect("a connection");
    forget_answers(&stream);
    let names = [
        hello.host_name(),
        sse.host_name(),
        "nobody.localhost".to_owned(),
    ];
    let requests = (0..99).flat_map(|n| request(n, &names[n as usize % names.len()]));
    let requests: Vec<u8> = requests.collect();
    std::io::Write::write_all(&mut stream, &requests).expect("sent");
    // Guests end by their own limits; what nobody takes of their answers, after a while.
    let metrics = until(Duration::from_secs(60), "all are ended", || {
        let metrics = host.metrics();
        let ended: u64 = metrics.outcomes("a").values().sum();
        let grown = host.rss_bytes().saturating_sub(before);
        assert!(grown < MEMORY_MAX, "{grown}");
        holds(ended == 66, format!("{ended} ended")).map(|()| metrics)
    });
    // By what the guests did, as ever: some were done at once, and some waited to be heard.
    let outcomes = metrics.outcomes("a");
    assert_eq!(metrics.requests("a", "timeout"), 33, "{outcomes:?}");
    // The connection is as good as any other, and may have as many streams again.
    let again: Vec<u8> = (99..198).flat_map(|n| request(n, &names[0])).collect();
    std::io::Write::write_all(&mut stream, &again).expect("sent");
    host.metrics_when("they ran, too", |metrics| {
        let now = metrics.sum("insula_instances", &[("state", "running")]);
        let started = metrics.count("insula_instance_start_seconds_count", &[("tenant", "a")]);
        holds(
            now == 0.0 && started == 165,
            format!("{now} run, {started} started"),
        )
    });
}
