//! Everything that a guest finds at ports and addresses, and who answers.
//!
//! What nobody answers reads as all ones and swallows writes, as on a PC's bus; it is counted.

mod generation;
mod power;
mod serial;
pub(crate) mod watchdog;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::I8042Device;

use crate::exit::{ExitReason, RebootBy};
use crate::layout;
use crate::virtio::MmioTransport;

pub use generation::GenerationError;
pub(crate) use generation::GenerationId;
use power::PowerRegisters;
pub use serial::ConsoleCounts;
pub(crate) use serial::{SerialPort, SerialSaved, feed};
use watchdog::Watchdog;

/// What a guest's access asks of the machine.
pub(crate) type Request = Option<ExitReason>;

/// Ports of the keyboard controller: data, and command four above.
const I8042_PORTS: std::ops::RangeInclusive<u16> = layout::I8042_PORT..=layout::I8042_PORT + 4;
const COM1_PORTS: std::ops::RangeInclusive<u16> = layout::COM1_PORT..=layout::COM1_PORT + 7;

/// All devices of a machine, shared by its vCPU threads.
#[derive(Debug)]
pub(crate) struct Devices {
    serial: Arc<SerialPort>,
    keyboard: Mutex<I8042Device<ResetLine>>,
    virtio: Vec<Mutex<MmioTransport>>,
    watchdog: Arc<Watchdog>,
}

impl Devices {
    pub(crate) fn new(
        serial: Arc<SerialPort>,
        virtio: Vec<MmioTransport>,
        watchdog: Arc<Watchdog>,
    ) -> Self {
        Self {
            serial,
            keyboard: Mutex::new(I8042Device::new(ResetLine::default())),
            virtio: virtio.into_iter().map(Mutex::new).collect(),
            watchdog,
        }
    }

    pub(crate) fn serial(&self) -> &Arc<SerialPort> {
        &self.serial
    }

    pub(crate) fn watchdog(&self) -> &Arc<Watchdog> {
        &self.watchdog
    }

    /// Each virtio device, locked for as long as it is looked at.
    pub(crate) fn virtio(&self) -> impl Iterator<Item = MutexGuard<'_, MmioTransport>> {
        self.virtio.iter().map(lock)
    }

    /// The guest reads from a port.
    pub(crate) fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        // Our registers are all one byte wide; a wider access reads the first.
        let Some(first) = data.first_mut() else {
            return;
        };
        if COM1_PORTS.contains(&port) {
            *first = self.serial.read(port - layout::COM1_PORT);
        } else if I8042_PORTS.contains(&port) {
            let offset = u8::try_from(port - layout::I8042_PORT).unwrap_or(0);
            *first = lock(&self.keyboard).read(offset);
        } else if let Some(value) = PowerRegisters::read(port) {
            *first = value;
        }
    }

    /// The guest writes to a port.
    pub(crate) fn port_write(&self, port: u16, data: &[u8]) -> Request {
        let value = *data.first()?;
        if COM1_PORTS.contains(&port) {
            self.serial.write(port - layout::COM1_PORT, value);
            None
        } else if I8042_PORTS.contains(&port) {
            let offset = u8::try_from(port - layout::I8042_PORT).unwrap_or(0);
            let mut keyboard = lock(&self.keyboard);
            // Our line cannot fail.
            let _ = keyboard.write(offset, value);
            let pulled = keyboard.reset_evt().pulled();
            pulled.then_some(ExitReason::Reboot(RebootBy::Keyboard))
        } else {
            PowerRegisters::write(port, value)
        }
    }

    /// The guest reads from an address that is not memory.
    pub(crate) fn memory_read(&self, address: u64, data: &mut [u8]) {
        if let Some((device, offset)) = self.virtio_at(address) {
            return device.read(offset, data);
        }
        data.fill(0xff);
        if let Some(offset) = Watchdog::offset_of(address) {
            self.watchdog.read(offset, data);
        }
    }

    /// The guest writes to an address that is not memory.
    pub(crate) fn memory_write(&self, address: u64, data: &[u8]) {
        if let Some((mut device, offset)) = self.virtio_at(address) {
            device.write(offset, data);
        } else if let Some(offset) = Watchdog::offset_of(address) {
            self.watchdog.write(offset, data);
        }
    }

    fn virtio_at(&self, address: u64) -> Option<(MutexGuard<'_, MmioTransport>, u64)> {
        let beyond = address.checked_sub(layout::VIRTIO_MMIO.0)?;
        let slot = usize::try_from(beyond / layout::VIRTIO_MMIO_BYTES).ok()?;
        let device = self.virtio.get(slot)?;
        Some((lock(device), beyond % layout::VIRTIO_MMIO_BYTES))
    }
}

/// A vCPU thread that panicked ends the machine; until then the others may see its devices.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The line from keyboard controller to processor reset.
#[derive(Debug, Default)]
struct ResetLine {
    pulled: std::sync::atomic::AtomicBool,
}

impl ResetLine {
    fn pulled(&self) -> bool {
        self.pulled.load(std::sync::atomic::Ordering::Relaxed)
    }
}

impl vm_superio::Trigger for ResetLine {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.pulled
            .store(true, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }
}
