//! `insula up`: from source to an answer, in one command.
//!
//! ```text
//!  build ──▶ a host answers at --admin? ──yes──▶ use it
//!                     │ no                          │
//!                     ▼                             ▼
//!            child `insula serve` ──ready──▶ tenant, service, upload ──▶ URL ──▶ its log
//! ```
//!
//! The child's life is tied to ours by its stdin: whatever ends us closes that pipe, and the
//! child drains, removes its temporary directory and exits. It runs in a process group of its
//! own, so that Ctrl-C reaches us alone and the end is in order.
//!
//! What goes wrong: the build fails → nothing was started (with `--watch`, once something runs:
//! said, and the old version goes on serving). The child ends early → its words are on stderr,
//! and we fail. The log breaks off while the host lives → it is taken up again.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

use crate::args::{Connection, Format, ServiceRef, UpArgs};
use crate::client::Client;
use crate::deploy::{self, Activation};
use crate::logs::{self, Mode};
use crate::output::{self, Style};
use crate::project;

/// How often the project's files are looked at.
const WATCH_EVERY: Duration = Duration::from_millis(500);
/// How long a log that broke off is left alone.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// How long the child may take to end, beyond its own deadline for draining.
const STOP_WITHIN: Duration = Duration::from_secs(20);
/// Files of a project that are watched, at most.
const WATCHED_MAX: usize = 20_000;

pub(crate) async fn run(args: UpArgs) -> Result<()> {
    let mut started = None;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    // Whatever is cancelled here, the child is stopped below.
    let result = tokio::select! {
        result = work(&args, &mut started) => result,
        _ = tokio::signal::ctrl_c() => Ok(()),
        _ = terminate.recv() => Ok(()),
        _ = hangup.recv() => Ok(()),
    };
    if let Some(host) = started {
        host.stop().await;
    }
    result
}

async fn work(args: &UpArgs, started: &mut Option<HostProcess>) -> Result<()> {
    let mut seen = fingerprint(&args.dir);
    let artefact = project::build_aside(args.dir.clone()).await?;
    let service = ServiceRef {
        tenant: args.tenant.clone(),
        service: match &args.service {
            Some(service) => service.clone(),
            None => project::service_name(&artefact.package)?,
        },
    };
    let client = host(args, started).await?;
    deploy::ensure_tenant(&client, &service).await?;
    deploy::ensure_service(&client, &service).await?;
    let url = redeploy(&client, &service, &artefact.path).await?;
    hint(&client, &url, &service)?;
    if args.no_follow {
        return Ok(());
    }
    let follow = follow(&client, &service, started);
    if !args.watch {
        return follow.await;
    }
    let watch = async {
        loop {
            sleep(WATCH_EVERY).await;
            let now = fingerprint(&args.dir);
            if now == seen {
                continue;
            }
            seen = now;
            let again = async {
                let artefact = project::build_aside(args.dir.clone()).await?;
                redeploy(&client, &service, &artefact.path).await
            };
            if let Err(error) = again.await {
                output::error(&error);
                output::note("the version before goes on serving");
            }
        }
    };
    // Either ends only with an error; the other holds nothing that must be finished.
    tokio::select! {
        result = follow => result,
        result = watch => result,
    }
}

/// A client for the host at `--admin`; a host is started there if none answers.
async fn host(args: &UpArgs, started: &mut Option<HostProcess>) -> Result<Client> {
    let connection = Connection {
        admin: args.admin.to_string(),
        token: args.token.clone(),
        data: args.data.clone(),
        ca_cert: None,
    };
    let client = Client::new(&connection)?;
    if args.admin.port() != 0 && client.answers().await {
        output::note(&format!("using the host at {}", client.address()));
        return Ok(client);
    }
    let host = HostProcess::start(args.listen, args.admin, args.data.as_deref()).await?;
    let connection = Connection {
        admin: host.admin.clone(),
        token: None,
        data: Some(host.data.clone()),
        ca_cert: None,
    };
    *started = Some(host);
    Client::new(&connection)
}

