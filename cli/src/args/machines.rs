//! The verbs for machines and their images.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Subcommand, ValueEnum};
use insula_types::machine::{PortForward, Protocol, Throughput};
use insula_types::{Bytes, ImageName, MachineName, Millicores, Shares, TenantName};

use super::{Connection, Look};

/// `TENANT/MACHINE`.
#[derive(Debug, Clone)]
pub(crate) struct MachineRef {
    pub(crate) tenant: TenantName,
    pub(crate) machine: MachineName,
}

impl FromStr for MachineRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (tenant, machine) = text
            .split_once('/')
            .ok_or_else(|| "write it as TENANT/MACHINE".to_owned())?;
        let tenant = tenant.parse().map_err(|error| format!("tenant: {error}"))?;
        let machine = machine.parse();
        Ok(Self {
            tenant,
            machine: machine.map_err(|error| format!("machine: {error}"))?,
        })
    }
}

impl MachineRef {
    /// The path of the machine in the admin API.
    pub(crate) fn path(&self) -> String {
        format!("/v1/tenants/{}/machines/{}", self.tenant, self.machine)
    }
}

impl std::fmt::Display for MachineRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.tenant, self.machine)
    }
}

/// A machine, and how to print it.
#[derive(Debug, Args)]
pub(crate) struct OneMachine {
    #[arg(value_name = "TENANT/MACHINE")]
    pub(crate) machine: MachineRef,
    #[command(flatten)]
    pub(crate) look: Look,
}

/// `IMAGE[:rw[:SIZE]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskArg {
    pub(crate) image: ImageName,
    pub(crate) writable: bool,
    pub(crate) size: Option<Bytes>,
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.splitn(3, ':');
        let image = parts.next().unwrap_or_default();
        let image = image.parse().map_err(|error| format!("image: {error}"))?;
        let writable = match parts.next() {
            None | Some("ro") => false,
            Some("rw") => true,
            Some(other) => return Err(format!("a disk is ro or rw, not {other:?}")),
        };
        let size = parts.next().map(str::parse).transpose();
        Ok(Self {
            image,
            writable,
            size: size.map_err(|error| format!("size: {error}"))?,
        })
    }
}

/// Whether it has a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum NetArg {
    On,
    Off,
}

/// `HOST:MACHINE[/udp]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PortArg(pub(crate) PortForward);

impl FromStr for PortArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (ports, protocol) = match text.split_once('/') {
            None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some((_, other)) => return Err(format!("a port is tcp or udp, not {other:?}")),
        };
        let split = ports.split_once(':');
        let (host, machine) = split.ok_or_else(|| "write it as HOST:MACHINE".to_owned())?;
        let port = |text: &str| text.parse().map_err(|_| format!("{text:?} is no port"));
        Ok(Self(PortForward {
            protocol,
            host: port(host)?,
            machine: port(machine)?,
        }))
    }
}

/// `BYTES[,OPERATIONS]`, in a second, or `none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LimitArg(pub(crate) Option<Throughput>);

impl FromStr for LimitArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self(None));
        }
        let (bytes, operations) = match text.split_once(',') {
            None => (text, None),
            Some((bytes, operations)) => (bytes, Some(operations)),
        };
        let bytes = bytes.parse().map_err(|error| format!("bytes: {error}"))?;
        let operations = operations.map(|text| {
            let number = text.parse();
            number.map_err(|_| format!("{text:?} is no number of operations"))
        });
        Ok(Self(Some(Throughput {
            bytes_per_second: Some(bytes),
            operations_per_second: operations.transpose()?,
        })))
    }
}

