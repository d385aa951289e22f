//! The host's part in a monitor's birth: its socket, its orders, its process.

use std::fs::{self, File};
use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};

use crate::jail::spawn::in_pid_namespace;
use crate::jail::{Identity, Limits, Spec};

/// Hosts that may wait to be accepted.
pub(super) const BACKLOG: i32 = 4;

/// Which walls a monitor must find standing, or it does not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Walls {
    /// Every one: the host is root.
    All,
    /// Those that need no privilege; the others are taken where the kernel gives them.
    Own,
}

/// What a monitor finds on its command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Orders {
    /// The directory that becomes its root.
    pub root: PathBuf,
    /// The groups to move into.
    pub cgroups: Vec<PathBuf>,
    /// Who to become.
    pub user: NonZeroU32,
    /// And in which group.
    pub group: NonZeroU32,
    /// Descriptors open at once.
    pub descriptors: u64,
    /// The largest file that it may write, in bytes.
    pub file_bytes: u64,
    /// Its threads.
    pub threads: u64,
    /// What must hold.
    pub walls: Walls,
}

impl Orders {
    pub(super) fn jail(&self) -> Spec {
        Spec {
            root: self.root.clone(),
            cgroups: self.cgroups.clone(),
            identity: Identity {
                user: self.user,
                group: self.group,
            },
            limits: Limits {
                descriptors: self.descriptors,
                file_bytes: self.file_bytes,
                threads: self.threads,
            },
            capabilities: CapabilitySet::empty(),
            keep: vec![0, 1, 2],
        }
    }
}

/// Starts `program` as a monitor. It lives on when the caller ends.
///
/// `verb` is what `program` calls [`run`](super::run) for; the orders follow it.
///
/// # Errors
/// No process is to be had.
pub fn spawn(
    (program, verb): (&Path, &str),
    orders: &Orders,
    socket: OwnedFd,
    record: File,
    log: File,
) -> io::Result<Child> {
    let mut command = Command::new(program);
    command
        .arg(verb)
        .arg(serde_json::to_string(orders)?)
        .env_clear()
        // The program's allocator would take its own heap on large pages, and fill them with zeroes
        // before the guest has run; it obeys by having none at all, which `run` takes back.
        .env("MIMALLOC_ALLOW_THP", "0")
        .stdin(socket)
        .stdout(record)
        .stderr(log);
    // A terminal's interrupt is for the host.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let (child, _) = in_pid_namespace(&mut command)?;
    Ok(child)
}

/// Makes the socket `name` in `directory`, where a monitor is going to listen.
///
/// # Errors
/// The name is taken, or the system's.
pub fn listen_at(directory: &Path, name: &str) -> io::Result<OwnedFd> {
    let socket = socket()?;
    with_address(directory, name, |address| bind(&socket, address))?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Makes the stream socket `name` in `directory`, listening.
///
/// # Errors
/// The name is taken, or the system's.
pub fn listen_stream_at(directory: &Path, name: &str) -> io::Result<UnixListener> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    with_address(directory, name, |address| bind(&socket, address))?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

pub(super) fn connect_to(directory: &Path, name: &str) -> io::Result<OwnedFd> {
    let socket = socket()?;
    with_address(directory, name, |address| connect(&socket, address))?;
    Ok(socket)
}

fn socket() -> io::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(socket_with(family, kind, SocketFlags::CLOEXEC, None)?)
}

/// A socket's address has room for 107 bytes, and a data directory may be anywhere: so the address
/// goes through a descriptor of the directory.
fn with_address(
    directory: &Path,
    name: &str,
    then: impl FnOnce(&SocketAddrUnix) -> rustix::io::Result<()>,
) -> io::Result<()> {
    let directory = fs::File::open(directory)?;
    let address = format!("/proc/self/fd/{}/{name}", directory.as_raw_fd());
    then(&SocketAddrUnix::new(address)?)?;
    Ok(())
}
