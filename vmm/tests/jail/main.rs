//! What holds inside the jail, seen by a process that is in it.
//!
//! This program is both sides: run by the test runner it is the tests, each of which starts it
//! again as a prisoner, who jails itself, looks around, and writes what it saw to its standard
//! output, a line each.

mod prisoner;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};

use insula_vmm::jail::Measure;
use insula_vmm::jail::spawn::{PidNamespace, in_pid_namespace};
use libtest_mimic::{Arguments, Failed, Trial};

/// The allocator of the program that monitors are started from: the filters are made for it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Outcome = Result<(), Failed>;

fn main() -> ExitCode {
    if let Ok(case) = std::env::var(prisoner::CASE) {
        return prisoner::run(&case);
    }
    let arguments = Arguments::from_args();
    let tests = vec![
        Trial::test("as_root_every_measure_holds", as_root_every_measure_holds),
        Trial::test("without_root_what_is_missing_is_said", without_root),
        Trial::test("cgroups_are_entered", cgroups_are_entered),
        Trial::test("only_a_process_with_one_thread", only_one_thread),
        Trial::test("honest_work_passes_each_filter", honest_work),
        Trial::test("anything_else_kills", anything_else_kills),
    ];
    libtest_mimic::run(&arguments, tests).exit_code()
}

fn skipped(why: &str) -> Outcome {
    writeln!(std::io::stderr(), "skipped: {why}")?;
    Ok(())
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A started prisoner, and a directory that becomes its root.
struct Prison {
    child: Child,
    namespace: PidNamespace,
    lines: BufReader<std::process::ChildStdout>,
    _root: tempfile::TempDir,
}

/// What the prisoner saw.
type Seen = BTreeMap<String, String>;

impl Prison {
    fn new(case: &str, program: &Path, change: impl FnOnce(&mut Command)) -> Result<Self, Failed> {
        let root = tempfile::tempdir()?;
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755))?;
        let mut command = Command::new(program);
        command
            .env(prisoner::CASE, case)
            .env(prisoner::ROOT, root.path())
            .env(prisoner::HOST_PID, std::process::id().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        change(&mut command);
        let (mut child, namespace) = in_pid_namespace(&mut command)?;
        let lines = BufReader::new(child.stdout.take().ok_or("no output")?);
        Ok(Self {
            child,
            namespace,
            lines,
            _root: root,
        })
    }

    /// Reads `key value` until the prisoner is done looking, or gone.
    fn look(&mut self) -> Result<Seen, Failed> {
        let mut seen = Seen::new();
        let mut line = String::new();
        while self.lines.read_line(&mut line)? != 0 && line.trim_end() != prisoner::DONE {
            let (key, value) = line.trim_end().split_once(' ').ok_or("not a pair")?;
            seen.insert(key.to_owned(), value.to_owned());
            line.clear();
        }
        Ok(seen)
    }

    /// Lets the prisoner end, and says how it did.
    fn end(mut self) -> Result<ExitStatus, Failed> {
        drop(self.child.stdin.take());
        Ok(self.child.wait()?)
    }
}

fn this_program() -> Result<PathBuf, Failed> {
    Ok(std::env::current_exe()?)
}

fn expect(seen: &Seen, key: &str, value: &str) -> Outcome {
    match seen.get(key) {
        Some(is) if is == value => Ok(()),
        is => Err(format!("{key} is {is:?}, not {value:?}; all: {seen:#?}").into()),
    }
}

fn as_root_every_measure_holds() -> Outcome {
    if !is_root() {
        return skipped("only root can jail completely");
    }
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    // Inherited by mistake, without close-on-exec: must be closed all the same.
    let leak = fs::File::open("/dev/null")?;
    rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty())?;
    let mut prison = Prison::new("look", &this_program()?, |command| {
        command.env(prisoner::PORT, port.to_string());
    })?;
    let seen = prison.look()?;
    assert_eq!(prison.namespace, PidNamespace::Own);
    for measure in Measure::ALL {
        if measure != Measure::Cgroup {
            expect(&seen, measure.word().replace(' ', "-").as_str(), "holds")?;
        }
    }
    expect(&seen, "cgroup", "not asked for")?;
    // What was there before and is not any more.
    let leaked = format!("before-descriptor-{}", leak.as_raw_fd());
    expect(&seen, &leaked, "open")?;
    expect(&seen, "before-passwd", "read")?;
    expect(&seen, "before-loopback", "connected")?;
    expect(&seen, "after-descriptors", "0,1,2")?;
    expect(&seen, "after-passwd", "not found")?;
    expect(&seen, "after-entries", "0")?;
    expect(&seen, "after-write", "refused")?;
    expect(&seen, "after-loopback", "unreachable")?;
    expect(&seen, "after-pid", "1")?;
    expect(&seen, "after-host-process", "no such process")?;
    expect(&seen, "after-others", "0")?;
    expect(&seen, "after-user", prisoner::IDENTITY)?;
    expect(&seen, "after-groups", "0")?;
    expect(&seen, "after-core-limit", "0")?;
    if !prison.end()?.success() {
        return Err("the prisoner failed".into());
    }
    Ok(())
}

