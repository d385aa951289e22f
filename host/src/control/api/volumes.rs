//! Volumes.

use std::rc::Rc;
use std::time::Duration;

use http::StatusCode;
use http::header::LOCATION;
use insula_types::{TenantName, VolumeName, VolumeSpec};
use serde_json::Value;

use crate::control::changes::optional;
use crate::control::http_types::{Call, Reply, list};
use crate::control::link::LinkError;
use crate::control::problem::{Answer, Code, Problem};
use crate::control::{Control, documents, idempotency};
use crate::messages::{Refusal, ToData};
use crate::process::walls;
use crate::state::volumes::VolumeDirectory;
use crate::state::{NewVolume, Page, Precondition, Put, VOLUMES_PER_TENANT_MAX, Volume};
use crate::storage::hand_over;

/// How long a copy may take.
const COPY_TIMEOUT: Duration = Duration::from_secs(600);

/// What data is to know of a volume, with its directory.
pub(crate) async fn intent(control: &Control, volume: &Volume) -> Result<ToData, Problem> {
    let directory = volume.directory.clone();
    let owner = walls::owner_of_files(&control.walls.borrow());
    let opened = control
        .files
        .run(move |files| hand_over(files.open_volume(&directory)?, owner))
        .await??;
    Ok(ToData::Volume {
        id: volume.id,
        tenant: volume.tenant,
        spec: volume.spec,
        directory: opened,
    })
}

/// Tells data of a volume.
async fn apply(control: &Control, volume: &Volume) -> Result<(), Problem> {
    let intent = intent(control, volume).await?;
    Ok(control.link.apply(intent).await?)
}

/// Removes the directories of volumes whose records are gone.
pub(crate) async fn remove(control: &Control, directories: Vec<VolumeDirectory>) {
    for directory in directories {
        let removed = control
            .files
            .run(move |files| files.remove_volume(directory.as_str()));
        if let Ok(Err(error)) = removed.await {
            tracing::warn!(%error, "a deleted volume is removed at the next start");
        }
    }
}

pub(crate) fn new_directory() -> Result<VolumeDirectory, Problem> {
    VolumeDirectory::random().map_err(|error| Problem::internal(&error))
}

/// Tells data of a volume that was stored, and answers its document; where it was not stored, its new
/// directory goes again.
async fn take_effect(
    control: &Control,
    put: Result<Put<Volume>, Problem>,
    directory: VolumeDirectory,
) -> Result<(Put<Volume>, Value), Problem> {
    let put = match put {
        Ok(put) => put,
        Err(problem) => {
            remove(control, vec![directory]).await;
            return Err(problem);
        }
    };
    apply(control, put.record()).await?;
    fresh_usage(control).await;
    let document = document(control, put.record());
    Ok((put, document))
}

/// What data has counted by now.
async fn fresh_usage(control: &Control) {
    if let Err(error) = control.link.collect().await {
        tracing::debug!(%error, "what volumes hold is as it was counted before");
    }
}

fn document(control: &Control, volume: &Volume) -> Value {
    let used = control.volumes.borrow().get(&volume.id).copied();
    documents::volume(volume, used)
}

impl Control {
    /// All volumes of a tenant: there are few.
    pub(crate) async fn all_volumes(&self, tenant: &TenantName) -> Result<Vec<Volume>, Problem> {
        let name = tenant.clone();
        let page = Page {
            after: None,
            limit: u32::try_from(VOLUMES_PER_TENANT_MAX).unwrap_or(u32::MAX),
        };
        let volumes = self.store(move |store| store.volumes(&name, &page)).await?;
        Ok(volumes.items)
    }
}

pub(crate) async fn index(control: Rc<Control>, call: Call) -> Answer {
    let (tenant, page) = (call.tenant()?, call.page()?);
    let volumes = control
        .store(move |store| store.volumes(&tenant, &page))
        .await?;
    fresh_usage(&control).await;
    let items = volumes.items.iter().map(|one| document(&control, one));
    Ok(list(items.collect(), volumes.next))
}

async fn find(control: &Control, tenant: TenantName, name: VolumeName) -> Result<Volume, Problem> {
    control
        .store(move |store| {
            store.tenant(&tenant)?;
            store.volume(&tenant, &name)
        })
        .await
}

pub(crate) async fn get(control: Rc<Control>, call: Call) -> Answer {
    let volume = find(&control, call.tenant()?, call.volume()?).await?;
    fresh_usage(&control).await;
    Ok(Reply::ok(&document(&control, &volume)).etag(volume.generation))
}

pub(crate) async fn put(control: Rc<Control>, mut call: Call) -> Answer {
    let (tenant, name) = (call.tenant()?, call.volume()?);
    let precondition = call.precondition()?;
    let actor = call.actor()?;
    let spec: VolumeSpec = call
        .spec(name.as_str(), documents::VOLUME_READ_ONLY)
        .await?;
    let directory = new_directory()?;
    let _mutation = control.mutation.lock().await;
    let (owner, wanted) = (tenant.clone(), name.clone());
    let known = control
        .store(move |store| optional(store.volume(&owner, &wanted)))
        .await?;
    if known.is_none() {
        // Before its record: what is left of a crash in between is removed at the next start.
        let made = directory.clone();
        control
            .files
            .run(move |files| files.make_volume(&made).map(drop))
            .await??;
    }
    let new = NewVolume {
        spec,
        directory: directory.clone(),
        read_only: false,
        origin: None,
    };
    let put = control.change(move |store, now| {
        let before = optional(store.volume(&tenant, &name))?;
        let put = store.put_volume(&tenant, &name, &new, precondition, now)?;
        let before = before.map(|volume| documents::volume(&volume, None));
        let after = Some(documents::volume(put.record(), None));
        let audit = put
            .is_change()
            .then(|| actor.volume(put.record(), before, after));
        Ok((put, audit))
    });
    let (put, document) = take_effect(&control, put.await, directory).await?;
    let volume = put.record();
    let reply = match &put {
        Put::Created(_) => {
            control.events.volume("volume.created", volume);
            Reply::json(StatusCode::CREATED, &document).header(LOCATION, &call.path)
        }
        Put::Changed(_) => {
            control.events.volume("volume.updated", volume);
            Reply::ok(&document)
        }
        Put::Unchanged(_) => Reply::ok(&document),
    };
    Ok(reply.etag(volume.generation))
}

