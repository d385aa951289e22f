//! A tiny reference: the same rules over plain lists, no heaps, no laziness.
//! [`Twin`] drives it beside the real scheduler and compares every answer.
//!
//! Exact only for shares and rates that are powers of two times the unit, so
//! that both compute without rounding.

use std::collections::HashMap;

use insula_scheduler::{
    AddError, Aside, ChargeError, Class, Config, Fate, JobId, Nanos, Params, Pick, PickError,
    Scheduler, SliceEnd, TenantId, WorkerId,
};

use crate::model_parts::{CREDIT_QUANTA, DEBT_QUANTA, FRESH_RUN, RefSlice, RefTenant, Stand, Tag};

/// The real scheduler and the reference, driven together.
#[derive(Clone, Debug)]
pub(crate) struct Twin {
    pub(crate) real: Scheduler,
    config: Config,
    now: i128,
    tenants: Vec<RefTenant>,
    keys: HashMap<TenantId, usize>,
    slices: Vec<Option<RefSlice>>,
    virtual_time: i128,
    last_finish: i128,
    charged: u64,
}

fn wide(nanos: Nanos) -> i128 {
    i128::from(nanos.as_nanos())
}

impl Twin {
    pub(crate) fn new(config: Config) -> Self {
        Self {
            real: Scheduler::new(config).unwrap(),
            config,
            now: 0,
            tenants: Vec::new(),
            keys: HashMap::new(),
            slices: vec![None; config.workers],
            virtual_time: 0,
            last_finish: 0,
            charged: 0,
        }
    }

    pub(crate) fn open(&self, worker: WorkerId) -> bool {
        self.slices[worker.index()].is_some()
    }

    pub(crate) fn now(&self) -> Nanos {
        Nanos::from_nanos(u64::try_from(self.now).unwrap())
    }

    fn per(rate: u32) -> i128 {
        2_000 / i128::from(rate)
    }

    fn tags(&self, params: Params) -> (Option<Tag>, Option<Tag>) {
        let window = 2 * wide(self.config.reservation_window);
        let reservation = (params.reservation).map(|rate| Tag {
            at: 2 * self.now,
            slack: window,
            per: Self::per(rate.get()),
        });
        let limit = params.limit.map(|rate| {
            let per = Self::per(rate.get());
            let slack = wide(self.config.limit_burst) * per;
            Tag {
                at: 2 * self.now - slack,
                slack,
                per,
            }
        });
        (reservation, limit)
    }

    fn reserved(&self) -> u64 {
        let present = self.tenants.iter().filter(|tenant| !tenant.removed);
        present
            .filter_map(|tenant| tenant.params.reservation)
            .map(|rate| u64::from(rate.get()))
            .sum()
    }

    fn promised(&self, params: Params, own: u64) -> bool {
        let Some(asked) = params.reservation else {
            return true;
        };
        let capacity = 1_000 * u64::try_from(self.config.workers).unwrap();
        params.limit.is_none_or(|limit| limit >= asked)
            && self.reserved() - own + u64::from(asked.get()) <= capacity
    }

    pub(crate) fn tick(&mut self, by: Nanos) {
        let to = self.now + wide(by);
        for tenant in &mut self.tenants {
            let jobs = i128::try_from(tenant.queued()).unwrap();
            let release = tenant.limit.map_or(0, |tag| tag.due());
            let held = release.clamp(self.now, to) - self.now;
            tenant.throttled += held * jobs;
            tenant.waited += (to - self.now - held) * jobs;
        }
        self.now = to;
        (0..self.tenants.len()).for_each(|key| self.place(key));
        self.real.tick(self.now());
        self.compare();
    }

    fn place(&mut self, key: usize) {
        let tenant = &mut self.tenants[key];
        let held = tenant.limit.is_some_and(|tag| tag.at > 2 * self.now);
        let stand = match (tenant.queued(), held) {
            (0, _) => Stand::Off,
            (_, true) => Stand::Throttled,
            (_, false) => Stand::Runnable,
        };
        if stand == Stand::Runnable && tenant.stand == Stand::Throttled {
            tenant.start = tenant.start.max(self.virtual_time);
        }
        if stand == Stand::Runnable && tenant.stand == Stand::Off {
            let credit = CREDIT_QUANTA * wide(self.config.quantum) * tenant.slope();
            tenant.start = tenant.start.max(self.virtual_time - credit);
        }
        tenant.stand = stand;
    }

