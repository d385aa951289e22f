//! What `insula serve` runs with: flags, then environment, then file, then defaults; read
//! together so that every mistake is reported at once.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread::available_parallelism;

use insula_host::config::{DEFAULT_CEILING, DEFAULT_CODE_IDLE, DEFAULT_INSTANCES, HostConfig};
use insula_host::control::{AtEnd, MachinesConfig};
use insula_host::machines::network::{NetworkConfig, Pool, PortRange};
use insula_host::outbound::Network;
use insula_host::process::keeper::DataProgram;
use insula_host::tls::TlsFiles;
use insula_types::spec::{RequestLimits, is_host_name};
use insula_types::{Bytes, Millis};
use tracing_subscriber::EnvFilter;

use crate::args::ServeArgs;

const DEFAULT_LISTEN: &str = "127.0.0.1:8080";
const DEFAULT_ADMIN: &str = "127.0.0.1:8081";
const DEFAULT_DOMAIN: &str = "localhost";
const DEFAULT_DRAIN: Millis = Millis::constant(10_000);
const DEFAULT_LOG: &str = "info";
/// What is left is for the host, its services and its monitors.
const DEFAULT_MACHINE_MEMORY_PERCENT: u32 = 80;
const MACHINE_MEMORY_PERCENT_MAX: u32 = 1_000;
/// More threads than any machine that this is meant for has cores.
const WORKERS_MAX: usize = 1024;
/// Each holds an address range of its own; beyond this the 47 bits of a process are used up.
const INSTANCES_MAX: u32 = 20_000;

/// Everything that is wrong, a line each.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mistakes(Vec<String>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the configuration cannot be used")?;
        self.0.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

impl std::error::Error for Mistakes {}

/// The answer to flags, environment and file together.
#[derive(Debug)]
pub(crate) struct Settings {
    /// What the host gets, but for the directory.
    pub(crate) host: HostConfig,
    /// Whether the directory is made now and removed at the end.
    pub(crate) data: Data,
    /// What is logged, in the words of `tracing`'s filter.
    pub(crate) log: String,
}

/// Where state lives.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Data {
    At(PathBuf),
    Temporary,
}

/// A value as text, and where it was given.
struct Given {
    text: String,
    place: String,
}

struct Reader {
    given: BTreeMap<&'static str, Given>,
    mistakes: Vec<String>,
}

impl Reader {
    /// The value of `key`, parsed; its default where nothing was given.
    fn read<T>(&mut self, key: &str, default: T) -> T
    where
        T: FromStr,
        T::Err: fmt::Display,
    {
        self.read_with(key, default, |text| {
            text.parse().map_err(|error: T::Err| error.to_string())
        })
    }

    /// Where a value was given.
    fn place(&self, key: &str) -> String {
        let given = self.given.get(key);
        given.map_or_else(|| key.to_owned(), |given| given.place.clone())
    }

    /// A certificate and its key, which need each other.
    fn certificate(&mut self, certificate: &str, key: &str) -> Option<TlsFiles> {
        let path = |name: &str| self.given.get(name).map(|given| PathBuf::from(&given.text));
        match (path(certificate), path(key)) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some(TlsFiles { certificate, key }),
            (Some(_), None) => {
                let place = self.place(certificate);
                self.mistakes.push(format!("{place}: {key} belongs to it"));
                None
            }
            (None, Some(_)) => {
                let place = self.place(key);
                self.mistakes
                    .push(format!("{place}: {certificate} belongs to it"));
                None
            }
        }
    }

    fn read_with<T>(
        &mut self,
        key: &str,
        default: T,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> T {
        let Some(given) = self.given.get(key) else {
            return default;
        };
        parse(&given.text).unwrap_or_else(|error| {
            self.mistakes.push(format!("{}: {error}", given.place));
            default
        })
    }
}

const KEYS: [&str; 24] = [
    "admin",
    "admin_tls_cert",
    "admin_tls_key",
    "code_idle",
    "data",
    "domain",
    "drain",
    "guest_memory",
    "instances",
    "listen",
    "log",
    "machine_memory_percent",
    "machine_network",
    "machine_ports",
    "machines_on_emulation",
    "max_fuel",
    "max_memory",
    "max_request_body",
    "max_timeout",
    "outbound_networks",
    "temporary",
    "tls_cert",
    "tls_key",
    "workers",
];

