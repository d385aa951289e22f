//! Random use of the whole API, misuse included, against the reference; and
//! the answers at the edges.

use insula_scheduler::{
    AddError, Class, Config, ConfigError, EnqueueError, Fate, JobId, Nanos, NoSuchWorker, Params,
    ParamsError, Pick, PickError, Scheduler, Shares, SliceEnd,
};
use proptest::prelude::*;

use crate::model::Twin;
use crate::sim::{params, tenant_id, worker_id};

#[derive(Clone, Debug)]
enum Op {
    Add(usize, Params),
    Set(usize, Params),
    Remove(usize),
    Enqueue(usize, u64, usize, Class),
    Cancel(usize, u64),
    Pick(usize),
    Charge(usize, u64, SliceEnd),
    Aside(usize, u64, bool),
    Tick(u64),
}

const TENANTS: usize = 4;
const WORKERS: usize = 3;

/// Powers of two, for the reference's sake.
fn some_params() -> impl Strategy<Value = Params> {
    let shares = prop::sample::select(vec![1_u32, 2, 64, 1_024, 65_536]);
    let reservation = prop::sample::select(vec![0_u32, 0, 125, 500, 1_000, 2_000]);
    let limit = prop::sample::select(vec![0_u32, 0, 125, 250, 1_000, 2_000]);
    (shares, reservation, limit).prop_map(|(s, r, l)| params(s, r, l))
}

fn some_op() -> impl Strategy<Value = Op> {
    let end = prop::sample::select(vec![
        SliceEnd::Finished,
        SliceEnd::Blocked,
        SliceEnd::Preempted,
        SliceEnd::Preempted,
    ]);
    let class = prop::sample::select(vec![Class::Fresh, Class::Woken]);
    let used = || prop_oneof![Just(0_u64), 1_u64..200_000, 100_000_u64..10_000_000];
    let by = prop_oneof![0_u64..1_000, 1_000_u64..400_000, 1_000_000_u64..50_000_000];
    prop_oneof![
        1 => (0..TENANTS, some_params()).prop_map(|(t, p)| Op::Add(t, p)),
        2 => (0..TENANTS, some_params()).prop_map(|(t, p)| Op::Set(t, p)),
        1 => (0..TENANTS).prop_map(Op::Remove),
        12 => (0..TENANTS, 0_u64..100, 0..WORKERS, class)
            .prop_map(|(t, j, w, c)| Op::Enqueue(t, j, w, c)),
        2 => (0..TENANTS, 0_u64..100).prop_map(|(t, j)| Op::Cancel(t, j)),
        12 => (0..WORKERS).prop_map(Op::Pick),
        10 => (0..WORKERS, used(), end).prop_map(|(w, u, e)| Op::Charge(w, u, e)),
        4 => (0..TENANTS, used(), any::<bool>()).prop_map(|(t, u, n)| Op::Aside(t, u, n)),
        6 => by.prop_map(Op::Tick),
    ]
}

