//! Work on connections, in its tenant's turn.
//!
//! What a connection needs (reading, parsing, refusing, sending) is done as soon as the kernel has
//! something for it; that takes a few microseconds and is not worth a pick. Until the connections of
//! one tenant have taken [`ROUND_NS`] since the worker last looked at its run queue: what they need
//! beyond that waits here, and is done between slices, when the scheduler says that it is the tenant's
//! turn or that nobody else is there. So a flood takes the share of its tenant and no more. The rest
//! is not even read, and the kernel closes the windows of those who send it.
//!
//! ```text
//!   task is polled ─▶ within its tenant's round? ── yes ──▶ done at once
//!                                │ no
//!                                └─▶ waits ─▶ tenant is due, or the core is free ─▶ done from here
//! ```
//!
//! Connections of which it is not known whose they are count as one tenant's, which is always due.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use insula_scheduler::{Aside, Nanos};
use insula_types::TenantId;

use super::batch::{WorkerState, with_worker};
use super::dispatcher::{Pool, lock};
use super::entries::Payer;
use super::run_queue::key_of;

/// CPU time that a tenant's connections may have before the run queue is looked at again, and in each
/// of their turns after that: as long as guests may have the core between two looks at the network.
const ROUND_NS: u64 = 250_000;
/// For how long a tenant's connections are remembered when another's come.
const MIXED: Duration = Duration::from_millis(50);
/// How long a core is lent while connections wait for their turn.
const SHORT_LOAN: Duration = Duration::from_micros(500);

/// A connection that can go on.
pub(crate) trait Ready {
    /// Does what there is to do.
    fn run(&self);

    /// Shows who pays for it, if that is known.
    fn with_payer(&self, show: &mut dyn FnMut(Option<&Payer>));
}

/// Those that wait, oldest first.
type Line = VecDeque<Rc<dyn Ready>>;

/// Whose they are.
type Owner = Option<TenantId>;

/// The connections of one worker.
#[derive(Default)]
pub(super) struct Connections {
    /// What those of each tenant have used in this round. Few tenants' connections have something
    /// to do in one.
    used: Vec<(Owner, u64)>,
    waiting: VecDeque<(Owner, Line)>,
    /// The tenant whose had something to do last.
    last: Owner,
    /// When that was another than before.
    changed: Option<Instant>,
}

impl Connections {
    /// The run queue is being looked at.
    pub(super) fn begin_round(&mut self) {
        self.used.clear();
    }

    /// Whether one of this owner's may do its work at once.
    fn may_go(&self, owner: Owner) -> bool {
        let used = self.used.iter().find(|(whose, _)| *whose == owner);
        used.is_none_or(|(_, ns)| *ns < ROUND_NS)
            && self.waiting.iter().all(|(whose, _)| *whose != owner)
    }

    /// Whether those of several tenants come here.
    pub(super) fn are_mixed(&self, now: Instant) -> bool {
        let since = |at| now.saturating_duration_since(at);
        self.changed.is_some_and(|at| since(at) < MIXED)
    }

    /// One of this owner's has gone.
    fn went(&mut self, owner: Owner, now: Instant) {
        if owner.is_some() && owner != self.last {
            self.changed = self.last.map(|_| now);
            self.last = owner;
        }
    }

    /// One of them has gone at once, and used so much.
    fn used(&mut self, owner: Owner, ns: u64, now: Instant) {
        self.went(owner, now);
        match self.used.iter_mut().find(|(whose, _)| *whose == owner) {
            Some((_, sum)) => *sum += ns,
            None => self.used.push((owner, ns)),
        }
    }

    /// Lets one wait for its turn. Says whether the run queue has to be looked at for that: it is the
    /// first.
    fn wait(&mut self, owner: Owner, ready: Rc<dyn Ready>) -> bool {
        let first = self.waiting.is_empty();
        match self.waiting.iter_mut().find(|(whose, _)| *whose == owner) {
            Some((_, line)) => line.push_back(ready),
            None => self.waiting.push_back((owner, Line::from([ready]))),
        }
        first
    }

