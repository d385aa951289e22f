//! One thread for each vCPU.
//!
//! ```text
//!            Run                   the guest ends the machine
//!  Parked ─────────▶ Running ─────────────────────────────────▶ Ended
//!    ▲                  │                                         │
//!    └───── Park ───────┴──────────────── Stop ───────────────────┴──▶ thread gone
//! ```
//!
//! Commands come through a channel; whoever sends one to a running vCPU kicks it out of the guest
//! ([`kick`]). A parked vCPU has no access of the guest half done: what KVM still had to finish of
//! the last exit is finished before it parks, so that its registers may be saved.
//!
//! If the thread panics, the machine ends with [`ExitReason::Monitor`].

mod counts;
mod exits;
mod kick;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::Killable;

use crate::devices::Devices;
use crate::exit::{Ending, ExitReason};
use crate::kvm::{KvmError, failed};
use crate::snapshot::{self, MsrList, VcpuState};
use crate::threads::{ThreadKind, Threads};

use counts::Counters;
pub use counts::ExitCounts;
use exits::Turn;
use kick::Kickable;

/// Commands under way to one vCPU: whoever sends one waits for it, so there is one.
const COMMANDS: usize = 4;

enum Command {
    Run,
    Park(SyncSender<()>),
    Save(SyncSender<Result<VcpuState, KvmError>>, Arc<MsrList>),
    Stop,
}

