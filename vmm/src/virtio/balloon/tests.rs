use insula_types::Bytes;

use super::*;
use crate::virtio::testing::{Driver, MEMORY_BYTES};

const ALL: u64 = STATISTICS | DEFLATE_ON_OOM | REPORTING;
const PAGES: u32 = 1024;
/// A piece of memory that the driver uses for nothing else.
const PLACE: u64 = 0x30_0000;

fn live(features: u64) -> (Driver, BalloonHandle) {
    let size = MemorySize::new(Bytes::new(MEMORY_BYTES).expect("a size")).expect("a size");
    let balloon = Balloon::new(size).expect("descriptors");
    let handle = balloon.handle();
    (Driver::live(balloon, features), handle)
}

fn number(address: u64) -> [u8; 4] {
    let page = u32::try_from(address / PAGE_BYTES).expect("low memory");
    page.to_le_bytes()
}

/// Fills eight pages; `kept` says which still hold it.
fn fill(driver: &Driver) {
    driver.poke(PLACE, &[7; 8 * 4096]);
}

fn kept(driver: &Driver) -> Vec<usize> {
    let seen = driver.peek(PLACE, 8 * 4096);
    let pages = seen.chunks(4096).enumerate();
    let kept = pages.filter(|(_, page)| page.iter().all(|byte| *byte == 7));
    kept.map(|(index, _)| index).collect()
}

#[test]
fn inflated_pages_go_back_and_others_stay() {
    let (mut driver, handle) = live(0);
    fill(&driver);
    let numbers = [3, 1, 2, 6].map(|page| number(PLACE + page * PAGE_BYTES));
    driver.offer(0, &[numbers.as_flattened()], &[]);
    driver.notify(0);
    driver.wait_used(0);
    assert_eq!(kept(&driver), [0, 4, 5, 7]);
    assert_eq!(handle.state().returned_bytes, 4 * PAGE_BYTES);
    // Deflating gives nothing away.
    driver.offer(1, &[numbers.as_flattened()], &[]);
    driver.notify(1);
    driver.wait_used(1);
    assert_eq!(kept(&driver), [0, 4, 5, 7]);
}

#[test]
fn lies_are_counted_and_harmless() {
    let (mut driver, handle) = live(0);
    fill(&driver);
    let last = u32::try_from(MEMORY_BYTES / PAGE_BYTES).expect("small");
    let numbers = [
        number(PLACE),
        number(PLACE),
        // The last page of memory, and what is after it.
        (last - 1).to_le_bytes(),
        last.to_le_bytes(),
        (last + 1).to_le_bytes(),
        u32::MAX.to_le_bytes(),
        (u32::MAX - 1).to_le_bytes(),
    ];
    driver.offer(0, &[numbers.as_flattened(), &[1, 2, 3]], &[]);
    driver.offer(0, &[], &[64]);
    driver.notify(0);
    driver.wait_used(0);
    driver.wait_used(0);
    assert_eq!(kept(&driver), [1, 2, 3, 4, 5, 6, 7]);
    let state = handle.state();
    assert_eq!((state.lies, state.returned_bytes), (4, 2 * PAGE_BYTES));
}

#[test]
fn too_many_pages_at_once_stop_the_device() {
    let (mut driver, _) = live(0);
    driver.offer(0, &[&vec![0; 20 << 10]], &[]);
    driver.notify(0);
    assert!(driver.wait_broken().contains("16384 are the most"));
}

#[test]
fn reported_pages_go_back_wholly_or_not() {
    // With statistics the queue is the fourth, without them the third.
    for (features, queue) in [(ALL, 3), (REPORTING, 2)] {
        let (mut driver, handle) = live(features);
        fill(&driver);
        let inside = PLACE + PAGE_BYTES - 100;
        driver.descriptor(queue, 0, (PLACE + 4 * PAGE_BYTES, 8192, 3, 1));
        // From within a page to within another: one whole page between them.
        driver.descriptor(queue, 1, (inside, 4096 + 200, 3, 2));
        driver.descriptor(queue, 2, (PLACE, 4095, 3, 3));
        driver.descriptor(queue, 3, (u64::MAX, 0, 2, 0));
        driver.make_available(queue, 0);
        driver.notify(queue);
        driver.wait_used(queue);
        assert_eq!(kept(&driver), [0, 2, 3, 6, 7]);
        assert_eq!(handle.state().returned_bytes, 3 * PAGE_BYTES);
    }
}

