//! The thread that runs a device.
//!
//! ```text
//!             Activate                 an error of the device
//!   idle ──────────────────▶ live ─────────────────────────────▶ broken
//!    ▲                        │                                    │
//!    └──────── Reset ─────────┴──────────────── Reset ─────────────┘
//! ```
//!
//! In each state the worker may be *held* (paused, or being saved): it then answers commands and
//! does nothing else. Commands come through a channel that is looked at between any two turns of
//! the device; a turn is bounded ([`Queues::drain`]), so commands wait no longer than one turn.
//! The commands that a guest can cause are synchronous: it cannot pile them up.
//!
//! If the device panics, the thread ends; whoever waits for it sees a closed channel, the device
//! shows NEEDS_RESET, and a reset does not bring it back.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use virtio_queue::{Queue, QueueT};

use super::device::{DeviceError, DeviceState, Interest, QueueSpec, Readiness, VirtioDevice};
use super::interrupt::Interrupt;
use super::queue::{Queues, Ring};
use crate::event::Event;
use crate::memory::GuestMemory;
use crate::threads::{ThreadKind, Threads};

/// Why there is no worker.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The system has no descriptors or threads left, or the jail refuses.
    #[error("starting a device's thread: {0}")]
    Start(#[from] io::Error),
    /// The device panicked before.
    #[error("the device's thread is gone")]
    Gone,
    /// The device did not take its saved state.
    #[error("restoring: {0}")]
    Restore(DeviceError),
}

/// What a device's worker tells of itself.
#[derive(Debug, Default)]
pub(super) struct Health {
    /// The device stopped, and waits for a reset.
    broken: AtomicBool,
    /// How often it stopped.
    failures: AtomicU64,
    /// Why it stopped last.
    last: Mutex<Option<String>>,
}

impl Health {
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// How often the device stopped, and why it did last.
    pub(super) fn failures(&self) -> (u64, Option<String>) {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        (self.failures.load(Ordering::Relaxed), last.clone())
    }

    fn fail(&self, why: String) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
        self.failures.fetch_add(1, Ordering::Relaxed);
        self.broken.store(true, Ordering::Release);
    }

    fn mend(&self) {
        self.broken.store(false, Ordering::Release);
    }
}

/// What a worker holds beside the registers.
#[derive(Debug)]
pub(super) struct WorkerState {
    pub(super) device: DeviceState,
    /// For each queue of a live device the next available and the next used index.
    pub(super) positions: Vec<(u16, u16)>,
}

enum Command {
    Activate { accepted: u64, queues: Vec<Queue> },
    Reset(SyncSender<()>),
    Hold(SyncSender<()>),
    Release,
    Save(SyncSender<WorkerState>),
    Restore(DeviceState, SyncSender<Result<(), DeviceError>>),
    Stop,
}

/// The transport's end.
#[derive(Debug)]
pub struct Worker {
    commands: Sender<Command>,
    wake: Event,
    notifications: Vec<Event>,
    config_written: Arc<AtomicBool>,
    health: Arc<Health>,
    thread: Option<JoinHandle<Option<()>>>,
}

impl Worker {
    /// Starts the thread; the device is idle.
    pub(super) fn spawn(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        interrupt: Interrupt,
        threads: &Threads,
    ) -> Result<Self, WorkerError> {
        let wake = Event::new()?;
        let specs = device.queues().to_vec();
        let notifications: Vec<Event> = specs
            .iter()
            .map(|_| Event::new())
            .collect::<io::Result<_>>()?;
        let (commands, receiver) = channel();
        let config_written = Arc::new(AtomicBool::new(false));
        let health = Arc::new(Health::default());
        let kind = ThreadKind::Device(device.kind());
        let runner = Runner {
            device,
            memory,
            interrupt,
            specs,
            commands: receiver,
            wake: wake.try_clone()?,
            notifications: clone_all(&notifications)?,
            config_written: Arc::clone(&config_written),
            health: Arc::clone(&health),
            live: None,
            held: false,
        };
        let thread = threads.spawn(kind, move || runner.run())?;
        Ok(Self {
            commands,
            wake,
            notifications,
            config_written,
            health,
            thread: Some(thread),
        })
    }