    /// How many owners' connections wait.
    fn owners(&self) -> usize {
        self.waiting.len()
    }

    /// The line that has waited longest for a turn; what is left of it is to be [put
    /// back](Self::put_back).
    fn take_first(&mut self) -> Option<(Owner, Line)> {
        self.waiting.pop_front()
    }

    /// Behind all others.
    fn put_back(&mut self, owner: Owner, line: Line) {
        self.waiting.push_back((owner, line));
    }
}

/// How far the waiting ones came.
pub(super) struct Went {
    pub(super) at: Instant,
    /// It is somebody's turn still, who has no job that the turn could be given to.
    pub(super) alone: bool,
    pub(super) left: Left,
}

/// What still waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    Nothing,
    /// For its turn, or for a core.
    Ready,
    /// For the end of its tenants' throttling.
    Until(Instant),
}

impl Left {
    fn and(self, aside: Aside, epoch: Instant) -> Self {
        match (self, aside) {
            (Self::Ready, _) | (_, Aside::Due | Aside::Ahead) => Self::Ready,
            (Self::Nothing, Aside::Throttled { until }) => Self::Until(epoch + until.as_duration()),
            (Self::Until(at), Aside::Throttled { until }) => {
                Self::Until(at.min(epoch + until.as_duration()))
            }
        }
    }

    /// When to look again, if nothing happens before.
    pub(super) fn until(self) -> Option<Instant> {
        match self {
            Self::Until(at) => Some(at),
            Self::Nothing | Self::Ready => None,
        }
    }

    /// For how long the core may be lent.
    pub(super) fn loan(self, longest: Duration) -> Duration {
        match self {
            Self::Ready => SHORT_LOAN,
            Self::Nothing | Self::Until(_) => longest,
        }
    }
}

impl Pool {
    /// A connection's task is about to be polled: what the worker did until now was for the host. Says
    /// whether it may be polled at once, or has to [wait](Self::wait_for_turn).
    pub(crate) fn begin_billed(&self, owner: Owner) -> bool {
        let may_go = with_worker(|worker| {
            self.settle_host_time(worker);
            worker.connections.may_go(owner)
        });
        may_go.unwrap_or(true)
    }

    /// A connection's task was polled: charges what the calling worker did since it began.
    pub(crate) fn end_billed(&self, payer: Option<&Payer>) {
        with_worker(|worker| {
            let (now, ns) = worker.watch.lap();
            match payer {
                Some(payer) => payer.charge(ns),
                None => self.add_host_ns(worker.id, ns),
            }
            worker.connections.used(payer.map(Payer::tenant), ns, now);
        });
    }

    /// Lets a connection wait for its turn. To be called by a worker.
    pub(crate) fn wait_for_turn(&self, owner: Owner, ready: Rc<dyn Ready>) {
        with_worker(|worker| {
            if worker.connections.wait(owner, ready) {
                self.workers[worker.id.index()].wake.notify_one();
            }
        });
    }

    /// Lets connections that wait go on whose turn it is; with `anybody`, those as well that others
    /// come before, who do not run here.
    pub(super) fn run_connections(
        &self,
        worker: &mut WorkerState,
        now: Instant,
        anybody: bool,
    ) -> Went {
        let mut went = Went {
            at: now,
            alone: false,
            left: Left::Nothing,
        };
        let mut spent = 0;
        for _ in 0..worker.connections.owners() {
            if spent >= ROUND_NS {
                went.left = Left::Ready;
                break;
            }
            let Some((owner, mut line)) = worker.connections.take_first() else {
                break;
            };
            let aside = self.aside(owner, went.at);
            if aside == Aside::Due || (anybody && aside == Aside::Ahead) {
                spent += self.run_line(worker, owner, &mut line, &mut went.at);
            }
            if !line.is_empty() {
                worker.connections.put_back(owner, line);
                let aside = self.aside(owner, went.at);
                went.alone |= aside == Aside::Due && !self.has_queued(owner);
                went.left = went.left.and(aside, self.epoch);
            }
        }
        went
    }

