//! What a driver can do to the registers.

use proptest::prelude::*;

use super::rng::Rng;
use super::testing::{Driver, MEMORY_BYTES};

fn negotiated() -> Driver {
    let mut driver = Driver::cold(Rng::default());
    driver.set(0x70, 1);
    driver.set(0x70, 3);
    driver.set(0x24, 1);
    driver.set(0x20, 1);
    driver.set(0x70, 11);
    driver
}

#[test]
fn a_driver_finds_what_the_specification_says() {
    let driver = Driver::cold(Rng::default());
    assert_eq!(driver.get(0x00).to_le_bytes(), *b"virt");
    assert_eq!(driver.get(0x04), 2);
    assert_eq!(driver.get(0x08), 4);
    assert_eq!(driver.get(0x34), 16);
    assert_eq!(driver.get(0xb0), u32::MAX);
}

#[test]
fn features_that_were_not_offered_or_no_version_are_refused() {
    for (high, low) in [(0, 0), (1, 1 << 5), (3, 0)] {
        let mut driver = Driver::cold(Rng::default());
        driver.set(0x70, 1);
        driver.set(0x70, 3);
        driver.set(0x24, 1);
        driver.set(0x20, high);
        driver.set(0x24, 0);
        driver.set(0x20, low);
        driver.set(0x70, 11);
        assert_eq!(driver.get(0x70), 3, "{high:#x} {low:#x}");
    }
}

#[test]
fn a_queue_that_does_not_lie_in_memory_is_never_ready() {
    let top = u32::try_from(MEMORY_BYTES).expect("low memory");
    let bad: [(u64, u32); 9] = [
        (0x38, 0),
        (0x38, 3),
        (0x38, 32),
        (0x38, 1 << 16 | 8),
        (0x80, 0x1_0001),
        (0x80, top),
        (0x84, u32::MAX),
        (0x90, top - 2),
        (0xa0, top - 4),
    ];
    for (register, value) in bad {
        let mut driver = negotiated();
        driver.set(0x38, 16);
        driver.set(0x80, 0x1_0000);
        driver.set(0x90, 0x1_1000);
        driver.set(0xa0, 0x1_2000);
        driver.set(register, value);
        driver.set(0x44, 1);
        assert_eq!(driver.get(0x44), 0, "{register:#x} <- {value:#x}");
    }
}

#[test]
fn registers_are_frozen_while_the_driver_is_live() {
    let mut driver = Driver::live(Rng::default(), 0);
    for register in [0x20, 0x38, 0x44, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
        driver.set(register, 0x33);
    }
    assert_eq!(driver.get(0x44), 1);
    driver.offer(0, &[], &[8]);
    driver.notify(0);
    assert_eq!(driver.wait_used(0), (0, 8));
    // Bits cannot be taken back one by one either.
    driver.set(0x70, 3);
    assert_eq!(driver.get(0x70), 15);
}

#[test]
fn notifications_before_and_beyond_do_nothing() {
    let mut driver = Driver::cold(Rng::default());
    for queue in [0, 1, 7, u32::MAX] {
        driver.set(0x50, queue);
    }
    driver.set_up(0);
    for queue in [1, 7, u32::MAX] {
        driver.set(0x50, queue);
    }
    driver.offer(0, &[], &[8]);
    driver.notify(0);
    assert_eq!(driver.wait_used(0), (0, 8));
}

#[test]
fn a_saved_device_goes_on_where_it_was() {
    let mut before = Driver::live(Rng::default(), 0);
    for head in 0..5 {
        before.offer(0, &[], &[8]);
        before.notify(0);
        assert_eq!(before.wait_used(0), (head, 8));
    }
    before.transport.hold().expect("it lives");
    before.offer(0, &[], &[24]);
    before.notify(0);
    let state = before.transport.save().expect("it lives");
    assert_eq!(before.take_used(0), None, "a held device does nothing");

    let after = Driver::cold(Rng::default());
    let all = before.peek(0, usize::try_from(MEMORY_BYTES).expect("it fits"));
    after.poke(0, &all);
    before.transport = after.transport;
    before.memory = after.memory;
    before.transport.restore(&state).expect("its own state");
    assert_eq!(before.get(0x70), 15);
    assert_eq!(before.wait_used(0), (5, 24), "what was waiting is served");
}

#[test]
fn reset_in_flight_leaves_memory_alone() {
    let mut driver = Driver::live(Rng::default(), 0);
    for _ in 0..200 {
        for _ in 0..16 {
            driver.offer(0, &[], &[64]);
        }
        driver.notify(0);
        driver.reset();
        let all = driver.peek(Driver::base(0), 0x4000);
        std::thread::yield_now();
        assert_eq!(
            driver.peek(Driver::base(0), 0x4000),
            all,
            "written after the reset"
        );
        driver.set_up(0);
        driver.forget_buffers();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Any writes of any width anywhere: no panic, no hang, and after a reset it works.
    #[test]
    fn no_sequence_of_writes_breaks_the_transport(
        writes in prop::collection::vec(
            (0_u64..0x110, prop::collection::vec(any::<u8>(), 1..=8)), 1..200),
        steps in prop::collection::vec(
            (prop::sample::select(vec![0x20_u64, 0x24, 0x30, 0x38, 0x44, 0x50, 0x70, 0x80, 0x84, 0x90, 0xa0]),
             prop::sample::select(vec![0_u32, 1, 2, 3, 8, 11, 15, 16, 64, 0x1000, 0x2000, u32::MAX])), 1..200),
    ) {
        let mut driver = negotiated();
        for (offset, bytes) in &writes {
            driver.transport.write(*offset, bytes);
            let mut seen = vec![0; bytes.len()];
            driver.transport.read(*offset, &mut seen);
        }
        for (register, value) in &steps {
            driver.set(*register, *value);
            driver.get(*register);
        }
        driver.reset();
        driver.set_up(0);
        driver.offer(0, &[], &[8]);
        driver.notify(0);
        prop_assert_eq!(driver.wait_used(0), (0, 8));
    }
}
