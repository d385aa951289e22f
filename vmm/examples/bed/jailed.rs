//! The same guest, in a monitor process of its own, as a host runs it: jailed, and spoken with over
//! its socket.

use std::fs::{self, File};
use std::io::Read;
use std::num::NonZeroU32;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use insula_vmm::Hypervisor;
use insula_vmm::monitor::Client;
use insula_vmm::monitor::description::{DiskDescription, MachineDescription, Origin, Writes};
use insula_vmm::monitor::launch::{self, Orders, Walls};
use insula_vmm::monitor::protocol::{Cause, Record, Reply, Request, Statistics};
use insula_vmm::monitor::wire::Outgoing;
use insula_vmm::rate_limiter::RateLimits;

use crate::console::{PATIENCE, Screen};
use crate::guest::{COMMAND_LINE, MEMORY, file, obey};

/// With this word the program is a monitor.
pub(crate) const VERB: &str = "monitor";
const SOCKET: &str = "control";
const FIRST_USER: u32 = 0x7000_0001;
const FIRST: &str = "/tmp/first";
/// Its clones, by what they are called.
const CLONES: [(&str, &str); 2] = [("one", "/tmp/one"), ("other", "/tmp/other")];

pub(crate) fn life(_: &Hypervisor) -> String {
    let start = Instant::now();
    let mut jailed = Jailed::boot();
    let mut guest = jailed.terminal();
    guest.screen.wait(0, "init", |text| {
        jailed.expect_alive();
        text.contains("@ready").then_some(())
    });
    let booted = start.elapsed();
    assert_eq!(guest.run("nproc"), "2");
    guest.run("head -c 1000000 /dev/urandom > /data && sync");
    let statistics = jailed.statistics();
    let disk = &statistics.devices[0];
    assert!(
        disk.read_bytes > 0 && disk.written_bytes > 1_000_000,
        "{disk:?}"
    );
    let memory = beyond_guest(jailed.child.id());

    // The host dies; its successor finds the same process, and the same console.
    drop(guest);
    jailed.client = Client::connect(Path::new(FIRST), SOCKET).expect("it listens on");
    let mut guest = jailed.terminal();
    jailed.order(&Request::Pause);
    jailed.order(&Request::Resume);
    let pid = jailed.client.monitor_pid().expect("a process");
    assert_eq!(pid, jailed.child.id());
    assert_eq!(guest.run("echo still here"), "still here");

    power_button(&jailed, &mut guest);
    let record = jailed.end();
    assert_eq!(record.cause, Cause::PoweredOff, "{record:?}");
    format!(
        "init after {:.1} s, {} KiB beyond the guest's memory",
        booted.as_secs_f64(),
        memory >> 10
    )
}

/// The guest turns itself off when its button is pressed, as systemd would have it.
fn power_button(jailed: &Jailed, guest: &mut Remote) {
    guest.run("insmod /modules/evdev.ko; insmod /modules/button.ko; mdev -s; ls /dev/input");
    guest.run("grep PNP0C0C /proc/bus/input/devices");
    guest.run("(head -c 24 /dev/input/event0 > /tmp/key; sync; poweroff -f) & true");
    guest.run("while ! ls -l /proc/[0-9]*/fd | grep -q event0; do sleep 0.1; done");
    jailed.order(&Request::PowerButton);
}

