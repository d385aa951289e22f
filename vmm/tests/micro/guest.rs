//! Machines for micro-guests, and the instructions.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use insula_types::Bytes;
use insula_vmm::boot::{BootSource, FlatCode, ProcessorMode};
use insula_vmm::config::{Console, MachineConfig, VcpuCount};
use insula_vmm::exit::ExitReason;
use insula_vmm::memory::MemorySize;
use insula_vmm::threads::Threads;
use insula_vmm::virtio::VirtioDevice;
use insula_vmm::{Hypervisor, Machine};
use vm_memory::{Bytes as _, GuestAddress};

/// Software KVM on a busy machine takes its time.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A script starts here; see [`SCRIPT_CODE`].
const SCRIPT: u64 = 0x30_0000;

/// Runs a script of steps (operation, address, value), each 24 bytes:
///
/// ```text
///        mov ebx, SCRIPT
/// next:  mov rax, [rbx]; mov rdi, [rbx+8]; mov rcx, [rbx+16]; add rbx, 24
///        1: mov [rdi], ecx      2: out di, cl        3: wait until [rdi] == ecx
///        4: mov eax, [rdi]      5: mov [rdi], cl     6: mov [rdi], rcx
///        7: inc dword [rdi], for ever                8: in al, di      else: hlt
/// ```
const SCRIPT_CODE: [u8; 100] = [
    0xbb, 0x00, 0x00, 0x30, 0x00, 0x48, 0x8b, 0x03, 0x48, 0x8b, 0x7b, 0x08, 0x48, 0x8b, 0x4b, 0x10,
    0x48, 0x83, 0xc3, 0x18, 0x83, 0xf8, 0x01, 0x74, 0x24, 0x83, 0xf8, 0x02, 0x74, 0x23, 0x83, 0xf8,
    0x03, 0x74, 0x25, 0x83, 0xf8, 0x04, 0x74, 0x26, 0x83, 0xf8, 0x05, 0x74, 0x25, 0x83, 0xf8, 0x06,
    0x74, 0x24, 0x83, 0xf8, 0x07, 0x74, 0x24, 0x83, 0xf8, 0x08, 0x74, 0x23, 0xf4, 0x89, 0x0f, 0xeb,
    0xc4, 0x89, 0xfa, 0x89, 0xc8, 0xee, 0xeb, 0xbd, 0x39, 0x0f, 0x75, 0xfc, 0xeb, 0xb7, 0x8b, 0x07,
    0xeb, 0xb3, 0x88, 0x0f, 0xeb, 0xaf, 0x48, 0x89, 0x0f, 0xeb, 0xaa, 0xff, 0x07, 0xeb, 0xfc, 0x89,
    0xfa, 0xec, 0xeb, 0xa1,
];

/// One step of a script.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Step {
    Write32(u64, u32),
    Out8(u16, u8),
    /// Spins until the word in memory has the value.
    Wait32(u64, u32),
    Read32(u64),
    Write8(u64, u8),
    Write64(u64, u64),
    /// Counts in memory, and never ends.
    Count(u64),
    In8(u16),
}

impl Step {
    fn encode(self) -> [u8; 24] {
        let (operation, address, value) = match self {
            Self::Write32(address, value) => (1, address, u64::from(value)),
            Self::Out8(port, value) => (2, u64::from(port), u64::from(value)),
            Self::Wait32(address, value) => (3, address, u64::from(value)),
            Self::Read32(address) => (4, address, 0),
            Self::Write8(address, value) => (5, address, u64::from(value)),
            Self::Write64(address, value) => (6, address, value),
            Self::Count(address) => (7, address, 0),
            Self::In8(port) => (8, u64::from(port), 0),
        };
        let mut bytes = [0; 24];
        for (field, number) in bytes.chunks_mut(8).zip([operation, address, value]) {
            field.copy_from_slice(&u64::to_le_bytes(number));
        }
        bytes
    }
}

/// Powers off.
pub(crate) const OFF: Step = Step::Out8(0x601, 0x34);

/// Registers of the watchdog: RUN, and from how many counts, four bytes on.
pub(crate) const WATCHDOG: u64 = 0xd010_0000;
/// Where guests count.
pub(crate) const COUNTER: u64 = 0x20_0000;

