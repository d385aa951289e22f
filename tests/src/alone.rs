//! Tests that measure CPU time or latency run beside nothing else.
//!
//! Under nextest, where every test is a process, `.config/nextest.toml` sees to it: tests of the
//! module `measured` get all threads. Under plain `cargo test`, where all tests are threads of one
//! process, this does: every host has a place, and the host of a measured test has the only one.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug)]
struct Taken {
    shared: usize,
    alone: bool,
}

static TAKEN: Mutex<Taken> = Mutex::new(Taken {
    shared: 0,
    alone: false,
});
static LEFT: Condvar = Condvar::new();

/// Held for as long as a host runs.
#[derive(Debug)]
pub struct Place {
    alone: bool,
}

fn wait_while(busy: impl Fn(&Taken) -> bool) -> MutexGuard<'static, Taken> {
    let taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    let free = LEFT.wait_while(taken, |taken| busy(taken));
    free.unwrap_or_else(PoisonError::into_inner)
}

/// A place beside others.
#[must_use]
pub fn shared() -> Place {
    wait_while(|taken| taken.alone).shared += 1;
    Place { alone: false }
}

/// The only place there is. A test that has one must not ask for another.
#[must_use]
pub fn alone() -> Place {
    wait_while(|taken| taken.alone || taken.shared > 0).alone = true;
    Place { alone: true }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        if self.alone {
            taken.alone = false;
        } else {
            taken.shared -= 1;
        }
        LEFT.notify_all();
    }
}
