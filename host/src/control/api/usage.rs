//! What a tenant used.

use std::rc::Rc;

use serde_json::{Value, json};

use crate::control::http_types::{Call, Reply};
use crate::control::problem::Answer;
use crate::control::{Control, documents};

pub(crate) async fn get(control: Rc<Control>, call: Call) -> Answer {
    let name = call.tenant()?;
    let asked = name.clone();
    let tenant = control.store(move |store| store.tenant(&asked)).await?;
    // So that the numbers are those of this moment.
    if let Err(error) = control.link.collect().await {
        tracing::warn!(%error, "usage may be a second old");
    }
    let services = control.all_services(&name).await?;
    let used = control.ledger.borrow().tenant(tenant.id);
    let services: Vec<Value> = services
        .iter()
        .map(|service| {
            let mut row = documents::usage(&used.service(service.id));
            row.insert("name".to_owned(), service.name.as_str().into());
            row.insert("since".to_owned(), json!(service.created));
            Value::Object(row)
        })
        .collect();
    let mut document = documents::usage(&used.total());
    document.insert("tenant".to_owned(), tenant.name.as_str().into());
    document.insert("since".to_owned(), json!(tenant.created));
    document.insert("services".to_owned(), services.into());
    let machines = control.ledger.borrow().machines(tenant.id);
    document.insert("machines".to_owned(), documents::machine_usage(&machines));
    Ok(Reply::ok(&Value::Object(document)))
}
