//! Filters of system calls, as a list of what may be called.
//!
//! A call that is not in the list fails with `EPERM`.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

/// What the arguments of a call must be.
#[derive(Debug, Clone, Copy)]
pub(super) enum Only {
    AnyArguments,
    /// This argument is one of these.
    One(u8, &'static [u64]),
    /// Argument 0 is this process.
    OwnThreads,
}

pub(super) const ANY: Only = Only::AnyArguments;

/// `linux/prctl.h`: names of threads and of mappings.
pub(super) const NAMES: Only = Only::One(0, &[15, 0x5356_4d41]);

/// Puts the calling thread, and those that it starts, behind a filter. It stays.
pub(super) fn apply(calls: &[(i64, Only)]) -> Result<(), String> {
    let program = compiled(calls).map_err(|error| error.to_string())?;
    seccompiler::apply_filter(&program).map_err(|error| error.to_string())
}

pub(super) fn compiled(calls: &[(i64, Only)]) -> Result<BpfProgram, BackendError> {
    let mut rules = BTreeMap::new();
    for (call, only) in calls {
        let rule = |argument: u8, value: u64| {
            let is = SeccompCmpOp::Eq;
            let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, is, value)?;
            SeccompRule::new(vec![condition])
        };
        let alternatives = match only {
            Only::AnyArguments => Vec::new(),
            Only::One(argument, values) => values
                .iter()
                .map(|value| rule(*argument, *value))
                .collect::<Result<_, _>>()?,
            Only::OwnThreads => vec![rule(0, u64::from(std::process::id()))?],
        };
        rules.insert(*call, alternatives);
    }
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    SeccompFilter::new(rules, refused, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}
