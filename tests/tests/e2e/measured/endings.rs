//! How long after its time a guest is gone that never ends by itself.

use std::time::Duration;

use insula_tests::{TestHost, load};

use crate::hostile::{CASES, Case};

/// After the limit.
const WITHIN: Duration = Duration::from_millis(50);
const TRIES: u64 = 20;

/// What a case allows, where time is what ends it.
fn timeout(case: &Case) -> Option<Duration> {
    let limits = (case.limits)();
    let text = limits["timeout"].as_str()?.strip_suffix("ms")?;
    let timeout = Duration::from_millis(text.parse().expect("milliseconds"));
    (case.outcome == "timeout" && case.is_answered_at_the_end()).then_some(timeout)
}

#[test]
fn whoever_is_out_of_time_is_gone_within_50_ms() {
    let host = TestHost::measured().start();
    let tenant = host.tenant("hostile").create();
    let (mut tried, mut late) = (0, Vec::new());
    for (number, case) in CASES.iter().enumerate() {
        let Some(timeout) = timeout(case) else {
            continue;
        };
        tried += 1;
        let service = case.deploy(&host, &tenant, &format!("s{number}"));
        let _ = load::times(1, 1, &case.request(&service));
        let load = load::times(TRIES, 1, &case.request(&service));
        let (middle, longest) = (load.quantile(0.5), load.quantile(1.0));
        let told = format!("{}{}", case.guest.name(), case.path);
        eprintln!("{told}: {timeout:?} allowed, {middle:?} in the middle, {longest:?} at most");
        if longest > timeout + WITHIN {
            late.push(format!("{told}: {longest:?}"));
        }
        service.delete();
    }
    assert!(tried >= 10, "{tried}");
    assert!(late.is_empty(), "{late:?}");
}
