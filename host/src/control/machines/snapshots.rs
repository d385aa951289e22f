//! Saving a machine, and going on from what was saved.

use std::rc::Rc;

use insula_types::MachineId;
use insula_vmm::life::{Event, Source, State};
use insula_vmm::monitor::protocol::Request;
use tokio::sync::oneshot;

use super::{Control, gone, refused};
use crate::control::problem::{Code, Problem};
use crate::machines::runner::{Ask, SAVING};
use crate::machines::saved::{Saved, SavedError, Saving, Shape};
use crate::machines::start::Begin;
use crate::state::machines::Machine;

/// A machine that is being saved; given back when dropped.
struct Busy<'c>(&'c Control, MachineId);

impl<'c> Busy<'c> {
    fn take(control: &'c Control, id: MachineId) -> Result<Self, Problem> {
        if control.machines.saving.borrow_mut().insert(id) {
            Ok(Self(control, id))
        } else {
            let detail = "the machine is being saved already";
            Err(Problem::new(Code::MachineState, detail))
        }
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.machines.saving.borrow_mut().remove(&self.1);
    }
}

impl Control {
    /// Saves a machine that runs or is paused, in the place of its snapshot before. It is paused
    /// while its memory is written, and runs again while the files are sealed.
    pub(crate) async fn save_machine(&self, machine: &Machine) -> Result<(), Problem> {
        let id = machine.id;
        let _busy = Busy::take(self, id)?;
        let state = self.machines.state(id).ok_or_else(gone)?;
        let runs = match state {
            State::Running { .. } => true,
            State::Paused { .. } => false,
            other => {
                let detail = format!("a machine that is {} has nothing to save", other.word());
                return Err(Problem::new(Code::MachineState, detail));
            }
        };
        if runs {
            self.shift_machine(id, Event::Pause, Request::Pause).await?;
        }
        let written = self.write_machine(machine).await;
        if runs {
            self.shift_machine(id, Event::Resume, Request::Resume)
                .await?;
        }
        let saving = written?;
        let (key, shape) = (self.machines.key.clone(), Shape::of(machine));
        Ok(blocking(move || saving.seal(&key, shape)).await??)
    }

    async fn write_machine(&self, machine: &Machine) -> Result<Saving, Problem> {
        let place = self.machines.places.of(machine.id);
        let (saving, state, memory) = blocking(move || {
            let saving = Saving::begin(&place)?;
            let (state, memory) = saving.files()?;
            std::io::Result::Ok((saving, state, memory))
        })
        .await??;
        let (answer, answered) = oneshot::channel();
        let ask = Ask::Save(state, memory, answer);
        self.ask_machine(machine.id, ask, answered, SAVING).await?;
        let shape = Shape::of(machine);
        let copied = blocking(move || saving.copy_disks(&shape).map(|()| saving)).await?;
        Ok(copied?)
    }

    /// Lets a machine that does not run go on from a snapshot: its own, or that of another one of
    /// its tenant's, which makes it a clone.
    pub(crate) async fn restore_machine(
        self: &Rc<Self>,
        machine: &Machine,
        from: &Machine,
    ) -> Result<(), Problem> {
        self.can_run_machines()?;
        let (id, shape) = (machine.id, Shape::of(machine));
        let state = self.machines.state(id).ok_or_else(gone)?;
        let event = Event::Start(Source::Snapshot);
        state.after(&event).map_err(|error| refused(&error))?;
        let place = self.machines.places.of(from.id);
        let key = self.machines.key.clone();
        let checked = shape.clone();
        let saved = blocking(move || Saved::open(&place, &key, &checked)).await??;
        let place = self.machines.places.of(id);
        self.begin_machine(id, event, async move |machine: &Machine| {
            if Shape::of(machine) != shape {
                return Err(SavedError::Shape.into());
            }
            let put = blocking(move || saved.put_disks(&place).map(|()| saved)).await?;
            let Saved { state, memory, .. } = put?;
            Ok(Begin::Saved { state, memory })
        })
        .await
    }
}

/// Runs what waits for disks or computes for long on a thread of its own.
async fn blocking<T: Send + 'static>(
    job: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Problem> {
    let done = tokio::task::spawn_blocking(job).await;
    done.map_err(|error| Problem::internal(&error))
}

impl From<SavedError> for Problem {
    fn from(error: SavedError) -> Self {
        let code = match error {
            SavedError::Nothing => Code::NoSnapshot,
            SavedError::Broken(_) => Code::SnapshotBroken,
            SavedError::Shape => Code::OtherMachine,
            SavedError::File(error) => return error.into(),
        };
        Self::new(code, error)
    }
}
