//! Tenants.

use std::rc::Rc;

use http::StatusCode;
use http::header::LOCATION;
use insula_types::TenantSpec;

use crate::control::api::volumes;
use crate::control::changes::optional;
use crate::control::http_types::{Call, Reply, list};
use crate::control::problem::Answer;
use crate::control::{Control, documents};
use crate::messages::ToData;
use crate::state::{Listed, Put, Scope};

/// A tenant's token sees its own tenant only.
pub(crate) async fn index(control: Rc<Control>, call: Call) -> Answer {
    let page = call.page()?;
    let tenants = match call.caller()?.scope.clone() {
        Scope::Host => control.store(move |store| store.tenants(&page)).await?,
        Scope::Tenant(_, name) => {
            let own = control.store(move |store| store.tenant(&name)).await?;
            Listed {
                items: vec![own],
                next: None,
            }
        }
    };
    Ok(list(
        tenants.items.iter().map(documents::tenant).collect(),
        tenants.next,
    ))
}

pub(crate) async fn get(control: Rc<Control>, call: Call) -> Answer {
    let name = call.tenant()?;
    let tenant = control.store(move |store| store.tenant(&name)).await?;
    Ok(Reply::ok(&documents::tenant(&tenant)).etag(tenant.generation))
}

pub(crate) async fn put(control: Rc<Control>, mut call: Call) -> Answer {
    let name = call.tenant()?;
    let precondition = call.precondition()?;
    let actor = call.actor()?;
    let spec: TenantSpec = call
        .spec(name.as_str(), documents::TENANT_READ_ONLY)
        .await?;
    let capacity = control.config.capacity_millicores();
    let _mutation = control.mutation.lock().await;
    let put = control
        .change(move |store, now| {
            let before = optional(store.tenant(&name))?;
            let put = store.put_tenant(&name, &spec, precondition, capacity, now)?;
            let before = before.as_ref().map(documents::tenant);
            let after = Some(documents::tenant(put.record()));
            let audit = put
                .is_change()
                .then(|| actor.tenant(put.record(), before, after));
            Ok((put, audit))
        })
        .await?;
    let tenant = put.record();
    control.ledger.borrow_mut().add_tenant(tenant.id);
    control.link.apply(control.envelope(tenant)).await?;
    let document = documents::tenant(tenant);
    let reply = match &put {
        Put::Created(_) => {
            control.events.tenant("tenant.created", tenant);
            Reply::json(StatusCode::CREATED, &document).header(LOCATION, &call.path)
        }
        Put::Changed(_) => {
            control.events.tenant("tenant.updated", tenant);
            Reply::ok(&document)
        }
        Put::Unchanged(_) => Reply::ok(&document),
    };
    Ok(reply.etag(tenant.generation))
}

/// Deletes the tenant with its services and tokens.
pub(crate) async fn delete(control: Rc<Control>, call: Call) -> Answer {
    let name = call.tenant()?;
    let precondition = call.precondition()?;
    let actor = call.actor()?;
    let _mutation = control.mutation.lock().await;
    let services = control.all_services(&name).await?;
    let kept = control.all_volumes(&name).await?;
    let deleted = control
        .change(move |store, _| {
            let deleted = store.delete_tenant(&name, precondition)?;
            let before = documents::tenant(&deleted.record);
            let audit = actor.tenant(&deleted.record, Some(before), None);
            Ok((deleted, Some(audit)))
        })
        .await?;
    let tenant = deleted.record;
    let applied = control.link.apply(ToData::DropTenant(tenant.id)).await;
    control.ledger.borrow_mut().remove_tenant(tenant.id);
    if let Err(error) = control.machines.groups.remove_tenant(tenant.id) {
        tracing::warn!(tenant = %tenant.name, %error, "a deleted tenant's control group stays");
    }
    for service in services {
        control.trials.borrow_mut().remove(service.id);
        control.logs.borrow_mut().remove_service(service.id);
    }
    control.remove_files(deleted.unreferenced).await;
    let directories = kept.into_iter().map(|volume| {
        control.volumes.borrow_mut().remove(&volume.id);
        volume.directory
    });
    volumes::remove(&control, directories.collect()).await;
    control.events.tenant("tenant.deleted", &tenant);
    applied?;
    Ok(Reply::no_content())
}