/// Reads the flags (which hold the environment's values already) and the file.
pub(crate) fn resolve(
    args: &ServeArgs,
    file: Option<(&Path, &str)>,
    default_data: Option<PathBuf>,
) -> Result<Settings, Mistakes> {
    let mut reader = Reader {
        given: BTreeMap::new(),
        mistakes: Vec::new(),
    };
    if let Some((path, text)) = file {
        read_file(&mut reader, path, text);
    }
    read_flags(&mut reader, args);

    let cores = available_parallelism().map_or(1, usize::from);
    let tls = reader.certificate("tls_cert", "tls_key");
    let admin_tls = reader.certificate("admin_tls_cert", "admin_tls_key");
    let outbound_networks = reader.read_with("outbound_networks", Vec::new(), networks);
    let host = HostConfig {
        data_dir: PathBuf::new(),
        listen: reader.read("listen", socket(DEFAULT_LISTEN)),
        admin: reader.read("admin", socket(DEFAULT_ADMIN)),
        tls,
        admin_tls,
        domain: reader.read_with("domain", DEFAULT_DOMAIN.to_owned(), domain),
        workers: reader.read_with("workers", cores, |text| number(text, 1, WORKERS_MAX)),
        ceiling: RequestLimits {
            memory: reader.read("max_memory", DEFAULT_CEILING.memory),
            fuel: reader.read("max_fuel", DEFAULT_CEILING.fuel),
            timeout: reader.read("max_timeout", DEFAULT_CEILING.timeout),
            request_body: reader.read("max_request_body", DEFAULT_CEILING.request_body),
        },
        instances: reader.read_with("instances", DEFAULT_INSTANCES, |text| {
            number(text, 1, INSTANCES_MAX)
        }),
        guest_memory: reader.read_with("guest_memory", None, |text| {
            let bytes = text.parse::<Bytes>();
            bytes.map(Some).map_err(|error| error.to_string())
        }),
        code_idle: reader.read("code_idle", DEFAULT_CODE_IDLE),
        drain: reader.read("drain", DEFAULT_DRAIN),
        data_program: DataProgram::default(),
        machines: MachinesConfig {
            program: std::env::current_exe().unwrap_or_else(|_| PathBuf::from("insula")),
            memory_percent: reader.read_with(
                "machine_memory_percent",
                DEFAULT_MACHINE_MEMORY_PERCENT,
                |text| number(text, 0, MACHINE_MEMORY_PERCENT_MAX),
            ),
            on_emulation: reader.read("machines_on_emulation", false),
            network: NetworkConfig {
                pool: reader.read_with("machine_network", Some(Pool::DEFAULT), |text| {
                    if text == "none" {
                        return Ok(None);
                    }
                    let pool = text.parse::<Pool>();
                    pool.map(Some).map_err(|error| error.to_string())
                }),
                ports: reader.read("machine_ports", PortRange::DEFAULT),
                opened: outbound_networks.clone(),
            },
            at_end: AtEnd::RunOn,
        },
        outbound_networks,
    };
    if !host.admin.ip().is_loopback() && host.admin_tls.is_none() {
        let place = reader.place("admin");
        reader.mistakes.push(format!(
            "{place}: {} is no loopback address, so that the admin API needs a certificate there \
             (admin_tls_cert and admin_tls_key)",
            host.admin
        ));
    }
    let log = reader.read_with("log", DEFAULT_LOG.to_owned(), |text| {
        EnvFilter::try_new(text)
            .map(|_| text.to_owned())
            .map_err(|error| error.to_string())
    });
    let temporary = reader.read("temporary", false);
    let data = match (temporary, reader.given.get("data")) {
        (true, None) => Data::Temporary,
        (true, Some(data)) => {
            let line = format!("{}: cannot be given together with `temporary`", data.place);
            reader.mistakes.push(line);
            Data::Temporary
        }
        (false, Some(data)) => Data::At(PathBuf::from(&data.text)),
        (false, None) => default_data.map_or_else(
            || {
                let line = "data: neither HOME nor XDG_DATA_HOME is set, so say where";
                reader.mistakes.push(line.to_owned());
                Data::Temporary
            },
            Data::At,
        ),
    };
    let mut host = host;
    if data == Data::Temporary {
        host.machines.at_end = AtEnd::Stop;
    }
    if reader.mistakes.is_empty() {
        Ok(Settings { host, data, log })
    } else {
        Err(Mistakes(reader.mistakes))
    }
}