pub(crate) fn clones(_: &Hypervisor) -> String {
    let mut first = Jailed::boot();
    let mut guest = first.terminal();
    guest.screen.wait(0, "init", |text| {
        first.expect_alive();
        text.contains("@ready").then_some(())
    });
    guest.run("mount -t tmpfs tmp /tmp; echo before > /kept; sync");
    guest.run("(i=0; while :; do i=$((i + 1)); echo $i > /tmp/count; sleep 0.1; done) & true");
    guest.run("while [ ! -s /tmp/count ]; do sleep 0.1; done");
    let uptime = seconds(&guest.run("cut -d ' ' -f 1 /proc/uptime"));
    first.order(&Request::Pause);
    let start = Instant::now();
    first.save();
    let saving = start.elapsed();
    first.order(&Request::End {
        cause: Cause::Stopped,
    });
    first.end();

    let start = Instant::now();
    let mut clones = CLONES.map(|(_, place)| Jailed::restore(place));
    let restoring = start.elapsed() / 2;
    let mut guests = clones.each_ref().map(Jailed::terminal);
    let mut entropy = Vec::new();
    for ((name, _), guest) in CLONES.iter().zip(&mut guests) {
        let up = seconds(&guest.run("cut -d ' ' -f 1 /proc/uptime"));
        assert!(
            (uptime..uptime + 60.0).contains(&up),
            "{uptime} s, then {up} s"
        );
        let before: u64 = guest.run("cat /tmp/count").parse().expect("a number");
        guest.run("sleep 1");
        let after: u64 = guest.run("cat /tmp/count").parse().expect("a number");
        assert!(after > before, "{after} after {before}");
        assert_eq!(guest.run("cat /kept"), "before");
        guest.run(&format!(
            "echo {name} > /own; sync; echo 3 > /proc/sys/vm/drop_caches"
        ));
        entropy.push(guest.run("head -c 16 /dev/hwrng | hexdump"));
    }
    for ((name, _), guest) in CLONES.iter().zip(&mut guests) {
        assert_eq!(guest.run("cat /own"), *name);
    }
    assert_ne!(entropy[0], entropy[1]);
    let memory = clones
        .each_ref()
        .map(|clone| own_memory(clone.child.id()) >> 10);
    for clone in &mut clones {
        clone.expect_alive();
    }
    drop(clones);
    format!(
        "saved in {saving:.1?}, a clone goes on after {restoring:.1?} and has {memory:?} KiB of its own"
    )
}

fn seconds(text: &str) -> f64 {
    text.trim().parse().expect("a number")
}

/// A monitor process, and this program as its host. Ended when dropped.
struct Jailed {
    place: PathBuf,
    child: Child,
    client: Client,
}

impl Jailed {
    fn boot() -> Self {
        let (kernel, initrd) = (file("vmlinuz"), file("inner.cpio"));
        let jailed = Self::born(FIRST, FIRST_USER);
        let mut with = Outgoing::default();
        let origin = Origin::Boot {
            vcpus: 2,
            memory_bytes: MEMORY.get(),
            kernel: with.add(kernel.as_fd()).expect("room"),
            initrd: Some(with.add(initrd.as_fd()).expect("room")),
            command_line: COMMAND_LINE.to_owned(),
        };
        jailed.tell(origin, with)
    }

    /// A clone of what was saved, with a copy of its disk.
    fn restore(place: &str) -> Self {
        let first = Path::new(FIRST);
        let saved = |name| File::open(first.join(name)).expect("it was saved");
        let (state, memory) = (saved("state"), saved("memory"));
        let number = u32::try_from(place.len()).expect("a short name");
        let jailed = Self::born(place, FIRST_USER + number);
        let copied = fs::copy(first.join("overlay"), jailed.place.join("overlay"));
        copied.expect("room");
        let mut with = Outgoing::default();
        let origin = Origin::Snapshot {
            state: with.add(state.as_fd()).expect("room"),
            memory: with.add(memory.as_fd()).expect("room"),
        };
        jailed.tell(origin, with)
    }

    fn born(place: &str, user: u32) -> Self {
        let place = PathBuf::from(place);
        let _ = fs::remove_dir_all(&place);
        fs::create_dir_all(place.join("root")).expect("room");
        let socket = launch::listen_at(&place, SOCKET).expect("a socket");
        let user = NonZeroU32::new(user).expect("not root");
        let orders = Orders {
            root: place.join("root"),
            cgroups: Vec::new(),
            user,
            group: user,
            descriptors: 128,
            file_bytes: 1 << 30,
            threads: 16,
            walls: Walls::All,
        };
        let program = std::env::current_exe().expect("this program");
        let (record, log) = (open(&place, "record"), open(&place, "log"));
        let child = launch::spawn((&program, VERB), &orders, socket, record, log);
        Self {
            child: child.expect("a process"),
            client: Client::connect(&place, SOCKET).expect("it listens"),
            place,
        }
    }

    fn tell(self, origin: Origin, with: Outgoing<'_>) -> Self {
        let (kvm, root, overlay) = (kvm(), file("root.ext4"), open(&self.place, "overlay"));
        let vsock = UnixListener::bind(self.place.join("vsock")).expect("room");
        let mut with = with;
        let machine = MachineDescription {
            kvm: with.add(kvm.as_fd()).expect("room"),
            origin,
            disks: vec![DiskDescription {
                serial: "root-disk".to_owned(),
                image: with.add(root.as_fd()).expect("room"),
                writes: Writes::Overlay {
                    file: with.add(overlay.as_fd()).expect("room"),
                    base: "01".repeat(32),
                    disk_bytes: None,
                },
                limits: RateLimits::default(),
            }],
            vsock: Some(with.add(vsock.as_fd()).expect("room")),
            net: None,
        };
        let machine = Box::new(machine);
        let told = self
            .client
            .order(&Request::Start { machine }, &with, PATIENCE);
        told.unwrap_or_else(|error| panic!("{error}; its log says: {}", self.log()));
        self
    }

