//! The OpenAPI 3.1 description, made from the routing table and the schemas beside it
//! (`schemas.json`). Tests hold the two together.

#[cfg(test)]
use std::collections::BTreeSet;

use insula_types::Outcome;
use serde_json::{Map, Value, json};

use super::auth::Need;
use super::http_types::PAGE_MAX;
use super::logs::LINES_MAX;
use super::problem::Code;
use super::router::{Gives, ROUTES, Route, Takes};
use crate::state::Access;

/// The schemas: documents, specs, quantities.
const SCHEMAS: &str = include_str!("schemas.json");

/// The whole document.
pub(super) fn document() -> Value {
    let mut paths = Map::new();
    for route in ROUTES {
        let operations = paths.entry(route.path).or_insert_with(|| json!({}));
        operations[route.method.as_str().to_ascii_lowercase()] = operation(route);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Insula admin API",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Many tenants' Wasm services on one machine. Specs answer with an \
                ETag that If-Match takes; POST takes an Idempotency-Key, which makes a \
                repetition within 24 hours safe.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {
                "type": "http",
                "scheme": "bearer",
                "description": "The first token is in <data>/admin.token on the host.",
            }},
            "parameters": parameters(),
            "responses": {"Problem": {
                "description": "What went wrong, as RFC 9457 says it",
                "content": {"application/problem+json": {"schema": reference("Problem")}},
            }},
            "schemas": schemas(),
        },
    })
}

fn reference(schema: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{schema}")})
}

fn schemas() -> Value {
    // Checked by a test: the text is part of the program.
    let mut schemas: Value = serde_json::from_str(SCHEMAS).unwrap_or_default();
    let codes: Vec<&str> = Code::ALL.iter().map(|code| code.as_str()).collect();
    schemas["Problem"]["properties"]["code"]["enum"] = json!(codes);
    let mut requests = Map::new();
    for word in ["total"]
        .into_iter()
        .chain(Outcome::ALL.map(Outcome::as_str))
    {
        requests.insert(word.to_owned(), json!({"type": "integer", "minimum": 0}));
    }
    schemas["Requests"]["properties"] = requests.into();
    schemas
}

fn parameters() -> Value {
    let name = |what: &str| {
        json!({"name": what, "in": "path", "required": true, "schema": reference("Name"),
            "description": format!("The {what}'s name")})
    };
    let query = |what: &str, schema: Value, description: &str| json!({"name": what, "in": "query", "schema": schema, "description": description});
    let header = |what: &str, description: &str| {
        json!({"name": what, "in": "header", "schema": {"type": "string"},
            "description": description})
    };
    json!({
        "tenant": name("tenant"),
        "service": name("service"),
        "volume": name("volume"),
        "machine": name("machine"),
        "image": {"name": "image", "in": "path", "required": true,
            "schema": reference("ImageName"), "description": "The image's name"},
        "force": query("force", json!({"type": "boolean", "default": false}),
            "Whether a guest that runs is ended without being asked"),
        "from": query("from", reference("Name"), "Whose snapshot; the machine's own where nothing is said"),
        "timeout_seconds": query("timeout_seconds", json!({"type": "integer", "minimum": 0, "maximum": 600}),
            "How long a guest has for shutting down; 30 where nothing is said"),
        "id": {"name": "id", "in": "path", "required": true, "schema": {"type": "integer"},
            "description": "The token's id"},
        "limit": query("limit", json!({"type": "integer", "minimum": 1, "maximum": PAGE_MAX}),
            "Items in one answer, at most"),
        "continue": query("continue", json!({"type": "string"}),
            "The `next` of the answer before"),
        "activate": query("activate", json!({"type": "boolean", "default": true}),
            "Whether the new version serves at once"),
        "follow": query("follow", json!({"type": "boolean", "default": false}),
            "Whether the answer goes on with the lines to come"),
        "tail": query("tail", json!({"type": "integer", "minimum": 0, "maximum": LINES_MAX}),
            "Lines of the past, at most"),
        "if-match": header("If-Match", "The ETag that the change was made from, or *"),
        "if-none-match": header("If-None-Match", "* to create and never replace"),
        "idempotency-key": header("Idempotency-Key",
            "Chosen by the caller; a repetition with the same key and body is answered as before"),
    })
}

