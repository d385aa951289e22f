//! The devices, and what their drivers and hosts do.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::num::NonZeroU64;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use insula_types::Bytes;
use rustix::fs::{MemfdFlags, memfd_create};

use super::random::Random;
use super::{Host, Target};
use crate::memory::MemorySize;
use crate::rate_limiter::{Rate, RateLimits};
use crate::virtio::balloon::{Balloon, BalloonHandle};
use crate::virtio::block::{Access, BaseId, Block, Disk, Overlay, RawDisk};
use crate::virtio::net::{Identity, MacAddress, Mtu, Net, Tap};
use crate::virtio::rng::Rng;
use crate::virtio::testing::MEMORY_BYTES;
use crate::virtio::vsock::{BesidePath, GuestCid, Vsock};

/// No limits, or some that are reached.
fn limits(random: &mut Random) -> RateLimits {
    let mut rate = |per_second: u64| {
        let rate = Rate {
            per_second: NonZeroU64::new(per_second).expect("not zero"),
            burst: NonZeroU64::new(1 + random.below(1000)).expect("not zero"),
        };
        (!random.one_in(3)).then_some(rate)
    };
    RateLimits {
        bytes: rate(1 << 20),
        operations: rate(10_000),
    }
}

struct Nothing;

impl Host for Nothing {
    fn request(&mut self, random: &mut Random) -> Vec<u8> {
        random.bytes(8)
    }

    fn act(&mut self, _random: &mut Random) {}
}

pub(super) fn rng(_random: &mut Random) -> Target {
    (Box::new(Rng::default()), Box::new(Nothing))
}

struct Blocks;

impl Host for Blocks {
    fn request(&mut self, random: &mut Random) -> Vec<u8> {
        let kind = random.pick(&[0, 0, 1, 1, 4, 8, 11, 13, 13, 99]);
        let mut request = u32::to_le_bytes(kind).to_vec();
        request.extend([0; 4]);
        let sector = match random.below(4) {
            0 => random.next(),
            _ => random.below(200),
        };
        request.extend(sector.to_le_bytes());
        if kind > 8 {
            for _ in 0..random.below(18) {
                request.extend(random.below(300).to_le_bytes());
                request.extend((random.word() % 100).to_le_bytes());
                request.extend((random.word() & 3).to_le_bytes());
            }
        } else if kind == 1 {
            let sectors = usize::try_from(random.below(9)).expect("few");
            request.extend(vec![random.byte(); 512 * sectors]);
        }
        if random.one_in(10) {
            request.extend(random.bytes(20));
        }
        request
    }

    fn act(&mut self, _random: &mut Random) {}
}

/// In memory, so that a flush costs nothing.
fn file(bytes: u64) -> File {
    let memory = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a file");
    let file = File::from(memory);
    file.set_len(bytes).expect("a size");
    file
}

fn with_disk(disk: impl Disk + 'static, random: &mut Random) -> Target {
    let block = Block::new(Box::new(disk), "fuzz".parse().expect("a serial"));
    let block = if random.one_in(3) {
        block.with_limits(limits(random)).expect("a timer")
    } else {
        block
    };
    (Box::new(block), Box::new(Blocks))
}

pub(super) fn block(random: &mut Random) -> Target {
    let access = random.pick(&[Access::ReadWrite, Access::ReadWrite, Access::ReadOnly]);
    let disk = RawDisk::new(file(512 + random.below(100_000)), access);
    with_disk(disk.expect("large enough"), random)
}

pub(super) fn overlay(random: &mut Random) -> Target {
    let base = 512 + random.below(100_000);
    let disk = base + random.below(50_000);
    let overlay = Overlay::open(file(base), BaseId([7; 32]), file(0), Some(disk));
    with_disk(overlay.expect("new"), random)
}

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

struct Wire(UnixDatagram);

impl Wire {
    /// Nothing leaves with another's address.
    fn drain(&mut self) {
        let mut packet = vec![0; 70_000];
        while let Ok(length) = self.0.recv(&mut packet) {
            assert!(length >= 12 + 14, "{length}");
            assert_eq!(packet[12 + 6..12 + 12], MAC);
            let kind = [packet[12 + 12], packet[12 + 13]];
            assert!([[8, 0], [8, 6], [0x86, 0xdd]].contains(&kind), "{kind:x?}");
        }
    }
}

impl Host for Wire {
    fn request(&mut self, random: &mut Random) -> Vec<u8> {
        let mut packet = vec![0; 12];
        if random.one_in(3) {
            packet[0] = random.byte() & 3;
            packet[1] = random.pick(&[0, 1, 3, 4, 5, 0x80, 0x81, 0x84]);
            for at in [2, 4, 6, 8] {
                let field = random.half() % 200;
                packet[at..at + 2].copy_from_slice(&field.to_le_bytes());
            }
        }
        packet.extend([0xff; 6]);
        packet.extend(if random.one_in(10) { [2; 6] } else { MAC });
        packet.extend(random.pick(&[[8, 0], [8, 6], [0x86, 0xdd], [0x81, 0]]));
        packet.extend([random.pick(&[0x45, 0x60, 0x46, 0]), 0, 0, 0, 0, 0, 0, 0]);
        packet.extend([
            64,
            random.pick(&[6, 17, 58]),
            0,
            0,
            10,
            0,
            0,
            random.byte() & 3,
        ]);
        packet.extend(random.bytes(3000));
        packet
    }

