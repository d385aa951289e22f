use insula_types::quantity::Millicores;

use super::*;

const ONE: TenantId = TenantId::new(1);
const TWO: TenantId = TenantId::new(2);
const MS: Nanos = Nanos::from_millis(1);
/// Far away.
const NEVER: Nanos = Nanos::from_secs(3_600);

fn key(number: u32) -> JobKey {
    JobKey::new(number, 0)
}

fn spec(in_flight: u32, queued: u32) -> TenantSpec {
    let mut spec = TenantSpec::default();
    spec.requests.in_flight = in_flight;
    spec.requests.queued = queued;
    spec
}

fn ms(millis: u64) -> Nanos {
    Nanos::from_millis(millis)
}

fn desk(in_flight: u32, queued: u32) -> Admission {
    let mut desk = Admission::new(1_000, 2_000);
    desk.set(ONE, &spec(in_flight, queued));
    desk
}

/// A request that has nothing against waiting.
fn ask(desk: &mut Admission, id: TenantId, number: u32, at: Nanos) -> Result<Arrival, Shed> {
    let arrival = desk.arrive(id, at, NEVER)?;
    if arrival == Arrival::Waits {
        desk.wait(id, key(number), at);
    }
    Ok(arrival)
}

#[test]
fn places_then_a_queue_then_a_refusal() {
    let mut desk = desk(2, 1);
    assert_eq!(ask(&mut desk, ONE, 0, MS), Ok(Arrival::Runs));
    assert_eq!(ask(&mut desk, ONE, 1, MS), Ok(Arrival::Runs));
    assert_eq!(ask(&mut desk, ONE, 2, MS), Ok(Arrival::Waits));
    let refused = ask(&mut desk, ONE, 3, ms(2)).unwrap_err();
    assert!(
        matches!(
            refused,
            Shed::TenantFull {
                running: 2,
                waiting: 1,
                ..
            }
        ),
        "{refused}"
    );
    assert_eq!(refused.retry_after(), Some(1));
    let freed = desk.depart(ONE, MS, ms(3));
    assert_eq!(freed.next, Some(key(2)));
    assert_eq!((freed.refused.len(), desk.jobs()), (0, 2));
    for _ in 0..2 {
        let freed = desk.depart(ONE, MS, ms(4));
        assert_eq!((freed.next, freed.refused.len()), (None, 0));
    }
    assert_eq!((desk.jobs(), desk.house.active_shares), (0, 0));
}

#[test]
fn a_short_queue_is_first_in_first_out_and_a_standing_one_is_not() {
    let mut desk = desk(1, 100);
    assert_eq!(ask(&mut desk, ONE, 0, ms(0)), Ok(Arrival::Runs));
    for number in 1..=20 {
        assert_eq!(ask(&mut desk, ONE, number, ms(1)), Ok(Arrival::Waits));
    }
    // One place every 10 ms; nobody is refused before the queue has stood for 100.
    for number in 1..=10 {
        let freed = desk.depart(ONE, ms(10), ms(1 + 10 * u64::from(number)));
        assert_eq!((freed.next, freed.refused.len()), (Some(key(number)), 0));
    }
    // Now it stands. The ten that are left have waited for 110 ms.
    let late = ask(&mut desk, ONE, 99, ms(110)).unwrap_err();
    assert!(matches!(late, Shed::TenantBehind { .. }), "{late}");
    let freed = desk.depart(ONE, ms(10), ms(111));
    assert_eq!(freed.refused, (11..=20).map(key).collect::<Vec<_>>());
    assert_eq!(freed.next, None);
    // For another 100 ms after that it takes nobody for whom there is no place soon,
    assert_eq!(ask(&mut desk, ONE, 30, ms(112)), Ok(Arrival::Runs));
    assert!(ask(&mut desk, ONE, 31, ms(210)).is_err());
    // and when nobody was refused for so long, all is forgotten.
    assert_eq!(ask(&mut desk, ONE, 32, ms(311)), Ok(Arrival::Waits));
}

