//! Versions: upload, list, switch.

use std::rc::Rc;
use std::time::Duration;

use http::StatusCode;
use insula_types::Traffic;
use serde_json::{Value, json};

use crate::config::COMPONENT_MAX;
use crate::control::deploy::Commit;
use crate::control::documents::Urls;
use crate::control::http_types::{Call, Reply, list};
use crate::control::problem::{Answer, Code, Problem};
use crate::control::{Control, deploy, documents, idempotency, upload};

pub(crate) async fn index(control: Rc<Control>, call: Call) -> Answer {
    let page = call.page()?;
    let service = control.service_of(&call).await?;
    let id = service.id;
    let versions = control
        .store(move |store| store.versions(id, &page))
        .await?;
    let urls = Urls::new(&control);
    let items = versions
        .items
        .iter()
        .map(|one| documents::version(&urls, &service, one))
        .collect();
    Ok(list(items, versions.next))
}

/// Longest time for a whole upload: 64 MiB at 1 Mbit/s.
const UPLOAD_TOTAL: Duration = Duration::from_secs(600);

/// Uploads a component as a new version.
pub(crate) async fn upload(control: Rc<Control>, mut call: Call) -> Answer {
    call.expect_type("application/wasm")?;
    let activate = call.flag("activate", true)?;
    let service = control.service_of(&call).await?;
    let keyed = idempotency::begin(&control, &call)?;
    let ticket = control.compilers.enter(service.tenant)?;
    let component = upload::receive(&control, &mut call, COMPONENT_MAX.get(), UPLOAD_TOTAL).await?;
    let hash = *component.digest().as_bytes();
    if let Some(keyed) = &keyed
        && let Some(reply) = keyed.replay(hash).await?
    {
        return Ok(reply);
    }
    let prepared = deploy::prepare(&control, &ticket, &service, component).await?;
    let commit = Commit {
        actor: call.actor()?,
        service: service.id,
        activate,
        remember: keyed.as_ref().map(|keyed| keyed.remember(hash)),
    };
    let document = deploy::commit(&control, commit, prepared).await?;
    Ok(Reply::json(StatusCode::CREATED, &document))
}

/// Divides the traffic among versions: `{"3": 90, "4": 10}`.
pub(crate) async fn traffic(control: Rc<Control>, mut call: Call) -> Answer {
    let (document, _) = call.json().await?;
    let traffic: Traffic = serde_json::from_value(Value::Object(document))
        .map_err(|error| Problem::new(Code::InvalidSpec, error))?;
    let service = control.service_of(&call).await?;
    let service = deploy::switch(&control, &service, traffic, call.actor()?, None).await?;
    Ok(Reply::ok(&json!(service.traffic)))
}

/// Gives all traffic to the version that had it before.
pub(crate) async fn rollback(control: Rc<Control>, mut call: Call) -> Answer {
    let body = crate::control::sha256(&call.small_body().await?);
    let service = control.service_of(&call).await?;
    let keyed = idempotency::begin(&control, &call)?;
    if let Some(keyed) = &keyed
        && let Some(reply) = keyed.replay(body).await?
    {
        return Ok(reply);
    }
    let previous = service.previous.ok_or_else(|| {
        Problem::new(
            Code::NoPreviousVersion,
            "no other version of this service has served",
        )
    })?;
    let remember = keyed.as_ref().map(|keyed| keyed.remember(body));
    let traffic = Traffic::whole(previous);
    let service = deploy::switch(&control, &service, traffic, call.actor()?, remember).await?;
    let document = documents::service(&Urls::new(&control), &service);
    Ok(Reply::ok(&document))
}
