//! From uploaded bytes to a version that serves.
//!
//! ```text
//!  ticket → receive (hash, cap) ─▶ compile in a child ─▶ seal, fsync
//!                                                         │ under the mutation lock
//!                      place blob, place artefact ◀───────┘
//!                      transaction: the commit point
//!                      data: Service, wait for Done ─▶ 201
//! ```
//!
//! A crash before the transaction leaves files that the next start removes; after it, the next
//! start serves the version. Data's refusal takes the activation back.

use std::rc::Rc;
use std::sync::Arc;

use http::StatusCode;
use insula_types::{Digest, ServiceId, TenantId, Traffic, VersionNumber, VolumeId};

use serde_json::{Value, json};

use super::Control;
use super::changes::{Actor, Remember};
use super::compile::{CompileJob, Compiled, Target, Ticket};
use super::documents::{self, Urls};
use super::link::LinkError;
use super::problem::{Code, Problem};
use super::trials::Verdict;
use crate::messages::{IntendedVersion, LogRecord, LogSource, Refusal, ServiceIntent, ToData};
use crate::state::blobs::{Kind, Unplaced};
use crate::state::{Audit, Held, NewVersion, Service};

/// A component whose artefact is there or on its way.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) digest: Digest,
    size_bytes: u64,
    compile_ms: u64,
    component: Unplaced,
    artefact: Option<Unplaced>,
}

/// Compiles an upload unless its artefact is there already, and makes it durable.
pub(crate) async fn prepare(
    control: &Control,
    ticket: &Ticket,
    service: &Service,
    component: Unplaced,
) -> Result<Prepared, Problem> {
    let digest = component.digest();
    let size_bytes = component.size_bytes();
    let target = &control.target;
    let compiled = if has_artefact(control, target, digest).await? {
        None
    } else {
        let tell = |kind| control.events.service(kind, service, None);
        tell("version.queued");
        let begins = || tell("version.compiling");
        let component = component.reader()?;
        Some(compile(control, ticket, target, (digest, component), begins).await?)
    };
    let component = control
        .files
        .run(move |_| component.sync().map(|()| component))
        .await??;
    let compile_ms = compiled.as_ref().map_or(0, |compiled| compiled.compile_ms);
    let artefact = compiled.map(|compiled| compiled.artefact);
    Ok(Prepared {
        digest,
        size_bytes,
        compile_ms,
        component,
        artefact,
    })
}

pub(crate) async fn has_artefact(
    control: &Control,
    target: &Arc<Target>,
    digest: Digest,
) -> Result<bool, Problem> {
    let target = Arc::clone(target);
    let found = control
        .files
        .run(move |files| files.find(Kind::ArtefactFor(&target.engine), &digest))
        .await?;
    Ok(found?.is_some())
}

async fn compile(
    control: &Control,
    ticket: &Ticket,
    target: &Arc<Target>,
    (digest, component): (Digest, std::fs::File),
    begins: impl FnOnce(),
) -> Result<Compiled, Problem> {
    let (raw, sealed) = control
        .files
        .run(|files| files.create().and_then(|a| Ok((a, files.create()?))))
        .await??;
    let job = CompileJob {
        target: Arc::clone(target),
        component,
        digest,
        raw,
        sealed,
    };
    ticket.compile(job, begins).await
}

/// What is to become of a prepared component.
#[derive(Debug)]
pub(crate) struct Commit {
    pub(crate) actor: Actor,
    pub(crate) service: ServiceId,
    pub(crate) activate: bool,
    pub(crate) remember: Option<Remember>,
}

