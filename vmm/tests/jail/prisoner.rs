//! The inside: jails itself, looks around, tells.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::num::NonZeroU32;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use insula_vmm::jail::seccomp::Filters;
use insula_vmm::jail::syscalls::Kind;
use insula_vmm::jail::{self, Identity, Limits, Measure, Spec};
use rustix::process::{Pid, Resource};
use rustix::thread::CapabilitySet;

pub(crate) const CASE: &str = "INSULA_TEST_CASE";
pub(crate) const ROOT: &str = "INSULA_TEST_ROOT";
pub(crate) const HOST_PID: &str = "INSULA_TEST_HOST_PID";
pub(crate) const PORT: &str = "INSULA_TEST_PORT";
pub(crate) const CGROUP: &str = "INSULA_TEST_CGROUP";
pub(crate) const DONE: &str = "done looking";
pub(crate) const IDENTITY: &str = "734567:734568";

/// What no thread may do.
pub(crate) const CRIMES: [&str; 5] = ["open", "internet", "execute", "fork", "executable"];

pub(crate) fn run(case: &str) -> ExitCode {
    let (what, kind) = case.rsplit_once('-').unwrap_or((case, ""));
    let kind = match kind {
        "vcpu" => Some(Kind::Vcpu),
        "device" => Some(Kind::Device),
        "api" => Some(Kind::Api),
        _ => None,
    };
    let outcome = match (case, kind) {
        ("look", _) => look(),
        ("two-threads", _) => two_threads(),
        (_, Some(kind)) if what == "work" => work(kind),
        (_, Some(kind)) => crime(what, kind),
        _ => Err(io::Error::other(format!("no case {case}"))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "prisoner: {error}");
            ExitCode::FAILURE
        }
    }
}

fn say(key: &str, value: impl std::fmt::Display) -> io::Result<()> {
    writeln!(io::stdout(), "{key} {value}")
}

