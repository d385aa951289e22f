//! Our monitor beside QEMU's microvm machine: same kernel, command line and initial ramdisk, one
//! after the other. `cargo xtask vm-bench` boots this where there is KVM.
//!
//! * *First instruction*: from before the process is spawned until KVM first enters the guest, by
//!   the kernel's own trace. Ours is jailed on the way; QEMU is not.
//! * *Init*: until the guest's init says so on the console.
//! * *Processor time*: of all threads until then (`schedstat`), less what the kernel counted as
//!   spent in guest mode (`stat`, ticks of 4 ms).
//! * *Memory*: resident then, without the mapping that is the guest's memory.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::num::NonZeroU32;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

use insula_vmm::monitor::Client;
use insula_vmm::monitor::description::{MachineDescription, Origin};
use insula_vmm::monitor::launch::{self, Orders, Walls};
use insula_vmm::monitor::protocol::Request;
use insula_vmm::monitor::wire::Outgoing;

use crate::console::PATIENCE;
use crate::say;
use crate::table::{Promise, row};

const TRACING: &str = "/sys/kernel/tracing";
pub(crate) const MEMORY_MIB: u64 = 128;
const MEMORY_KIB: u64 = MEMORY_MIB << 10;
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 reboot=t";
/// What the guest's init says.
const READY: &str = "@init";
const SOCKET: &str = "control";
const USER: u32 = 734_570;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Monitor {
    Insula,
    Qemu,
}

#[derive(Debug, Clone, Copy, Default)]
struct Measured {
    first_ms: f64,
    init_ms: f64,
    outside_ms: f64,
    guest_ms: f64,
    resident_kib: f64,
    private_kib: f64,
}

/// One of them.
type Figure = fn(&Measured) -> f64;

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "first instruction {:.1} ms, init {:.0} ms, outside guest {:.0} ms, in guest {:.0} ms, \
             resident {:.0} KiB, private {:.0} KiB",
            self.first_ms,
            self.init_ms,
            self.outside_ms,
            self.guest_ms,
            self.resident_kib,
            self.private_kib
        )
    }
}

/// Runs all of it, and says what came out. `false` if a bound does not hold.
pub(crate) fn compare(rounds: usize) -> io::Result<bool> {
    let mut holds = true;
    for kernel in ["vmlinuz", "vmlinux"] {
        let (mut insula, mut qemu) = (Vec::new(), Vec::new());
        for round in 0..rounds {
            let mut order = [Monitor::Insula, Monitor::Qemu];
            // Who goes first changes, as the second finds caches warm.
            order.rotate_left(round % 2);
            for monitor in order {
                let measured = measure(monitor, kernel)?;
                say(&format!("{kernel} {round} {monitor:?}: {measured}"));
                match monitor {
                    Monitor::Insula => insula.push(measured),
                    Monitor::Qemu => qemu.push(measured),
                }
            }
        }
        let of = |figure: Figure| {
            let figures = |all: &[Measured]| all.iter().map(figure).collect::<Vec<_>>();
            (figures(&insula), figures(&qemu))
        };
        let rows: [(&str, Figure, Promise); 5] = [
            (
                "start to the first guest instruction, ms",
                |it| it.first_ms,
                Promise::Times(0.3),
            ),
            (
                "start to the guest's init, ms",
                |it| it.init_ms,
                Promise::Times(1.0),
            ),
            (
                "CPU outside guest mode until then, ms",
                |it| it.outside_ms,
                Promise::Times(0.5),
            ),
            (
                "resident beyond the guest's memory, MiB",
                |it| it.resident_kib / 1024.0,
                Promise::AtMost(5.0),
            ),
            (
                "of it private, MiB",
                |it| it.private_kib / 1024.0,
                Promise::AtMost(5.0),
            ),
        ];
        for (what, figure, promise) in rows {
            let (ours, theirs) = of(figure);
            holds &= row(&format!("{kernel}: {what}"), &ours, &theirs, promise);
        }
    }
    Ok(holds)
}

