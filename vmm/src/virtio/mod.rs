//! Virtio 1.2 over MMIO: what every device shares.
//!
//! ```text
//!   vCPU threads                    │  one worker thread per device
//!   ────────────                    │  ───────────────────────────
//!   MmioTransport: registers,       │  Worker: waits for commands, for queue
//!   status, which queue where  ────▶│  notifications, and for what the device watches
//!         │    Command              │        │ calls
//!         │                         │        ▼
//!         │                         │  dyn VirtioDevice: the back end, and Queues: the rings
//!         └── Shared ◀──────────────┴── interrupt status and line, configuration space
//! ```
//!
//! *Who owns what.* Until the driver sets DRIVER_OK the transport owns the queues and nothing runs.
//! At DRIVER_OK they move to the worker, and the registers that describe them are frozen. A reset
//! takes them back: the vCPU that wrote it waits until the worker has let go, so that no
//! request of the time before touches memory after.
//!
//! *What a hostile driver can do.* Name addresses outside memory, loops, indices beyond the ring,
//! lengths without end: [`queue`] refuses each with a [`QueueError`], the worker stops the device
//! and sets NEEDS_RESET, and the machine goes on without it until the driver resets it. It can
//! notify without end: that costs its own vCPU time and a bounded turn of the worker.

pub mod balloon;
pub mod block;
mod config_space;
mod device;
#[cfg(test)]
mod fuzz;
mod interrupt;
pub mod net;
pub mod queue;
#[cfg(test)]
mod queue_tests;
pub mod rng;
mod status;
#[cfg(test)]
pub(crate) mod testing;
mod throttle;
mod transport;
#[cfg(test)]
mod transport_tests;
pub mod vsock;
mod worker;

pub use config_space::ConfigSpace;
pub use device::{
    DeviceError, DeviceKind, DeviceState, Interest, QueueSpec, Readiness, VirtioDevice,
};
pub use interrupt::{Interrupt, InterruptLine};
pub use queue::{Chain, QueueError, Queues, Served};
pub use status::Status;
pub use transport::{MmioTransport, RestoreError, SavedQueue, TransportState};
pub use worker::{Worker, WorkerError};
