//! Hostile drivers of each device, as guests: at worst the device stops until it is reset.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use insula_types::Bytes;
use insula_vmm::Machine;
use insula_vmm::exit::ExitReason;
use insula_vmm::memory::MemorySize;
use insula_vmm::virtio::VirtioDevice;
use insula_vmm::virtio::balloon::Balloon;
use insula_vmm::virtio::block::{Access, Block, RawDisk};
use insula_vmm::virtio::net::{Identity, Mtu, Net, Tap};
use insula_vmm::virtio::rng::Rng;
use insula_vmm::virtio::vsock::{GuestCid, Nobody, Vsock};

use crate::guest::{Guest, OFF, Step, end_of, hypervisor};

/// Registers of the first virtio device; each has a page.
const DEVICES: u64 = 0xd000_0000;
/// Where a device's rings are: a quarter of a MiB for each.
const RINGS: u64 = 0x40_0000;
const BUFFER: u64 = 0x80_0000;
/// First address that is not memory.
const END: u64 = 64 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What a live driver's status is when the device has stopped.
const NEEDS_RESET: u32 = 15 | 64;

/// One device of a machine, and its driver.
#[derive(Debug, Clone, Copy)]
struct Driver {
    slot: u64,
    queues: u64,
    /// The one that the driver fills on its own.
    queue: u64,
}

impl Driver {
    fn register(self, offset: u64, value: u32) -> Step {
        Step::Write32(DEVICES + 0x1000 * self.slot + offset, value)
    }

    fn status(self, value: u32) -> Step {
        Step::Wait32(DEVICES + 0x1000 * self.slot + 0x70, value)
    }

    fn rings(self, queue: u64) -> u64 {
        RINGS + 0x4_0000 * self.slot + 0x4000 * queue
    }

    /// All queues have 16 descriptors, and no requests.
    fn set_up(self) -> Vec<Step> {
        let mut steps = vec![
            self.register(0x70, 0),
            self.register(0x70, 1),
            self.register(0x70, 3),
            self.register(0x24, 1),
            self.register(0x20, 1),
            self.register(0x70, 11),
        ];
        for queue in 0..self.queues {
            let rings = self.rings(queue);
            let low = u32::try_from(rings).expect("low memory");
            let number = u32::try_from(queue).expect("few");
            steps.extend([
                Step::Write64(rings + 0x1000, 0),
                Step::Write64(rings + 0x2000, 0),
                self.register(0x30, number),
                self.register(0x38, 16),
                self.register(0x80, low),
                self.register(0x84, 0),
                self.register(0x90, low + 0x1000),
                self.register(0x94, 0),
                self.register(0xa0, low + 0x2000),
                self.register(0xa4, 0),
                self.register(0x44, 1),
            ]);
        }
        steps.push(self.register(0x70, 15));
        steps
    }

    fn notify(self) -> Step {
        self.register(0x50, u32::try_from(self.queue).expect("few"))
    }

    fn descriptor(
        self,
        index: u64,
        (address, bytes, flags, next): (u64, u32, u16, u16),
    ) -> [Step; 2] {
        descriptor(
            self.rings(self.queue) + 16 * index,
            (address, bytes, flags, next),
        )
    }

    /// The available ring holds these heads, and says that it has got to `index`.
    fn available(self, head: u16, index: u16) -> Step {
        let value = u64::from(head) << 32 | u64::from(index) << 16;
        Step::Write64(self.rings(self.queue) + 0x1000, value)
    }

