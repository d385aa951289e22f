//! The process under test.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::admin::Admin;
use crate::alone::{self, Place};
use crate::guests;
use crate::http::Request;
use crate::metrics::Metrics;
use crate::proc;
use crate::tenant::TenantPlan;
use crate::wait::{holds, until};

/// How long a host may take to say that it is ready, and to end.
const START_WITHIN: Duration = Duration::from_secs(30);
const END_WITHIN: Duration = Duration::from_secs(30);
/// Below a host's temporary directory.
const DATA: &str = "data";
const RUN: &str = "run";
/// The kernel's unit of CPU time in `/proc` (`USER_HZ`, 100 on every Linux that we know).
const TICKS_PER_SECOND: f64 = 100.0;

/// How a host is to be started.
#[derive(Debug)]
pub struct Plan {
    args: Vec<String>,
    env: Vec<(String, OsString)>,
    data: Option<PathBuf>,
    through: Option<PathBuf>,
    place: fn() -> Place,
}

impl Plan {
    /// One more flag of `insula serve`.
    #[must_use]
    pub fn arg(mut self, flag: &str, value: impl ToString) -> Self {
        self.args.push(flag.to_owned());
        self.args.push(value.to_string());
        self
    }

    /// One variable of its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    /// A data directory that there is already, instead of one of its own.
    #[must_use]
    pub fn data(mut self, data: impl Into<PathBuf>) -> Self {
        self.data = Some(data.into());
        self
    }

    /// A program that is given the host's program and arguments, and becomes that.
    #[must_use]
    pub fn through(mut self, program: impl Into<PathBuf>) -> Self {
        self.through = Some(program.into());
        self
    }

    /// Starts it in a data directory of its own.
    #[must_use]
    pub fn start(self) -> TestHost {
        let place = (self.place)();
        TestHost::launch(self, place)
    }
}

/// A host that runs, in a data directory that goes with it. Clones are the same host.
#[derive(Debug, Clone)]
pub struct TestHost {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// The data directory, and that of run files, by which the host can be found by its user.
    root: TempDir,
    start: Start,
    process: Mutex<Option<Process>>,
    /// What hosts of this directory that are gone have said.
    said: Mutex<String>,
    _place: Place,
}

/// How its process is started, again and again.
#[derive(Debug)]
struct Start {
    program: Mutex<PathBuf>,
    args: Vec<String>,
    env: Vec<(String, OsString)>,
    through: Option<PathBuf>,
}

#[derive(Debug)]
struct Process {
    child: Child,
    ingress: SocketAddr,
    admin: SocketAddr,
    stderr: Option<JoinHandle<()>>,
    log: Arc<Mutex<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TestHost {
    /// A host as it comes, with two workers.
    #[must_use]
    pub fn start() -> Self {
        Self::plan().start()
    }

    /// A host with flags of its own.
    #[must_use]
    pub fn plan() -> Plan {
        let plan = Plan {
            args: Vec::new(),
            env: Vec::new(),
            data: None,
            through: None,
            place: alone::shared,
        };
        plan.arg("--workers", 2)
    }

    /// A host that runs beside no other test's, so that it can be measured. A test can have one.
    #[must_use]
    pub fn measured() -> Plan {
        let place = alone::alone;
        Plan {
            place,
            ..Self::plan()
        }
    }

    fn launch(plan: Plan, place: Place) -> Self {
        let Plan {
            args,
            env,
            data,
            through,
            ..
        } = plan;
        let root = TempDir::with_prefix("insula-test-").expect("a temporary directory");
        fs::create_dir(root.path().join(RUN)).expect("a directory");
        if let Some(data) = data {
            std::os::unix::fs::symlink(data, root.path().join(DATA)).expect("a link");
        }
        let shared = Shared {
            root,
            start: Start {
                program: Mutex::new(guests::insula()),
                args,
                env,
                through,
            },
            process: Mutex::new(None),
            said: Mutex::default(),
            _place: place,
        };
        let process = Process::start(shared.root.path(), &shared.start);
        *lock(&shared.process) = Some(process);
        Self {
            shared: Arc::new(shared),
        }
    }

    fn process<T>(&self, look: impl FnOnce(&mut Process) -> T) -> T {
        look(
            lock(&self.shared.process)
                .as_mut()
                .expect("a host that runs"),
        )
    }

    /// Where services answer.
    #[must_use]
    pub fn ingress(&self) -> SocketAddr {
        self.process(|process| process.ingress)
    }

    /// Where the admin API answers.
    #[must_use]
    pub fn admin_address(&self) -> SocketAddr {
        self.process(|process| process.admin)
    }

    /// Its data directory.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.shared.root.path().join(DATA)
    }

