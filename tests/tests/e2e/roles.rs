//! Who may do what: every operation of the API's own description, as every kind of caller.

use std::collections::BTreeSet;

use insula_tests::wait::holds;
use insula_tests::{Admin, Answer, TestHost, guests, until};
use serde_json::{Value, json};

/// The tenant that all paths of the table name, and another one.
const OWN: &str = "alpha";
const OTHER: &str = "beta";

/// A kind of caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Without a token.
    Nobody,
    /// With a token that never was.
    Stranger,
    /// With one that was revoked.
    Revoked,
    /// With one whose time is over.
    Expired,
    HostWrite,
    HostRead,
    /// A token of the tenant that the path names.
    OwnWrite,
    OwnRead,
    /// A token of another tenant.
    OtherWrite,
    OtherRead,
}

use Role::{
    Expired, HostRead, HostWrite, Nobody, OtherRead, OtherWrite, OwnRead, OwnWrite, Revoked,
    Stranger,
};

const ROLES: [Role; 10] = [
    Nobody, Stranger, Revoked, Expired, HostWrite, HostRead, OwnWrite, OwnRead, OtherWrite,
    OtherRead,
];

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cell {
    /// It is done.
    Done,
    /// 401, or 429 after many of them.
    Unknown,
    /// 403.
    Forbidden,
    /// 404, as if there were no such tenant.
    Hidden,
}

use Cell::{Done, Forbidden, Hidden, Unknown};

/// Who may call an operation: a row of cells, in the order of [`ROLES`].
type Rule = [Cell; ROLES.len()];

#[rustfmt::skip]
mod rules {
    use super::{Cell::{Done, Forbidden, Hidden, Unknown}, Rule};
    //                           Nobody   Stranger Revoked  Expired  HostW HostR      OwnW       OwnR       OtherW     OtherR
    pub(super) const ALL: Rule        = [Done,    Done,    Done,    Done,    Done, Done,      Done,      Done,      Done,      Done];
    pub(super) const ANY_READ: Rule   = [Unknown, Unknown, Unknown, Unknown, Done, Done,      Done,      Done,      Done,      Done];
    pub(super) const OWN_READ: Rule   = [Unknown, Unknown, Unknown, Unknown, Done, Done,      Done,      Done,      Hidden,    Hidden];
    pub(super) const OWN_WRITE: Rule  = [Unknown, Unknown, Unknown, Unknown, Done, Forbidden, Done,      Forbidden, Hidden,    Hidden];
    pub(super) const HOST_READ: Rule  = [Unknown, Unknown, Unknown, Unknown, Done, Done,      Forbidden, Forbidden, Forbidden, Forbidden];
    pub(super) const HOST_WRITE: Rule = [Unknown, Unknown, Unknown, Unknown, Done, Forbidden, Forbidden, Forbidden, Forbidden, Forbidden];
    /// On a tenant, which others do not see.
    pub(super) const ON_TENANT: Rule  = [Unknown, Unknown, Unknown, Unknown, Done, Forbidden, Forbidden, Forbidden, Hidden,    Hidden];
    /// A token of the own tenant is made by those who may write there.
    pub(super) const MAKE_TOKEN: Rule = [Unknown, Unknown, Unknown, Unknown, Done, Forbidden, Done,      Forbidden, Forbidden, Forbidden];
    /// Others' tokens are not there; who may only read is not told.
    pub(super) const DROP_TOKEN: Rule = [Unknown, Unknown, Unknown, Unknown, Done, Forbidden, Done,      Forbidden, Hidden,    Forbidden];
}

