//! Services.

use std::rc::Rc;

use http::StatusCode;
use http::header::LOCATION;
use insula_types::TenantName;
use insula_types::spec::ServiceSpec;

use crate::control::changes::optional;
use crate::control::deploy::apply_service;
use crate::control::documents::Urls;
use crate::control::http_types::{Call, PAGE_MAX, Reply, list};
use crate::control::problem::{Answer, Code, Problem};
use crate::control::{Control, documents};
use crate::messages::ToData;
use crate::state::{Page, Put, Service};

impl Control {
    /// All services of a tenant.
    pub(crate) async fn all_services(&self, tenant: &TenantName) -> Result<Vec<Service>, Problem> {
        let mut all = Vec::new();
        let mut page = Page {
            after: None,
            limit: PAGE_MAX,
        };
        loop {
            let (name, asked) = (tenant.clone(), page.clone());
            let services = self
                .store(move |store| store.services(&name, &asked))
                .await?;
            all.extend(services.items);
            page.after = services.next;
            if page.after.is_none() {
                return Ok(all);
            }
        }
    }

    /// The service that a path names.
    pub(crate) async fn service_of(&self, call: &Call) -> Result<Service, Problem> {
        let (tenant, name) = (call.tenant()?, call.service()?);
        self.store(move |store| {
            store.tenant(&tenant)?;
            store.service(&tenant, &name)
        })
        .await
    }
}

pub(crate) async fn index(control: Rc<Control>, call: Call) -> Answer {
    let (tenant, page) = (call.tenant()?, call.page()?);
    let services = control
        .store(move |store| store.services(&tenant, &page))
        .await?;
    let urls = Urls::new(&control);
    let items = services
        .items
        .iter()
        .map(|one| documents::service(&urls, one))
        .collect();
    Ok(list(items, services.next))
}

pub(crate) async fn get(control: Rc<Control>, call: Call) -> Answer {
    let service = control.service_of(&call).await?;
    Ok(Reply::ok(&documents::service(&Urls::new(&control), &service)).etag(service.generation))
}

pub(crate) async fn put(control: Rc<Control>, mut call: Call) -> Answer {
    let (tenant, name) = (call.tenant()?, call.service()?);
    let precondition = call.precondition()?;
    let actor = call.actor()?;
    let spec: ServiceSpec = call
        .spec(name.as_str(), documents::SERVICE_READ_ONLY)
        .await?;
    refuse_own_hosts(&control.config.domain, &spec)?;
    let _mutation = control.mutation.lock().await;
    let put = control
        .change(move |store, now| {
            let before = optional(store.service(&tenant, &name))?;
            let put = store.put_service(&tenant, &name, &spec, precondition, now)?;
            let before = before.as_ref().map(documents::service_record);
            let after = Some(documents::service_record(put.record()));
            let audit = put
                .is_change()
                .then(|| actor.service(put.record(), before, after));
            Ok((put, audit))
        })
        .await?;
    let service = put.record();
    control
        .ledger
        .borrow_mut()
        .add_service(service.tenant, service.id);
    control.logs.borrow_mut().add_service(service.id);
    apply_service(&control, service).await?;
    let document = documents::service(&Urls::new(&control), service);
    let reply = match &put {
        Put::Created(_) => {
            control.events.service("service.created", service, None);
            Reply::json(StatusCode::CREATED, &document).header(LOCATION, &call.path)
        }
        Put::Changed(_) => {
            control.events.service("service.updated", service, None);
            Reply::ok(&document)
        }
        Put::Unchanged(_) => Reply::ok(&document),
    };
    Ok(reply.etag(service.generation))
}

/// Names below the host's own domain are made of tenants' and services' names: nobody claims them
/// by a route.
fn refuse_own_hosts(domain: &str, spec: &ServiceSpec) -> Result<(), Problem> {
    let own = |host: &str| {
        host.strip_suffix(domain)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    match spec.routes.iter().find(|route| own(route.host())) {
        None => Ok(()),
        Some(route) => Err(Problem::new(
            Code::RouteReserved,
            format_args!(
                "{:?} is below the host's own domain {domain:?}",
                route.host()
            ),
        )),
    }
}

pub(crate) async fn delete(control: Rc<Control>, call: Call) -> Answer {
    let (tenant, name) = (call.tenant()?, call.service()?);
    let precondition = call.precondition()?;
    let actor = call.actor()?;
    let _mutation = control.mutation.lock().await;
    let deleted = control
        .change(move |store, _| {
            let deleted = store.delete_service(&tenant, &name, precondition)?;
            let before = documents::service_record(&deleted.record);
            let audit = actor.service(&deleted.record, Some(before), None);
            Ok((deleted, Some(audit)))
        })
        .await?;
    let service = deleted.record;
    let applied = control.link.apply(ToData::DropService(service.id)).await;
    // What its last requests used is still the tenant's.
    if let Err(error) = control.link.collect().await {
        tracing::warn!(%error, "usage of a deleted service is collected later");
    }
    control
        .ledger
        .borrow_mut()
        .retire_service(service.tenant, service.id);
    control.trials.borrow_mut().remove(service.id);
    control.logs.borrow_mut().remove_service(service.id);
    control.remove_files(deleted.unreferenced).await;
    control.events.service("service.deleted", &service, None);
    applied?;
    Ok(Reply::no_content())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_names_cannot_be_claimed() {
        let refused = |host: &str| {
            let routes = serde_json::json!({"routes": [format!("{host}/*")]});
            refuse_own_hosts("localhost", &serde_json::from_value(routes).unwrap()).is_err()
        };
        assert!(refused("localhost") && refused("web.other.localhost"));
        assert!(!refused("notlocalhost") && !refused("api.example.com"));
    }
}
