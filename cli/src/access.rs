//! Where a host is, and where its token is found.
//!
//! ```text
//! --token, INSULA_TOKEN           sent to whatever --admin names
//! --data, INSULA_DATA             <dir>/admin.token, likewise
//! a host that runs as this user   its run file → its data directory → admin.token   ┐ only to
//! the default data directory      admin.token                                       ┘ loopback
//! ```
//!
//! What was given is used and nothing else. What is found is sent to this machine's own loopback
//! addresses only, so that a mistyped `--admin` gives no token away.
//!
//! **Run files.** `insula serve` leaves a file named after its admin address in a directory of
//! its user's own: `$XDG_RUNTIME_DIR/insula`, else `/run/insula` for root, else
//! `<temp>/insula-<uid>`, mode 0700. The file, mode 0600, names the data directory; no secret is
//! in it. Thus `insula usage demo` finds the token of the temporary host that `insula up` started
//! in another terminal. A directory or a file that belongs to somebody else, or that others can
//! write, is not believed: in a shared `/tmp` anybody may have made it. The host holds a lock on
//! the file as long as it lives; a file without a lock is a leftover, and is not believed either.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use insula_host::config::UrlScheme;
use serde::{Deserialize, Serialize};

use crate::UsageError;

/// A token, a path: all that is in the files read here.
const SMALL_FILE_MAX_BYTES: u64 = 16 << 10;

/// Where the state of a host of this user lives, unless told otherwise.
pub(crate) fn default_data_dir() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some("/var/lib/insula".into());
    }
    let absolute = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute("XDG_DATA_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
        .map(|share| share.join("insula"))
}

/// Where a host's admin API is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AdminAddress {
    /// Whether it speaks TLS.
    pub(crate) scheme: UrlScheme,
    /// `host:port`.
    pub(crate) authority: String,
}

/// Reads `host:port`, also as part of a URL.
pub(crate) fn admin_address(text: &str) -> Result<AdminAddress, UsageError> {
    let wrong = |what: &str| Err(UsageError(format!("--admin {text:?}: {what}")));
    let (scheme, address) = match text.strip_prefix("https://") {
        Some(rest) => (UrlScheme::Https, rest),
        None => (
            UrlScheme::Http,
            text.strip_prefix("http://").unwrap_or(text),
        ),
    };
    let address = address.strip_suffix('/').unwrap_or(address);
    let port = address.rsplit_once(':').map(|(_, port)| port);
    let fits = |c: char| c.is_ascii_alphanumeric() || ".-:[]_".contains(c);
    if port.is_none_or(|port| port.parse::<u16>().is_err()) || !address.chars().all(fits) {
        return wrong("write it as HOST:PORT, such as 127.0.0.1:8081");
    }
    Ok(AdminAddress {
        scheme,
        authority: address.to_owned(),
    })
}

/// Where a token came from, or why there is none; in words for whoever was refused.
#[derive(Debug, Clone)]
pub(crate) enum TokenSource {
    /// `--token` or `INSULA_TOKEN`.
    Given,
    /// A file.
    File(PathBuf),
    /// No file that was looked at holds one.
    NotFound(Vec<String>),
    /// Files were not looked at.
    Remote,
}

impl fmt::Display for TokenSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Given => f.write_str("the token came from --token or INSULA_TOKEN"),
            Self::File(path) => write!(f, "the token came from {}", path.display()),
            Self::NotFound(looked) => write!(
                f,
                "no token was found ({}); set INSULA_TOKEN, or name the host's data directory \
                 with --data",
                looked.join(", ")
            ),
            Self::Remote => f.write_str(
                "set INSULA_TOKEN: a token is looked for in files only for a host on a loopback \
                 address of this machine",
            ),
        }
    }
}

/// The token for the host at `address`, by the rules above.
pub(crate) fn find_token(
    address: &str,
    given: Option<&str>,
    data: Option<&Path>,
) -> (Option<String>, TokenSource) {
    if let Some(token) = given.filter(|token| !token.trim().is_empty()) {
        return (Some(token.trim().to_owned()), TokenSource::Given);
    }
    let candidates: Vec<PathBuf> = if let Some(data) = data {
        vec![data.to_owned()]
    } else {
        let places = loopback(address);
        if places.is_empty() {
            return (None, TokenSource::Remote);
        }
        let run_dir = run_dir();
        let running = places
            .iter()
            .filter_map(|place| data_dir_of(run_dir.as_deref()?, *place));
        running.chain(default_data_dir()).collect()
    };
    let mut looked = Vec::new();
    for data in candidates {
        let path = data.join("admin.token");
        match read_small(&path) {
            Ok(text) if !text.trim().is_empty() => {
                return (Some(text.trim().to_owned()), TokenSource::File(path));
            }
            Ok(_) => looked.push(format!("{}: empty", path.display())),
            Err(error) => looked.push(format!("{}: {error}", path.display())),
        }
    }
    (None, TokenSource::NotFound(looked))
}

