//! What an operator would measure.

use crate::habit::Habit;
use crate::meters::jain;
use crate::sim::{World, params};

const HOG: Habit = Habit::Hog {
    least: 80,
    most: 100,
};

/// Rates in cores over `millis` after a warm-up.
fn rates(world: &mut World, millis: u64) -> Vec<f64> {
    world.run_for(20);
    let marks: Vec<_> = (0..world.tenants.len())
        .map(|tenant| world.mark(tenant))
        .collect();
    world.run_for(millis);
    marks
        .iter()
        .enumerate()
        .map(|(tenant, &mark)| world.rate_since(tenant, mark))
        .collect()
}

fn assert_near(what: &str, measured: f64, wanted: f64, tolerance: f64) {
    let off = (measured - wanted).abs() / wanted;
    assert!(
        off <= tolerance,
        "{what}: {measured:.4}, wanted {wanted:.4} within {tolerance}"
    );
}

#[test]
fn shares_of_1_2_4() {
    for workers in [1, 2, 4, 8] {
        let mut world = World::new(workers, 1);
        for shares in [500, 1_000, 2_000] {
            world.add(params(shares, 0, 0), HOG, 2 * workers);
        }
        let rates = rates(&mut world, 2_000);
        assert_near("1:2", rates[1] / rates[0], 2.0, 0.01);
        assert_near("1:4", rates[2] / rates[0], 4.0, 0.01);
    }
}

#[test]
fn shares_of_1000_3000_whatever_the_slices() {
    for workers in [1, 2, 4] {
        for habit in [
            HOG,
            Habit::Storm,
            Habit::Shorts,
            Habit::Yielder,
            Habit::Traps,
        ] {
            let mut world = World::new(workers, 2);
            world.add(params(1_000, 0, 0), HOG, 3 * workers);
            world.add(params(3_000, 0, 0), habit, 3 * workers);
            let rates = rates(&mut world, 8_000);
            assert_near("1:3", rates[1] / rates[0], 3.0, 0.01);
        }
    }
}

#[test]
fn a_limit_of_250m_holds_on_an_idle_host() {
    for (workers, habit, jobs) in [
        (1, HOG, 1),
        (4, HOG, 8),
        (2, Habit::Shorts, 100),
        (2, Habit::Storm, 4),
        (4, Habit::Traps, 9),
    ] {
        let mut world = World::new(workers, 3);
        world.add(params(1_000, 0, 250), habit, jobs);
        world.run_for(200);
        let rates = rates(&mut world, 8_000);
        assert_near("250m", rates[0], 0.25, 0.01);
        world.check_accounts();
    }
}

#[test]
fn a_reservation_of_500m_is_met_beside_50_hogs() {
    for workers in [1, 2, 4] {
        // One job is enough for half a core, and its shares are worth nothing.
        for (jobs, shares) in [(1, 1), (8, 1), (8, 1_000)] {
            let mut world = World::new(workers, 4);
            world.add(params(shares, 500, 0), HOG, jobs);
            for _ in 0..50 {
                world.add(params(1_000, 0, 0), HOG, 4);
            }
            let rates = rates(&mut world, 2_000);
            assert_near("500m", rates[0], 0.5, 0.02);
        }
    }
}

/// mClock's point: what a tenant got while the host was quiet is not held
/// against its guarantee when the hogs come; and when its guarantee is lowered
/// it falls back to its share, not below.
#[test]
fn a_reservation_neither_remembers_nor_starves() {
    let mut world = World::new(1, 5);
    world.add(params(100, 500, 0), HOG, 2);
    world.run_for(5_000);
    for _ in 0..9 {
        world.add(params(100, 0, 0), HOG, 2);
    }
    let mark = world.mark(0);
    world.run_for(200);
    assert_near("at once", world.rate_since(0, mark), 0.5, 0.02);
    world.run_for(5_000);
    world.set_params(0, params(100, 0, 0));
    world.run_for(40);
    let mark = world.mark(0);
    world.run_for(500);
    assert_near("its share", world.rate_since(0, mark), 0.1, 0.03);
}

#[test]
fn a_hundred_equal_tenants_are_equal() {
    for workers in [2, 4] {
        let mut world = World::new(workers, 6);
        for tenant in 0..100 {
            let habit = match tenant % 5 {
                0 => HOG,
                1 => Habit::Hog {
                    least: 1,
                    most: 100,
                },
                2 => Habit::Shorts,
                3 => Habit::Storm,
                _ => Habit::Hog {
                    least: 100,
                    most: 200,
                },
            };
            world.add(params(1_000, 0, 0), habit, 1 + tenant % 20);
        }
        let rates = rates(&mut world, 30_000);
        let index = jain(&rates);
        assert!(index >= 0.99, "Jain {index}");
    }
}

