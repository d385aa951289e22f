//! The verbs that run a host or bring a project to one.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::FalseyValueParser;
use clap::{Args, ValueEnum};
use insula_types::{ServiceName, TenantName};

use super::{Connection, Format, Look};

/// All values as they were typed: `config` reads them together with the file, so that every
/// mistake is reported at once.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Where all state lives [default: /var/lib/insula as root, else ~/.local/share/insula]
    #[arg(long, env = "INSULA_DATA", value_name = "DIR")]
    pub(crate) data: Option<String>,
    /// Keep all state in a directory that is removed at the end
    #[arg(
        long,
        env = "INSULA_TEMPORARY",
        value_parser = FalseyValueParser::new(),
        conflicts_with = "data"
    )]
    pub(crate) temporary: bool,
    /// Where services answer [default: 127.0.0.1:8080]
    #[arg(long, env = "INSULA_LISTEN", value_name = "ADDRESS")]
    pub(crate) listen: Option<String>,
    /// Where the admin API answers [default: 127.0.0.1:8081]
    #[arg(long, env = "INSULA_ADMIN", value_name = "ADDRESS")]
    pub(crate) admin: Option<String>,
    /// The certificate of the services' listener, with its chain, in PEM; read again when it changes
    #[arg(long, env = "INSULA_TLS_CERT", value_name = "FILE")]
    pub(crate) tls_cert: Option<String>,
    /// The private key of that certificate
    #[arg(long, env = "INSULA_TLS_KEY", value_name = "FILE")]
    pub(crate) tls_key: Option<String>,
    /// The certificate of the admin API; without one it listens on loopback addresses only
    #[arg(long, env = "INSULA_ADMIN_TLS_CERT", value_name = "FILE")]
    pub(crate) admin_tls_cert: Option<String>,
    /// The private key of that certificate
    #[arg(long, env = "INSULA_ADMIN_TLS_KEY", value_name = "FILE")]
    pub(crate) admin_tls_key: Option<String>,
    /// Services answer on SERVICE.TENANT.DOMAIN [default: localhost]
    #[arg(long, env = "INSULA_DOMAIN")]
    pub(crate) domain: Option<String>,
    /// Worker threads [default: one per core]
    #[arg(long, env = "INSULA_WORKERS", value_name = "N")]
    pub(crate) workers: Option<String>,
    /// Instances that can be alive at once [default: 2000]
    #[arg(long, env = "INSULA_INSTANCES", value_name = "N")]
    pub(crate) instances: Option<String>,
    /// Memory that all guests together may use [default: three quarters of the machine's]
    #[arg(long, env = "INSULA_GUEST_MEMORY", value_name = "BYTES")]
    pub(crate) guest_memory: Option<String>,
    /// How long the code of a service stays in memory that nobody asks [default: 60s]
    #[arg(long, env = "INSULA_CODE_IDLE", value_name = "DURATION")]
    pub(crate) code_idle: Option<String>,
    /// How long requests may go on after SIGTERM [default: 10s]
    #[arg(long, env = "INSULA_DRAIN", value_name = "DURATION")]
    pub(crate) drain: Option<String>,
    /// The most memory that any service gets for one request [default: 128MiB]
    #[arg(long, env = "INSULA_MAX_MEMORY", value_name = "BYTES")]
    pub(crate) max_memory: Option<String>,
    /// The most fuel that any service gets for one request [default: 1T]
    #[arg(long, env = "INSULA_MAX_FUEL", value_name = "FUEL")]
    pub(crate) max_fuel: Option<String>,
    /// The longest that any request may take [default: 5m]
    #[arg(long, env = "INSULA_MAX_TIMEOUT", value_name = "DURATION")]
    pub(crate) max_timeout: Option<String>,
    /// The largest request body of any service [default: 1GiB]
    #[arg(long, env = "INSULA_MAX_REQUEST_BODY", value_name = "BYTES")]
    pub(crate) max_request_body: Option<String>,
    /// Networks beside the Internet that guests may reach, such as 10.1.0.0/16,fd00::/8
    /// [default: none]
    #[arg(long, env = "INSULA_OUTBOUND_NETWORKS", value_name = "CIDR,…")]
    pub(crate) outbound_networks: Option<String>,
    /// Of this machine's memory, what running machines may be promised together, in percent; more
    /// than 100 promises what is not there [default: 80]
    #[arg(long, env = "INSULA_MACHINE_MEMORY_PERCENT", value_name = "PERCENT")]
    pub(crate) machine_memory_percent: Option<String>,
    /// The addresses of machines that have a network, or none for no networks
    /// [default: 10.199.0.0/16]
    #[arg(long, env = "INSULA_MACHINE_NETWORK", value_name = "CIDR")]
    pub(crate) machine_network: Option<String>,
    /// The host's ports that may lead to machines [default: 20000-29999]
    #[arg(long, env = "INSULA_MACHINE_PORTS", value_name = "FIRST-LAST")]
    pub(crate) machine_ports: Option<String>,
    /// Start machines also where KVM emulates every instruction: nothing but tests runs there
    #[arg(
        long,
        env = "INSULA_MACHINES_ON_EMULATION",
        value_parser = FalseyValueParser::new()
    )]
    pub(crate) machines_on_emulation: bool,
    /// What to log on stderr: error, warn, info, debug, trace, or a filter [default: info]
    #[arg(long, env = "INSULA_LOG", value_name = "LEVEL")]
    pub(crate) log: Option<String>,
    /// A file with the same settings, in TOML
    #[arg(long, env = "INSULA_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Shut down when stdin ends: the host's life is tied to whoever holds the other end
    #[arg(long, hide = true)]
    pub(crate) until_stdin_ends: bool,
}

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// The project
    #[arg(default_value = ".")]
    pub(crate) dir: PathBuf,
    /// Build and deploy again whenever a file of the project changes
    #[arg(long, env = "INSULA_WATCH", value_parser = FalseyValueParser::new())]
    pub(crate) watch: bool,
    /// The tenant, created if missing
    #[arg(long, env = "INSULA_TENANT", default_value = "demo")]
    pub(crate) tenant: TenantName,
    /// The service, created if missing [default: the package's name]
    #[arg(long, env = "INSULA_SERVICE")]
    pub(crate) service: Option<ServiceName>,
    /// Where services answer, if a host is started
    #[arg(
        long,
        env = "INSULA_LISTEN",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:8080",
        help_heading = "Host"
    )]
    pub(crate) listen: SocketAddr,
    /// The admin address of the host to use, or to start if none answers there
    #[arg(
        long,
        env = "INSULA_ADMIN",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:8081",
        help_heading = "Host"
    )]
    pub(crate) admin: SocketAddr,
    /// An admin token, if a host answers; better given as INSULA_TOKEN
    #[arg(
        long,
        env = "INSULA_TOKEN",
        hide_env_values = true,
        help_heading = "Host"
    )]
    pub(crate) token: Option<String>,
    /// Where a started host keeps its state [default: a directory that is removed at the end]
    #[arg(long, env = "INSULA_DATA", value_name = "DIR", help_heading = "Host")]
    pub(crate) data: Option<PathBuf>,
    /// Stop when the service answers, without following its log
    #[arg(long, hide = true)]
    pub(crate) no_follow: bool,
}

