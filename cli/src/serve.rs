//! `insula serve`: the host, control in this process and the data plane in a child of it.
//!
//! 1. Configuration: flags, environment, file.
//! 2. Logging to stderr.
//! 3. As many file descriptors as the system lets us have.
//! 4. The host starts; both addresses are printed, then `ready`.
//! 5. A run file tells this user's other processes where the token is (see [`crate::access`]).
//! 6. SIGTERM, SIGINT, or the end of stdin where that was asked for: the host drains. Another host
//!    that is started in the same directory: this one hands over to it, and drains too.
//! 7. A second signal: the process ends at once, with what still runs.
//! 8. The run file goes, and a temporary directory with it.

use std::io::Read;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
use insula_host::serve::Host;
use rustix::process::{Resource, getrlimit, setrlimit};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tracing_subscriber::EnvFilter;

use crate::UsageError;
use crate::access::{Registration, default_data_dir};
use crate::args::ServeArgs;
use crate::config::{Data, Settings, resolve};
use crate::output::{self, Style};

pub(crate) fn run(args: &ServeArgs) -> Result<()> {
    let settings = settings(args)?;
    start_logging(&settings.log);
    raise_file_limit();
    let mut config = settings.host;
    let log = ["--log".into(), settings.log.into()];
    config.data_program.arguments.extend(log);
    let temporary = match settings.data {
        Data::At(dir) => {
            config.data_dir = dir;
            None
        }
        Data::Temporary => {
            let dir = TempDir::with_prefix("insula-").context("no temporary directory")?;
            config.data_dir = dir.path().to_owned();
            Some(dir)
        }
    };
    let data_dir = config.data_dir.clone();
    let signals = Signals::new()?;
    let host = Host::start(config).context("the host did not start")?;
    // An absolute path: whoever reads it may stand elsewhere.
    let data_dir = std::path::absolute(&data_dir).unwrap_or(data_dir);
    let registration = Registration::new(host.admin(), &data_dir)
        .inspect_err(|error| tracing::warn!(%error, "other commands have to be told the token"))
        .ok();
    announce(&host, &data_dir)?;
    signals.wait_and_drain(host, registration, args.until_stdin_ends)?;
    drop(temporary);
    Ok(())
}

/// The child. Its logging begins before it has a link to say anything on.
pub(crate) fn data_plane(log: &str) -> ExitCode {
    start_logging(log);
    insula_host::process::child::main()
}

fn settings(args: &ServeArgs) -> Result<Settings> {
    let text = match &args.config {
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .map_err(|error| UsageError(format!("{}: {error}", path.display())))?;
            Some((path.as_path(), text))
        }
        None => None,
    };
    let file = text.as_ref().map(|(path, text)| (*path, text.as_str()));
    let settings = resolve(args, file, default_data_dir())
        .map_err(|mistakes| UsageError(mistakes.to_string()))?;
    Ok(settings)
}

/// What is said less of than of everything else: the HTTP/2 library warns of what clients do, as often
/// as they do it.
const QUIET: &str = "h2=error";

fn start_logging(filter: &str) {
    let ansi = Style::of(&std::io::stderr()) == Style::Colour;
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(format!("{QUIET},{filter}")))
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        .init();
}

/// Every connection is a file descriptor; the soft limit of a shell is far too low for a server.
fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit on open files stays as it is");
    }
}

/// Read by people, and by `insula up` and tests: a word, then a value.
fn announce(host: &Host, data_dir: &Path) -> Result<()> {
    output::print(&format!(
        "ingress {}\nadmin   {}\ndata    {}\nready\n",
        host.ingress_url(),
        host.admin_url(),
        data_dir.display()
    ))?;
    Ok(())
}

/// Listens to signals from its making on, so that none is lost between `ready` and the wait.
struct Signals {
    runtime: Runtime,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let guard = runtime.enter();
        let terminate = signal(SignalKind::terminate())?;
        let interrupt = signal(SignalKind::interrupt())?;
        drop(guard);
        Ok(Self {
            runtime,
            terminate,
            interrupt,
        })
    }

    fn wait_and_drain(
        self,
        host: Host,
        registration: Option<Registration>,
        until_stdin_ends: bool,
    ) -> Result<()> {
        let Self {
            runtime,
            mut terminate,
            mut interrupt,
        } = self;
        let result = runtime.block_on(async {
            // All of them only wait; whichever is first wins, and the others hold nothing.
            let (why, successor) = tokio::select! {
                _ = terminate.recv() => ("SIGTERM", None),
                _ = interrupt.recv() => ("SIGINT", None),
                () = stdin_end(), if until_stdin_ends => ("stdin ended", None),
                successor = host.successor() => ("another host takes over", Some(successor)),
            };
            tracing::info!(why, "draining");
            // The next host leaves a run file of the same name.
            drop(registration);
            let drained = tokio::task::spawn_blocking(move || match successor {
                None => {
                    host.shutdown();
                    Ok(())
                }
                Some(successor) => host.hand_over(successor),
            });
            // Cancelling the first branch does not stop the shutdown; the process ends instead.
            tokio::select! {
                done = drained => match done {
                    Ok(done) => done.context("the next host did not take over"),
                    Err(error) => Err(anyhow!("the shutdown failed: {error}")),
                },
                _ = terminate.recv() => impatient(),
                _ = interrupt.recv() => impatient(),
            }
        });
        // What still drains after a second signal must not hold the end up.
        runtime.shutdown_background();
        result
    }
}

fn impatient() -> Result<()> {
    bail!("a second signal: ended with requests still running")
}

/// Waits for the end of stdin on a thread of its own, which may outlive the wait: nothing can
/// interrupt a read.
async fn stdin_end() {
    let (ended, wait) = oneshot::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 256];
        let mut stdin = std::io::stdin().lock();
        while matches!(stdin.read(&mut buffer), Ok(1..)) {}
        let _ = ended.send(());
    });
    let _ = wait.await;
}