/// What a machine is to be; what is left out keeps its value, or gets its default.
#[derive(Debug, Args)]
pub(crate) struct MachinePatch {
    /// What it boots: an image
    #[arg(long, value_name = "IMAGE")]
    pub(crate) kernel: Option<ImageName>,
    /// Its initial ramdisk: an image
    #[arg(long, value_name = "IMAGE")]
    pub(crate) initrd: Option<ImageName>,
    /// What the kernel is told [default: console=ttyS0 panic=-1]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) cmdline: Option<String>,
    /// A disk, such as root:rw or root:rw:4GiB; repeat it for more
    #[arg(long = "disk", value_name = "IMAGE[:rw[:SIZE]]")]
    pub(crate) disks: Vec<DiskArg>,
    /// What each of its disks may read and write in a second, such as 50MB or 50MB,1000 [default: none]
    #[arg(long, value_name = "BYTES[,OPERATIONS]|none")]
    pub(crate) disk_limit: Option<LimitArg>,
    /// Processors [default: 1]
    #[arg(long, value_name = "N")]
    pub(crate) vcpus: Option<u8>,
    /// Memory [default: 256MiB]
    #[arg(long, value_name = "BYTES")]
    pub(crate) memory: Option<Bytes>,
    /// Its network: an address of its own, and a way out [default: off]
    #[arg(long, value_name = "on|off")]
    pub(crate) net: Option<NetArg>,
    /// A port of the host's that leads in, such as 20022:22 or 20053:53/udp; repeat it for more
    #[arg(long = "port", value_name = "HOST:MACHINE[/udp]")]
    pub(crate) ports: Vec<PortArg>,
    /// What its network may receive and, apart from that, send in a second [default: none]
    #[arg(long, value_name = "BYTES[,PACKETS]|none")]
    pub(crate) net_limit: Option<LimitArg>,
    /// Weight against the tenant's other machines
    #[arg(long, value_name = "SHARES")]
    pub(crate) cpu_shares: Option<Shares>,
    /// Never more, even on an idle host
    #[arg(long, value_name = "CPU")]
    pub(crate) cpu_limit: Option<Millicores>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum MachinesVerb {
    /// The machines of a tenant
    #[command(visible_alias = "ls")]
    List {
        tenant: TenantName,
        #[command(flatten)]
        look: Look,
    },
    /// One machine, and what it does
    #[command(visible_alias = "get")]
    Show(OneMachine),
    /// Define a machine, or change what is given from its next start on
    #[command(visible_alias = "set")]
    Create {
        #[arg(value_name = "TENANT/MACHINE")]
        machine: MachineRef,
        #[command(flatten)]
        patch: Box<MachinePatch>,
        /// Start it as well
        #[arg(long)]
        start: bool,
        #[command(flatten)]
        look: Look,
    },
    /// Boot it; done when its guest runs
    Start(OneMachine),
    /// Press its power button; after a time, or at once with --force, end it
    Stop {
        #[command(flatten)]
        one: OneMachine,
        /// End it without asking the guest
        #[arg(long)]
        force: bool,
        /// How long the guest has for shutting down
        #[arg(long, value_name = "SECONDS", default_value_t = 30)]
        timeout: u32,
    },
    /// Stop it between two instructions
    Pause(OneMachine),
    /// Let it go on
    Resume(OneMachine),
    /// Press its reset button
    Reset(OneMachine),
    /// Save it, memory and disks, in the place of its snapshot before
    Snapshot(OneMachine),
    /// Let it go on from its snapshot, or from another machine's, as a clone of that
    Restore {
        #[command(flatten)]
        one: OneMachine,
        /// Whose snapshot: a machine of the same tenant, with the same processors, memory and disks
        #[arg(long, value_name = "MACHINE")]
        from: Option<MachineName>,
    },
    /// Sit down at its console; Ctrl-] leaves
    Console {
        #[arg(value_name = "TENANT/MACHINE")]
        machine: MachineRef,
        #[command(flatten)]
        connection: Connection,
    },
    /// Delete it, and what its guest wrote
    #[command(visible_alias = "rm")]
    Delete {
        #[arg(value_name = "TENANT/MACHINE")]
        machine: MachineRef,
        /// Also if it runs
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        connection: Connection,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImagesVerb {
    /// All images
    #[command(visible_alias = "ls")]
    List(Look),
    /// One image
    #[command(visible_alias = "get")]
    Show {
        image: ImageName,
        #[command(flatten)]
        look: Look,
    },
    /// Upload a kernel, an initial ramdisk or a disk
    #[command(visible_alias = "upload")]
    Put {
        image: ImageName,
        file: PathBuf,
        #[command(flatten)]
        look: Look,
    },
    /// Delete an image; machines that were made with it keep its content
    #[command(visible_alias = "rm")]
    Delete {
        image: ImageName,
        #[command(flatten)]
        connection: Connection,
    },
}

/// What a host tells the monitor of a machine, in its own words.
#[derive(Debug, Args)]
pub(crate) struct MonitorArgs {
    pub(crate) orders: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_written_in_one_word() {
        let disk = |text: &str| text.parse::<DiskArg>();
        let root = disk("root-6.1:rw:4GiB").unwrap();
        assert_eq!((root.writable, root.size), (true, Some(Bytes::mib(4096))));
        assert!(!disk("tools").unwrap().writable && !disk("tools:ro").unwrap().writable);
        for bad in ["", ":rw", "root:x", "root:rw:much", "Root"] {
            assert!(disk(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn ports_are_written_in_one_word() {
        let port = |text: &str| text.parse::<PortArg>().map(|PortArg(port)| port);
        let ssh = port("20022:22").unwrap();
        assert_eq!((ssh.host.get(), ssh.machine.get()), (20_022, 22));
        assert_eq!(port("20022:22/tcp").unwrap(), ssh);
        assert_eq!(port("1:53/udp").unwrap().protocol, Protocol::Udp);
        for bad in ["", "22", "0:22", "1:", "1:70000", "1:2/sctp", "1:2:3"] {
            assert!(port(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_machine_is_named_with_its_tenant() {
        let machine: MachineRef = "acme/db".parse().unwrap();
        assert_eq!(machine.path(), "/v1/tenants/acme/machines/db");
        assert!("db".parse::<MachineRef>().is_err());
    }
}
