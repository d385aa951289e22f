//! Hostile workloads from a seed. After every step [`World`] checks charged =
//! busy, work conservation, limits and the waiting integrals; here: the
//! pairwise bound, reservations, starvation.

use crate::habit::Habit;
use crate::meters::{PairMeter, ReservationMeter, Wide, stray};
use crate::prng::for_each_seed;
use crate::sim::{World, params};

const STEPS: usize = 6_000;

struct Watch {
    /// Continuously queued tenants without reservation or limit.
    anchors: Vec<usize>,
    pairs: Vec<PairMeter>,
    reserved: Vec<(usize, ReservationMeter)>,
    /// Longest slice so far of each anchor, running ones included.
    worst_used: Wide,
}

/// A host with some of everything.
fn hostile(seed: u64) -> (World, Watch) {
    let mut world = World::new(1, seed);
    let workers = world.prng.choose(&[1, 2, 3, 4, 8]);
    world = World::new(workers, seed ^ 0x5eed);
    let mut anchors = Vec::new();
    for habit in [
        Habit::Hog {
            least: 80,
            most: 100,
        },
        Habit::Hog {
            least: 1,
            most: 100,
        },
        Habit::Storm,
        Habit::Hog {
            least: 100,
            most: 100,
        },
    ] {
        let shares = world.prng.choose(&[100, 500, 1_000, 1_000, 2_000, 3_000]);
        anchors.push(world.add(params(shares, 0, 0), habit, workers + 2));
    }
    let pairs = vec![PairMeter::new(); anchors.len() * anchors.len()];
    let mut reserved = Vec::new();
    let millicores = u32::try_from(workers).unwrap() * 300;
    for shares in [10, 1_000] {
        let habit = Habit::Hog {
            least: 50,
            most: 100,
        };
        let tenant = world.add(params(shares, millicores, 0), habit, workers + 2);
        reserved.push((tenant, ReservationMeter::new(millicores, 0)));
    }
    for rank in 1..=12 {
        // Zipf: the tenant of rank r is asked 1/r as often.
        let every_us = 40 * rank;
        let habit = match world.prng.within(0, 6) {
            0 => Habit::Yielder,
            1 => Habit::Shorts,
            2 => Habit::Burst {
                every_us: 100 * every_us,
                jobs: 64,
            },
            3 => Habit::Storm,
            4 => Habit::Traps,
            _ => Habit::Service { every_us },
        };
        let shares = world.prng.choose(&[100, 1_000, 1_000, 2_000]);
        let limit = world.prng.choose(&[0, 0, 50, 250, 1_500]);
        let jobs = usize::try_from(world.prng.within(1, 200)).unwrap();
        world.add(params(shares, 0, limit), habit, jobs);
    }
    (
        world,
        Watch {
            anchors,
            pairs,
            reserved,
            worst_used: 0,
        },
    )
}

impl Watch {
    fn observe(&mut self, world: &World) {
        let quantum = world.config.quantum.as_nanos();
        // A running slice's final length is decided when it starts; the storm's
        // bound is its known worst.
        let longest = |tenant: usize| match world.tenants[tenant].habit {
            Habit::Storm => 100 * quantum,
            _ => quantum,
        };
        let state = |tenant: usize| {
            let stray = stray(world.config.workers, longest(tenant), quantum);
            (
                world.service(tenant),
                world.tenants[tenant].params.shares.get(),
                stray,
            )
        };
        let count = self.anchors.len();
        for (first, &a) in self.anchors.iter().enumerate() {
            for (second, &b) in self.anchors.iter().enumerate().skip(first + 1) {
                let used = self.pairs[first * count + second].observe(state(a), state(b));
                self.worst_used = self.worst_used.max(used);
            }
        }
        let workers = Wide::try_from(world.config.workers).unwrap();
        let slack = (workers + 2) * Wide::from(100 * quantum);
        for (tenant, meter) in &mut self.reserved {
            meter.observe(world.service(*tenant), world.now, slack);
        }
    }
}

