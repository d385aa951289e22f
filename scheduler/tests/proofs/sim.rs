//! A host on virtual time: W workers, tenants with habits, one scheduler.
//! Keeps its own books and compares them with the scheduler's after each step.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use insula_scheduler::{
    Aside, Class, Config, Fate, JobId, Millicores, Nanos, Params, Pick, Scheduler, Shares,
    SliceEnd, TenantId, WorkerId,
};

use crate::habit::Habit;
use crate::meters::{LimitMeter, Wide};
use crate::prng::Prng;

#[derive(Clone, Debug)]
pub(crate) struct SimTenant {
    pub(crate) params: Params,
    pub(crate) habit: Habit,
    pub(crate) queued: usize,
    pub(crate) running: usize,
    pub(crate) longest: u64,
    pub(crate) charged: u64,
    pub(crate) picks: u64,
    /// When it last became queued or was last picked.
    pub(crate) hungry_since: u64,
    pub(crate) longest_hunger: u64,
    /// There is always work beside its jobs: of two turns, one is theirs.
    pub(crate) aside: bool,
    picks_at_aside: Option<u64>,
    /// Integral of queued jobs over time, and up to when.
    waiting: Wide,
    settled: u64,
    limit: Option<LimitMeter>,
}

#[derive(Clone, Copy, Debug)]
struct Busy {
    tenant: usize,
    /// None of work beside jobs.
    job: Option<JobId>,
    began: u64,
    ends: u64,
    end: SliceEnd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrive { tenant: usize },
    Wake { tenant: usize, job: u64 },
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) config: Config,
    pub(crate) scheduler: Scheduler,
    pub(crate) tenants: Vec<SimTenant>,
    pub(crate) now: u64,
    pub(crate) prng: Prng,
    workers: Vec<Option<Busy>>,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    sequence: u64,
    next_job: u64,
    busy: u64,
    steps: u64,
}

/// A tenant never has more than this many jobs queued by arrivals.
const QUEUE_MAX: usize = 2_000;

pub(crate) fn tenant_id(index: usize) -> TenantId {
    TenantId::new(u64::try_from(index).unwrap())
}

pub(crate) fn worker_id(index: usize) -> WorkerId {
    WorkerId::new(u16::try_from(index).unwrap())
}

pub(crate) fn params(shares: u32, reservation: u32, limit: u32) -> Params {
    Params {
        shares: Shares::new(shares).unwrap(),
        reservation: Millicores::new(reservation).ok(),
        limit: Millicores::new(limit).ok(),
    }
}

impl World {
    pub(crate) fn new(workers: usize, seed: u64) -> Self {
        let config = Config::new(workers);
        Self {
            config,
            scheduler: Scheduler::new(config).unwrap(),
            tenants: Vec::new(),
            now: 0,
            prng: Prng::new(seed),
            workers: vec![None; workers],
            events: BinaryHeap::new(),
            sequence: 0,
            next_job: 0,
            busy: 0,
            steps: 0,
        }
    }

    /// Adds a tenant with `jobs` jobs at once (for a burst or a service: its
    /// first arrival).
    pub(crate) fn add(&mut self, params: Params, habit: Habit, jobs: usize) -> usize {
        let index = self.tenants.len();
        self.scheduler
            .add_tenant(tenant_id(index), params, self.time())
            .unwrap();
        let burst = self.config.limit_burst.as_nanos();
        let limit = params
            .limit
            .map(|rate| LimitMeter::new(rate.get(), burst, self.now));
        self.tenants.push(SimTenant {
            params,
            habit,
            queued: 0,
            running: 0,
            longest: 0,
            charged: 0,
            picks: 0,
            hungry_since: self.now,
            longest_hunger: 0,
            aside: false,
            picks_at_aside: None,
            waiting: 0,
            settled: self.now,
            limit,
        });
        match habit {
            Habit::Burst { .. } | Habit::Service { .. } => {
                self.schedule(self.now, Event::Arrive { tenant: index });
            }
            _ => (0..jobs).for_each(|_| self.submit(index, None)),
        }
        index
    }

    /// Changes parameters; a change of limit restarts the meter with it.
    pub(crate) fn set_params(&mut self, tenant: usize, params: Params) {
        self.scheduler
            .set_params(tenant_id(tenant), params, self.time())
            .unwrap();
        let old = self.tenants[tenant].params;
        if old.limit != params.limit {
            let burst = self.config.limit_burst.as_nanos();
            self.tenants[tenant].limit = params
                .limit
                .map(|rate| LimitMeter::new(rate.get(), burst, self.now));
        }
        self.tenants[tenant].params = params;
    }

    /// Service so far, running slices included.
    pub(crate) fn service(&self, tenant: usize) -> Wide {
        let running: u64 = (self.workers.iter().flatten())
            .filter(|busy| busy.tenant == tenant)
            .map(|busy| self.now - busy.began)
            .sum();
        Wide::from(self.tenants[tenant].charged) + Wide::from(running)
    }

