//! Full guests as control sees them: what is asked of them, and what becomes of it.
//!
//! ```text
//!  api::machines ─▶ start, stop, pause … ─▶ Book (a life each) ─▶ Runner ─▶ monitor process
//!                                             ▲
//!                        pump ◀── Tell ───────┴── stores each state, meters, starts again
//! ```
//!
//! What is asked is answered when it has happened: a start when the guest runs, a stop when the
//! monitor is gone. The book is ahead of the store by one state at most; what a start of the host
//! finds is decided by the monitors' sockets and records, and by the store only where there are none.

mod admission;
mod find;
mod orders;
mod pump;
mod share;
mod snapshots;

use std::cell::RefCell;
use std::collections::HashSet;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use insula_types::{Digest, MachineId};
use insula_vmm::life::{Event, State};
use insula_vmm::probe::Support;
use tokio::sync::mpsc;

use super::Control;
use super::problem::{Code, Problem};
use crate::machines::book::{BOOT, Book};
use crate::machines::cgroups::Groups;
use crate::machines::network::{Network, NetworkConfig};
use crate::machines::place::Places;
use crate::machines::runner::{Origin, Runner, Tell, Whose};
use crate::machines::saved::SnapshotKey;
use crate::machines::start::{Begin, OpenImage, Plan};
use crate::state::DataDir;
use crate::state::blobs::Kind;
use crate::state::machines::Machine;

pub(crate) use find::find;
pub(crate) use pump::pump;
pub(crate) use share::share;

/// Seals snapshots; made at the first start.
const KEY_FILE: &str = "snapshots.key";
/// A start reads kernel and initrd, and forks.
const START_PATIENCE: Duration = Duration::from_secs(70);
/// An order waits for requests to disks that are under way.
const ORDER_PATIENCE: Duration = Duration::from_secs(20);
/// How long a guest has for shutting down, when nothing else is said.
pub(crate) const STOP_PATIENCE: Duration = Duration::from_secs(30);
/// How long a monitor has for ending.
const END_PATIENCE: Duration = Duration::from_secs(15);

/// What the operator decided about machines.
#[derive(Debug, Clone)]
pub struct MachinesConfig {
    /// The program that monitors are started from; knows [`crate::machines::MONITOR_VERB`].
    pub program: PathBuf,
    /// How much of the host's memory running machines may be promised together, in percent: more
    /// than 100 is overcommitment.
    pub memory_percent: u32,
    /// Whether machines start where KVM emulates every instruction: for tests.
    pub on_emulation: bool,
    /// Their addresses and ports.
    pub network: NetworkConfig,
    /// What becomes of machines that run when the host ends.
    pub at_end: AtEnd,
}

/// What becomes of machines that run when the host ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtEnd {
    /// They run on, for the next host to find.
    RunOn,
    /// They are ended: their directory goes with the host.
    Stop,
}

/// What runners tell.
pub(crate) type Told = mpsc::UnboundedReceiver<(MachineId, Tell)>;

/// Everything about machines that lives on the control thread.
#[derive(Debug)]
pub(crate) struct Room {
    pub(crate) book: RefCell<Book>,
    pub(crate) places: Places,
    pub(crate) groups: Arc<Groups>,
    pub(crate) network: Arc<Network>,
    pub(crate) support: Support,
    pub(crate) config: MachinesConfig,
    key: SnapshotKey,
    /// Those that are being saved.
    saving: RefCell<HashSet<MachineId>>,
    tells: mpsc::UnboundedSender<(MachineId, Tell)>,
}

impl Room {
    /// Looks what this machine can do. Blocks for some milliseconds.
    pub(crate) fn open(data: &DataDir, config: MachinesConfig) -> std::io::Result<(Self, Told)> {
        let key = SnapshotKey::from_bytes(data.key(KEY_FILE)?);
        let places = Places::open(&data.machines_path()?)?;
        let instance = places.instance();
        let support = insula_vmm::probe::probe();
        tracing::info!(support = support.word(), "machines: {support}");
        let groups = match support {
            Support::Absent(_) => Groups::default(),
            _ => Groups::find(&instance),
        };
        let network = Network::new(&config.network, &instance);
        for missing in groups.missing() {
            tracing::warn!(controller = missing, "machines run without a bound");
        }
        let (tells, told) = mpsc::unbounded_channel();
        let room = Self {
            book: RefCell::default(),
            places,
            groups: Arc::new(groups),
            network: Arc::new(network),
            support,
            config,
            key,
            saving: RefCell::default(),
            tells,
        };
        Ok((room, told))
    }

