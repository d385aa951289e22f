//! `dist`: the program as it is to be installed, built with profile-guided optimisation
//! (`docs/decisions/0032-built-by-profile.md`).
//!
//! ```text
//!  llvm-profdata ─▶ instrumented build ─▶ training ─▶ merge ─▶ optimised build ─▶ target/pgo/bin
//!                   counts its branches   real load   profile  profile and LTO
//! ```
//!
//! The peer in the benchmark is built by the same steps, or the two could not be compared. All is
//! below `target/pgo`: per program the folders of the two builds and the profile. A step that
//! fails stops all; the next run begins again, and Cargo keeps what it has built.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::bench::checked;
use crate::guests;
use crate::llvm::Compiler;
use crate::repository::{Repository, cargo};
use crate::say;

/// The same as in `bench/src/peers.rs`, which compares no other.
const WASMTIME_VERSION: &str = "48.0.8";

/// What is left as it is without a profile: the training does not run it, or hardly, and what a
/// profile says is never run is built to be small. So machines, TLS, HTTP/2, the store and the
/// compiler of guests do not pay for the path of requests.
const UNTRAINED: &str =
    r"insula_vmm|rustls|2h2[0-9]|h2\.\.|redb|rusqlite|cranelift|regalloc2|wasmparser";

/// Leaves out which values were seen, where a pointer led and how long copies were.
const NO_VALUES: &str = "-Cllvm-args=-disable-vp=true";

/// In the names of functions that every request runs.
const HTTP1: &str = "5hyper5proto2h1";
/// The training is tens of thousands of requests. Fewer were counted where a process that serves
/// could not reach its file: it is another user's, and a folder above may be closed to others.
const LEARNED: u64 = 10_000;

/// What is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    Insula,
    /// The peer in the benchmark.
    Wasmtime,
}

impl Program {
    pub(crate) fn named(name: &str) -> Option<Self> {
        [Self::Insula, Self::Wasmtime]
            .into_iter()
            .find(|program| program.name() == name)
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Insula => "insula",
            Self::Wasmtime => "wasmtime",
        }
    }
}

/// Where a profile is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// A new one is made.
    New,
    /// The last one is good enough, where there is one: what has changed since is built as if it
    /// had none.
    LastIfAny,
}

/// Builds a program into `target/pgo/bin`.
pub(crate) fn build(repository: &Repository, program: Program, profile: Profile) -> Result<()> {
    let pgo = repository.target.join("pgo");
    let dist = Dist {
        repository,
        program,
        compiler: Compiler::ask(repository)?,
        folder: pgo.join(program.name()),
    };
    if profile == Profile::New || !dist.profile().exists() {
        dist.learn()?;
    }
    say(&format!("== {}: optimised build", program.name()));
    let used = format!("-Cprofile-use={}", dist.profile().display());
    // No values were recorded: without the second it warns of every place that has some.
    let built = dist.compile("optimised", &[used, NO_VALUES.to_owned()])?;
    let bin = pgo.join("bin");
    fs::create_dir_all(&bin).with_context(|| bin.display().to_string())?;
    let to = bin.join(program.name());
    // Whoever runs the old one goes on with it.
    let new = bin.join(format!(".{}.new", program.name()));
    fs::copy(&built, &new).with_context(|| built.display().to_string())?;
    fs::rename(&new, &to)?;
    say(&format!("   {}", to.display()));
    Ok(())
}

struct Dist<'a> {
    repository: &'a Repository,
    program: Program,
    compiler: Compiler,
    /// Of all that is not the result.
    folder: PathBuf,
}