    fn save(&self) {
        let (state, memory) = (open(&self.place, "state"), open(&self.place, "memory"));
        let mut with = Outgoing::default();
        let request = Request::Save {
            state: with.add(state.as_fd()).expect("room"),
            memory: with.add(memory.as_fd()).expect("room"),
        };
        let saved = self.client.order(&request, &with, PATIENCE);
        saved.unwrap_or_else(|error| panic!("{error}; its log says: {}", self.log()));
    }

    fn log(&self) -> String {
        fs::read_to_string(self.place.join("log")).unwrap_or_default()
    }

    fn order(&self, request: &Request) {
        let done = self.client.order(request, &Outgoing::default(), PATIENCE);
        done.unwrap_or_else(|error| panic!("{request:?}: {error}; its log says: {}", self.log()));
    }

    fn statistics(&self) -> Statistics {
        let (request, nothing) = (Request::Statistics, Outgoing::default());
        match self.client.call(&request, &nothing, PATIENCE) {
            Ok(Reply::Statistics { of }) => *of,
            other => panic!("{other:?}"),
        }
    }

    fn terminal(&self) -> Remote {
        Remote::attach(&self.client)
    }

    fn expect_alive(&mut self) {
        let over = self.child.try_wait().expect("our child");
        assert_eq!(over, None, "the monitor is over: {}", self.log());
    }

    /// Waits for the monitor's end; returns what it left.
    fn end(mut self) -> Record {
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().expect("our child").is_none() {
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(50));
        }
        let record = fs::read(self.place.join("record")).expect("a record");
        serde_json::from_slice(&record).unwrap_or_else(|error| panic!("{error}: {}", self.log()))
    }
}

impl Drop for Jailed {
    fn drop(&mut self) {
        // Both fail only where it is over.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn kvm() -> File {
    let opened = File::options().read(true).write(true).open("/dev/kvm");
    opened.expect("KVM was opened before")
}

fn open(place: &Path, name: &str) -> File {
    let mut options = File::options();
    let options = options.read(true).write(true).create(true).truncate(false);
    options.open(place.join(name)).expect("room")
}

/// Bytes in memory that no other process has.
fn own_memory(pid: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("it lives");
    let private = rollup.lines().filter(|line| line.starts_with("Private_"));
    let kib = private.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.sum::<u64>() << 10
}

/// Bytes in memory of all mappings but the guest's, as `smaps` counts them (proc_pid_smaps(5)).
fn beyond_guest(pid: u32) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("it lives");
    let (mut kib, mut size) = (0, 0);
    for line in smaps.lines() {
        let number = || -> u64 {
            let number = line.split_whitespace().nth(1);
            number.and_then(|number| number.parse().ok()).unwrap_or(0)
        };
        if line.starts_with("Size:") {
            size = number();
        } else if line.starts_with("Rss:") && size < MEMORY.get() >> 10 {
            kib += number();
        }
    }
    kib << 10
}

/// A terminal at its console.
struct Remote {
    screen: Screen,
    keyboard: UnixStream,
}

impl Remote {
    fn attach(client: &Client) -> Self {
        let (keyboard, there) = UnixStream::pair().expect("a socket");
        let mut with = Outgoing::default();
        with.add(there.as_fd()).expect("room");
        let attached = client.order(&Request::Console, &with, PATIENCE);
        attached.expect("room for a terminal");
        let screen = Screen::default();
        let (mut from, mut to) = (keyboard.try_clone().expect("a socket"), screen.clone());
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(length @ 1..) = from.read(&mut chunk) {
                let _ = std::io::Write::write_all(&mut to, &chunk[..length]);
            }
        });
        Self { screen, keyboard }
    }

    fn run(&mut self, command: &str) -> String {
        let (status, output) = obey(&self.screen, &mut self.keyboard, command);
        assert_eq!(status, 0, "`{command}` said:\n{output}");
        output
    }
}
