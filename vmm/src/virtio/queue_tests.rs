//! The arithmetic of rings, against a model of it.

use std::sync::atomic::Ordering;

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes as _, GuestAddress};

use super::device::QueueSpec;
use super::interrupt::{Interrupt, InterruptLine};
use super::queue::{Queues, Ring};
use super::testing::{INDIRECT, MEMORY_BYTES, NEXT, WRITE, memory};
use crate::event::Event;
use crate::memory::GuestMemory;
use crate::memory::vectors::Segment;

const SIZE: u16 = 8;
const MOST: u32 = 0x8000;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
/// A table of as many descriptors for chains that lead elsewhere.
const ELSEWHERE: u64 = 0x4000;

/// Address, length, flags, next.
type Descriptor = (u64, u32, u16, u16);

/// A queue whose rings have got to `index`.
fn queues(index: u16) -> Queues {
    let mut queue = Queue::new(SIZE).expect("a power of two");
    let low = |address: u64| Some(u32::try_from(address).expect("low memory"));
    queue.set_desc_table_address(low(TABLE), None);
    queue.set_avail_ring_address(low(AVAILABLE), None);
    queue.set_used_ring_address(low(USED), None);
    queue.set_next_avail(index);
    queue.set_next_used(index);
    queue.set_ready(true);
    let spec = QueueSpec {
        max_size: SIZE,
        max_chain_bytes: MOST,
    };
    let event = || Event::new().expect("a descriptor");
    let ring = Ring {
        queue,
        spec,
        notification: event(),
        pushed: false,
    };
    let interrupt = Interrupt::new(InterruptLine::Irqfd(event()));
    Queues::new(memory(), vec![ring], interrupt)
}

fn put(memory: &GuestMemory, at: u64, bytes: &[u8]) {
    memory
        .write_slice(bytes, GuestAddress(at))
        .expect("it is memory");
}

fn describe(memory: &GuestMemory, table: u64, descriptors: &[Descriptor]) {
    for (at, (address, bytes, flags, next)) in (table..).step_by(16).zip(descriptors) {
        put(memory, at, &address.to_le_bytes());
        put(memory, at + 8, &bytes.to_le_bytes());
        put(memory, at + 12, &flags.to_le_bytes());
        put(memory, at + 14, &next.to_le_bytes());
    }
}