    /// Every way to lie with a ring.
    fn lies(self) -> Vec<Vec<Step>> {
        let one = |fields| {
            let mut steps = self.descriptor(0, fields).to_vec();
            steps.push(self.available(0, 1));
            steps
        };
        let two = |first, second| {
            let mut steps = self.descriptor(0, first).to_vec();
            steps.extend(self.descriptor(1, second));
            steps.push(self.available(0, 1));
            steps
        };
        let mut nested = descriptor(BUFFER, (BUFFER, 16, INDIRECT, 0)).to_vec();
        nested.extend(one((BUFFER, 16, INDIRECT, 0)));
        vec![
            // A loop of two, and of one.
            two((BUFFER, 1, NEXT, 1), (BUFFER, 1, NEXT, 0)),
            one((BUFFER, 1, NEXT | WRITE, 0)),
            // Out of the table, by next, by head, by index.
            one((BUFFER, 1, NEXT, 16)),
            vec![self.available(16, 1)],
            vec![self.available(u16::MAX, 1)],
            vec![self.available(0, 17)],
            vec![self.available(0, u16::MAX)],
            // Out of memory: behind it, across its end, in the hole, at the top of all.
            one((END, 1, WRITE, 0)),
            one((END - 1, 2, WRITE, 0)),
            one((DEVICES, 16, WRITE, 0)),
            one((u64::MAX - 3, 8, WRITE, 0)),
            one((BUFFER, u32::MAX, WRITE, 0)),
            one((BUFFER, u32::MAX, 0, 0)),
            // Nearly 2^32 in two pieces.
            two((BUFFER, 1 << 31, NEXT, 1), (BUFFER, 1 << 31, 0, 0)),
            // Readable after writable.
            two((BUFFER, 8, WRITE | NEXT, 1), (BUFFER, 8, 0, 0)),
            // Tables: in a table, too long, half a descriptor, out of memory.
            nested,
            one((BUFFER, 0xffff_fff0, INDIRECT, 0)),
            one((BUFFER, 17, INDIRECT, 0)),
            one((END, 32, INDIRECT, 0)),
        ]
    }
}

fn descriptor(at: u64, (address, bytes, flags, next): (u64, u32, u16, u16)) -> [Step; 2] {
    let rest = u64::from(bytes) | u64::from(flags) << 32 | u64::from(next) << 48;
    [Step::Write64(at, address), Step::Write64(at + 8, rest)]
}

fn disk() -> Block {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(1 << 20).expect("a size");
    let disk = RawDisk::new(file, Access::ReadWrite).expect("a disk");
    Block::new(Box::new(disk), "micro".parse().expect("a serial"))
}

fn vsock() -> (Vsock, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a folder");
    let listener = UnixListener::bind(dir.path().join("v")).expect("a listener");
    let cid = GuestCid::new(3).expect("a guest's");
    let vsock = Vsock::new(cid, Some(listener), Box::new(Nobody)).expect("a device");
    (vsock, dir)
}

fn balloon() -> Balloon {
    let size = MemorySize::new(Bytes::mib(64)).expect("a size");
    Balloon::new(size).expect("a device")
}

/// A tap, where this process may have one.
fn net(name: &str) -> Option<Net> {
    let tun = File::options().read(true).write(true).open("/dev/net/tun");
    let tap = tun.and_then(|tun| Tap::attach(tun, name.parse().expect("a name")));
    match tap {
        Ok(tap) => {
            let identity = Identity {
                mac: "02:00:00:00:00:09".parse().expect("an address"),
                ipv4: Vec::new(),
                ipv6: Vec::new(),
            };
            Some(Net::new(tap, identity, Mtu::default()))
        }
        Err(why) => {
            let _ = writeln!(io::stderr(), "network skipped: no tap: {why}");
            None
        }
    }
}

/// A machine with one of each, and a driver for each.
fn all(tap: &str) -> (Vec<Box<dyn VirtioDevice>>, Vec<Driver>, tempfile::TempDir) {
    let (vsock, dir) = vsock();
    let mut devices: Vec<(Box<dyn VirtioDevice>, u64, u64)> = vec![
        (Box::new(Rng::default()), 1, 0),
        (Box::new(disk()), 1, 0),
        (Box::new(vsock), 3, 1),
        (Box::new(balloon()), 2, 0),
    ];
    if let Some(net) = net(tap) {
        devices.push((Box::new(net), 2, 1));
    }
    let drivers = (0..)
        .zip(&devices)
        .map(|(slot, (_, queues, queue))| Driver {
            slot,
            queues: *queues,
            queue: *queue,
        });
    let drivers = drivers.collect();
    let devices = devices.into_iter().map(|(device, ..)| device).collect();
    (devices, drivers, dir)
}

