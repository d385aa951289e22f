//! The benchmarks: what they measure is built first, so that nobody measures what was yesterday.

use std::process::Command;

use anyhow::{Context, Result, bail};

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
    for (profile, package) in [("dist", "insula"), ("release", "insula-bench")] {
        let mut build = cargo(&repository.root);
        checked(build.args(["build", "--profile", profile, "-p", package]))?;
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

fn checked(command: &mut Command) -> Result<()> {
    let program = command.get_program().display().to_string();
    let status = command.status().with_context(|| program.clone())?;
    if !status.success() {
        bail!("{program}: {status}");
    }
    Ok(())
}
