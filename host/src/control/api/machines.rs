//! Machines.

use std::os::unix::net::UnixStream as StdStream;
use std::rc::Rc;
use std::time::Duration;

use http::StatusCode;
use http::header::{CONNECTION, LOCATION, UPGRADE};
use hyper_util::rt::TokioIo;
use insula_types::MachineSpec;
use insula_vmm::life::Event;
use insula_vmm::monitor::protocol::Request;
use serde_json::json;

use super::streams::{Place, ended};
use crate::control::changes::{Actor, optional};
use crate::control::http_types::{Call, Reply, list};
use crate::control::machines::{STOP_PATIENCE, refused};
use crate::control::problem::{Answer, Code, Problem};
use crate::control::{Control, documents};
use crate::state::machines::Machine;
use crate::state::{Put, Timestamp};

/// What a console's connection is upgraded to: bytes both ways.
const CONSOLE_PROTOCOL: &str = "insula-console";
/// Nobody waits longer for a guest to shut down.
const STOP_PATIENCE_MAX_S: u32 = 600;

impl Control {
    /// The machine that a path names.
    async fn machine_of(&self, call: &Call) -> Result<Machine, Problem> {
        let (tenant, name) = (call.tenant()?, call.machine()?);
        self.store(move |store| {
            store.tenant(&tenant)?;
            store.machine(&tenant, &name)
        })
        .await
    }

    fn show(&self, machine: &Machine) -> serde_json::Value {
        let book = self.machines.book.borrow();
        let mut document =
            documents::machine(machine, book.get(machine.id), &self.machines.network);
        let saved = self.machines.places.of(machine.id).saved_at();
        document["snapshot_at"] = json!(saved.map(Timestamp::from));
        document
    }
}

pub(crate) async fn index(control: Rc<Control>, call: Call) -> Answer {
    let (tenant, page) = (call.tenant()?, call.page()?);
    let machines = control
        .store(move |store| store.machines(&tenant, &page))
        .await?;
    let items = machines.items.iter().map(|one| control.show(one)).collect();
    Ok(list(items, machines.next))
}

pub(crate) async fn get(control: Rc<Control>, call: Call) -> Answer {
    let machine = control.machine_of(&call).await?;
    Ok(Reply::ok(&control.show(&machine)).etag(machine.generation))
}

/// What is put counts from the next start on.
pub(crate) async fn put(control: Rc<Control>, mut call: Call) -> Answer {
    let (tenant, name) = (call.tenant()?, call.machine()?);
    let precondition = call.precondition()?;
    let actor = call.actor()?;
    let spec: MachineSpec = call
        .spec(name.as_str(), documents::MACHINE_READ_ONLY)
        .await?;
    let _mutation = control.mutation.lock().await;
    let put = control
        .change(move |store, now| {
            let before = optional(store.machine(&tenant, &name))?;
            let put = store.put_machine(&tenant, &name, &spec, precondition, now)?;
            let before = before.as_ref().map(documents::machine_record);
            let after = Some(documents::machine_record(put.record()));
            let audit = put.is_change();
            let audit = audit.then(|| actor.machine(put.record(), before, after));
            Ok((put, audit))
        })
        .await?;
    let machine = put.record();
    if let Put::Created(_) = put {
        let owner = (
            machine.tenant,
            machine.tenant_name.clone(),
            machine.name.clone(),
        );
        let mut book = control.machines.book.borrow_mut();
        book.add(machine.id, owner, machine.spec.memory, machine.life.clone());
    }
    let document = control.show(machine);
    let reply = match &put {
        Put::Created(_) => {
            control.announce_machine(machine.id);
            Reply::json(StatusCode::CREATED, &document).header(LOCATION, &call.path)
        }
        Put::Changed(machine) => {
            control.events.machine_spec("machine.updated", machine);
            Reply::ok(&document)
        }
        Put::Unchanged(_) => Reply::ok(&document),
    };
    Ok(reply.etag(machine.generation))
}

/// A machine that runs is deleted with `force` only: its guest is not asked.
pub(crate) async fn delete(control: Rc<Control>, call: Call) -> Answer {
    let machine = control.machine_of(&call).await?;
    let precondition = call.precondition()?;
    let actor = call.actor()?;
    if call.flag("force", false)? {
        control.stop_machine(machine.id, None).await?;
    }
    // No machine starts while it is held.
    let _mutation = control.mutation.lock().await;
    if let Some(state) = control.machines.state(machine.id) {
        state
            .after(&Event::Delete)
            .map_err(|error| refused(&error))?;
    }
    let (tenant, name) = (machine.tenant_name.clone(), machine.name.clone());
    let deleted = control
        .change(move |store, _| {
            let deleted = store.delete_machine(&tenant, &name, precondition)?;
            let before = documents::machine_record(&deleted.record);
            let audit = actor.machine(&deleted.record, Some(before), None);
            Ok((deleted, Some(audit)))
        })
        .await?;
    control.forget_machine(&deleted.record);
    control.remove_files(deleted.unreferenced).await;
    Ok(Reply::no_content())
}

