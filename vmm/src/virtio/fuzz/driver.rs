//! The driver's side.

use serde_json::Value;
use vm_memory::{Bytes as _, GuestAddress};

use super::super::interrupt::InterruptLine;
use super::super::testing::{self, MEMORY_BYTES};
use super::super::transport::{MmioTransport, TransportState};
use super::Host;
use super::random::Random;
use crate::event::Event;
use crate::memory::GuestMemory;
use crate::threads::Threads;
use crate::virtio::VirtioDevice;

const SIZE: u16 = 16;
const VERSION_1: u64 = 1 << 32;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Registers that exist, beside those between them.
const REGISTERS: [u64; 20] = [
    0x10, 0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94,
    0xa0, 0xa4, 0xac, 0xfc,
];

pub(super) struct Hostile {
    transport: MmioTransport,
    memory: GuestMemory,
    queues: u64,
    available: Vec<u16>,
    free: Vec<u16>,
    state: Option<TransportState>,
}

impl Hostile {
    /// Mostly the device is live afterwards.
    pub(super) fn new(device: Box<dyn VirtioDevice>, random: &mut Random) -> Self {
        let memory = testing::memory();
        let line = InterruptLine::Irqfd(Event::new().expect("a descriptor"));
        let queues = device.queues().len();
        let transport = MmioTransport::new(device, memory.clone(), line, &Threads::default());
        let mut driver = Self {
            transport: transport.expect("a thread"),
            memory,
            queues: queues as u64,
            available: vec![0; queues],
            free: vec![0; queues],
            state: None,
        };
        if !random.one_in(20) {
            driver.set_up(random);
        }
        driver
    }