/// Opens KVM, or says why not.
pub(crate) fn hypervisor() -> Option<Hypervisor> {
    match Hypervisor::open() {
        Ok(hypervisor) => Some(hypervisor),
        Err(why) => {
            let _ = writeln!(io::stderr(), "skipped: {why}");
            None
        }
    }
}

/// What a console printed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Screen(Arc<Mutex<Vec<u8>>>);

impl Screen {
    pub(crate) fn text(&self) -> String {
        let bytes = self.0.lock().expect("nobody panics here").clone();
        String::from_utf8(bytes).expect("text")
    }
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("nobody panics here").extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A micro-guest to be.
pub(crate) struct Guest {
    code: FlatCode,
    script: Vec<u8>,
    vcpus: u8,
    input: Option<OwnedFd>,
    devices: Vec<Box<dyn VirtioDevice>>,
    pub(crate) screen: Screen,
}

impl Guest {
    /// Instructions for real mode.
    pub(crate) fn real(code: &[u8]) -> Self {
        Self::new(code, 0x1000, ProcessorMode::Real)
    }

    /// Instructions for 64-bit mode.
    pub(crate) fn long(code: &[u8]) -> Self {
        Self::new(code, 0x10_0000, ProcessorMode::Long)
    }

    /// Steps, in 64-bit mode.
    pub(crate) fn script(steps: impl IntoIterator<Item = Step>) -> Self {
        let mut guest = Self::long(&SCRIPT_CODE);
        guest.script = steps.into_iter().flat_map(Step::encode).collect();
        guest
    }

    fn new(code: &[u8], address: u64, mode: ProcessorMode) -> Self {
        Self {
            code: FlatCode {
                code: code.to_vec(),
                address: GuestAddress(address),
                mode,
            },
            script: Vec::new(),
            vcpus: 1,
            input: None,
            devices: Vec::new(),
            screen: Screen::default(),
        }
    }

    /// Arms its watchdog from so many counts, and then counts by itself and never says that it is well.
    pub(crate) fn watched(counts: u32) -> Self {
        Self::script([
            Step::Write32(WATCHDOG + 4, counts),
            Step::Write32(WATCHDOG, 1),
            Step::Count(COUNTER),
        ])
    }

    pub(crate) fn vcpus(mut self, vcpus: u8) -> Self {
        self.vcpus = vcpus;
        self
    }

    pub(crate) fn input(mut self, input: OwnedFd) -> Self {
        self.input = Some(input);
        self
    }

    pub(crate) fn device(mut self, device: impl VirtioDevice + 'static) -> Self {
        self.devices.push(Box::new(device));
        self
    }

    pub(crate) fn boxed_device(mut self, device: Box<dyn VirtioDevice>) -> Self {
        self.devices.push(device);
        self
    }

    /// The machine, paused.
    pub(crate) fn build(self, hypervisor: &Hypervisor) -> Machine {
        let config = MachineConfig {
            vcpus: VcpuCount::new(self.vcpus).expect("a count"),
            memory: MemorySize::new(Bytes::mib(64)).expect("a size"),
            boot: BootSource::Flat(self.code),
            console: Console {
                output: Box::new(self.screen),
                input: self.input,
            },
            devices: self.devices,
        };
        let machine = Machine::new(hypervisor, config, &Threads::default()).expect("a machine");
        let script = machine
            .memory()
            .write_slice(&self.script, GuestAddress(SCRIPT));
        script.expect("memory");
        machine
    }

    /// Runs to its end.
    pub(crate) fn run(self, hypervisor: &Hypervisor) -> ExitReason {
        let mut machine = self.build(hypervisor);
        machine.resume().expect("a new machine");
        end_of(&machine)
    }
}

pub(crate) fn end_of(machine: &Machine) -> ExitReason {
    let reason = machine.wait(Some(Instant::now() + PATIENCE));
    reason.expect("the guest ends in time")
}

/// Waits until something holds.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waiting until {what}");
        std::thread::yield_now();
    }
}

pub(crate) fn word(machine: &Machine, address: u64) -> u32 {
    machine
        .memory()
        .read_obj(GuestAddress(address))
        .expect("memory")
}