impl Dist<'_> {
    fn profile(&self) -> PathBuf {
        self.folder.join("merged.profdata")
    }

    /// Makes the profile.
    fn learn(&self) -> Result<()> {
        let name = self.program.name();
        say(&format!("== {name}: llvm-profdata"));
        let profdata = self.compiler.profdata(self.repository)?;
        say(&format!("   {}", profdata.display()));

        say(&format!("== {name}: instrumented build"));
        let counts = self.folder.join("raw");
        let instrumented = self.compile("instrumented", &instrumentation(&counts)?)?;

        say(&format!("== {name}: training"));
        guests::build(self.repository)?;
        let mut build = cargo(&self.repository.root);
        checked(build.args(["build", "--release", "-p", "insula-bench"]))?;
        let _ = fs::remove_dir_all(&counts);
        fs::create_dir_all(&counts).with_context(|| counts.display().to_string())?;
        // Processes that have left the user's rights behind write there as well.
        fs::set_permissions(&counts, Permissions::from_mode(0o777))?;
        let mut bench = Command::new(self.repository.target.join("release/insula-bench"));
        bench
            .args(["train", &format!("--{name}")])
            .arg(&instrumented);
        checked(bench.arg("--guests").arg(self.repository.guests()))?;

        say(&format!("== {name}: merge"));
        let mut merge = Command::new(&profdata);
        merge.args(["merge", "--no-function", UNTRAINED, "--output"]);
        let profile = self.profile();
        checked(merge.arg(&profile).arg(&counts))?;
        let most = most_of(&profdata, &profile)?;
        if most < LEARNED {
            fs::remove_file(&profile)?;
            bail!(
                "the profile counts {most} requests at most: what served them could not write to {}",
                counts.display()
            );
        }
        fs::remove_dir_all(&counts)?;
        // Cargo knows the profile by its name only.
        match fs::remove_dir_all(self.folder.join("optimised")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Compiles for this machine with some flags more, in a target folder of its own; returns
    /// where the program is. Naming the target keeps the flags from build scripts and macros.
    fn compile(&self, folder: &str, flags: &[String]) -> Result<PathBuf> {
        let folder = self.folder.join(folder);
        let mut command = cargo(&self.repository.root);
        let built = match self.program {
            Program::Insula => {
                command.args(["build", "--profile", "dist", "--package", "insula"]);
                folder.join(&self.compiler.host).join("dist/insula")
            }
            Program::Wasmtime => {
                command.args(["install", "wasmtime-cli", "--locked", "--force", "--quiet"]);
                command.args(["--version", WASMTIME_VERSION, "--root"]);
                command.arg(&folder).env("CARGO_PROFILE_RELEASE_LTO", "fat");
                folder.join("bin/wasmtime")
            }
        };
        command.args(["--target", &self.compiler.host, "--target-dir"]);
        command
            .arg(&folder)
            .env("CARGO_ENCODED_RUSTFLAGS", encoded(flags));
        checked(&mut command)?;
        Ok(built)
    }
}

/// What makes a program count its branches into files in a folder.
///
/// The files are mapped when a process starts (LLVM's continuous mode, `%c`), so that one in a jail
/// needs to open nothing at its end, and one that is killed loses nothing. That mode cannot keep
/// what values were seen; names are left readable for an `llvm-profdata` without zlib.
fn instrumentation(counts: &Path) -> Result<[String; 4]> {
    let path = counts.to_str().filter(|path| !path.contains('%'));
    let path = path.with_context(|| format!("LLVM takes no folder called {counts:?}"))?;
    Ok([
        format!("-Cprofile-generate={path}%c"),
        "-Cllvm-args=-runtime-counter-relocation".to_owned(),
        "-Cllvm-args=-enable-name-compression=false".to_owned(),
        NO_VALUES.to_owned(),
    ])
}

/// The largest count in what serves HTTP/1.
fn most_of(profdata: &Path, profile: &Path) -> Result<u64> {
    let mut show = Command::new(profdata);
    show.args(["show", "--counts", "--function", HTTP1]);
    let output = show.arg(profile).output().context("llvm-profdata show")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let counts = text
        .lines()
        .filter(|line| line.contains("ounts: ["))
        .flat_map(|line| line.split(|letter: char| !letter.is_ascii_digit()))
        .filter_map(|number| number.parse().ok());
    Ok(counts.max().unwrap_or(0))
}

/// The user's own flags and some more, as Cargo takes them where they may hold blanks.
fn encoded(flags: &[String]) -> String {
    let own = std::env::var("CARGO_ENCODED_RUSTFLAGS").or_else(|_| {
        let flags = std::env::var("RUSTFLAGS")?;
        Ok::<_, std::env::VarError>(flags.split_whitespace().collect::<Vec<_>>().join("\x1f"))
    });
    let own = own.unwrap_or_default();
    let mut all: Vec<&str> = own.split('\x1f').filter(|flag| !flag.is_empty()).collect();
    all.extend(flags.iter().map(String::as_str));
    all.join("\x1f")
}
