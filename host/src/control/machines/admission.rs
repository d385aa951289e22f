//! Whether there is room for a machine: its memory is promised whole when it starts.

use insula_types::TenantId;

use super::Control;
use crate::control::problem::{Code, Problem};
use crate::machines::book::Book;
use crate::machines::network::Network;
use crate::state::machines::Machine;

/// What all running machines may be promised together.
pub(crate) fn capacity_bytes(host_bytes: u64, percent: u32) -> u64 {
    let bytes = u128::from(host_bytes) * u128::from(percent) / 100;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// Refuses a machine that does not fit beside those that run.
pub(super) fn check(book: &Book, machine: &Machine, control: &Control) -> Result<(), Problem> {
    let percent = control.machines.config.memory_percent;
    let capacity = capacity_bytes(control.machine.memory_bytes, percent);
    fits(book, None, machine, capacity, "the host has for machines")
}

/// Refuses a machine whose ports are not to be had.
pub(super) fn check_ports(network: &Network, machine: &Machine) -> Result<(), Problem> {
    let Some(net) = &machine.spec.net else {
        return Ok(());
    };
    let checked = network.check(machine.id, net);
    checked.map_err(|error| Problem::new(Code::PortTaken, error))
}

/// Refuses a machine that does not fit into its tenant's envelope.
pub(crate) fn check_tenant(
    book: &Book,
    machine: &Machine,
    limit_bytes: Option<u64>,
) -> Result<(), Problem> {
    match limit_bytes {
        None => Ok(()),
        Some(limit) => fits(
            book,
            Some(machine.tenant),
            machine,
            limit,
            "the tenant may have",
        ),
    }
}

fn fits(
    book: &Book,
    of: Option<TenantId>,
    machine: &Machine,
    capacity: u64,
    whose: &str,
) -> Result<(), Problem> {
    let (wanted, promised) = (machine.spec.memory.get(), book.committed(of));
    let free = capacity.saturating_sub(promised);
    if wanted <= free {
        return Ok(());
    }
    let code = match of {
        Some(_) => Code::TenantMemory,
        None => Code::HostMemory,
    };
    Err(Problem::new(
        code,
        format_args!(
            "the machine wants {wanted} bytes, and of the {capacity} that {whose}, {free} are free"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_do_not_overflow() {
        assert_eq!(capacity_bytes(1_000, 80), 800);
        assert_eq!(capacity_bytes(1_000, 250), 2_500);
        assert_eq!(capacity_bytes(u64::MAX, 200), u64::MAX);
    }
}