    pub(crate) fn add(&mut self, id: TenantId, params: Params) {
        let real = self.real.add_tenant(id, params, self.now());
        if self.keys.contains_key(&id) {
            assert_eq!(real, Err(AddError::Exists(id)));
        } else if !self.promised(params, 0) {
            assert!(matches!(real, Err(AddError::Params(_))), "{real:?}");
        } else {
            assert_eq!(real, Ok(()));
            let (reservation, limit) = self.tags(params);
            self.keys.insert(id, self.tenants.len());
            self.tenants.push(RefTenant {
                params,
                start: self.virtual_time,
                reservation,
                limit,
                lanes: Default::default(),
                fresh_run: 0,
                running: 0,
                stand: Stand::Off,
                removed: false,
                charged: 0,
                waited: 0,
                throttled: 0,
            });
        }
        self.compare();
    }

    pub(crate) fn set(&mut self, id: TenantId, params: Params) {
        let real = self.real.set_params(id, params, self.now());
        let Some(&key) = self.keys.get(&id) else {
            assert!(real.is_err());
            return;
        };
        let own = self.tenants[key]
            .params
            .reservation
            .map_or(0, |rate| u64::from(rate.get()));
        if !self.promised(params, own) {
            assert!(real.is_err());
            return;
        }
        assert_eq!(real, Ok(()));
        let (reservation, limit) = self.tags(params);
        let tenant = &mut self.tenants[key];
        let (old, new) = (tenant.params.shares.get(), params.shares.get());
        let distance = tenant.start - self.virtual_time;
        tenant.start = self.virtual_time + distance * i128::from(old) / i128::from(new);
        tenant.reservation = Tag::carried(tenant.reservation, reservation, self.now);
        if tenant.limit.is_none() {
            for slice in self
                .slices
                .iter_mut()
                .flatten()
                .filter(|slice| slice.key == key)
            {
                slice.limited = false;
            }
        }
        tenant.limit = Tag::carried(tenant.limit, limit, self.now);
        tenant.params = params;
        self.place(key);
        self.compare();
    }

    pub(crate) fn remove(&mut self, id: TenantId) {
        let real = self.real.remove_tenant(id, self.now());
        let Some(key) = self.keys.remove(&id) else {
            assert!(real.is_err());
            return;
        };
        let real = real.unwrap();
        let tenant = &mut self.tenants[key];
        let mut jobs = Vec::new();
        for lane in &mut tenant.lanes {
            jobs.extend(lane.jobs.drain(..).map(|job| job.0));
        }
        assert_eq!(real.jobs, jobs);
        assert_eq!(real.running as usize, tenant.running);
        assert_eq!(real.account.charged.as_nanos(), tenant.charged);
        assert_eq!(wide(real.account.waited), tenant.waited);
        tenant.removed = true;
        self.place(key);
        self.compare();
    }

    pub(crate) fn enqueue(&mut self, id: TenantId, job: JobId, home: WorkerId, class: Class) {
        let real = self.real.enqueue(id, job, home, class, self.now());
        let Some(&key) = self.keys.get(&id) else {
            assert!(real.is_err());
            return;
        };
        let tenant = &mut self.tenants[key];
        if tenant.queued() == 0 && tenant.running == 0 {
            tenant.start = tenant.start.max(self.virtual_time);
            if let Some(tag) = &mut tenant.reservation {
                tag.at = tag.at.max(2 * self.now);
            }
        }
        tenant.lanes[0].jobs.push_back((job, home));
        self.place(key);
        let tenant = &self.tenants[key];
        let until = tenant
            .limit
            .map(|tag| tag.due())
            .filter(|_| tenant.stand == Stand::Throttled);
        assert_eq!(real.unwrap().throttled_until.map(wide), until);
        self.compare();
    }

    pub(crate) fn cancel(&mut self, id: TenantId, job: JobId) {
        let real = self.real.cancel(id, job, self.now());
        let Some(&key) = self.keys.get(&id) else {
            assert!(!real);
            return;
        };
        let found = self.tenants[key]
            .lanes
            .iter_mut()
            .any(|lane| lane.cancel(job));
        assert_eq!(real, found);
        self.place(key);
        self.compare();
    }

