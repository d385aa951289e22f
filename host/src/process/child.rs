//! What the data process does.
//!
//! 1. The link is descriptor 0.
//! 2. All other descriptors but standard output and error are closed.
//! 3. The assignment comes over the link.
//! 4. The engine is made.
//! 5. The walls are raised ([`super::walls`]); with them the kernel is asked to kill it when its parent
//!    dies.
//! 6. Threads start: workers, the desk, and the link's own. A terminal's or a service manager's
//!    signals do not end it: its parent drains it.
//! 7. [`FromData::Ready`] goes out, and commands are taken until the link closes.
//! 8. What still runs is cancelled, threads are joined, the process ends.
//!
//! What goes wrong before 7 is said as [`FromData::Failed`].

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream as Blocking;
use std::process::ExitCode;
use std::sync::Arc;

use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::Assignment;
use super::walls::{self, Wall};
use crate::data::{self, DataConfig, DataPlane};
use crate::engine::artefact::ArtefactKey;
use crate::link::{LinkError, socket};
use crate::messages::{COMMAND_QUEUE, Command, FromData, REPORT_QUEUE, ToData};
use crate::outbound::Inquiries;
use crate::pool::clock::ask_for_short_slices;
use crate::storage::look_at_the_limit;
use crate::tls::{Certificate, Use};

/// The whole life of the data process. To be called by the program before it has a second thread.
#[must_use]
pub fn main() -> ExitCode {
    let link = match take_link() {
        Ok(link) => link,
        Err(error) => {
            tracing::error!(%error, "the data process is started by the host, not by hand");
            return ExitCode::FAILURE;
        }
    };
    // Before anything else is open; the link is one more.
    let keep = [0, 1, 2, link.as_raw_fd()];
    let walls = walls::close_descriptors(&keep);
    match start(&link, walls) {
        Ok(running) => serve(running, link),
        Err(reason) => {
            // If nobody listens any more, the exit code still tells.
            let _ = socket::send_blocking(&link, FromData::Failed(reason));
            ExitCode::FAILURE
        }
    }
}

/// Takes descriptor 0 for the link. Nothing else here reads from it.
fn take_link() -> io::Result<Blocking> {
    let link = io::stdin().as_fd().try_clone_to_owned()?;
    // Asks for a name that only a socket has.
    rustix::net::getsockname(&link)?;
    Ok(link.into())
}

/// A data plane, and the ends of its channels.
struct Running {
    plane: DataPlane,
    commands: mpsc::Sender<Command>,
    reports: mpsc::Receiver<FromData>,
    inquiries: Arc<Inquiries>,
}

fn start(link: &Blocking, mut walls: Vec<Wall>) -> Result<Running, String> {
    let mut inbox = socket::Inbox::default();
    let assignment = socket::receive_blocking(link, &mut inbox);
    let Assignment {
        settings,
        listeners,
    } = assignment.map_err(|error: LinkError| error.to_string())?;
    let certificate = settings
        .certificate
        .map(|pem| Certificate::handed_over(pem, Use::Ingress))
        .transpose()
        .map_err(|error| error.to_string())?;
    let config = DataConfig {
        certificate,
        domain: settings.domain,
        ceiling: settings.ceiling.into(),
        instances: settings.instances,
        code_idle: settings.code_idle,
        guest_memory: settings.guest_memory,
        outbound_networks: settings.outbound_networks,
        artefact_key: ArtefactKey::from_bytes(settings.artefact_key),
    };
    let engine = data::engine(&config).map_err(|error| error.to_string())?;
    look_at_the_limit();
    // Threads inherit it, and behind the walls nobody may ask.
    ask_for_short_slices();
    walls.extend(walls::raise(&settings.root));
    walls.push(walls::runners_give_way());
    let listeners = shared(listeners, settings.workers).map_err(|error| error.to_string())?;
    let (commands, commands_in) = mpsc::channel(COMMAND_QUEUE);
    let (reports_out, reports) = mpsc::channel(REPORT_QUEUE);
    let inquiries = Arc::new(Inquiries::new(reports_out.downgrade()));
    let plane = data::start(
        config,
        engine,
        listeners,
        (commands_in, reports_out),
        walls,
        Arc::clone(&inquiries),
    );
    Ok(Running {
        plane: plane.map_err(|error| error.to_string())?,
        commands,
        reports,
        inquiries,
    })
}

/// A listener for each worker: where there are fewer, some have one together.
fn shared(listeners: Vec<TcpListener>, workers: usize) -> io::Result<Vec<TcpListener>> {
    let mut all = Vec::with_capacity(workers);
    for listener in listeners
        .iter()
        .cycle()
        .take(workers.saturating_sub(listeners.len()))
    {
        all.push(listener.try_clone()?);
    }
    all.extend(listeners);
    Ok(all)
}

/// Moves messages on the calling thread until the link closes or the desk is gone.
fn serve(running: Running, link: Blocking) -> ExitCode {
    let Running {
        plane,
        commands,
        reports,
        inquiries,
    } = running;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let ended = runtime
        .map_err(LinkError::from)
        .and_then(|runtime| runtime.block_on(carry(link, commands, reports, &inquiries)));
    // The command channel is closed by now, and the desk tells the workers to leave.
    drop(plane);
    match ended {
        Ok(()) | Err(LinkError::Closed) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "the link to control failed");
            ExitCode::FAILURE
        }
    }
}

async fn carry(
    link: Blocking,
    commands: mpsc::Sender<Command>,
    mut reports: mpsc::Receiver<FromData>,
    inquiries: &Inquiries,
) -> Result<(), LinkError> {
    // A handler that is there and does nothing: they are for the parent, which tells us to drain.
    let _deaf = [
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
        signal(SignalKind::hangup())?,
    ];
    link.set_nonblocking(true)?;
    let link = UnixStream::from_std(link)?;
    let mut inbox = socket::Inbox::default();
    let incoming = async {
        loop {
            let command: Command = socket::receive(&link, &mut inbox).await?;
            // Not behind other commands: a drain waits for the requests that wait for this.
            if let ToData::Answer(answer) = command.body {
                inquiries.answer(answer);
                continue;
            }
            if commands.send(command).await.is_err() {
                return Ok(());
            }
        }
    };
    let outgoing = async {
        while let Some(report) = reports.recv().await {
            socket::send(&link, report).await?;
        }
        Ok(())
    };
    // Whichever ends first ends the connection; what the other one was at is of no use then.
    tokio::select! {
        ended = incoming => ended,
        ended = outgoing => ended,
    }
}