/// Puts a prepared component in its place, commits it as a new version and lets it serve.
/// Answers the document that tells of it.
pub(crate) async fn commit(
    control: &Control,
    commit: Commit,
    prepared: Prepared,
) -> Result<Value, Problem> {
    let Commit {
        actor,
        service,
        activate,
        remember,
    } = commit;
    let Prepared {
        digest,
        size_bytes,
        compile_ms,
        component,
        artefact,
    } = prepared;
    let _mutation = control.mutation.lock().await;
    let placed = control.files.run(move |files| {
        if files.find(Kind::Component, &digest)?.is_none() {
            files.place(Kind::Component, &digest, component)?;
        }
        if let Some(artefact) = artefact {
            files.place(Kind::Artefact, &digest, artefact)?;
        }
        std::io::Result::Ok(files.find(Kind::Artefact, &digest)?.is_some())
    });
    if !placed.await?? {
        // An identical version was there when this one was uploaded, and was deleted since.
        let detail = "an identical version was deleted meanwhile; upload once more";
        return Err(Problem::new(Code::HostBusy, detail).retry_after(1));
    }
    let upload = NewVersion {
        digest,
        size: insula_types::Bytes::new(size_bytes).map_err(|error| Problem::internal(&error))?,
        compile_ms,
    };
    let urls = Urls::new(control);
    let added = control.change(move |store, now| {
        let added = store.add_version(service, &upload, activate, now)?;
        let document = documents::deployed(&urls, &added, activate);
        if let Some(remember) = remember {
            remember.answer(store, StatusCode::CREATED, &document, now)?;
        }
        let audit = actor.service(&added.service, None, Some(document.clone()));
        Ok(((added, document), Some(audit)))
    });
    let (added, document) = match added.await {
        Ok(added) => added,
        Err(problem) => {
            // The service was deleted meanwhile: its files may have no other user.
            control.remove_unreferenced(digest).await;
            return Err(problem);
        }
    };
    control.remove_files(added.unreferenced.clone()).await;
    let number = added.version.number;
    control
        .events
        .service("version.created", &added.service, Some(number));
    if activate {
        bring_into_effect(control, &added.before, &added.service, remember).await?;
        control
            .events
            .service("version.activated", &added.service, Some(number));
    } else if let Err(error) = apply_service(control, &added.service).await {
        // It is stored, and nothing that serves has changed: only its preview is missing.
        tracing::warn!(service = %service, %error, "a version has no preview");
    }
    Ok(document)
}

/// Divides a service's traffic among its versions.
pub(crate) async fn switch(
    control: &Rc<Control>,
    service: &Service,
    traffic: Traffic,
    actor: Actor,
    remember: Option<Remember>,
) -> Result<Service, Problem> {
    let id = service.id;
    for (number, _) in traffic.shares() {
        let found = control.store(move |store| store.version(id, number)).await;
        let version = found.map_err(|problem| unknown_version(problem, number))?;
        ensure_artefact(control, service.tenant, version.digest).await?;
    }
    let _mutation = control.mutation.lock().await;
    let urls = Urls::new(control);
    let switched = control
        .change(move |store, now| {
            let switched = store.set_traffic(id, &traffic)?;
            if let Some(remember) = remember {
                let document = documents::service(&urls, &switched.service);
                remember.answer(store, StatusCode::OK, &document, now)?;
            }
            let audit = traffic_audit(&actor, &switched.before, &switched.service);
            Ok((switched, Some(audit)))
        })
        .await?;
    bring_into_effect(control, &switched.before, &switched.service, remember).await?;
    let after = switched.service;
    let kind = match after.traffic.settled() {
        Some(_) => "version.activated",
        None => "traffic.split",
    };
    control
        .events
        .service(kind, &after, after.traffic.leading());
    Ok(after)
}

fn traffic_audit(actor: &Actor, before: &Service, after: &Service) -> Audit {
    let shares = |service: &Service| json!({"traffic": service.traffic});
    actor.service(after, Some(shares(before)), Some(shares(after)))
}

/// Goes back to a version's predecessor because it lost its trial, unless somebody changed the
/// traffic meanwhile.
pub(crate) async fn take_back(control: &Rc<Control>, verdict: &Verdict) -> Result<(), Problem> {
    let (id, candidate) = (verdict.service, verdict.candidate);
    let service = control.store(move |store| store.service_by_id(id)).await?;
    let number = verdict.predecessor;
    let found = control
        .store(move |store| store.version(id, number))
        .await?;
    ensure_artefact(control, service.tenant, found.digest).await?;
    let _mutation = control.mutation.lock().await;
    let service = control.store(move |store| store.service_by_id(id)).await?;
    let serves = service.traffic.share(candidate).unwrap_or(0) > 0;
    if !serves || service.previous != Some(number) {
        return Ok(());
    }
    let traffic = Traffic::whole(number);
    let because = verdict.reason.clone();
    let switched = control
        .change(move |store, _| {
            let switched = store.set_traffic(id, &traffic)?;
            let actor = Actor::host("automaticRollback");
            let mut audit = traffic_audit(&actor, &switched.before, &switched.service);
            if let Some(after) = &mut audit.after {
                after["reason"] = because.into();
            }
            Ok((switched, Some(audit)))
        })
        .await?;
    bring_into_effect(control, &switched.before, &switched.service, None).await?;
    let (service, reason) = (&switched.service, verdict.reason.as_str());
    tracing::warn!(service = %id, %candidate, predecessor = %number, reason, "rolled back");
    control
        .events
        .service_because("version.rolled_back", service, Some(number), reason);
    control.logs.borrow().take(&[LogRecord {
        service: id,
        version: candidate,
        time: std::time::SystemTime::now(),
        request_id: String::new(),
        source: LogSource::Host,
        text: format!("rolled back to version {number}: {reason}"),
        dropped: 0,
    }]);
    Ok(())
}

