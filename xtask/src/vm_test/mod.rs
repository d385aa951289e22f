//! `cargo xtask vm-test`: machines with an unmodified distribution kernel under real KVM, on any
//! x86-64 machine.
//!
//! ```text
//! this machine │ QEMU emulates a processor with AMD's virtualization (TCG, no KVM needed)
//!              └▶ Debian's cloud kernel, with kvm-amd     ← initramfs: init, bed, micro-guests
//!                 └▶ our monitor, linked statically
//!                    └▶ the same Debian kernel, unmodified  ← initramfs: virtio modules
//!                       └▶ ext4 root on virtio-blk, whose init obeys the bed
//! ```
//!
//! Kernel and busybox are Debian's packages, unpacked into `target/vm-bed`; QEMU is installed if
//! it is not there and we are root. Nothing else of the system is changed.

mod bed;
mod bench;
mod cpio;
mod debian;
mod host;
mod power;
mod vmlinux;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::panic::resume_unwind;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::repository::Repository;
use crate::say;
use debian::Debian;

/// All of it within this time, or it failed.
const PATIENCE: Duration = Duration::from_secs(15 * 60);

/// What the bed prints for us starts so.
const MARK: &str = "bed: ";
/// And those of them that are rows of a table for `docs/benchmarks.md` go on so.
const ROW: &str = "row ";
/// The last such line.
const END: &str = "end";

/// Fetches, builds, boots, and tells. The last line is `N passed, N failed`. With a word only the
/// cases run that have it in their names; `power` is another machine ([`power`]).
pub(crate) fn run(repository: &Repository, only: Option<&str>) -> Result<ExitCode> {
    if let Some(word) = only
        && !word.bytes().all(|letter| letter.is_ascii_lowercase())
    {
        bail!("{word:?} is not a word of small letters");
    }
    let dir = repository.target.join("vm-bed");
    if only == Some("power") {
        return power::run(repository, &dir);
    }
    let report = cases(repository, &dir, &debian::ensure(&dir)?, only)?;
    Ok(if report.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The monitor beside QEMU's microvm machine, published. A promise that is not held is a row that says
/// so, and no failure.
pub(crate) fn bench(repository: &Repository, rounds: Option<&str>) -> Result<ExitCode> {
    let rounds: u8 = rounds
        .unwrap_or("5")
        .parse()
        .context("a number of rounds")?;
    let rounds = rounds.max(1);
    let dir = repository.target.join("vm-bed");
    let debian = debian::ensure(&dir)?;
    let (image, program) = bench::build(repository, &dir, &debian)?;
    let more = format!("rounds={rounds}");
    let log = dir.join("console.log");
    let mut report = boot(&log, &debian.kernel, &image, Processors::Two, &more)?;
    bench::native(&program, rounds, &mut report)?;
    if report.failed > 0 {
        return Ok(ExitCode::FAILURE);
    }
    bench::publish(repository, rounds, &report.rows)?;
    Ok(ExitCode::SUCCESS)
}

fn cases(
    repository: &Repository,
    dir: &Path,
    debian: &Debian,
    only: Option<&str>,
) -> Result<Report> {
    let image = bed::build(repository, dir, debian)?;
    let start = Instant::now();
    let boot = |log: &str, more: &str| {
        let log = dir.join(log);
        boot(&log, &debian.kernel, &image, Processors::One, more)
    };
    let report = match only {
        Some(word) => boot("console.log", &format!("only={word}"))?,
        // Two emulators, on a core each.
        None => std::thread::scope(|scope| {
            let hosts = scope.spawn(|| boot("hosts.log", "part=hosts"));
            let guests = boot("guests.log", "part=guests");
            let hosts = hosts.join().unwrap_or_else(|panic| resume_unwind(panic));
            anyhow::Ok(guests?.and(hosts?))
        })?,
    };
    say(&format!(
        "{} passed, {} failed in {} s",
        report.passed,
        report.failed,
        start.elapsed().as_secs()
    ));
    Ok(report)
}

#[derive(Default)]
struct Report {
    passed: u32,
    failed: u32,
    ended: bool,
    rows: Vec<String>,
}

impl Report {
    /// Of two beds.
    fn and(mut self, other: Self) -> Self {
        self.passed += other.passed;
        self.failed += other.failed;
        self
    }

    /// Shows what is for us of a console line.
    fn line(&mut self, line: &str) {
        let Some((_, line)) = line.split_once(MARK) else {
            return;
        };
        match line.split(' ').next() {
            Some("ok") => self.passed += 1,
            Some("FAILED") => self.failed += 1,
            Some(END) => {
                self.ended = true;
                return;
            }
            _ => {}
        }
        if let Some(row) = line.strip_prefix(ROW) {
            self.rows.push(row.to_owned());
        }
        say(line);
    }
}

/// Boots the bed in emulation; its console goes to the file.
fn boot(
    path: &Path,
    kernel: &Path,
    image: &Path,
    processors: Processors,
    more: &str,
) -> Result<Report> {
    let mut log = File::create(path).with_context(|| path.display().to_string())?;
    let mut emulator = Emulator::start(kernel, image, processors, more)?;
    let console = emulator
        .0
        .stdout
        .take()
        .context("the emulator has a console")?;
    let (lines, arriving) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n') {
            let Ok(line) = line else { return };
            if lines
                .send(String::from_utf8_lossy(&line).into_owned())
                .is_err()
            {
                return;
            }
        }
    });
    let deadline = Instant::now() + PATIENCE;
    let mut report = Report::default();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match arriving.recv_timeout(left) {
            Ok(line) => {
                let line = line.trim_end();
                writeln!(log, "{line}").with_context(|| path.display().to_string())?;
                report.line(line);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                say(&format!(
                    "the bed did not end within {} s",
                    PATIENCE.as_secs()
                ));
                break;
            }
        }
    }
    if !report.ended || report.failed > 0 {
        say(&format!("the console is in {}", path.display()));
    }
    if !report.ended {
        report.failed += 1;
        say("FAILED the bed did not come to its end");
    }
    Ok(report)
}

/// Processors of the emulated machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Processors {
    /// With two, each on a thread of QEMU's, the bed's kernel now and then waits for one of them for
    /// ever while both are busy with guests (seen with QEMU 7.2, under the micro-guests, where this
    /// machine did nothing else). Guests have as many as they like.
    One,
    /// To be measured, with one processor of the guest's, which has not come to that. The memory is
    /// taken before, so that whoever touches it first does not pay for that.
    Two,
}

/// QEMU, ended when we are.
struct Emulator(Child);

impl Emulator {
    fn start(kernel: &Path, image: &Path, processors: Processors, more: &str) -> Result<Self> {
        // The kernel tries its timer when it starts, and an emulator that has no core just then fails.
        let command_line = format!("console=ttyS0 panic=-1 quiet no_timer_check {more}");
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-accel", "tcg,thread=multi"])
            .args(["-cpu", "qemu64,+svm,+npt,+rdrand"])
            .args(["-m", "2048", "-nographic", "-no-reboot"])
            .args(["-nodefaults", "-serial", "stdio"])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(image)
            .args(["-append", &command_line])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        match processors {
            Processors::One => command.args(["-smp", "1"]),
            Processors::Two => command.args(["-smp", "2", "-mem-prealloc"]),
        };
        match command.spawn() {
            Ok(child) => Ok(Self(child)),
            Err(error) => bail!("qemu-system-x86_64: {error}"),
        }
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // Both fail only where it is over.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
