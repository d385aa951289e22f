//! A guest that behaves: output, input, several processors, pause, power.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use insula_vmm::exit::{ExitReason, RebootBy};
use insula_vmm::machine::{LifeError, Phase};
use insula_vmm::virtio::rng::Rng;
use vm_memory::{Bytes as _, GuestAddress};

use crate::guest::{COUNTER, Guest, OFF, Step, WATCHDOG, end_of, hypervisor, until, word};

/// ```text
/// 1: mov dx, 0x3fd; in al, dx; test al, 1; jz 1b      ; wait for input
///    mov dx, 0x3f8; in al, dx; out dx, al             ; echo
///    cmp al, 'q'; jne 1b
///    mov dx, 0x601; mov al, 0x34; out dx, al; hlt     ; power off
/// ```
const ECHO: [u8; 24] = [
    0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf8, 0xba, 0xf8, 0x03, 0xec, 0xee, 0x3c, 0x71, 0x75,
    0xef, 0xba, 0x01, 0x06, 0xb0, 0x34, 0xee, 0xf4,
];

/// `lock inc word cs:[0x40]`, then halts: for the other processors, in real mode.
const COUNT_ME: [u8; 9] = [0x2e, 0xf0, 0xff, 0x06, 0x40, 0x00, 0xf4, 0xeb, 0xfd];

#[test]
fn output_arrives_and_power_goes_off() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    let letters = b"hello\n".map(|letter| Step::Out8(0x3f8, letter));
    let guest = Guest::script(letters.into_iter().chain([OFF]));
    let screen = guest.screen.clone();
    assert_eq!(guest.run(&hypervisor), ExitReason::Poweroff);
    assert_eq!(screen.text(), "hello\n");
}

#[test]
fn every_way_to_reboot() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    let acpi = Guest::script([Step::Out8(0x600, 1)]);
    assert_eq!(acpi.run(&hypervisor), ExitReason::Reboot(RebootBy::Acpi));
    let keyboard = Guest::script([Step::Out8(0x64, 0xfe)]);
    assert_eq!(
        keyboard.run(&hypervisor),
        ExitReason::Reboot(RebootBy::Keyboard)
    );
    // jmp 0xf000:0xfff0
    let firmware = Guest::real(&[0xea, 0xf0, 0xff, 0x00, 0xf0]);
    assert_eq!(
        firmware.run(&hypervisor),
        ExitReason::Reboot(RebootBy::Acpi)
    );
}

#[test]
fn input_of_any_length_arrives_in_order() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    let (mut typist, console) = UnixStream::pair().expect("a socket");
    let guest = Guest::real(&ECHO).input(console.into());
    let screen = guest.screen.clone();
    let mut machine = guest.build(&hypervisor);
    machine.resume().expect("a new machine");
    // Far more than the port's buffer holds.
    let text: String = ('a'..='p').cycle().take(1000).collect();
    typist.write_all(text.as_bytes()).expect("written");
    until("half of it is there", || screen.text().len() > 500);
    typist.write_all(b"q").expect("written");
    assert_eq!(end_of(&machine), ExitReason::Poweroff);
    assert_eq!(screen.text(), text + "q");
}

#[test]
fn every_processor_comes_up() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    for vcpus in [2, 5, 32] {
        // Local APIC: on; INIT to all others; start-up at page 0x10.
        let guest = Guest::script([
            Step::Write32(0xfee0_00f0, 0x1ff),
            Step::Write32(0xfee0_0300, 0x000c_4500),
            Step::Write32(0xfee0_0300, 0x000c_4610),
            Step::Wait32(0x1_0040, u32::from(vcpus) - 1),
            OFF,
        ]);
        let mut machine = guest.vcpus(vcpus).build(&hypervisor);
        let place = GuestAddress(0x1_0000);
        machine
            .memory()
            .write_slice(&COUNT_ME, place)
            .expect("memory");
        machine.resume().expect("a new machine");
        assert_eq!(end_of(&machine), ExitReason::Poweroff, "{vcpus} vCPUs");
    }
}

