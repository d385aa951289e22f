//! The audit log. A tenant's token sees what was done to its tenant.

use std::rc::Rc;

use serde_json::{Value, json};

use crate::control::Control;
use crate::control::http_types::{Call, list};
use crate::control::problem::Answer;
use crate::state::{AuditEntry, Scope};

pub(crate) async fn index(control: Rc<Control>, call: Call) -> Answer {
    let page = call.page()?;
    let tenant = match &call.caller()?.scope {
        Scope::Host => None,
        Scope::Tenant(id, _) => Some(*id),
    };
    let entries = control
        .store(move |store| store.audits(tenant, &page))
        .await?;
    let items = entries.items.iter().map(document).collect();
    Ok(list(items, entries.next))
}

fn document(entry: &AuditEntry) -> Value {
    let audit = &entry.audit;
    json!({
        "name": entry.id.to_string(),
        "id": entry.id,
        "time": entry.time,
        "token": audit.token,
        "actor": audit.actor,
        "peer": audit.peer,
        "operation": audit.operation,
        "tenant": audit.tenant.as_ref().map(|(_, name)| name),
        "subject": audit.subject,
        "before": audit.before,
        "after": audit.after,
    })
}