    pub(super) fn health(&self) -> &Arc<Health> {
        &self.health
    }

    /// One descriptor for each queue; a write to it is a notification.
    pub(super) fn notifications(&self) -> &[Event] {
        &self.notifications
    }

    pub(super) fn activate(&self, accepted: u64, queues: Vec<Queue>) -> Result<(), WorkerError> {
        self.send(Command::Activate { accepted, queues })
    }

    /// Returns when the device has let go of its queues.
    pub(super) fn reset(&self) -> Result<(), WorkerError> {
        self.ask(Command::Reset)
    }

    pub(super) fn config_written(&self) {
        self.config_written.store(true, Ordering::Release);
        self.wake.raise();
    }

    /// Returns when the device is at rest.
    pub(super) fn hold(&self) -> Result<(), WorkerError> {
        self.ask(Command::Hold)
    }

    pub(super) fn release(&self) -> Result<(), WorkerError> {
        self.send(Command::Release)
    }

    pub(super) fn save(&self) -> Result<WorkerState, WorkerError> {
        self.ask(Command::Save)
    }

    pub(super) fn restore(&self, state: DeviceState) -> Result<(), WorkerError> {
        let restored = self.ask(|answer| Command::Restore(state, answer))?;
        restored.map_err(WorkerError::Restore)
    }

    fn ask<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> Result<T, WorkerError> {
        let (answer, answered) = sync_channel(1);
        self.send(command(answer))?;
        answered.recv().map_err(|_| WorkerError::Gone)
    }

    fn send(&self, command: Command) -> Result<(), WorkerError> {
        self.commands.send(command).map_err(|_| WorkerError::Gone)?;
        self.wake.raise();
        Ok(())
    }
}