/// Nanoseconds of the clock that the trace uses as well.
fn now() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or_default())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn measure(monitor: Monitor, kernel: &str) -> io::Result<Measured> {
    let trace = Trace::start()?;
    let start = now();
    let mut running = match monitor {
        Monitor::Insula => {
            let kernel = File::open(format!("/bed/{kernel}"))?;
            Running::insula(&kernel, Some(&File::open("/bed/bench.cpio")?))?
        }
        Monitor::Qemu => Running::qemu(kernel)?,
    };
    let first = trace.first_entry()?;
    running.wait_ready()?;
    let init = now();
    let pid = running.pid();
    let (total, guest) = (processor_time(pid)?, guest_time(pid)?);
    let (resident_kib, private_kib) = memory_beyond(pid)?;
    Ok(Measured {
        first_ms: milliseconds(first.saturating_sub(start)),
        init_ms: milliseconds(init.saturating_sub(start)),
        outside_ms: milliseconds(total.saturating_sub(guest)),
        guest_ms: milliseconds(guest),
        resident_kib,
        private_kib,
    })
}

/// The kernel notes the first entry into a guest, and then no more.
struct Trace;

impl Trace {
    fn set(file: &str, value: &str) -> io::Result<()> {
        fs::write(Path::new(TRACING).join(file), value)
    }

    fn start() -> io::Result<Self> {
        Self::set("tracing_on", "0")?;
        Self::set("trace", "")?;
        Self::set("trace_clock", "mono")?;
        // Forgets the one before, which has been used up; there may be none.
        let _ = Self::set("events/kvm/kvm_entry/trigger", "!traceoff:1");
        Self::set("events/kvm/kvm_entry/trigger", "traceoff:1")?;
        Self::set("events/kvm/kvm_entry/enable", "1")?;
        Self::set("tracing_on", "1")?;
        Ok(Self)
    }