/// Why a vCPU does not obey.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// Its thread is gone, which ended the machine.
    #[error("the thread of vCPU {number} is gone")]
    Gone {
        /// Which.
        number: u8,
    },
    /// No thread is to be had, or the jail refuses.
    #[error("starting the thread of vCPU {number}: {source}")]
    Start {
        /// Which.
        number: u8,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The kick's signal cannot be had.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// The controlling end.
#[derive(Debug)]
pub(crate) struct Vcpu {
    number: u8,
    commands: SyncSender<Command>,
    counters: Arc<Counters>,
    thread: Option<JoinHandle<Option<()>>>,
}

impl Vcpu {
    /// Starts the thread; the vCPU is parked.
    pub(crate) fn spawn(
        number: u8,
        vcpu: VcpuFd,
        devices: Arc<Devices>,
        ending: Arc<Ending>,
        threads: &Threads,
    ) -> Result<Self, VcpuError> {
        kick::install()?;
        let (commands, receiver) = sync_channel(COMMANDS);
        let counters = Arc::new(Counters::default());
        let for_thread = Arc::clone(&counters);
        let body = move || {
            let mut gone = Gone {
                number,
                ending: Arc::clone(&ending),
                expected: false,
            };
            Runner {
                number,
                vcpu: Kickable::new(vcpu),
                commands: receiver,
                devices,
                ending,
                counters: for_thread,
            }
            .run();
            gone.expected = true;
        };
        let thread = threads.spawn(ThreadKind::Vcpu(number), body);
        let thread = thread.map_err(|source| VcpuError::Start { number, source })?;
        Ok(Self {
            number,
            commands,
            counters,
            thread: Some(thread),
        })
    }

    /// Runs until it is parked or stopped, or the machine ends.
    pub(crate) fn run(&self) -> Result<(), VcpuError> {
        self.send(Command::Run)
    }

    /// Asks it to park. Whoever holds the answer knows when it has.
    pub(crate) fn park(&self) -> Result<Parking, VcpuError> {
        let (answer, parked) = sync_channel(1);
        self.send(Command::Park(answer))?;
        Ok(Parking {
            number: self.number,
            parked,
        })
    }

    /// All that KVM keeps of it. It has to be parked.
    pub(crate) fn save(&self, msrs: &Arc<MsrList>) -> Result<VcpuState, VcpuError> {
        let number = self.number;
        let (answer, saved) = sync_channel(1);
        self.send(Command::Save(answer, Arc::clone(msrs)))?;
        let saved = saved.recv().map_err(|_| VcpuError::Gone { number })?;
        Ok(saved?)
    }

    pub(crate) fn exits(&self) -> ExitCounts {
        self.counters.read()
    }

    fn send(&self, command: Command) -> Result<(), VcpuError> {
        let gone = VcpuError::Gone {
            number: self.number,
        };
        self.commands.send(command).map_err(|_| gone)?;
        if let Some(thread) = &self.thread {
            // Fails only where the thread is over, which the next command finds out.
            let _ = thread.kill(kick::signal());
        }
        Ok(())
    }
}

impl Drop for Vcpu {
    /// The thread is gone afterwards, and the vCPU closed.
    fn drop(&mut self) {
        let _ = self.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A vCPU that was asked to park.
#[derive(Debug)]
#[must_use = "the vCPU may still run"]
pub(crate) struct Parking {
    number: u8,
    parked: Receiver<()>,
}

impl Parking {
    /// Returns when it is parked.
    pub(crate) fn wait(self) -> Result<(), VcpuError> {
        let number = self.number;
        self.parked.recv().map_err(|_| VcpuError::Gone { number })
    }
}

/// The thread's end.
struct Runner {
    number: u8,
    vcpu: Kickable,
    commands: Receiver<Command>,
    devices: Arc<Devices>,
    ending: Arc<Ending>,
    counters: Arc<Counters>,
}

enum State {
    Parked,
    Running,
    /// This vCPU ended the machine, and must not run again.
    Ended,
}

impl Runner {
    fn run(mut self) {
        let mut state = State::Parked;
        loop {
            self.vcpu.arm();
            let command = match state {
                State::Running => match self.commands.try_recv() {
                    Ok(command) => Some(command),
                    Err(TryRecvError::Empty) => None,
                    Err(TryRecvError::Disconnected) => return,
                },
                State::Parked | State::Ended => match self.commands.recv() {
                    Ok(command) => Some(command),
                    Err(_) => return,
                },
            };
            state = match (command, state) {
                (Some(Command::Stop), _) => return,
                (Some(Command::Run), State::Ended) => State::Ended,
                (Some(Command::Run), _) => State::Running,
                (Some(Command::Save(answer, msrs)), before) => {
                    let saved = snapshot::save_vcpu(self.vcpu.vcpu(), &msrs);
                    // Whoever asked may have given up.
                    let _ = answer.send(saved);
                    before
                }
                (Some(Command::Park(parked)), before) => {
                    let after = match before {
                        State::Running => self.finish_exit(),
                        other => other,
                    };
                    // Whoever asked may have given up.
                    let _ = parked.send(());
                    after
                }
                (None, _) => self.turn(),
            };
        }
    }

    /// Lets KVM complete the access of the last exit, without entering the guest.
    fn finish_exit(&mut self) -> State {
        loop {
            self.vcpu.vcpu().set_kvm_immediate_exit(1);
            match self.turn_once() {
                Turn::Interrupted => return State::Parked,
                // A string instruction has more than one access.
                Turn::Again => {}
                Turn::End(reason) => return self.end(reason),
            }
        }
    }

    fn turn(&mut self) -> State {
        match self.turn_once() {
            Turn::Again | Turn::Interrupted => State::Running,
            Turn::End(reason) => self.end(reason),
        }
    }

    fn end(&self, reason: ExitReason) -> State {
        self.ending.end(reason);
        State::Ended
    }

    fn turn_once(&mut self) -> Turn {
        exits::run_once(self.number, &mut self.vcpu, &self.devices, &self.counters)
    }
}

/// Ends the machine, when the thread ends without having been told to.
struct Gone {
    number: u8,
    ending: Arc<Ending>,
    expected: bool,
}

impl Drop for Gone {
    fn drop(&mut self) {
        if !self.expected {
            let thread = ThreadKind::Vcpu(self.number).to_string();
            self.ending.end(ExitReason::Monitor { thread });
        }
    }
}

/// Named by those who set vCPUs up.
pub(crate) fn set_registers(vcpu: &VcpuFd, entry: crate::boot::Entry) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let regs = crate::boot::first_registers(entry, &mut sregs);
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))
}
