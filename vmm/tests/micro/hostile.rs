//! A guest that does not behave: at worst its own machine ends, with a reason.

use insula_vmm::exit::ExitReason;
use insula_vmm::virtio::rng::Rng;

use crate::guest::{Guest, OFF, Step, end_of, hypervisor};

/// Registers of the first virtio device.
const DEVICE: u64 = 0xd000_0000;

/// ```text
///    xor dx, dx
/// 1: in al, dx; xor ax, ax; out dx, al; in ax, dx; inc dx; jnz 1b
///    mov dx, 0x601; mov al, 0x34; out dx, al; hlt
/// ```
const EVERY_PORT: [u8; 17] = [
    0x31, 0xd2, 0xec, 0x31, 0xc0, 0xee, 0xed, 0x42, 0x75, 0xf8, 0xba, 0x01, 0x06, 0xb0, 0x34, 0xee,
    0xf4,
];

/// `lidt [rip]` with what follows, a limit that holds no vector; then an invalid instruction.
const TRIPLE_FAULT: [u8; 19] = [
    0x0f, 0x01, 0x1d, 0x02, 0x00, 0x00, 0x00, 0x0f, 0x0b, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// Sets the entropy device up with one request of `bytes` at 0x22_0000, rings at 0x21_0000,
/// notifies, and goes on with `then`.
pub(crate) fn rng_driver(
    bytes: u32,
    then: impl IntoIterator<Item = Step>,
) -> impl Iterator<Item = Step> {
    let register = |offset: u64, value| Step::Write32(DEVICE + offset, value);
    let set_up = [
        // One writable descriptor, and it is available.
        Step::Write64(0x21_0000, 0x22_0000),
        Step::Write64(0x21_0008, u64::from(bytes) | 2 << 32),
        Step::Write32(0x21_1000, 1 << 16),
        register(0x70, 1),
        register(0x70, 3),
        register(0x24, 1),
        register(0x20, 1),
        register(0x70, 11),
        register(0x38, 16),
        register(0x80, 0x21_0000),
        register(0x90, 0x21_1000),
        register(0xa0, 0x21_2000),
        register(0x44, 1),
        register(0x70, 15),
        register(0x50, 0),
    ];
    set_up.into_iter().chain(then)
}

#[test]
fn every_port_and_nothing_happens() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    // With a device, and input of nothing.
    let guest = Guest::real(&EVERY_PORT).device(Rng::default());
    assert_eq!(guest.run(&hypervisor), ExitReason::Poweroff);
}

#[test]
fn every_register_in_every_width() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    let mut steps = Vec::new();
    for offset in 0..0x120 {
        let at = DEVICE + offset;
        steps.extend([
            Step::Write8(at, 0xff),
            Step::Write32(at, u32::MAX),
            Step::Write64(at, u64::MAX),
            Step::Read32(at),
        ]);
    }
    // Where no device is: behind the only one, at the hole's end, and beyond all memory.
    for at in [DEVICE + 0x1000, DEVICE + 0x1_0000, 0xfebf_fffc] {
        steps.extend([Step::Write64(at, u64::MAX), Step::Read32(at)]);
    }
    // And then it is reset, and works.
    steps.push(Step::Write32(DEVICE + 0x70, 0));
    steps.extend(rng_driver(64, [Step::Wait32(0x21_2000, 0x0001_0000), OFF]));
    let guest = Guest::script(steps).device(Rng::default());
    assert_eq!(guest.run(&hypervisor), ExitReason::Poweroff);
}

#[test]
fn a_triple_fault_ends_the_machine_and_says_so() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    let reason = Guest::long(&TRIPLE_FAULT).run(&hypervisor);
    assert_eq!(reason, ExitReason::TripleFault { vcpu: 0 });
    assert!(!reason.is_orderly());
}

#[test]
fn a_lie_in_a_ring_stops_the_device_and_not_the_machine() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    // 2^32 - 1 bytes; the driver then sees NEEDS_RESET, which a spin on the register waits for.
    let needs_reset = 15 | 64;
    let steps = rng_driver(u32::MAX, [Step::Wait32(DEVICE + 0x70, needs_reset), OFF]);
    let mut machine = Guest::script(steps)
        .device(Rng::default())
        .build(&hypervisor);
    machine.resume().expect("a new machine");
    assert_eq!(end_of(&machine), ExitReason::Poweroff);
    let failures = machine.statistics().device_failures;
    let [("rng", 1, Some(why))] = failures.as_slice() else {
        panic!("{failures:?}")
    };
    assert!(why.contains("4294967295 bytes"), "{why}");
}

#[test]
fn notify_storms_and_resets_in_flight() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    let mut steps = Vec::new();
    for _ in 0..100 {
        steps.extend(rng_driver(4096, []));
        steps.extend([Step::Write32(DEVICE + 0x50, 0); 20]);
        steps.extend([Step::Write32(DEVICE + 0x50, 77); 5]);
        steps.push(Step::Write32(DEVICE + 0x70, 0));
    }
    steps.push(OFF);
    let guest = Guest::script(steps).device(Rng::default());
    assert_eq!(guest.run(&hypervisor), ExitReason::Poweroff);
}

#[test]
fn odd_values_at_the_power_registers_do_nothing() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    let mut steps = Vec::new();
    for value in (0..=255).filter(|value| *value != 1) {
        steps.push(Step::Out8(0x600, value));
    }
    for value in (0..=255).filter(|value| value & 0x3c != 0x34) {
        steps.push(Step::Out8(0x601, value));
    }
    steps.extend([Step::In8(0x600), Step::In8(0x601), Step::In8(0x602), OFF]);
    assert_eq!(Guest::script(steps).run(&hypervisor), ExitReason::Poweroff);
}