#[derive(Debug, Args)]
pub(crate) struct NewArgs {
    /// The project's name, and that of the folder that is made
    pub(crate) name: ServiceName,
    /// What to start from
    #[arg(long, value_enum, default_value = "rust")]
    pub(crate) template: Template,
    /// Where the SDK is [default: the checkout that this program was built from, else its version]
    #[arg(long, env = "INSULA_SDK", value_name = "DIR")]
    pub(crate) sdk: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Template {
    Rust,
}

#[derive(Debug, Args)]
pub(crate) struct BuildArgs {
    /// The project
    #[arg(default_value = ".")]
    pub(crate) dir: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct DeployArgs {
    /// A project to build, or a component
    #[arg(default_value = ".", value_name = "DIR|FILE.wasm")]
    pub(crate) source: PathBuf,
    /// The tenant
    #[arg(long, env = "INSULA_TENANT")]
    pub(crate) tenant: TenantName,
    /// The service, created if missing
    #[arg(long, env = "INSULA_SERVICE")]
    pub(crate) service: ServiceName,
    /// Create the tenant, too, if it is missing
    #[arg(long)]
    pub(crate) create: bool,
    /// Upload only; `insula traffic` switches to it later
    #[arg(long)]
    pub(crate) dark: bool,
    #[command(flatten)]
    pub(crate) look: Look,
}

#[derive(Debug, Args)]
pub(crate) struct BackupArgs {
    /// The file to write, or a directory for a file named after the time
    #[arg(value_name = "FILE|DIR")]
    pub(crate) to: PathBuf,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct RecompileArgs {
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// What `insula backup` wrote
    #[arg(value_name = "FILE")]
    pub(crate) from: PathBuf,
    /// The data directory to make; there is nothing in it yet
    #[arg(long, env = "INSULA_DATA", value_name = "DIR")]
    pub(crate) data: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// The data directory to check [default: as `insula serve`]
    #[arg(long, env = "INSULA_DATA", value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// How to print
    #[arg(short, long, value_enum, default_value = "table")]
    pub(crate) output: Format,
}

#[derive(Debug, Args)]
pub(crate) struct DataPlaneArgs {
    /// As in `serve`.
    #[arg(long, hide = true)]
    pub(crate) log: String,
}

#[derive(Debug, Args)]
pub(crate) struct CompileArgs {
    /// The engine reads its own arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub(crate) rest: Vec<String>,
}
