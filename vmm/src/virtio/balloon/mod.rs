//! Memory balloon (virtio 1.2, 5.5): the guest gives memory back, because it is asked to or
//! because it does not use it.
//!
//! * *Inflation.* The host names a size ([`BalloonHandle::set_target`]); the driver takes pages
//!   away from the guest and names them; they are given back to the host. What the driver then
//!   does with them is its business: a page that it uses again is filled with zeroes, or in a
//!   restored machine with what the snapshot has there.
//! * *Reporting.* Of its own accord the driver names pages that are free now; they are given back
//!   in the same way.
//! * *Statistics.* The driver keeps one buffer of numbers with us, and fills it anew each time
//!   that it gets it back. It stays in the queue while we have it, so a snapshot needs not name it.
//!
//! *Lies.* A page that is named twice, or that the guest uses, costs the guest what was in it. What
//! is not memory is counted and left alone. Numbers that the guest tells are shown as the guest's.

mod statistics;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::GuestAddress;

use super::config_space::ConfigSpace;
use super::device::{
    DeviceError, DeviceKind, DeviceState, Interest, QueueSpec, Readiness, VirtioDevice,
};
use super::queue::{Chain, Queues};
use crate::event::Event;
use crate::memory::{GuestMemory, MemorySize, PAGE_BYTES, pages};

pub use statistics::GuestMemoryStatistics;

/// Feature bits (5.5.3).
const STATISTICS: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const QUEUE_SIZE: u16 = 128;

/// Bytes of a page's number in the inflate queue.
const NUMBER_BYTES: usize = 4;
/// Linux names 256 pages at once.
const NUMBERS_BYTES: u32 = 16 << 10;
/// One statistic is ten bytes, and there are sixteen.
const STATISTICS_BYTES: u32 = 1024;
/// Linux reports up to 32 pieces at once, each of up to 4 MiB.
const REPORT_BYTES: u32 = 1 << 30;

/// Configuration (5.5.4): pages that the host wants, pages that the driver gave.
const TARGET_AT: usize = 0;
const ACTUAL_AT: usize = 4;
const CONFIG_BYTES: usize = 16;

/// Statistics or reports, whichever the driver accepted, and then reports if it accepted both.
const QUEUES: [QueueSpec; 4] = [
    spec(NUMBERS_BYTES),
    spec(NUMBERS_BYTES),
    spec(REPORT_BYTES),
    spec(REPORT_BYTES),
];

const fn spec(max_chain_bytes: u32) -> QueueSpec {
    QueueSpec {
        max_size: QUEUE_SIZE,
        max_chain_bytes,
    }
}

const SAVED_VERSION: u8 = 1;

/// What a balloon is, now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BalloonState {
    /// Pages that the host wants.
    pub target_pages: u32,
    /// Pages that the driver says to have given.
    pub actual_pages: u32,
    /// Bytes that went back to the host since the monitor started, counted as often as they went.
    pub returned_bytes: u64,
    /// Ranges that the driver named and that are not memory.
    pub lies: u64,
    /// How often the driver sent statistics.
    pub reports: u64,
    /// What it sent last.
    pub statistics: GuestMemoryStatistics,
}

#[derive(Debug)]
struct Shared {
    memory_pages: u32,
    target: AtomicU32,
    actual: AtomicU32,
    returned_bytes: AtomicU64,
    lies: AtomicU64,
    statistics: Mutex<(u64, GuestMemoryStatistics)>,
    target_changed: Event,
    statistics_wanted: Event,
}

/// The host's hand on a balloon. Cheap to clone.
#[derive(Debug, Clone)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
}

/// More than the machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a balloon of {pages} pages, and the machine has {of}")]
pub struct TargetError {
    /// What was wanted.
    pub pages: u32,
    /// All of the machine's pages.
    pub of: u32,
}

impl BalloonHandle {
    /// Asks the guest to give that many pages of 4 KiB, all told. It does so when and if it can.
    ///
    /// # Errors
    /// More than the machine has.
    pub fn set_target(&self, pages: u32) -> Result<(), TargetError> {
        let of = self.shared.memory_pages;
        if pages > of {
            return Err(TargetError { pages, of });
        }
        self.shared.target.store(pages, Ordering::Release);
        self.shared.target_changed.raise();
        Ok(())
    }

    /// Asks the guest for new statistics; [`BalloonState::reports`] tells when they are there.
    pub fn ask_for_statistics(&self) {
        self.shared.statistics_wanted.raise();
    }

    /// Now.
    #[must_use]
    pub fn state(&self) -> BalloonState {
        let shared = &self.shared;
        let statistics = shared.statistics.lock();
        let statistics = statistics.unwrap_or_else(PoisonError::into_inner);
        BalloonState {
            target_pages: shared.target.load(Ordering::Acquire),
            actual_pages: shared.actual.load(Ordering::Relaxed),
            returned_bytes: shared.returned_bytes.load(Ordering::Relaxed),
            lies: shared.lies.load(Ordering::Relaxed),
            reports: statistics.0,
            statistics: statistics.1,
        }
    }
}

