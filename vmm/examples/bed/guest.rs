//! A Debian guest that obeys: its init reads commands from the console.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use insula_types::Bytes;
use insula_vmm::boot::BootSource;
use insula_vmm::config::{Console, MachineConfig, VcpuCount};
use insula_vmm::exit::ExitReason;
use insula_vmm::memory::MemorySize;
use insula_vmm::threads::Threads;
use insula_vmm::virtio::VirtioDevice;
use insula_vmm::virtio::block::{Block, Disk};
use insula_vmm::virtio::rng::Rng;
use insula_vmm::{Hypervisor, Machine};

use crate::console::{PATIENCE, Screen};

/// Where the test bed puts its files.
pub(crate) const FILES: &str = "/bed";
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 pci=off";
pub(crate) const MEMORY: Bytes = Bytes::mib(192);

pub(crate) fn file(name: &str) -> File {
    let path = Path::new(FILES).join(name);
    let opened = File::options().read(true).write(true).open(&path);
    opened.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A running guest.
pub(crate) struct Guest {
    pub(crate) machine: Machine,
    pub(crate) screen: Screen,
    keyboard: UnixStream,
}

impl Guest {
    /// Boots with this disk as its root, and returns when its init is ready.
    pub(crate) fn boot(hypervisor: &Hypervisor, vcpus: u8, root: Box<dyn Disk>) -> Self {
        Self::boot_with(hypervisor, vcpus, root, Vec::new())
    }

    /// The same with more devices.
    pub(crate) fn boot_with(
        hypervisor: &Hypervisor,
        vcpus: u8,
        root: Box<dyn Disk>,
        more: Vec<Box<dyn VirtioDevice>>,
    ) -> Self {
        let screen = Screen::default();
        let (keyboard, input) = UnixStream::pair().expect("a socket");
        let root = Block::new(root, "root-disk".parse().expect("a serial"));
        let mut devices: Vec<Box<dyn VirtioDevice>> =
            vec![Box::new(root), Box::new(Rng::default())];
        devices.extend(more);
        let config = MachineConfig {
            vcpus: VcpuCount::new(vcpus).expect("a count"),
            memory: MemorySize::new(MEMORY).expect("a size"),
            boot: BootSource::Kernel {
                kernel: file("vmlinuz"),
                initrd: Some(file("inner.cpio")),
                command_line: COMMAND_LINE.parse().expect("a command line"),
            },
            console: Console {
                output: Box::new(screen.clone()),
                input: Some(input.into()),
            },
            devices,
        };
        let machine = Machine::new(hypervisor, config, &Threads::default());
        let mut machine = machine.unwrap_or_else(|error| panic!("no machine: {error}"));
        machine.resume().expect("a new machine");
        let guest = Self {
            machine,
            screen,
            keyboard,
        };
        guest.wait_ready();
        guest
    }

    fn wait_ready(&self) {
        self.screen.wait(0, "init", |text| {
            if let Some(reason) = self.machine.wait(Some(Instant::now())) {
                panic!("the guest is over: {reason}; its console says:\n{text}");
            }
            text.contains("@ready").then_some(())
        });
    }

    /// Has init run a command; returns its output. Panics if it fails.
    pub(crate) fn run(&mut self, command: &str) -> String {
        let (status, output) = self.try_run(command);
        assert_eq!(status, 0, "`{command}` said:\n{output}");
        output
    }

    /// Has init run a command; returns its status and output.
    pub(crate) fn try_run(&mut self, command: &str) -> (i32, String) {
        let start = self.screen.len();
        self.type_line(command);
        self.screen.wait(start, command, |text| {
            let (output, rest) = text.split_once("@done ")?;
            let (status, _) = rest.split_once('\n')?;
            let output = output.replace('\r', "").trim().to_owned();
            Some((status.trim().parse().ok()?, output))
        })
    }

    /// Types a line, and does not wait.
    pub(crate) fn type_line(&mut self, line: &str) {
        let typed = self.keyboard.write_all(format!("{line}\n").as_bytes());
        typed.expect("the console listens");
    }

    /// Types a last line, and waits for the machine's end.
    pub(crate) fn end_by(mut self, command: &str) -> ExitReason {
        self.type_line(command);
        let reason = self.machine.wait(Some(Instant::now() + PATIENCE));
        reason.unwrap_or_else(|| {
            let before = self.machine.statistics().exits;
            let pause = self.machine.pause();
            let after = self.machine.statistics().exits;
            panic!(
                "it did not end by `{command}` (exits {before:?}, {after:?}, pause {pause:?}):\n{}",
                self.screen.since(0)
            )
        })
    }
}
