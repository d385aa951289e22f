//! Entropy (virtio 1.2, 5.4): fills what the driver offers from the kernel's generator.

use std::sync::Arc;

use super::config_space::ConfigSpace;
use super::device::{DeviceError, DeviceKind, QueueSpec, VirtioDevice};
use super::queue::Queues;
use crate::entropy;

/// What one request gets at most: the driver asks again for more. Linux asks for at most 64 bytes.
const REQUEST_BYTES: u32 = 4096;

const QUEUES: [QueueSpec; 1] = [QueueSpec {
    max_size: 16,
    max_chain_bytes: 64 << 10,
}];

/// The device. It has no state: a restored machine gets new entropy by asking.
#[derive(Debug)]
pub struct Rng {
    config: Arc<ConfigSpace>,
}

impl Default for Rng {
    fn default() -> Self {
        Self {
            config: Arc::new(ConfigSpace::new(Vec::new(), 0..0)),
        }
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &[QueueSpec] {
        &QUEUES
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    fn activate(&mut self, _accepted: u64) -> Result<(), DeviceError> {
        Ok(())
    }

    fn queue_notified(&mut self, index: usize, queues: &mut Queues) -> Result<(), DeviceError> {
        queues.drain(index, |memory, chain| {
            let mut bytes = vec![0; chain.writable_bytes().min(REQUEST_BYTES) as usize];
            fill(&mut bytes)?;
            let written = chain.write(memory, 0, &bytes)?;
            Ok(u32::try_from(written).unwrap_or(REQUEST_BYTES))
        })
    }

    fn reset(&mut self) {}
}

fn fill(bytes: &mut [u8]) -> Result<(), DeviceError> {
    entropy::fill(bytes).map_err(|source| DeviceError::Host {
        what: "getting entropy",
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Driver, INDIRECT, MEMORY_BYTES, NEXT, WRITE};
    use super::*;
    use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

    fn live() -> Driver {
        Driver::live(Rng::default(), 0)
    }

    #[test]
    fn buffers_are_filled_and_the_driver_is_told() {
        let mut driver = live();
        let first = driver.offer(0, &[], &[40, 24])[0];
        let second = driver.offer(0, &[], &[64])[0];
        driver.notify(0);
        assert_eq!(driver.wait_used(0), (0, 64));
        assert_eq!(driver.wait_used(0), (2, 64));
        let (first, second) = (driver.peek(first, 24), driver.peek(second, 24));
        assert_ne!(first, [0; 24]);
        assert_ne!(first, second);
        driver.wait_until("the interrupt", |driver| driver.interrupt.clear());
        assert_eq!(driver.get(0x60), 1);
        driver.set(0x64, 1);
        assert_eq!(driver.get(0x60), 0);
    }

    #[test]
    fn a_request_is_capped() {
        let mut driver = live();
        driver.offer(0, &[], &[REQUEST_BYTES * 2]);
        driver.notify(0);
        assert_eq!(driver.wait_used(0), (0, REQUEST_BYTES));
    }

    /// Every lie that a driver can tell with a ring: the device stops, says why, and works again
    /// after a reset.
    #[test]
    fn lies_stop_the_device_until_reset() {
        type Lie = fn(&mut Driver);
        let lies: [(&str, Lie); 11] = [
            ("loop", |driver| {
                driver.descriptor(0, 0, (0x8_0000, 1, NEXT, 1));
                driver.descriptor(0, 1, (0x8_0000, 1, NEXT, 0));
                driver.make_available(0, 0);
            }),
            ("next outside the table", |driver| {
                driver.descriptor(0, 0, (0x8_0000, 1, NEXT | WRITE, 16));
                driver.make_available(0, 0);
            }),
            ("head outside the table", |driver| {
                driver.make_available(0, 16)
            }),
            ("head far outside", |driver| {
                driver.make_available(0, u16::MAX)
            }),
            ("index beyond the ring", |driver| {
                driver.claim_available(0, 17)
            }),
            ("index backwards", |driver| {
                driver.claim_available(0, u16::MAX)
            }),
            ("address outside memory", |driver| {
                driver.descriptor(0, 0, (MEMORY_BYTES, 1, WRITE, 0));
                driver.make_available(0, 0);
            }),
            ("address that wraps", |driver| {
                driver.descriptor(0, 0, (u64::MAX - 3, 8, WRITE, 0));
                driver.make_available(0, 0);
            }),
            ("4 GiB", |driver| {
                driver.descriptor(0, 0, (0, u32::MAX, WRITE, 0));
                driver.make_available(0, 0);
            }),
            ("readable after writable", |driver| {
                driver.descriptor(0, 0, (0x8_0000, 8, WRITE | NEXT, 1));
                driver.descriptor(0, 1, (0x8_0000, 8, 0, 0));
                driver.make_available(0, 0);
            }),
            ("table in a table", |driver| {
                driver.raw_descriptor(0x8_0000, (0x8_0000, 16, INDIRECT, 0));
                driver.descriptor(0, 0, (0x8_0000, 16, INDIRECT, 0));
                driver.make_available(0, 0);
            }),
        ];
        let mut driver = live();
        for (name, lie) in lies {
            lie(&mut driver);
            driver.notify(0);
            let why = driver.wait_broken();
            assert!(why.starts_with("virtio-rng: queue 0"), "{name}: {why}");
            // Broken is broken: nothing more is served.
            driver.notify(0);
            assert_eq!(driver.take_used(0), None, "{name}");
            driver.reset();
            driver.set_up(0);
            driver.offer(0, &[], &[8]);
            driver.notify(0);
            assert_eq!(driver.wait_used(0), (0, 8), "after {name}");
            driver.reset();
            driver.set_up(0);
        }
    }

    #[test]
    fn empty_and_odd_requests_are_no_lies() {
        let mut driver = live();
        driver.descriptor(0, 0, (u64::MAX, 0, WRITE, 0));
        driver.make_available(0, 0);
        driver.notify(0);
        assert_eq!(driver.wait_used(0), (0, 0));
        // Only readable: there is no room for anything.
        driver.descriptor(0, 1, (0x8_0000, 8, 0, 0));
        driver.make_available(0, 1);
        driver.notify(0);
        assert_eq!(driver.wait_used(0), (1, 0));
        // An indirect table that is as it should be.
        driver.raw_descriptor(0x8_1000, (0x8_2000, 8, WRITE | NEXT, 1));
        driver.raw_descriptor(0x8_1010, (0x8_3000, 8, WRITE, 0));
        driver.descriptor(0, 2, (0x8_1000, 32, INDIRECT, 0));
        driver.make_available(0, 2);
        driver.notify(0);
        assert_eq!(driver.wait_used(0), (2, 16));
    }

    /// Indices count to 2^16 and begin anew, with and without event indices.
    #[test]
    fn indices_wrap_around() {
        for features in [0, 1 << VIRTIO_RING_F_EVENT_IDX] {
            let mut driver = Driver::live(Rng::default(), features);
            // Sixteen at once, sixteen to a ring.
            for round in 0..4100_u32 {
                driver.forget_buffers();
                for _ in 0..16 {
                    driver.offer(0, &[], &[1]);
                }
                driver.notify(0);
                for head in 0..16 {
                    assert_eq!(driver.wait_used(0), (head, 1), "round {round}");
                }
            }
        }
    }
}