    /// Among equals either may be picked; what was picked must be one of them.
    pub(crate) fn pick(&mut self, worker: WorkerId) {
        let real = self.real.pick(worker, self.now());
        if self.open(worker) {
            assert_eq!(real, Err(PickError::SliceOpen(worker)));
            return;
        }
        let real = real.unwrap();
        let runnable = || {
            self.tenants
                .iter()
                .filter(|tenant| tenant.stand == Stand::Runnable)
        };
        let least_due = runnable()
            .filter_map(|tenant| tenant.reservation)
            .map(|tag| tag.due())
            .filter(|&due| due <= self.now)
            .min();
        let least_start = runnable().map(|tenant| tenant.start).min();
        let (Some(least_start), Pick::Run { tenant, job, home }) = (least_start, real) else {
            assert_eq!(least_start, None, "{real:?} beside runnable work");
            let held = self
                .tenants
                .iter()
                .filter(|tenant| tenant.stand == Stand::Throttled);
            let release = held
                .filter_map(|tenant| tenant.limit)
                .map(|tag| tag.due())
                .min();
            let wanted = release.map_or(Pick::Idle, |until| Pick::Throttled {
                until: Nanos::from_nanos(u64::try_from(until).unwrap()),
            });
            assert_eq!(real, wanted);
            return;
        };
        let key = self.keys[&tenant];
        let chosen = &mut self.tenants[key];
        assert_eq!(chosen.stand, Stand::Runnable);
        match least_due {
            Some(due) => assert_eq!(chosen.reservation.map(|tag| tag.due()), Some(due)),
            None => assert_eq!(chosen.start, least_start),
        }
        let (reserved, quantum) = (least_due.is_some(), wide(self.config.quantum));
        if !reserved {
            self.virtual_time = self.virtual_time.max(chosen.start);
        }
        let edge = self.virtual_time + DEBT_QUANTA * quantum * chosen.slope();
        let shared = !reserved || chosen.start <= edge;
        chosen.start += if shared { quantum * chosen.slope() } else { 0 };
        if let (true, Some(tag)) = (reserved, &mut chosen.reservation) {
            tag.spend(quantum, self.now);
        }
        if let Some(tag) = &mut chosen.limit {
            tag.spend(quantum, self.now);
        }
        let [fresh, old, paused] = &chosen.lanes;
        let lane = if paused.jobs.is_empty() {
            let turn = !old.jobs.is_empty() && chosen.fresh_run >= FRESH_RUN;
            let lane = usize::from(fresh.jobs.is_empty() || turn);
            let counts = lane == 0 && !old.jobs.is_empty();
            chosen.fresh_run = if counts { chosen.fresh_run + 1 } else { 0 };
            lane
        } else {
            2
        };
        assert_eq!(chosen.lanes[lane].take(worker), (job, home));
        chosen.running += 1;
        let limited = chosen.limit.is_some();
        self.slices[worker.index()] = Some(RefSlice {
            key,
            job,
            home,
            reserved,
            shared,
            limited,
        });
        self.place(key);
        self.compare();
    }

    pub(crate) fn charge(&mut self, worker: WorkerId, used: Nanos, end: SliceEnd) {
        let real = self.real.charge(worker, used, end, self.now());
        let Some(slice) = self.slices[worker.index()].take() else {
            assert_eq!(real, Err(ChargeError::NoSlice(worker)));
            return;
        };
        let tenant = &mut self.tenants[slice.key];
        tenant.running -= 1;
        tenant.charged += used.as_nanos();
        self.charged += used.as_nanos();
        let (least, quantum) = (wide(used).max(1), wide(self.config.quantum));
        if slice.shared {
            tenant.start += (least - quantum) * tenant.slope();
        }
        if let (true, Some(tag)) = (slice.reserved, &mut tenant.reservation) {
            tag.at += (least - quantum) * tag.per;
        }
        if let Some(tag) = &mut tenant.limit {
            tag.at += (least - if slice.limited { quantum } else { 0 }) * tag.per;
        }
        self.last_finish = self.last_finish.max(tenant.start);
        let fate = match (end, tenant.removed) {
            (SliceEnd::Finished | SliceEnd::Blocked, _) => Fate::Released,
            (_, true) => Fate::Orphaned,
            (_, false) => {
                let again = (slice.job, slice.home);
                match end {
                    SliceEnd::Paused => tenant.lanes[2].jobs.push_back(again),
                    SliceEnd::Continued => tenant.lanes[1].jobs.push_front(again),
                    _ => tenant.lanes[1].jobs.push_back(again),
                }
                Fate::Requeued
            }
        };
        let real = real.unwrap();
        assert_eq!((real.job, real.fate), (slice.job, fate));
        self.place(slice.key);
        self.end_busy_period();
        self.compare();
    }

