//! What can be typed.

mod machines;
mod resources;
mod work;

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use insula_types::{ServiceName, TenantName, VolumeName};

pub(crate) use machines::{
    ImagesVerb, LimitArg, MachinePatch, MachineRef, MachinesVerb, MonitorArgs, NetArg, OneMachine,
    PortArg,
};
pub(crate) use resources::{
    LogsArgs, RollbackArgs, ServicesVerb, TenantsVerb, TokensVerb, TopArgs, TrafficArgs, UsageArgs,
    VersionsVerb, VolumesVerb,
};
pub(crate) use work::{
    BackupArgs, BuildArgs, CompileArgs, DataPlaneArgs, DeployArgs, DoctorArgs, NewArgs,
    RecompileArgs, RestoreArgs, ServeArgs, Template, UpArgs,
};

/// Many tenants' WebAssembly services on one machine, metered and limited.
#[derive(Debug, Parser)]
#[command(
    name = "insula",
    version,
    max_term_width = 100,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Run the host
    Serve(Box<ServeArgs>),
    /// Build a project, start a temporary host unless one answers, deploy, follow the log
    Up(UpArgs),
    /// Make a project that builds and answers
    New(NewArgs),
    /// Build a project to a component
    Build(BuildArgs),
    /// Upload a component and wait until it serves
    Deploy(DeployArgs),
    /// Look at tenants and change them
    #[command(subcommand, visible_alias = "tenant")]
    Tenants(TenantsVerb),
    /// Look at services and change them
    #[command(subcommand, visible_alias = "service")]
    Services(ServicesVerb),
    /// Look at volumes and change them
    #[command(subcommand, visible_alias = "volume")]
    Volumes(VolumesVerb),
    /// Look at the versions of a service
    #[command(subcommand, visible_alias = "version")]
    Versions(VersionsVerb),
    /// Full guests under KVM
    #[command(subcommand, visible_alias = "machine")]
    Machines(MachinesVerb),
    /// Kernels, initial ramdisks and disks of machines
    #[command(subcommand, visible_alias = "image")]
    Images(ImagesVerb),
    /// Go back to the version that served before
    Rollback(RollbackArgs),
    /// Say which version serves which share of the requests
    Traffic(TrafficArgs),
    /// What a tenant has used: fuel, CPU time, memory, requests
    Usage(UsageArgs),
    /// What a service wrote, and what the host says about its requests
    Logs(LogsArgs),
    /// A live table of what the tenants use
    Top(TopArgs),
    /// Look at admin tokens, make them, delete them
    #[command(subcommand, visible_alias = "token")]
    Tokens(TokensVerb),
    /// Save a running host's intent and components to a file
    Backup(BackupArgs),
    /// Make a data directory from a backup
    Restore(RestoreArgs),
    /// Compile what has no code for the host's engine, and wait until all has: after an upgrade
    Recompile(RecompileArgs),
    /// Check this machine, and say how to mend what is missing
    Doctor(DoctorArgs),
    /// Compile one component from stdin to stdout, within limits; the host runs this as a child
    #[command(hide = true)]
    CompileComponent(CompileArgs),
    /// Serve requests; the host runs this as a child
    #[command(hide = true)]
    DataPlane(DataPlaneArgs),
    /// Run one machine; the host starts this for each
    #[command(hide = true)]
    MachineMonitor(MonitorArgs),
}

/// How to reach a host.
#[derive(Debug, Clone, Args)]
pub(crate) struct Connection {
    /// The host's admin address, with https:// where it speaks TLS
    #[arg(
        long,
        env = "INSULA_ADMIN",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:8081",
        help_heading = "Host"
    )]
    pub(crate) admin: String,
    /// An admin token; better given as INSULA_TOKEN, which other users cannot see
    #[arg(
        long,
        env = "INSULA_TOKEN",
        hide_env_values = true,
        help_heading = "Host"
    )]
    pub(crate) token: Option<String>,
    /// The host's data directory, to find its admin token in
    #[arg(long, env = "INSULA_DATA", value_name = "DIR", help_heading = "Host")]
    pub(crate) data: Option<PathBuf>,
    /// Check the certificate of an https:// address by those in this file, not by the system's
    #[arg(
        long,
        env = "INSULA_CA_CERT",
        value_name = "FILE",
        help_heading = "Host"
    )]
    pub(crate) ca_cert: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
}

/// A verb that reads from a host and prints.
#[derive(Debug, Clone, Args)]
pub(crate) struct Look {
    #[command(flatten)]
    pub(crate) connection: Connection,
    /// How to print
    #[arg(short, long, value_enum, default_value = "table")]
    pub(crate) output: Format,
}

/// `TENANT/SERVICE`.
#[derive(Debug, Clone)]
pub(crate) struct ServiceRef {
    pub(crate) tenant: TenantName,
    pub(crate) service: ServiceName,
}

impl FromStr for ServiceRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (tenant, service) = text
            .split_once('/')
            .ok_or_else(|| "write it as TENANT/SERVICE".to_owned())?;
        Ok(Self {
            tenant: tenant.parse().map_err(|error| format!("tenant: {error}"))?,
            service: service
                .parse()
                .map_err(|error| format!("service: {error}"))?,
        })
    }
}

impl ServiceRef {
    /// The path of the service in the admin API.
    pub(crate) fn path(&self) -> String {
        format!("/v1/tenants/{}/services/{}", self.tenant, self.service)
    }
}

impl std::fmt::Display for ServiceRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.tenant, self.service)
    }
}

/// A volume, written `TENANT/VOLUME`.
#[derive(Debug, Clone)]
pub(crate) struct VolumeRef {
    pub(crate) tenant: TenantName,
    pub(crate) volume: VolumeName,
}

impl VolumeRef {
    pub(crate) fn path(&self) -> String {
        format!("/v1/tenants/{}/volumes/{}", self.tenant, self.volume)
    }
}

impl FromStr for VolumeRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (tenant, volume) = text
            .split_once('/')
            .ok_or_else(|| "write it as TENANT/VOLUME".to_owned())?;
        Ok(Self {
            tenant: tenant.parse().map_err(|error| format!("tenant: {error}"))?,
            volume: volume.parse().map_err(|error| format!("volume: {error}"))?,
        })
    }
}

impl std::fmt::Display for VolumeRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.tenant, self.volume)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_service_is_named_with_its_tenant() {
        let service: ServiceRef = "acme/hello".parse().unwrap();
        assert_eq!(service.path(), "/v1/tenants/acme/services/hello");
        for bad in ["hello", "acme/", "/hello", "acme/../x", "a/b/c", "A/b"] {
            assert!(bad.parse::<ServiceRef>().is_err(), "{bad:?}");
        }
    }
}