    fn act(&mut self, random: &mut Random) {
        self.drain();
        let packet = random.bytes(4000);
        let _ = self.0.send(&packet);
    }

    fn check(&mut self) {
        self.drain();
    }
}

pub(super) fn net(random: &mut Random) -> Target {
    let (ours, theirs) = UnixDatagram::pair().expect("sockets");
    ours.set_nonblocking(true).expect("a socket");
    let identity = Identity {
        mac: MacAddress::new(MAC).expect("an address"),
        ipv4: vec![[10, 0, 0, 2].into()],
        ipv6: Vec::new(),
    };
    let net = Net::new(Tap::from_socket(theirs), identity, Mtu::default());
    let net = if random.one_in(3) {
        let (receive, send) = (limits(random), limits(random));
        net.with_limits(receive, send).expect("timers")
    } else {
        net
    };
    (Box::new(net), Box::new(Wire(ours)))
}

struct Sockets {
    dir: tempfile::TempDir,
    listener: UnixListener,
    streams: Vec<UnixStream>,
}

impl Host for Sockets {
    fn request(&mut self, random: &mut Random) -> Vec<u8> {
        let wide = |value: u64| value.to_le_bytes();
        let mut packet = wide(if random.one_in(20) { 4 } else { 3 }).to_vec();
        packet.extend(wide(if random.one_in(20) { random.next() } else { 2 }));
        let client_port = (1 << 30) + random.word() % 4;
        let guest = random.pick(&[1, 2, 52]);
        let host = random.pick(&[80, 80, 81, client_port]);
        let length = match random.below(6) {
            0 => random.word(),
            1 => u32::from(random.half()),
            _ => 0,
        };
        for word in [guest, host, length] {
            packet.extend(word.to_le_bytes());
        }
        packet.extend([if random.one_in(20) { 2 } else { 1 }, 0]);
        packet.extend([random.pick(&[1, 1, 2, 3, 4, 5, 5, 5, 6, 7, 9]), 0]);
        for word in [random.word() & 3, random.word(), random.word()] {
            packet.extend(word.to_le_bytes());
        }
        let data = usize::try_from(length.min(70_000)).expect("few");
        packet.extend(vec![7; data]);
        if random.one_in(10) {
            packet.truncate(usize::from(random.byte()));
        }
        packet
    }

    fn act(&mut self, random: &mut Random) {
        while let Ok((stream, _)) = self.listener.accept() {
            self.streams.push(stream);
        }
        if random.one_in(3)
            && let Ok(mut client) = UnixStream::connect(self.dir.path().join("v"))
        {
            let line = random.pick(&["CONNECT 52\n", "CONNECT 1\nhello", "CONN", "\n", "x\ny\n"]);
            let _ = client.write_all(line.as_bytes());
            self.streams.push(client);
        }
        if self.streams.len() > 6 || random.one_in(8) && !self.streams.is_empty() {
            self.streams.remove(0);
        }
        for stream in &mut self.streams {
            let _ = stream.set_nonblocking(true);
            if random.one_in(2) {
                let _ = stream.write(&vec![9; usize::from(random.half())]);
            }
            if random.one_in(2) {
                let _ = stream.read(&mut vec![0; usize::from(random.half())]);
            }
        }
    }
}

pub(super) fn vsock(_random: &mut Random) -> Target {
    let dir = tempfile::tempdir().expect("a folder");
    let clients = UnixListener::bind(dir.path().join("v")).expect("a listener");
    let listener = UnixListener::bind(dir.path().join("v_80")).expect("a listener");
    listener.set_nonblocking(true).expect("a listener");
    let dial = BesidePath::new(dir.path().join("v")).expect("a short path");
    let cid = GuestCid::new(3).expect("a guest's");
    let vsock = Vsock::new(cid, Some(clients), Box::new(dial)).expect("a device");
    let host = Sockets {
        dir,
        listener,
        streams: Vec::new(),
    };
    (Box::new(vsock), Box::new(host))
}

struct Hand(BalloonHandle);

impl Host for Hand {
    fn request(&mut self, random: &mut Random) -> Vec<u8> {
        let mut request = Vec::new();
        // Pages beyond the rings, so that the driver keeps its own.
        for _ in 0..random.below(200) {
            let page = match random.below(5) {
                0 => random.word(),
                _ => 0x200 + random.word() % 0x300,
            };
            request.extend(page.to_le_bytes());
        }
        if random.one_in(4) {
            request.extend(random.bytes(40));
        }
        request
    }

    fn act(&mut self, random: &mut Random) {
        let _ = self.0.set_target(random.word() % 2000);
        self.0.ask_for_statistics();
        let _ = self.0.state();
    }
}

pub(super) fn balloon(_random: &mut Random) -> Target {
    let bytes = Bytes::new(MEMORY_BYTES).expect("a size");
    let balloon = Balloon::new(MemorySize::new(bytes).expect("a size")).expect("descriptors");
    let hand = Hand(balloon.handle());
    (Box::new(balloon), Box::new(hand))
}
