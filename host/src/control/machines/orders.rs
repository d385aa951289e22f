//! What is asked of a machine that has a monitor, and waiting for what comes of it.

use std::time::Duration;

use insula_types::MachineId;
use insula_vmm::life::{Event, State};
use insula_vmm::monitor::protocol::{Cause, Request};
use tokio::sync::oneshot;

use super::{Control, END_PATIENCE, ORDER_PATIENCE, START_PATIENCE, gone, refused};
use crate::control::problem::{Code, Problem};
use crate::machines::runner::Ask;

impl Control {
    /// Asks a machine's monitor, and waits for its answer.
    pub(super) async fn order_machine(
        &self,
        id: MachineId,
        request: Request,
    ) -> Result<(), Problem> {
        let (answer, answered) = oneshot::channel();
        let ask = Ask::Order(request, answer);
        self.ask_machine(id, ask, answered, ORDER_PATIENCE).await
    }

    /// Connects a terminal to a machine's console.
    pub(crate) async fn attach_machine(
        &self,
        id: MachineId,
        terminal: std::os::fd::OwnedFd,
    ) -> Result<(), Problem> {
        let (answer, answered) = oneshot::channel();
        let ask = Ask::Console(terminal, answer);
        self.ask_machine(id, ask, answered, ORDER_PATIENCE).await
    }

    pub(super) async fn ask_machine(
        &self,
        id: MachineId,
        ask: Ask,
        answered: oneshot::Receiver<Result<(), String>>,
        patience: Duration,
    ) -> Result<(), Problem> {
        {
            let book = self.machines.book.borrow();
            let entry = book.get(id).ok_or_else(gone)?;
            let Some(runner) = &entry.runner else {
                let state = entry.state().word();
                return Err(Problem::new(
                    Code::MachineState,
                    format_args!("a machine that is {state} has no monitor"),
                ));
            };
            runner.ask(ask);
        }
        match tokio::time::timeout(patience, answered).await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(why))) => Err(Problem::new(Code::MachineState, why)),
            Ok(Err(_)) => Err(Problem::new(
                Code::MachineState,
                "the machine ended before it was done",
            )),
            Err(_) => Err(Problem::new(
                Code::MachineFailed,
                "the machine's monitor did not answer in time",
            )),
        }
    }

    /// Pauses or resumes.
    pub(crate) async fn shift_machine(
        &self,
        id: MachineId,
        event: Event,
        request: Request,
    ) -> Result<(), Problem> {
        let state = self.machines.state(id).ok_or_else(gone)?;
        state.after(&event).map_err(|error| refused(&error))?;
        self.order_machine(id, request).await?;
        if let Some(entry) = self.machines.book.borrow_mut().get_mut(id) {
            // The guest may have ended meanwhile, which is then what counts.
            let _ = entry.ask(&event);
        }
        self.store_life(id).await;
        Ok(())
    }

    /// Ends a machine: by its power button, and after `patience`, or at once with none, by ending
    /// its monitor. Answers when the monitor is gone.
    pub(crate) async fn stop_machine(
        &self,
        id: MachineId,
        patience: Option<Duration>,
    ) -> Result<(), Problem> {
        let over = |state: &State| !state.has_memory();
        let settled = |state: &State| !matches!(state, State::Starting { .. });
        self.expect_machine(id, START_PATIENCE, settled).await?;
        if self.machines.state(id).as_ref().is_some_and(over) {
            // It is not running, which is what was asked for.
            return Ok(());
        }
        let paused = matches!(self.machines.state(id), Some(State::Paused { .. }));
        {
            let mut book = self.machines.book.borrow_mut();
            let entry = book.get_mut(id).ok_or_else(gone)?;
            if !matches!(entry.state(), State::Stopping { .. }) {
                entry.ask(&Event::Stop).map_err(|error| refused(&error))?;
            }
        }
        self.store_life(id).await;
        if let Some(patience) = patience
            && !paused
        {
            let pressed = self.order_machine(id, Request::PowerButton).await;
            if pressed.is_ok() && self.expect_machine(id, patience, over).await.is_ok() {
                return Ok(());
            }
        }
        let cause = Cause::Stopped;
        // Gone already, or on its way: what counts is that it ends.
        let _ = self.order_machine(id, Request::End { cause }).await;
        self.expect_machine(id, END_PATIENCE, over).await
    }

    /// As if the reset button was pressed; answers when the guest runs again.
    pub(crate) async fn reset_machine(&self, id: MachineId) -> Result<(), Problem> {
        let state = self.machines.state(id).ok_or_else(gone)?;
        state
            .after(&Event::Reset)
            .map_err(|error| refused(&error))?;
        let monitor = state.monitor();
        let cause = Cause::Reset;
        self.order_machine(id, Request::End { cause }).await?;
        self.expect_machine(id, START_PATIENCE, move |state| match state {
            State::Starting { .. } => false,
            other => other.monitor() != monitor,
        })
        .await
    }

    /// Waits until a machine's state is as wanted.
    pub(super) async fn expect_machine(
        &self,
        id: MachineId,
        patience: Duration,
        wanted: impl FnMut(&State) -> bool,
    ) -> Result<(), Problem> {
        let mut watch = {
            let book = self.machines.book.borrow();
            book.get(id).ok_or_else(gone)?.watch()
        };
        let waited = tokio::time::timeout(patience, watch.wait_for(wanted)).await;
        match waited {
            Ok(Ok(_)) => Ok(()),
            // The entry was removed, and the machine with it.
            Ok(Err(_)) => Ok(()),
            Err(_) => Err(Problem::new(
                Code::MachineFailed,
                format_args!("nothing came of it within {} s", patience.as_secs()),
            )),
        }
    }
}