fn apply(twin: &mut Twin, op: Op) {
    match op {
        Op::Add(tenant, params) => twin.add(tenant_id(tenant), params),
        Op::Set(tenant, params) => twin.set(tenant_id(tenant), params),
        Op::Remove(tenant) => twin.remove(tenant_id(tenant)),
        Op::Enqueue(tenant, job, home, class) => {
            twin.enqueue(tenant_id(tenant), JobId::new(job), worker_id(home), class);
        }
        Op::Cancel(tenant, job) => twin.cancel(tenant_id(tenant), JobId::new(job)),
        Op::Pick(worker) => twin.pick(worker_id(worker)),
        Op::Charge(worker, used, end) => {
            twin.charge(worker_id(worker), Nanos::from_nanos(used), end);
        }
        Op::Aside(tenant, used, nevertheless) => {
            twin.aside(tenant_id(tenant), Nanos::from_nanos(used), nevertheless);
        }
        Op::Tick(by) => twin.tick(Nanos::from_nanos(by)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_use_agrees_with_the_reference(
        first in some_params(),
        ops in prop::collection::vec(some_op(), 1..300),
    ) {
        let mut twin = Twin::new(Config::new(WORKERS));
        twin.add(tenant_id(0), first);
        twin.add(tenant_id(1), params(1_024, 0, 0));
        for op in ops {
            apply(&mut twin, op);
        }
    }

    #[test]
    fn extreme_times_and_weights_do_not_overflow(
        shares in prop::sample::select(vec![1, Shares::MAX]),
        rate in prop::sample::select(vec![1, 1_000]),
        used in prop::sample::select(vec![0, 1, u64::MAX / 2, u64::MAX]),
        at in prop::sample::select(vec![0, 1, u64::MAX / 2, u64::MAX]),
    ) {
        let mut config = Config::new(1);
        config.limit_burst = Nanos::MAX;
        config.reservation_window = Nanos::MAX;
        let mut scheduler = Scheduler::new(config).unwrap();
        let (tenant, worker, now) = (tenant_id(0), worker_id(0), Nanos::from_nanos(at));
        scheduler.add_tenant(tenant, params(shares, rate, rate), now).unwrap();
        scheduler.enqueue(tenant, JobId::new(1), worker, Class::Fresh, now).unwrap();
        for shares in [Shares::MAX, 1, shares] {
            if matches!(scheduler.pick(worker, now).unwrap(), Pick::Run { .. }) {
                let used = Nanos::from_nanos(used);
                scheduler.charge(worker, used, SliceEnd::Preempted, now).unwrap();
            }
            scheduler.set_params(tenant, params(shares, 0, 1_000), now).unwrap();
            scheduler.set_params(tenant, params(shares, 1_000, 0), Nanos::MAX).unwrap();
        }
        prop_assert_eq!(scheduler.queued(tenant), Some(1));
    }
}

#[test]
fn a_removed_tenants_last_slice_is_counted_and_its_job_orphaned() {
    let mut scheduler = Scheduler::new(Config::new(1)).unwrap();
    let (tenant, worker) = (tenant_id(7), worker_id(0));
    scheduler
        .add_tenant(tenant, Params::default(), Nanos::ZERO)
        .unwrap();
    for job in [1, 2] {
        scheduler
            .enqueue(tenant, JobId::new(job), worker, Class::Fresh, Nanos::ZERO)
            .unwrap();
    }
    scheduler.pick(worker, Nanos::ZERO).unwrap();
    let removed = scheduler
        .remove_tenant(tenant, Nanos::from_micros(5))
        .unwrap();
    assert_eq!((removed.jobs, removed.running), (vec![JobId::new(2)], 1));
    assert_eq!(removed.account.waited, Nanos::from_micros(5));
    // The name is free at once, and the newcomer is not charged.
    scheduler
        .add_tenant(tenant, Params::default(), Nanos::from_micros(6))
        .unwrap();
    let now = Nanos::from_micros(9);
    let charged = scheduler
        .charge(worker, now, SliceEnd::Preempted, now)
        .unwrap();
    assert_eq!(
        (charged.tenant, charged.job, charged.fate),
        (tenant, JobId::new(1), Fate::Orphaned)
    );
    assert_eq!(scheduler.totals().charged, now);
    assert_eq!(scheduler.account(tenant, now).unwrap().charged, Nanos::ZERO);
}

/// The pick charged a quantum to a limit that has since been replaced: the new
/// one gets the whole slice.
#[test]
fn a_limit_set_anew_during_a_slice_is_charged_all_of_it() {
    let mut scheduler = Scheduler::new(Config::new(1)).unwrap();
    let (tenant, worker, now) = (tenant_id(0), worker_id(0), Nanos::ZERO);
    scheduler
        .add_tenant(tenant, params(1, 0, 250), now)
        .unwrap();
    scheduler
        .enqueue(tenant, JobId::new(1), worker, Class::Fresh, now)
        .unwrap();
    scheduler.pick(worker, now).unwrap();
    scheduler.set_params(tenant, params(1, 0, 0), now).unwrap();
    scheduler
        .set_params(tenant, params(1, 0, 250), now)
        .unwrap();
    // 50 µs beyond the burst of 10 ms take 200 µs at a quarter of a core.
    let used = Nanos::from_micros(10_050);
    scheduler
        .charge(worker, used, SliceEnd::Preempted, now)
        .unwrap();
    let until = Nanos::from_micros(200);
    assert_eq!(scheduler.pick(worker, now), Ok(Pick::Throttled { until }));
}

#[test]
fn refusals_carry_the_numbers_and_change_nothing() {
    let mut scheduler = Scheduler::new(Config {
        queued_max: 1,
        tenants_max: 2,
        ..Config::new(1)
    })
    .unwrap();
    let now = Nanos::ZERO;
    scheduler
        .add_tenant(tenant_id(0), params(1, 800, 0), now)
        .unwrap();
    let asked = params(1, 300, 0);
    let overcommitted = ParamsError::Overcommitted {
        asked: asked.reservation.unwrap(),
        free_millicores: 200,
    };
    assert_eq!(
        scheduler.add_tenant(tenant_id(1), asked, now),
        Err(AddError::Params(overcommitted))
    );
    let above = params(1, 100, 50);
    assert!(matches!(
        scheduler.set_params(tenant_id(0), above, now),
        Err(insula_scheduler::SetError::Params(
            ParamsError::ReservationAboveLimit { .. }
        ))
    ));
    scheduler
        .add_tenant(tenant_id(1), params(1, 200, 0), now)
        .unwrap();
    assert_eq!(
        scheduler.add_tenant(tenant_id(2), params(1, 0, 0), now),
        Err(AddError::TooMany { limit: 2 })
    );
    let no_worker = NoSuchWorker {
        worker: worker_id(1),
        workers: 1,
    };
    let mut enqueue = |home| {
        scheduler.enqueue(
            tenant_id(0),
            JobId::new(1),
            worker_id(home),
            Class::Fresh,
            now,
        )
    };
    assert_eq!(enqueue(1), Err(EnqueueError::NoSuchWorker(no_worker)));
    assert_eq!(enqueue(0).unwrap().runnable, 1);
    assert_eq!(enqueue(0), Err(EnqueueError::Full { limit: 1 }));
    assert_eq!(
        scheduler.pick(worker_id(1), now),
        Err(PickError::NoSuchWorker(no_worker))
    );
    assert_eq!(
        Scheduler::new(Config::new(0)).unwrap_err(),
        ConfigError::Workers { given: 0 }
    );
}

/// Local first, then the oldest; fresh before preempted; but neither rule may
/// hold a job for ever.
#[test]
fn inside_a_tenant_no_job_waits_for_ever() {
    let mut scheduler = Scheduler::new(Config::new(2)).unwrap();
    let (tenant, now) = (tenant_id(0), Nanos::ZERO);
    scheduler
        .add_tenant(tenant, Params::default(), now)
        .unwrap();
    let add = |scheduler: &mut Scheduler, job, home| {
        let (job, home) = (JobId::new(job), worker_id(home));
        scheduler
            .enqueue(tenant, job, home, Class::Fresh, now)
            .unwrap();
    };
    let run = |scheduler: &mut Scheduler, end| {
        let Pick::Run { job, .. } = scheduler.pick(worker_id(0), now).unwrap() else {
            panic!()
        };
        scheduler
            .charge(worker_id(0), Nanos::from_micros(1), end, now)
            .unwrap();
        job.get()
    };
    add(&mut scheduler, 0, 0);
    assert_eq!(
        run(&mut scheduler, SliceEnd::Preempted),
        0,
        "now the only preempted one"
    );
    add(&mut scheduler, 1, 1);
    let mut order = Vec::new();
    for job in 2..100 {
        add(&mut scheduler, job, 0);
        order.push(run(&mut scheduler, SliceEnd::Finished));
    }
    assert_eq!(order[0], 2, "the local one, though job 1 is older");
    assert_eq!(
        order.iter().position(|&job| job == 1),
        Some(16),
        "passed over 16 times"
    );
    assert_eq!(
        order.iter().position(|&job| job == 0),
        Some(32),
        "after 32 fresh ones"
    );
}
