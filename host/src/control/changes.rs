//! Changes: one transaction each, with its entry in the audit log and, where there is an
//! `Idempotency-Key`, with the answer that a repetition gets.

use http::StatusCode;
use insula_types::{TenantId, TenantName};
use serde_json::Value;

use super::Control;
use super::documents::without_secrets;
use super::problem::Problem;
use crate::state::machines::{Image, Machine};
use crate::state::{Audit, Remembered, Service, Store, StoreError, Tenant, Timestamp, Volume};

/// Who makes a change.
#[derive(Debug, Clone)]
pub(crate) struct Actor {
    token: Option<u64>,
    name: String,
    peer: Option<String>,
    operation: &'static str,
}

impl Actor {
    /// A caller of the API.
    pub(crate) fn caller(token: u64, name: &str, peer: String, operation: &'static str) -> Self {
        Self {
            token: Some(token),
            name: name.to_owned(),
            peer: Some(peer),
            operation,
        }
    }

    /// The host, by itself.
    pub(crate) fn host(operation: &'static str) -> Self {
        Self {
            token: None,
            name: "host".to_owned(),
            peer: None,
            operation,
        }
    }

    /// The one way into the audit log, so that no secret finds another.
    fn did(
        &self,
        tenant: Option<(TenantId, TenantName)>,
        subject: String,
        before: Option<Value>,
        after: Option<Value>,
    ) -> Audit {
        Audit {
            token: self.token,
            actor: self.name.clone(),
            peer: self.peer.clone(),
            operation: self.operation.to_owned(),
            tenant,
            subject,
            before: before.map(without_secrets),
            after: after.map(without_secrets),
        }
    }

    /// Changed a tenant.
    pub(crate) fn tenant(
        &self,
        tenant: &Tenant,
        before: Option<Value>,
        after: Option<Value>,
    ) -> Audit {
        let owner = (tenant.id, tenant.name.clone());
        self.did(Some(owner), tenant.name.to_string(), before, after)
    }

    /// Changed a service.
    pub(crate) fn service(
        &self,
        service: &Service,
        before: Option<Value>,
        after: Option<Value>,
    ) -> Audit {
        let owner = (service.tenant, service.tenant_name.clone());
        let subject = format!("{}/{}", service.tenant_name, service.name);
        self.did(Some(owner), subject, before, after)
    }

    /// Changed a volume.
    pub(crate) fn volume(
        &self,
        volume: &Volume,
        before: Option<Value>,
        after: Option<Value>,
    ) -> Audit {
        let owner = (volume.tenant, volume.tenant_name.clone());
        let subject = format!("{}/volumes/{}", volume.tenant_name, volume.name);
        self.did(Some(owner), subject, before, after)
    }

    /// Changed a machine.
    pub(crate) fn machine(
        &self,
        machine: &Machine,
        before: Option<Value>,
        after: Option<Value>,
    ) -> Audit {
        let owner = (machine.tenant, machine.tenant_name.clone());
        let subject = format!("machine {}/{}", machine.tenant_name, machine.name);
        self.did(Some(owner), subject, before, after)
    }

    /// Changed an image.
    pub(crate) fn image(
        &self,
        image: &Image,
        before: Option<Value>,
        after: Option<Value>,
    ) -> Audit {
        self.did(None, format!("image {}", image.name), before, after)
    }

    /// Had everything compiled again that needed it.
    pub(crate) fn recompilation(&self) -> Audit {
        self.did(None, "host".to_owned(), None, None)
    }

    /// Changed a token.
    pub(crate) fn token(
        &self,
        id: u64,
        owner: Option<(TenantId, TenantName)>,
        before: Option<Value>,
        after: Option<Value>,
    ) -> Audit {
        self.did(owner, format!("token {id}"), before, after)
    }
}

/// An answer to be remembered with the change that it tells of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Remember {
    pub(super) key: [u8; 32],
    pub(super) body: [u8; 32],
}

impl Remember {
    /// Stores the answer; part of a change.
    pub(crate) fn answer(
        self,
        store: &mut dyn Store,
        status: StatusCode,
        document: &Value,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let remembered = Remembered {
            key: self.key,
            body: self.body,
            status: status.as_u16(),
            answer: document.to_string(),
        };
        store.remember(&remembered, now)
    }
}

/// A record that may be missing.
pub(crate) fn optional<T>(found: Result<T, StoreError>) -> Result<Option<T>, StoreError> {
    match found {
        Ok(record) => Ok(Some(record)),
        Err(StoreError::NotFound(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Control {
    /// Makes a change: all that `job` does, and its entry in the audit log (`None` where there
    /// was nothing to change), is kept or nothing is.
    pub(crate) async fn change<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut dyn Store, Timestamp) -> Result<(T, Option<Audit>), StoreError>
        + Send
        + 'static,
    ) -> Result<T, Problem> {
        self.store(move |store| {
            let now = Timestamp::now();
            store.in_one(move |store| {
                let (answer, audit) = job(store, now)?;
                if let Some(audit) = audit {
                    store.audit(&audit, now)?;
                }
                Ok(answer)
            })
        })
        .await
    }
}
