//! Everything that must hold before a change lands. All is run, and all that failed is listed.
//!
//! The order is that of `everything`: what is cheap comes first, the tests come last, so that
//! the test runner's closing line is the last that is read, unless something failed before.

use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Result, bail};

use crate::repository::{Repository, cargo};
use crate::tools::Tools;
use crate::{deps as edges, guests, licences, say, tools};

/// The step whose own closing line says how it ended.
const TESTS: &str = "tests";

/// How a step ended that did not fail.
pub(crate) enum Ended {
    /// It holds.
    Passed,
    /// It was not looked at, and why.
    Skipped(String),
}

/// One thing that must hold.
pub(crate) struct Step {
    name: &'static str,
    check: Check,
}

type Check = Box<dyn FnOnce(&Repository) -> Result<Ended>>;

fn step(name: &'static str, check: impl FnOnce(&Repository) -> Result<Ended> + 'static) -> Step {
    Step {
        name,
        check: Box::new(check),
    }
}

/// All of it.
pub(crate) fn everything() -> Vec<Step> {
    let mut plan = lint();
    plan.extend(deps());
    plan.extend(deny());
    plan.extend(doc());
    plan.push(step("documentation tests", |repository| {
        let mut command = cargo(&repository.root);
        passes(command.args(["test", "--release", "--workspace", "--doc", "--quiet"]))
    }));
    plan.push(step("samples' own tests", |repository| {
        passes(cargo(&repository.samples()).args(["test", "--workspace", "--quiet"]))
    }));
    plan.extend(tests_only(Vec::new()));
    plan
}

/// Guests, tools and tests; `args` go to the test runner.
pub(crate) fn tests_only(args: Vec<String>) -> Vec<Step> {
    vec![
        // As it is shipped: in a build of the whole workspace, what tests want of dependencies
        // would be part of it.
        step("program", |repository| {
            let mut command = cargo(&repository.root);
            passes(command.args(["build", "--release", "--package", "insula"]))
        }),
        step("guests", |repository| {
            guests::build(repository)?;
            Ok(Ended::Passed)
        }),
        step(TESTS, move |repository| {
            let tools = tools::ensure(repository);
            tests(repository, &tools, &args)
        }),
    ]
}

/// rustfmt and clippy, over the workspace and the samples.
pub(crate) fn lint() -> Vec<Step> {
    vec![
        step("rustfmt", |repository| {
            passes(cargo(&repository.root).args(["fmt", "--all", "--check"]))
        }),
        step("samples' rustfmt", |repository| {
            passes(cargo(&repository.samples()).args(["fmt", "--all", "--check"]))
        }),
        step("clippy", |repository| {
            let mut command = cargo(&repository.root);
            command.args(["clippy", "--release", "--workspace", "--all-targets"]);
            passes(command.args(["--quiet", "--", "-D", "warnings"]))
        }),
        step("samples' clippy", |repository| {
            let mut command = cargo(&repository.samples());
            command.args(["clippy", "--workspace", "--all-targets"]);
            passes(command.args(["--quiet", "--", "-D", "warnings"]))
        }),
        step("samples' clippy for wasm", guests::clippy),
    ]
}

/// The edges of the design's table.
pub(crate) fn deps() -> Vec<Step> {
    vec![step("dependency edges", |repository| {
        holds(&edges::violations(repository)?)
    })]
}

/// `cargo deny`, or what of it we can say without.
pub(crate) fn deny() -> Vec<Step> {
    vec![
        step("licences and sources", |repository| {
            if has_deny(repository) {
                let mut command = cargo(&repository.root);
                return passes(command.args(["deny", "check", "bans", "licenses", "sources"]));
            }
            holds(&licences::violations(repository)?)
        }),
        step("advisories", |repository| {
            if !has_deny(repository) {
                let why = "cargo-deny is not installed (cargo install cargo-deny --locked)";
                return Ok(Ended::Skipped(why.to_owned()));
            }
            passes(cargo(&repository.root).args(["deny", "check", "advisories"]))
        }),
    ]
}

fn has_deny(repository: &Repository) -> bool {
    answers(cargo(&repository.root).args(["deny", "--version"]))
}

/// `cargo doc`, where every warning is an error.
pub(crate) fn doc() -> Vec<Step> {
    vec![step("documentation", |repository| {
        let mut command = cargo(&repository.root);
        command.args(["doc", "--release", "--workspace", "--no-deps"]);
        command.args(["--document-private-items", "--quiet"]);
        passes(command.env(
            "RUSTDOCFLAGS",
            "-D warnings -A rustdoc::private_intra_doc_links",
        ))
    })]
}

fn tests(repository: &Repository, tools: &Tools, args: &[String]) -> Result<Ended> {
    let mut command = cargo(&repository.root);
    if answers(cargo(&repository.root).args(["nextest", "--version"])) {
        command.args(["nextest", "run", "--release", "--workspace"]);
    } else {
        say("   cargo-nextest is not installed: `cargo test` does as well, more slowly");
        command.args(["test", "--release", "--workspace", "--no-fail-fast"]);
        // Documentation tests were a step of their own.
        command.args(["--lib", "--bins", "--tests"]);
    }
    command.args(args);
    command.env("INSULA_TEST_BIN", repository.target.join("release/insula"));
    command.env("INSULA_TEST_GUESTS", repository.guests());
    tools.tell(&mut command);
    passes(&mut command)
}

/// Runs all steps, says how each ended, and lists what failed.
pub(crate) fn run(repository: &Repository, plan: Vec<Step>) -> Result<ExitCode> {
    let mut failed = Vec::new();
    let mut skipped = Vec::new();
    for step in plan {
        let name = step.name;
        say(&format!("== {name}"));
        // The test runner's closing line is the last; what was skipped is therefore said before.
        if name == TESTS {
            for line in &skipped {
                say(&format!("   skipped: {line}"));
            }
        }
        let started = Instant::now();
        let ended = (step.check)(repository);
        let seconds = started.elapsed().as_secs();
        match ended {
            Ok(Ended::Passed) if name == TESTS => {}
            Ok(Ended::Passed) => say(&format!("   passed: {name} ({seconds} s)")),
            Ok(Ended::Skipped(why)) => {
                say(&format!("   skipped: {name}: {why}"));
                skipped.push(format!("{name}: {why}"));
            }
            Err(error) => {
                say(&format!("   FAILED: {name} ({seconds} s): {error:#}"));
                failed.push(name);
            }
        }
    }
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    say(&format!("failed: {}", failed.join(", ")));
    Ok(ExitCode::FAILURE)
}

/// Runs a command whose words everybody may read.
pub(crate) fn passes(command: &mut Command) -> Result<Ended> {
    let status = command.stdin(Stdio::null()).status()?;
    if !status.success() {
        let program = command.get_program().to_string_lossy().into_owned();
        let name = program.rsplit('/').next().unwrap_or_default().to_owned();
        let first = command.get_args().next().unwrap_or_default();
        bail!("{name} {}: {status}", first.to_string_lossy());
    }
    Ok(Ended::Passed)
}

/// Whether a command exists and is content.
pub(crate) fn answers(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .output()
        .is_ok_and(|output| output.status.success())
}

fn holds(violations: &[String]) -> Result<Ended> {
    if violations.is_empty() {
        return Ok(Ended::Passed);
    }
    for violation in violations {
        say(&format!("   {violation}"));
    }
    bail!("{} violations", violations.len())
}