#[test]
fn a_standing_queue_is_kept_short_and_serves_what_is_fresh() {
    let mut desk = desk(1, 100);
    assert_eq!(ask(&mut desk, ONE, 0, ms(0)), Ok(Arrival::Runs));
    // A place every millisecond, and two requests for it: the queue never gets empty.
    let (mut served, mut refused) = (Vec::new(), 0);
    let mut number = 0;
    for at in 1..1_000 {
        for _ in 0..2 {
            number += 1;
            refused += u32::from(ask(&mut desk, ONE, number, ms(at)).is_err());
        }
        let freed = desk.depart(ONE, MS, ms(at));
        refused += u32::try_from(freed.refused.len()).unwrap();
        served.extend(freed.next.map(|key| (at, key)));
    }
    // No place was left empty, half of them were refused, and who is served is fresh.
    assert_eq!(served.len(), 999);
    assert!((900..=1_000).contains(&refused), "{refused}");
    for (at, JobKey { .. }) in served.iter().filter(|(at, _)| *at > 200) {
        let now = desk.tenants[&ONE].waiting.len();
        assert!(now <= 6, "{now} wait at {at} ms");
    }
    let (at, last) = *served.last().unwrap();
    assert!(
        last >= key(2 * u32::try_from(at).unwrap() - 12),
        "{last:?} at {at}"
    );
}

#[test]
fn what_would_wait_past_its_deadline_is_refused_as_it_comes() {
    let mut desk = desk(1, 1_000);
    assert_eq!(ask(&mut desk, ONE, 0, ms(0)), Ok(Arrival::Runs));
    for number in 1..=5 {
        assert_eq!(ask(&mut desk, ONE, number, ms(0)), Ok(Arrival::Waits));
    }
    // Places come free every 20 ms.
    for at in [20, 40] {
        assert!(desk.depart(ONE, ms(20), ms(at)).next.is_some());
    }
    // Three wait, so the next would have to wait for 80 ms.
    let refused = desk.arrive(ONE, ms(40), ms(119)).unwrap_err();
    assert_eq!(
        refused,
        Shed::TooLate {
            wait: Duration::from_millis(80)
        }
    );
    assert_eq!(desk.arrive(ONE, ms(40), ms(120)), Ok(Arrival::Waits));
}

#[test]
fn places_that_never_come_free_are_seen_too() {
    let mut desk = desk(1, 1_000);
    assert_eq!(ask(&mut desk, ONE, 0, ms(0)), Ok(Arrival::Runs));
    assert_eq!(ask(&mut desk, ONE, 1, ms(0)), Ok(Arrival::Waits));
    // Nothing has come free for 50 ms: the second in line would wait for twice that at least.
    assert!(matches!(
        desk.arrive(ONE, ms(50), ms(149)),
        Err(Shed::TooLate { .. })
    ));
    assert_eq!(desk.arrive(ONE, ms(50), ms(150)), Ok(Arrival::Waits));
}

#[test]
fn a_tenant_of_long_requests_may_have_a_longer_queue() {
    let mut desk = desk(1, 1_000);
    // Each takes a second.
    for at in 0..20 {
        assert_eq!(ask(&mut desk, ONE, 0, ms(1_000 * at)), Ok(Arrival::Runs));
        desk.depart(ONE, ms(1_000), ms(1_000 * at + 999));
    }
    assert_eq!(ask(&mut desk, ONE, 1, ms(30_000)), Ok(Arrival::Runs));
    assert_eq!(ask(&mut desk, ONE, 2, ms(30_000)), Ok(Arrival::Waits));
    assert!(!desk.tenants[&ONE].stands(ms(31_900)));
    assert!(desk.tenants[&ONE].stands(ms(32_100)));
}

#[test]
fn a_rate_is_kept_and_says_when_to_come_again() {
    let mut desk = Admission::new(1_000, 2_000);
    let mut bounded = spec(100, 0);
    bounded.requests.per_second = Some(2);
    desk.set(ONE, &bounded);
    // One second is saved up.
    for _ in 0..3 {
        assert_eq!(ask(&mut desk, ONE, 0, ms(10)), Ok(Arrival::Runs));
    }
    let refused = ask(&mut desk, ONE, 0, ms(10)).unwrap_err();
    assert!(
        matches!(refused, Shed::TenantRate { per_second: 2, retry } if retry == Duration::from_millis(500))
    );
    assert_eq!(ask(&mut desk, ONE, 0, ms(510)), Ok(Arrival::Runs));
}