/// The socket addresses that a loopback `address` may mean, those of a host that listens
/// everywhere included; empty if it is no loopback address.
fn loopback(address: &str) -> Vec<SocketAddr> {
    let Some((host, port)) = address.rsplit_once(':') else {
        return Vec::new();
    };
    let Ok(port) = port.parse::<u16>() else {
        return Vec::new();
    };
    let v4 = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let v6 = IpAddr::V6(Ipv6Addr::LOCALHOST);
    let mut hosts = if host == "localhost" {
        vec![v4, v6]
    } else {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        match bare.parse::<IpAddr>() {
            Ok(ip) if ip.is_loopback() => vec![ip],
            _ => return Vec::new(),
        }
    };
    hosts.push(Ipv4Addr::UNSPECIFIED.into());
    hosts.push(Ipv6Addr::UNSPECIFIED.into());
    hosts
        .into_iter()
        .map(|host| SocketAddr::new(host, port))
        .collect()
}

fn read_small(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?
        .take(SMALL_FILE_MAX_BYTES)
        .read_to_string(&mut text)?;
    Ok(text)
}

/// What a run file says.
#[derive(Debug, Serialize, Deserialize)]
struct RunFile {
    data: PathBuf,
}

/// The directory of this user's run files.
fn run_dir() -> Option<PathBuf> {
    let uid = rustix::process::geteuid();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute() && path.is_dir());
    match runtime {
        Some(runtime) => Some(runtime.join("insula")),
        None if uid.is_root() => Some("/run/insula".into()),
        None => Some(std::env::temp_dir().join(format!("insula-{}", uid.as_raw()))),
    }
}

fn run_file(dir: &Path, admin: SocketAddr) -> PathBuf {
    dir.join(format!("{admin}.json"))
}

/// Whether the file is ours and nobody else can change it.
fn is_private(metadata: &fs::Metadata) -> bool {
    metadata.uid() == rustix::process::geteuid().as_raw() && metadata.mode() & 0o022 == 0
}

fn refuse(path: &Path) -> io::Error {
    let text = format!(
        "{} belongs to somebody else or others can write it",
        path.display()
    );
    io::Error::new(io::ErrorKind::PermissionDenied, text)
}

/// The data directory of the running host of this user at `admin`.
fn data_dir_of(dir: &Path, admin: SocketAddr) -> Option<PathBuf> {
    let metadata = fs::symlink_metadata(dir).ok()?;
    if !metadata.is_dir() || !is_private(&metadata) {
        return None;
    }
    let file = open_no_follow(OpenOptions::new().read(true), &run_file(dir, admin)).ok()?;
    if !is_private(&file.metadata().ok()?) {
        return None;
    }
    if !matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)) {
        return None;
    }
    let mut text = String::new();
    file.take(SMALL_FILE_MAX_BYTES)
        .read_to_string(&mut text)
        .ok()?;
    serde_json::from_str::<RunFile>(&text)
        .ok()
        .map(|run| run.data)
}

fn open_no_follow(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::CLOEXEC;
    options.custom_flags(flags.bits().cast_signed()).open(path)
}

/// Says to this user's other processes where the data of a running host is; until dropped.
#[derive(Debug)]
pub(crate) struct Registration {
    path: PathBuf,
    _locked: File,
}

impl Registration {
    /// Leaves a run file for the host at `admin`.
    pub(crate) fn new(admin: SocketAddr, data: &Path) -> io::Result<Self> {
        let dir = run_dir().ok_or(io::ErrorKind::NotFound)?;
        Self::new_in(&dir, admin, data)
    }