    /// Charges work beside jobs where it may be done, or nevertheless.
    pub(crate) fn aside(&mut self, id: TenantId, used: Nanos, nevertheless: bool) {
        let time = self.now();
        let answer = self.real.aside(id, time);
        let Some(&key) = self.keys.get(&id) else {
            assert!(answer.is_err());
            assert!(self.real.charge_aside(id, used, time).is_err());
            return;
        };
        let runnable: Vec<_> = (0..self.tenants.len())
            .filter(|other| *other != key && self.tenants[*other].stand == Stand::Runnable)
            .collect();
        let (now, virtual_time) = (self.now, self.virtual_time);
        let quantum = wide(self.config.quantum);
        let others_due = runnable
            .iter()
            .filter_map(|other| self.tenants[*other].reservation)
            .any(|tag| tag.due() <= now);
        let others_start = runnable
            .iter()
            .map(|other| self.tenants[*other].start)
            .min();
        let tenant = &mut self.tenants[key];
        let mut reservation = tenant.reservation;
        let mut start = tenant.start;
        if tenant.queued() + tenant.running == 0 {
            start = start.max(virtual_time);
            reservation = reservation.map(|tag| Tag {
                at: tag.at.max(2 * now),
                ..tag
            });
        }
        let due = reservation.is_some_and(|tag| tag.due() <= now);
        let release = tenant.limit.map_or(0, |tag| tag.due());
        let wanted = if release > now {
            Aside::Throttled {
                until: Nanos::from_nanos(u64::try_from(release).unwrap()),
            }
        } else if due || !(others_due || others_start.is_some_and(|other| other < start)) {
            Aside::Due
        } else {
            Aside::Ahead
        };
        assert_eq!(answer, Ok(wanted));
        if wanted != Aside::Due && !nevertheless {
            return;
        }
        self.real.charge_aside(id, used, time).unwrap();
        let own = (tenant.stand == Stand::Runnable).then_some(tenant.start);
        if !due {
            let first = others_start.into_iter().chain(own).fold(start, i128::min);
            self.virtual_time = self.virtual_time.max(first);
        }
        let least = wide(used).max(1);
        let edge = self.virtual_time + DEBT_QUANTA * quantum * tenant.slope();
        tenant.start = start;
        if !due || start <= edge {
            tenant.start += least * tenant.slope();
        }
        if let (true, Some(tag)) = (due, &mut tenant.reservation) {
            tag.spend(least, now);
        }
        if let Some(tag) = &mut tenant.limit {
            tag.spend(least, now);
        }
        tenant.charged += used.as_nanos();
        self.charged += used.as_nanos();
        self.last_finish = self.last_finish.max(tenant.start);
        self.place(key);
        self.end_busy_period();
        self.compare();
    }

    fn end_busy_period(&mut self) {
        let mut tenants = self.tenants.iter();
        if tenants.all(|tenant| tenant.queued() + tenant.running == 0) {
            self.virtual_time = self.virtual_time.max(self.last_finish);
        }
    }

    fn compare(&self) {
        let runnable = self
            .tenants
            .iter()
            .filter(|tenant| tenant.stand == Stand::Runnable);
        let runnable: usize = runnable.map(RefTenant::queued).sum();
        assert_eq!(self.real.runnable(), runnable);
        let queued: usize = self.tenants.iter().map(RefTenant::queued).sum();
        assert_eq!(self.real.queued_total(), queued);
        assert_eq!(self.real.reserved_millicores(), self.reserved());
        assert_eq!(self.real.totals().charged.as_nanos(), self.charged);
        for (&id, &key) in &self.keys {
            let tenant = &self.tenants[key];
            let account = self.real.account(id, self.now()).unwrap();
            assert_eq!(account.charged.as_nanos(), tenant.charged);
            assert_eq!(wide(account.waited), tenant.waited, "waited");
            assert_eq!(wide(account.throttled), tenant.throttled, "throttled");
            assert_eq!(self.real.queued(id), Some(tenant.queued()));
            assert_eq!(self.real.running(id), Some(tenant.running));
        }
    }
}