    /// The administrator's token, from where the host left it.
    ///
    /// # Panics
    /// When it left none.
    #[must_use]
    pub fn token(&self) -> String {
        let token = fs::read_to_string(self.data().join("admin.token"));
        token.expect("<data>/admin.token").trim().to_owned()
    }

    /// The admin API, with the administrator's token.
    #[must_use]
    pub fn admin(&self) -> Admin {
        Admin::new(self.admin_address(), Some(self.token()))
    }

    /// The admin API, with another token or none.
    #[must_use]
    pub fn admin_as(&self, token: Option<&str>) -> Admin {
        Admin::new(self.admin_address(), token.map(str::to_owned))
    }

    /// A tenant that is to be created.
    pub fn tenant(&self, name: &str) -> TenantPlan {
        TenantPlan::new(self.clone(), name)
    }

    /// A request to the ingress for a host name that may be anybody's.
    pub fn request(&self, host: &str, method: &str, target: &str) -> Request {
        Request::new(self.ingress(), host, method, target)
    }

    /// The page of `/metrics`.
    ///
    /// # Panics
    /// When it cannot be had.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        let answer = self.admin().request("GET", "/metrics").send();
        assert_eq!(answer.status, 200, "{}", answer.text());
        Metrics::parse(&answer.text())
    }

    /// Waits until the metrics are as they should be in the end: requests are counted when the
    /// last of their instance is gone, which is after their answer.
    pub fn metrics_when(
        &self,
        what: &str,
        good: impl Fn(&Metrics) -> Result<(), String>,
    ) -> Metrics {
        until(Duration::from_secs(20), what, || {
            let metrics = self.metrics();
            good(&metrics).map(|()| metrics)
        })
    }

    /// Waits until so many requests of a tenant have ended, however they did.
    ///
    /// The page is one read after that: the gauges of one page are a little older than its
    /// counters.
    pub fn when_ended(&self, tenant: &str, requests: u64) -> Metrics {
        let _ = self.metrics_when("all requests are counted", |metrics| {
            let outcomes = metrics.outcomes(tenant);
            let ended: u64 = outcomes.values().sum();
            holds(
                ended == requests,
                format!("{ended} of {requests}: {outcomes:?}"),
            )
        });
        self.metrics()
    }

    /// What a tenant has used, as the admin API has it.
    ///
    /// # Panics
    /// When it is refused.
    #[must_use]
    pub fn usage(&self, tenant: &str) -> Value {
        self.admin().get(&format!("/v1/tenants/{tenant}/usage"))
    }

    /// The id of the process that was started: control's.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process(|process| process.child.id())
    }

    /// The id of the process that serves requests.
    ///
    /// # Panics
    /// When there is none within a few seconds.
    #[must_use]
    pub fn data_pid(&self) -> u32 {
        let control = self.pid();
        until(Duration::from_secs(5), "there is a data process", || {
            data_process_of(control).ok_or_else(|| "none".to_owned())
        })
    }

    /// Kills the process that serves requests, at once.
    pub fn kill_data(&self) {
        let pid = i32::try_from(self.data_pid()).ok().and_then(Pid::from_raw);
        let _ = kill_process(pid.expect("a pid"), Signal::KILL);
    }

    /// The processes that a host is made of.
    #[must_use]
    pub fn pids(&self) -> [u32; 2] {
        [self.pid(), self.data_pid()]
    }

    /// CPU time of the host's processes and of its children that have ended, from the kernel's books.
    ///
    /// # Panics
    /// When the kernel's file is not as `proc(5)` has it.
    #[must_use]
    pub fn cpu_seconds(&self) -> f64 {
        let ticks = self.pids().map(|pid| {
            let stat = proc::file(pid, "stat");
            // Fields 14 to 17, counted after the name, which may hold anything; it is field 2.
            let (_, fields) = stat.rsplit_once(')').expect("proc(5)");
            let fields = fields.split_whitespace().skip(11).take(4);
            let ticks = fields.map(|field| field.parse::<f64>().expect("proc(5)"));
            ticks.sum::<f64>()
        });
        ticks.iter().sum::<f64>() / TICKS_PER_SECOND
    }

    /// Memory that the host's processes have in RAM.
    ///
    /// # Panics
    /// When the kernel's file is not as `proc(5)` has it.
    #[must_use]
    pub fn rss_bytes(&self) -> u64 {
        let kib = self.pids().map(|pid| {
            let resident = proc::status(pid, "VmRSS").expect("proc(5)");
            let kib = resident.strip_suffix(" kB").expect("proc(5)");
            kib.parse::<u64>().expect("proc(5)")
        });
        kib.iter().sum::<u64>() * 1024
    }

    /// Threads of the host's processes.
    ///
    /// # Panics
    /// When they cannot be counted.
    #[must_use]
    pub fn threads(&self) -> usize {
        let threads = |pid| fs::read_dir(format!("/proc/{pid}/task")).expect("proc(5)");
        self.pids().map(|pid| threads(pid).count()).iter().sum()
    }

    /// Mappings of the host's processes.
    #[must_use]
    pub fn mappings(&self) -> usize {
        let mappings = |pid| proc::file(pid, "maps").lines().count();
        self.pids().map(mappings).iter().sum()
    }

    /// Open files of the host's processes.
    ///
    /// # Panics
    /// When they cannot be counted.
    #[must_use]
    pub fn open_files(&self) -> usize {
        let open = |pid| fs::read_dir(format!("/proc/{pid}/fd")).expect("proc(5)");
        self.pids().map(|pid| open(pid).count()).iter().sum()
    }

    /// Whether the process is there.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.process(|process| matches!(process.child.try_wait(), Ok(None)))
    }

    /// What the host has written to stderr so far, with all its lives in this directory.
    #[must_use]
    pub fn said(&self) -> String {
        let mut said = lock(&self.shared.said).clone();
        if let Some(process) = &*lock(&self.shared.process) {
            said.push_str(&lock(&process.log));
        }
        said
    }

    /// Asks the host to end, and does not wait.
    pub fn terminate(&self) {
        self.process(|process| process.signal(Signal::TERM));
    }

    /// Waits for the end of a host that was asked to end.
    #[must_use]
    pub fn ended(&self) -> ExitStatus {
        let mut process = lock(&self.shared.process).take().expect("a host that runs");
        let status = process.wait(END_WITHIN);
        lock(&self.shared.said).push_str(&lock(&process.log));
        status
    }

    /// Ends the host in order and starts another on the same data.
    ///
    /// # Panics
    /// When it does not end with exit code 0.
    pub fn restart(&self) {
        self.terminate();
        let status = self.ended();
        assert!(
            status.success(),
            "the host ended with {status}:\n{}",
            self.said()
        );
        self.start_again();
    }

    /// Kills the host at once and starts another on the same data.
    pub fn crash_and_restart(&self) {
        self.kill();
        self.start_again();
    }

    /// Kills the host at once.
    pub fn kill(&self) {
        self.process(|process| process.signal(Signal::KILL));
        let _ = self.ended();
    }

    /// Starts a host that has ended again, on the same data.
    pub fn start_again(&self) {
        let process = Process::start(self.shared.root.path(), &self.shared.start);
        *lock(&self.shared.process) = Some(process);
    }

    /// Starts a host that has ended again, if it can.
    ///
    /// # Errors
    /// What it said, when it ended instead.
    pub fn try_start_again(&self) -> Result<(), String> {
        let process = Process::try_start(self.shared.root.path(), &self.shared.start)?;
        *lock(&self.shared.process) = Some(process);
        Ok(())
    }

    /// Starts a host that has ended again, and kills it after some time, whatever it is at.
    ///
    /// # Panics
    /// When it ended by itself before.
    pub fn kill_while_it_starts(&self, after: Duration) {
        let shared = &self.shared;
        let (mut process, _stdout) = Process::spawn(shared.root.path(), &shared.start);
        std::thread::sleep(after);
        let ended = process.child.try_wait().expect("a child");
        process.signal(Signal::KILL);
        let _ = process.wait(END_WITHIN);
        lock(&self.shared.said).push_str(&lock(&process.log));
        assert!(ended.is_none(), "it ended by itself:\n{}", self.said());
    }

    /// What is started from now on is this program.
    pub fn install(&self, program: PathBuf) {
        *lock(&self.shared.start.program) = program;
    }

    /// Starts another host in the same directory, which takes over, and waits for the end of this one.
    ///
    /// # Panics
    /// When either does not do its part.
    pub fn upgrade(&self) {
        let shared = &self.shared;
        let next = Process::start(shared.root.path(), &shared.start);
        let mut last = lock(&shared.process)
            .replace(next)
            .expect("a host that runs");
        let status = last.wait(END_WITHIN);
        lock(&shared.said).push_str(&lock(&last.log));
        assert!(status.success(), "it ended with {status}:\n{}", self.said());
    }

    /// Files in a folder of the data directory, and below it.
    #[must_use]
    pub fn files(&self, folder: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.data().join(folder)];
        while let Some(folder) = folders.pop() {
            let Ok(entries) = fs::read_dir(&folder) else {
                continue;
            };
            for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
                if path.is_dir() {
                    folders.push(path);
                } else {
                    found.push(path);
                }
            }
        }
        found.sort();
        found
    }
}