    /// Lets the connections of one owner go on for a round, and charges that. Says what it took.
    fn run_line(
        &self,
        worker: &mut WorkerState,
        owner: Owner,
        line: &mut Line,
        at: &mut Instant,
    ) -> u64 {
        let (mut whole, mut in_turn) = (0, 0);
        while whole < ROUND_NS
            && let Some(ready) = line.pop_front()
        {
            ready.run();
            let (now, ns) = worker.watch.lap();
            *at = now;
            whole += ns;
            ready.with_payer(&mut |payer| match payer {
                Some(payer) if Some(payer.tenant()) == owner => {
                    payer.charge_in_turn(ns);
                    in_turn += ns;
                }
                Some(payer) => payer.charge(ns),
                None => self.add_host_ns(worker.id, ns),
            });
        }
        worker.connections.went(owner, *at);
        if let Some(tenant) = owner {
            let (used, at) = (Nanos::from_nanos(in_turn), self.nanos(*at));
            // A tenant that is gone pays no more.
            let _ = lock(&self.queue)
                .sched
                .charge_aside(key_of(tenant), used, at);
        }
        whole
    }

    fn aside(&self, owner: Owner, now: Instant) -> Aside {
        let at = self.nanos(now);
        let aside = owner.map(|tenant| lock(&self.queue).sched.aside(key_of(tenant), at));
        // Nobody's, and those of a tenant that is gone, are in nobody's way for long.
        aside.and_then(Result::ok).unwrap_or(Aside::Due)
    }

    /// Whether jobs of the owner wait for the core as well. It gets every other turn.
    fn has_queued(&self, owner: Owner) -> bool {
        owner.is_none_or(|tenant| lock(&self.queue).sched.queued(key_of(tenant)) != Some(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;

    impl Ready for Nothing {
        fn run(&self) {}

        fn with_payer(&self, show: &mut dyn FnMut(Option<&Payer>)) {
            show(None);
        }
    }

    fn tenant(id: u64) -> Owner {
        Some(TenantId::new(id))
    }

    #[test]
    fn a_round_is_each_owners_own() {
        let mut connections = Connections::default();
        let now = Instant::now();
        connections.used(tenant(1), ROUND_NS - 1, now);
        assert!(connections.may_go(tenant(1)));
        connections.used(tenant(1), 1, now);
        assert!(!connections.may_go(tenant(1)));
        assert!(connections.may_go(tenant(2)) && connections.may_go(None));
        connections.begin_round();
        assert!(connections.may_go(tenant(1)));
    }

    #[test]
    fn several_tenants_are_noticed_and_forgotten() {
        let mut connections = Connections::default();
        let now = Instant::now();
        connections.used(tenant(1), 1, now);
        connections.used(None, 1, now);
        connections.used(tenant(1), 1, now);
        assert!(!connections.are_mixed(now));
        connections.used(tenant(2), 1, now);
        assert!(connections.are_mixed(now));
        assert!(!connections.are_mixed(now + MIXED));
    }

    #[test]
    fn who_comes_after_one_that_waits_waits_behind_it() {
        let mut connections = Connections::default();
        assert!(connections.wait(tenant(1), Rc::new(Nothing)));
        assert!(!connections.wait(tenant(2), Rc::new(Nothing)));
        connections.begin_round();
        assert!(!connections.may_go(tenant(1)), "not even in a new round");
        let (owner, line) = connections.take_first().unwrap();
        assert_eq!((owner, line.len()), (tenant(1), 1));
        assert!(connections.may_go(tenant(1)), "all of them have gone");
        connections.put_back(owner, line);
        assert_eq!(connections.take_first().unwrap().0, tenant(2));
    }
}
