//! The table of [`super::syscalls`] as filters, one for each kind of thread.
//!
//! A filter is inherited by the threads that its thread starts, and can only be narrowed. So each
//! new thread installs its own first thing, and the first thread, whose filter allows it to start
//! no further ones, installs its own last: after everything is configured and all threads run, and
//! before the first guest instruction.
//!
//! What is not allowed kills the whole process with `SIGSYS`, which the host sees as the signal of
//! its exit. There is no half-way: a call that nobody foresaw is a bug of ours or a guest that has
//! taken over, and both are to end.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, OnceLock};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::syscalls::{self, Kind, Only};

/// A filter could not be made or installed.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The table does not compile.
    #[error("the filter for {kind:?} threads cannot be compiled: {source}")]
    Compile {
        /// Which one.
        kind: Kind,
        /// Why.
        source: seccompiler::BackendError,
    },
    /// The kernel does not take it.
    #[error("the filter for {kind:?} threads cannot be installed: {source}")]
    Install {
        /// Which one.
        kind: Kind,
        /// Why.
        source: seccompiler::Error,
    },
}

/// The filters of a monitor, each compiled by the first thread that installs it. Cheap to clone.
#[derive(Clone, Default)]
pub struct Filters(Arc<[OnceLock<BpfProgram>; Kind::ALL.len()]>);

impl fmt::Debug for Filters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Filters")
    }
}

impl Filters {
    /// Puts the calling thread behind the filter of `kind`, for good.
    ///
    /// # Errors
    /// [`SeccompError::Install`]: the kernel has no seccomp, or the thread may gain privileges.
    /// [`SeccompError::Compile`], which is a mistake in the table.
    pub fn install(&self, kind: Kind) -> Result<(), SeccompError> {
        let program = match self.0[kind as usize].get() {
            Some(program) => program,
            None => {
                let program = compile(kind)?;
                // Another thread that did the same has made the same.
                self.0[kind as usize].get_or_init(|| program)
            }
        };
        seccompiler::apply_filter(program).map_err(|source| SeccompError::Install { kind, source })
    }
}

fn compile(kind: Kind) -> Result<BpfProgram, SeccompError> {
    let compile = || -> Result<BpfProgram, seccompiler::BackendError> {
        let mut rules = BTreeMap::new();
        for row in syscalls::of(kind) {
            rules.insert(row.number, alternatives(row.only)?);
        }
        SeccompFilter::new(
            rules,
            SeccompAction::KillProcess,
            SeccompAction::Allow,
            TargetArch::x86_64,
        )?
        .try_into()
    };
    compile().map_err(|source| SeccompError::Compile { kind, source })
}

/// The argument rules of a call, any of which is enough; no rule at all allows all arguments.
///
/// Arguments are compared as 32-bit numbers, which is what the kernel makes of these.
fn alternatives(only: Only) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let rule = |argument: u8, operator: SeccompCmpOp, value: u32| {
        let condition =
            SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value.into())?;
        SeccompRule::new(vec![condition])
    };
    let any_of = |argument: u8, values: &[u32]| {
        values
            .iter()
            .map(|value| rule(argument, SeccompCmpOp::Eq, *value))
            .collect()
    };
    match only {
        Only::AnyArguments => Ok(Vec::new()),
        Only::NotExecutable => {
            let executable = libc::PROT_EXEC.unsigned_abs();
            Ok(vec![rule(2, SeccompCmpOp::MaskedEq(executable.into()), 0)?])
        }
        Only::UnixSocket => Ok(vec![rule(
            0,
            SeccompCmpOp::Eq,
            libc::AF_UNIX.unsigned_abs(),
        )?]),
        Only::Operation(operation) => Ok(vec![rule(0, SeccompCmpOp::Eq, operation)?]),
        Only::Commands(commands) => any_of(1, commands),
        Only::Advice(advice) => any_of(2, advice),
    }
}
