//! Tokens. A tenant's token manages those of its tenant.

use std::rc::Rc;

use http::StatusCode;
use insula_types::{TenantId, TenantName};
use serde::Deserialize;
use serde_json::Value;

use crate::control::auth::{self, Caller};
use crate::control::http_types::{Call, Reply, list};
use crate::control::problem::{Answer, Code, Problem};
use crate::control::{Control, documents, idempotency};
use crate::state::{Access, NewToken, Scope, Timestamp, Token};

/// Longest life that a token can be given: ten years.
const TTL_MAX_SECONDS: u64 = 10 * 365 * 24 * 3_600;
/// Longest name.
const NAME_MAX_CHARS: usize = 100;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenRequest {
    name: String,
    scope: Option<RequestedScope>,
    tenant: Option<TenantName>,
    access: Option<RequestedAccess>,
    ttl_seconds: Option<u64>,
}

#[derive(Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
enum RequestedScope {
    Host,
    Tenant,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum RequestedAccess {
    Read,
    Write,
}

/// The tenant that a token belongs to.
fn owner(token: &Token) -> Option<(TenantId, TenantName)> {
    match &token.scope {
        Scope::Host => None,
        Scope::Tenant(id, name) => Some((*id, name.clone())),
    }
}

/// The tenant whose tokens a caller may see; `None` for all.
fn own(caller: &Caller) -> Option<TenantId> {
    match &caller.scope {
        Scope::Host => None,
        Scope::Tenant(id, _) => Some(*id),
    }
}

pub(crate) async fn index(control: Rc<Control>, call: Call) -> Answer {
    let (page, own) = (call.page()?, own(call.caller()?));
    let tokens = control.store(move |store| store.tokens(own, &page)).await?;
    Ok(list(
        tokens.items.iter().map(documents::token).collect(),
        tokens.next,
    ))
}

/// Makes a token; its secret is in this answer and nowhere else, not even in the answer to a
/// repetition with the same `Idempotency-Key`.
pub(crate) async fn create(control: Rc<Control>, mut call: Call) -> Answer {
    let (document, body) = call.json().await?;
    let keyed = idempotency::begin(&control, &call)?;
    if let Some(keyed) = &keyed
        && let Some(reply) = keyed.replay(body).await?
    {
        return Ok(reply);
    }
    let request = serde_json::from_value(Value::Object(document))
        .map_err(|error| Problem::new(Code::InvalidSpec, error))?;
    let now = Timestamp::now();
    let secret = auth::new_secret()?;
    let token = checked(request, call.caller()?, auth::hash(&secret), now)?;
    let actor = call.actor()?;
    let remember = keyed.as_ref().map(|keyed| keyed.remember(body));
    let mut document = control
        .change(move |store, now| {
            let token = store.add_token(&token, now)?;
            let document = documents::token(&token);
            if let Some(remember) = remember {
                remember.answer(store, StatusCode::CREATED, &document, now)?;
            }
            let after = Some(document.clone());
            let audit = actor.token(token.id, owner(&token), None, after);
            Ok((document, Some(audit)))
        })
        .await?;
    document["secret"] = secret.into();
    control.events.host("token.created");
    Ok(Reply::json(StatusCode::CREATED, &document))
}

fn checked(
    request: TokenRequest,
    caller: &Caller,
    hash: [u8; 32],
    now: Timestamp,
) -> Result<NewToken, Problem> {
    let invalid = |detail: &str| Problem::new(Code::InvalidSpec, detail);
    let chars = request.name.chars().count();
    if chars == 0 || chars > NAME_MAX_CHARS || request.name.chars().any(char::is_control) {
        return Err(invalid(
            "name: 1 to 100 characters, none of them control characters",
        ));
    }
    let expires = match request.ttl_seconds {
        None => None,
        Some(seconds @ 1..=TTL_MAX_SECONDS) => {
            Some(now.after(std::time::Duration::from_secs(seconds)))
        }
        Some(_) => return Err(invalid("ttl_seconds: from 1 to ten years, or absent")),
    };
    let tenant = match (request.scope, request.tenant) {
        (Some(RequestedScope::Host) | None, None) => None,
        (Some(RequestedScope::Tenant) | None, Some(tenant)) => Some(tenant),
        (Some(RequestedScope::Host), Some(_)) => {
            return Err(invalid("tenant: not with scope \"host\""));
        }
        (Some(RequestedScope::Tenant), None) => {
            return Err(invalid("tenant: needed with scope \"tenant\""));
        }
    };
    if let Scope::Tenant(_, own) = &caller.scope
        && tenant.as_ref() != Some(own)
    {
        let detail = "a tenant's token makes tokens of its own tenant only";
        return Err(Problem::new(Code::Forbidden, detail));
    }
    let access = match request.access {
        Some(RequestedAccess::Write) => Access::Write,
        // Nobody gets more than was asked for.
        Some(RequestedAccess::Read) | None => Access::Read,
    };
    Ok(NewToken {
        hash,
        name: request.name,
        tenant,
        access,
        expires,
    })
}

pub(crate) async fn delete(control: Rc<Control>, call: Call) -> Answer {
    let id = call.params.id.ok_or_else(|| Problem::not_found("token"))?;
    let own = own(call.caller()?);
    let actor = call.actor()?;
    control
        .change(move |store, now| {
            let token = store.delete_token(id, own, now)?;
            let before = Some(documents::token(&token));
            let audit = actor.token(token.id, owner(&token), before, None);
            Ok(((), Some(audit)))
        })
        .await?;
    control.events.host("token.deleted");
    Ok(Reply::no_content())
}
