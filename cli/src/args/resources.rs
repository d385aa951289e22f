//! The verbs that look at what a host keeps, and change it.

use clap::{Args, Subcommand, ValueEnum};
use insula_types::volume::VolumeKind;
use insula_types::{Bytes, Millis, TenantName, VolumeName};

use super::{Connection, Look, ServiceRef, VolumeRef};
use crate::resources::set::{ServicePatch, TenantPatch};

#[derive(Debug, Subcommand)]
pub(crate) enum TenantsVerb {
    /// All tenants
    #[command(visible_alias = "ls")]
    List(Look),
    /// One tenant and its resource envelope
    #[command(visible_alias = "get")]
    Show {
        tenant: TenantName,
        #[command(flatten)]
        look: Look,
    },
    /// Create a tenant, or change what is given
    Set {
        tenant: TenantName,
        #[command(flatten)]
        patch: Box<TenantPatch>,
        #[command(flatten)]
        look: Look,
    },
    /// Delete a tenant and all that it owns
    #[command(visible_alias = "rm")]
    Delete {
        tenant: TenantName,
        #[command(flatten)]
        connection: Connection,
    },
}

fn kind(text: &str) -> Result<VolumeKind, String> {
    match text {
        "files" => Ok(VolumeKind::Files),
        "store" => Ok(VolumeKind::Store),
        _ => Err("files or store".to_owned()),
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumesVerb {
    /// The volumes of a tenant, and what they take
    #[command(visible_alias = "ls")]
    List {
        tenant: TenantName,
        #[command(flatten)]
        look: Look,
    },
    /// One volume, and what it takes
    #[command(visible_alias = "get")]
    Show {
        #[arg(value_name = "TENANT/VOLUME")]
        volume: VolumeRef,
        #[command(flatten)]
        look: Look,
    },
    /// Create a volume, or change how much it holds
    Set {
        #[arg(value_name = "TENANT/VOLUME")]
        volume: VolumeRef,
        /// Bytes, such as 1GiB
        #[arg(long)]
        size: Option<Bytes>,
        /// Files, directories and links
        #[arg(long)]
        inodes: Option<u64>,
        /// files, which services mount, or store, for keys and values; it stays so
        #[arg(long, value_parser = kind)]
        kind: Option<VolumeKind>,
        #[command(flatten)]
        look: Look,
    },
    /// Make a volume of what another one holds now, to be read only
    Snapshot {
        #[arg(value_name = "TENANT/VOLUME")]
        volume: VolumeRef,
        /// The new volume's name
        name: VolumeName,
        #[command(flatten)]
        look: Look,
    },
    /// Make a volume of what another one holds now
    Clone {
        #[arg(value_name = "TENANT/VOLUME")]
        volume: VolumeRef,
        /// The new volume's name
        name: VolumeName,
        #[command(flatten)]
        look: Look,
    },
    /// Delete a volume and all that is in it
    #[command(visible_alias = "rm")]
    Delete {
        #[arg(value_name = "TENANT/VOLUME")]
        volume: VolumeRef,
        #[command(flatten)]
        connection: Connection,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ServicesVerb {
    /// The services of a tenant
    #[command(visible_alias = "ls")]
    List {
        tenant: TenantName,
        #[command(flatten)]
        look: Look,
    },
    /// One service, its limits and its versions
    #[command(visible_alias = "get")]
    Show {
        #[arg(value_name = "TENANT/SERVICE")]
        service: ServiceRef,
        #[command(flatten)]
        look: Look,
    },
    /// Create a service, or change what is given
    Set {
        #[arg(value_name = "TENANT/SERVICE")]
        service: ServiceRef,
        #[command(flatten)]
        patch: Box<ServicePatch>,
        #[command(flatten)]
        look: Look,
    },
    /// Delete a service and its versions
    #[command(visible_alias = "rm")]
    Delete {
        #[arg(value_name = "TENANT/SERVICE")]
        service: ServiceRef,
        #[command(flatten)]
        connection: Connection,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum VersionsVerb {
    /// The versions of a service
    #[command(visible_alias = "ls")]
    List {
        #[arg(value_name = "TENANT/SERVICE")]
        service: ServiceRef,
        #[command(flatten)]
        look: Look,
    },
}

#[derive(Debug, Args)]
pub(crate) struct RollbackArgs {
    #[arg(value_name = "TENANT/SERVICE")]
    pub(crate) service: ServiceRef,
    #[command(flatten)]
    pub(crate) look: Look,
}

#[derive(Debug, Args)]
pub(crate) struct TrafficArgs {
    #[arg(value_name = "TENANT/SERVICE")]
    pub(crate) service: ServiceRef,
    /// A version and its share of the requests in percent, such as 3=90 4=10; 0 keeps one ready
    /// under its preview name
    #[arg(required = true, value_name = "VERSION=PERCENT", value_parser = share)]
    pub(crate) shares: Vec<(u32, u8)>,
    #[command(flatten)]
    pub(crate) look: Look,
}

fn share(text: &str) -> Result<(u32, u8), String> {
    let (version, percent) = text
        .split_once('=')
        .ok_or_else(|| "write it as VERSION=PERCENT, such as 3=100".to_owned())?;
    let version = version
        .parse()
        .map_err(|_| format!("{version:?} is not a version's number"))?;
    let percent = percent
        .trim_end_matches('%')
        .parse()
        .ok()
        .filter(|percent| *percent <= 100)
        .ok_or_else(|| format!("{percent:?} is not a percentage from 0 to 100"))?;
    Ok((version, percent))
}

#[derive(Debug, Args)]
pub(crate) struct UsageArgs {
    pub(crate) tenant: TenantName,
    #[command(flatten)]
    pub(crate) look: Look,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    #[arg(value_name = "TENANT/SERVICE")]
    pub(crate) service: ServiceRef,
    /// Wait for more until Ctrl-C
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only the last lines of what is past [default: all that the host keeps]
    #[arg(long, value_name = "LINES")]
    pub(crate) tail: Option<u32>,
    #[command(flatten)]
    pub(crate) look: Look,
}

#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// Print one table over one interval and stop; so does `top` without a terminal
    #[arg(long)]
    pub(crate) once: bool,
    /// How long an interval is
    #[arg(long, default_value = "2s", value_name = "DURATION")]
    pub(crate) interval: Millis,
    #[command(flatten)]
    pub(crate) look: Look,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokensVerb {
    /// All tokens; never their secrets
    #[command(visible_alias = "ls")]
    List(Look),
    /// Make a token and print its secret, once
    Create {
        /// A name to tell it from others
        name: String,
        /// Only for this tenant [default: the whole host]
        #[arg(long)]
        tenant: Option<TenantName>,
        /// What it allows
        #[arg(long, value_enum, default_value = "read")]
        access: TokenAccess,
        /// How long it is valid [default: until it is deleted]
        #[arg(long, value_name = "SECONDS")]
        ttl_seconds: Option<u64>,
        #[command(flatten)]
        look: Look,
    },
    /// Delete a token: whoever holds it is refused from now on
    #[command(visible_alias = "rm")]
    Delete {
        id: u64,
        #[command(flatten)]
        connection: Connection,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TokenAccess {
    Read,
    Write,
}

impl TokenAccess {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_traffic() {
        assert_eq!(share("3=90"), Ok((3, 90)));
        assert_eq!(share("3=90%"), Ok((3, 90)));
        for bad in ["3", "=90", "3=", "3=101", "v3=1"] {
            assert!(share(bad).is_err(), "{bad:?}");
        }
    }
}
