//! The benchmarks: what they measure is built first, so that nobody measures what was yesterday.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::dist::{self, Profile, Program};
use crate::guests;
use crate::repository::{Repository, cargo};
use crate::say;

/// What there is, in the order in which `all` runs it: the quick ones first.
pub(crate) const VERBS: [&str; 6] = [
    "cost",
    "metering",
    "shares",
    "overload",
    "neighbour",
    "density",
];

/// Builds everything and runs a benchmark, or all of them; arguments are passed on. One that fails
/// does not keep the others from running.
pub(crate) fn run(repository: &Repository, verb: &str, arguments: &[String]) -> Result<()> {
    let verbs: Vec<&str> = match VERBS.into_iter().find(|known| *known == verb) {
        Some(verb) => vec![verb],
        None if verb == "all" => VERBS.to_vec(),
        None => bail!(
            "no benchmark is called {verb:?}: {} or all",
            VERBS.join(", ")
        ),
    };
    let build = |profile: &str, package: &str| {
        let mut build = cargo(&repository.root);
        checked(build.args(["build", "--profile", profile, "-p", package]))
    };
    build("release", "insula-bench")?;
    if verbs.contains(&"cost") {
        // Of all benchmarks the one whose ratios are of microseconds: ours as it is installed,
        // ours as the README builds it, and the peer built as ours is.
        build("release", "insula")?;
        dist::build(repository, Program::Insula, Profile::LastIfAny)?;
        if arguments
            .iter()
            .any(|argument| argument == "--install-peers")
        {
            dist::build(repository, Program::Wasmtime, Profile::LastIfAny)?;
        }
    }
    if verbs != ["cost"] {
        build("dist", "insula")?;
    }
    guests::build(repository)?;
    let mut failed = Vec::new();
    for verb in verbs {
        say(&format!("== {verb}"));
        let mut program = Command::new(repository.target.join("release/insula-bench"));
        if let Err(error) = checked(program.arg(verb).args(arguments)) {
            say(&format!("{verb}: {error:#}"));
            failed.push(verb);
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

/// Runs a command whose words everybody may read.
pub(crate) fn checked(command: &mut Command) -> Result<()> {
    let program = command.get_program().display().to_string();
    let status = command.status().with_context(|| program.clone())?;
    if !status.success() {
        bail!("{program}: {status}");
    }
    Ok(())
}
