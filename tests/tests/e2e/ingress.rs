//! Requests that are framed in more than one way, or too large, or too slow.

use std::io;
use std::time::{Duration, Instant};

use insula_tests::wait::holds;
use insula_tests::{Connection, Service, TestHost};

/// What a test sends, and the statuses that may come back.
struct Case {
    name: &'static str,
    bytes: Vec<u8>,
    status: &'static [u16],
}

fn case(name: &'static str, status: &'static [u16], bytes: impl Into<Vec<u8>>) -> Case {
    let bytes = bytes.into();
    Case {
        name,
        bytes,
        status,
    }
}

const HOST: &str = "Host: echo.a.localhost\r\n";
/// What must never be taken for a request.
const SMUGGLED: &str = "GET /log?message=smuggled HTTP/1.1\r\nHost: echo.a.localhost\r\n\r\n";

fn echo(host: &TestHost) -> Service {
    host.tenant("a").create().deploy("echo")
}

/// Sends bytes and expects one refusal and then the end of the connection.
fn refused(host: &TestHost, case: &Case) {
    let mut connection = Connection::open(host.ingress()).expect("a connection");
    connection.patience(Duration::from_secs(5));
    // The host may have heard enough before all is sent.
    let _ = connection.raw(&case.bytes);
    match connection.answer("GET") {
        Ok(answer) => {
            let name = case.name;
            assert!(case.status.contains(&answer.status), "{name}: {answer:?}");
            assert_eq!(answer.problem(), "bad_request", "{name}");
            let rest = connection.rest();
            let text = String::from_utf8_lossy(&rest);
            assert!(rest.is_empty(), "{name}: {answer:?} and then {text}");
        }
        Err(broken) => panic!("{}: no answer: {broken:?}", case.name),
    }
}

fn post(fields: &str, body: &str) -> String {
    format!("POST / HTTP/1.1\r\n{HOST}{fields}\r\n{body}")
}

fn get(fields: &str) -> String {
    format!("GET / HTTP/1.1\r\n{fields}\r\n")
}