fn machine(devices: Vec<Box<dyn VirtioDevice>>, steps: Vec<Step>) -> Option<Machine> {
    let hypervisor = hypervisor()?;
    let guest = devices
        .into_iter()
        .fold(Guest::script(steps), Guest::boxed_device);
    let mut machine = guest.build(&hypervisor);
    machine.resume().expect("a new machine");
    Some(machine)
}

#[test]
fn every_lie_stops_its_device_until_it_is_reset() {
    let (devices, drivers, _dir) = all("insmicro0");
    let mut steps = Vec::new();
    for driver in &drivers {
        for lie in driver.lies() {
            steps.extend(driver.set_up());
            steps.extend(lie);
            steps.extend([driver.notify(), driver.status(NEEDS_RESET)]);
        }
        steps.extend(driver.set_up());
        steps.push(driver.status(15));
    }
    steps.push(OFF);
    let Some(mut machine) = machine(devices, steps) else {
        return;
    };
    assert_eq!(end_of(&machine), ExitReason::Poweroff);
    for ((device, failures, why), driver) in
        machine.statistics().device_failures.iter().zip(&drivers)
    {
        let lies = u64::try_from(driver.lies().len()).expect("few");
        assert_eq!(*failures, lies, "{device}: {why:?}");
    }
    machine.stop();
}

#[test]
fn empty_buffers_are_no_lies() {
    let (devices, drivers, _dir) = all("insmicro1");
    let mut steps = Vec::new();
    // Those whose protocol has no header: the others rightly stop.
    for driver in drivers
        .iter()
        .filter(|driver| [0, 3].contains(&driver.slot))
    {
        steps.extend(driver.set_up());
        steps.extend(driver.descriptor(0, (u64::MAX, 0, WRITE, 0)));
        steps.extend([driver.available(0, 1), driver.notify()]);
        steps.push(Step::Wait32(driver.rings(driver.queue) + 0x2000, 1 << 16));
    }
    steps.push(OFF);
    let Some(machine) = machine(devices, steps) else {
        return;
    };
    assert_eq!(end_of(&machine), ExitReason::Poweroff);
}

/// Sizes and addresses of live queues stay what they were, whatever is written.
#[test]
fn a_live_driver_changes_its_queues_no_more() {
    let driver = Driver {
        slot: 0,
        queues: 1,
        queue: 0,
    };
    let mut steps = driver.set_up();
    for value in [0, 1, 2, 3, 32, 0xffff, u32::MAX] {
        for register in [0x38, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0x44, 0x20, 0x14] {
            steps.push(driver.register(register, value));
        }
    }
    steps.extend(driver.descriptor(0, (BUFFER, 64, WRITE, 0)));
    steps.extend([driver.available(0, 1), driver.notify()]);
    steps.extend([Step::Wait32(driver.rings(0) + 0x2000, 1 << 16), OFF]);
    let Some(machine) = machine(vec![Box::new(Rng::default())], steps) else {
        return;
    };
    assert_eq!(end_of(&machine), ExitReason::Poweroff);
    assert_eq!(machine.statistics().device_failures, [("rng", 0, None)]);
}

/// Every register and every byte of configuration of every device, in every width, in every state.
#[test]
fn every_register_of_every_device_in_every_state() {
    let (devices, drivers, _dir) = all("insmicro2");
    let mut steps = Vec::new();
    for driver in &drivers {
        for live in [false, true] {
            if live {
                steps.extend(driver.set_up());
            }
            let base = DEVICES + 0x1000 * driver.slot;
            for offset in (0..0x140).chain(0xff8..0x1000) {
                // The status, where only a reset makes a difference that the next state needs.
                if live && (0x6d..=0x73).contains(&offset) {
                    continue;
                }
                let at = base + offset;
                steps.extend([
                    Step::Write8(at, 0xff),
                    Step::Write32(at, u32::MAX),
                    Step::Write64(at, u64::MAX),
                    Step::Read32(at),
                ]);
            }
        }
        steps.extend(driver.set_up());
        steps.push(driver.status(15));
    }
    steps.push(OFF);
    let Some(machine) = machine(devices, steps) else {
        return;
    };
    assert_eq!(end_of(&machine), ExitReason::Poweroff);
}

