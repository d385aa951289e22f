use std::io::{Read, Write};
use std::net::TcpListener;

use super::*;

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi";

/// A server that answers at once, but not while it stalls: for `stall`, once, from the
/// `stall_after`-th request on. All connections wait for the same lock.
fn server(stall_after: usize, stall: Duration) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let served = std::sync::Arc::new(std::sync::Mutex::new(0_usize));
    // Both kinds of thread end with the test's process at the latest.
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let served = std::sync::Arc::clone(&served);
            std::thread::spawn(move || {
                let mut request = [0; 1024];
                while matches!(stream.read(&mut request), Ok(1..)) {
                    let mut count = served.lock().unwrap();
                    *count += 1;
                    if *count == stall_after {
                        std::thread::sleep(stall);
                    }
                    drop(count);
                    if stream.write_all(ANSWER).is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// Starts a plan and waits until it is over.
fn run(plan: Plan) -> Result<Outcome> {
    Generator::start(plan)?.join()
}

fn plan(address: SocketAddr, measured: Duration) -> Plan {
    Plan {
        address,
        targets: Targets::one("/", "test"),
        expected: Some(b"hi".to_vec()),
        rate_per_second: 500.0,
        connections: 4,
        head_start: HEAD_START,
        warm_up: Duration::ZERO,
        measured,
        cores: Cores::allowed().unwrap(),
        priority: Priority::Ordinary,
    }
}

#[test]
fn the_pace_is_kept_and_every_request_is_recorded() {
    let outcome = run(plan(
        server(usize::MAX, Duration::ZERO),
        Duration::from_secs(1),
    ))
    .unwrap();
    assert_eq!(outcome.records.len(), 500);
    assert_eq!(outcome.errors(), 0);
    assert!(outcome.records.iter().all(|one| one.due_us < 1_000_000));
    assert_eq!(outcome.latency(|_| true).unwrap().len(), 500);
}

#[test]
fn a_stall_is_seen_by_all_that_were_due_in_it() {
    // Stalls for half a second of two: with a closed loop four answers of a thousand would be
    // slow, one for each connection, and the 99th percentile would not show it.
    let stall = Duration::from_millis(500);
    let outcome = run(plan(server(250, stall), Duration::from_secs(2))).unwrap();
    assert_eq!((outcome.records.len(), outcome.errors()), (1_000, 0));
    let latency = outcome.latency(|_| true).unwrap();
    // A request that was due t into the stall waits for the rest of it: a quarter of all were,
    // and of these half for more than half of it.
    assert!(latency.value_at_quantile(0.9) >= 250_000, "{latency:?}");
    assert!(latency.value_at_quantile(0.99) >= 450_000);
    assert!(latency.max() >= 490_000);
    let slow = outcome.count(|one| one.took_us > 250_000);
    assert!((100..=600).contains(&slow), "{slow}");
}

#[test]
fn a_server_that_never_answers_leaves_everything_unanswered() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let plan = Plan {
        rate_per_second: 100.0,
        ..plan(listener.local_addr().unwrap(), Duration::from_millis(500))
    };
    let outcome = run(plan).unwrap();
    assert_eq!(outcome.records.len(), 50);
    assert_eq!(outcome.count(|one| one.ending == Ending::Unanswered), 50);
    // They have waited since they were due, and until the end.
    let latency = outcome.latency(|_| true).unwrap();
    assert!(latency.min() >= 1_900_000, "{latency:?}");
}

#[test]
fn nobody_listening_is_an_error_of_every_request_and_not_of_the_run() {
    let address = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let outcome = run(plan(address, Duration::from_millis(100))).unwrap();
    assert_eq!((outcome.records.len(), outcome.errors()), (50, 50));
}

#[test]
fn what_is_not_recorded_is_the_warm_up() {
    let address = server(usize::MAX, Duration::ZERO);
    let plan = Plan {
        warm_up: Duration::from_millis(200),
        ..plan(address, Duration::from_millis(200))
    };
    let outcome = run(plan).unwrap();
    assert_eq!(outcome.records.len(), 100);
    assert_eq!(outcome.late.len(), 200);
}

#[test]
fn a_plan_without_bounds_is_refused() {
    let address = SocketAddr::from(([127, 0, 0, 1], 1));
    let base = plan(address, Duration::from_secs(1));
    for rate_per_second in [0.0, -1.0, f64::NAN, 1e9] {
        let plan = Plan {
            rate_per_second,
            ..base.clone()
        };
        assert!(run(plan).is_err(), "{rate_per_second}");
    }
    let plan = Plan {
        connections: CONNECTIONS_MAX + 1,
        ..base
    };
    assert!(run(plan).is_err());
}