/// What is sent along.
#[derive(Debug, Clone, Copy)]
enum Body {
    Nothing,
    Json(&'static str),
    Component,
    Image,
}

/// An operation: its name in the description, what to send, and who may.
const TABLE: &[(&str, Body, Rule)] = &[
    ("getHealth", Body::Nothing, rules::ALL),
    ("getReadiness", Body::Nothing, rules::ALL),
    ("getMetrics", Body::Nothing, rules::ALL),
    ("getOpenapi", Body::Nothing, rules::ANY_READ),
    ("getHost", Body::Nothing, rules::HOST_READ),
    ("getRecompilation", Body::Nothing, rules::HOST_READ),
    ("startRecompilation", Body::Nothing, rules::HOST_WRITE),
    ("listTenants", Body::Nothing, rules::ANY_READ),
    ("getTenant", Body::Nothing, rules::OWN_READ),
    ("putTenant", Body::Json("{}"), rules::ON_TENANT),
    ("deleteTenant", Body::Nothing, rules::ON_TENANT),
    ("getUsage", Body::Nothing, rules::OWN_READ),
    ("listServices", Body::Nothing, rules::OWN_READ),
    ("getService", Body::Nothing, rules::OWN_READ),
    (
        "putService",
        Body::Json(r#"{"usage_header":true}"#),
        rules::OWN_WRITE,
    ),
    ("deleteService", Body::Nothing, rules::OWN_WRITE),
    ("listVersions", Body::Nothing, rules::OWN_READ),
    ("createVersion", Body::Component, rules::OWN_WRITE),
    (
        "putTraffic",
        Body::Json(r#"{"1":90,"2":10}"#),
        rules::OWN_WRITE,
    ),
    ("rollback", Body::Nothing, rules::OWN_WRITE),
    ("getLogs", Body::Nothing, rules::OWN_READ),
    ("listVolumes", Body::Nothing, rules::OWN_READ),
    ("getVolume", Body::Nothing, rules::OWN_READ),
    ("putVolume", Body::Json("{}"), rules::OWN_WRITE),
    (
        "snapshotVolume",
        Body::Json(r#"{"name":"snapshot"}"#),
        rules::OWN_WRITE,
    ),
    (
        "cloneVolume",
        Body::Json(r#"{"name":"clone"}"#),
        rules::OWN_WRITE,
    ),
    ("deleteVolume", Body::Nothing, rules::OWN_WRITE),
    ("listMachines", Body::Nothing, rules::OWN_READ),
    ("getMachine", Body::Nothing, rules::OWN_READ),
    (
        "putMachine",
        Body::Json(r#"{"kernel":"kernel","vcpus":2}"#),
        rules::OWN_WRITE,
    ),
    ("deleteMachine", Body::Nothing, rules::OWN_WRITE),
    ("startMachine", Body::Nothing, rules::OWN_WRITE),
    ("stopMachine", Body::Nothing, rules::OWN_WRITE),
    ("pauseMachine", Body::Nothing, rules::OWN_WRITE),
    ("resumeMachine", Body::Nothing, rules::OWN_WRITE),
    ("resetMachine", Body::Nothing, rules::OWN_WRITE),
    ("snapshotMachine", Body::Nothing, rules::OWN_WRITE),
    ("restoreMachine", Body::Nothing, rules::OWN_WRITE),
    ("getConsole", Body::Nothing, rules::OWN_WRITE),
    ("listImages", Body::Nothing, rules::ANY_READ),
    ("getImage", Body::Nothing, rules::ANY_READ),
    ("putImage", Body::Image, rules::HOST_WRITE),
    ("deleteImage", Body::Nothing, rules::HOST_WRITE),
    ("listTokens", Body::Nothing, rules::ANY_READ),
    (
        "createToken",
        Body::Json(r#"{"name":"made","tenant":"alpha"}"#),
        rules::MAKE_TOKEN,
    ),
    ("deleteToken", Body::Nothing, rules::DROP_TOKEN),
    ("listAudit", Body::Nothing, rules::ANY_READ),
    ("getBackup", Body::Nothing, rules::HOST_WRITE),
    ("getEvents", Body::Nothing, rules::ANY_READ),
];

/// What becomes of these depends on the machine's state, and on whether there is KVM: who may call
/// them is told something about the machine, and not about himself.
const DEPENDS_ON_STATE: [&str; 8] = [
    "startMachine",
    "stopMachine",
    "pauseMachine",
    "resumeMachine",
    "resetMachine",
    "snapshotMachine",
    "restoreMachine",
    "getConsole",
];

/// Operations of the description: name, method, path.
fn described(admin: &Admin) -> Vec<(String, String, String)> {
    let document = admin.get("/v1/openapi.json");
    let mut operations = Vec::new();
    for (path, methods) in document["paths"].as_object().expect("paths") {
        for (method, operation) in methods.as_object().expect("methods") {
            let name = operation["operationId"].as_str().expect("a name");
            operations.push((name.to_owned(), method.to_uppercase(), path.clone()));
        }
    }
    operations
}

/// Two tenants with a service each, and a token of each kind.
struct Scene<'a> {
    host: &'a TestHost,
    tokens: Vec<(Role, Option<String>)>,
    /// A token of the own tenant that is there to be deleted.
    victim: String,
}

fn token(admin: &Admin, document: &Value) -> (String, String) {
    let made = admin.post("/v1/tokens", document);
    let secret = made["secret"].as_str().expect("a secret");
    (made["id"].to_string(), secret.to_owned())
}

impl<'a> Scene<'a> {
    /// As it is before every call that changes something.
    fn new(host: &'a TestHost, others: &[(Role, Option<String>)], operation: &str) -> Self {
        let admin = host.admin();
        let image = admin.image("/v1/images/kernel", *b"no kernel").send();
        assert!((200..300).contains(&image.status), "{}", image.text());
        let mut tokens = others.to_vec();
        for (tenant, roles) in [(OWN, [OwnWrite, OwnRead]), (OTHER, [OtherWrite, OtherRead])] {
            let path = format!("/v1/tenants/{tenant}");
            admin.put(&path, &json!({}));
            for name in [
                format!("kept-by-{tenant}"),
                "snapshot".into(),
                "clone".into(),
            ] {
                let path = format!("{path}/volumes/{name}");
                if admin.request("GET", &path).send().status == 200 {
                    admin.delete(&path);
                }
            }
            admin.put(&format!("{path}/volumes/kept-by-{tenant}"), &json!({}));
            let path = format!("{path}/services/web-of-{tenant}");
            if admin.request("GET", &path).send().status == 200 {
                admin.delete(&path);
            }
            admin.put(&path, &json!({}));
            // A tenant with machines is not deleted.
            let machine = format!("/v1/tenants/{tenant}/machines/web-of-{tenant}");
            if operation != "deleteTenant" {
                admin.put(&machine, &json!({"kernel": "kernel"}));
            } else if admin.request("GET", &machine).send().status == 200 {
                admin.delete(&machine);
            }
            let path = format!("{path}/versions");
            for _ in 0..2 {
                let uploaded = admin.upload(&path, guests::bytes("hello")).send();
                assert_eq!(uploaded.status, 201, "{}", uploaded.text());
            }
            for (role, access) in roles.into_iter().zip(["write", "read"]) {
                let document = json!({"name": "t", "tenant": tenant, "access": access});
                tokens.push((role, Some(token(&admin, &document).1)));
            }
        }
        let (victim, _) = token(&admin, &json!({"name": "victim", "tenant": OWN}));
        Self {
            host,
            tokens,
            victim,
        }
    }

    fn call(&self, role: Role, method: &str, path: &str, body: Body) -> Answer {
        let mut tokens = self.tokens.iter();
        let (_, secret) = tokens
            .find(|(known, _)| *known == role)
            .expect("every role");
        let admin = self.host.admin_as(secret.as_deref());
        let path = path
            .replace("{tenant}", OWN)
            .replace("{service}", &format!("web-of-{OWN}"))
            .replace("{volume}", &format!("kept-by-{OWN}"))
            .replace("{machine}", &format!("web-of-{OWN}"))
            .replace("{image}", "kernel")
            .replace("{id}", &self.victim);
        let request = match body {
            Body::Nothing => admin.request(method, &path),
            Body::Json(text) => {
                let document = serde_json::from_str(text).expect("JSON");
                admin.json(method, &path, &document)
            }
            Body::Component => admin.upload(&path, guests::bytes("hello")),
            Body::Image => admin.image(&path, *b"another kernel"),
        };
        if path != "/v1/events" {
            return request.send();
        }
        // This one has no end.
        let mut stream = request.open();
        let (status, headers) = (stream.head.status, stream.head.headers.clone());
        let body = if status == 200 {
            Vec::new()
        } else {
            stream.piece().expect("a body").unwrap_or_default()
        };
        Answer {
            status,
            headers,
            body,
            trailers: Default::default(),
        }
    }
}

/// Tokens of the host and those that are none; they outlast the tenants.
fn host_tokens(host: &TestHost) -> Vec<(Role, Option<String>)> {
    let admin = host.admin();
    let (revoked_id, revoked) = token(&admin, &json!({"name": "r", "access": "write"}));
    admin.delete(&format!("/v1/tokens/{revoked_id}"));
    let expiring = json!({"name": "e", "access": "write", "ttl_seconds": 1});
    let (_, expired) = token(&admin, &expiring);
    until(std::time::Duration::from_secs(5), "it expires", || {
        let status = host
            .admin_as(Some(&expired))
            .request("GET", "/v1/host")
            .send()
            .status;
        holds(status == 401, status.to_string())
    });
    let (_, write) = token(&admin, &json!({"name": "w", "access": "write"}));
    let (_, read) = token(&admin, &json!({"name": "r", "access": "read"}));
    vec![
        (Nobody, None),
        (Stranger, Some(format!("insula_{}", "0".repeat(64)))),
        (Revoked, Some(revoked)),
        (Expired, Some(expired)),
        (HostWrite, Some(write)),
        (HostRead, Some(read)),
    ]
}

#[test]
fn every_operation_answers_every_kind_of_caller_as_it_should() {
    let host = TestHost::start();
    let operations = described(&host.admin());
    let names: BTreeSet<&str> = operations.iter().map(|(name, ..)| name.as_str()).collect();
    let table: BTreeSet<&str> = TABLE.iter().map(|(name, ..)| *name).collect();
    assert_eq!(
        names, table,
        "the description and the table have the same operations"
    );
    assert_eq!(table.len(), TABLE.len());
    let outlasting = host_tokens(&host);
    let mut wrong = Vec::new();
    let mut cells = 0;
    for (name, method, path) in &operations {
        let mut rows = TABLE.iter();
        let (_, body, rule) = rows.find(|(known, ..)| known == name).expect("a row");
        let mut scene = Scene::new(&host, &outlasting, name);
        for (role, wanted) in ROLES.into_iter().zip(rule) {
            let answer = scene.call(role, method, path, *body);
            cells += 1;
            let is_as_it_should = match wanted {
                Done if DEPENDS_ON_STATE.contains(&name.as_str()) => {
                    !matches!(answer.status, 401 | 403 | 404)
                }
                Done => (200..300).contains(&answer.status),
                Unknown => {
                    answer.status == 401
                        || (answer.status == 429 && answer.problem() == "auth_rate_limited")
                }
                Forbidden => answer.status == 403 && answer.problem() == "forbidden",
                Hidden => answer.status == 404 && answer.problem() == "not_found",
            };
            let text = String::from_utf8_lossy(&answer.body);
            if !is_as_it_should {
                wrong.push(format!(
                    "{name} as {role:?}: {wanted:?} expected, {} {text}",
                    answer.status
                ));
            }
            // Whatever others are told, they learn nothing of this tenant's things. The page of
            // metrics is for whoever reaches the listener: all names are on it.
            if matches!(role, OtherWrite | OtherRead)
                && name != "getMetrics"
                && text.contains(&format!("web-of-{OWN}"))
            {
                wrong.push(format!(
                    "{name} as {role:?} tells of another tenant: {text}"
                ));
            }
            if *wanted != Done {
                // The refused call has changed nothing.
                let path = format!("/v1/tenants/{OWN}/services/web-of-{OWN}");
                let service = host.admin().get(&path);
                assert_eq!(service["traffic"], json!({"2": 100}), "{name} as {role:?}");
            } else if method != "GET" {
                scene = Scene::new(&host, &outlasting, name);
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {cells} cells:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    assert_eq!(cells, TABLE.len() * ROLES.len());
}

#[test]
fn guessing_is_slowed_down_and_holds_nobody_else_up() {
    let host = TestHost::start();
    let admin = host.admin();
    let guess = |n: u32| {
        let secret = format!("insula_{n:064x}");
        host.admin_as(Some(&secret))
            .request("GET", "/v1/host")
            .send()
    };
    let mut held_back = 0;
    for n in 0..100 {
        let answer = guess(n);
        match answer.status {
            401 => {}
            429 => {
                assert_eq!(answer.problem(), "auth_rate_limited");
                assert!(answer.header("retry-after").is_some());
                held_back += 1;
            }
            other => panic!("{other}: {}", answer.text()),
        }
        assert_eq!(
            admin.request("GET", "/v1/host").send().status,
            200,
            "who has a token is let in"
        );
    }
    assert!(held_back >= 20, "{held_back} of 100 guesses were held back");
}
