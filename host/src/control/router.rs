//! The table of the admin API: what there is, who may use it, and what the OpenAPI document says.
//! A route that is not here does not exist; the document is made from this table.

use std::pin::Pin;
use std::rc::Rc;

use http::Method;

use super::Control;
use super::api::{
    audit, backup, host, images, machines, services, streams, tenants, tokens, usage, versions,
    volumes,
};
use super::auth::Need;
use super::http_types::{Call, Params};
use super::problem::{Answer, Code, Problem};
use crate::state::Access::{Read, Write};

/// A handler. The future stays on the control thread.
pub(super) type Handler = fn(Rc<Control>, Call) -> Pin<Box<dyn Future<Output = Answer>>>;

/// What a route takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Takes {
    Nothing,
    /// JSON of a named schema.
    Json(&'static str),
    /// A component.
    Wasm,
    /// Any bytes.
    Bytes,
}

/// What a route gives when it succeeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gives {
    /// 204.
    Nothing,
    /// 200 with a named schema.
    Json(&'static str),
    /// 200 with a list of a named schema.
    List(&'static str),
    /// 201 with a named schema.
    Created(&'static str),
    /// 201 or 200 with a named schema.
    Put(&'static str),
    /// 200 with another media type.
    Media(&'static str),
    /// 101, and from then on another protocol.
    Upgrade,
}

/// One operation.
pub(super) struct Route {
    pub(super) method: Method,
    /// Segments; `{tenant}`, `{service}` and `{id}` stand for names and numbers.
    pub(super) path: &'static str,
    pub(super) need: Need,
    pub(super) handler: Handler,
    /// The OpenAPI operationId.
    pub(super) id: &'static str,
    pub(super) summary: &'static str,
    /// Query parameters; others are refused.
    pub(super) query: &'static [&'static str],
    pub(super) takes: Takes,
    pub(super) gives: Gives,
}

macro_rules! routes {
    ($($method:ident $path:literal $need:expr, $id:literal = $handler:path, $summary:literal,
        [$($query:literal),*], $takes:expr => $gives:expr;)*) => {
        &[$(Route {
            method: Method::$method,
            path: $path,
            need: $need,
            handler: |control, call| Box::pin($handler(control, call)),
            id: $id,
            summary: $summary,
            query: &[$($query),*],
            takes: $takes,
            gives: $gives,
        }),*]
    };
}

use Gives::{Created, Json, List, Media, Put};
use Takes::{Bytes, Json as Body, Nothing, Wasm};

/// Everything that the admin API answers.
pub(super) static ROUTES: &[Route] = routes! {
    GET "/healthz" Need::Public, "getHealth" = host::health,
        "The process answers", [], Nothing => Media("text/plain");
    GET "/readyz" Need::Public, "getReadiness" = host::ready,
        "All intended services are served", [], Nothing => Media("text/plain");
    GET "/metrics" Need::PublicOnLoopback, "getMetrics" = host::metrics,
        "Metrics in the Prometheus text format", [], Nothing => Media("text/plain");
    GET "/v1/openapi.json" Need::Any(Read), "getOpenapi" = host::describe,
        "This document", [], Nothing => Json("OpenApi");
    GET "/v1/host" Need::Host(Read), "getHost" = host::host,
        "Capacity, commitments, versions", [], Nothing => Json("Host");
    GET "/v1/recompilation" Need::Host(Read), "getRecompilation" = host::recompilation,
        "How far the compiling of what had no usable code is", [], Nothing => Json("Recompilation");
    POST "/v1/recompilation" Need::Host(Write), "startRecompilation" = host::recompile,
        "Compile what has no code for this engine, unless that goes on already", [],
        Nothing => Json("Recompilation");
    GET "/v1/tenants" Need::Any(Read), "listTenants" = tenants::index,
        "Tenants by name", ["limit", "continue"], Nothing => List("Tenant");
    GET "/v1/tenants/{tenant}" Need::Tenant(Read), "getTenant" = tenants::get,
        "A tenant", [], Nothing => Json("Tenant");
    PUT "/v1/tenants/{tenant}" Need::Host(Write), "putTenant" = tenants::put,
        "Create a tenant or replace its envelope", [], Body("TenantSpec") => Put("Tenant");
    DELETE "/v1/tenants/{tenant}" Need::Host(Write), "deleteTenant" = tenants::delete,
        "Delete a tenant, its services and its tokens", [], Nothing => Gives::Nothing;
    GET "/v1/tenants/{tenant}/usage" Need::Tenant(Read), "getUsage" = usage::get,
        "What a tenant used since its creation", [], Nothing => Json("Usage");
    GET "/v1/tenants/{tenant}/services" Need::Tenant(Read), "listServices" = services::index,
        "A tenant's services by name", ["limit", "continue"], Nothing => List("Service");
    GET "/v1/tenants/{tenant}/services/{service}" Need::Tenant(Read), "getService" = services::get,
        "A service", [], Nothing => Json("Service");
    PUT "/v1/tenants/{tenant}/services/{service}" Need::Tenant(Write),
        "putService" = services::put,
        "Create a service or replace its spec", [], Body("ServiceSpec") => Put("Service");
    DELETE "/v1/tenants/{tenant}/services/{service}" Need::Tenant(Write),
        "deleteService" = services::delete,
        "Delete a service and its versions", [], Nothing => Gives::Nothing;
    GET "/v1/tenants/{tenant}/services/{service}/versions" Need::Tenant(Read),
        "listVersions" = versions::index,
        "A service's versions, newest first", ["limit", "continue"], Nothing => List("Version");
    POST "/v1/tenants/{tenant}/services/{service}/versions" Need::Tenant(Write),
        "createVersion" = versions::upload,
        "Upload a component as a new version; it serves unless activate=false", ["activate"],
        Wasm => Created("Deployed");
    PUT "/v1/tenants/{tenant}/services/{service}/traffic" Need::Tenant(Write),
        "putTraffic" = versions::traffic,
        "Divide the traffic among versions", [], Body("Traffic") => Json("Traffic");
    POST "/v1/tenants/{tenant}/services/{service}/rollback" Need::Tenant(Write),
        "rollback" = versions::rollback,
        "Give all traffic to the version that had it before", [], Nothing => Json("Service");
    GET "/v1/tenants/{tenant}/services/{service}/logs" Need::Tenant(Read),
        "getLogs" = streams::logs,
        "The last lines of a service's log, and with follow those to come", ["follow", "tail"],
        Nothing => Media("application/x-ndjson");
    GET "/v1/tenants/{tenant}/volumes" Need::Tenant(Read), "listVolumes" = volumes::index,
        "A tenant's volumes by name", ["limit", "continue"], Nothing => List("Volume");
    GET "/v1/tenants/{tenant}/volumes/{volume}" Need::Tenant(Read), "getVolume" = volumes::get,
        "A volume, and what it takes", [], Nothing => Json("Volume");
    PUT "/v1/tenants/{tenant}/volumes/{volume}" Need::Tenant(Write),
        "putVolume" = volumes::put,
        "Create a volume or change how much it holds", [], Body("VolumeSpec") => Put("Volume");
    DELETE "/v1/tenants/{tenant}/volumes/{volume}" Need::Tenant(Write),
        "deleteVolume" = volumes::delete,
        "Delete a volume that no service mounts, and all that is in it", [],
        Nothing => Gives::Nothing;
    POST "/v1/tenants/{tenant}/volumes/{volume}/snapshot" Need::Tenant(Write),
        "snapshotVolume" = volumes::snapshot,
        "Make a volume of what this one holds now, to be read only", [],
        Body("VolumeCopy") => Created("Volume");
    POST "/v1/tenants/{tenant}/volumes/{volume}/clone" Need::Tenant(Write),
        "cloneVolume" = volumes::clone,
        "Make a volume of what this one holds now", [], Body("VolumeCopy") => Created("Volume");
    GET "/v1/tenants/{tenant}/machines" Need::Tenant(Read), "listMachines" = machines::index,
        "A tenant's machines by name", ["limit", "continue"], Nothing => List("Machine");
    GET "/v1/tenants/{tenant}/machines/{machine}" Need::Tenant(Read), "getMachine" = machines::get,
        "A machine", [], Nothing => Json("Machine");
    PUT "/v1/tenants/{tenant}/machines/{machine}" Need::Tenant(Write),
        "putMachine" = machines::put,
        "Define a machine, or replace its spec from its next start on", [],
        Body("MachineSpec") => Put("Machine");
    DELETE "/v1/tenants/{tenant}/machines/{machine}" Need::Tenant(Write),
        "deleteMachine" = machines::delete,
        "Delete a machine and what its guest wrote; with force also one that runs", ["force"],
        Nothing => Gives::Nothing;
    POST "/v1/tenants/{tenant}/machines/{machine}/start" Need::Tenant(Write),
        "startMachine" = machines::start,
        "Boot a machine; answers when its guest runs", [], Nothing => Json("Machine");
    POST "/v1/tenants/{tenant}/machines/{machine}/stop" Need::Tenant(Write),
        "stopMachine" = machines::stop,
        "Press the power button and, after a time or at once with force, end the machine",
        ["force", "timeout_seconds"], Nothing => Json("Machine");
    POST "/v1/tenants/{tenant}/machines/{machine}/pause" Need::Tenant(Write),
        "pauseMachine" = machines::pause,
        "Stop a machine between two instructions", [], Nothing => Json("Machine");
    POST "/v1/tenants/{tenant}/machines/{machine}/resume" Need::Tenant(Write),
        "resumeMachine" = machines::resume,
        "Let a paused machine go on", [], Nothing => Json("Machine");
    POST "/v1/tenants/{tenant}/machines/{machine}/reset" Need::Tenant(Write),
        "resetMachine" = machines::reset,
        "Press the reset button", [], Nothing => Json("Machine");
    POST "/v1/tenants/{tenant}/machines/{machine}/snapshot" Need::Tenant(Write),
        "snapshotMachine" = machines::snapshot,
        "Save a machine that runs or is paused, memory and disks, in the place of its snapshot before",
        [], Nothing => Json("Machine");
    POST "/v1/tenants/{tenant}/machines/{machine}/restore" Need::Tenant(Write),
        "restoreMachine" = machines::restore,
        "Go on from a snapshot: the machine's own, or of another one of the tenant's", ["from"],
        Nothing => Json("Machine");
    GET "/v1/tenants/{tenant}/machines/{machine}/console" Need::Tenant(Write),
        "getConsole" = machines::console,
        "The machine's console, both ways, by an upgrade to insula-console", [],
        Nothing => Gives::Upgrade;
    GET "/v1/images" Need::Any(Read), "listImages" = images::index,
        "Kernels, initial ramdisks and disks, by name", ["limit", "continue"],
        Nothing => List("Image");
    GET "/v1/images/{image}" Need::Any(Read), "getImage" = images::get,
        "An image", [], Nothing => Json("Image");
    PUT "/v1/images/{image}" Need::Host(Write), "putImage" = images::put,
        "Upload an image", [], Bytes => Put("Image");
    DELETE "/v1/images/{image}" Need::Host(Write), "deleteImage" = images::delete,
        "Delete an image; machines that were made with it keep its content", [],
        Nothing => Gives::Nothing;
    GET "/v1/tokens" Need::Any(Read), "listTokens" = tokens::index,
        "Tokens, without their secrets", ["limit", "continue"], Nothing => List("Token");
    POST "/v1/tokens" Need::Any(Write), "createToken" = tokens::create,
        "Make a token; its secret is shown once", [], Body("TokenRequest") => Created("NewToken");
    DELETE "/v1/tokens/{id}" Need::Any(Write), "deleteToken" = tokens::delete,
        "Revoke a token", [], Nothing => Gives::Nothing;
    GET "/v1/audit" Need::Any(Read), "listAudit" = audit::index,
        "Who changed what, newest first", ["limit", "continue"], Nothing => List("Audit");
    GET "/v1/backup" Need::Host(Write), "getBackup" = backup::download,
        "All intent and all components, for insula restore", [],
        Nothing => Media("application/x-tar");
    GET "/v1/events" Need::Any(Read), "getEvents" = streams::events,
        "Changes of state as server-sent events", [], Nothing => Media("text/event-stream");
};

/// A path that was understood.
pub(super) struct Found {
    pub(super) route: &'static Route,
    pub(super) params: Params,
}

/// The operation for a method and a path.
pub(super) fn find(method: &Method, path: &str) -> Result<Found, Problem> {
    // HEAD is GET without the body, which the HTTP layer leaves out.
    let method = if method == Method::HEAD {
        &Method::GET
    } else {
        method
    };
    let mut allowed = Vec::new();
    for route in ROUTES {
        let Some(segments) = matches(route.path, path) else {
            continue;
        };
        if route.method == *method {
            let params = params(&segments, method)?;
            return Ok(Found { route, params });
        }
        allowed.push(route.method.as_str());
        if route.method == Method::GET {
            allowed.push("HEAD");
        }
    }
    if allowed.is_empty() {
        let detail = "there is no such path; GET /v1/openapi.json lists them";
        return Err(Problem::new(Code::NotFound, detail));
    }
    Err(Problem::method_not_allowed(&allowed.join(", ")))
}

/// The variable segments, when a path fits a pattern.
fn matches<'a>(pattern: &'static str, path: &'a str) -> Option<Vec<(&'static str, &'a str)>> {
    let mut variable = Vec::new();
    let mut given = path.split('/');
    for wanted in pattern.split('/') {
        let segment = given.next()?;
        match wanted
            .strip_prefix('{')
            .and_then(|wanted| wanted.strip_suffix('}'))
        {
            Some(name) => variable.push((name, segment)),
            None if wanted == segment => {}
            None => return None,
        }
    }
    given.next().is_none().then_some(variable)
}

fn params(segments: &[(&'static str, &str)], method: &Method) -> Result<Params, Problem> {
    let mut params = Params::default();
    // Nothing can have a name that is not valid; only who wants to make one is told why.
    let bad = |what: &str, error: insula_types::name::NameError| {
        if method == Method::PUT {
            Problem::new(Code::InvalidName, format_args!("{what}: {error}"))
        } else {
            Problem::not_found(what)
        }
    };
    for (name, text) in segments {
        match *name {
            "tenant" => params.tenant = Some(text.parse().map_err(|error| bad("tenant", error))?),
            "service" => {
                params.service = Some(text.parse().map_err(|error| bad("service", error))?);
            }
            "volume" => params.volume = Some(text.parse().map_err(|error| bad("volume", error))?),
            "machine" => {
                params.machine = Some(text.parse().map_err(|error| bad("machine", error))?);
            }
            "image" => params.image = Some(text.parse().map_err(|error| bad("image", error))?),
            _ => params.id = Some(text.parse().map_err(|_| Problem::not_found("token"))?),
        }
    }
    Ok(params)
}

/// Splits a query and refuses what the route does not know. Values are names and numbers, so that
/// nothing in them is ever escaped.
pub(super) fn query(route: &Route, query: Option<&str>) -> Result<Vec<(String, String)>, Problem> {
    let mut pairs = Vec::new();
    for part in query
        .unwrap_or("")
        .split('&')
        .filter(|part| !part.is_empty())
    {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        if !route.query.contains(&key) || pairs.iter().any(|(seen, _)| seen == key) {
            let known = route.query.join(", ");
            return Err(Problem::new(
                Code::BadRequest,
                format_args!(
                    "the query parameter {key:?} is unknown or given twice; known: {known}"
                ),
            ));
        }
        pairs.push((key.to_owned(), value.to_owned()));
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let find = |method: Method, path: &str| {
            find(&method, path)
                .map(|found| (found.route.id, found.params))
                .map_err(|p| p.code())
        };
        let (id, params) = find(Method::GET, "/v1/tenants/a/services/b/logs").unwrap();
        assert_eq!(id, "getLogs");
        assert_eq!(params.tenant.unwrap().as_str(), "a");
        assert_eq!(params.service.unwrap().as_str(), "b");
        assert_eq!(find(Method::HEAD, "/healthz").unwrap().0, "getHealth");
        assert_eq!(
            find(Method::POST, "/healthz").unwrap_err(),
            Code::MethodNotAllowed
        );
        for path in [
            "/",
            "/v1",
            "/v1/tenants/",
            "/v1/tenants/a/",
            "//healthz",
            "/healthz/",
        ] {
            let code = find(Method::GET, path).unwrap_err();
            assert_eq!(code, Code::NotFound, "{path}");
        }
        assert_eq!(
            find(Method::PUT, "/v1/tenants/A").unwrap_err(),
            Code::InvalidName
        );
        assert_eq!(
            find(Method::GET, "/v1/tenants/..").unwrap_err(),
            Code::NotFound
        );
        assert_eq!(
            find(Method::DELETE, "/v1/tokens/x").unwrap_err(),
            Code::NotFound
        );
    }

    #[test]
    fn queries() {
        let route = find(&Method::GET, "/v1/tenants").unwrap().route;
        assert_eq!(query(route, Some("limit=1&continue=a")).unwrap().len(), 2);
        assert!(query(route, Some("limits=1")).is_err());
        assert!(query(route, Some("limit=1&limit=2")).is_err());
    }
}