/// Ends the looking, and waits until the other side has seen enough.
fn done() -> io::Result<()> {
    writeln!(io::stdout(), "{DONE}")?;
    io::stdout().flush()?;
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn spec() -> Spec {
    let number = |number| NonZeroU32::new(number).expect("not zero");
    Spec {
        root: env::var_os(ROOT).expect("a root").into(),
        cgroups: env::var_os(CGROUP).into_iter().map(Into::into).collect(),
        identity: Identity {
            user: number(734_567),
            group: number(734_568),
        },
        limits: Limits {
            descriptors: 64,
            file_bytes: 1 << 30,
            threads: 16,
        },
        capabilities: CapabilitySet::empty(),
        keep: vec![0, 1, 2],
    }
}

fn passwd() -> String {
    fs::read("/etc/passwd").map_or_else(
        |error| match error.kind() {
            ErrorKind::NotFound => "not found".to_owned(),
            _ => error.to_string(),
        },
        |_| "read".to_owned(),
    )
}

fn loopback() -> String {
    let Some(port) = env::var(PORT)
        .ok()
        .and_then(|port| port.parse::<u16>().ok())
    else {
        return "not asked".to_owned();
    };
    TcpStream::connect(("127.0.0.1", port)).map_or_else(
        |error| match error.kind() {
            ErrorKind::NetworkUnreachable => "unreachable".to_owned(),
            _ => error.to_string(),
        },
        |_| "connected".to_owned(),
    )
}

fn open_descriptors() -> Vec<i32> {
    let is_open = |number: &i32| {
        // SAFETY: borrowed for one question; the answer for a closed one is EBADF.
        let descriptor = unsafe { BorrowedFd::borrow_raw(*number) };
        rustix::io::fcntl_getfd(descriptor).is_ok()
    };
    (0..1024).filter(is_open).collect()
}

fn look() -> io::Result<()> {
    for leak in open_descriptors().into_iter().filter(|open| *open > 2) {
        say(&format!("before-descriptor-{leak}"), "open")?;
    }
    say("before-passwd", passwd())?;
    say("before-loopback", loopback())?;
    let report = jail::enter(&spec()).map_err(io::Error::other)?;
    for measure in Measure::ALL {
        let key = measure.word().replace(' ', "-");
        match report.missing().find(|(missing, _)| *missing == measure) {
            None => say(&key, "holds")?,
            Some((_, why)) => say(&key, why)?,
        }
        assert_eq!(
            report.holds(measure),
            report.require(&[measure]).is_ok(),
            "{measure:?}"
        );
    }
    let open: Vec<_> = open_descriptors().iter().map(i32::to_string).collect();
    say("after-descriptors", open.join(","))?;
    say("after-passwd", passwd())?;
    say("after-entries", fs::read_dir("/")?.count())?;
    let written = fs::write("/file", "x");
    say(
        "after-write",
        if written.is_ok() { "done" } else { "refused" },
    )?;
    say("after-loopback", loopback())?;
    look_for_others()?;
    let (user, group) = (rustix::process::getuid(), rustix::process::getgid());
    say(
        "after-user",
        format!("{}:{}", user.as_raw(), group.as_raw()),
    )?;
    say("after-groups", rustix::process::getgroups()?.len())?;
    let core = rustix::process::getrlimit(Resource::Core).maximum;
    say(
        "after-core-limit",
        core.map_or("none".to_owned(), |limit| limit.to_string()),
    )?;
    done()
}

fn look_for_others() -> io::Result<()> {
    say("after-pid", rustix::process::getpid().as_raw_nonzero())?;
    let host = env::var(HOST_PID).ok().and_then(|pid| pid.parse().ok());
    let host = host
        .and_then(Pid::from_raw)
        .ok_or(ErrorKind::InvalidInput)?;
    let answer = match rustix::process::test_kill_process(host) {
        Err(rustix::io::Errno::SRCH) => "no such process".to_owned(),
        other => format!("{other:?}"),
    };
    say("after-host-process", answer)?;
    let others = (2..40_000)
        .filter_map(Pid::from_raw)
        .filter(|pid| rustix::process::test_kill_process(*pid) != Err(rustix::io::Errno::SRCH))
        .count();
    say("after-others", others)
}

fn two_threads() -> io::Result<()> {
    let (end, wait) = mpsc::channel::<()>();
    let other = thread::spawn(move || wait.recv().is_ok());
    let refused = jail::enter(&spec()).expect_err("there are two threads");
    say("refused", refused)?;
    drop(end);
    let _ = other.join();
    done()
}

/// Installs the filter of `kind` as the monitor does: on a thread of its own, or for the API on the
/// first thread, last.
fn behind_filter(
    kind: Kind,
    body: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<()> {
    jail::say_panics_in_one_line();
    rustix::thread::set_no_new_privs(true)?;
    let filters = Filters::default();
    let then = move || {
        filters.install(kind).map_err(io::Error::other)?;
        body()
    };
    if kind == Kind::Api {
        then()
    } else {
        let thread = thread::spawn(then);
        thread.join().map_err(|_| io::Error::other("panicked"))?
    }
}

/// What each thread does all day.
fn work(kind: Kind) -> io::Result<()> {
    let event = rustix::event::eventfd(1, rustix::event::EventfdFlags::empty())?;
    let (left, right) = UnixStream::pair()?;
    let file = tempfile::tempfile()?;
    // A thread of another kind at the other end of a channel: locks and waits both ways.
    let (ask, asked) = mpsc::channel::<mpsc::Sender<u64>>();
    let other = thread::spawn(move || {
        for reply in asked {
            thread::sleep(Duration::from_millis(2));
            let _ = reply.send(7);
        }
    });
    behind_filter(kind, move || {
        let begin = Instant::now();
        thread::sleep(Duration::from_millis(2));
        let (reply, replied) = mpsc::channel();
        ask.send(reply).map_err(io::Error::other)?;
        let answer = replied.recv_timeout(Duration::from_secs(10));
        assert_eq!(answer.map_err(io::Error::other)?, 7);
        // Small and large, grown and given back: every path of the allocator.
        let mut blocks: Vec<Vec<u8>> = (0..200).map(|index| vec![1; index << 10]).collect();
        blocks
            .iter_mut()
            .for_each(|block| block.resize(4 << 20 >> 3, 2));
        drop(blocks);
        let caught = std::panic::catch_unwind(|| panic!("caught"));
        assert!(caught.is_err());
        let mut number = [0; 8];
        rustix::io::read(&event, &mut number)?;
        rustix::io::write(&event, &1_u64.to_ne_bytes())?;
        if kind != Kind::Vcpu {
            left.set_nonblocking(true)?;
            (&right).write_all(b"hello")?;
            let mut bytes = [0; 5];
            (&left).read_exact(&mut bytes)?;
            rustix::io::pwrite(&file, &bytes, 0)?;
            file.sync_data()?;
            assert_eq!(file.metadata()?.len(), 5);
        }
        assert!(begin.elapsed() > Duration::from_millis(2));
        say("work", "done")?;
        io::stdout().flush()
    })?;
    if kind != Kind::Api {
        // The thread ended behind its filter, and nobody else noticed.
        other.join().map_err(|_| io::Error::other("panicked"))?;
    }
    done()
}

/// Does what it must not; does not come back.
fn crime(what: &str, kind: Kind) -> io::Result<()> {
    let what = what.to_owned();
    behind_filter(kind, move || {
        say("filter", "installed")?;
        io::stdout().flush()?;
        match what.as_str() {
            "open" => drop(fs::File::open("/etc/passwd")?),
            "internet" => drop(TcpStream::connect("127.0.0.1:1")),
            "execute" => {
                return Err(std::os::unix::process::CommandExt::exec(
                    &mut std::process::Command::new("/bin/true"),
                ));
            }
            "fork" => drop(thread::spawn(|| ())),
            "executable" => {
                use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
                let all = ProtFlags::READ | ProtFlags::WRITE | ProtFlags::EXEC;
                // SAFETY: a new mapping that nobody uses.
                unsafe { mmap_anonymous(std::ptr::null_mut(), 4096, all, MapFlags::PRIVATE)? };
            }
            _ => return Err(io::Error::other("no such crime")),
        }
        say("got-away-with", what)
    })
}
