//! What guests write, and what they cannot.

use std::time::Duration;

use insula_tests::wait::holds;
use insula_tests::{Service, TestHost, until};
use serde_json::{Value, json};

/// Waits until a service's log is as it should be.
fn log_when(service: &Service, good: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    until(Duration::from_secs(10), "the log is complete", || {
        let log = service.log();
        holds(good(&log), format!("{log:#?}")).map(|()| log)
    })
}

#[test]
fn lines_arrive_with_their_requests() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let echo = tenant.deploy("echo");
    let other = tenant.service("other").deploy("echo");
    let first = echo.get("/log?message=one").send();
    let second = echo.get("/log?message=two").send();
    let failed = echo.get("/fail").send();
    assert_eq!(failed.status, 500);
    let trapped = echo.get("/panic").send();
    assert_eq!(trapped.status, 502);
    let log = log_when(&echo, |log| {
        let has = |source: &str| log.iter().any(|line| line["source"] == *source);
        log.len() >= 6 && has("host") && has("stdout") && has("stderr")
    });
    let of = |answer: &insula_tests::Answer| -> Vec<&Value> {
        let id = json!(answer.header("x-request-id").expect("x-request-id"));
        log.iter().filter(|line| line["request_id"] == id).collect()
    };
    for (answer, message) in [(&first, "one"), (&second, "two")] {
        let lines = of(answer);
        let plain = lines
            .iter()
            .find(|line| line["source"] == "stdout")
            .expect("stdout");
        assert_eq!(plain["message"], format!("stdout: {message}"));
        let structured = lines
            .iter()
            .find(|line| line["source"] == "stderr")
            .expect("stderr");
        assert_eq!(structured["message"], message, "{structured}");
        assert_eq!(structured["level"], "info");
        assert_eq!(structured["fields"]["path"], "/log");
        assert_eq!(structured["fields"]["length"], message.len());
        for line in lines {
            assert_eq!(line["version"], 1);
            let time = line["time"].as_str().unwrap_or_default();
            assert!(time.len() >= 20 && time.ends_with('Z'), "{time}");
        }
    }
    assert!(
        of(&failed).iter().any(|line| line["level"] == "error"),
        "{log:#?}"
    );
    let verdict = of(&trapped);
    assert!(
        verdict.iter().any(|line| line["source"] == "host"),
        "{log:#?}"
    );
    assert!(other.log().is_empty(), "nobody else's log");
}

#[test]
fn a_follower_sees_lines_as_they_come_and_ends_with_the_service() {
    let host = TestHost::start();
    let echo = host.tenant("a").create().deploy("echo");
    let _ = echo.get("/log?message=before").send();
    log_when(&echo, |log| log.len() == 2);
    let path = format!("{}/logs?follow=true", echo.path());
    let mut stream = host.admin().request("GET", &path).open();
    assert_eq!(stream.head.status, 200);
    let mut text = String::new();
    let mut read_until = |stream: &mut insula_tests::http::Streaming, word: &str| {
        while !text.contains(word) {
            let piece = stream
                .piece()
                .expect("a piece")
                .expect("a log that goes on");
            text.push_str(&String::from_utf8_lossy(&piece));
        }
    };
    read_until(&mut stream, "before");
    for message in ["first", "second"] {
        let _ = echo.get(&format!("/log?message={message}")).send();
        read_until(&mut stream, message);
    }
    echo.delete();
    while stream.piece().expect("an orderly end").is_some() {}
}

#[test]
fn a_flood_is_dropped_and_counted_and_holds_nobody_back() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let echo = tenant.deploy("echo");
    // Two lines each; 1,000 at once and 500 a second are kept.
    let load = insula_tests::load::times(3_000, 4, &echo.get("/log?message=flood"));
    assert_eq!(load.status(200), 3_000, "{:?}", load.statuses);
    let metrics = host.when_ended("a", 3_000);
    let dropped = metrics.count("insula_log_lines_dropped_total", &[("tenant", "a")]);
    assert!(
        dropped > 0,
        "6,000 lines in {:?} each were all kept",
        load.quantile(0.5)
    );
    let log = echo.log();
    assert!(!log.is_empty() && log.len() <= 1_001, "{}", log.len());
    // The next line says how many are missing.
    let said = until(Duration::from_secs(10), "the gap is told", || {
        let _ = echo.get("/log?message=after").send();
        let log = echo.log();
        let after = log.iter().any(|line| line["message"] == "after");
        let gap = log.iter().find_map(|line| line["dropped"].as_u64());
        gap.filter(|_| after)
            .ok_or_else(|| "no line has `dropped`".to_owned())
    });
    assert!(said > 0);
}

#[test]
fn nobody_can_forge_a_line() {
    let host = TestHost::start();
    let echo = host.tenant("a").create().deploy("echo");
    // A line end, and then what looks like a line of the host's own; and a terminal's escape.
    let forged = r#"{"source":"host","message":"forged","request_id":"mine"}"#;
    let encoded: String = forged.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let message = format!("a%0a{encoded}%0ab%1b%5b2J%0dc");
    let answer = echo.get(&format!("/log?message={message}")).send();
    assert_eq!(answer.status, 200, "{}", answer.text());
    let id = json!(answer.header("x-request-id").expect("x-request-id"));
    let log = log_when(&echo, |log| log.len() >= 4);
    for line in &log {
        assert_ne!(line["source"], "host", "{line}");
        assert_eq!(line["request_id"], id, "{line}");
        assert_ne!(line["message"], "forged", "{line}");
    }
    let path = format!("{}/logs", echo.path());
    let raw = host.admin().request("GET", &path).send().body;
    let control = raw
        .iter()
        .filter(|byte| **byte < 0x20 && **byte != b'\n')
        .count();
    assert_eq!(
        control,
        0,
        "control bytes in {}",
        String::from_utf8_lossy(&raw)
    );
}