    /// Cores' worth of service since `before`, a past `(now, service)`.
    pub(crate) fn rate_since(&self, tenant: usize, before: (u64, Wide)) -> f64 {
        let served = u64::try_from(self.service(tenant) - before.1).unwrap();
        nanos_f64(served) / nanos_f64(self.now - before.0)
    }

    pub(crate) fn mark(&self, tenant: usize) -> (u64, Wide) {
        (self.now, self.service(tenant))
    }

    pub(crate) fn run_for(&mut self, millis: u64) {
        let until = self.now + millis * 1_000_000;
        while self.now < until {
            self.step();
        }
    }

    /// Moves to the next thing that happens, lets it happen, gives idle workers
    /// work, checks the books.
    pub(crate) fn step(&mut self) {
        let Some(next) = self.next_time() else {
            panic!("the simulation ran dry")
        };
        assert!(next >= self.now, "time runs backwards");
        self.now = next;
        for worker in 0..self.workers.len() {
            if self.workers[worker].is_some_and(|busy| busy.ends <= self.now) {
                self.finish(worker);
            }
        }
        while self
            .events
            .peek()
            .is_some_and(|Reverse((at, _, _))| *at <= self.now)
        {
            let Reverse((_, _, event)) = self.events.pop().unwrap();
            self.happen(event);
        }
        let first = usize::try_from(self.prng.within(0, 1_000)).unwrap();
        for offset in 0..self.workers.len() {
            let worker = (first + offset) % self.workers.len();
            if self.workers[worker].is_none() && !self.go_aside(worker) {
                self.pick(worker);
            }
        }
        self.check();
    }

    fn next_time(&self) -> Option<u64> {
        let slice = self.workers.iter().flatten().map(|busy| busy.ends).min();
        let event = self.events.peek().map(|Reverse((at, _, _))| *at);
        let idle = self.workers.iter().any(Option::is_none);
        if idle && self.scheduler.runnable() > 0 {
            return Some(self.now);
        }
        let release = self
            .scheduler
            .next_release()
            .filter(|_| idle)
            .map(Nanos::as_nanos);
        [slice, event, release].into_iter().flatten().min()
    }

    fn time(&self) -> Nanos {
        Nanos::from_nanos(self.now)
    }