fn without_root() -> Outcome {
    // A copy where anybody may execute it: the build folder may be closed to others.
    let shelf = tempfile::tempdir()?;
    fs::set_permissions(shelf.path(), fs::Permissions::from_mode(0o755))?;
    let program = shelf.path().join("prisoner");
    fs::copy(this_program()?, &program)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port().to_string();
    let mut prison = Prison::new("look", &program, |command| {
        command.env(prisoner::PORT, port);
        if is_root() {
            command.uid(65_534).gid(65_534);
        }
    })?;
    let seen = prison.look()?;
    expect(
        &seen,
        "own-user",
        "setresuid: only root can become another user",
    )?;
    for sure in [
        "closed-descriptors",
        "resource-limits",
        "no-capabilities",
        "no-new-privileges",
        "not-dumpable",
    ] {
        expect(&seen, sure, "holds")?;
    }
    expect(&seen, "after-descriptors", "0,1,2")?;
    // With a user namespace the rest holds as well; without, it must not be claimed.
    let holds = |measure: &str| seen.get(measure).is_some_and(|is| is == "holds");
    let passwd = if holds("empty-root") {
        "not found"
    } else {
        "read"
    };
    expect(&seen, "after-passwd", passwd)?;
    let loopback = if holds("network-namespace") {
        "unreachable"
    } else {
        "connected"
    };
    expect(&seen, "after-loopback", loopback)?;
    prison.end()?;
    Ok(())
}

fn cgroups_are_entered() -> Outcome {
    // One v1 controller or the one v2 hierarchy: whatever may be written here.
    let name = format!("insula-test-{}", std::process::id());
    let hierarchies = ["pids", "unified", ""].map(|tree| Path::new("/sys/fs/cgroup").join(tree));
    let made = hierarchies
        .iter()
        .filter(|tree| tree.join("cgroup.procs").exists())
        .map(|tree| tree.join(&name))
        .find(|group| fs::create_dir(group).is_ok());
    let Some(group) = made else {
        return skipped("no cgroup hierarchy that may be written");
    };
    let outcome = enter_cgroup(&group);
    fs::remove_dir(&group)?;
    outcome
}

fn enter_cgroup(group: &Path) -> Outcome {
    let mut prison = Prison::new("look", &this_program()?, |command| {
        command.env(prisoner::CGROUP, group);
    })?;
    let seen = prison.look()?;
    expect(&seen, "cgroup", "holds")?;
    let inside = fs::read_to_string(group.join("cgroup.procs"))?;
    assert_eq!(inside.trim(), prison.child.id().to_string());
    prison.end()?;
    Ok(())
}

fn only_one_thread() -> Outcome {
    let mut prison = Prison::new("two-threads", &this_program()?, |_| {})?;
    let seen = prison.look()?;
    expect(
        &seen,
        "refused",
        "the process has 2 threads, and must be jailed while it has one",
    )?;
    prison.end()?;
    Ok(())
}

fn honest_work() -> Outcome {
    for kind in ["vcpu", "device", "api"] {
        let mut prison = Prison::new(&format!("work-{kind}"), &this_program()?, |_| {})?;
        let seen = prison.look()?;
        expect(&seen, "work", "done")?;
        let status = prison.end()?;
        if !status.success() {
            return Err(format!("{kind}: {status}").into());
        }
    }
    Ok(())
}

fn anything_else_kills() -> Outcome {
    let sigsys = rustix::process::Signal::SYS.as_raw();
    for kind in ["vcpu", "device", "api"] {
        for crime in prisoner::CRIMES {
            let mut prison = Prison::new(&format!("{crime}-{kind}"), &this_program()?, |_| {})?;
            let seen = prison.look()?;
            expect(&seen, "filter", "installed")?;
            let status = prison.end()?;
            if status.signal() != Some(sigsys) {
                return Err(format!("{crime} on a {kind} thread: {status}, {seen:?}").into());
            }
        }
    }
    Ok(())
}