/// The longest that an unlimited tenant may go without a pick. While it waits,
/// virtual time moves at most b_i/w_i; each other tenant j gets at most
/// w_j·b_i/w_i + 2·b_j by shares in that time, and its reservation.
fn hunger_bound(world: &World, tenant: usize) -> f64 {
    let config = world.config;
    let quantum = config.quantum.as_nanos();
    let worst = |_| stray(config.workers, 100 * quantum, quantum);
    let own = &world.tenants[tenant].params;
    let wide = |value: Wide| crate::sim::nanos_f64(u64::try_from(value).unwrap());
    let distance = wide(worst(tenant)) / f64::from(own.shares.get());
    let workers = f64::from(u32::try_from(config.workers).unwrap());
    let (mut work, mut reserved) = (0.0, 0.0);
    for (other, entry) in world
        .tenants
        .iter()
        .enumerate()
        .filter(|&(other, _)| other != tenant)
    {
        work += f64::from(entry.params.shares.get()) * distance + 2.0 * wide(worst(other));
        if let Some(rate) = entry.params.reservation {
            reserved += f64::from(rate.get()) / 1_000.0;
        }
    }
    work += reserved * crate::sim::nanos_f64(config.reservation_window.as_nanos());
    work / (workers - reserved)
}

#[test]
fn hostile_streams_break_no_promise() {
    for_each_seed(48, |seed| {
        let (mut world, mut watch) = hostile(seed);
        for _ in 0..STEPS {
            world.step();
            watch.observe(&world);
        }
        for index in 0..world.tenants.len() {
            let entry = &world.tenants[index];
            if entry.params.limit.is_none() {
                let waiting = if entry.queued > 0 {
                    world.now - entry.hungry_since
                } else {
                    0
                };
                let hunger = crate::sim::nanos_f64(entry.longest_hunger.max(waiting));
                let bound = hunger_bound(&world, index);
                assert!(
                    hunger <= bound,
                    "tenant {index} starved: {hunger} of {bound}"
                );
            }
        }
    });
}

/// Some tenants, one of the anchors among them, have work beside their jobs whenever they may.
#[test]
fn work_beside_jobs_breaks_no_promise() {
    for_each_seed(24, |seed| {
        let (mut world, mut watch) = hostile(seed ^ 0xa51de);
        for tenant in [0, 5, 9, 14] {
            world.tenants[tenant].aside = true;
        }
        for _ in 0..STEPS {
            world.step();
            watch.observe(&world);
        }
        world.check_accounts();
        let anchor = &world.tenants[0];
        assert!(anchor.charged > 0 && anchor.picks > 0, "{anchor:?}");
    });
}

/// The pairwise bound must be close to what really happens, or it proves
/// nothing: somewhere a third of it is used.
#[test]
fn the_pairwise_bound_is_not_vacuous() {
    let mut worst = 0;
    for seed in 0..12 {
        let (mut world, mut watch) = hostile(seed);
        for _ in 0..STEPS {
            world.step();
            watch.observe(&world);
        }
        worst = worst.max(watch.worst_used);
    }
    assert!(worst > 333, "at most {worst} of 1000 used");
}

/// Parameters of everybody but the anchors change all the time.
#[test]
fn changing_other_tenants_breaks_no_promise() {
    for_each_seed(16, |seed| {
        let (mut world, mut watch) = hostile(seed ^ 0xc0de);
        watch.reserved.clear();
        for step in 0..STEPS {
            world.step();
            watch.observe(&world);
            if step % 7 == 0 {
                let last = u64::try_from(world.tenants.len()).unwrap() - 1;
                let tenant = usize::try_from(world.prng.within(4, last)).unwrap();
                let shares = world.prng.choose(&[1, 100, 1_000, 1_000_000]);
                let reservation = if world.prng.one_in(2) { 10 } else { 0 };
                let old = world.tenants[tenant]
                    .params
                    .limit
                    .map_or(0, |limit| limit.get());
                let limit = if old == 0 {
                    0
                } else {
                    world.prng.choose(&[old, 50, 250, 4_000])
                };
                world.set_params(tenant, params(shares, reservation, limit));
            }
        }
        world.check_accounts();
    });
}

#[test]
fn a_seed_replays_bit_for_bit() {
    let run = |seed| {
        let (mut world, _) = hostile(seed);
        (0..STEPS).for_each(|_| world.step());
        let served: Vec<u64> = world.tenants.iter().map(|tenant| tenant.charged).collect();
        (world.now, served)
    };
    assert_eq!(run(5), run(5));
    assert_ne!(run(5), run(6));
}