/// What was asked of a machine is done, which the audit log is told.
async fn done(control: &Control, actor: Actor, machine: &Machine) -> Answer {
    let subject = machine.clone();
    control
        .change(move |_, _| Ok(((), Some(actor.machine(&subject, None, None)))))
        .await?;
    Ok(Reply::ok(&control.show(machine)))
}

pub(crate) async fn start(control: Rc<Control>, call: Call) -> Answer {
    let (machine, actor) = (control.machine_of(&call).await?, call.actor()?);
    control.start_machine(machine.id).await?;
    done(&control, actor, &machine).await
}

pub(crate) async fn stop(control: Rc<Control>, call: Call) -> Answer {
    let (machine, actor) = (control.machine_of(&call).await?, call.actor()?);
    let seconds = call.number("timeout_seconds", STOP_PATIENCE_MAX_S)?;
    let patience = match (call.flag("force", false)?, seconds) {
        (true, _) => None,
        (false, None) => Some(STOP_PATIENCE),
        (false, Some(seconds)) => Some(Duration::from_secs(seconds.into())),
    };
    control.stop_machine(machine.id, patience).await?;
    done(&control, actor, &machine).await
}

pub(crate) async fn pause(control: Rc<Control>, call: Call) -> Answer {
    let (machine, actor) = (control.machine_of(&call).await?, call.actor()?);
    let (event, request) = (Event::Pause, Request::Pause);
    control.shift_machine(machine.id, event, request).await?;
    done(&control, actor, &machine).await
}

pub(crate) async fn resume(control: Rc<Control>, call: Call) -> Answer {
    let (machine, actor) = (control.machine_of(&call).await?, call.actor()?);
    let (event, request) = (Event::Resume, Request::Resume);
    control.shift_machine(machine.id, event, request).await?;
    done(&control, actor, &machine).await
}

pub(crate) async fn reset(control: Rc<Control>, call: Call) -> Answer {
    let (machine, actor) = (control.machine_of(&call).await?, call.actor()?);
    control.reset_machine(machine.id).await?;
    done(&control, actor, &machine).await
}

pub(crate) async fn snapshot(control: Rc<Control>, call: Call) -> Answer {
    let (machine, actor) = (control.machine_of(&call).await?, call.actor()?);
    control.save_machine(&machine).await?;
    done(&control, actor, &machine).await
}

pub(crate) async fn restore(control: Rc<Control>, call: Call) -> Answer {
    let (machine, actor) = (control.machine_of(&call).await?, call.actor()?);
    let from = match call.parameter("from") {
        None => machine.clone(),
        Some(name) => {
            let tenant = call.tenant()?;
            let bad = |error| Problem::new(Code::BadRequest, format_args!("from: {error}"));
            let name = name.parse().map_err(bad)?;
            control
                .store(move |store| store.machine(&tenant, &name))
                .await?
        }
    };
    control.restore_machine(&machine, &from).await?;
    done(&control, actor, &machine).await
}

/// Upgrades the connection to the machine's console: what was printed last comes first.
pub(crate) async fn console(control: Rc<Control>, mut call: Call) -> Answer {
    let machine = control.machine_of(&call).await?;
    let asked = call.headers.get(UPGRADE);
    let upgrade = call.upgrade.take();
    let (Some(upgrade), true) = (
        upgrade,
        asked.is_some_and(|value| value == CONSOLE_PROTOCOL),
    ) else {
        return Err(Problem::new(
            Code::UpgradeNeeded,
            format_args!("a console needs Connection: upgrade and Upgrade: {CONSOLE_PROTOCOL}"),
        ));
    };
    let place = Place::take(&control)?;
    let ended = ended(&control, call.caller()?.token);
    let (here, there) = StdStream::pair()?;
    control.attach_machine(machine.id, there.into()).await?;
    here.set_nonblocking(true)?;
    let mut here = tokio::net::UnixStream::from_std(here)?;
    control.spawn(async move {
        let _place = place;
        let Ok(upgraded) = upgrade.await else {
            // The client went away before the answer reached it.
            return;
        };
        let mut there = TokioIo::new(upgraded);
        // Each branch may be cut anywhere: what is under way is bytes of a terminal.
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut here, &mut there) => {}
            () = ended => {}
        }
    });
    Ok(Reply::switching_protocols()
        .header(CONNECTION, "upgrade")
        .header(UPGRADE, CONSOLE_PROTOCOL))
}
