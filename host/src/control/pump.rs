//! What data reports, and what control asks of it regularly.

use std::rc::Rc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use super::link::Answered;
use super::{Control, Readiness, deploy, reconcile};
use crate::messages::{FromData, VersionDelta};

/// How often data is asked what it counted.
const COLLECT_EVERY: Duration = Duration::from_secs(1);
/// After how many collections the sums are stored.
const CHECKPOINT_EVERY: u32 = 5;

/// The end of the pump, however it comes: nobody waits for an answer that will not be handed over.
struct Ending(Rc<Control>);

impl Drop for Ending {
    fn drop(&mut self) {
        let control = &self.0;
        control.link.close();
        if control.readiness.get() != Readiness::Stopping {
            tracing::error!("the data plane is gone");
            control.readiness.set(Readiness::DataGone);
        }
    }
}

/// Takes reports until data is gone. Never waits for anything else: data's channel is bounded.
pub(super) async fn pump(control: Rc<Control>, mut reports: mpsc::Receiver<FromData>) {
    let _ending = Ending(Rc::clone(&control));
    while let Some(report) = reports.recv().await {
        match report {
            FromData::Ready { ingress } => control.ingress.set(Some(ingress)),
            FromData::Done { seq, result } => control.link.answer(seq, Answered::Done(result)),
            FromData::Collected { seq, collected } => {
                control.ledger.borrow_mut().absorb(&collected.usage);
                control.volumes.borrow_mut().extend(collected.volumes);
                judge(&control, &collected.versions);
                for (tenant, service) in collected.broken {
                    control.spawn(reconcile::mend(Rc::clone(&control), tenant, service));
                }
                control
                    .link
                    .answer(seq, Answered::Collected(collected.metrics));
            }
            FromData::Logs(records) => control.logs.borrow().take(&records),
        }
    }
}

/// Takes back what lost its trial; that goes on beside the pump.
fn judge(control: &Rc<Control>, versions: &[VersionDelta]) {
    let mut trials = control.trials.borrow_mut();
    trials.absorb(versions);
    for verdict in trials.verdicts(control.uptime()) {
        let background = Rc::clone(control);
        control.spawn(async move {
            if let Err(problem) = deploy::take_back(&background, &verdict).await {
                tracing::error!(
                    service = %verdict.service, problem = problem.detail(), "a bad version stays"
                );
            }
        });
    }
}

/// Collects every second and stores the sums every few.
pub(super) async fn tick(control: Rc<Control>) {
    let mut interval = tokio::time::interval(COLLECT_EVERY);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ticks = 0u32;
    // Whether the followers of events know that the state was stopped.
    let mut told = false;
    loop {
        interval.tick().await;
        if let Err(error) = control.link.collect().await
            && control.readiness.get() == Readiness::Ready
        {
            tracing::warn!(%error, "usage was not collected");
        }
        if !told && let Some(reason) = control.health.stopped() {
            control.events.host_because("host.state_stopped", reason);
            told = true;
        }
        if !control.untold.borrow().is_empty() {
            let background = Rc::clone(&control);
            control.spawn(async move { deploy::tell_again(&background).await });
        }
        ticks = ticks.wrapping_add(1);
        if ticks.is_multiple_of(CHECKPOINT_EVERY)
            && !told
            && let Err(problem) = control.checkpoint().await
        {
            tracing::warn!(
                problem = problem.detail(),
                "usage was not stored; kept for later"
            );
        }
    }
}
