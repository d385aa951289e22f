//! Compiling what is stored again: after a new engine, where an artefact was damaged, or because an
//! operator asks whether all is there. In the background, one service after the other, each of which is
//! served by what was compiled as soon as it is.

use std::rc::Rc;

use insula_types::Digest;
use serde::Serialize;

use super::compile::Ticket;
use super::http_types::PAGE_MAX;
use super::problem::{Code, Problem};
use super::{Control, deploy};
use crate::state::{Page, Service};

/// How far it is, in services.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
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

    fn after(self, outcome: &Result<(), Problem>) -> Self {
        match outcome {
            Ok(()) => Self {
                done: self.done + 1,
                ..self
            },
            Err(_) => Self {
                failed: self.failed + 1,
                ..self
            },
        }
    }
}

/// Begins with all that has no artefact for this engine, among the versions that are kept ready;
/// nothing new where one goes on.
pub(crate) async fn begin(control: &Rc<Control>) -> Result<Progress, Problem> {
    if !control.recompilation.get().goes_on() {
        let jobs = without_artefact(control).await?;
        control.spawn(in_order(control, jobs));
    }
    Ok(control.recompilation.get())
}

type Job = (Vec<Digest>, Service);

/// Counts the jobs at once; the future does them.
pub(crate) fn in_order(
    control: &Rc<Control>,
    jobs: Vec<Job>,
) -> impl Future<Output = ()> + 'static {
    let progress = &control.recompilation;
    progress.set(progress.get().with(jobs.len()));
    let control = Rc::clone(control);
    async move {
        for (digests, one) in jobs {
            let outcome = service(&control, &one, &digests).await;
            if let Err(problem) = &outcome {
                tracing::error!(
                    service = %one.id, problem = problem.detail(), "a service is not served"
                );
            }
            let progress = &control.recompilation;
            progress.set(progress.get().after(&outcome));
        }
    }
}

/// Compiles these components of a service, and lets what came of it serve.
pub(crate) async fn service(
    control: &Rc<Control>,
    stored: &Service,
    digests: &[Digest],
) -> Result<(), Problem> {
    for digest in digests {
        let ticket = wait_for_ticket(control, stored).await?;
        deploy::compile_stored(control, &ticket, *digest).await?;
    }
    let _mutation = control.mutation.lock().await;
    let (tenant, name) = (stored.tenant_name.clone(), stored.name.clone());
    // It may have another version by now, or be gone.
    let now = control
        .store(move |store| store.service(&tenant, &name))
        .await;
    match now {
        Ok(now) => Ok(deploy::apply_service(control, &now).await?),
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

async fn without_artefact(control: &Control) -> Result<Vec<Job>, Problem> {
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
                    let digests = missing(control, &service).await?;
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

async fn missing(control: &Control, service: &Service) -> Result<Vec<Digest>, Problem> {
    let mut digests = Vec::new();
    for held in &service.held {
        if !deploy::has_artefact(control, held.digest).await? {
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
        let one = none.with(2).after(&Ok(()));
        assert!(one.goes_on());
        let more = one.with(1).after(&Err(Problem::internal(&"no")));
        assert_eq!(
            more,
            Progress {
                services: 3,
                done: 1,
                failed: 1
            }
        );
        let over = more.after(&Ok(()));
        assert!(!over.goes_on());
        assert_eq!(over.with(1).services, 1, "a new one counts from nothing");
        assert!(!over.with(0).goes_on());
    }
}
