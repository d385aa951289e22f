//! Compiling what is stored again: after a new engine, where an artefact was damaged, or because an
//! operator asks whether all is there. In the background, one service after the other, each of which is
//! served by what was compiled as soon as it is.
//!
//! For a host with another engine that is to take over ([`crate::handover`]) this one compiles before
//! it does: with the other one's compiler, while it serves and takes changes.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use insula_types::Digest;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::compile::{Target, Ticket};
use super::http_types::PAGE_MAX;
use super::problem::{Code, Problem};
use super::{Control, deploy};
use crate::state::{Page, Service};

/// How long another host may be compiled for before it takes over with what there is. No compilation
/// takes longer than a minute, and the operator can end the other host.
const PREPARE_WITHIN: Duration = Duration::from_secs(3_600);
/// How often it is looked for what was uploaded meanwhile. Somebody may upload without a pause; each round
/// takes as long as the one before had to do, and what is left after the last is little.
const ROUNDS_MAX: u32 = 3;

/// How far it is, in services.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// Of the last recompilation, or of the one that goes on.
    services: usize,
    done: usize,
    failed: usize,
}

impl Progress {
    /// Whether something is left to do.
    pub(crate) const fn goes_on(self) -> bool {
        self.done + self.failed < self.services
    }

    /// With so many more; a new one, where the one before is over.
    fn with(self, services: usize) -> Self {
        let before = if self.goes_on() {
            self
        } else {
            Self::default()
        };
        Self {
            services: before.services + services,
            ..before
        }
    }

    /// Without some that are not tried any more.
    fn without(self, services: usize) -> Self {
        Self {
            services: self.services - services,
            ..self
        }
    }

    fn after(self, outcome: Outcome) -> Self {
        match outcome {
            Outcome::Done => Self {
                done: self.done + 1,
                ..self
            },
            Outcome::Failed => Self {
                failed: self.failed + 1,
                ..self
            },
        }
    }
}

/// What became of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    Failed,
}

impl<T, E> From<&Result<T, E>> for Outcome {
    fn from(result: &Result<T, E>) -> Self {
        match result {
            Ok(_) => Self::Done,
            Err(_) => Self::Failed,
        }
    }
}

impl std::fmt::Display for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            services,
            done,
            failed,
        } = self;
        write!(
            f,
            "{done} of {services} services compiled, {failed} could not be"
        )
    }
}

/// Begins with all that has no artefact for this engine, among the versions that are kept ready;
/// nothing new where one goes on.
pub(crate) async fn begin(control: &Rc<Control>) -> Result<Progress, Problem> {
    if !control.recompilation.get().goes_on() {
        let jobs = without_artefact(control, &control.target).await?;
        control.spawn(in_order(control, jobs, 0));
    }
    Ok(control.recompilation.get())
}

/// What to compile, and of which service.
pub(crate) type Job = (Vec<Digest>, Service);

/// Counts the services at once; the future does the jobs, of which the first so many are what the host
/// needs to be ready.
pub(crate) fn in_order(
    control: &Rc<Control>,
    jobs: Vec<Job>,
    needed: usize,
) -> impl Future<Output = ()> + 'static {
    let mut left = HashMap::new();
    for (_, service) in &jobs {
        *left.entry(service.id).or_insert(0) += 1;
    }
    let progress = &control.recompilation;
    progress.set(progress.get().with(left.len()));
    let control = Rc::clone(control);
    async move {
        let (mut compiled, mut failed) = (HashSet::new(), HashSet::new());
        for (number, (mut digests, one)) in jobs.into_iter().enumerate() {
            if number == needed {
                control.all_is_served();
            }
            // Two services may have the same component.
            digests.retain(|digest| !compiled.contains(digest));
            match service(&control, &one, &digests).await {
                Ok(()) => compiled.extend(digests),
                Err(problem) => {
                    tracing::error!(
                        service = %one.id, problem = problem.detail(), "a service is not served"
                    );
                    let (kind, detail) = ("service.not_compiled", problem.detail());
                    control.events.service_because(kind, &one, None, detail);
                    failed.insert(one.id);
                }
            }
            let Entry::Occupied(mut left) = left.entry(one.id) else {
                continue;
            };
            *left.get_mut() -= 1;
            if *left.get() == 0 {
                left.remove();
                let outcome = match failed.contains(&one.id) {
                    true => Outcome::Failed,
                    false => Outcome::Done,
                };
                let progress = &control.recompilation;
                progress.set(progress.get().after(outcome));
            }
        }
        control.all_is_served();
    }
}

/// Compiles these components of a service, for this host or another.
pub(crate) async fn compile(
    control: &Rc<Control>,
    target: &Arc<Target>,
    stored: &Service,
    digests: &[Digest],
) -> Result<(), Problem> {
    for digest in digests {
        let ticket = wait_for_ticket(control, stored).await?;
        deploy::compile_stored(control, &ticket, target, *digest).await?;
    }
    Ok(())
}