#[test]
fn the_hosts_last_places_are_for_those_who_have_few() {
    let mut desk = Admission::new(80, 2_000);
    for id in [ONE, TWO] {
        desk.set(id, &spec(1_000, 1_000));
    }
    assert_eq!(ask(&mut desk, TWO, 0, MS), Ok(Arrival::Runs));
    // One floods: it gets what is not kept back, and the rest waits.
    let ran = (0..200)
        .filter(|number| ask(&mut desk, ONE, *number, MS) == Ok(Arrival::Runs))
        .count();
    assert_eq!(ran, 69, "70 places but for the other's");
    // The other's requests still find places, up to its part.
    for number in 0..10 {
        assert_eq!(
            ask(&mut desk, TWO, 1_000 + number, ms(2)),
            Ok(Arrival::Runs)
        );
    }
    assert_eq!(
        ask(&mut desk, TWO, 1_010, ms(2)),
        Ok(Arrival::Waits),
        "all are taken"
    );
    // What the flood gives back goes to whoever has less than its part.
    let freed = desk.depart(ONE, MS, ms(3));
    assert_eq!(freed.next, Some(key(1_010)));
    assert_eq!(desk.tenants[&TWO].running, 12);
    // And to the flood again once nobody else wants it and the host is not pressed.
    for _ in 0..12 {
        desk.depart(TWO, MS, ms(4));
    }
    let (one, all) = (desk.tenants[&ONE].running, desk.house.taken);
    assert_eq!((one, all), (70, 70));
}

#[test]
fn a_reservation_keeps_places_too() {
    let mut desk = Admission::new(80, 2_000);
    let mut few = spec(1_000, 1_000);
    few.cpu.reservation = Some(Millicores::new(1_000).unwrap());
    few.cpu.shares = insula_types::quantity::Shares::new(1).unwrap();
    desk.set(ONE, &spec(1_000, 1_000));
    desk.set(TWO, &few);
    for id in [ONE, TWO] {
        assert_eq!(ask(&mut desk, id, 0, MS), Ok(Arrival::Runs));
    }
    assert_eq!(desk.house.part(&desk.tenants[&TWO]), 40);
}

#[test]
fn who_gives_up_is_told_whose_doing_it_was() {
    let mut desk = desk(1, 10);
    assert_eq!(ask(&mut desk, ONE, 0, MS), Ok(Arrival::Runs));
    assert_eq!(ask(&mut desk, ONE, 1, MS), Ok(Arrival::Waits));
    assert_eq!(desk.give_up(ONE, key(1)), Outcome::TenantOverloaded);
    let mut full = Admission::new(1, 2_000);
    full.set(ONE, &spec(10, 10));
    assert_eq!(ask(&mut full, ONE, 0, MS), Ok(Arrival::Runs));
    assert_eq!(ask(&mut full, ONE, 1, MS), Ok(Arrival::Waits));
    assert_eq!(full.give_up(ONE, key(1)), Outcome::HostOverloaded);
    assert_eq!((desk.jobs(), full.jobs()), (1, 1));
}

#[test]
fn two_that_come_at_once_count_their_tenants_shares_once() {
    let mut desk = Admission::new(1, 2_000);
    for id in [ONE, TWO] {
        desk.set(id, &spec(10, 10));
    }
    assert_eq!(ask(&mut desk, TWO, 0, MS), Ok(Arrival::Runs));
    let before = desk.house.active_shares;
    // Two workers ask before either of them has put its request into the queue.
    for _ in 0..2 {
        assert_eq!(desk.arrive(ONE, MS, NEVER), Ok(Arrival::Waits));
    }
    for number in [1, 2] {
        desk.wait(ONE, key(number), MS);
    }
    assert_eq!(desk.house.active_shares, 2 * before);
    for number in [1, 2] {
        desk.give_up(ONE, key(number));
    }
    assert_eq!(desk.house.active_shares, before);
}

#[test]
fn a_tenant_that_leaves_is_forgotten_with_its_last_request() {
    let mut desk = desk(1, 10);
    assert_eq!(ask(&mut desk, ONE, 0, MS), Ok(Arrival::Runs));
    assert!(desk.leave(ONE));
    assert_eq!(ask(&mut desk, ONE, 1, MS), Err(Shed::TenantGone));
    assert!(!desk.forget_if_empty(ONE));
    desk.depart(ONE, MS, ms(2));
    assert!(desk.forget_if_empty(ONE));
    assert!(!desk.knows(ONE) && !desk.leave(ONE));
}