    fn set(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    fn get(&self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn rings(queue: usize) -> u64 {
        0x1_0000 + 0x4000 * queue as u64
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        let inside = at % (MEMORY_BYTES - 0x1_0000);
        let poked = self.memory.write_slice(bytes, GuestAddress(inside));
        poked.expect("memory");
    }

    fn set_up(&mut self, random: &mut Random) {
        self.set(0x70, 0);
        for queue in 0..self.available.len() {
            self.poke(Self::rings(queue), &[0; 0x3000]);
            self.available[queue] = 0;
            self.free[queue] = 0;
        }
        let mut offered = 0;
        for half in [0, 1] {
            self.set(0x14, half);
            offered |= u64::from(self.get(0x10)) << (32 * half);
        }
        let accepted = match random.below(4) {
            0 => offered & random.next() | VERSION_1,
            1 => VERSION_1,
            _ => offered,
        };
        self.set(0x70, 1);
        self.set(0x70, 3);
        for half in [0_u32, 1] {
            self.set(0x24, half);
            let value = accepted >> (32 * half) & u64::from(u32::MAX);
            self.set(0x20, u32::try_from(value).expect("a half"));
        }
        self.set(0x70, 11);
        for queue in 0..self.available.len() {
            if random.one_in(30) {
                continue;
            }
            self.set(0x30, u32::try_from(queue).expect("few"));
            self.set(0x38, u32::from(SIZE));
            let base = u32::try_from(Self::rings(queue)).expect("low");
            for (register, at) in [(0x80, base), (0x90, base + 0x1000), (0xa0, base + 0x2000)] {
                let odd = random.one_in(60);
                self.set(register, if odd { random.word() } else { at });
                self.set(register + 4, 0);
            }
            self.set(0x44, 1);
        }
        self.set(0x70, 15);
    }

    /// One thing, good or bad.
    pub(super) fn step(&mut self, random: &mut Random, host: &mut dyn Host) {
        let queue = usize::try_from(random.below(self.queues)).expect("few");
        match random.below(24) {
            0..=9 => self.request(queue, random, host),
            10 => self.descriptor(queue, random),
            11 => self.offer(queue, random.half()),
            12 => {
                let index = random.half();
                self.available[queue] = index;
                self.poke(Self::rings(queue) + 0x1002, &index.to_le_bytes());
            }
            13 => {
                let queue = random.word() % 8;
                self.set(0x50, queue);
            }
            14 => {
                let register = if random.one_in(4) {
                    random.below(0x100)
                } else {
                    random.pick(&REGISTERS)
                };
                let value = random.word();
                self.set(register, value);
            }
            15 => {
                let (bytes, at) = (random.bytes(8), random.below(0x40));
                self.transport.write(0x100 + at, &bytes);
                self.transport.read(0x100 + at, &mut [0; 8]);
            }
            16 => self.set_up(random),
            17..=19 => host.act(random),
            20 => self.snapshot(random),
            21 => {
                let register = random.below(0x100);
                self.get(register);
            }
            22 => {
                let (at, bytes) = (random.below(0x1_0000), random.bytes(16));
                self.poke(0x1_0000 + at, &bytes);
            }
            // Lets the device get on.
            _ => {
                self.transport.hold().expect("the device's thread lives");
                self.transport.release().expect("the device's thread lives");
            }
        }
    }

    /// A request of the device's kind, in pieces of any size.
    fn request(&mut self, queue: usize, random: &mut Random, host: &mut dyn Host) {
        let request = host.request(random);
        let head = self.free[queue] % SIZE;
        let mut pieces = Vec::new();
        let mut at = 0x10_0000 + random.below(0x10_0000);
        let mut rest = request.as_slice();
        while !rest.is_empty() && pieces.len() < 6 {
            let most = 1 + random.below(rest.len() as u64);
            let cut = usize::try_from(most).expect("within");
            let (piece, after) = rest.split_at(if random.one_in(3) { rest.len() } else { cut });
            self.poke(at, piece);
            let length = u32::try_from(piece.len()).expect("short");
            pieces.push((at % (MEMORY_BYTES - 0x1_0000), length, 0));
            at += u64::from(length) + random.below(100);
            rest = after;
        }
        for _ in 0..random.below(4) {
            let room = 0x28_0000 + random.below(0x8_0000);
            pieces.push((room, random.length(), WRITE));
        }
        let count = pieces.len();
        for (number, (address, length, flags)) in pieces.into_iter().enumerate() {
            let index = self.free[queue] % SIZE;
            self.free[queue] = self.free[queue].wrapping_add(1);
            let more = if number + 1 < count { NEXT } else { 0 };
            let next = (index + 1) % SIZE;
            self.put(queue, index, (address, length, flags | more, next));
        }
        self.offer(queue, head);
        if !random.one_in(4) {
            self.set(0x50, u32::try_from(queue).expect("few"));
        }
    }

    fn descriptor(&mut self, queue: usize, random: &mut Random) {
        let address = match random.below(4) {
            0 => u64::from(random.word()) << random.below(33),
            1 => MEMORY_BYTES.wrapping_sub(random.below(64)),
            _ => random.below(MEMORY_BYTES),
        };
        let fields = (
            address,
            random.length(),
            random.half() & 7,
            random.half() % (SIZE + 2),
        );
        let index = random.half() % SIZE;
        self.put(queue, index, fields);
    }

    fn put(
        &mut self,
        queue: usize,
        index: u16,
        (address, bytes, flags, next): (u64, u32, u16, u16),
    ) {
        let mut descriptor = address.to_le_bytes().to_vec();
        descriptor.extend(bytes.to_le_bytes());
        descriptor.extend(flags.to_le_bytes());
        descriptor.extend(next.to_le_bytes());
        self.poke(Self::rings(queue) + 16 * u64::from(index), &descriptor);
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let ring = Self::rings(queue) + 0x1000;
        let slot = u64::from(self.available[queue] % SIZE);
        self.poke(ring + 4 + 2 * slot, &head.to_le_bytes());
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.poke(ring + 2, &self.available[queue].to_le_bytes());
    }

    /// Saves, or goes back to what was saved, as it was or with a number changed.
    fn snapshot(&mut self, random: &mut Random) {
        self.transport.hold().expect("the device's thread lives");
        match self.state.take() {
            None => self.state = Some(self.transport.save().expect("the device's thread lives")),
            Some(state) => {
                let mut value = serde_json::to_value(&state).expect("it is all numbers");
                if random.one_in(2) {
                    change(&mut value, random);
                }
                self.set(0x70, 0);
                // A change may leave something that is no state at all.
                if let Ok(state) = serde_json::from_value(value) {
                    let _ = self.transport.restore(&state);
                }
            }
        }
        self.transport.release().expect("the device's thread lives");
    }

    /// The device comes to rest, and works again after a reset.
    pub(super) fn finish(mut self) {
        self.transport.hold().expect("the device's thread lives");
        self.transport.release().expect("the device's thread lives");
        self.set(0x70, 0);
        assert_eq!(self.get(0x70), 0, "it is reset");
        self.set_up(&mut Random::new(u64::MAX));
        self.transport.hold().expect("the device's thread lives");
    }
}

/// Another number somewhere in it, or one less or more of a list.
pub(super) fn change(value: &mut Value, random: &mut Random) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            let at = usize::try_from(random.below(fields.len() as u64)).expect("few");
            if let Some(field) = fields.values_mut().nth(at) {
                change(field, random);
            }
        }
        Value::Array(items) => {
            if random.one_in(4) {
                items.pop();
            } else if let Some(item) = items.first().cloned()
                && random.one_in(4)
            {
                items.push(item);
            } else if !items.is_empty() {
                let at = usize::try_from(random.below(items.len() as u64)).expect("few");
                change(&mut items[at], random);
            }
        }
        Value::Bool(value) => *value = !*value,
        other => {
            let word = random.word();
            *other = match random.below(3) {
                0 => Value::from(word & 0xff),
                1 => Value::from(word),
                _ => Value::from(random.next()),
            };
        }
    }
}
