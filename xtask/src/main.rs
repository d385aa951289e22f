//! `cargo xtask`: what one does with this repository, in one word each.
//!
//! Stays small, because it is built before anything else; in particular it must never depend on
//! the host.
//!
//! * [`checks`]: everything that must hold, and the order in which it is looked at
//! * [`deps`]: which crate may use which, and which words may stand where
//! * [`dist`], [`llvm`]: the program as it is to be installed
//! * [`licences`]: what we stand on, and under which terms
//! * [`fuzz`]: hostile drivers by chance
//! * [`guests`]: the samples, built
//! * [`mod@bench`]: what it costs, beside what others cost
//! * [`tools`]: programs of others that tests use
//! * [`vm_test`]: machines under real KVM, in an emulator
#![forbid(unsafe_code)]

mod bench;
mod checks;
mod deps;
mod dist;
mod fuzz;
mod guests;
mod licences;
mod llvm;
mod repository;
mod tools;
mod vm_test;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;

use repository::Repository;

const USAGE: &str = "\
usage: cargo xtask VERB

  test [ARGS]  lints, dependencies, documentation, guests and all tests, as CI does;
               with ARGS only guests and tests, and the arguments go to the test runner
  ci           the same as test
  guests       build all samples into target/guests
  tools        fetch the programs of others that tests use into target/tools
  vm-test [WORD]
               boot machines with Debian's own kernel under real KVM, emulated where there is none;
               with WORD only the cases that have it in their names; `power` cuts the power of a
               machine with a host in it, INSULA_TEST_CUTS times
  fuzz TARGET [--seconds N] [--seed N]
               hostile drivers by chance against a device of the monitor: rng, block, overlay, net,
               vsock, balloon, watchdog; bytes by chance against whatever reads them: snapshot,
               types (names and quantities), heads, link (between control and data), config; or all
  vm-bench [ROUNDS]
               the monitor beside QEMU's microvm machine, in the same bed; writes
               docs/benchmarks.md
  lint         rustfmt and clippy
  deps         which crate may use which
  deny         licences, sources and advisories of what we depend on
  doc          build the documentation, without warnings
  dist [wasmtime]
               build the program to be installed: instrumented, trained with real load, then with
               that profile and link-time optimisation, into target/pgo/bin; or the peer in
               `bench cost` by the same steps. Takes half an hour on two cores
  bench WHAT [ARGS]
               build everything, then measure cost, metering, shares, overload, neighbour,
               density or all; ARGS as of `insula-bench WHAT --help`. Writes docs/benchmarks.md
";

/// Bad usage, as in the program itself.
const BAD_USAGE: u8 = 2;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let verb = args.next().unwrap_or_default();
    let rest: Vec<String> = args.collect();
    match run(&verb, rest) {
        Ok(code) => code,
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(verb: &str, rest: Vec<String>) -> Result<ExitCode> {
    let takes_more = verb == "test" || rest.is_empty();
    let plan = match verb {
        "ci" | "test" if rest.is_empty() => checks::everything(),
        "test" => checks::tests_only(rest),
        "lint" if takes_more => checks::lint(),
        "doc" if takes_more => checks::doc(),
        "deps" if takes_more => checks::deps(),
        "deny" if takes_more => checks::deny(),
        "guests" if takes_more => {
            guests::build(&Repository::find()?)?;
            return Ok(ExitCode::SUCCESS);
        }
        "tools" if takes_more => {
            tools::ensure(&Repository::find()?);
            return Ok(ExitCode::SUCCESS);
        }
        "dist" => {
            let program = match rest.as_slice() {
                [] => Some(dist::Program::Insula),
                [name] => dist::Program::named(name),
                _ => None,
            };
            let Some(program) = program else {
                say(USAGE.trim_end());
                return Ok(ExitCode::from(BAD_USAGE));
            };
            dist::build(&Repository::find()?, program, dist::Profile::New)?;
            return Ok(ExitCode::SUCCESS);
        }
        "bench" => {
            let Some((what, arguments)) = rest.split_first() else {
                say(USAGE.trim_end());
                return Ok(ExitCode::from(BAD_USAGE));
            };
            bench::run(&Repository::find()?, what, arguments)?;
            return Ok(ExitCode::SUCCESS);
        }
        "fuzz" => {
            fuzz::run(&Repository::find()?, &rest)?;
            return Ok(ExitCode::SUCCESS);
        }
        "vm-test" if rest.len() < 2 => {
            return vm_test::run(&Repository::find()?, rest.first().map(String::as_str));
        }
        "vm-bench" if rest.len() < 2 => {
            return vm_test::bench(&Repository::find()?, rest.first().map(String::as_str));
        }
        "" | "help" | "-h" | "--help" => {
            say(USAGE.trim_end());
            return Ok(ExitCode::SUCCESS);
        }
        _ => {
            say(USAGE.trim_end());
            return Ok(ExitCode::from(BAD_USAGE));
        }
    };
    checks::run(&Repository::find()?, plan)
}

/// To whoever waits: on stderr, where the test runner writes as well. A closed terminal is no
/// reason to stop.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}
