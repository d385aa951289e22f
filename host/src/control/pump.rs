//! What data reports, and what control asks of it regularly.

use std::rc::Rc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use super::link::Answered;
use super::{Control, Readiness, deploy, reconcile};
use crate::messages::{DataEvent, FromData, ToData, VersionDelta};

/// How often data is asked what it counted.
const COLLECT_EVERY: Duration = Duration::from_secs(1);
/// After how many collections the sums are stored.
const CHECKPOINT_EVERY: u32 = 5;

/// The end of the pump, however it comes: nobody waits for an answer that will not be handed over.
struct Ending(Rc<Control>);

impl Drop for Ending {
    fn drop(&mut self) {
        let control = &self.0;
        control.link.down(0);
        if control.readiness.get() != Readiness::Stopping {
            tracing::error!("nothing keeps the data plane any more");
            control.readiness.set(Readiness::DataGone);
        }
    }
}

/// Takes what is heard of data until its keeper is gone. Never waits for anything else: data's
/// channel is bounded.
pub(super) async fn pump(control: Rc<Control>, mut events: mpsc::Receiver<DataEvent>) {
    let _ending = Ending(Rc::clone(&control));
    while let Some(event) = events.recv().await {
        match event {
            DataEvent::Up { commands, walls } => {
                control.link.up(commands);
                control.walls.replace(walls);
                // The first is told by the start, which fails where it cannot be.
                if control.link.restarts() > 0 {
                    reconcile::tell_again(&control);
                }
            }
            DataEvent::Says(report) => take(&control, report),
            DataEvent::Inherited(usage) => {
                control.ledger.borrow_mut().absorb(&usage);
                let background = Rc::clone(&control);
                control.spawn(async move { recount(&background).await });
            }
            DataEvent::Down { cpu_ns } => {
                control.link.down(cpu_ns);
                if control.readiness.get() != Readiness::Stopping {
                    control.readiness.set(Readiness::DataGone);
                    let reason = "it is started again; requests that it had are lost";
                    control.events.host_because("host.data_died", reason);
                }
            }
        }
    }
}

/// The last requests of the host that was here may have written to volumes.
async fn recount(control: &Control) {
    if let Err(error) = control.link.apply(ToData::Recount).await {
        tracing::warn!(%error, "volumes are counted anew at the next start only");
    }
}

fn take(control: &Rc<Control>, report: FromData) {
    match report {
        FromData::Done { seq, result } => control.link.answer(seq, Answered::Done(result)),
        FromData::Collected { seq, collected } => {
            control.ledger.borrow_mut().absorb(&collected.usage);
            control.volumes.borrow_mut().extend(collected.volumes);
            judge(control, &collected.versions);
            for (tenant, service) in collected.broken {
                control.spawn(reconcile::mend(Rc::clone(control), tenant, service));
            }
            control
                .link
                .answer(seq, Answered::Collected(collected.metrics));
        }
        FromData::Logs(records) => control.logs.borrow().take(&records),
        // Its keeper has heard these.
        FromData::Ready(_) | FromData::Failed(_) | FromData::Asks { .. } => {}
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
    let mut certificate = 0;
    // Whether the followers of events know that the state was stopped.
    let mut told = false;
    loop {
        interval.tick().await;
        if let Err(error) = control.link.collect().await
            && control.readiness.get() == Readiness::Ready
        {
            tracing::warn!(%error, "usage was not collected");
        }
        certificate = hand_over_certificate(&control, certificate).await;
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

/// Gives data the ingress' certificate when it is another than the last time.
async fn hand_over_certificate(control: &Control, last: u64) -> u64 {
    let Some(certificate) = &control.config.ingress_certificate else {
        return last;
    };
    let (generation, pem) = certificate.pem();
    if generation == last {
        return last;
    }
    // A data plane that is started meanwhile gets it from its keeper.
    match control.link.apply(ToData::Certificate(pem)).await {
        Ok(()) => generation,
        Err(error) => {
            tracing::warn!(%error, "the new certificate is not in use yet");
            last
        }
    }
}