/// The device.
#[derive(Debug)]
pub struct Balloon {
    config: Arc<ConfigSpace>,
    shared: Arc<Shared>,
    accepted: u64,
    /// A restored driver has to look at the target again.
    announce: bool,
}

/// What a queue is for. Queues of features that were not accepted do not exist, and those after
/// them move up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Report,
    None,
}

impl Balloon {
    /// An empty balloon in a machine with this much memory.
    ///
    /// # Errors
    /// No descriptors are to be had.
    pub fn new(memory: MemorySize) -> io::Result<Self> {
        let memory_pages = u32::try_from(memory.get() / PAGE_BYTES).unwrap_or(u32::MAX);
        let config = ConfigSpace::new(vec![0; CONFIG_BYTES], ACTUAL_AT..ACTUAL_AT + 4);
        Ok(Self {
            config: Arc::new(config),
            shared: Arc::new(Shared {
                memory_pages,
                target: AtomicU32::new(0),
                actual: AtomicU32::new(0),
                returned_bytes: AtomicU64::new(0),
                lies: AtomicU64::new(0),
                statistics: Mutex::default(),
                target_changed: Event::new()?,
                statistics_wanted: Event::new()?,
            }),
            accepted: 0,
            announce: false,
        })
    }

    /// For the host.
    #[must_use]
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle {
            shared: Arc::clone(&self.shared),
        }
    }

    fn role(&self, queue: usize) -> Role {
        let statistics = self.accepted & STATISTICS != 0;
        let reporting = self.accepted & REPORTING != 0;
        match (queue, statistics, reporting) {
            (INFLATE, ..) => Role::Inflate,
            (DEFLATE, ..) => Role::Deflate,
            (2, true, _) => Role::Statistics,
            (2, false, true) | (3, true, true) => Role::Report,
            _ => Role::None,
        }
    }

    fn show_target(&self, queues: &Queues) {
        let target = self.shared.target.load(Ordering::Acquire);
        self.config.set(TARGET_AT, &target.to_le_bytes());
        queues.interrupt().config_changed();
    }

    /// Reads the numbers in the driver's buffer, and leaves it in its queue.
    fn read_statistics(&self, index: usize, queues: &mut Queues) -> Result<(), DeviceError> {
        let Some(chain) = queues.pop(index)? else {
            return Ok(());
        };
        let mut bytes = vec![0; chain.readable_bytes().min(STATISTICS_BYTES) as usize];
        let read = chain.read(queues.memory(), 0, &mut bytes);
        queues.unpop(index, chain);
        read?;
        let found = self.shared.statistics.lock();
        let mut found = found.unwrap_or_else(PoisonError::into_inner);
        *found = (
            found.0.wrapping_add(1),
            GuestMemoryStatistics::parse(&bytes),
        );
        Ok(())
    }

    /// Gives the driver its buffer, to fill it anew.
    fn return_statistics(&self, queues: &mut Queues) -> Result<(), DeviceError> {
        let role = |index: &usize| self.role(*index) == Role::Statistics;
        let Some(index) = (0..QUEUES.len()).find(role) else {
            return Ok(());
        };
        if let Some(chain) = queues.pop(index)? {
            queues.push(index, chain, 0)?;
            queues.notify(index)?;
            if queues.want_notifications(index, true)? {
                queues.call_back(index);
            }
        }
        Ok(())
    }
}

impl Shared {
    /// The numbers of pages of an inflate request.
    fn take(&self, memory: &GuestMemory, chain: &Chain) -> Result<(), DeviceError> {
        let mut bytes = vec![0; chain.readable_bytes() as usize];
        chain.read(memory, 0, &mut bytes)?;
        let (numbers, _) = bytes.as_chunks::<NUMBER_BYTES>();
        let mut numbers: Vec<u32> = numbers.iter().map(|it| u32::from_le_bytes(*it)).collect();
        numbers.sort_unstable();
        numbers.dedup();
        // Neighbours go back together.
        for run in numbers.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            let Some(first) = run.first() else { continue };
            let start = GuestAddress(u64::from(*first) * PAGE_BYTES);
            let pages = u64::try_from(run.len()).unwrap_or_default();
            self.give_back(memory, start, pages);
        }
        Ok(())
    }

    fn give_back(&self, memory: &GuestMemory, start: GuestAddress, pages: u64) {
        let whole = pages::discard(memory, start, pages * PAGE_BYTES);
        if whole.is_ok() {
            let bytes = pages * PAGE_BYTES;
            self.returned_bytes.fetch_add(bytes, Ordering::Relaxed);
            return;
        }
        // Not all of it is memory: what is goes back, what is not is a lie.
        for page in 0..pages {
            let Some(at) = start.0.checked_add(page * PAGE_BYTES) else {
                break;
            };
            match pages::discard(memory, GuestAddress(at), PAGE_BYTES) {
                Ok(()) => self.returned_bytes.fetch_add(PAGE_BYTES, Ordering::Relaxed),
                Err(_) => self.lies.fetch_add(1, Ordering::Relaxed),
            };
        }
    }

    /// Pages that are free in the guest: the buffers themselves, which were checked to be memory.
    fn take_report(&self, memory: &GuestMemory, chain: &Chain) {
        for segment in chain.writable() {
            // Only whole pages of it: what is beside them may be in use.
            // An empty segment may lie anywhere.
            let start = segment.address.0.checked_next_multiple_of(PAGE_BYTES);
            let Some(start) = start else { continue };
            let end = segment.address.0.saturating_add(u64::from(segment.bytes));
            let bytes = end.saturating_sub(start) / PAGE_BYTES * PAGE_BYTES;
            if bytes == 0 {
                continue;
            }
            match pages::discard(memory, GuestAddress(start), bytes) {
                Ok(()) => self.returned_bytes.fetch_add(bytes, Ordering::Relaxed),
                Err(_) => self.lies.fetch_add(1, Ordering::Relaxed),
            };
        }
    }
}

