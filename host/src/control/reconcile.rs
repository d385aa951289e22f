//! Making data serve what is intended: at the start, and when data was started again.
//!
//! 1. Stored usage becomes the ledger's beginning.
//! 2. Files that nothing refers to are removed; machines that run are found.
//! 3. Every tenant, volume and service is sent to data, with its directory or artefact.
//! 4. A service whose artefact is missing (another engine or CPU) or refused (damaged) is sent
//!    without a version; its component is compiled again in the background, and sent again.
//! 5. Data is told to accept connections; when the last of these is compiled ([`recompile`]), the host
//!    is ready. After them it is the turn of versions that answer under their preview names only.
//!
//! A host that takes over from another one finds everything compiled, but for what was uploaded in the
//! last moment, or could not be compiled. That it tries before it accepts, since the other one still
//! serves: for a while ([`BEFORE_IT_ACCEPTS`]), and then as above.
//!
//! For a data plane that was started again it is 3 to 5. Changes go on meanwhile up to their commit,
//! and are sent when all is told: what was read here before that commit is old, and is put right.

use std::rc::Rc;
use std::time::Duration;

use insula_types::{Digest, ServiceName, TenantName};
use tokio::time::Instant;

use super::api::volumes;
use super::deploy::{self, ApplyError};
use super::http_types::PAGE_MAX;
use super::link::{Life, LinkError};
use super::problem::{Code, Problem};
use super::recompile::Job;
use super::{Control, Readiness, recompile};
use crate::messages::{Refusal, ToData};
use crate::state::{Page, Service, Tenant};

/// How long a host that takes over from another begins to compile what is missing before it accepts. The
/// admin API is away meanwhile.
const BEFORE_IT_ACCEPTS: Duration = Duration::from_secs(30);

/// Steps 1 and 2, once; then the others, until a data plane knows everything.
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
    let inherits = control.config.inherits;
    let patience = inherits.then(|| Instant::now() + BEFORE_IT_ACCEPTS);
    loop {
        let life = control.link.alive().await;
        match tell(control, life, patience).await {
            // It died of it, perhaps; its keeper starts others, and says so.
            Err(problem) if problem.code() == Code::DataUnavailable => {}
            told => return told,
        }
    }
}

/// Tells a data plane that was started again, in the background. While that goes on, changes wait.
pub(super) fn tell_again(control: &Rc<Control>) {
    let background = Rc::clone(control);
    control.spawn(async move {
        let life = background.link.alive().await;
        while let Err(problem) = tell(&background, life, None).await {
            if !background.link.is(life) {
                // Another task does this for the next one.
                return;
            }
            tracing::error!(problem = problem.detail(), "cannot tell data what to serve");
            tokio::time::sleep(TELL_PAUSE).await;
        }
    });
}

/// Pause before another attempt to read the state.
const TELL_PAUSE: std::time::Duration = std::time::Duration::from_secs(1);

/// What data was told without its code.
#[derive(Debug, Default)]
struct Left {
    /// Until when it is compiled at once.
    patience: Option<Instant>,
    /// Services that cannot be served.
    broken: Vec<Service>,
    /// Those that are served, and have versions that are not.
    incomplete: Vec<Service>,
}

/// Steps 3 to 5; what is left to compile goes on in the background.
async fn tell(control: &Rc<Control>, life: Life, patience: Option<Instant>) -> Result<(), Problem> {
    let mut left = Left {
        patience,
        ..Left::default()
    };
    let mut page = Page {
        after: None,
        limit: PAGE_MAX,
    };
    loop {
        let asked = page.clone();
        let tenants = control.store(move |store| store.tenants(&asked)).await?;
        for tenant in tenants.items {
            send_tenant(control, life, &tenant, &mut left).await?;
        }
        page.after = tenants.next;
        if page.after.is_none() {
            break;
        }
    }
    control.link.tell(life, ToData::Open).await?;
    control.link.opened(life);
    if control.readiness.get() == Readiness::Stopping {
        return Ok(());
    }
    control.readiness.set(Readiness::Reconciling);
    if left.broken.is_empty() {
        control.all_is_served();
    }
    let (serve, preview) = jobs(control, left).await?;
    if serve.is_empty() && preview.is_empty() {
        return Ok(());
    }
    tracing::warn!(
        services = serve.len(),
        previews = preview.len(),
        "compiling again what has no usable artefact"
    );
    let needed = serve.len();
    let jobs = serve.into_iter().chain(preview).collect();
    control.spawn(recompile::in_order(control, jobs, needed));
    Ok(())
}