    pub(super) fn whose(&self, machine: &Machine) -> Whose {
        Whose {
            tenant: machine.tenant,
            machine: machine.id,
            memory: machine.spec.memory,
            place: self.places.of(machine.id),
            groups: Arc::clone(&self.groups),
            network: Arc::clone(&self.network),
        }
    }

    /// Where a machine is in its life.
    pub(crate) fn state(&self, id: MachineId) -> Option<State> {
        self.book.borrow().get(id).map(|entry| entry.state())
    }
}

/// What an order may not do in a state.
pub(super) fn refused(refused: &insula_vmm::life::Refused) -> Problem {
    Problem::new(Code::MachineState, refused)
}

fn gone() -> Problem {
    Problem::not_found("machine")
}

impl Control {
    /// Boots a machine; answers when its guest runs.
    pub(crate) async fn start_machine(self: &Rc<Self>, id: MachineId) -> Result<(), Problem> {
        let boot = async |machine: &Machine| self.boot(machine).await;
        self.begin_machine(id, BOOT, boot).await
    }

    fn can_run_machines(&self) -> Result<(), Problem> {
        match &self.machines.support {
            Support::Hardware => Ok(()),
            Support::Emulated if self.machines.config.on_emulation => Ok(()),
            other => Err(Problem::new(Code::NoKvm, other)),
        }
    }

    /// Admits a machine and lets it begin, with what `begin` makes once it is starting.
    async fn begin_machine(
        self: &Rc<Self>,
        id: MachineId,
        event: Event,
        begin: impl AsyncFnOnce(&Machine) -> Result<Begin, Problem>,
    ) -> Result<(), Problem> {
        self.can_run_machines()?;
        let room = &self.machines;
        let machine = {
            // While it is held nothing is deleted, and afterwards not what is starting.
            let _mutation = self.mutation.lock().await;
            let (machine, tenant) = self
                .store(move |store| {
                    let machine = store.machine_by_id(id)?;
                    let tenant = store.tenant(&machine.tenant_name)?;
                    Ok((machine, tenant))
                })
                .await?;
            let limit = tenant.spec.memory_limit.map(|limit| limit.get());
            let mut book = room.book.borrow_mut();
            admission::check_tenant(&book, &machine, limit)?;
            admission::check(&book, &machine, self)?;
            admission::check_ports(&room.network, &machine)?;
            let entry = book.get_mut(id).ok_or_else(gone)?;
            entry.ask(&event).map_err(|error| refused(&error))?;
            entry.memory = machine.spec.memory;
            machine
        };
        self.run_machine(&machine, begin).await?;
        self.expect_machine(id, START_PATIENCE, |state| {
            !matches!(state, State::Starting { .. })
        })
        .await?;
        match room.state(id) {
            Some(State::Failed { failure }) => Err(Problem::new(Code::MachineFailed, failure)),
            Some(_) => Ok(()),
            None => Err(gone()),
        }
    }

    /// Lets a runner make the monitor of a machine that is starting.
    async fn run_machine(
        self: &Rc<Self>,
        machine: &Machine,
        begin: impl AsyncFnOnce(&Machine) -> Result<Begin, Problem>,
    ) -> Result<(), Problem> {
        let started = self.try_run_machine(machine, begin).await;
        if let Err(problem) = &started
            && let Some(entry) = self.machines.book.borrow_mut().get_mut(machine.id)
        {
            let failure = insula_vmm::life::Failure::Setup(problem.detail().to_owned());
            // It is starting, which may always break.
            let _ = entry.ask(&Event::Broke(failure));
        }
        // Of a machine that never ran nobody else tells.
        self.give_back_memory(machine.id);
        self.store_life(machine.id).await;
        started
    }

