//! The process that runs one machine: what its `main` does, and how its host speaks with it.
//!
//! ```text
//!  host                                         monitor
//!  ────                                         ───────
//!  launch::spawn: directory, listening socket,
//!  record, log ───────────── exec ────────────▶ run: jail ─▶ serve
//!  Client::connect ──────────────────────────▶  accepts
//!  Start, with /dev/kvm, kernel, disks ───────▶ makes the machine, each thread behind its filter,
//!                                               first guest instruction
//!  Pause, Resume, Statistics, Console … ──────▶
//!            ◀── end of connection ───────────  record written, exit
//! ```
//!
//! **Descriptors.** The monitor is born with three: the listening socket as standard input, the
//! record as standard output, the log as standard error. Everything else comes with requests.
//!
//! **Failure paths.** The *record* says why a machine is over, also to a host that was not there
//! then. A monitor that was killed leaves it empty, which says as much. A host that dies takes no
//! machine with it: the socket is still listening, under the same name, for its successor. A guest
//! that reboots ends its monitor, since behind its filter that could make no new machine; the host
//! starts another.

mod alive;
pub mod client;
mod console;
pub mod description;
pub mod launch;
pub mod protocol;
mod serve;
pub mod wire;

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::process::ExitCode;

use crate::jail::seccomp::Filters;
use crate::jail::{self, Measure};
use crate::memory::pages;

pub use client::{CallError, Client};
use launch::{Orders, Walls};
use protocol::{Cause, Record};

/// The monitor process from beginning to end; called first in `main`, while there is one thread.
///
/// `orders` are what [`launch::spawn`] put on the command line.
#[must_use]
pub fn run(orders: &str) -> ExitCode {
    jail::say_panics_in_one_line();
    pages::allow_large_pages();
    let record = match prepare(orders) {
        Ok(service) => service.run(),
        Err(error) => Record {
            cause: Cause::Setup,
            detail: error.to_string(),
        },
    };
    let orderly = !matches!(record.cause, Cause::Setup | Cause::Failed);
    let written = serde_json::to_string(&record)
        .map_err(io::Error::other)
        .and_then(|text| io::stdout().write_all(text.as_bytes()));
    if written.is_err() || !orderly {
        // The log may be gone as well; the exit code remains.
        let _ = writeln!(io::stderr(), "{}", record.detail);
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Why a monitor does not even listen.
#[derive(Debug, thiserror::Error)]
enum PrepareError {
    #[error("the monitor's orders cannot be read: {0}")]
    Orders(#[from] serde_json::Error),
    #[error(transparent)]
    NotAlone(#[from] jail::NotAlone),
    #[error(transparent)]
    Weak(#[from] jail::Weak),
    #[error("the working directory or the listening socket: {0}")]
    System(#[from] io::Error),
}

fn prepare(orders: &str) -> Result<serve::Service, PrepareError> {
    let orders: Orders = serde_json::from_str(orders)?;
    // Of no directory of the host's, also where its root stays. Not by its spawner, for whom a
    // program of ours that is linked statically would have to fork.
    rustix::process::chdir("/").map_err(io::Error::from)?;
    let listener = rustix::io::dup(io::stdin().as_fd()).map_err(io::Error::from)?;
    let mut spec = orders.jail();
    spec.keep.push(listener.as_raw_fd());
    let report = jail::enter(&spec)?;
    for (measure, why) in report.missing() {
        let _ = writeln!(io::stderr(), "without {}: {why}", measure.word());
    }
    report.require(&required(&orders))?;
    rustix::io::ioctl_fionbio(&listener, true).map_err(io::Error::from)?;
    // Once more, by the process that listens from now on: the kernel tells whoever connects which
    // process that was, and so a later host finds its monitor's number.
    rustix::net::listen(&listener, launch::BACKLOG).map_err(io::Error::from)?;
    Ok(serve::Service::new(listener, Filters::default()))
}

/// What a machine does not run without.
fn required(orders: &Orders) -> Vec<Measure> {
    match orders.walls {
        Walls::All => {
            let mut all = Measure::ALL.to_vec();
            // Where the kernel has no groups, the host says so, and asks for none.
            all.retain(|measure| *measure != Measure::Cgroup || !orders.cgroups.is_empty());
            all
        }
        // What needs no privilege of any kind.
        Walls::Own => vec![
            Measure::Descriptors,
            Measure::ResourceLimits,
            Measure::NoCapabilities,
            Measure::NoNewPrivileges,
            Measure::NotDumpable,
        ],
    }
}