fn operation(route: &Route) -> Value {
    let mut names: Vec<&str> = route
        .path
        .split('/')
        .filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}'))
        .collect();
    names.extend(route.query);
    let spec = matches!(route.gives, Gives::Put(_)) || route.id.starts_with("delete");
    if spec && route.id != "deleteToken" {
        names.push("if-match");
        if matches!(route.gives, Gives::Put(_)) {
            names.push("if-none-match");
        }
    }
    if route.method == http::Method::POST {
        names.push("idempotency-key");
    }
    let parameters: Vec<Value> = names
        .into_iter()
        .map(|name| json!({"$ref": format!("#/components/parameters/{name}")}))
        .collect();
    let mut operation = json!({
        "operationId": route.id,
        "summary": route.summary,
        "description": needs(route.need),
        "parameters": parameters,
        "responses": responses(route),
    });
    match route.need {
        Need::Public => operation["security"] = json!([]),
        Need::PublicOnLoopback => operation["security"] = json!([{}, {"token": []}]),
        _ => {}
    }
    match route.takes {
        Takes::Nothing => {}
        Takes::Json(schema) => {
            operation["requestBody"] = json!({"required": true,
                "content": {"application/json": {"schema": reference(schema)}}});
        }
        Takes::Bytes => {
            operation["requestBody"] = json!({"required": true,
                "content": {"application/octet-stream": {"schema": {}}}});
        }
        Takes::Wasm => {
            operation["requestBody"] = json!({"required": true,
                "content": {"application/wasm": {"schema": {}}}});
        }
    }
    operation
}

fn needs(need: Need) -> String {
    let (who, access) = match need {
        Need::Public => return "Needs no token.".to_owned(),
        Need::PublicOnLoopback => {
            return "Needs no token where the admin API listens on a loopback address, else a \
                token of the host."
                .to_owned();
        }
        Need::Any(access) => ("any token", access),
        Need::Tenant(access) => ("a token of the host or of this tenant", access),
        Need::Host(access) => ("a token of the host", access),
    };
    match access {
        Access::Read => format!("Needs {who}."),
        Access::Write => format!("Needs {who} that may write."),
    }
}

fn responses(route: &Route) -> Value {
    let answer = |description: &str, schema: Value| {
        json!({"description": description,
            "content": {"application/json": {"schema": schema}}})
    };
    let list = |schema: &str| {
        json!({"type": "object", "required": ["items", "next"], "properties": {
            "items": {"type": "array", "items": reference(schema)},
            "next": {"type": ["string", "null"], "description": "For `continue`; null at the end"},
        }})
    };
    let mut responses = match route.gives {
        Gives::Nothing => json!({"204": {"description": "Done"}}),
        Gives::Json(schema) => json!({"200": answer("Done", reference(schema))}),
        Gives::List(schema) => json!({"200": answer("A part of the list", list(schema))}),
        Gives::Created(schema) => json!({"201": answer("Created", reference(schema))}),
        Gives::Put(schema) => json!({
            "200": answer("Replaced, or as it was", reference(schema)),
            "201": answer("Created", reference(schema)),
        }),
        Gives::Upgrade => json!({"101": {"description": "The connection is another protocol's"}}),
        Gives::Media(media) => {
            json!({"200": {"description": "Done", "content": {media: {"schema": {"type": "string"}}}}})
        }
    };
    responses["default"] = json!({"$ref": "#/components/responses/Problem"});
    responses
}

#[cfg(test)]
/// All `$ref`s below a value.
fn references(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            if let Some(Value::String(target)) = object.get("$ref") {
                found.insert(target.clone());
            }
            object.values().for_each(|value| references(value, found));
        }
        Value::Array(items) => items.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_described_and_every_description_is_a_route() {
        let document = document();
        let paths = document["paths"].as_object().unwrap();
        for route in ROUTES {
            let operation = &paths[route.path][route.method.as_str().to_ascii_lowercase()];
            assert_eq!(operation["operationId"], route.id);
        }
        let described: usize = paths
            .values()
            .map(|path| path.as_object().unwrap().len())
            .sum();
        assert_eq!(described, ROUTES.len());
        let ids: BTreeSet<_> = ROUTES.iter().map(|route| route.id).collect();
        assert_eq!(ids.len(), ROUTES.len(), "operation ids are unique");
    }

    #[test]
    fn every_reference_leads_somewhere_and_every_schema_is_used() {
        let document = document();
        let mut found = BTreeSet::new();
        references(&document, &mut found);
        for target in &found {
            let pointer = target.strip_prefix('#').unwrap();
            assert!(
                document.pointer(pointer).is_some(),
                "{target} leads nowhere"
            );
        }
        for (kind, used) in [("schemas", true), ("parameters", true), ("responses", true)] {
            for name in document["components"][kind].as_object().unwrap().keys() {
                let target = format!("#/components/{kind}/{name}");
                assert_eq!(found.contains(&target), used, "{target}");
            }
        }
    }
}