    /// What a machine boots.
    async fn boot(&self, machine: &Machine) -> Result<Begin, Problem> {
        Ok(Begin::Boot {
            kernel: self.open_image(machine.images.kernel).await?,
            initrd: match machine.images.initrd {
                Some(digest) => Some(self.open_image(digest).await?),
                None => None,
            },
        })
    }

    async fn try_run_machine(
        self: &Rc<Self>,
        machine: &Machine,
        begin: impl AsyncFnOnce(&Machine) -> Result<Begin, Problem>,
    ) -> Result<(), Problem> {
        self.divide_memory(&machine.tenant_name).await?;
        let begin = begin(machine).await?;
        let mut disks = Vec::new();
        for digest in &machine.images.disks {
            disks.push(self.open_image(*digest).await?);
        }
        let room = &self.machines;
        let tenant = machine.tenant_name.clone();
        let tenant = self.store(move |store| store.tenant(&tenant)).await?;
        let envelope = room.groups.set_tenant(tenant.id, &tenant.spec.cpu);
        envelope.map_err(|error| Problem::internal(&error))?;
        let plan = Plan {
            program: room.config.program.clone(),
            spec: machine.spec.clone(),
            name: machine.name.clone(),
            begin,
            disks,
        };
        let (whose, origin) = (room.whose(machine), Origin::New(Box::new(plan)));
        let runner = Runner::start(whose, origin, room.tells.clone());
        let runner = runner.map_err(|error| Problem::internal(&error))?;
        let mut book = room.book.borrow_mut();
        book.get_mut(machine.id).ok_or_else(gone)?.runner = Some(runner);
        Ok(())
    }

    async fn open_image(&self, digest: Digest) -> Result<OpenImage, Problem> {
        let found = self
            .files
            .run(move |files| files.find(Kind::Component, &digest))
            .await??;
        let file = found.ok_or_else(|| {
            Problem::new(Code::NotFound, format_args!("the image {digest} is gone"))
        })?;
        let bytes = file.metadata()?.len();
        Ok(OpenImage {
            file,
            digest,
            bytes,
        })
    }

    /// What all running machines may be promised together.
    pub(crate) fn machine_memory_bytes(&self) -> u64 {
        let percent = self.machines.config.memory_percent;
        admission::capacity_bytes(self.machine.memory_bytes, percent)
    }

    /// A machine is deleted: nothing of it stays.
    pub(crate) fn forget_machine(&self, machine: &Machine) {
        let room = &self.machines;
        let Some(mut entry) = room.book.borrow_mut().remove(machine.id) else {
            return;
        };
        // From every state in which there is no monitor.
        let _ = entry.ask(&Event::Delete);
        self.events.machine(&entry);
        room.network.forget(machine.id);
        let removed = room.places.of(machine.id).remove();
        let groups = room.groups.remove_machine(machine.tenant, machine.id);
        for error in [removed, groups].into_iter().filter_map(Result::err) {
            tracing::warn!(machine = %machine.id, %error, "something of a deleted machine stays");
        }
    }

    /// Lets go of all machines, or ends them, as the operator decided; the host ends.
    pub(crate) async fn leave_machines(&self) {
        let running: Vec<MachineId> = {
            let book = self.machines.book.borrow();
            let running = book.iter().filter(|(_, entry)| entry.state().has_memory());
            running.map(|(id, _)| id).collect()
        };
        for id in running {
            if self.machines.config.at_end == AtEnd::Stop
                && let Err(problem) = self.stop_machine(id, None).await
            {
                tracing::error!(machine = %id, problem = problem.detail(), "a machine runs on");
            }
            let runner = {
                let mut book = self.machines.book.borrow_mut();
                book.get_mut(id).and_then(|entry| entry.runner.take())
            };
            // Its thread ends when it is let go of.
            drop(runner);
        }
        self.machines.groups.leave();
    }

    /// Stores where a machine is in its life.
    pub(crate) async fn store_life(&self, id: MachineId) {
        let Some(state) = self.machines.state(id) else {
            return;
        };
        let stored = self.store(move |store| store.set_machine_life(id, &state));
        if let Err(problem) = stored.await {
            // The next state is stored over it; a start of the host asks the monitor first.
            tracing::warn!(machine = %id, problem = problem.detail(), "a state was not stored");
        }
    }
}