    fn schedule(&mut self, at: u64, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((at, self.sequence, event)));
    }

    fn settle(&mut self, tenant: usize) {
        let entry = &mut self.tenants[tenant];
        entry.waiting +=
            Wide::try_from(entry.queued).unwrap() * Wide::from(self.now - entry.settled);
        entry.settled = self.now;
    }

    fn submit(&mut self, tenant: usize, woken: Option<u64>) {
        self.settle(tenant);
        let class = if woken.is_some() {
            Class::Woken
        } else {
            Class::Fresh
        };
        let job = woken.unwrap_or_else(|| {
            self.next_job += 1;
            self.next_job
        });
        let home = worker_id(usize::try_from(job).unwrap() % self.workers.len());
        let time = self.time();
        self.scheduler
            .enqueue(tenant_id(tenant), JobId::new(job), home, class, time)
            .unwrap();
        let entry = &mut self.tenants[tenant];
        if entry.queued == 0 {
            entry.hungry_since = self.now;
        }
        entry.queued += 1;
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Wake { tenant, job } => self.submit(tenant, Some(job)),
            Event::Arrive { tenant } => {
                let (every_us, jobs) = match self.tenants[tenant].habit {
                    Habit::Burst { every_us, jobs } => (every_us, jobs),
                    Habit::Service { every_us } => (self.prng.within(1, 2 * every_us), 1),
                    _ => return,
                };
                for _ in 0..jobs {
                    if self.tenants[tenant].queued < QUEUE_MAX {
                        self.submit(tenant, None);
                    }
                }
                self.schedule(self.now + every_us * 1_000, Event::Arrive { tenant });
            }
        }
    }

    /// Lets a worker do work beside jobs of any tenant whose turn it is.
    fn go_aside(&mut self, worker: usize) -> bool {
        let time = self.time();
        let Some(tenant) = (0..self.tenants.len()).find(|&tenant| {
            let entry = &self.tenants[tenant];
            let in_turn = entry.queued == 0 || entry.picks_at_aside != Some(entry.picks);
            entry.aside
                && in_turn
                && self.scheduler.aside(tenant_id(tenant), time) == Ok(Aside::Due)
        }) else {
            return false;
        };
        self.tenants[tenant].picks_at_aside = Some(self.tenants[tenant].picks);
        let quantum = self.config.quantum.as_nanos();
        let length = self.prng.within(quantum / 10, quantum);
        self.workers[worker] = Some(Busy {
            tenant,
            job: None,
            began: self.now,
            ends: self.now + length,
            end: SliceEnd::Finished,
        });
        true
    }

    fn pick(&mut self, worker: usize) {
        let Pick::Run { tenant, job, .. } =
            self.scheduler.pick(worker_id(worker), self.time()).unwrap()
        else {
            return;
        };
        let tenant = usize::try_from(tenant.get()).unwrap();
        self.settle(tenant);
        let quantum = self.config.quantum.as_nanos();
        let (length, end) = self.tenants[tenant].habit.slice(quantum, &mut self.prng);
        let entry = &mut self.tenants[tenant];
        entry.queued -= 1;
        entry.running += 1;
        entry.picks += 1;
        entry.longest_hunger = entry.longest_hunger.max(self.now - entry.hungry_since);
        entry.hungry_since = self.now;
        self.workers[worker] = Some(Busy {
            tenant,
            job: Some(job),
            began: self.now,
            ends: self.now + length,
            end,
        });
    }

    fn finish(&mut self, worker: usize) {
        let Some(busy) = self.workers[worker].take() else {
            return;
        };
        let (tenant, used) = (busy.tenant, self.now - busy.began);
        self.settle(tenant);
        self.note(tenant, used);
        let (time, length) = (self.time(), Nanos::from_nanos(used));
        let Some(job) = busy.job else {
            let charged = self.scheduler.charge_aside(tenant_id(tenant), length, time);
            return charged.unwrap();
        };
        let charged = self
            .scheduler
            .charge(worker_id(worker), length, busy.end, time)
            .unwrap();
        assert_eq!((charged.tenant, charged.job), (tenant_id(tenant), job));
        let entry = &mut self.tenants[tenant];
        entry.running -= 1;
        if charged.fate == Fate::Requeued {
            if entry.queued == 0 {
                entry.hungry_since = self.now;
            }
            entry.queued += 1;
        }
        match (self.tenants[tenant].habit, busy.end) {
            (Habit::Yielder, _) => {
                self.schedule(
                    self.now + 1,
                    Event::Wake {
                        tenant,
                        job: job.get(),
                    },
                );
            }
            (Habit::Service { .. }, SliceEnd::Blocked) => {
                let pause = self.prng.within(1_000, 1_000_000);
                self.schedule(
                    self.now + pause,
                    Event::Wake {
                        tenant,
                        job: job.get(),
                    },
                );
            }
            (Habit::Shorts | Habit::Traps, _) => self.submit(tenant, None),
            _ => {}
        }
    }

    /// Writes down what a tenant has used.
    fn note(&mut self, tenant: usize, used: u64) {
        self.busy += used;
        let excess = self.limit_excess(tenant, used);
        let entry = &mut self.tenants[tenant];
        entry.charged += used;
        entry.longest = entry.longest.max(used);
        if let Some(meter) = &mut entry.limit {
            meter.use_up(used, self.now, excess);
        }
    }

    /// By how much usage may exceed limit·t + burst: a slice per worker.
    fn limit_excess(&self, tenant: usize, used: u64) -> Wide {
        let longest = self.tenants[tenant]
            .longest
            .max(used)
            .max(self.config.quantum.as_nanos());
        Wide::try_from(self.workers.len()).unwrap() * Wide::from(longest)
    }

    fn check(&mut self) {
        self.steps += 1;
        assert_eq!(
            self.scheduler.totals().charged.as_nanos(),
            self.busy,
            "charged = busy"
        );
        let queued: usize = self.tenants.iter().map(|tenant| tenant.queued).sum();
        assert_eq!(self.scheduler.queued_total(), queued);
        if self.workers.iter().any(Option::is_none) {
            assert_eq!(
                self.scheduler.runnable(),
                0,
                "an idle core beside runnable work"
            );
            for (index, tenant) in self.tenants.iter().enumerate() {
                let held = tenant.limit.is_some_and(|meter| {
                    meter.justifies_holding(self.now, self.limit_excess(index, 0))
                });
                assert!(
                    tenant.queued == 0 || held,
                    "at {}: tenant {index} waits beside an idle core: {tenant:?}",
                    self.now
                );
            }
        }
        if self.steps.is_multiple_of(64) {
            self.check_accounts();
        }
    }

    /// Every tenant's account against the simulator's own integrals.
    pub(crate) fn check_accounts(&mut self) {
        for index in 0..self.tenants.len() {
            self.settle(index);
            let entry = &self.tenants[index];
            let account = self
                .scheduler
                .account(tenant_id(index), self.time())
                .unwrap();
            assert_eq!(account.charged.as_nanos(), entry.charged);
            let waited = Wide::from(account.waited.as_nanos());
            let throttled = Wide::from(account.throttled.as_nanos());
            assert_eq!(
                waited + throttled,
                entry.waiting,
                "waiting time of tenant {index}"
            );
            assert_eq!(self.scheduler.queued(tenant_id(index)), Some(entry.queued));
            assert_eq!(
                self.scheduler.running(tenant_id(index)),
                Some(entry.running)
            );
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a ratio for a percentage")]
pub(crate) fn nanos_f64(nanos: u64) -> f64 {
    nanos as f64
}