#[test]
fn storms_of_notifications_and_resets_in_flight() {
    let (devices, drivers, _dir) = all("insmicro3");
    let mut steps = Vec::new();
    for _ in 0..20 {
        for driver in &drivers {
            steps.extend(driver.set_up());
            // For the disk a read of half a MiB; to the others it is something or other.
            steps.push(Step::Write64(BUFFER, 0));
            steps.push(Step::Write64(BUFFER + 8, 0));
            steps.extend(driver.descriptor(0, (BUFFER, 16, NEXT, 1)));
            steps.extend(driver.descriptor(1, (BUFFER + 0x1000, (512 << 10) + 1, WRITE, 0)));
            steps.push(driver.available(0, 1));
            for queue in [0, 1, 2, 3, 77, u32::MAX] {
                steps.extend([driver.register(0x50, queue); 5]);
            }
            // Reset with the request under way.
            steps.push(driver.register(0x70, 0));
        }
    }
    steps.push(OFF);
    let Some(machine) = machine(devices, steps) else {
        return;
    };
    assert_eq!(end_of(&machine), ExitReason::Poweroff);
}

/// ```text
///    mov dx, PORT
/// 1: in al, dx; jmp 1b
/// ```
fn exit_storm(port: u16) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0xba, low, high, 0xec, 0xeb, 0xfd]
}

/// A guest that does nothing but leave it is paused, resumed and stopped like any other.
#[test]
fn exit_storms_keep_nobody_waiting() {
    let Some(hypervisor) = hypervisor() else {
        return;
    };
    // The serial port, and a port of nobody.
    for port in [0x3fd, 0x9999] {
        let mut machine = Guest::real(&exit_storm(port)).build(&hypervisor);
        for _ in 0..10 {
            machine.resume().expect("a paused machine");
            std::thread::sleep(Duration::from_millis(5));
            let start = Instant::now();
            machine.pause().expect("a running machine");
            assert!(start.elapsed() < Duration::from_secs(5));
        }
        assert!(machine.statistics().exits.port_read > 10);
        machine.resume().expect("a paused machine");
        let start = Instant::now();
        assert_eq!(machine.stop(), ExitReason::Stopped);
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}

/// A guest gives its own code, its stack and its page tables to the host: the worst is its own end.
#[test]
fn a_balloon_with_the_ground_that_the_guest_stands_on() {
    let driver = Driver {
        slot: 0,
        queues: 2,
        queue: 0,
    };
    // Its script, its page tables, its code, its rings; and all of them at once.
    let pages: [&[u32]; 5] = [
        &[0x300],
        &[9, 10, 11, 12, 13, 14],
        &[0x100],
        &[0x400, 0x401, 0x402],
        &[0x300, 9, 0x100, 0x400, 7, 0, u32::MAX],
    ];
    for numbers in pages {
        let mut steps = driver.set_up();
        for (at, number) in (0..).zip(numbers) {
            steps.push(Step::Write32(BUFFER + 4 * at, *number));
        }
        let bytes = u32::try_from(4 * numbers.len()).expect("few");
        steps.extend(driver.descriptor(0, (BUFFER, bytes, 0, 0)));
        steps.extend([driver.available(0, 1), driver.notify()]);
        steps.push(Step::Wait32(driver.rings(0) + 0x2000, 1 << 16));
        steps.push(OFF);
        let Some(mut machine) = machine(vec![Box::new(balloon())], steps) else {
            return;
        };
        // It goes off, or its processor finds nonsense, or it waits for ever: whatever it is, the
        // host gets it back.
        let _ = machine.wait(Some(Instant::now() + Duration::from_millis(500)));
        let start = Instant::now();
        machine.stop();
        assert!(start.elapsed() < Duration::from_secs(5), "{numbers:?}");
    }
}