/// What has to be compiled that serves, and what does not.
async fn jobs(control: &Rc<Control>, left: Left) -> Result<(Vec<Job>, Vec<Job>), Problem> {
    // Data does not say which artefact it refused first; all that serve are made again.
    let serve = left.broken.iter();
    let serve = serve.map(|service| (serving(service), service.clone()));
    let serve: Vec<Job> = serve.collect();
    let mut preview = Vec::new();
    for service in left.broken.into_iter().chain(left.incomplete) {
        let mut digests = recompile::missing(control, &control.target, &service).await?;
        let first = serving(&service);
        digests.retain(|digest| !first.contains(digest));
        if !digests.is_empty() {
            preview.push((digests, service));
        }
    }
    Ok((serve, preview))
}

async fn send_tenant(
    control: &Rc<Control>,
    life: Life,
    tenant: &Tenant,
    left: &mut Left,
) -> Result<(), Problem> {
    control.ledger.borrow_mut().add_tenant(tenant.id);
    if let Err(error) = control.link.tell(life, control.envelope(tenant)).await {
        let LinkError::Refused(refusal) = error else {
            return Err(error.into());
        };
        // For example: fewer workers than before, and the reservations exceed them now.
        tracing::error!(tenant = %tenant.name, %refusal, "data refused a tenant");
    }
    send_volumes(control, life, tenant).await?;
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
            send_service(control, life, service, left).await?;
        }
        page.after = services.next;
        if page.after.is_none() {
            return Ok(());
        }
    }
}

async fn send_volumes(control: &Rc<Control>, life: Life, tenant: &Tenant) -> Result<(), Problem> {
    for volume in control.all_volumes(&tenant.name).await? {
        let intent = volumes::intent(control, &volume).await?;
        control.link.tell(life, intent).await?;
    }
    Ok(())
}

async fn send_service(
    control: &Rc<Control>,
    life: Life,
    service: Service,
    left: &mut Left,
) -> Result<(), Problem> {
    control
        .ledger
        .borrow_mut()
        .add_service(service.tenant, service.id);
    control.logs.borrow_mut().add_service(service.id);
    let mut told = tell_service(control, life, &service).await;
    if left.patience.is_some_and(|until| Instant::now() < until) && has_no_code(&told) {
        let digests = serving(&service);
        let compiled = recompile::compile(control, &control.target, &service, &digests);
        match compiled.await {
            Ok(()) => told = tell_service(control, life, &service).await,
            Err(problem) => tracing::error!(
                service = %service.id, problem = problem.detail(), "a service has no code"
            ),
        }
    }
    match told {
        Ok(Told::Whole) => Ok(()),
        Ok(Told::WithoutPreviews) => {
            left.incomplete.push(service);
            Ok(())
        }
        Err(ApplyError::Link(LinkError::Refused(ref refusal))) => {
            tracing::warn!(service = %service.id, %refusal, "a service is not served yet");
            let unserved = deploy::unserved(control, &service).await?;
            if let Err(error) = control.link.tell(life, unserved).await {
                tracing::error!(service = %service.id, %error, "data refused a service");
            }
            if has_no_code(&told) {
                left.broken.push(service);
            }
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// What data knows of a service now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Whole,
    WithoutPreviews,
}

fn has_no_code(told: &Result<Told, ApplyError>) -> bool {
    let Err(ApplyError::Link(LinkError::Refused(refusal))) = told else {
        return false;
    };
    matches!(
        refusal,
        Refusal::ArtefactMissing(_) | Refusal::ArtefactRefused { .. }
    )
}

async fn tell_service(
    control: &Control,
    life: Life,
    service: &Service,
) -> Result<Told, ApplyError> {
    let intent = deploy::intent(control, service).await?;
    let told = if intent.awaited.is_empty() {
        Told::Whole
    } else {
        Told::WithoutPreviews
    };
    control
        .link
        .tell(life, ToData::Service(Box::new(intent)))
        .await?;
    Ok(told)
}

/// The components of what serves.
fn serving(service: &Service) -> Vec<Digest> {
    let shares = service.traffic.shares();
    let serve = shares.filter(|(_, percent)| *percent > 0);
    serve
        .filter_map(|(number, _)| service.held(number))
        .collect()
}

/// Compiles what data could not load any more when a request came.
pub(super) async fn mend(control: Rc<Control>, tenant: TenantName, name: ServiceName) {
    tracing::error!(%tenant, service = %name, "its compiled code was damaged; it is compiled again");
    let asked = (tenant.clone(), name.clone());
    let mended = async {
        let service = control
            .store(move |store| store.service(&asked.0, &asked.1))
            .await?;
        recompile::service(&control, &service, &serving(&service)).await
    };
    if let Err(problem) = mended.await {
        tracing::error!(
            %tenant, service = %name, problem = problem.detail(), "a service is not served"
        );
    }
}
