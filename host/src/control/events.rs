//! Changes of state, told to whoever follows `/v1/events`. Bounded: who reads too slowly is told
//! that events were lost and should list again.

use std::cell::Cell;

use insula_types::{MachineName, ServiceName, TenantId, TenantName, VersionNumber};
use insula_vmm::life::State;
use tokio::sync::broadcast;

use crate::machines::book::Entry;
use crate::state::machines::{Image, Machine};
use crate::state::{Scope, Service, Tenant, Timestamp, Volume};

/// Events that wait for the slowest reader, at most.
const BACKLOG: usize = 256;

#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub(crate) id: u64,
    pub(crate) time: Timestamp,
    /// For example `service.updated`.
    pub(crate) kind: &'static str,
    /// `None` for what concerns the host only.
    pub(crate) tenant: Option<(TenantId, TenantName)>,
    pub(crate) service: Option<ServiceName>,
    pub(crate) machine: Option<MachineName>,
    pub(crate) version: Option<VersionNumber>,
    /// Why, where it was the host that did it.
    pub(crate) reason: Option<String>,
}

impl Event {
    /// Whether a caller may see it.
    pub(crate) fn visible_to(&self, scope: &Scope) -> bool {
        match (scope, &self.tenant) {
            (Scope::Host, _) => true,
            (Scope::Tenant(id, _), Some((tenant, _))) => id == tenant,
            (Scope::Tenant(..), None) => false,
        }
    }

    /// Of the host; what it is about is added.
    fn new(kind: &'static str) -> Self {
        Self {
            id: 0,
            time: Timestamp::now(),
            kind,
            tenant: None,
            service: None,
            machine: None,
            version: None,
            reason: None,
        }
    }

    /// In the format of server-sent events.
    pub(crate) fn to_sse(&self) -> String {
        let mut data = serde_json::json!({"type": self.kind, "time": self.time});
        if let Some((_, tenant)) = &self.tenant {
            data["tenant"] = tenant.as_str().into();
        }
        if let Some(service) = &self.service {
            data["service"] = service.as_str().into();
        }
        if let Some(machine) = &self.machine {
            data["machine"] = machine.as_str().into();
        }
        if let Some(version) = self.version {
            data["version"] = version.get().into();
        }
        if let Some(reason) = &self.reason {
            data["reason"] = reason.as_str().into();
        }
        format!("id: {}\nevent: {}\ndata: {data}\n\n", self.id, self.kind)
    }
}

#[derive(Debug)]
pub(crate) struct Events {
    sender: broadcast::Sender<Event>,
    next_id: Cell<u64>,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            sender: broadcast::Sender::new(BACKLOG),
            next_id: Cell::new(1),
        }
    }
}

impl Events {
    pub(crate) fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.sender.subscribe()
    }

    fn send(&self, mut event: Event) {
        event.id = self.next_id.replace(self.next_id.get() + 1);
        // Nobody may be listening.
        let _ = self.sender.send(event);
    }

    pub(crate) fn host(&self, kind: &'static str) {
        self.of_host(kind, None);
    }

    /// Something happened to the host.
    pub(crate) fn host_because(&self, kind: &'static str, reason: &str) {
        self.of_host(kind, Some(reason.to_owned()));
    }

    fn of_host(&self, kind: &'static str, reason: Option<String>) {
        self.send(Event {
            reason,
            ..Event::new(kind)
        });
    }

    pub(crate) fn image(&self, kind: &'static str, image: &Image) {
        self.of_host(kind, Some(format!("image {}", image.name)));
    }

    pub(crate) fn tenant(&self, kind: &'static str, tenant: &Tenant) {
        let tenant = Some((tenant.id, tenant.name.clone()));
        self.send(Event {
            tenant,
            ..Event::new(kind)
        });
    }

    pub(crate) fn volume(&self, kind: &'static str, volume: &Volume) {
        let tenant = Some((volume.tenant, volume.tenant_name.clone()));
        self.send(Event {
            tenant,
            reason: Some(format!("volume {}", volume.name)),
            ..Event::new(kind)
        });
    }

    /// A machine is to be another one from its next start on.
    pub(crate) fn machine_spec(&self, kind: &'static str, machine: &Machine) {
        self.send(Event {
            tenant: Some((machine.tenant, machine.tenant_name.clone())),
            machine: Some(machine.name.clone()),
            ..Event::new(kind)
        });
    }

    /// A machine is in another state.
    pub(crate) fn machine(&self, entry: &Entry) {
        let state = entry.state();
        let reason = match &state {
            State::Failed { failure } => Some(failure.to_string()),
            _ => None,
        };
        self.send(Event {
            tenant: Some((entry.tenant, entry.tenant_name.clone())),
            machine: Some(entry.name.clone()),
            reason,
            ..Event::new(kind_of(&state))
        });
    }

    pub(crate) fn service(
        &self,
        kind: &'static str,
        service: &Service,
        version: Option<VersionNumber>,
    ) {
        self.about(kind, service, version, None);
    }

    /// The host itself changed something of a service.
    pub(crate) fn service_because(
        &self,
        kind: &'static str,
        service: &Service,
        version: Option<VersionNumber>,
        reason: &str,
    ) {
        self.about(kind, service, version, Some(reason.to_owned()));
    }

    fn about(
        &self,
        kind: &'static str,
        service: &Service,
        version: Option<VersionNumber>,
        reason: Option<String>,
    ) {
        self.send(Event {
            tenant: Some((service.tenant, service.tenant_name.clone())),
            service: Some(service.name.clone()),
            version,
            reason,
            ..Event::new(kind)
        });
    }
}

/// `machine.running` and the like.
fn kind_of(state: &State) -> &'static str {
    match state {
        State::Defined => "machine.defined",
        State::Starting { .. } => "machine.starting",
        State::Running { .. } => "machine.running",
        State::Paused { .. } => "machine.paused",
        State::Stopping { .. } => "machine.stopping",
        State::Stopped { .. } => "machine.stopped",
        State::Failed { .. } => "machine.failed",
        State::Deleting => "machine.deleted",
    }
}