/// One job cannot use more than one core, whatever its weight, and the rest is
/// not owed to it.
#[test]
fn infeasible_weights_are_clamped_and_earn_no_credit() {
    let mut world = World::new(4, 7);
    let heavy = world.add(params(100_000, 0, 0), HOG, 1);
    let middle = world.add(params(100_000, 0, 0), HOG, 2);
    world.add(params(1, 0, 0), HOG, 8);
    let light = world.add(params(3, 0, 0), HOG, 8);
    let rates = rates(&mut world, 2_000);
    assert_near("one job", rates[0], 1.0, 0.01);
    assert_near("two jobs", rates[1], 2.0, 0.01);
    assert_near("the rest", rates[2], 0.25, 0.02);
    assert_near("the rest", rates[3], 0.75, 0.02);

    // Back to a weight that it can use, in the middle of a long run: were the
    // clamp missing, it would now collect the debts of 2 s.
    world.set_params(heavy, params(3, 0, 0));
    world.set_params(middle, params(3, 0, 0));
    let mark = world.mark(light);
    world.run_for(500);
    // 3:3:1:3 of four cores, and the heavy one still has one job only: 1 is
    // clamped, the others share 3 cores by 3:1:3.
    assert_near(
        "its share again",
        world.rate_since(light, mark),
        9.0 / 7.0,
        0.02,
    );
}

/// Sleeping earns nothing: a tenant that slept for a second and comes with many
/// jobs gets its share from the first slice, not a second's worth.
#[test]
fn sleepers_hoard_nothing() {
    let mut world = World::new(2, 8);
    let hog = world.add(params(1_000, 0, 0), HOG, 4);
    world.add(
        params(1_000, 0, 0),
        Habit::Burst {
            every_us: 1_000_000,
            jobs: 400,
        },
        0,
    );
    world.run_for(990);
    let mark = world.mark(hog);
    world.run_for(110);
    let rate = world.rate_since(hog, mark);
    assert!(rate > 0.98, "the hog got {rate} of its core");
}

/// Nor does being held back: when the limit is lifted, what the tenant was not
/// allowed to use is not owed to it.
#[test]
fn the_throttled_hoard_nothing() {
    let mut world = World::new(1, 9);
    let hog = world.add(params(1_000, 0, 0), HOG, 4);
    let limited = world.add(params(1_000, 0, 100), HOG, 4);
    world.run_for(2_000);
    world.set_params(limited, params(1_000, 0, 0));
    let mark = world.mark(hog);
    world.run_for(200);
    assert_near("half", world.rate_since(hog, mark), 0.5, 0.02);
}

/// Ahead by 10 ms at weight 1 is 2.5 ms of virtual time at weight 4: the other
/// tenant then gets 2.5 ms (not 10, not 0) before the two alternate again.
#[test]
fn a_change_of_weight_keeps_the_lag() {
    use insula_scheduler::{Class, Config, JobId, Nanos, Pick, Scheduler, SliceEnd};

    use crate::sim::{tenant_id, worker_id};

    let quantum = 100_000;
    for (weight, wanted) in [(1, 10_000_000), (4, 2_500_000), (16, 625_000)] {
        let mut scheduler = Scheduler::new(Config::new(1)).unwrap();
        let worker = worker_id(0);
        for index in 0..2 {
            let job = JobId::new(u64::try_from(index).unwrap());
            scheduler
                .add_tenant(tenant_id(index), params(1, 0, 0), Nanos::ZERO)
                .unwrap();
            scheduler
                .enqueue(tenant_id(index), job, worker, Class::Fresh, Nanos::ZERO)
                .unwrap();
        }
        let mut now = 10_000_000;
        let first = scheduler.pick(worker, Nanos::ZERO).unwrap();
        assert!(matches!(first, Pick::Run { tenant, .. } if tenant == tenant_id(0)));
        let at = Nanos::from_nanos(now);
        scheduler
            .charge(worker, at, SliceEnd::Preempted, at)
            .unwrap();
        scheduler
            .set_params(tenant_id(0), params(weight, 0, 0), at)
            .unwrap();
        let mut other = 0;
        loop {
            let at = Nanos::from_nanos(now);
            let Pick::Run { tenant, .. } = scheduler.pick(worker, at).unwrap() else {
                panic!()
            };
            if tenant == tenant_id(0) {
                break;
            }
            now += quantum;
            other += quantum;
            let used = Nanos::from_nanos(quantum);
            scheduler
                .charge(worker, used, SliceEnd::Preempted, Nanos::from_nanos(now))
                .unwrap();
        }
        assert!(
            u64::abs_diff(other, wanted) <= quantum,
            "{other} instead of {wanted}"
        );
    }
}
