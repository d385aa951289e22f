//! Nothing sleeps to wait: a condition is polled until it holds or its deadline has passed.

use std::time::{Duration, Instant};

/// Pause between two looks.
const POLL: Duration = Duration::from_millis(10);

/// Looks until `look` gives something, for at most `limit`.
///
/// # Panics
/// When the deadline passes, with `what` and the last reason that was given.
pub fn until<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        match look() {
            Ok(found) => return found,
            Err(why) => assert!(
                Instant::now() < deadline,
                "waited {limit:?} in vain until {what}: {why}"
            ),
        }
        std::thread::sleep(POLL);
    }
}

/// Looks for the whole of `span`, about a hundred times: what must *not* happen.
pub fn throughout(span: Duration, mut look: impl FnMut()) {
    let end = Instant::now() + span;
    while Instant::now() < end {
        look();
        std::thread::sleep(span / 100);
    }
}

/// `Ok` when it holds, else the words for [`until`].
///
/// # Errors
/// `why`, when it does not hold.
pub fn holds(condition: bool, why: impl Into<String>) -> Result<(), String> {
    if condition { Ok(()) } else { Err(why.into()) }
}
