//! Distance from the ideal fluid (generalised processor sharing), whose lag is
//! fluid service − real service.
//!
//! For equal weights start-time fair queueing keeps |lag| ≤ (W+1) longest
//! slices. For unequal weights no such bound exists: many light tenants may
//! stand at one tag and be served before a heavy one. What follows from the
//! pairwise bound, with b of `meters::stray`, is
//! |lag_i| ≤ b_i + w_i·Σ_j b_j / Σ_j w_j.

use crate::habit::Habit;
use crate::meters::{fluid_rates, stray};
use crate::prng::{Prng, for_each_seed};
use crate::sim::{World, nanos_f64, params};

/// Hogs from the seed; returns the world and each one's (weight, jobs).
fn hogs(seed: u64, weights: &[u32], enough_jobs: bool) -> (World, Vec<(u32, usize)>) {
    let mut prng = Prng::new(seed);
    let workers = prng.choose(&[1, 2, 3, 4, 8]);
    let mut world = World::new(workers, seed);
    let tenants = prng.within(2, 30);
    let mut wants = Vec::new();
    for _ in 0..tenants {
        let weight = prng.choose(weights);
        let some = usize::try_from(prng.within(1, 6)).unwrap();
        let jobs = if enough_jobs { workers + some } else { some };
        let habit = prng.choose(&[
            Habit::Hog {
                least: 100,
                most: 100,
            },
            Habit::Hog {
                least: 1,
                most: 100,
            },
            Habit::Hog {
                least: 90,
                most: 300,
            },
        ]);
        world.add(params(weight, 0, 0), habit, jobs);
        wants.push((weight, jobs));
    }
    (world, wants)
}

/// Runs, and holds every tenant's |lag| against its bound after every step.
fn assert_near_fluid(world: &mut World, wants: &[(u32, usize)], bounds: &[f64]) {
    let rates = fluid_rates(world.config.workers, wants);
    for _ in 0..6_000 {
        world.step();
        for (tenant, rate) in rates.iter().enumerate() {
            let served = nanos_f64(u64::try_from(world.service(tenant)).unwrap());
            let lag = rate * nanos_f64(world.now) - served;
            assert!(
                lag.abs() <= bounds[tenant] + 1.0,
                "tenant {tenant} of {wants:?}: lag {lag}, bound {}",
                bounds[tenant]
            );
        }
    }
}

const LONGEST: u64 = 300_000;

#[test]
fn equal_tenants_stay_within_workers_plus_one_slices_of_the_fluid() {
    for_each_seed(60, |seed| {
        let (mut world, wants) = hogs(seed, &[1_000], true);
        let workers = u64::try_from(world.config.workers).unwrap();
        let bound = nanos_f64((workers + 1) * LONGEST);
        let bounds = vec![bound; wants.len()];
        assert_near_fluid(&mut world, &wants, &bounds);
    });
}

fn derived_bounds(world: &World, wants: &[(u32, usize)]) -> Vec<f64> {
    let quantum = world.config.quantum.as_nanos();
    let b = stray(world.config.workers, LONGEST, quantum);
    let b = nanos_f64(u64::try_from(b).unwrap());
    let total: f64 = wants.iter().map(|want| f64::from(want.0)).sum();
    let count = f64::from(u32::try_from(wants.len()).unwrap());
    wants
        .iter()
        .map(|want| b + f64::from(want.0) * count * b / total)
        .collect()
}

#[test]
fn unequal_tenants_stay_within_the_derived_bound() {
    for_each_seed(60, |seed| {
        let (mut world, wants) = hogs(seed, &[1, 10, 500, 1_000, 2_000, 40_000], true);
        let bounds = derived_bounds(&world, &wants);
        assert_near_fluid(&mut world, &wants, &bounds);
    });
}

/// With few jobs a tenant cannot use its weight; the fluid is the one with the
/// weights readjusted. A tenant that is due almost as many cores as it has jobs
/// can hardly catch up what it waits for the ends of others' slices; without
/// the small credit for that (`CREDIT_QUANTA`) some here lose 14 %.
#[test]
fn tenants_with_few_jobs_stay_near_the_clamped_fluid() {
    for_each_seed(60, |seed| {
        let (mut world, wants) = hogs(seed, &[100, 1_000, 3_000], false);
        let jobs: usize = wants.iter().map(|want| want.1).sum();
        if jobs <= world.config.workers {
            return;
        }
        let rates = fluid_rates(world.config.workers, &wants);
        world.run_for(2_000);
        let bounds = derived_bounds(&world, &wants);
        for (tenant, rate) in rates.iter().enumerate() {
            let served = nanos_f64(u64::try_from(world.service(tenant)).unwrap());
            let fluid = rate * nanos_f64(world.now);
            let lag = (fluid - served).abs();
            assert!(
                lag <= bounds[tenant] + 0.01 * fluid,
                "W={}: tenant {tenant} of {wants:?}: served {served} of {fluid}",
                world.config.workers
            );
        }
    });
}
