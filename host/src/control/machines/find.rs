//! What a start of the host finds: monitors of its predecessor, and what became of the others.

use std::rc::Rc;

use insula_vmm::life::State;

use super::{Control, pump};
use crate::control::problem::Problem;
use crate::machines::book::after_absence;
use crate::machines::runner::{Ended, Origin, Runner};
use crate::state::machines::Machine;

/// Puts every machine that is stored into the book, in the state in which it is.
pub(crate) async fn find(control: &Rc<Control>) -> Result<(), Problem> {
    let machines = control.store(|store| store.all_machines()).await?;
    let mut known = Vec::new();
    for machine in &machines {
        known.push(machine.id);
        let room = &control.machines;
        room.network.know(machine.id, &room.places.of(machine.id));
        let owner = (
            machine.tenant,
            machine.tenant_name.clone(),
            machine.name.clone(),
        );
        let memory = machine.spec.memory;
        control
            .machines
            .book
            .borrow_mut()
            .add(machine.id, owner, memory, machine.life.clone());
        if machine.life.has_memory() {
            look_after(control, machine).await;
        }
    }
    control.machines.network.settle();
    // Directories of machines that were deleted while the host died.
    for id in control.machines.places.all()? {
        if !known.contains(&id)
            && let Err(error) = control.machines.places.of(id).remove()
        {
            tracing::warn!(machine = %id, %error, "a deleted machine's files were not removed");
        }
    }
    Ok(())
}

/// A machine that had a monitor when its state was last stored.
async fn look_after(control: &Rc<Control>, machine: &Machine) {
    let room = &control.machines;
    let place = room.places.of(machine.id);
    match place.connect() {
        Ok(client) => {
            room.network.found(machine.id, &place);
            let found = Origin::Found(client);
            let runner = Runner::start(room.whose(machine), found, room.tells.clone());
            let mut book = room.book.borrow_mut();
            let Some(entry) = book.get_mut(machine.id) else {
                return;
            };
            match runner {
                Ok(runner) => {
                    tracing::info!(tenant = %machine.tenant_name, machine = %machine.name,
                        "a machine ran on while the host was away");
                    entry.runner = Some(runner);
                    // As far as is known until its runner has seen it.
                    entry.found(State::Starting {
                        origin: insula_vmm::life::Origin::Found,
                    });
                }
                Err(error) => tracing::error!(%error, "no thread for a machine that was found"),
            }
        }
        Err(_) => {
            let ended = Ended {
                record: place.record(),
                exit: None,
                seen: None,
            };
            let state = after_absence(&machine.life, ended);
            tracing::info!(tenant = %machine.tenant_name, machine = %machine.name,
                state = state.word(), "a machine ended while the host was away");
            let again = matches!(state, State::Starting { .. });
            if let Some(entry) = room.book.borrow_mut().get_mut(machine.id) {
                entry.found(state);
            }
            control.store_life(machine.id).await;
            if again {
                pump::start_again_soon(control, machine.id);
            }
        }
    }
}