async fn redeploy(client: &Client, service: &ServiceRef, path: &Path) -> Result<String> {
    let component = deploy::read_component(path)?;
    let deployed = deploy::upload(client, service, component, Activation::AtOnce).await?;
    deploy::print(&deployed, service)?;
    Ok(output::plain(deployed["url"].as_str().unwrap_or_default()))
}

/// What to type in another terminal.
fn hint(client: &Client, url: &str, service: &ServiceRef) -> Result<()> {
    let style = Style::of(&std::io::stdout());
    // The addresses are ours to print only where they are not the defaults.
    let admin = match client.address() {
        "127.0.0.1:8081" => String::new(),
        other => format!(" --admin {other}"),
    };
    let usage = format!("{} usage {}{admin}", program(), service.tenant);
    output::line(&format!(
        "\ntry   {}\nand   {}\nstop  Ctrl-C\n",
        style.bold(&format!("curl {url}")),
        style.bold(&usage)
    ))?;
    Ok(())
}

/// How this program is called from here: by its name if that is in `PATH`, else by its path.
fn program() -> String {
    let name = env!("CARGO_BIN_NAME");
    let Ok(exe) = std::env::current_exe() else {
        return name.to_owned();
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).find_map(|dir| dir.join(name).canonicalize().ok());
    if found.as_ref() == Some(&exe) {
        return name.to_owned();
    }
    let here = std::env::current_dir().unwrap_or_default();
    match exe.strip_prefix(here) {
        // Without the dot a shell would look in `PATH`.
        Ok(below) => Path::new(".").join(below).display().to_string(),
        Err(_) => exe.display().to_string(),
    }
}

/// Prints the log until the host that we started is gone.
async fn follow(
    client: &Client,
    service: &ServiceRef,
    started: &mut Option<HostProcess>,
) -> Result<()> {
    let mut tail = None;
    loop {
        let ended = logs::print(client, service, Mode::Follow, tail, Format::Table).await;
        // What was printed before the break is not printed again.
        tail = Some(0);
        if let Err(error) = &ended
            && output::is_broken_pipe(error)
        {
            return ended;
        }
        sleep(RETRY_AFTER).await;
        match started {
            Some(host) => host.still_runs()?,
            // Somebody else's host: if it is gone, so are we.
            None if !client.answers().await => {
                return ended.and_then(|()| bail!("the host at {} is gone", client.address()));
            }
            None => {}
        }
    }
}

/// The `insula serve` that we started.
#[derive(Debug)]
struct HostProcess {
    child: Child,
    /// Kept open: a closed one would be an error for whatever is printed later.
    _stdout: BufReader<ChildStdout>,
    admin: String,
    data: PathBuf,
    temporary: bool,
}

impl HostProcess {
    async fn start(listen: SocketAddr, admin: SocketAddr, data: Option<&Path>) -> Result<Self> {
        let program = std::env::current_exe().context("this program cannot be found again")?;
        let mut command = Command::new(program);
        command.args(["serve", "--until-stdin-ends"]);
        command.arg(format!("--listen={listen}"));
        command.arg(format!("--admin={admin}"));
        // What is meant for us is not meant for the host.
        for name in [
            "INSULA_DATA",
            "INSULA_TEMPORARY",
            "INSULA_CONFIG",
            "INSULA_TOKEN",
            "INSULA_TLS_CERT",
            "INSULA_TLS_KEY",
            "INSULA_ADMIN_TLS_CERT",
            "INSULA_ADMIN_TLS_KEY",
        ] {
            command.env_remove(name);
        }
        match data {
            Some(data) => command.arg("--data").arg(data),
            None => command.arg("--temporary"),
        };
        if std::env::var_os("INSULA_LOG").is_none() {
            command.arg("--log=warn");
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .context("the host could not be started")?;
        let stdout = child.stdout.take().context("the host has no stdout")?;
        let (stdout, words) = tokio::task::spawn_blocking(move || announced(stdout)).await?;
        let words = match words {
            Ok(words) => words,
            Err(error) => {
                // Whatever it is, it is no host of ours; it may have ended already.
                let _ = child.kill();
                let _ = child.wait();
                return Err(error);
            }
        };
        Ok(Self {
            child,
            _stdout: stdout,
            admin: words.admin,
            data: words.data,
            temporary: data.is_none(),
        })
    }

    fn still_runs(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the host ended ({status})"),
        }
    }

