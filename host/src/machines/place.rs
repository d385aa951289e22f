//! A machine's directory.
//!
//! ```text
//! <data>/machines/<id>/root/          the monitor's root, empty
//!                      control        the socket on which it listens
//!                      vsock          the socket that leads to the guest's sockets
//!                      record         why it ended
//!                      network        its address, and the ports that led to it last
//!                      log            what it said, the last two times
//!                      disk-<n>       what the guest wrote, over the image
//!                      saved/         its last snapshot
//! ```
//!
//! Only ids stand in paths. The directory outlives host and monitor: a host that starts finds here
//! which monitors are alive, and why those ended that are not.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use insula_types::MachineId;
use insula_vmm::monitor::Client;
use insula_vmm::monitor::launch;
use insula_vmm::monitor::protocol::Record;
use sha2::Digest as _;

use super::saved;

const SOCKET: &str = "control";
const RECORD: &str = "record";
const LEASE: &str = "network";
const LOG: &str = "log";
const LOG_BEFORE: &str = "log.before";
/// A record is a sentence; what is longer is none.
const RECORD_MAX_BYTES: u64 = 16 << 10;

/// All machines' directories.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    base: PathBuf,
}

/// One machine's directory.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    path: PathBuf,
    salt: u32,
}

impl Places {
    /// In this directory.
    pub(crate) fn open(base: &Path) -> io::Result<Self> {
        let base = fs::canonicalize(base)?;
        Ok(Self { base })
    }

    /// Tells this host's control groups from those of another one on the same machine; the same
    /// after every start.
    pub(crate) fn instance(&self) -> String {
        let hash = self.hash();
        hash.iter()
            .take(4)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    pub(crate) fn of(&self, machine: MachineId) -> Place {
        let hash = self.hash();
        let [a, b, c, d, ..] = hash;
        Place {
            path: self.base.join(machine.to_string()),
            salt: u32::from_be_bytes([a, b, c, d]),
        }
    }

    fn hash(&self) -> [u8; 32] {
        use std::os::unix::ffi::OsStrExt;
        sha2::Sha256::digest(self.base.as_os_str().as_bytes()).into()
    }

    /// The machines that have a directory.
    pub(crate) fn all(&self) -> io::Result<Vec<MachineId>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.base)? {
            let name = entry?.file_name();
            if let Some(id) = name.to_str().and_then(|name| name.parse().ok()) {
                all.push(MachineId::new(id));
            }
        }
        Ok(all)
    }
}

impl Place {
    /// Tells this host's machines from those of another host with the same numbers.
    pub(crate) fn salt(&self) -> u32 {
        self.salt
    }

    /// The directory itself.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory, if it is not there.
    pub(super) fn make(&self) -> io::Result<()> {
        make(&self.path, 0o711)
    }

    /// When its last snapshot was made, if there is one.
    pub(crate) fn saved_at(&self) -> Option<SystemTime> {
        let made = fs::metadata(saved::saved(&self.path));
        made.ok()?.modified().ok()
    }

    /// The monitor's root.
    pub(crate) fn root(&self) -> PathBuf {
        self.path.join("root")
    }

    /// Makes everything ready for a new monitor: its socket, its record, its log.
    pub(crate) fn prepare(&self) -> io::Result<(OwnedFd, File, File)> {
        self.make()?;
        make(&self.root(), 0o755)?;
        forget(&self.path.join(SOCKET))?;
        let socket = launch::listen_at(&self.path, SOCKET)?;
        let record = new(&self.path.join(RECORD))?;
        if let Err(error) = fs::rename(self.path.join(LOG), self.path.join(LOG_BEFORE))
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
        Ok((socket, record, new(&self.path.join(LOG))?))
    }

    /// Where processes of this host speak with sockets of the guest: `CONNECT <port>` and a line
    /// feed first.
    pub(crate) fn vsock(&self) -> io::Result<UnixListener> {
        let path = self.path.join("vsock");
        forget(&path)?;
        launch::listen_stream_at(&self.path, "vsock")
    }

    /// Connects to the monitor, if it lives.
    pub(crate) fn connect(&self) -> io::Result<Client> {
        Client::connect(&self.path, SOCKET)
    }

    /// What the monitor left; nothing, when it was killed.
    pub(crate) fn record(&self) -> Option<Record> {
        let file = File::open(self.path.join(RECORD)).ok()?;
        let mut bytes = Vec::new();
        // Cut off, it cannot be understood.
        file.take(RECORD_MAX_BYTES).read_to_end(&mut bytes).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// What the guest writes to its disk number `number`; empty when it is new.
    pub(crate) fn overlay(&self, number: usize) -> io::Result<File> {
        self.make()?;
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.path.join(saved::overlay(number)))
    }

    /// Where its address is written down.
    pub(super) fn lease(&self) -> PathBuf {
        self.path.join(LEASE)
    }

    /// Bytes that its files take on the host's disk.
    pub(crate) fn stored_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let own = fs::read_dir(&self.path).into_iter().flatten();
        let saved = fs::read_dir(saved::saved(&self.path)).into_iter().flatten();
        let sizes = own
            .chain(saved)
            .flatten()
            .filter_map(|entry| entry.metadata().ok());
        // stat(2): blocks of 512 bytes.
        sizes.map(|metadata| metadata.blocks() * 512).sum()
    }

    /// Removes it and all that is in it.
    pub(crate) fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

fn make(path: &Path, mode: u32) -> io::Result<()> {
    match fs::DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

fn forget(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn new(path: &Path) -> io::Result<File> {
    forget(path)?;
    File::options()
        .read(true)
        .append(true)
        .create_new(true)
        .open(path)
}
