//! Machines' networks: a wire for each, the way out, the ports that lead in, and nothing else.
//!
//! ```text
//!   machine ── virtio-net ── monitor ── tap ── this machine's kernel ── the rest
//!    .2                                  .1     rules: who says what, to whom, as whom
//! ```
//!
//! Nothing of this machine's network is touched before the first machine with a network starts, and
//! nothing of it is left when the last one has ended: then the rules go, and whether packets are
//! forwarded at all is as it was.
//!
//! **Failure paths.** A monitor that ends takes its tap along, however it ends, and its thread in this
//! process takes it out of the rules. When the host dies, taps and rules stand for as long as the
//! machines run; the next host reads each machine's lease from its directory and writes the rules
//! anew ([`Network::settle`]). What cannot be had here (no root, no `nft`, not this kernel) is said
//! when it is asked for ([`Network::missing`]), and machines then run without a network.

mod addresses;
mod interface;
mod nft;
mod rules;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use insula_types::MachineId;
use insula_types::machine::{MachineNet, PortForward};
use insula_vmm::jail::spawn::in_own_network;
use insula_vmm::virtio::net::InterfaceNameError;

use addresses::Lease;
pub(crate) use addresses::Wire;
pub use addresses::{Pool, PoolError, PortRange, PortRangeError};
use nft::{Nft, NftError};
use rules::{Forwarding, GUESTS_ONLY, Live, Rules};

use super::place::Place;
use crate::outbound;

/// Whether packets go from one interface to another at all.
const FORWARDING: &str = "ipv4/ip_forward";
/// A lease is a line; what is longer is none.
const LEASE_MAX_BYTES: u64 = 16 << 10;

/// What the operator decided about machines' networks.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// Their addresses; with none there are no networks.
    pub pool: Option<Pool>,
    /// The ports of the host's that may lead to them.
    pub ports: PortRange,
    /// Networks beside the Internet that they may reach.
    pub opened: Vec<outbound::Network>,
}

/// Why a machine does not get the network that it was to have.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error("all {0} addresses are taken")]
    Full(u32),
    #[error("port {wanted} is not among those that may lead to machines, which are {range}")]
    Port { wanted: u16, range: PortRange },
    #[error("the host's {protocol} port {port} leads to another machine already", protocol = .0.protocol.as_str(), port = .0.host)]
    Taken(PortForward),
    #[error(
        "the interface {interface} leads to addresses of {pool}: machines need others \
         (machine_network)"
    )]
    Used { interface: String, pool: Pool },
    #[error(transparent)]
    Name(#[from] InterfaceNameError),
    #[error("making its interface: {0}")]
    Interface(io::Error),
    #[error(transparent)]
    Rules(#[from] NftError),
    #[error("turning forwarding on: {0}")]
    Forwarding(io::Error),
    #[error("its lease: {0}")]
    Lease(io::Error),
}

/// What a machine is connected with.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) tap: OwnedFd,
    pub(crate) wire: Wire,
}

/// The networks of all machines of one host.
#[derive(Debug)]
pub(crate) struct Network {
    means: OnceLock<Result<Means, String>>,
    config: NetworkConfig,
    /// Tells this host's interfaces and rules from those of another one on this machine.
    tag: String,
    state: Mutex<State>,
}

#[derive(Debug, Clone)]
struct Means {
    pool: Pool,
    nft: Nft,
}

#[derive(Debug, Default)]
struct State {
    /// Every machine that has one, whether it runs or not: its addresses stay its own.
    slots: BTreeMap<MachineId, u32>,
    live: BTreeMap<MachineId, Live>,
    /// What was found when the rules were first written.
    forwarding: Option<Forwarding>,
}

/// Whether machines can have networks here, by giving one to nobody, in a network that is nobody's.
///
/// # Errors
/// What is missing.
pub fn probe() -> Result<(), String> {
    let nft = Nft::find().ok_or("the program nft is not installed")?;
    let tried = in_own_network(|| {
        let pool = Pool::DEFAULT;
        let wire = pool.wire(0).ok_or("a pool without addresses")?;
        let live = BTreeMap::from([(
            MachineId::new(0),
            Live {
                wire,
                ports: Vec::new(),
            },
        )]);
        let rules = Rules {
            tag: "probe",
            pool,
            opened: &[],
            forwarding: Forwarding::ForGuests,
            live: &live,
        };
        let rules = nft.apply(&rules.to_string());
        rules.map_err(|error| error.to_string())?;
        let name = wire.interface("probe").map_err(|error| error.to_string())?;
        let made = interface::make(name, wire).map(drop);
        made.map_err(|error| format!("no tap interface: {error}"))
    });
    tried.map_err(|error| format!("no network namespace: {error}"))?
}