    /// Closes the child's stdin, for which it drains and ends; kills it if it does not.
    async fn stop(mut self) {
        drop(self.child.stdin.take());
        let asked = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if asked.elapsed() > STOP_WITHIN {
                output::note("the host does not end by itself and is killed");
                let _ = self.child.kill();
                let _ = self.child.wait();
                if self.temporary {
                    let _ = std::fs::remove_dir_all(&self.data);
                }
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
    }
}

/// What a host says when it is ready.
struct Announced {
    admin: String,
    data: PathBuf,
}

fn announced(stdout: ChildStdout) -> (BufReader<ChildStdout>, Result<Announced>) {
    let mut reader = BufReader::new(stdout);
    let words = read_announced(&mut reader);
    (reader, words)
}

fn read_announced(reader: &mut impl BufRead) -> Result<Announced> {
    let (mut admin, mut data) = (None, None);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            bail!("the host did not start; it says why above");
        }
        let line = line.trim_end_matches('\n');
        let (word, value) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "admin" => admin = Some(value.trim_start().trim_start_matches("http://").to_owned()),
            "data" => data = Some(PathBuf::from(value.trim_start())),
            "ready" => break,
            _ => {}
        }
    }
    let missing = || anyhow!("the host did not say where it is");
    Ok(Announced {
        admin: admin.ok_or_else(missing)?,
        data: data.ok_or_else(missing)?,
    })
}

/// Changes when a file of the project does: paths, sizes, times; without build output and
/// hidden files.
fn fingerprint(dir: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    let mut folders = vec![dir.to_owned()];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else {
            continue;
        };
        let mut entries: Vec<_> = entries.filter_map(Result::ok).collect();
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let name = entry.file_name();
            if name.as_encoded_bytes().starts_with(b".") || name == "target" {
                continue;
            }
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if metadata.is_dir() {
                folders.push(entry.path());
            } else if files < WATCHED_MAX {
                files += 1;
                entry.path().hash(&mut hasher);
                metadata.len().hash(&mut hasher);
                metadata.modified().ok().hash(&mut hasher);
            }
        }
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_host_says_is_understood() {
        let text = "ingress http://127.0.0.1:1\nadmin   http://127.0.0.1:2\ndata    /a b\nready\n";
        let words = read_announced(&mut text.as_bytes()).unwrap();
        assert_eq!(
            (words.admin.as_str(), words.data.as_path()),
            ("127.0.0.1:2", Path::new("/a b"))
        );
        assert!(read_announced(&mut "ingress x\n".as_bytes()).is_err());
    }

    #[test]
    fn a_change_is_seen_and_build_output_is_not() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("src")).unwrap();
        std::fs::create_dir_all(dir.path().join("target")).unwrap();
        std::fs::write(dir.path().join("src/lib.rs"), "a").unwrap();
        let before = fingerprint(dir.path());
        std::fs::write(dir.path().join("target/x"), "x").unwrap();
        std::fs::write(dir.path().join(".lib.rs.swp"), "x").unwrap();
        assert_eq!(fingerprint(dir.path()), before);
        std::fs::write(dir.path().join("src/lib.rs"), "ab").unwrap();
        assert_ne!(fingerprint(dir.path()), before);
    }
}
