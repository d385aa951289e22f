//! Every sequence of events up to a depth on a host of two tenants and two
//! workers, each answer checked against the reference.

use insula_scheduler::{Class, Config, JobId, Nanos, Params, SliceEnd};

use crate::model::Twin;
use crate::sim::{params, tenant_id, worker_id};

const QUANTUM: Nanos = Nanos::from_micros(100);

/// Small enough that limits and reservations bite within a few events.
fn config() -> Config {
    let mut config = Config::new(2);
    config.limit_burst = QUANTUM;
    config.reservation_window = Nanos::from_micros(150);
    config
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Enqueue(usize),
    Pick(usize),
    Charge(usize, u64, SliceEnd),
    Tick,
    Reweigh,
    Remove,
}

const EVENTS: [Event; 14] = [
    Event::Enqueue(0),
    Event::Enqueue(1),
    Event::Pick(0),
    Event::Pick(1),
    Event::Charge(0, 40, SliceEnd::Preempted),
    Event::Charge(0, 300, SliceEnd::Preempted),
    Event::Charge(0, 100, SliceEnd::Finished),
    Event::Charge(1, 40, SliceEnd::Preempted),
    Event::Charge(1, 300, SliceEnd::Continued),
    Event::Charge(1, 200, SliceEnd::Paused),
    Event::Charge(1, 100, SliceEnd::Blocked),
    Event::Tick,
    Event::Reweigh,
    Event::Remove,
];

fn possible(twin: &Twin, event: Event) -> bool {
    match event {
        Event::Pick(worker) => !twin.open(worker_id(worker)),
        Event::Charge(worker, ..) => twin.open(worker_id(worker)),
        Event::Reweigh | Event::Remove => twin.real.params(tenant_id(0)).is_some(),
        Event::Enqueue(tenant) => twin.real.params(tenant_id(tenant)).is_some(),
        Event::Tick => true,
    }
}

fn happen(twin: &mut Twin, event: Event, depth: u64) {
    match event {
        Event::Enqueue(tenant) => {
            let home = worker_id(usize::try_from(depth % 2).unwrap());
            twin.enqueue(tenant_id(tenant), JobId::new(depth), home, Class::Fresh);
        }
        Event::Pick(worker) => twin.pick(worker_id(worker)),
        Event::Charge(worker, micros, end) => {
            twin.charge(worker_id(worker), Nanos::from_micros(micros), end);
        }
        Event::Tick => twin.tick(QUANTUM),
        Event::Reweigh => {
            let old = twin.real.params(tenant_id(0)).unwrap();
            let shares = if old.shares.get() == 8 { 1 } else { 8 };
            twin.set(
                tenant_id(0),
                Params {
                    shares: params(shares, 0, 0).shares,
                    ..old
                },
            );
        }
        Event::Remove => twin.remove(tenant_id(0)),
    }
}

fn explore(twin: &Twin, depth: u64, visited: &mut u64) {
    *visited += 1;
    if depth == 0 {
        return;
    }
    for event in EVENTS {
        if possible(twin, event) {
            let mut next = twin.clone();
            happen(&mut next, event, depth);
            explore(&next, depth - 1, visited);
        }
    }
}

fn explore_with(first: Params, second: Params) {
    let mut twin = Twin::new(config());
    twin.add(tenant_id(0), first);
    twin.add(tenant_id(1), second);
    // Two jobs each, so that the interesting part is near.
    for job in 0..4 {
        twin.enqueue(
            tenant_id(job % 2),
            JobId::new(1_000),
            worker_id(job / 2),
            Class::Fresh,
        );
    }
    let depth = if cfg!(debug_assertions) { 5 } else { 7 };
    let mut visited = 0;
    explore(&twin, depth, &mut visited);
    assert!(visited > 10_000, "only {visited} states");
}

#[test]
fn every_sequence_with_shares_only() {
    explore_with(params(1, 0, 0), params(2, 0, 0));
}

#[test]
fn every_sequence_with_a_limit_and_a_reservation() {
    explore_with(params(1, 0, 500), params(2, 500, 0));
}

#[test]
fn every_sequence_with_everything_on_one_tenant() {
    explore_with(params(4, 500, 1_000), params(1, 1_000, 2_000));
}
