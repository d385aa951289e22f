//! How many requests may be on their way at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A number of places.
#[derive(Debug)]
pub struct Places {
    taken: AtomicU32,
    most: u32,
}

/// A place; free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place(Arc<Places>);

impl Places {
    /// All free.
    #[must_use]
    pub const fn new(most: u32) -> Self {
        let taken = AtomicU32::new(0);
        Self { taken, most }
    }

    /// Takes a place, if there is one.
    pub(super) fn take(self: &Arc<Self>) -> Option<Place> {
        let next = |taken| (taken < self.most).then_some(taken + 1);
        let taken = self
            .taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        taken.ok().map(|_| Place(Arc::clone(self)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_there_are() {
        let places = Arc::new(Places::new(2));
        let first = places.take();
        let second = places.take();
        assert!(first.is_some() && second.is_some() && places.take().is_none());
        drop(first);
        assert!(places.take().is_some());
    }
}