/// The child of a host that is its data plane, by what it was started as.
fn data_process_of(control: u32) -> Option<u32> {
    proc::children_of(control).into_iter().find(|pid| {
        let started_as = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        started_as.split(|byte| *byte == 0).nth(1) == Some(b"data-plane")
    })
}

impl Process {
    /// Starts a host and waits until it says that it is ready.
    fn start(root: &Path, start: &Start) -> Self {
        Self::try_start(root, start).unwrap_or_else(|said| panic!("the host did not start {said}"))
    }

    /// The same; where it ended instead, how it did and what it said.
    fn try_start(root: &Path, start: &Start) -> Result<Self, String> {
        let (mut process, stdout) = Self::spawn(root, start);
        match announced(stdout) {
            Some((ingress, admin)) => (process.ingress, process.admin) = (ingress, admin),
            None => {
                let status = process.wait(START_WITHIN);
                return Err(format!("({status}):\n{}", lock(&process.log)));
            }
        }
        Ok(process)
    }

    fn spawn(root: &Path, start: &Start) -> (Self, ChildStdout) {
        let Start {
            program,
            args,
            env,
            through,
        } = start;
        let insula = lock(program).clone();
        let mut command = Command::new(through.as_ref().unwrap_or(&insula));
        if through.is_some() {
            command.arg(&insula);
        }
        command.arg("serve").arg("--data").arg(root.join(DATA));
        command.env("XDG_RUNTIME_DIR", root.join(RUN));
        for listener in ["--listen", "--admin"] {
            if !args.iter().any(|given| given == listener) {
                command.args([listener, "127.0.0.1:0"]);
            }
        }
        command.args(args);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("INSULA_") {
                command.env_remove(name);
            }
        }
        command.envs(env.iter().map(|(name, value)| (name, value)));
        let spawned = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = spawned.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let log = Arc::new(Mutex::new(String::new()));
        let stderr = child.stderr.take().expect("a pipe");
        let sink = Arc::clone(&log);
        let stderr = std::thread::spawn(move || gather(stderr, &sink));
        let stdout = child.stdout.take().expect("a pipe");
        let process = Self {
            child,
            ingress: SocketAddr::from(([0; 4], 0)),
            admin: SocketAddr::from(([0; 4], 0)),
            stderr: Some(stderr),
            log,
        };
        (process, stdout)
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        // An error means that it is gone already.
        let _ = kill_process(pid.expect("a process id"), signal);
    }

    fn wait(&mut self, limit: Duration) -> ExitStatus {
        let asked = Instant::now();
        let status = loop {
            match self.child.try_wait().expect("a child") {
                Some(status) => break status,
                None if asked.elapsed() > limit => {
                    let _ = self.child.kill();
                    let status = self.child.wait().expect("a child");
                    panic!(
                        "the host did not end within {limit:?} ({status}):\n{}",
                        lock(&self.log)
                    );
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        if let Some(stderr) = self.stderr.take() {
            let _ = stderr.join();
        }
        status
    }
}

/// `ingress http://…`, `admin http://…`, …, `ready`. What follows is read and forgotten, so that
/// the host never writes to a full or a closed pipe.
fn announced(stdout: ChildStdout) -> Option<(SocketAddr, SocketAddr)> {
    let mut reader = BufReader::new(stdout);
    let (mut ingress, mut admin) = (None, None);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let mut words = line.split_whitespace();
        let word = words.next().unwrap_or_default();
        let address = || {
            let url = words.next()?;
            let (_scheme, address) = url.split_once("://")?;
            address.parse::<SocketAddr>().ok()
        };
        let mut address = address;
        match word {
            "ingress" => ingress = address(),
            "admin" => admin = address(),
            "ready" => break,
            _ => {}
        }
    }
    std::thread::spawn(move || {
        let mut rest = [0; 4096];
        while matches!(reader.read(&mut rest), Ok(1..)) {}
    });
    Some((ingress?, admin?))
}

/// Keeps what a host says, up to a bound.
fn gather(stderr: impl Read, sink: &Mutex<String>) {
    const KEPT_MAX: usize = 4 << 20;
    for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
        let mut log = lock(sink);
        if log.len() < KEPT_MAX {
            log.push_str(&String::from_utf8_lossy(&line));
            log.push('\n');
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(mut process) = lock(&self.process).take() {
            let _ = process.child.kill();
            let _ = process.child.wait();
            if let Some(stderr) = process.stderr.take() {
                let _ = stderr.join();
            }
            lock(&self.said).push_str(&lock(&process.log));
        }
        if std::thread::panicking() {
            let said = lock(&self.said);
            eprintln!("--- the host's stderr\n{said}--- end of the host's stderr");
        }
    }
}