/// A version in a document that is not there is a mistake in the document.
fn unknown_version(problem: Problem, number: VersionNumber) -> Problem {
    match problem.code() {
        Code::NotFound => Problem::new(
            Code::UnknownVersion,
            format_args!("there is no version {number}"),
        ),
        _ => problem,
    }
}

/// Tells data about a service whose traffic changed; takes the change back when data
/// refuses it. The mutation lock is held.
async fn bring_into_effect(
    control: &Control,
    before: &Service,
    service: &Service,
    remembered: Option<Remember>,
) -> Result<(), Problem> {
    let Err(error) = apply_service(control, service).await else {
        let mut trials = control.trials.borrow_mut();
        trials.switched(before, service, control.uptime());
        return Ok(());
    };
    let ApplyError::Link(LinkError::Refused(refusal)) = error else {
        return Err(error.into());
    };
    tracing::error!(service = %service.id, %refusal, "data refused a version");
    let (before, after) = (before.clone(), service.clone());
    control
        .change(move |store, _| {
            let restored = store.restore_traffic(&before)?;
            if let Some(remembered) = remembered {
                store.forget(&remembered.key)?;
            }
            let audit = traffic_audit(&Actor::host("takeActivationBack"), &after, &restored);
            Ok(((), Some(audit)))
        })
        .await?;
    Err(Problem::new(
        Code::NotActivated,
        format_args!("what served before still does: {refusal}"),
    ))
}

/// Why data does not know a service as it should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApplyError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("{}", .0.detail())]
    Files(Problem),
}

impl From<ApplyError> for Problem {
    fn from(error: ApplyError) -> Self {
        match error {
            ApplyError::Link(error) => error.into(),
            ApplyError::Files(problem) => {
                let detail = problem.detail();
                tracing::error!(detail, "an artefact cannot be opened");
                let detail =
                    format_args!("{detail}; what is stored takes effect when that is over");
                Problem::new(Code::DataUnavailable, detail).retry_after(1)
            }
        }
    }
}

/// Tells data about a service. Where that takes a file that cannot be opened now, it is tried again
/// every second: what is stored, and acknowledged or not, must not stay unserved until a restart.
pub(crate) async fn apply_service(control: &Control, service: &Service) -> Result<(), ApplyError> {
    let told = tell_service(control, service).await;
    let mut untold = control.untold.borrow_mut();
    if matches!(told, Err(ApplyError::Files(_))) {
        untold.insert(service.id);
    } else {
        untold.remove(&service.id);
    }
    told
}

/// Tells data of what it could not be told before. Not while a change is made: there is a next time.
pub(crate) async fn tell_again(control: &Control) {
    let Ok(_mutation) = control.mutation.try_lock() else {
        return;
    };
    let untold: Vec<ServiceId> = control.untold.borrow().iter().copied().collect();
    for id in untold {
        match control.store(move |store| store.service_by_id(id)).await {
            Ok(service) => match apply_service(control, &service).await {
                Ok(()) => tracing::info!(service = %id, "data knows of it now"),
                Err(error) => tracing::warn!(service = %id, %error, "data does not know of it yet"),
            },
            Err(problem) if problem.code() == Code::NotFound => {
                control.untold.borrow_mut().remove(&id);
            }
            Err(problem) => tracing::warn!(problem = problem.detail(), "a service was not read"),
        }
    }
}

