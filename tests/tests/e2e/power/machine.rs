//! A machine with a host in it, whose power can be cut.

use std::io::{BufRead, BufReader, Error, ErrorKind};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use insula_tests::Admin;
use insula_tests::wait::{holds, until};

use super::disk::{Disk, serve};

/// From power to a host that is ready: seconds of a processor that is emulated.
const READY_WITHIN: Duration = Duration::from_secs(180);

/// What it is made of, by `cargo xtask vm-test power`.
pub(crate) struct Parts {
    kernel: PathBuf,
    image: PathBuf,
    pub(crate) disk: Vec<u8>,
}

impl Parts {
    /// `None` where nobody has made them.
    pub(crate) fn find() -> Option<Self> {
        let folder = PathBuf::from(std::env::var_os("INSULA_TEST_POWER")?);
        let disk = folder.join("power.ext4");
        let disk = std::fs::read(&disk).unwrap_or_else(|why| panic!("{}: {why}", disk.display()));
        Some(Self {
            kernel: folder.join("vmlinuz"),
            image: folder.join("power.cpio"),
            disk,
        })
    }
}

/// One that is on.
pub(crate) struct Machine {
    emulator: Child,
    disk: Option<JoinHandle<()>>,
    console: Arc<Mutex<String>>,
    ingress: SocketAddr,
    admin: SocketAddr,
    _folder: tempfile::TempDir,
}

/// A port of this machine's that nobody uses.
fn port() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("it has an address")
}

impl Machine {
    /// Turns it on.
    pub(crate) fn on(parts: &Parts, disk: &Arc<Mutex<Disk>>) -> Self {
        let folder = tempfile::tempdir().expect("a directory");
        let socket = folder.path().join("disk");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let disk = Arc::clone(disk);
        let disk = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("the emulator");
            // It may be killed in the middle of a word.
            let gone = |error: &Error| {
                use ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
                matches!(error.kind(), ConnectionReset | BrokenPipe | UnexpectedEof)
            };
            if let Err(error) = serve(stream, &disk) {
                assert!(gone(&error), "the emulator keeps to the protocol: {error}");
            }
        });
        let (ingress, admin) = (port(), port());
        let mut emulator = emulator(parts, &socket, ingress, admin)
            .spawn()
            .expect("qemu-system-x86_64");
        let console = Arc::new(Mutex::new(String::new()));
        let lines = emulator.stdout.take().expect("a console");
        let sink = Arc::clone(&console);
        std::thread::spawn(move || {
            for line in BufReader::new(lines).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                let mut console = sink.lock().expect("a console");
                console.push_str(line.trim_end());
                console.push('\n');
            }
        });
        Self {
            emulator,
            disk: Some(disk),
            console,
            ingress,
            admin,
            _folder: folder,
        }
    }

    pub(crate) fn console(&self) -> String {
        self.console.lock().expect("a console").clone()
    }

    /// Where its host answers.
    pub(crate) const fn ingress(&self) -> SocketAddr {
        self.ingress
    }

    /// The API of its host, once that is ready.
    pub(crate) fn ready(&self) -> Admin {
        let token = until(READY_WITHIN, "the host has a token", || {
            let console = self.console();
            let line = console.lines().find_map(|line| line.split_once("bed: "));
            let (word, rest) = line
                .and_then(|(_, line)| line.split_once(' '))
                .unwrap_or_default();
            assert_ne!(word, "FAILED", "{console}");
            (word == "token")
                .then(|| rest.trim().to_owned())
                .ok_or(console)
        });
        let admin = Admin::new(self.admin, Some(token));
        until(READY_WITHIN, "the host is ready", || {
            let patience = Duration::from_secs(20);
            let ready = admin
                .request("GET", "/readyz")
                .patience(patience)
                .try_send();
            let ready = ready.map_err(|_| self.console())?;
            holds(ready.status == 200, ready.text())
        });
        admin
    }

    /// Cuts its power.
    pub(crate) fn cut(mut self) {
        self.off();
    }

    fn off(&mut self) {
        let _ = self.emulator.kill();
        let _ = self.emulator.wait();
        if let Some(disk) = self.disk.take() {
            let served = disk.join();
            assert!(
                served.is_ok() || std::thread::panicking(),
                "the disk failed"
            );
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the console\n{}--- end of the console", self.console());
            let _ = self.emulator.kill();
            let _ = self.emulator.wait();
        } else {
            self.off();
        }
    }
}

fn emulator(parts: &Parts, socket: &Path, ingress: SocketAddr, admin: SocketAddr) -> Command {
    let disk = format!(
        "file=nbd:unix:{},format=raw,if=virtio,cache=writeback",
        socket.display()
    );
    let forward = |from: SocketAddr, to: u16| format!(",hostfwd=tcp:{from}-10.0.2.15:{to}");
    let net =
        "user,id=net,restrict=on".to_owned() + &forward(ingress, 8080) + &forward(admin, 8082);
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-accel", "tcg,thread=multi", "-cpu", "qemu64,+rdrand"])
        .args(["-m", "1024", "-smp", "2", "-nographic", "-no-reboot"])
        .args(["-nodefaults", "-serial", "stdio"])
        .args(["-drive", &disk, "-netdev", &net])
        .args(["-device", "virtio-net-pci,netdev=net,romfile="])
        .arg("-kernel")
        .arg(&parts.kernel)
        .arg("-initrd")
        .arg(&parts.image)
        .args(["-append", "console=ttyS0 panic=-1 quiet no_timer_check"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    command
}
