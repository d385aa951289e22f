//! A host with one machine.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::num::NonZeroU32;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use insula_vmm::Hypervisor;
use insula_vmm::monitor::description::{DiskDescription, MachineDescription, Origin, Writes};
use insula_vmm::monitor::launch::{self, Orders, Walls};
use insula_vmm::monitor::protocol::{Record, Request};
use insula_vmm::monitor::wire::Outgoing;
use insula_vmm::monitor::{CallError, Client};
use insula_vmm::rate_limiter::RateLimits;
use libtest_mimic::Failed;

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const USER: u32 = 734_569;
const SOCKET: &str = "control";

pub(crate) struct Monitored {
    pub(crate) child: Child,
    pub(crate) client: Client,
    directory: tempfile::TempDir,
}

/// What somebody at the console sees.
pub(crate) struct Terminal {
    pub(crate) socket: UnixStream,
}

impl Terminal {
    /// Reads so many bytes, and no more.
    pub(crate) fn read_text(&mut self, length: usize) -> Result<String, Failed> {
        self.socket.set_read_timeout(Some(PATIENCE))?;
        let mut bytes = vec![0; length];
        self.socket.read_exact(&mut bytes)?;
        Ok(String::from_utf8(bytes)?)
    }
}

pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) -> Result<(), Failed> {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        if Instant::now() > deadline {
            return Err(format!("{what}: not in time").into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

impl Monitored {
    /// A machine that echoes; `None`, and said so, where there is no KVM.
    pub(crate) fn start() -> Result<Option<Self>, Failed> {
        let monitored = Self::born(&crate::kernel::image())?;
        if let Some(monitored) = &monitored {
            monitored.describe()?;
        }
        Ok(monitored)
    }

    /// A monitor that has not been told of its machine, which has this kernel.
    pub(crate) fn born(kernel: &[u8]) -> Result<Option<Self>, Failed> {
        if let Err(why) = Hypervisor::open() {
            writeln!(io::stderr(), "skipped: {why}")?;
            return Ok(None);
        }
        let directory = tempfile::tempdir()?;
        let path = directory.path();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
        fs::create_dir(path.join("root"))?;
        let socket = launch::listen_at(path, SOCKET)?;
        let orders = Orders {
            root: path.join("root"),
            cgroups: Vec::new(),
            user: NonZeroU32::new(USER).ok_or("zero")?,
            group: NonZeroU32::new(USER).ok_or("zero")?,
            descriptors: 128,
            file_bytes: 1 << 30,
            threads: 32,
            walls: if rustix::process::geteuid().is_root() {
                Walls::All
            } else {
                Walls::Own
            },
        };
        let child = launch::spawn(
            (&std::env::current_exe()?, crate::VERB),
            &orders,
            socket,
            new_file(&path.join("record"))?,
            new_file(&path.join("log"))?,
        )?;
        let monitored = Self {
            child,
            client: Client::connect(path, SOCKET)?,
            directory,
        };
        fs::write(monitored.path("kernel"), kernel)?;
        Ok(Some(monitored))
    }

    /// Tells the monitor of its machine.
    pub(crate) fn describe(&self) -> Result<(), Failed> {
        fs::write(self.path("disk"), [0; 1 << 16])?;
        let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
        let kernel = File::open(self.path("kernel"))?;
        let disk = File::open(self.path("disk"))?;
        let overlay = new_file(&self.path("overlay"))?;
        let vsock = UnixListener::bind(self.path("vsock"))?;
        let mut with = Outgoing::default();
        let machine = MachineDescription {
            kvm: with.add(kvm.as_fd())?,
            origin: Origin::Boot {
                vcpus: 2,
                memory_bytes: 16 << 20,
                kernel: with.add(kernel.as_fd())?,
                initrd: None,
                command_line: String::new(),
            },
            disks: vec![DiskDescription {
                serial: "root".to_owned(),
                image: with.add(disk.as_fd())?,
                writes: Writes::Overlay {
                    file: with.add(overlay.as_fd())?,
                    base: "ab".repeat(32),
                    disk_bytes: None,
                },
                limits: RateLimits::default(),
            }],
            vsock: Some(with.add(vsock.as_fd())?),
            net: None,
        };
        let machine = Box::new(machine);
        self.client
            .order(&Request::Start { machine }, &with, PATIENCE)?;
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn connect(&self) -> io::Result<Client> {
        Client::connect(self.directory.path(), SOCKET)
    }

    pub(crate) fn order(&self, request: &Request) -> Result<(), CallError> {
        self.client.order(request, &Outgoing::default(), PATIENCE)
    }

    pub(crate) fn terminal(&self, client: &Client) -> Result<Terminal, Failed> {
        let (socket, there) = UnixStream::pair()?;
        let mut with = Outgoing::default();
        with.add(there.as_fd())?;
        client.order(&Request::Console, &with, PATIENCE)?;
        Ok(Terminal { socket })
    }

    /// Says something that is no request; returns what came back before the connection ended.
    pub(crate) fn say(&self, words: &[u8]) -> Result<String, Failed> {
        use rustix::net::{RecvFlags, SendFlags, recv, send};
        let client = self.connect()?;
        send(client.as_fd(), words, SendFlags::NOSIGNAL)?;
        let mut answer = vec![0; 1 << 16];
        let mut text = String::new();
        loop {
            match recv(client.as_fd(), &mut answer, RecvFlags::empty()) {
                Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => return Ok(text),
                Ok((length, _)) => text.push_str(&String::from_utf8_lossy(&answer[..length])),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for the monitor's end; returns its status, and its record if it left one.
    pub(crate) fn end(mut self) -> Result<(ExitStatus, Option<Record>), Failed> {
        let mut status = None;
        until("the monitor's end", || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        })?;
        let record = fs::read_to_string(self.path("record"))?;
        let log = fs::read_to_string(self.path("log"))?;
        writeln!(io::stderr(), "{log}")?;
        let record = (!record.is_empty()).then(|| serde_json::from_str(&record));
        Ok((status.ok_or("no status")?, record.transpose()?))
    }
}

impl Drop for Monitored {
    fn drop(&mut self) {
        // A test that failed must not leave a process behind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn new_file(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
}