impl Network {
    /// Of machines of this host. Nothing is looked at before somebody wants to know.
    pub(crate) fn new(config: &NetworkConfig, instance: &str) -> Self {
        Self {
            means: OnceLock::new(),
            config: config.clone(),
            tag: instance.chars().take(5).collect(),
            state: Mutex::default(),
        }
    }

    /// What is needed; or what is missing. Blocks for some milliseconds the first time.
    fn means(&self) -> Result<&Means, &str> {
        let means = self.means.get_or_init(|| {
            let pool = self.config.pool.ok_or("machine_network is none")?;
            let means = probe().and_then(|()| {
                let nft = Nft::find().ok_or("the program nft is gone")?;
                Ok(Means { pool, nft })
            });
            if let Err(why) = &means {
                tracing::warn!(why, "machines run without network");
            }
            means
        });
        means.as_ref().map_err(String::as_str)
    }

    /// Why machines have no networks here.
    pub(crate) fn missing(&self) -> Option<&str> {
        self.means().err()
    }

    /// Their addresses.
    pub(crate) fn pool(&self) -> Option<Pool> {
        self.means().ok().map(|means| means.pool)
    }

    /// The wire of a machine that is connected.
    pub(crate) fn wire(&self, machine: MachineId) -> Option<Wire> {
        self.lock().live.get(&machine).map(|live| live.wire)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What a panic left is what the rules are made of next, which is checked nowhere else.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses ports that a machine cannot have now.
    pub(crate) fn check(&self, machine: MachineId, net: &MachineNet) -> Result<(), NetworkError> {
        if self.means().is_err() {
            return Ok(());
        }
        for port in &net.ports {
            if !self.config.ports.contains(port.host) {
                let (wanted, range) = (port.host.get(), self.config.ports);
                return Err(NetworkError::Port { wanted, range });
            }
        }
        match rules::taken(&self.lock().live, machine, &net.ports) {
            Some(port) => Err(NetworkError::Taken(port)),
            None => Ok(()),
        }
    }

    /// Connects a machine; not at all where there are no networks.
    pub(crate) fn attach(
        &self,
        machine: MachineId,
        place: &Place,
        net: &MachineNet,
    ) -> Result<Option<Attached>, NetworkError> {
        let Ok(means) = self.means() else {
            return Ok(None);
        };
        self.check(machine, net)?;
        let routes = fs::read_to_string("/proc/thread-self/net/route");
        let unused = rules::unused(means.pool, &routes.unwrap_or_default(), &self.tag);
        unused.map_err(|interface| {
            let pool = means.pool;
            NetworkError::Used { interface, pool }
        })?;
        let mut state = self.lock();
        let wire = state.wire(machine, means.pool)?;
        let ports = net.ports.clone();
        let lease = Lease {
            slot: wire.slot,
            ports: ports.clone(),
        };
        write_lease(place, &lease).map_err(NetworkError::Lease)?;
        state.live.insert(machine, Live { wire, ports });
        let made = self.connect(means, &mut state, wire);
        if made.is_err() {
            state.live.remove(&machine);
            self.clean_up(means, &mut state);
        }
        made.map(|tap| Some(Attached { tap, wire }))
    }

    /// The rules first: the interface is never there without them.
    fn connect(
        &self,
        means: &Means,
        state: &mut State,
        wire: Wire,
    ) -> Result<OwnedFd, NetworkError> {
        self.apply(means, state)?;
        let name = wire.interface(&self.tag)?;
        interface::make(name, wire).map_err(NetworkError::Interface)
    }

    fn apply(&self, means: &Means, state: &mut State) -> Result<(), NetworkError> {
        let forwarding = match state.forwarding {
            Some(found) => found,
            None => self.found_forwarding(means)?,
        };
        let rules = Rules {
            tag: &self.tag,
            pool: means.pool,
            opened: &self.config.opened,
            forwarding,
            live: &state.live,
        };
        means.nft.apply(&rules.to_string())?;
        state.forwarding = Some(forwarding);
        interface::write_setting(FORWARDING, "1").map_err(NetworkError::Forwarding)
    }

    /// As it was before the first machine, which a host may have started before this one.
    fn found_forwarding(&self, means: &Means) -> Result<Forwarding, NetworkError> {
        let found = interface::read_setting(FORWARDING).map_err(NetworkError::Forwarding)?;
        let table = rules::table(&self.tag);
        let ours = means.nft.has(&["chain", "inet", &table, GUESTS_ONLY])?;
        Ok(if found == "0" || ours {
            Forwarding::ForGuests
        } else {
            Forwarding::Anyway
        })
    }

    /// A machine's monitor is gone, and its tap with it.
    pub(crate) fn detach(&self, machine: MachineId) {
        let mut state = self.lock();
        if state.live.remove(&machine).is_some()
            && let Ok(means) = self.means()
        {
            self.clean_up(means, &mut state);
        }
    }

    /// Rules for those that are connected; none for nobody.
    fn clean_up(&self, means: &Means, state: &mut State) {
        let done = if state.live.is_empty() {
            self.leave_nothing(means, state)
        } else {
            self.apply(means, state)
        };
        if let Err(error) = done {
            // Written anew with the next machine that comes or goes.
            tracing::warn!(%error, "rules of machines' networks stay that are for nobody");
        }
    }

    fn leave_nothing(&self, means: &Means, state: &mut State) -> Result<(), NetworkError> {
        let Some(forwarding) = state.forwarding else {
            return Ok(());
        };
        if forwarding == Forwarding::ForGuests {
            interface::write_setting(FORWARDING, "0").map_err(NetworkError::Forwarding)?;
        }
        means.nft.apply(&rules::removed(&self.tag))?;
        state.forwarding = None;
        Ok(())
    }

    /// A machine that was defined by an earlier host: its addresses are its own.
    pub(crate) fn know(&self, machine: MachineId, place: &Place) {
        if let Some(lease) = read_lease(place) {
            self.lock().slots.insert(machine, lease.slot);
        }
    }

    /// A machine that ran on while no host was there.
    pub(crate) fn found(&self, machine: MachineId, place: &Place) {
        let Some(lease) = read_lease(place) else {
            return;
        };
        let Ok(means) = self.means() else {
            return;
        };
        // Its interface tells whether it has one: the lease may be of an earlier start.
        let wire = means.pool.wire(lease.slot);
        let name = wire.and_then(|wire| wire.interface(&self.tag).ok());
        let (Some(wire), Some(name)) = (wire, name) else {
            return;
        };
        if Path::new("/proc/sys/net/ipv4/conf")
            .join(name.to_string())
            .is_dir()
        {
            let ports = lease.ports;
            self.lock().live.insert(machine, Live { wire, ports });
        }
    }

    /// All machines that run have been found: what an earlier host left is theirs, or removed.
    pub(crate) fn settle(&self) {
        if self.lock().slots.is_empty() {
            // No machine of this host's ever had a network.
            return;
        }
        let Ok(means) = self.means() else { return };
        let mut state = self.lock();
        let table = rules::table(&self.tag);
        let left = means.nft.has(&["table", "inet", &table]).unwrap_or(false);
        if left {
            match self.found_forwarding(means) {
                Ok(forwarding) => state.forwarding = Some(forwarding),
                Err(error) => tracing::warn!(%error, "machines' networks"),
            }
        }
        if left || !state.live.is_empty() {
            self.clean_up(means, &mut state);
        }
    }

    /// A machine is deleted: its addresses are free.
    pub(crate) fn forget(&self, machine: MachineId) {
        self.detach(machine);
        self.lock().slots.remove(&machine);
    }
}

impl State {
    /// A machine's own, or the first that is nobody's.
    fn wire(&mut self, machine: MachineId, pool: Pool) -> Result<Wire, NetworkError> {
        let own = self.slots.get(&machine);
        if let Some(wire) = own.and_then(|slot| pool.wire(*slot)) {
            return Ok(wire);
        }
        let taken: std::collections::HashSet<u32> = self.slots.values().copied().collect();
        let free = (0..pool.slots()).find(|slot| !taken.contains(slot));
        let wire = free.and_then(|slot| pool.wire(slot));
        let wire = wire.ok_or(NetworkError::Full(pool.slots()))?;
        self.slots.insert(machine, wire.slot);
        Ok(wire)
    }
}

fn write_lease(place: &Place, lease: &Lease) -> io::Result<()> {
    place.make()?;
    let (path, new) = (place.lease(), place.lease().with_extension("new"));
    fs::write(&new, serde_json::to_vec(lease)?)?;
    fs::rename(new, path)
}

fn read_lease(place: &Place) -> Option<Lease> {
    use std::io::Read;
    let mut bytes = Vec::new();
    let file = fs::File::open(place.lease()).ok()?;
    // Cut off, it cannot be understood.
    file.take(LEASE_MAX_BYTES).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}
