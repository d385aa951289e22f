//! Versions: upload, list, switch.

use std::rc::Rc;

use http::StatusCode;
use insula_types::VersionNumber;
use serde_json::{Map, Value, json};

use crate::control::http_types::{Call, Reply, list};
use crate::control::problem::{Answer, Code, Problem};
use crate::control::{Control, deploy, documents, idempotency};
use crate::state::Service;

pub(crate) async fn index(control: Rc<Control>, call: Call) -> Answer {
    let page = call.page()?;
    let service = control.service_of(&call).await?;
    let id = service.id;
    let versions = control
        .store(move |store| store.versions(id, &page))
        .await?;
    let items = versions
        .items
        .iter()
        .map(|one| documents::version(&service, one))
        .collect();
    Ok(list(items, versions.next))
}

/// Uploads a component as a new version.
pub(crate) async fn upload(control: Rc<Control>, mut call: Call) -> Answer {
    call.expect_type("application/wasm")?;
    let activate = call.flag("activate", true)?;
    let service = control.service_of(&call).await?;
    let keyed = idempotency::begin(&control, &call)?;
    let ticket = control.compilers.enter(service.tenant)?;
    let component = deploy::receive(&control, &mut call).await?;
    let hash = *component.digest().as_bytes();
    if let Some(keyed) = &keyed
        && let Some(reply) = keyed.replay(hash).await?
    {
        return Ok(reply);
    }
    let prepared = deploy::prepare(&control, &ticket, component).await?;
    let deployed = deploy::commit(&control, service.id, prepared, activate).await?;
    let version = deployed.added.version;
    let document = json!({
        "version": version.number,
        "digest": version.digest,
        "size_bytes": version.size,
        "compile_ms": version.compile_ms,
        "active": deployed.active,
        "url": documents::url(&control, &deployed.added.service),
    });
    if let Some(keyed) = keyed {
        keyed.remember(hash, StatusCode::CREATED, &document).await;
    }
    Ok(Reply::json(StatusCode::CREATED, &document))
}

/// Chooses the version that serves: `{"3": 100}`.
pub(crate) async fn traffic(control: Rc<Control>, mut call: Call) -> Answer {
    let (document, _) = call.json().await?;
    let number = whole_traffic(&document)?;
    let service = control.service_of(&call).await?;
    let id = service.id;
    let known = control.store(move |store| store.version(id, number)).await;
    known.map_err(|problem| match problem.code() {
        Code::NotFound => Problem::new(
            Code::UnknownVersion,
            format_args!("there is no version {number}"),
        ),
        _ => problem,
    })?;
    let service = deploy::activate(&control, &service, number).await?;
    Ok(Reply::ok(&shares(&service)))
}

fn shares(service: &Service) -> Value {
    let mut shares = Map::new();
    if let Some(active) = service.active {
        shares.insert(active.number.to_string(), 100.into());
    }
    Value::Object(shares)
}

/// The one version that gets all of it.
fn whole_traffic(document: &Map<String, Value>) -> Result<VersionNumber, Problem> {
    let mut whole = Vec::new();
    let mut sum = 0;
    for (key, share) in document {
        let number = key.parse().ok().and_then(VersionNumber::new);
        let share = share.as_u64().filter(|share| *share <= 100);
        let (Some(number), Some(share)) = (number, share) else {
            let detail = "traffic is written {\"<version>\": <percent>, …}";
            return Err(Problem::new(Code::InvalidSpec, detail));
        };
        sum += share;
        if share > 0 {
            whole.push(number);
        }
    }
    match (sum, &whole[..]) {
        (100, [number]) => Ok(*number),
        (100, _) => Err(Problem::new(
            Code::Unsupported,
            "this version of insula cannot split traffic: one version gets 100",
        )),
        _ => Err(Problem::new(
            Code::InvalidSpec,
            format_args!("the shares add up to {sum}, not to 100"),
        )),
    }
}

/// Goes back to the version that served before.
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
    let service = deploy::activate(&control, &service, previous).await?;
    let document = documents::service(&control, &service);
    if let Some(keyed) = keyed {
        keyed.remember(body, StatusCode::OK, &document).await;
    }
    Ok(Reply::ok(&document))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traffic_goes_to_one_version() {
        let read = |text: &str| {
            whole_traffic(&serde_json::from_str(text).unwrap()).map_err(|problem| problem.code())
        };
        assert_eq!(read(r#"{"3":100}"#).map(VersionNumber::get), Ok(3));
        assert_eq!(read(r#"{"3":100,"4":0}"#).map(VersionNumber::get), Ok(3));
        assert_eq!(read(r#"{"3":90,"4":10}"#), Err(Code::Unsupported));
        for bad in [
            "{}",
            r#"{"3":99}"#,
            r#"{"0":100}"#,
            r#"{"x":100}"#,
            r#"{"3":"100"}"#,
        ] {
            assert_eq!(read(bad), Err(Code::InvalidSpec), "{bad}");
        }
    }
}