fn read_file(reader: &mut Reader, path: &Path, text: &str) {
    let table = match text.parse::<toml::Table>() {
        Ok(table) => table,
        Err(error) => {
            let line = format!("{}: {}", path.display(), error.to_string().trim_end());
            reader.mistakes.push(line);
            return;
        }
    };
    for (name, value) in table {
        let place = format!("{}: {name}", path.display());
        let Some(key) = KEYS.iter().find(|key| **key == name) else {
            let known = KEYS.join(", ");
            reader
                .mistakes
                .push(format!("{place}: no such key; there are {known}"));
            continue;
        };
        let text = match value {
            toml::Value::String(text) => text,
            toml::Value::Integer(number) => number.to_string(),
            toml::Value::Boolean(truth) => truth.to_string(),
            other => {
                let kind = other.type_str();
                reader
                    .mistakes
                    .push(format!("{place}: a text or a number, not a {kind}"));
                continue;
            }
        };
        reader.given.insert(key, Given { text, place });
    }
}

fn read_flags(reader: &mut Reader, args: &ServeArgs) {
    let temporary = args.temporary.then(|| true.to_string());
    let on_emulation = args.machines_on_emulation.then(|| true.to_string());
    let flags = [
        ("admin", &args.admin),
        ("admin_tls_cert", &args.admin_tls_cert),
        ("admin_tls_key", &args.admin_tls_key),
        ("code_idle", &args.code_idle),
        ("data", &args.data),
        ("domain", &args.domain),
        ("drain", &args.drain),
        ("guest_memory", &args.guest_memory),
        ("instances", &args.instances),
        ("listen", &args.listen),
        ("log", &args.log),
        ("machine_memory_percent", &args.machine_memory_percent),
        ("machine_network", &args.machine_network),
        ("machine_ports", &args.machine_ports),
        ("machines_on_emulation", &on_emulation),
        ("max_fuel", &args.max_fuel),
        ("max_memory", &args.max_memory),
        ("max_request_body", &args.max_request_body),
        ("max_timeout", &args.max_timeout),
        ("outbound_networks", &args.outbound_networks),
        ("temporary", &temporary),
        ("tls_cert", &args.tls_cert),
        ("tls_key", &args.tls_key),
        ("workers", &args.workers),
    ];
    for (key, value) in flags {
        let Some(text) = value.clone() else { continue };
        let place = format!(
            "--{} or INSULA_{}",
            key.replace('_', "-"),
            key.to_uppercase()
        );
        reader.given.insert(key, Given { text, place });
    }
    // A flag overrides the file's word on the same matter, whichever of the two keys it used.
    if args.temporary && args.data.is_none() {
        reader.given.remove("data");
    }
    if args.data.is_some() && !args.temporary {
        reader.given.remove("temporary");
    }
}

fn socket(text: &str) -> std::net::SocketAddr {
    text.parse().expect("a default is well formed")
}

fn domain(text: &str) -> Result<String, String> {
    let lower = text.to_ascii_lowercase();
    if is_host_name(&lower) {
        Ok(lower)
    } else {
        Err(format!("{text:?} is not a domain name"))
    }
}

/// Networks with commas between them.
fn networks(text: &str) -> Result<Vec<Network>, String> {
    let names = text
        .split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty());
    let networks = names.map(|name| name.parse::<Network>().map_err(|error| error.to_string()));
    networks.collect()
}

