//! What runners tell: states to store and announce, use to charge, guests that start anew.

use std::rc::Rc;
use std::time::Duration;

use insula_types::MachineId;
use insula_vmm::life::State;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::Control;
use crate::control::problem::Problem;
use crate::machines::book::{Consequence, Used};
use crate::machines::runner::Tell;
use crate::state::machines::{Machine, MachineTotals};

/// A guest that reboots all the time does so once a second.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

/// Takes what runners tell, until the host ends.
pub(crate) async fn pump(
    control: Rc<Control>,
    mut told: mpsc::UnboundedReceiver<(MachineId, Tell)>,
) {
    while let Some((id, tell)) = told.recv().await {
        let consequence = control.machines.book.borrow_mut().tell(id, tell);
        match consequence {
            Consequence::Nothing => {}
            Consequence::Used(used) => control.charge_machine(id, used),
            Consequence::Changed => {
                control.announce_machine(id);
                control.store_life(id).await;
                control.give_back_memory(id);
            }
            Consequence::StartAgain => {
                control.announce_machine(id);
                start_again_soon(&control, id);
            }
        }
    }
}

/// Starts the monitor of a guest that reboots, beside everything else.
pub(super) fn start_again_soon(control: &Rc<Control>, id: MachineId) {
    let background = Rc::clone(control);
    control.spawn(async move {
        if let Err(problem) = start_again(&background, id).await {
            tracing::warn!(machine = %id, problem = problem.detail(),
                "a guest that rebooted does not start");
            background.announce_machine(id);
        }
    });
}

async fn start_again(control: &Rc<Control>, id: MachineId) -> Result<(), Problem> {
    tokio::time::sleep_until(Instant::now() + RESTART_PAUSE).await;
    let machine = control.store(move |store| store.machine_by_id(id)).await?;
    if matches!(control.machines.state(id), Some(State::Starting { .. })) {
        let boot = async |machine: &Machine| control.boot(machine).await;
        control.run_machine(&machine, boot).await?;
    }
    Ok(())
}

impl Control {
    /// Notes what a machine used since it was last looked at.
    fn charge_machine(&self, id: MachineId, used: Used) {
        let book = self.machines.book.borrow();
        let Some(entry) = book.get(id) else {
            return;
        };
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let totals = MachineTotals {
            cpu_ns: nanoseconds(used.cpu),
            wait_ns: nanoseconds(used.waited),
            throttled_ns: nanoseconds(used.throttled),
            memory_kib_ms: used.memory_kib_ms,
            disk_read_bytes: used.disk_read_bytes,
            disk_written_bytes: used.disk_written_bytes,
            net_received_bytes: used.net_received_bytes,
            net_sent_bytes: used.net_sent_bytes,
        };
        let mut ledger = self.ledger.borrow_mut();
        ledger.absorb_machine(entry.tenant, &totals);
    }

    /// Tells whoever follows events.
    pub(crate) fn announce_machine(&self, id: MachineId) {
        let book = self.machines.book.borrow();
        if let Some(entry) = book.get(id) {
            self.events.machine(entry);
        }
    }
}