/// Offers a head as the `index`-th.
fn offer(memory: &GuestMemory, index: u16, head: u16) {
    let slot = u64::from(index % SIZE);
    put(memory, AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
    put(memory, AVAILABLE + 2, &index.wrapping_add(1).to_le_bytes());
}

fn used_index(memory: &GuestMemory) -> u16 {
    memory
        .load(GuestAddress(USED + 2), Ordering::Acquire)
        .expect("it is memory")
}

/// What a chain without indirect descriptors is, by the specification: readable and writable
/// segments, or nothing where it breaks the rules.
fn model(table: &[Descriptor], head: u16) -> Option<[Vec<(u64, u32)>; 2]> {
    let (mut found, mut bytes, mut at) = ([Vec::new(), Vec::new()], 0_u64, head);
    for _ in 0..SIZE {
        let &(address, length, flags, next) = table.get(usize::from(at))?;
        bytes += u64::from(length);
        let end = u128::from(address) + u128::from(length);
        if bytes > u64::from(MOST) || end > u128::from(MEMORY_BYTES) {
            return None;
        }
        let writable = flags & WRITE != 0;
        if !writable && !found[1].is_empty() {
            return None;
        }
        found[usize::from(writable)].push((address, length));
        if flags & NEXT == 0 {
            return Some(found);
        }
        at = next;
    }
    None
}

fn descriptors(flags: u16) -> impl Strategy<Value = Vec<Descriptor>> {
    let address = prop_oneof![
        8 => 0x1_0000..MEMORY_BYTES - u64::from(MOST),
        1 => MEMORY_BYTES - 0x2000..MEMORY_BYTES + 2,
        1 => u64::MAX - 0x2000..=u64::MAX,
        1 => Just(ELSEWHERE),
    ];
    let length = prop_oneof![
        8 => 1_u32..0x1800,
        2 => Just(16 * u32::from(SIZE)),
        1 => Just(MOST),
        1 => u32::MAX - 1..=u32::MAX,
    ];
    let flags = prop_oneof![0..=flags, (0..=flags).prop_map(|flags| flags | NEXT)];
    let next = prop_oneof![9 => 0..SIZE, 1 => SIZE..=u16::MAX];
    prop::collection::vec((address, length, flags, next), usize::from(SIZE))
}

fn plain(segments: &[Segment]) -> Vec<(u64, u32)> {
    let plain = |segment: &Segment| (segment.address.0, segment.bytes);
    segments.iter().map(plain).collect()
}

proptest! {
    /// Every chain is what the specification says, or an error, wherever the index stands.
    #[test]
    fn a_chain_is_what_the_model_says(
        table in descriptors(NEXT | WRITE),
        head in 0..SIZE + 1,
        index: u16,
    ) {
        let mut queues = queues(index);
        describe(queues.memory(), TABLE, &table);
        offer(queues.memory(), index, head);
        let chain = queues.pop(0).map(|chain| chain.expect("one was offered"));
        let found = chain.ok().map(|chain| [plain(chain.readable()), plain(chain.writable())]);
        prop_assert_eq!(found, model(&table, head));
    }

    /// With descriptors that lead to other tables: what comes out is memory, and no more than the
    /// device takes.
    #[test]
    fn a_chain_is_memory_and_bounded(
        table in descriptors(NEXT | WRITE | INDIRECT),
        elsewhere in descriptors(NEXT | WRITE | INDIRECT),
        head in 0..SIZE,
        index: u16,
    ) {
        let mut queues = queues(index);
        describe(queues.memory(), TABLE, &table);
        describe(queues.memory(), ELSEWHERE, &elsewhere);
        offer(queues.memory(), index, head);
        let Ok(chain) = queues.pop(0) else { return Ok(()) };
        let chain = chain.expect("one was offered");
        let sum = |segments: &[Segment]| segments.iter().map(|part| u64::from(part.bytes)).sum::<u64>();
        prop_assert_eq!(sum(chain.readable()), u64::from(chain.readable_bytes()));
        prop_assert_eq!(sum(chain.writable()), u64::from(chain.writable_bytes()));
        prop_assert!(sum(chain.readable()) + sum(chain.writable()) <= u64::from(MOST));
        for (address, bytes) in plain(chain.readable()).into_iter().chain(plain(chain.writable())) {
            prop_assert!(u128::from(address) + u128::from(bytes) <= u128::from(MEMORY_BYTES));
        }
    }

    /// However far the driver says that it went: no more chains than the queue is long.
    #[test]
    fn an_index_goes_no_further_than_the_queue_is_long(index: u16, ahead: u16) {
        let mut queues = queues(index);
        describe(queues.memory(), TABLE, &[(0x1_0000, 1, 0, 0)]);
        put(queues.memory(), AVAILABLE + 2, &index.wrapping_add(ahead).to_le_bytes());
        let mut taken = 0_u16;
        let outcome = loop {
            match queues.pop(0) {
                Ok(Some(_)) => taken += 1,
                Ok(None) => break Ok(()),
                Err(_) => break Err(()),
            }
        };
        let expected = if ahead > SIZE { (Err(()), 0) } else { (Ok(()), ahead) };
        prop_assert_eq!((outcome, taken), expected);
    }

    /// Requests are taken, put back and given back across the end of the numbers.
    #[test]
    fn indices_wrap(index in prop_oneof![Just(u16::MAX - 2), any::<u16>()], again: Vec<bool>) {
        let mut queues = queues(index);
        describe(queues.memory(), TABLE, &[(0x1_0000, 64, WRITE, 0)]);
        let mut at = index;
        for again in again.into_iter().chain([true, false, true, false]) {
            offer(queues.memory(), at, 0);
            let mut chain = queues.pop(0).expect("it is right").expect("it was offered");
            if again {
                queues.unpop(0, chain);
                chain = queues.pop(0).expect("it is right").expect("it was put back");
            }
            prop_assert_eq!(queues.pop(0), Ok(None));
            queues.push(0, chain, u32::MAX).expect("the ring is memory");
            let slot = USED + 4 + 8 * u64::from(at % SIZE);
            let written: u32 = queues.memory().load(GuestAddress(slot + 4), Ordering::Acquire).expect("memory");
            prop_assert_eq!(written, 64, "no more than there was room for");
            at = at.wrapping_add(1);
            prop_assert_eq!(used_index(queues.memory()), at);
        }
    }
}