#[test]
fn queues_of_what_was_not_accepted_do_nothing() {
    let (mut driver, handle) = live(STATISTICS);
    fill(&driver);
    driver.descriptor(3, 0, (PLACE, 8192, 2, 0));
    driver.make_available(3, 0);
    driver.notify(3);
    driver.wait_used(3);
    assert_eq!(kept(&driver).len(), 8);
    assert_eq!(handle.state().returned_bytes, 0);
}

fn statistics(free: u64) -> Vec<u8> {
    let entries = [(4_u16, free), (5, 1 << 30), (77, 1), (2, 9)];
    let bytes = entries.map(|(tag, value)| {
        let mut bytes = tag.to_le_bytes().to_vec();
        bytes.extend(value.to_le_bytes());
        bytes
    });
    let mut bytes = bytes.concat();
    bytes.push(1);
    bytes
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    let (mut driver, handle) = live(ALL);
    driver.offer(2, &[&statistics(1000)], &[]);
    driver.notify(2);
    driver.wait_until("the first", |_| handle.state().reports > 0);
    assert_eq!(driver.take_used(2), None, "the buffer is kept");
    handle.ask_for_statistics();
    driver.wait_used(2);
    let before = handle.state().reports;
    driver.offer(2, &[&statistics(2000)], &[]);
    driver.notify(2);
    driver.wait_until("the second", |_| handle.state().reports > before);
    let found = handle.state().statistics;
    let expected = GuestMemoryStatistics {
        free_bytes: Some(2000),
        total_bytes: Some(1 << 30),
        major_faults: Some(9),
        ..GuestMemoryStatistics::default()
    };
    assert_eq!(found, expected);
}

#[test]
fn the_driver_learns_the_target_and_tells_what_it_gave() {
    let (mut driver, handle) = live(0);
    handle
        .set_target(PAGES + 1)
        .expect_err("more than there is");
    handle.set_target(100).expect("less than there is");
    driver.wait_until("the interrupt", |driver| driver.get(0x60) & 2 != 0);
    assert_eq!(driver.get(0x100), 100);
    driver.set(0x104, 60);
    driver.wait_until("the answer", |_| handle.state().actual_pages == 60);
    // More than it has is not believed; what is not its own it cannot write.
    driver.set(0x104, u32::MAX);
    driver.wait_until("the lie", |_| handle.state().actual_pages == PAGES);
    driver.set(0x100, 7);
    assert_eq!(driver.get(0x100), 100);
    driver.reset();
    assert_eq!((driver.get(0x100), driver.get(0x104)), (100, 0));
}

#[test]
fn a_snapshot_keeps_the_target() {
    let (mut driver, handle) = live(ALL);
    handle.set_target(100).expect("less than there is");
    driver.wait_until("the target", |driver| driver.get(0x100) == 100);
    driver.set(0x104, 60);
    driver.wait_until("the answer", |_| handle.state().actual_pages == 60);
    driver.transport.hold().expect("it lives");
    let state = driver.transport.save().expect("it lives");
    let (mut other, handle) = live(ALL);
    other.transport.hold().expect("it lives");
    other.transport.restore(&state).expect("its own state");
    other.transport.release().expect("it lives");
    let now = handle.state();
    assert_eq!((now.target_pages, now.actual_pages), (100, 60));
    assert_eq!((other.get(0x100), other.get(0x104)), (100, 60));
    other.wait_until("the interrupt", |driver| driver.get(0x60) & 2 != 0);
}

#[test]
fn states_of_others_are_refused() {
    let size = MemorySize::new(Bytes::mib(4)).expect("a size");
    let mut balloon = Balloon::new(size).expect("descriptors");
    for bytes in [vec![], vec![1], vec![2; 9], vec![1; 10]] {
        balloon.restore(&DeviceState(bytes)).expect_err("a lie");
    }
    balloon.restore(&DeviceState(vec![1; 9])).expect("a state");
    assert_eq!(balloon.handle().state().target_pages, PAGES);
}
