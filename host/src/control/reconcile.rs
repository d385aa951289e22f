//! Making data serve what is intended, at the start.
//!
//! 1. Stored usage becomes the ledger's beginning.
//! 2. Files that nothing refers to are removed.
//! 3. Every tenant and service is sent to data, with its artefact.
//! 4. A service whose artefact is missing (another engine or CPU) or refused (damaged) is sent
//!    without a version; its component is compiled again in the background, and sent again.
//! 5. Data is told to accept connections; when the last compilation is done, the host is ready.

use std::rc::Rc;

use insula_types::{Digest, ServiceName, TenantName, Traffic};

use super::api::volumes;
use super::compile::Ticket;
use super::deploy::{self, ApplyError};
use super::http_types::PAGE_MAX;
use super::link::LinkError;
use super::problem::{Code, Problem};
use super::{Control, Readiness};
use crate::messages::{Refusal, ToData};
use crate::state::{Page, Service, Tenant};

/// Steps 1 to 3; what is left to compile goes on in the background.
pub(super) async fn reconcile(control: &Rc<Control>) -> Result<(), Problem> {
    let stored = control.store(|store| store.usage()).await?;
    control.ledger.borrow_mut().load(stored);
    let stored = control.store(|store| store.machine_usage()).await?;
    control.ledger.borrow_mut().load_machines(stored);
    let referenced = control.digests().await?;
    let removed = control
        .files
        .run(move |files| files.collect_garbage(&referenced))
        .await??;
    if removed > 0 {
        tracing::info!(removed, "removed files that nothing refers to");
    }
    let referenced = control.store(|store| store.volume_directories()).await?;
    let removed = control
        .files
        .run(move |files| files.collect_volumes(&referenced))
        .await??;
    if removed > 0 {
        tracing::info!(removed, "removed volumes that nothing refers to");
    }
    // Before the tenants: of their memory machines have a part.
    super::machines::find(control).await?;
    let mut broken = Vec::new();
    let mut page = Page {
        after: None,
        limit: PAGE_MAX,
    };
    loop {
        let asked = page.clone();
        let tenants = control.store(move |store| store.tenants(&asked)).await?;
        for tenant in tenants.items {
            send_tenant(control, &tenant, &mut broken).await?;
        }
        page.after = tenants.next;
        if page.after.is_none() {
            break;
        }
    }
    control.link.apply(ToData::Open).await?;
    if broken.is_empty() {
        control.readiness.set(Readiness::Ready);
        return Ok(());
    }
    tracing::warn!(
        services = broken.len(),
        "compiling again what has no usable artefact"
    );
    let background = Rc::clone(control);
    control.spawn(async move {
        for service in broken {
            if let Err(problem) = recompile(&background, &service).await {
                tracing::error!(
                    service = %service.id, problem = problem.detail(), "a service is not served"
                );
            }
        }
        if background.readiness.get() == Readiness::Reconciling {
            background.readiness.set(Readiness::Ready);
        }
    });
    Ok(())
}

async fn send_tenant(
    control: &Rc<Control>,
    tenant: &Tenant,
    broken: &mut Vec<Service>,
) -> Result<(), Problem> {
    control.ledger.borrow_mut().add_tenant(tenant.id);
    if let Err(error) = control.link.apply(control.envelope(tenant)).await {
        let LinkError::Refused(refusal) = error else {
            return Err(error.into());
        };
        // For example: fewer workers than before, and the reservations exceed them now.
        tracing::error!(tenant = %tenant.name, %refusal, "data refused a tenant");
    }
    send_volumes(control, tenant).await?;
    let mut page = Page {
        after: None,
        limit: PAGE_MAX,
    };
    loop {
        let (asked, name) = (page.clone(), tenant.name.clone());
        let services = control
            .store(move |store| store.services(&name, &asked))
            .await?;
        for service in services.items {
            send_service(control, service, broken).await?;
        }
        page.after = services.next;
        if page.after.is_none() {
            return Ok(());
        }
    }
}

async fn send_volumes(control: &Rc<Control>, tenant: &Tenant) -> Result<(), Problem> {
    for volume in control.all_volumes(&tenant.name).await? {
        volumes::apply(control, &volume).await?;
    }
    Ok(())
}

async fn send_service(
    control: &Rc<Control>,
    service: Service,
    broken: &mut Vec<Service>,
) -> Result<(), Problem> {
    control
        .ledger
        .borrow_mut()
        .add_service(service.tenant, service.id);
    control.logs.borrow_mut().add_service(service.id);
    match deploy::apply_service(control, &service).await {
        Ok(()) => Ok(()),
        Err(ApplyError::Link(LinkError::Refused(refusal))) => {
            tracing::warn!(service = %service.id, %refusal, "a service is not served yet");
            let dark = Service {
                traffic: Traffic::none(),
                held: Vec::new(),
                ..service.clone()
            };
            if let Err(error) = deploy::apply_service(control, &dark).await {
                tracing::error!(service = %service.id, %error, "data refused a service");
            }
            if matches!(
                refusal,
                Refusal::ArtefactMissing(_) | Refusal::ArtefactRefused { .. }
            ) {
                broken.push(service);
            }
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

async fn recompile(control: &Rc<Control>, broken: &Service) -> Result<(), Problem> {
    // Data does not say which artefact it refused first; all that serve are made again.
    let serving: Vec<Digest> = broken
        .traffic
        .shares()
        .filter(|(_, percent)| *percent > 0)
        .filter_map(|(number, _)| broken.held(number))
        .collect();
    for digest in &serving {
        let ticket = wait_for_ticket(control, broken).await?;
        deploy::compile_stored(control, &ticket, *digest).await?;
    }
    let _mutation = control.mutation.lock().await;
    let (tenant, name) = (broken.tenant_name.clone(), broken.name.clone());
    // It may have another version by now, or be gone.
    let service = control
        .store(move |store| store.service(&tenant, &name))
        .await;
    match service {
        Ok(service) => Ok(deploy::apply_service(control, &service).await?),
        Err(problem) if problem.code() == Code::NotFound => {
            for digest in serving {
                control.remove_unreferenced(digest).await;
            }
            Ok(())
        }
        Err(problem) => Err(problem),
    }
}

/// Compiles what data could not load any more when a request came.
pub(super) async fn mend(control: Rc<Control>, tenant: TenantName, name: ServiceName) {
    tracing::error!(%tenant, service = %name, "its compiled code was damaged; it is compiled again");
    let asked = (tenant.clone(), name.clone());
    let mended = async {
        let service = control
            .store(move |store| store.service(&asked.0, &asked.1))
            .await?;
        recompile(&control, &service).await
    };
    if let Err(problem) = mended.await {
        tracing::error!(
            %tenant, service = %name, problem = problem.detail(), "a service is not served"
        );
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