pub(crate) async fn delete(control: Rc<Control>, call: Call) -> Answer {
    let (tenant, name) = (call.tenant()?, call.volume()?);
    let precondition = call.precondition()?;
    let actor = call.actor()?;
    let _mutation = control.mutation.lock().await;
    let volume = control
        .change(move |store, _| {
            let volume = store.delete_volume(&tenant, &name, precondition)?;
            let before = documents::volume(&volume, None);
            let audit = actor.volume(&volume, Some(before), None);
            Ok((volume, Some(audit)))
        })
        .await?;
    let applied = control.link.apply(ToData::DropVolume(volume.id)).await;
    control.volumes.borrow_mut().remove(&volume.id);
    remove(&control, vec![volume.directory.clone()]).await;
    control.events.volume("volume.deleted", &volume);
    applied?;
    Ok(Reply::no_content())
}

pub(crate) async fn snapshot(control: Rc<Control>, call: Call) -> Answer {
    copy(control, call, "volume.snapshot", true).await
}

pub(crate) async fn clone(control: Rc<Control>, call: Call) -> Answer {
    copy(control, call, "volume.cloned", false).await
}

/// The name in the document of a copy.
fn name_of(document: &serde_json::Map<String, Value>) -> Result<VolumeName, Problem> {
    let invalid = |detail: String| Problem::new(Code::InvalidSpec, detail);
    let name = match document.get("name") {
        Some(Value::String(name)) if document.len() == 1 => name,
        _ => {
            return Err(invalid(
                "the document is {\"name\": …} and nothing else".to_owned(),
            ));
        }
    };
    name.parse()
        .map_err(|error: insula_types::name::NameError| invalid(format!("name: {error}")))
}

/// Why a volume was not copied.
pub(crate) enum CopyFailed {
    /// Data did not.
    Told(LinkError),
    /// There is no directory for it.
    Files(Problem),
}

impl From<Problem> for CopyFailed {
    fn from(problem: Problem) -> Self {
        Self::Files(problem)
    }
}

/// Copies what a volume holds at this moment into a new directory, which is gone again if that fails.
pub(crate) async fn copy_into(
    control: &Control,
    source: &Volume,
    directory: &VolumeDirectory,
) -> Result<(), CopyFailed> {
    let made = directory.clone();
    let owner = walls::owner_of_files(&control.walls.borrow());
    let opened = control
        .files
        .run(move |files| hand_over(files.make_volume(&made)?, owner));
    let opened = opened
        .await
        .map_err(Problem::from)?
        .map_err(Problem::from)?;
    let asked = ToData::CopyVolume {
        from: source.id,
        to: opened,
        spec: source.spec,
    };
    let copied = async {
        // Sent once: what a data process that died has left is no empty directory.
        control.link.settled().await?;
        control.link.apply_within(asked, COPY_TIMEOUT).await
    };
    if let Err(error) = copied.await {
        remove(control, vec![directory.clone()]).await;
        return Err(CopyFailed::Told(error));
    }
    Ok(())
}

/// Makes a volume of what another one holds at this moment. Its guests wait meanwhile; other changes
/// of the host do not.
async fn copy(
    control: Rc<Control>,
    mut call: Call,
    event: &'static str,
    read_only: bool,
) -> Answer {
    let (fields, body) = call.json().await?;
    let name = name_of(&fields)?;
    let keyed = idempotency::begin(&control, &call)?;
    if let Some(keyed) = &keyed
        && let Some(reply) = keyed.replay(body).await?
    {
        return Ok(reply);
    }
    let remember = keyed.as_ref().map(|keyed| keyed.remember(body));
    let actor = call.actor()?;
    let tenant = call.tenant()?;
    let source = find(&control, tenant.clone(), call.volume()?).await?;
    let directory = new_directory()?;
    copy_into(&control, &source, &directory)
        .await
        .map_err(|error| match error {
            CopyFailed::Told(LinkError::Refused(Refusal::Storage(why))) => {
                Problem::new(Code::StorageFull, why)
            }
            CopyFailed::Told(error) => error.into(),
            CopyFailed::Files(problem) => problem,
        })?;
    let _mutation = control.mutation.lock().await;
    let new = NewVolume {
        spec: source.spec,
        directory: directory.clone(),
        read_only,
        origin: Some(source.name.clone()),
    };
    let put = control.change(move |store, now| {
        let put = store.put_volume(&tenant, &name, &new, Precondition::Absent, now)?;
        let document = documents::volume(put.record(), None);
        if let Some(remember) = remember {
            remember.answer(store, StatusCode::CREATED, &document, now)?;
        }
        let audit = actor.volume(put.record(), None, Some(document));
        Ok((put, Some(audit)))
    });
    let (put, document) = take_effect(&control, put.await, directory).await?;
    let volume = put.record();
    control.events.volume(event, volume);
    Ok(Reply::json(StatusCode::CREATED, &document).etag(volume.generation))
}