/// The volumes that a service mounts, in its order.
async fn mounts_of(control: &Control, service: &Service) -> Result<Vec<VolumeId>, ApplyError> {
    let (tenant, spec) = (service.tenant_name.clone(), service.spec.clone());
    if spec.used_volumes().next().is_none() {
        return Ok(Vec::new());
    }
    let found = control.store(move |store| {
        let used = spec.used_volumes();
        let ids = used.map(|(name, ..)| store.volume(&tenant, name).map(|volume| volume.id));
        ids.collect()
    });
    found.await.map_err(ApplyError::Files)
}

async fn tell_service(control: &Control, service: &Service) -> Result<(), ApplyError> {
    let intent = intent(control, service).await?;
    let intent = ToData::Service(Box::new(intent));
    Ok(control.link.apply(intent).await?)
}

/// What data is to know of a service, with the artefacts of the versions that it keeps ready. An
/// artefact that is missing matters where its version has a share.
pub(crate) async fn intent(
    control: &Control,
    service: &Service,
) -> Result<ServiceIntent, ApplyError> {
    let held = service.held.clone();
    let opened = control.files.run(move |files| {
        let open = |held: &Held| files.find(Kind::Artefact, &held.digest);
        held.iter()
            .map(|held| open(held).map(|artefact| (*held, artefact)))
            .collect::<std::io::Result<Vec<_>>>()
    });
    let opened = opened
        .await
        .map_err(|error| ApplyError::Files(error.into()))?
        .map_err(|error| ApplyError::Files(error.into()))?;
    let mut versions = Vec::with_capacity(opened.len());
    let mut awaited = Vec::new();
    for (Held { number, digest }, artefact) in opened {
        let serves = service.traffic.share(number).unwrap_or(0) > 0;
        match artefact {
            None if serves => {
                return Err(LinkError::Refused(Refusal::ArtefactMissing(digest)).into());
            }
            None => awaited.push(number),
            artefact => versions.push(IntendedVersion {
                number,
                digest,
                artefact,
            }),
        }
    }
    Ok(ServiceIntent {
        versions,
        awaited,
        ..without_versions(control, service).await?
    })
}

async fn without_versions(
    control: &Control,
    service: &Service,
) -> Result<ServiceIntent, ApplyError> {
    Ok(ServiceIntent {
        id: service.id,
        tenant: service.tenant,
        name: service.name.clone(),
        spec: service.spec.clone(),
        traffic: service.traffic.clone(),
        versions: Vec::new(),
        awaited: Vec::new(),
        mounts: mounts_of(control, service).await?,
    })
}

/// What data is to know of a service as long as there is no code for it.
pub(crate) async fn unserved(control: &Control, service: &Service) -> Result<ToData, ApplyError> {
    let intent = ServiceIntent {
        traffic: Traffic::none(),
        awaited: service.held.iter().map(|held| held.number).collect(),
        ..without_versions(control, service).await?
    };
    Ok(ToData::Service(Box::new(intent)))
}

/// Compiles a stored component again when its artefact is missing: after a new engine, or when
/// it was damaged.
pub(crate) async fn ensure_artefact(
    control: &Rc<Control>,
    tenant: TenantId,
    digest: Digest,
) -> Result<(), Problem> {
    if has_artefact(control, &control.target, digest).await? {
        return Ok(());
    }
    let ticket = control.compilers.enter(tenant)?;
    compile_stored(control, &ticket, &control.target, digest).await
}

/// Compiles a stored component, for this host or for another one.
pub(crate) async fn compile_stored(
    control: &Control,
    ticket: &Ticket,
    target: &Arc<Target>,
    digest: Digest,
) -> Result<(), Problem> {
    let found = control
        .files
        .run(move |files| files.find(Kind::Component, &digest))
        .await??;
    let component = found
        .ok_or_else(|| Problem::internal(&format_args!("the component {digest} is missing")))?;
    let compiled = compile(control, ticket, target, (digest, component), || {}).await?;
    let _mutation = control.mutation.lock().await;
    let target = Arc::clone(target);
    let placed = control.files.run(move |files| {
        files.place(
            Kind::ArtefactFor(&target.engine),
            &digest,
            compiled.artefact,
        )
    });
    Ok(placed.await??)
}
