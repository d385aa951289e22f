//! Where a tenant stands: in which heap, under which key, and what it forfeits
//! on the way. The states are drawn in [`crate::tenant`].

use crate::scheduler::Scheduler;
use crate::tenant::Place;
use crate::units::Nanos;

/// How far behind virtual time a tenant may stay whose jobs were all running.
/// With none, a tenant that is due just about as many cores as it has jobs
/// loses up to 14 % of its share to the waits between slices, in simulation
/// (`tests/proofs/fairness.rs`).
const CREDIT_QUANTA: u64 = 4;

impl Scheduler {
    /// Moves the clock and releases whom it releases.
    pub(crate) fn advance(&mut self, now: Nanos) {
        self.now = self.now.max(now);
        while let Some((until, slot)) = self.by_release.least() {
            if until > self.now {
                break;
            }
            self.tenants.get_mut(slot).settle(self.now);
            self.place(slot);
        }
    }

    /// Puts a tenant where its queue and its tags say, and re-keys it. The
    /// tenant must be settled.
    ///
    /// Entering the runnable set, a tenant's start tag is raised:
    /// * from sleep (in `enqueue`) and from throttling to virtual time, SFQ's
    ///   rule for arrivals, S = max(F, v) (Goyal, Vin, Cheng, SIGCOMM
    ///   1996): neither earns credit;
    /// * when all its jobs were running to [`CREDIT_QUANTA`] behind virtual
    ///   time. Such a tenant was being served as fast as it can use, so where
    ///   virtual time overtook it, its weight asks for more cores than it has
    ///   jobs, and the difference is not owed to it. That is the readjustment
    ///   of infeasible weights (surplus fair scheduling: Chandra, Adler, Goyal,
    ///   Shenoy, OSDI 2000) without a list sorted by weight. The
    ///   small credit is what it lost by waiting for others' slices to end.
    pub(crate) fn place(&mut self, slot: u32) {
        let tenant = self.tenants.get_mut(slot);
        let before = tenant.place;
        let release = tenant.limit.map_or(Nanos::ZERO, |tag| tag.due());
        let after = if tenant.queue.len() == 0 {
            Place::Off
        } else if release > self.now {
            Place::Throttled { until: release }
        } else {
            Place::Runnable
        };
        tenant.place = after;
        if before != after {
            match before {
                Place::Runnable => {
                    self.by_start.remove(slot);
                    self.by_reservation.remove(slot);
                }
                Place::Throttled { .. } => self.by_release.remove(slot),
                Place::Off => {}
            }
        }
        let counted = match after {
            Place::Runnable => {
                let floor = match before {
                    Place::Runnable => tenant.start,
                    Place::Throttled { .. } => self.virtual_time,
                    Place::Off => {
                        let credit = self.config.quantum.saturating_mul(CREDIT_QUANTA);
                        self.virtual_time.before(credit, tenant.slope)
                    }
                };
                tenant.start = tenant.start.max(floor);
                self.by_start.put(slot, tenant.start);
                match tenant.reservation {
                    Some(tag) => self.by_reservation.put(slot, tag.due()),
                    None => self.by_reservation.remove(slot),
                }
                tenant.queue.len()
            }
            Place::Throttled { until } => {
                self.by_release.put(slot, until);
                0
            }
            Place::Off => 0,
        };
        self.runnable = self.runnable - tenant.counted as usize + counted as usize;
        tenant.counted = counted;
    }
}