/// Compiles these components of a service, and lets what came of it serve.
pub(crate) async fn service(
    control: &Rc<Control>,
    stored: &Service,
    digests: &[Digest],
) -> Result<(), Problem> {
    compile(control, &control.target, stored, digests).await?;
    let _mutation = control.mutation.lock().await;
    let (tenant, name) = (stored.tenant_name.clone(), stored.name.clone());
    // It may have another version by now, or be gone.
    let now = control
        .store(move |store| store.service(&tenant, &name))
        .await;
    match now {
        Ok(now) => {
            deploy::apply_service(control, &now).await?;
            control.events.service("service.compiled", &now, None);
            Ok(())
        }
        Err(problem) if problem.code() == Code::NotFound => {
            for digest in digests {
                control.remove_unreferenced(*digest).await;
            }
            Ok(())
        }
        Err(problem) => Err(problem),
    }
}

/// Uploads that come in meanwhile go first; this waits for a place among them.
async fn wait_for_ticket(control: &Rc<Control>, service: &Service) -> Result<Ticket, Problem> {
    loop {
        match control.compilers.enter(service.tenant) {
            Err(problem) if matches!(problem.code(), Code::TenantBusy | Code::HostBusy) => {
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            }
            result => return result,
        }
    }
}

/// A host that is to take over from this one.
#[derive(Debug)]
pub(crate) struct Successor {
    pub(crate) target: Arc<Target>,
    /// Told how far it is. Dropped when all is done; closed by who does not wait any more.
    pub(crate) progress: watch::Sender<Progress>,
}

/// Compiles for one after the other.
pub(super) async fn for_successors(
    control: Rc<Control>,
    mut successors: mpsc::Receiver<Successor>,
) {
    while let Some(successor) = successors.recv().await {
        if let Err(problem) = prepare(&control, &successor).await {
            tracing::error!(
                problem = problem.detail(),
                "not everything is compiled for the host that takes over"
            );
        }
    }
}

/// Compiles all that the other host would not have code for, in rounds, until there is nothing new or they
/// are over: uploads go on meanwhile. What cannot be compiled is left out, and said.
async fn prepare(control: &Rc<Control>, successor: &Successor) -> Result<(), Problem> {
    let Successor { target, progress } = successor;
    let until = Instant::now() + PREPARE_WITHIN;
    let engine = target.engine.clone();
    control
        .files
        .run(move |files| files.keep_for(engine))
        .await?;
    let mut tried = HashSet::new();
    for _ in 0..ROUNDS_MAX {
        let mut jobs = without_artefact(control, target).await?;
        jobs.retain(|(digests, _)| digests.iter().any(|digest| !tried.contains(digest)));
        if jobs.is_empty() {
            break;
        }
        let all = &control.recompilation;
        all.set(all.get().with(jobs.len()));
        let mut left = jobs.len();
        for (mut digests, service) in jobs {
            if progress.is_closed() || Instant::now() > until {
                all.set(all.get().without(left));
                tracing::warn!(services = left, "not compiled for the host that takes over");
                return Ok(());
            }
            digests.retain(|digest| tried.insert(*digest));
            let mut outcome = compile(control, target, &service, &digests).await;
            if outcome.is_err() && control.are_gone(&digests).await {
                outcome = Ok(());
            }
            if let Err(problem) = &outcome {
                tracing::error!(
                    service = %service.id, problem = problem.detail(),
                    "a service is not compiled for the host that takes over"
                );
            }
            all.set(all.get().after(Outcome::from(&outcome)));
            progress.send_replace(all.get());
            left -= 1;
        }
    }
    Ok(())
}

async fn without_artefact(control: &Control, target: &Arc<Target>) -> Result<Vec<Job>, Problem> {
    let mut jobs = Vec::new();
    let all = |after| Page {
        after,
        limit: PAGE_MAX,
    };
    let mut tenants = all(None);
    loop {
        let asked = tenants.clone();
        let found = control.store(move |store| store.tenants(&asked)).await?;
        for tenant in found.items {
            let mut services = all(None);
            loop {
                let (asked, name) = (services.clone(), tenant.name.clone());
                let found = control.store(move |store| store.services(&name, &asked));
                let found = found.await?;
                for service in found.items {
                    let digests = missing(control, target, &service).await?;
                    if !digests.is_empty() {
                        jobs.push((digests, service));
                    }
                }
                services = all(found.next);
                if services.after.is_none() {
                    break;
                }
            }
        }
        tenants = all(found.next);
        if tenants.after.is_none() {
            return Ok(jobs);
        }
    }
}

/// The components of a service, among the versions that it keeps ready, that there is no code of.
pub(crate) async fn missing(
    control: &Control,
    target: &Arc<Target>,
    service: &Service,
) -> Result<Vec<Digest>, Problem> {
    let mut digests = Vec::new();
    for held in &service.held {
        if !deploy::has_artefact(control, target, held.digest).await? {
            digests.push(held.digest);
        }
    }
    Ok(digests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_while_one_goes_on_is_part_of_it() {
        let none = Progress::default();
        assert!(!none.goes_on());
        let one = none.with(2).after(Outcome::Done);
        assert!(one.goes_on());
        let more = one.with(1).after(Outcome::Failed);
        assert_eq!(
            more,
            Progress {
                services: 3,
                done: 1,
                failed: 1
            }
        );
        let over = more.after(Outcome::Done);
        assert!(!over.goes_on());
        assert_eq!(over.with(1).services, 1, "a new one counts from nothing");
        assert!(!over.with(0).goes_on());
        assert!(!over.with(2).after(Outcome::Done).without(1).goes_on());
    }
}