    fn new_in(dir: &Path, admin: SocketAddr, data: &Path) -> io::Result<Self> {
        match DirBuilder::new().mode(0o700).create(dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let metadata = fs::symlink_metadata(dir)?;
        if !metadata.is_dir() || !is_private(&metadata) {
            return Err(refuse(dir));
        }
        let path = run_file(dir, admin);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).mode(0o600);
        let mut file = open_no_follow(options.truncate(false), &path)?;
        if !is_private(&file.metadata()?) {
            return Err(refuse(&path));
        }
        file.try_lock().map_err(io::Error::from)?;
        let run = RunFile {
            data: data.to_owned(),
        };
        file.set_len(0)?;
        file.write_all(serde_json::to_string(&run)?.as_bytes())?;
        Ok(Self {
            path,
            _locked: file,
        })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // Removed while still locked: nobody else can have taken the name over meanwhile.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn admin() -> SocketAddr {
        "127.0.0.1:8081".parse().unwrap()
    }

    #[test]
    fn addresses() {
        for (text, address) in [
            ("127.0.0.1:8081", "127.0.0.1:8081"),
            ("http://127.0.0.1:8081/", "127.0.0.1:8081"),
            ("[::1]:8081", "[::1]:8081"),
            ("node-7.example.com:80", "node-7.example.com:80"),
        ] {
            let read = admin_address(text).unwrap();
            assert_eq!(read.authority, address);
            assert_eq!(read.scheme, UrlScheme::Http);
        }
        let secure = admin_address("https://x:1").unwrap();
        assert_eq!(secure.scheme, UrlScheme::Https);
        assert_eq!(secure.authority, "x:1");
        for bad in [
            "127.0.0.1",
            "https://x",
            "x:99999",
            "a b:1",
            "x:1/path",
            "u@h:1",
        ] {
            assert!(admin_address(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn found_tokens_stay_on_this_machine() {
        assert!(loopback("10.0.0.1:8081").is_empty());
        assert!(loopback("example.com:8081").is_empty());
        assert!(loopback("localhost.example.com:8081").is_empty());
        assert!(loopback("127.0.0.1:8081").contains(&admin()));
        assert!(loopback("localhost:8081").contains(&admin()));
        assert!(loopback("[::1]:8081").contains(&"[::]:8081".parse().unwrap()));
        let (token, source) = find_token("example.com:8081", None, None);
        assert!(token.is_none() && matches!(source, TokenSource::Remote));
    }

    #[test]
    fn a_given_token_or_directory_is_the_only_one_used() {
        let data = tempfile::tempdir().unwrap();
        fs::write(data.path().join("admin.token"), "secret\n").unwrap();
        let find = |given| find_token("example.com:1", given, Some(data.path())).0;
        assert_eq!(find(None).as_deref(), Some("secret"));
        assert_eq!(find(Some("other")).as_deref(), Some("other"));
        let (token, source) = find_token("127.0.0.1:1", None, Some(Path::new("/nonexistent")));
        assert!(token.is_none() && matches!(source, TokenSource::NotFound(_)));
    }

    #[test]
    fn a_running_host_is_found_and_a_gone_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("insula");
        let registration = Registration::new_in(&run, admin(), Path::new("/data")).unwrap();
        assert_eq!(data_dir_of(&run, admin()), Some("/data".into()));
        assert!(Registration::new_in(&run, admin(), Path::new("/other")).is_err());
        let leftover = fs::read(&registration.path).unwrap();
        let path = registration.path.clone();
        drop(registration);
        assert!(!path.exists());
        fs::write(&path, leftover).unwrap();
        assert_eq!(data_dir_of(&run, admin()), None, "nobody holds the lock");
    }

    #[test]
    fn a_directory_that_others_can_write_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("insula");
        let _registration = Registration::new_in(&run, admin(), Path::new("/data")).unwrap();
        fs::set_permissions(&run, fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(data_dir_of(&run, admin()), None);
        let second = "127.0.0.1:9".parse().unwrap();
        assert!(Registration::new_in(&run, second, Path::new("/data")).is_err());
    }

    #[test]
    fn a_planted_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("insula");
        DirBuilder::new().mode(0o700).create(&run).unwrap();
        let victim = dir.path().join("victim");
        fs::write(&victim, "kept").unwrap();
        std::os::unix::fs::symlink(&victim, run_file(&run, admin())).unwrap();
        assert!(Registration::new_in(&run, admin(), Path::new("/data")).is_err());
        assert_eq!(fs::read_to_string(&victim).unwrap(), "kept");
    }
}
