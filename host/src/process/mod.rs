//! The data plane as a process of its own.
//!
//! ```text
//!  control process                                   data process (`insula data-plane`)
//!  ───────────────                                   ────────────────────────────────────
//!  binds the listeners, keeps them
//!  keeper ── starts ───────────────────────────────▶ link on descriptor 0
//!         ── Assignment: settings, listeners ──────▶ engine, walls, threads   (child)
//!         ◀───────────────────────────── Ready ────
//!  Up ◀── keeper
//!  control ── commands ─▶ keeper ── link ──────────▶ desk of `crate::data`
//!          ◀─ reports ─── keeper ◀─ link ─────────── desk
//! ```
//!
//! * [`keeper`]: control's side; starts the process, and starts it again when it dies
//! * [`child`]: what the process does
//! * [`inquest`]: what control finds out for it
//! * [`walls`]: what it gives up before it takes a request
//! * [`compiler`]: what a compiler child gives up before it reads a component
//!
//! **Data dies.** The kernel closes its end of the link. The keeper says [`DataEvent::Down`], buries
//! the process and starts another with the same listeners, in which clients' connections wait
//! meanwhile; control then tells it everything ([`crate::control`]'s `reconcile`).
//!
//! **Control dies.** The data process is killed by the kernel with it (decision 23): without
//! control there is nobody to take a change back, to count what is used, or to stop it. The next
//! control starts a new one.
//!
//! [`DataEvent::Down`]: crate::messages::DataEvent::Down

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use insula_types::quantity::{Bytes, Fuel, Millis};
use insula_types::spec::RequestLimits;
use serde::{Deserialize, Serialize};

use crate::link::wire::{Message, MessageError, Parcel};
use crate::outbound::Network;
use crate::tls::Pem;

pub mod child;
pub(crate) mod compiler;
mod filter;
mod inquest;
pub mod keeper;
pub mod walls;

/// What a data process is to be, told once.
#[derive(Debug)]
struct Assignment {
    settings: Settings,
    /// One for each worker, or as many as can be sent at once.
    listeners: Vec<TcpListener>,
}

/// What of an assignment is plain data.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Settings {
    domain: String,
    workers: usize,
    ceiling: Ceiling,
    instances: u32,
    code_idle: Duration,
    guest_memory: Bytes,
    outbound_networks: Vec<Network>,
    artefact_key: [u8; 32],
    certificate: Option<Pem>,
    /// An empty directory, which becomes its root.
    root: PathBuf,
}

/// [`RequestLimits`], which in documents have several forms.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Ceiling {
    memory: Bytes,
    fuel: Fuel,
    timeout_ms: u64,
    request_body: Bytes,
}

impl From<RequestLimits> for Ceiling {
    fn from(limits: RequestLimits) -> Self {
        Self {
            memory: limits.memory,
            fuel: limits.fuel,
            timeout_ms: limits.timeout.get(),
            request_body: limits.request_body,
        }
    }
}

impl From<Ceiling> for RequestLimits {
    fn from(ceiling: Ceiling) -> Self {
        Self {
            memory: ceiling.memory,
            fuel: ceiling.fuel,
            timeout: Millis::new(ceiling.timeout_ms).unwrap_or(Millis::MAX),
            request_body: ceiling.request_body,
        }
    }
}

impl Message for Assignment {
    fn pack(self) -> Result<Parcel, MessageError> {
        Ok(Parcel {
            payload: serde_json::to_vec(&self.settings)?,
            files: self.listeners.into_iter().map(OwnedFd::from).collect(),
        })
    }

    fn unpack(parcel: Parcel) -> Result<Self, MessageError> {
        Ok(Self {
            settings: serde_json::from_slice(&parcel.payload)?,
            listeners: parcel.files.into_iter().map(TcpListener::from).collect(),
        })
    }
}