const TOKEN_TARGET: u64 = 0;
const TOKEN_STATISTICS: u64 = 1;

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn features(&self) -> u64 {
        STATISTICS | DEFLATE_ON_OOM | REPORTING
    }

    fn queues(&self) -> &[QueueSpec] {
        &QUEUES
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    fn activate(&mut self, accepted: u64) -> Result<(), DeviceError> {
        self.accepted = accepted;
        Ok(())
    }

    fn queue_notified(&mut self, index: usize, queues: &mut Queues) -> Result<(), DeviceError> {
        if std::mem::take(&mut self.announce) {
            self.show_target(queues);
        }
        let shared = &self.shared;
        match self.role(index) {
            Role::Inflate => queues.drain(index, |memory, chain| {
                shared.take(memory, chain)?;
                Ok(0)
            }),
            Role::Report => queues.drain(index, |memory, chain| {
                shared.take_report(memory, chain);
                Ok(0)
            }),
            // The pages are the guest's already; it need not even have asked.
            Role::Deflate | Role::None => queues.drain(index, |_, _| Ok(0)),
            Role::Statistics => self.read_statistics(index, queues),
        }
    }

    fn interests<'d>(&'d self, into: &mut Vec<Interest<'d>>) {
        let events = [
            (&self.shared.target_changed, TOKEN_TARGET),
            (&self.shared.statistics_wanted, TOKEN_STATISTICS),
        ];
        into.extend(events.map(|(event, token)| Interest {
            descriptor: event.as_fd(),
            readiness: Readiness::Readable,
            token,
        }));
    }

    fn host_ready(&mut self, token: u64, queues: &mut Queues) -> Result<(), DeviceError> {
        if token == TOKEN_TARGET {
            self.shared.target_changed.clear();
            self.show_target(queues);
            Ok(())
        } else {
            self.shared.statistics_wanted.clear();
            self.return_statistics(queues)
        }
    }

    fn config_written(&mut self, _queues: &mut Queues) -> Result<(), DeviceError> {
        let actual = self.config.le32(ACTUAL_AT).min(self.shared.memory_pages);
        self.shared.actual.store(actual, Ordering::Relaxed);
        Ok(())
    }

    /// The driver starts with an empty balloon; what the host wants stays.
    fn reset(&mut self) {
        self.accepted = 0;
        self.config.set(ACTUAL_AT, &[0; 4]);
        self.shared.actual.store(0, Ordering::Relaxed);
        let target = self.shared.target.load(Ordering::Acquire);
        self.config.set(TARGET_AT, &target.to_le_bytes());
    }

    fn save(&self) -> DeviceState {
        let mut bytes = vec![SAVED_VERSION];
        let target = self.shared.target.load(Ordering::Acquire);
        let actual = self.shared.actual.load(Ordering::Relaxed);
        bytes.extend(target.to_le_bytes());
        bytes.extend(actual.to_le_bytes());
        DeviceState(bytes)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        let [SAVED_VERSION, target @ .., a, b, c, d] = state.0.as_slice() else {
            return Err(DeviceError::Protocol("no state of a balloon"));
        };
        let target = <[u8; 4]>::try_from(target);
        let target = target.map_err(|_| DeviceError::Protocol("no state of a balloon"))?;
        let most = self.shared.memory_pages;
        let target = u32::from_le_bytes(target).min(most);
        let actual = u32::from_le_bytes([*a, *b, *c, *d]).min(most);
        self.shared.target.store(target, Ordering::Release);
        self.shared.actual.store(actual, Ordering::Relaxed);
        self.config.set(TARGET_AT, &target.to_le_bytes());
        self.announce = true;
        Ok(())
    }
}