    fn first_entry(&self) -> io::Result<Duration> {
        let deadline = now() + PATIENCE;
        loop {
            let text = fs::read_to_string(Path::new(TRACING).join("trace"))?;
            if let Some(seconds) = text.lines().find_map(seconds_of_entry) {
                Self::set("events/kvm/kvm_entry/enable", "0")?;
                return Ok(Duration::from_secs_f64(seconds));
            }
            if now() > deadline {
                return Err(io::Error::other(format!("no entry into a guest:\n{text}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// "  qemu-123  [000] d..1.  12.345678: kvm_entry: vcpu 0, ..."
fn seconds_of_entry(line: &str) -> Option<f64> {
    let (before, _) = line.split_once(": kvm_entry:")?;
    before.split_whitespace().last()?.parse().ok()
}

/// A monitor with its guest, ended when this is dropped.
pub(crate) struct Running {
    child: Child,
    console: Option<Box<dyn Read + Send>>,
    directory: Option<PathBuf>,
    _client: Option<Client>,
}

impl Running {
    fn qemu(kernel: &str) -> io::Result<Self> {
        let mut child = Command::new("/bed/qemu/run")
            .args(["-M", "microvm", "-accel", "kvm", "-cpu", "host"])
            .args(["-m", "128M", "-smp", "1"])
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .args(["-serial", "stdio", "-device", "virtio-rng-device"])
            .args(["-L", "/bed/qemu/firmware"])
            .args(["-kernel", &format!("/bed/{kernel}")])
            .args(["-initrd", "/bed/bench.cpio", "-append", COMMAND_LINE])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let console = child.stdout.take();
        Ok(Self {
            child,
            console: console.map(|console| Box::new(console) as _),
            directory: None,
            _client: None,
        })
    }

    /// Ours, in its jail.
    pub(crate) fn insula(kernel: &File, initrd: Option<&File>) -> io::Result<Self> {
        let directory = PathBuf::from(format!("/tmp/machine-{}", now().as_nanos()));
        fs::create_dir_all(directory.join("root"))?;
        let socket = launch::listen_at(&directory, SOCKET)?;
        let user = NonZeroU32::new(USER).ok_or(io::ErrorKind::InvalidInput)?;
        let orders = Orders {
            root: directory.join("root"),
            cgroups: Vec::new(),
            user,
            group: user,
            descriptors: 128,
            file_bytes: 1 << 30,
            threads: 32,
            walls: Walls::All,
        };
        let record = File::create(directory.join("record"))?;
        let log = File::create(directory.join("log"))?;
        let program = std::env::current_exe()?;
        let child = launch::spawn((&program, "monitor"), &orders, socket, record, log)?;
        let client = Client::connect(&directory, SOCKET)?;
        let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
        let mut with = Outgoing::default();
        let machine = MachineDescription {
            kvm: with.add(kvm.as_fd()).map_err(io::Error::other)?,
            origin: Origin::Boot {
                vcpus: 1,
                memory_bytes: MEMORY_KIB << 10,
                kernel: with.add(kernel.as_fd()).map_err(io::Error::other)?,
                initrd: initrd
                    .map(|initrd| with.add(initrd.as_fd()))
                    .transpose()
                    .map_err(io::Error::other)?,
                command_line: COMMAND_LINE.to_owned(),
            },
            disks: Vec::new(),
            vsock: None,
            net: None,
        };
        let machine = Box::new(machine);
        let started = client.order(&Request::Start { machine }, &with, PATIENCE);
        started.map_err(|why| {
            let log = fs::read_to_string(directory.join("log")).unwrap_or_default();
            io::Error::other(format!("{why}; its log says:\n{log}"))
        })?;
        let (console, there) = UnixStream::pair()?;
        let mut with = Outgoing::default();
        with.add(there.as_fd()).map_err(io::Error::other)?;
        let attached = client.order(&Request::Console, &with, PATIENCE);
        attached.map_err(io::Error::other)?;
        Ok(Self {
            child,
            console: Some(Box::new(console)),
            directory: Some(directory),
            _client: Some(client),
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the guest prints, once.
    pub(crate) fn console(&mut self) -> io::Result<Box<dyn Read + Send>> {
        let console = self.console.take();
        console.ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn wait_ready(&mut self) -> io::Result<()> {
        let mut console = self.console()?;
        let (tell, told) = channel();
        std::thread::spawn(move || {
            let mut text = String::new();
            let mut piece = [0; 4096];
            loop {
                match console.read(&mut piece) {
                    Ok(bytes @ 1..) => text += &String::from_utf8_lossy(&piece[..bytes]),
                    _ => {
                        let _ = tell.send(Err(text));
                        return;
                    }
                }
                if text.contains(READY) {
                    // It goes on listening, so that nobody writes into nothing.
                    let _ = tell.send(Ok(()));
                    text.clear();
                }
            }
        });
        match told.recv_timeout(PATIENCE) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(text)) => Err(io::Error::other(format!("it ended, after:\n{text}"))),
            Err(_) => Err(io::Error::other("the guest's init did not come up in time")),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(directory) = &self.directory {
            let _ = fs::remove_dir_all(directory);
        }
    }
}

/// Of all its threads, in guest mode and out of it.
pub(crate) fn processor_time(pid: u32) -> io::Result<Duration> {
    let mut sum = Duration::ZERO;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(thread?.path().join("schedstat"))?;
        let first = text.split(' ').next().and_then(|word| word.parse().ok());
        sum += Duration::from_nanos(first.ok_or(io::ErrorKind::InvalidData)?);
    }
    Ok(sum)
}

/// Field 43 of `/proc/PID/stat` (proc(5)), in hundredths of a second.
fn guest_time(pid: u32) -> io::Result<Duration> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = text.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let field = after_name.split(' ').nth(43 - 3);
    let ticks: u64 = field
        .and_then(|word| word.parse().ok())
        .ok_or(io::ErrorKind::InvalidData)?;
    Ok(Duration::from_millis(10 * ticks))
}

/// Resident and private KiB of all mappings but the guest's memory.
fn memory_beyond(pid: u32) -> io::Result<(f64, f64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut resident, mut private, mut is_guest) = (0, 0, false);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(value)) = (words.next(), words.next()) else {
            continue;
        };
        let kib: u64 = value.parse().unwrap_or_default();
        match name {
            "Size:" => is_guest = kib >= MEMORY_KIB,
            "Rss:" if !is_guest => resident += kib,
            "Private_Clean:" | "Private_Dirty:" if !is_guest => private += kib,
            _ => {}
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^52 KiB")]
    Ok((resident as f64, private as f64))
}
