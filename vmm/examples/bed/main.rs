//! The machine tests that need real KVM and a distribution's kernel. `cargo xtask vm-test` builds
//! this statically, puts it into an initramfs, and boots that where KVM works: in an emulator.
//!
//! Says `ok` or `FAILED` for each case.

mod cases;
mod compare;
mod console;
mod devices;
mod guest;
mod jailed;
mod native;
mod sockets;
mod table;

use std::io::{self, Write};
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::time::Instant;

use insula_vmm::Hypervisor;

/// The allocator of the program that monitors are started from: the filters are made for it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse().expect("a port");
    match words.as_slice() {
        [] => cases(""),
        [word] => cases(word),
        [jailed::VERB, orders] => insula_vmm::monitor::run(orders),
        ["compare", rounds] => held(compare::compare(rounds.parse().expect("a count"))),
        ["native", rounds] => held(native::native(rounds.parse().expect("a count"))),
        ["answer", port, clients] => ended(sockets::answer(
            number(port),
            clients.parse().expect("a count"),
        )),
        ["ask", port, question] => ended(sockets::ask(number(port), question)),
        other => panic!("{other:?}"),
    }
}

/// Whether all promises were.
fn held(outcome: io::Result<bool>) -> ExitCode {
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            say(&format!("FAILED {why}"));
            ExitCode::FAILURE
        }
    }
}

/// What is done inside a guest.
fn ended(outcome: io::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    }
}

/// Those that have this word in their names.
fn cases(word: &str) -> ExitCode {
    let hypervisor = match Hypervisor::open() {
        Ok(hypervisor) => hypervisor,
        Err(why) => {
            say(&format!("FAILED opening KVM: {why}"));
            return ExitCode::FAILURE;
        }
    };
    let failed = cases::ALL
        .into_iter()
        .filter(|(name, _)| name.contains(word))
        .filter(|(name, case)| !run(name, || case(&hypervisor)))
        .count();
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// A case returns what it found worth telling, and panics if it fails.
fn run(name: &str, case: impl FnOnce() -> String) -> bool {
    let start = Instant::now();
    let outcome = panic::catch_unwind(AssertUnwindSafe(case));
    let seconds = start.elapsed().as_secs_f64();
    match &outcome {
        Ok(found) => say(&format!("ok {name} ({seconds:.1} s) {found}")),
        Err(_) => say(&format!("FAILED {name} ({seconds:.1} s)")),
    }
    outcome.is_ok()
}

/// Lines that `cargo xtask vm-test` shows.
fn say(line: &str) {
    let _ = writeln!(io::stdout().lock(), "bed: {line}");
}
