//! How many files and directories guests have open: each is a descriptor of this process, which has
//! so many, and needs them for its clients as well.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use rustix::process::{Resource, getrlimit};

use super::TenantStorage;

/// Of one tenant's guests together.
const OF_A_TENANT_MAX: usize = 4_096;

/// Of all guests: half of what there is.
static OF_ALL: LazyLock<Places> = LazyLock::new(|| {
    let descriptors = getrlimit(Resource::Nofile).maximum;
    let half = descriptors.map_or(usize::MAX, |all| {
        usize::try_from(all / 2).unwrap_or(usize::MAX)
    });
    Places::new(half)
});

/// Looks how many there are. The process that serves may not ask for it later.
pub fn look_at_the_limit() {
    LazyLock::force(&OF_ALL);
}

/// So many, and how many of them are taken.
#[derive(Debug)]
pub(super) struct Places {
    taken: AtomicUsize,
    max: usize,
}

impl Places {
    pub(super) const fn of_a_tenant() -> Self {
        Self::new(OF_A_TENANT_MAX)
    }

    const fn new(max: usize) -> Self {
        let taken = AtomicUsize::new(0);
        Self { taken, max }
    }

    fn take(&self) -> bool {
        let more = |taken| (taken < self.max).then_some(taken + 1);
        let taken = self
            .taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.is_ok()
    }

    fn give(&self) {
        self.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A place for something open.
#[derive(Debug)]
pub struct Place {
    of: Arc<TenantStorage>,
}

impl Place {
    /// `None` where the tenant has as many as it may, or guests have half of all.
    pub(super) fn take(of: &Arc<TenantStorage>) -> Option<Self> {
        if !of.open.take() {
            return None;
        }
        if !OF_ALL.take() {
            of.open.give();
            return None;
        }
        Some(Self { of: Arc::clone(of) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        OF_ALL.give();
        self.of.open.give();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_so_many_places_and_no_more() {
        let places = Places::new(2);
        assert!(places.take() && places.take() && !places.take());
        places.give();
        assert!(places.take() && !places.take());
    }

    #[test]
    fn a_tenant_has_its_own_places() {
        let (one, other) = (Arc::<TenantStorage>::default(), Arc::default());
        // More than guests of a process with few descriptors may have of all.
        let mut taken: Vec<_> = std::iter::from_fn(|| Place::take(&one)).collect();
        assert_eq!(taken.len(), OF_A_TENANT_MAX.min(OF_ALL.max));
        if OF_ALL.max > OF_A_TENANT_MAX {
            assert!(Place::take(&other).is_some());
        }
        taken.pop();
        assert!(Place::take(&one).is_some(), "given back");
    }
}