#[test]
fn pause_stands_still_and_resume_goes_on() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    let mut machine = Guest::script([Step::Count(0x20_0000)])
        .vcpus(2)
        .build(&hypervisor);
    assert_eq!(machine.phase(), Phase::Paused);
    assert_eq!(word(&machine, 0x20_0000), 0, "nothing runs before resume");
    for _ in 0..20 {
        let before = word(&machine, 0x20_0000);
        machine.resume().expect("a paused machine");
        until("it counts", || word(&machine, 0x20_0000) > before);
        machine.pause().expect("a running machine");
        let paused = word(&machine, 0x20_0000);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(word(&machine, 0x20_0000), paused);
    }
    let twice = machine.pause().expect_err("it is paused");
    assert!(matches!(
        twice,
        LifeError::Phase {
            phase: Phase::Paused,
            ..
        }
    ));
    machine.resume().expect("a paused machine");
    let start = Instant::now();
    assert_eq!(machine.stop(), ExitReason::Stopped);
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "an endless guest stops at once"
    );
    machine.resume().expect_err("it is stopped");
}

/// Pauses that fall into accesses of devices lose none of them.
#[test]
fn pauses_lose_no_output() {
    const TURN: Duration = Duration::from_millis(1);
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    let text: String = ('a'..='z').cycle().take(4000).collect();
    let letters = text.bytes().map(|letter| Step::Out8(0x3f8, letter));
    let guest = Guest::script(letters.chain([OFF]));
    let screen = guest.screen.clone();
    let mut machine = guest.build(&hypervisor);
    let mut pauses = 0;
    while machine.wait(Some(Instant::now())).is_none() {
        machine.resume().expect("a paused machine");
        // Paused at once, on a busy machine it would hardly get anywhere.
        if machine.wait(Some(Instant::now() + TURN)).is_some() {
            break;
        }
        machine.pause().expect("a running machine");
        pauses += 1;
    }
    assert!(pauses > 1, "it was paused on its way");
    assert_eq!(screen.text(), text);
}

/// A whole request to a device, through KVM's own notification and interrupt where it has them.
#[test]
fn a_device_serves_a_micro_guest() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    let mut machine = Guest::script(crate::hostile::rng_driver(
        64,
        [Step::Wait32(0x21_2000, 0x0001_0000), OFF],
    ))
    .device(Rng::default())
    .build(&hypervisor);
    machine.resume().expect("a new machine");
    assert_eq!(end_of(&machine), ExitReason::Poweroff);
    let mut filled = [0; 64];
    machine
        .memory()
        .read_slice(&mut filled, GuestAddress(0x22_0000))
        .expect("memory");
    assert_ne!(filled, [0; 64]);
    assert_eq!(machine.statistics().device_failures, [("rng", 0, None)]);
}

/// Its shortest time is a second.
#[test]
fn a_guest_whose_watchdog_runs_out_starts_anew() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    let start = Instant::now();
    let reason = Guest::watched(10).run(&hypervisor);
    assert_eq!(reason, ExitReason::Reboot(RebootBy::Watchdog));
    assert!(start.elapsed() >= Duration::from_secs(1));
}

#[test]
fn a_watchdog_stands_still_while_its_machine_does() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    let mut machine = Guest::watched(20).build(&hypervisor);
    machine.resume().expect("a new machine");
    until("it counts", || word(&machine, COUNTER) > 0);
    machine.pause().expect("it runs");
    let longer = Instant::now() + Duration::from_millis(2500);
    assert_eq!(machine.wait(Some(longer)), None);
    machine.resume().expect("it is paused");
    let reason = end_of(&machine);
    assert_eq!(reason, ExitReason::Reboot(RebootBy::Watchdog));
}

/// Every width and value at its registers and beside them, and again and again.
#[test]
fn odd_values_at_the_watchdog_do_nothing() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    let mut steps = Vec::new();
    for offset in 0..40 {
        let at = WATCHDOG + offset;
        steps.extend([Step::Write8(at, 1), Step::Write64(at, u64::MAX)]);
        steps.push(Step::Read32(at));
        if offset % 4 != 0 || offset >= 16 {
            steps.push(Step::Write32(at, 1));
        }
    }
    for count in [0, 9, 36_001, u32::MAX] {
        steps.push(Step::Write32(WATCHDOG + 4, count));
    }
    // It is off, and half a minute long: nothing of that was taken.
    steps.push(Step::Wait32(WATCHDOG, 0));
    steps.push(Step::Wait32(WATCHDOG + 4, 300));
    for _ in 0..2000 {
        steps.extend([Step::Write32(WATCHDOG, 1), Step::Write32(WATCHDOG + 12, 1)]);
    }
    steps.extend([Step::Write32(WATCHDOG, 0), Step::Wait32(WATCHDOG + 8, 0)]);
    steps.push(OFF);
    assert_eq!(Guest::script(steps).run(&hypervisor), ExitReason::Poweroff);
}
