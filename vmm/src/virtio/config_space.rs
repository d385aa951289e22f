//! A device's configuration space: bytes that both sides see, and a generation that tells the
//! driver that they changed while it read them (virtio 1.2, 2.5.1).

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Shared between a device and its transport.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: Mutex<Vec<u8>>,
    /// What the driver may write; writes elsewhere do nothing.
    writable: Range<usize>,
    generation: AtomicU32,
}

impl ConfigSpace {
    /// A space of these bytes, of which the driver may write `writable`.
    #[must_use]
    pub fn new(bytes: Vec<u8>, writable: Range<usize>) -> Self {
        Self {
            bytes: Mutex::new(bytes),
            writable,
            generation: AtomicU32::new(0),
        }
    }

    /// The device changes some bytes. The driver learns of it by
    /// [`Interrupt::config_changed`](super::Interrupt::config_changed), which the device sends
    /// after all that belongs together is in place. What would lie beyond the end is left out.
    pub fn set(&self, offset: usize, new: &[u8]) {
        let mut bytes = self.lock();
        for (old, new) in bytes.iter_mut().skip(offset).zip(new) {
            *old = *new;
        }
        // Under the lock, so that a driver that saw the old generation saw only old bytes.
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// All of it.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        self.lock().clone()
    }

    /// A little-endian number that the driver may have written; zero beyond the end.
    #[must_use]
    pub fn le32(&self, offset: usize) -> u32 {
        let mut number = [0; 4];
        self.read(offset, &mut number);
        u32::from_le_bytes(number)
    }

    /// The driver reads; beyond the end there is zero.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        for (to, from) in data.iter_mut().zip(self.lock().iter().skip(offset)) {
            *to = *from;
        }
    }

    /// The driver writes. `true` if some of it was writable.
    pub(super) fn write(&self, offset: usize, data: &[u8]) -> bool {
        let mut bytes = self.lock();
        let mut any = false;
        for ((at, old), new) in bytes.iter_mut().enumerate().skip(offset).zip(data) {
            if self.writable.contains(&at) {
                *old = *new;
                any = true;
            }
        }
        any
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// Puts back what the driver had written when [`ConfigSpace::snapshot`] was taken. The rest is
    /// the device's, and may differ now: a clone has a MAC address of its own. `true` if it does.
    pub(super) fn restore(&self, saved: &[u8]) -> bool {
        let mut bytes = self.lock();
        let mut differs = bytes.len() != saved.len();
        for (at, (now, then)) in bytes.iter_mut().zip(saved).enumerate() {
            if self.writable.contains(&at) {
                *now = *then;
            } else {
                differs |= now != then;
            }
        }
        self.generation.fetch_add(1, Ordering::Release);
        differs
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        // Bytes are valid whatever they are, also where another thread died between two of them.
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_writes_only_where_it_may() {
        let space = ConfigSpace::new(vec![1; 8], 2..4);
        assert!(space.write(0, &[9; 8]));
        assert_eq!(space.snapshot(), [1, 1, 9, 9, 1, 1, 1, 1]);
        assert!(!space.write(4, &[9; 100]));
        assert!(!space.write(usize::MAX, &[9]));
    }

    #[test]
    fn beyond_the_end_there_is_zero() {
        let space = ConfigSpace::new(vec![1; 3], 0..0);
        let mut seen = [7; 4];
        space.read(1, &mut seen);
        assert_eq!(seen, [1, 1, 0, 0]);
        space.read(usize::MAX, &mut seen);
        assert_eq!(seen, [0; 4]);
    }

    #[test]
    fn only_the_drivers_part_is_restored() {
        let space = ConfigSpace::new(vec![1, 2, 3, 4], 1..2);
        assert!(!space.restore(&[1, 9, 3, 4]));
        assert_eq!(space.snapshot(), [1, 9, 3, 4]);
        assert!(space.restore(&[7, 8, 7, 7]));
        assert_eq!(space.snapshot(), [1, 8, 3, 4]);
        assert!(space.restore(&[]));
    }

    #[test]
    fn a_change_is_a_new_generation() {
        let space = ConfigSpace::new(vec![0; 8], 0..0);
        let before = space.generation();
        space.set(4, &7_u32.to_le_bytes());
        assert_eq!(space.le32(4), 7);
        assert_ne!(space.generation(), before);
    }
}