impl Drop for Worker {
    /// The device is dropped on its own thread, and its thread is gone afterwards.
    fn drop(&mut self) {
        let _ = self.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn clone_all(events: &[Event]) -> io::Result<Vec<Event>> {
    events.iter().map(Event::try_clone).collect()
}

/// What woke the worker.
#[derive(Debug, Clone, Copy)]
enum Woken {
    Commands,
    Queue(usize),
    Host(u64),
}

/// The thread's end.
struct Runner {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    interrupt: Interrupt,
    specs: Vec<QueueSpec>,
    commands: Receiver<Command>,
    wake: Event,
    notifications: Vec<Event>,
    config_written: Arc<AtomicBool>,
    health: Arc<Health>,
    /// The queues, while the device is live or broken.
    live: Option<Queues>,
    held: bool,
}

impl Runner {
    fn run(mut self) {
        // Whatever ends this thread ends the device; a panic is seen as a device that is broken.
        let health = Arc::clone(&self.health);
        let mut gone = Gone {
            health,
            interrupt: self.interrupt.clone(),
            expected: false,
        };
        let mut woken = Vec::new();
        loop {
            loop {
                use std::sync::mpsc::TryRecvError::{Disconnected, Empty};
                match self.commands.try_recv() {
                    Ok(Command::Stop) | Err(Disconnected) => {
                        gone.expected = true;
                        return;
                    }
                    Ok(command) => self.obey(command),
                    Err(Empty) => break,
                }
            }
            if let Err(source) = self.wait(&mut woken) {
                let what = "waiting for events";
                self.fail(&DeviceError::Host { what, source });
            }
            for event in &woken {
                self.turn(*event);
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Activate { accepted, queues } => self.activate(accepted, queues),
            Command::Reset(done) => {
                self.device.reset();
                self.live = None;
                self.config_written.store(false, Ordering::Release);
                self.health.mend();
                let _ = done.send(());
            }
            Command::Hold(done) => {
                self.held = true;
                let _ = done.send(());
            }
            Command::Release => self.held = false,
            Command::Save(answer) => {
                let rings = self.live.as_ref().map_or(&[][..], Queues::rings);
                let position = |ring: &Ring| (ring.queue.next_avail(), ring.queue.next_used());
                let _ = answer.send(WorkerState {
                    device: self.device.save(),
                    positions: rings.iter().map(position).collect(),
                });
            }
            Command::Restore(state, answer) => {
                let _ = answer.send(self.device.restore(&state));
            }
            Command::Stop => {}
        }
    }

    fn activate(&mut self, accepted: u64, queues: Vec<Queue>) {
        let rings = queues.into_iter().zip(&self.specs).zip(&self.notifications);
        let rings = rings.map(|((queue, spec), notification)| {
            let notification = notification.try_clone()?;
            Ok(Ring {
                queue,
                spec: *spec,
                notification,
                pushed: false,
            })
        });
        let outcome = rings.collect::<io::Result<Vec<_>>>();
        let outcome = outcome.map_err(|source| DeviceError::Host {
            what: "cloning a descriptor",
            source,
        });
        let outcome = outcome.and_then(|rings| {
            let memory = self.memory.clone();
            let queues = Queues::new(memory, rings, self.interrupt.clone());
            // The driver may have notified before, or a snapshot may have requests waiting.
            (0..self.specs.len()).for_each(|index| queues.call_back(index));
            self.live = Some(queues);
            self.device.activate(accepted)
        });
        if let Err(error) = outcome {
            self.fail(&error);
        }
    }

    /// The device may work.
    fn running(&self) -> bool {
        self.live.is_some() && !self.held && !self.health.is_broken()
    }

    /// Sleeps until something happens, and lists what.
    fn wait(&mut self, woken: &mut Vec<Woken>) -> io::Result<()> {
        woken.clear();
        let mut interests: Vec<Interest<'_>> = Vec::new();
        let mut descriptors = vec![(readable(self.wake.as_fd()), Woken::Commands)];
        if self.running() {
            for (index, notification) in self.notifications.iter().enumerate() {
                descriptors.push((readable(notification.as_fd()), Woken::Queue(index)));
            }
            self.device.interests(&mut interests);
            for interest in &interests {
                let flags = match interest.readiness {
                    Readiness::Readable => PollFlags::IN,
                    Readiness::Writable => PollFlags::OUT,
                    Readiness::Both => PollFlags::IN | PollFlags::OUT,
                };
                let descriptor = PollFd::from_borrowed_fd(interest.descriptor, flags);
                descriptors.push((descriptor, Woken::Host(interest.token)));
            }
        }
        let (mut polled, events): (Vec<_>, Vec<_>) = descriptors.into_iter().unzip();
        match poll(&mut polled, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let ready = polled.iter().zip(events);
        let ready = ready.filter(|(descriptor, _)| !descriptor.revents().is_empty());
        woken.extend(ready.map(|(_, event)| event));
        Ok(())
    }

    /// One turn of the device, or none if an earlier one of this round broke it.
    fn turn(&mut self, event: Woken) {
        match event {
            Woken::Commands => {
                self.wake.clear();
                if !self.config_written.swap(false, Ordering::AcqRel) {
                    return;
                }
            }
            Woken::Queue(index) => {
                if let Some(notification) = self.notifications.get(index) {
                    notification.clear();
                }
            }
            Woken::Host(_) => {}
        }
        if !self.running() {
            return;
        }
        let Some(queues) = &mut self.live else { return };
        let outcome = match event {
            Woken::Commands => self.device.config_written(queues),
            Woken::Queue(index) => self.device.queue_notified(index, queues),
            Woken::Host(token) => self.device.host_ready(token, queues),
        };
        if let Err(error) = outcome {
            self.fail(&error);
        }
    }

    fn fail(&self, error: &DeviceError) {
        let name = self.device.kind().name();
        self.health.fail(format!("virtio-{name}: {error}"));
        self.interrupt.config_changed();
    }
}

fn readable(descriptor: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::from_borrowed_fd(descriptor, PollFlags::IN)
}

/// Tells, when the thread ends without having been told to.
struct Gone {
    health: Arc<Health>,
    interrupt: Interrupt,
    expected: bool,
}

impl Drop for Gone {
    fn drop(&mut self) {
        if !self.expected {
            self.health.fail("the device's thread panicked".to_owned());
            self.interrupt.config_changed();
        }
    }
}