#[test]
fn what_two_parsers_could_read_differently_is_refused() {
    let host = TestHost::start();
    let echo = echo(&host);
    const BAD: &[u16] = &[400];
    let with_host = |fields: &str| get(&format!("{HOST}{fields}"));
    let cases = [
        case("no Host", BAD, get("")),
        case("an empty Host", BAD, get("Host:\r\n")),
        case("two Hosts, the same", BAD, with_host(HOST)),
        case("two Hosts", BAD, with_host("Host: other.a.localhost\r\n")),
        case("a Host that is none", BAD, get("Host: a b\r\n")),
        case(
            "a Host with a user",
            BAD,
            get("Host: me@echo.a.localhost\r\n"),
        ),
        case(
            "a Host with a path",
            BAD,
            get("Host: echo.a.localhost/x\r\n"),
        ),
        case(
            "length and coding",
            BAD,
            post(
                "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
                "0\r\n\r\n",
            ),
        ),
        case(
            "coding and length",
            BAD,
            post(
                "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
                "0\r\n\r\n",
            ),
        ),
        case(
            "two codings",
            BAD,
            post(
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
                "0\r\n\r\n",
            ),
        ),
        case(
            "another coding",
            BAD,
            post("Transfer-Encoding: gzip, chunked\r\n", "0\r\n\r\n"),
        ),
        case(
            "a coding that is none",
            BAD,
            post("Transfer-Encoding: xchunked\r\n", "0\r\n\r\n"),
        ),
        case(
            "a hidden coding",
            BAD,
            post("Transfer-Encoding:\x0bchunked\r\n", "0\r\n\r\n"),
        ),
        case(
            "two lengths",
            BAD,
            post("Content-Length: 5\r\nContent-Length: 6\r\n", "12345"),
        ),
        case(
            "two lengths, the same",
            BAD,
            post("Content-Length: 5\r\nContent-Length: 5\r\n", ""),
        ),
        case(
            "a list of lengths",
            BAD,
            post("Content-Length: 5, 5\r\n", "12345"),
        ),
        case(
            "a length with a sign",
            BAD,
            post("Content-Length: +5\r\n", "12345"),
        ),
        case(
            "a negative length",
            BAD,
            post("Content-Length: -5\r\n", "12345"),
        ),
        case(
            "a hexadecimal length",
            BAD,
            post("Content-Length: 0x5\r\n", "12345"),
        ),
        case("an empty length", BAD, post("Content-Length:\r\n", "12345")),
        case(
            "a length of 2^64",
            &[400, 413],
            post("Content-Length: 18446744073709551616\r\n", ""),
        ),
        case("a bare LF", BAD, format!("GET / HTTP/1.1\n{HOST}\r\n")),
        case(
            "bare LFs",
            BAD,
            "GET / HTTP/1.1\nHost: echo.a.localhost\n\n",
        ),
        case("a bare CR", BAD, with_host("X: a\rb\r\n")),
        case("a folded line", BAD, with_host("X: a\r\n b\r\n")),
        case(
            "a folded first line",
            BAD,
            format!("GET / HTTP/1.1\r\n X: a\r\n{HOST}\r\n"),
        ),
        case("white space before the colon", BAD, with_host("X : a\r\n")),
        case("a name that is none", BAD, with_host("X(y): a\r\n")),
        case("a name that is empty", BAD, with_host(": a\r\n")),
        case("no colon", BAD, with_host("nonsense\r\n")),
        case("a NUL in a value", BAD, with_host("X: a\0b\r\n")),
        case(
            "two targets",
            BAD,
            "GET / / HTTP/1.1\r\nHost: echo.a.localhost\r\n\r\n",
        ),
        case("no version", BAD, "GET /\r\nHost: echo.a.localhost\r\n\r\n"),
        case(
            "another version",
            &[400, 505],
            format!("GET / HTTP/3.0\r\n{HOST}\r\n"),
        ),
        case(
            "a coding in HTTP/1.0",
            BAD,
            format!("POST / HTTP/1.0\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        ),
        case(
            "another authority in the target",
            BAD,
            format!("GET http://other.a.localhost/ HTTP/1.1\r\n{HOST}\r\n"),
        ),
        case(
            "CONNECT",
            &[400, 405],
            format!("CONNECT echo.a.localhost:80 HTTP/1.1\r\n{HOST}\r\n"),
        ),
        case(
            "TLS",
            BAD,
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n".to_vec(),
        ),
        case("noise", BAD, b"\x00\xff\x00\xff\r\n\r\n".to_vec()),
    ];
    for case in &cases {
        refused(&host, case);
        // And what follows on the same connection is never a request of its own.
        let followed = [&case.bytes, SMUGGLED.as_bytes()].concat();
        refused(
            &host,
            &Case {
                bytes: followed,
                ..*case
            },
        );
    }
    assert_eq!(echo.get("/").send().status, 200);
    host.metrics_when("one request was served", |metrics| {
        let outcomes = metrics.outcomes("a");
        holds(outcomes.get("ok") == Some(&1), format!("{outcomes:?}"))
    });
    let said: Vec<_> = echo.log();
    assert!(
        said.iter().all(|line| line["message"] != "smuggled"),
        "{said:?}"
    );
}

#[test]
fn what_is_too_large_is_refused_and_what_just_fits_is_served() {
    let host = TestHost::start();
    let echo = echo(&host);
    let fields = |count: usize, bytes: usize| -> String {
        (0..count)
            .map(|n| format!("X-{n}: {}\r\n", "x".repeat(bytes)))
            .collect()
    };
    for fits in [
        get(&format!("{HOST}{}", fields(50, 10))),
        get(&format!("{HOST}{}", fields(4, 4_000))),
        format!("GET /{} HTTP/1.1\r\n{HOST}\r\n", "x".repeat(8_000)),
    ] {
        let mut connection = echo.connect();
        connection.raw(fits.as_bytes()).expect("sent");
        let status = connection.answer("GET").expect("an answer").status;
        assert_eq!(status, 200, "{}", &fits[..60]);
    }
    for case in [
        case(
            "many fields",
            &[431],
            get(&format!("{HOST}{}", fields(100, 1))),
        ),
        case(
            "a large field",
            &[431],
            get(&format!("{HOST}{}", fields(1, 100_000))),
        ),
        case(
            "large fields",
            &[431],
            get(&format!("{HOST}{}", fields(60, 1_000))),
        ),
        case(
            "a field without end",
            &[431],
            [HOST.as_bytes(), &[b'x'; 200_000]].concat(),
        )
        .in_get(),
        case(
            "a long target",
            &[414, 431],
            format!("GET /{} HTTP/1.1\r\n{HOST}\r\n", "x".repeat(60_000)),
        ),
        case("a long method", &[400, 414], vec![b'X'; 60_000]),
    ] {
        refused(&host, &case);
    }
    assert_eq!(echo.get("/").send().status, 200);
}

impl Case {
    fn in_get(mut self) -> Self {
        self.bytes
            .splice(0..0, b"GET / HTTP/1.1\r\n".iter().copied());
        self
    }
}

#[test]
fn a_body_that_is_framed_badly_ends_its_request_and_its_connection() {
    let host = TestHost::start();
    let echo = echo(&host);
    for (name, body) in [
        ("no size", "x\r\n\r\n".to_owned()),
        ("a size with a sign", "+5\r\n12345\r\n0\r\n\r\n".to_owned()),
        (
            "a size beyond 64 bits",
            "11111111111111111\r\n12345\r\n".to_owned(),
        ),
        ("a negative size", "-1\r\n\r\n".to_owned()),
        ("a bare LF", "5\n12345\r\n0\r\n\r\n".to_owned()),
        ("more than its size", "5\r\n1234567\r\n0\r\n\r\n".to_owned()),
        (
            "extensions without end",
            format!("5;{}\r\n12345\r\n0\r\n\r\n", "x".repeat(100_000)),
        ),
        (
            "a forbidden trailer",
            "0\r\nContent-Length: 5\r\n\r\n".to_owned(),
        ),
        (
            "large trailers",
            format!("0\r\nX: {}\r\n\r\n", "x".repeat(100_000)),
        ),
    ] {
        let mut connection = echo.connect();
        connection.patience(Duration::from_secs(5));
        let bytes = post("Transfer-Encoding: chunked\r\n", &body) + SMUGGLED;
        let _ = connection.raw(bytes.as_bytes());
        // The echo may have begun its answer by then; what counts is that nothing follows.
        let all = connection.rest();
        let text = String::from_utf8_lossy(&all);
        let answers = text.matches("HTTP/1.1 ").count();
        assert!(answers <= 1, "{name}: {text}");
        let whole = text.starts_with("HTTP/1.1 200") && text.ends_with("0\r\n\r\n");
        assert!(!whole, "{name} was taken for a whole body: {text}");
    }
    assert_eq!(echo.get("/").send().status, 200);
    let said = echo.log();
    assert!(
        said.iter().all(|line| line["message"] != "smuggled"),
        "{said:?}"
    );
    host.metrics_when("no instance is left", |metrics| {
        let left = metrics.sum("insula_instances", &[("tenant", "a")]);
        holds(left == 0.0, format!("{left}"))
    });
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let host = TestHost::start();
    let echo = echo(&host);
    let mut connection = echo.connect();
    let mut bytes = Vec::new();
    for n in 0..20 {
        let body = format!("body {n}");
        let slow = if n % 5 == 0 { "/burn?n=3000000" } else { "/" };
        let head = format!(
            "POST {slow} HTTP/1.1\r\n{HOST}Content-Length: {}\r\n\r\n",
            body.len()
        );
        bytes.extend([head.as_bytes(), body.as_bytes()].concat());
    }
    connection.raw(&bytes).expect("sent");
    for n in 0..20 {
        let answer = connection.answer("POST").expect("an answer");
        assert_eq!(answer.status, 200);
        if n % 5 != 0 {
            assert_eq!(answer.text(), format!("body {n}"));
        }
    }
    // Good ones before a bad one are answered too.
    let bytes = [get(HOST), get(HOST), get("")].concat();
    connection.raw(bytes.as_bytes()).expect("sent");
    for status in [200, 200, 400] {
        assert_eq!(connection.answer("GET").expect("an answer").status, status);
    }
    assert!(connection.is_closed());
}

#[test]
fn the_absolute_form_and_http_1_0_are_understood() {
    let host = TestHost::start();
    let echo = echo(&host);
    let mut connection = echo.connect();
    let bytes = format!("GET http://echo.a.localhost/info HTTP/1.1\r\n{HOST}\r\n");
    connection.raw(bytes.as_bytes()).expect("sent");
    let answer = connection.answer("GET").expect("an answer");
    assert_eq!(answer.json()["path"], "/info");
    let mut connection = echo.connect();
    connection
        .raw(format!("GET /info HTTP/1.0\r\n{HOST}\r\n").as_bytes())
        .expect("sent");
    let all = connection.rest();
    let text = String::from_utf8_lossy(&all);
    assert!(
        text.starts_with("HTTP/1.0 200") || text.starts_with("HTTP/1.1 200"),
        "{text}"
    );
    assert!(!text.to_lowercase().contains("transfer-encoding"), "{text}");
}

#[test]
fn a_head_that_takes_too_long_is_given_up() {
    let host = TestHost::start();
    let echo = echo(&host);
    let began = Instant::now();
    // A byte now and then keeps no connection alive that has not said what it wants.
    let mut slow: Vec<_> = (0..50).map(|_| echo.connect()).collect();
    let head = get(&format!("{HOST}X: {}\r\n", "x".repeat(1_000)));
    let mut sent = 0;
    let ended = loop {
        let next = &head.as_bytes()[sent..=sent];
        sent += 1;
        if slow
            .iter_mut()
            .any(|connection| connection.raw(next).is_err() || connection.is_closed_already())
        {
            break began.elapsed();
        }
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "50 slow heads are still waited for"
        );
        // Others are served meanwhile.
        assert_eq!(echo.get("/").send().status, 200);
        std::thread::sleep(Duration::from_millis(250));
    };
    assert!(
        ended > Duration::from_secs(5),
        "after {ended:?}: an honest client may be slow"
    );
    for mut connection in slow {
        connection.patience(Duration::from_secs(10));
        match connection.answer("GET") {
            Ok(answer) => assert_eq!(answer.status, 408),
            Err(broken) => assert_ne!(broken.error.kind(), io::ErrorKind::WouldBlock, "still open"),
        }
    }
    assert_eq!(echo.get("/").send().status, 200);
    assert!(host.runs());
}