fn number<T>(text: &str, min: T, max: T) -> Result<T, String>
where
    T: FromStr + PartialOrd + fmt::Display + Copy,
{
    text.parse()
        .ok()
        .filter(|number| (min..=max).contains(number))
        .ok_or_else(|| format!("{text:?} is not a number from {min} to {max}"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use proptest::prelude::*;

    use super::*;
    use crate::args::{Cli, Verb};

    fn serve(flags: &[&str]) -> ServeArgs {
        let cli = Cli::parse_from(["insula", "serve"].iter().chain(flags));
        match cli.verb {
            Verb::Serve(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    fn resolved(flags: &[&str], file: &str) -> Result<Settings, Mistakes> {
        let file = Some((Path::new("insula.toml"), file));
        resolve(&serve(flags), file, Some("/default".into()))
    }

    #[test]
    fn defaults() {
        let settings = resolved(&[], "").unwrap();
        assert_eq!(settings.host.listen.to_string(), DEFAULT_LISTEN);
        assert_eq!(settings.host.admin.to_string(), DEFAULT_ADMIN);
        assert_eq!(settings.data, Data::At("/default".into()));
        assert_eq!(settings.host.ceiling, DEFAULT_CEILING);
    }

    /// A line of a file, or what somebody may take for one.
    fn line() -> impl Strategy<Value = String> {
        let key = prop_oneof![
            9 => proptest::sample::select(KEYS.to_vec()).prop_map(str::to_owned),
            1 => "[a-z_\\[\\]\"#.]{0,12}",
        ];
        let value = prop_oneof![
            "-?[0-9]{1,21}",
            "true|false",
            "\"[0-9.:\\[\\]]{0,24}\"",
            "\"[0-9]{1,12}(ms|s|m|h|MiB|GB|G|k)?\"",
            "\"[a-z/.]{0,12}\"",
            "\\[[0-9, ]{0,8}\\]|\\{[a-z= ]{0,8}\\}",
            any::<String>(),
        ];
        (key, value).prop_map(|(key, value)| format!("{key} = {value}\n"))
    }

    proptest! {
        /// For longer: `cargo xtask fuzz config --seconds N`.
        #[test]
        fn any_file_is_taken_or_told_all_that_is_wrong(
            lines in proptest::collection::vec(line(), 0..6),
            noise in prop_oneof![9 => Just(String::new()), 1 => any::<String>()],
        ) {
            match resolved(&[], &(lines.concat() + &noise)) {
                Ok(settings) => {
                    prop_assert!(settings.host.workers > 0 && settings.host.instances > 0);
                    prop_assert!(settings.host.admin.ip().is_loopback() || settings.host.admin_tls.is_some());
                }
                Err(Mistakes(mistakes)) => {
                    prop_assert!(!mistakes.is_empty());
                    prop_assert!(mistakes.iter().all(|mistake| mistake.contains(": ")));
                }
            }
        }
    }

    #[test]
    fn a_flag_beats_the_file() {
        let file =
            "workers = 3\ndomain = \"apps.example.com\"\nmax_memory = \"32MiB\"\ndata = \"/f\"";
        let settings = resolved(&["--workers", "7", "--temporary"], file).unwrap();
        assert_eq!(settings.host.workers, 7);
        assert_eq!(settings.host.domain, "apps.example.com");
        assert_eq!(settings.host.ceiling.memory.get(), 32 << 20);
        assert_eq!(settings.data, Data::Temporary);
    }

    #[test]
    fn certificates_have_keys_and_the_admin_api_is_not_exposed() {
        let files = ["--tls-cert", "c.pem", "--admin-tls-cert", "a.pem"];
        let keys = "tls_key = \"k.pem\"\nadmin_tls_key = \"b.pem\"";
        let settings = resolved(&files, keys).unwrap();
        assert_eq!(settings.host.tls.unwrap().key, Path::new("k.pem"));
        assert_eq!(
            settings.host.admin_tls.unwrap().certificate,
            Path::new("a.pem")
        );
        let Mistakes(lines) = resolved(&files, "").unwrap_err();
        assert_eq!(lines.len(), 2, "{lines:?}");
        for exposed in ["0.0.0.0:8081", "[::]:8081", "192.0.2.1:8081"] {
            let Mistakes(lines) = resolved(&["--admin", exposed], "").unwrap_err();
            assert!(lines[0].contains("admin_tls_cert"), "{lines:?}");
            resolved(
                &["--admin", exposed, "--admin-tls-cert", "a"],
                "admin_tls_key = \"b\"",
            )
            .unwrap();
        }
        resolved(&["--admin", "[::1]:8081"], "").unwrap();
    }

    #[test]
    fn networks_are_opened_by_name() {
        let settings = resolved(&["--outbound-networks", "10.1.0.0/16, fd00::/8"], "").unwrap();
        let opened = settings.host.outbound_networks;
        let opened: Vec<String> = opened.iter().map(ToString::to_string).collect();
        assert_eq!(opened, ["10.1.0.0/16", "fd00::/8"]);
        assert!(resolved(&[], "").unwrap().host.outbound_networks.is_empty());
        let file = "outbound_networks = \"10.1.0.0/8\"";
        let Mistakes(lines) = resolved(&[], file).unwrap_err();
        assert!(lines[0].contains("10.0.0.0/8"), "{lines:?}");
    }

    #[test]
    fn all_mistakes_at_once() {
        let file = "listn = \"x\"\nworkers = 0\ndomain = [1]\ntemporary = true\ndata = \"/f\"";
        let flags = [
            "--listen",
            "nowhere",
            "--drain",
            "10",
            "--log",
            "no=such=filter",
        ];
        let Mistakes(lines) = resolved(&flags, file).unwrap_err();
        let text = lines.join("\n");
        for what in [
            "listn",
            "workers",
            "domain",
            "--listen",
            "--drain",
            "--log",
            "temporary",
        ] {
            assert!(text.contains(what), "{what} in\n{text}");
        }
        assert_eq!(lines.len(), 7, "{text}");
    }

    #[test]
    fn text_that_is_not_toml() {
        let Mistakes(lines) = resolved(&[], "workers = = 3").unwrap_err();
        assert_eq!(lines.len(), 1);
    }
}
