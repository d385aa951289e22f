//! COM1: a 16550 whose other side is the console.
//!
//! Output leaves on the vCPU thread that wrote it. Input comes through a thread of its own: it
//! moves as much as the port's buffer takes, and goes on when the guest has read it empty.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial, Trigger};

use crate::event::Event;
use crate::virtio::InterruptLine;

/// Most bytes that are taken from the input at once; the port's buffer holds 64.
const CHUNK: usize = 64;

/// What went through a console.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ConsoleCounts {
    /// Bytes that the guest wrote.
    pub written: u64,
    /// Bytes of these that the other side did not take.
    pub lost: u64,
}

/// The port, shared by vCPU threads and the console thread.
pub(crate) struct SerialPort {
    port: Mutex<Serial<Line, Notes, Output>>,
    /// Raised when the input buffer has room again.
    room: Event,
    /// Raised when the console thread is to end.
    stop: Event,
    counts: Arc<Counts>,
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort")
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Counts {
    written: AtomicU64,
    lost: AtomicU64,
}

struct Line(InterruptLine);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.pulse();
        Ok(())
    }
}

/// What the port tells of itself.
struct Notes {
    room: Event,
}

impl SerialEvents for Notes {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        self.room.raise();
    }
}

/// Counts, and never fails: a console that does not listen is not the guest's concern.
struct Output {
    other_side: Box<dyn Write + Send>,
    counts: Arc<Counts>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let all = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.counts.written.fetch_add(all, Ordering::Relaxed);
        if self.other_side.write_all(bytes).is_err() {
            self.counts.lost.fetch_add(all, Ordering::Relaxed);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = self.other_side.flush();
        Ok(())
    }
}

/// The port's registers, and what the guest has not read yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SerialSaved {
    /// In the order of [`SerialState`]'s fields.
    registers: [u8; 9],
    input: Vec<u8>,
}

impl From<SerialState> for SerialSaved {
    fn from(state: SerialState) -> Self {
        Self {
            registers: [
                state.baud_divisor_low,
                state.baud_divisor_high,
                state.interrupt_enable,
                state.interrupt_identification,
                state.line_control,
                state.line_status,
                state.modem_control,
                state.modem_status,
                state.scratch,
            ],
            input: state.in_buffer,
        }
    }
}

impl From<&SerialSaved> for SerialState {
    fn from(saved: &SerialSaved) -> Self {
        let [
            low,
            high,
            enable,
            identification,
            control,
            status,
            modem,
            modem_status,
            scratch,
        ] = saved.registers;
        Self {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: control,
            line_status: status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: saved.input.clone(),
        }
    }
}

impl SerialPort {
    /// A new port, or one as it was saved.
    pub(crate) fn new(
        line: InterruptLine,
        output: Box<dyn Write + Send>,
        saved: Option<&SerialSaved>,
    ) -> io::Result<Self> {
        let room = Event::new()?;
        let notes = Notes {
            room: room.try_clone()?,
        };
        let counts = Arc::new(Counts::default());
        let output = Output {
            other_side: output,
            counts: Arc::clone(&counts),
        };
        let port = match saved {
            None => Serial::with_events(Line(line), notes, output),
            // Fails where more is to be in its buffer than there is room for.
            Some(saved) => Serial::from_state(&saved.into(), Line(line), notes, output)
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?,
        };
        Ok(Self {
            port: Mutex::new(port),
            room,
            stop: Event::new()?,
            counts,
        })
    }

    /// Nobody may be using it.
    pub(crate) fn save(&self) -> SerialSaved {
        self.lock().state().into()
    }

    pub(crate) fn read(&self, register: u16) -> u8 {
        let register = u8::try_from(register).unwrap_or(u8::MAX);
        self.lock().read(register)
    }

    pub(crate) fn write(&self, register: u16, value: u8) {
        let register = u8::try_from(register).unwrap_or(u8::MAX);
        // Fails only where a guest in loopback mode writes more than its own buffer takes: lost,
        // as on a real port.
        let _ = self.lock().write(register, value);
    }

    pub(crate) fn counts(&self) -> ConsoleCounts {
        ConsoleCounts {
            written: self.counts.written.load(Ordering::Relaxed),
            lost: self.counts.lost.load(Ordering::Relaxed),
        }
    }

    /// Ends the console thread.
    pub(crate) fn stop(&self) {
        self.stop.raise();
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Line, Notes, Output>> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The console thread: moves input into the port until it is told to stop.
pub(crate) fn feed(port: &SerialPort, input: &OwnedFd) {
    let mut open = true;
    loop {
        let capacity = port.lock().fifo_capacity();
        let listening = open && capacity > 0;
        let source = if listening {
            input.as_fd()
        } else {
            port.room.as_fd()
        };
        let mut polled = [
            PollFd::new(&port.stop, PollFlags::IN),
            PollFd::new(&source, PollFlags::IN),
        ];
        match poll(&mut polled, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
        let [stop, ready] = polled.map(|descriptor| !descriptor.revents().is_empty());
        if stop {
            return;
        }
        if !listening {
            port.room.clear();
            continue;
        }
        if !ready {
            continue;
        }
        let mut bytes = [0; CHUNK];
        let most = capacity.min(CHUNK);
        match rustix::io::read(input.as_fd(), &mut bytes[..most]) {
            Ok(0) => open = false,
            Ok(count) => {
                // It takes what there was room for: nobody else puts anything in.
                let _ = port.lock().enqueue_raw_bytes(&bytes[..count]);
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(_) => open = false,
        }
    }
}
