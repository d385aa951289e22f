//! The admin API: who may, what is accepted, and how it says no.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use insula_tests::http::Request;
use insula_tests::wait::holds;
use insula_tests::{Admin, Answer, Connection, TestHost, guests, until};
use serde_json::{Value, json};

/// Status and code of a refusal.
fn refusal(answer: &Answer) -> (u16, String) {
    (answer.status, answer.problem())
}

fn assert_refused(request: Request, status: u16, code: &str) -> Answer {
    let what = format!("{request:?}");
    let answer = request.send();
    assert_eq!(
        refusal(&answer),
        (status, code.to_owned()),
        "{what}: {}",
        answer.text()
    );
    answer
}

#[test]
fn nobody_gets_in_without_a_valid_token() {
    let host = TestHost::start();
    let token = host.token();
    let file = fs::metadata(host.data().join("admin.token")).expect("the token's file");
    assert_eq!(file.permissions().mode() & 0o777, 0o600);
    for secret in fs::read_dir(host.data()).expect("the data directory") {
        let path = secret.expect("an entry").path();
        if path.is_file() && !path.ends_with("admin.token") {
            let bytes = fs::read(&path).unwrap_or_default();
            let found = bytes
                .windows(token.len())
                .any(|window| window == token.as_bytes());
            assert!(!found, "{} holds the token", path.display());
        }
    }
    let nobody = host.admin_as(None);
    for public in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(nobody.request("GET", public).send().status, 200, "{public}");
    }
    let wrong = token.replace(|c: char| c.is_ascii_digit(), "a");
    for (method, path) in [
        ("GET", "/v1/tenants"),
        ("GET", "/v1/host"),
        ("PUT", "/v1/tenants/a"),
        ("GET", "/v1/nowhere"),
        ("DELETE", "/v1/tenants"),
    ] {
        let answer = assert_refused(nobody.request(method, path), 401, "unauthorized");
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        let stranger = host.admin_as(Some(&wrong));
        assert_refused(stranger.request(method, path), 401, "unauthorized");
    }
    for header in [
        format!("Basic {token}"),
        token.clone(),
        "Bearer".to_owned(),
        String::new(),
    ] {
        let request = nobody
            .request("GET", "/v1/tenants")
            .header("authorization", header);
        assert_refused(request, 401, "unauthorized");
    }
    let twice = host.admin().request("GET", "/v1/tenants");
    let twice = twice.header("authorization", format!("Bearer {token}"));
    assert_refused(twice, 401, "unauthorized");
    // A page of another web site in a browser of this machine.
    let page = host
        .admin()
        .request("GET", "/v1/tenants")
        .header("origin", "http://evil.example");
    assert_refused(page, 403, "foreign_origin");
    // Guessers are slowed down, and nobody else is.
    let guesses: Vec<u16> = (0..60)
        .map(|_| nobody.request("GET", "/v1/host").send().status)
        .collect();
    assert!(guesses.contains(&429), "{guesses:?}");
    assert_eq!(host.admin().request("GET", "/v1/host").send().status, 200);
    assert!(!host.said().contains(&token), "the token is in the log");
}

/// Makes a token; gives its id and a client that has it.
fn token(host: &TestHost, document: &Value) -> (Value, Admin) {
    let made = host.admin().post("/v1/tokens", document);
    let secret = made["secret"]
        .as_str()
        .unwrap_or_else(|| panic!("no secret: {made}"));
    (made["id"].clone(), host.admin_as(Some(secret)))
}

#[test]
fn a_token_opens_what_its_scope_says_and_nothing_else() {
    let host = TestHost::start();
    let a = host.tenant("a").create();
    let b = host.tenant("b").create();
    let (mine, theirs) = (a.deploy("hello"), b.deploy("hello"));
    let reads_all = json!({"name": "r", "scope": "host", "access": "read"});
    let (_, reader) = token(&host, &reads_all);
    assert_eq!(reader.names("/v1/tenants"), ["a", "b"]);
    assert_refused(
        reader.json("PUT", "/v1/tenants/c", &json!({})),
        403,
        "forbidden",
    );
    assert_refused(reader.request("DELETE", "/v1/tenants/a"), 403, "forbidden");
    assert_refused(
        reader.json("POST", "/v1/tokens", &reads_all),
        403,
        "forbidden",
    );

    let owns_a = json!({"name": "w", "tenant": "a", "access": "write"});
    let (id, owner) = token(&host, &owns_a);
    assert_eq!(
        owner.names("/v1/tenants"),
        ["a"],
        "other tenants are not there"
    );
    assert_eq!(owner.get("/v1/tenants/a/usage")["tenant"], "a");
    assert_eq!(owner.request("GET", &mine.path()).send().status, 200);
    owner.put("/v1/tenants/a/services/more", &json!({}));
    for path in [
        "/v1/tenants/b",
        "/v1/tenants/b/usage",
        &theirs.path(),
        "/v1/tenants/nowhere",
    ] {
        let answer = assert_refused(owner.request("GET", path), 404, "not_found");
        let nowhere = owner.request("GET", "/v1/tenants/nowhere/usage").send();
        assert_eq!(
            answer.problem_words(),
            nowhere.problem_words(),
            "as if it were not there"
        );
    }
    let upload = format!("{}/versions", theirs.path());
    assert_refused(
        owner.upload(&upload, guests::bytes("echo")),
        404,
        "not_found",
    );
    assert_refused(owner.request("GET", "/v1/host"), 403, "forbidden");
    assert_refused(
        owner.json("PUT", "/v1/tenants/a", &json!({})),
        403,
        "forbidden",
    );
    assert_refused(owner.request("DELETE", "/v1/tenants/a"), 403, "forbidden");
    let wants_more = json!({"name": "x", "scope": "host", "access": "write"});
    assert_refused(
        owner.json("POST", "/v1/tokens", &wants_more),
        403,
        "forbidden",
    );
    let sees = |admin: &Admin| admin.names("/v1/tokens").len();
    assert_eq!((sees(&owner), sees(&host.admin())), (1, 3));

    // Revoked is revoked at once.
    host.admin().delete(&format!("/v1/tokens/{id}"));
    assert_refused(owner.request("GET", "/v1/tenants"), 401, "unauthorized");
    let (_, brief) = token(
        &host,
        &json!({"name": "t", "scope": "host", "ttl_seconds": 1}),
    );
    let made = Instant::now();
    until(Duration::from_secs(10), "the token has expired", || {
        let status = brief.request("GET", "/v1/tenants").send().status;
        holds(status == 401, format!("{status}"))
    });
    assert!(
        made.elapsed() >= Duration::from_millis(900),
        "{:?}",
        made.elapsed()
    );
    // The last key stays in the house; and with a tenant go its tokens.
    let (_, tenants) = token(
        &host,
        &json!({"name": "b", "tenant": "b", "access": "write"}),
    );
    b.delete();
    assert_refused(tenants.request("GET", "/v1/tenants"), 401, "unauthorized");
    let list = host.admin().get("/v1/tokens");
    let admin = list["items"]
        .as_array()
        .and_then(|items| items.iter().find(|item| item["name"] == "admin"));
    let id = admin.expect("the administrator's token")["id"].clone();
    assert!(
        !list.to_string().contains("insula_"),
        "no secret is shown again: {list}"
    );
    let last = host.admin().request("DELETE", &format!("/v1/tokens/{id}"));
    assert_refused(last, 409, "last_admin_token");
}

#[test]
fn changes_made_at_the_same_time_are_noticed() {
    let host = TestHost::start();
    let admin = host.admin();
    let path = "/v1/tenants/a";
    let absent = admin
        .json("PUT", path, &json!({}))
        .header("if-none-match", "*");
    let created = absent.send();
    assert_eq!(created.status, 201, "{}", created.text());
    let first = created.header("etag").expect("an ETag").to_owned();
    let again = admin
        .json("PUT", path, &json!({}))
        .header("if-none-match", "*");
    assert_refused(again, 412, "precondition_failed");
    let change = |shares: u64, etag: &str| {
        let document = json!({"cpu": {"shares": shares}});
        admin.json("PUT", path, &document).header("if-match", etag)
    };
    let changed = change(2000, &first).send();
    assert_eq!(changed.status, 200, "{}", changed.text());
    let second = changed.header("etag").expect("an ETag").to_owned();
    assert_ne!(first, second);
    assert_refused(change(3000, &first), 412, "precondition_failed");
    assert_eq!(admin.get(path)["cpu"]["shares"], 2000);
    let read = admin.request("GET", path).send();
    assert_eq!(read.header("etag"), Some(second.as_str()));
    // What is the same already is no change.
    let same = change(2000, &second).send();
    assert_eq!(
        (same.status, same.header("etag")),
        (200, Some(second.as_str()))
    );
    let stale = admin.request("DELETE", path).header("if-match", first);
    assert_refused(stale, 412, "precondition_failed");
    let fresh = admin.request("DELETE", path).header("if-match", second);
    assert_eq!(fresh.send().status, 204);
    assert_refused(change(1, "*"), 412, "precondition_failed");
}

#[test]
fn a_post_that_is_repeated_with_its_key_is_done_once() {
    let host = TestHost::start();
    let admin = host.admin();
    let service = host.tenant("a").create().service("s").create();
    let path = format!("{}/versions", service.path());
    let upload = |sample: &str, key: &str| {
        admin
            .upload(&path, guests::bytes(sample))
            .header("idempotency-key", key)
            .send()
    };
    let first = upload("hello", "one");
    let second = upload("hello", "one");
    assert_eq!((first.status, second.status), (201, 201));
    assert_eq!(first.json(), second.json());
    assert_eq!(admin.names(&path), ["1"]);
    let other = upload("echo", "one");
    assert_eq!(refusal(&other), (422, "idempotency_mismatch".to_owned()));
    assert_eq!(upload("echo", "two").json()["version"], 2);
    assert_eq!(
        upload("hello", "three").json()["version"],
        3,
        "another key is another upload"
    );
    host.restart();
    let admin = host.admin();
    let again = admin
        .upload(&path, guests::bytes("echo"))
        .header("idempotency-key", "two")
        .send();
    assert_eq!(
        (again.status, &again.json()["version"]),
        (201, &json!(2)),
        "after a restart too"
    );
}

#[test]
fn a_document_that_cannot_be_meant_is_refused_with_all_its_mistakes() {
    let host = TestHost::start();
    let admin = host.admin();
    let _ = host.tenant("a").create();
    let tenant = |document: &Value| admin.json("PUT", "/v1/tenants/b", document);
    let service = |document: &Value| admin.json("PUT", "/v1/tenants/a/services/s", document);
    let cases = [
        (tenant(&json!({"cpus": {}})), vec!["cpus"]),
        (tenant(&json!({"cpu": {"share": 1}})), vec!["share"]),
        (tenant(&json!({"cpu": {"limit": "fast"}})), vec!["fast"]),
        (tenant(&json!({"cpu": {"limit": "0.0001"}})), vec!["0.0001"]),
        (tenant(&json!({"cpu": {"shares": 0}})), vec!["shares"]),
        (tenant(&json!({"memory": {"limit": "-1"}})), vec!["-1"]),
        (
            tenant(&json!({"memory": {"limit": "64XiB"}})),
            vec!["64XiB"],
        ),
        (tenant(&json!([])), vec![]),
        (
            tenant(&json!({
                "cpu": {"reservation": "2", "limit": "1"},
                "requests": {"in_flight": 0, "per_second": 0},
            })),
            vec![
                "cpu.reservation",
                "requests.in_flight",
                "requests.per_second",
            ],
        ),
        (
            service(&json!({"limits": {"timeout": "soon"}})),
            vec!["soon"],
        ),
        (service(&json!({"limits": {"fuel": 0}})), vec!["fuel"]),
        (service(&json!({"routes": ["http://x/"]})), vec!["http"]),
        (
            service(&json!({
                "env": {"A=B": "x"}, "volumes": [{"name": "d", "path": "/d"}, {"name": "d", "path": "/e"}],
                "outbound": ["https://x/y"],
                "limits": {"memory": 1},
            })),
            vec!["env", "volumes", "outbound", "limits.memory"],
        ),
        (service(&json!({"name": "other"})), vec!["other"]),
    ];
    for (request, words) in cases {
        let what = format!("{request:?}");
        let answer = request.send();
        assert_eq!(answer.status, 422, "{what}: {}", answer.text());
        answer.problem();
        for word in words {
            assert!(
                answer.text().contains(word),
                "{word} is not in {}",
                answer.text()
            );
        }
    }
    assert_eq!(admin.names("/v1/tenants"), ["a"]);
    assert_eq!(admin.names("/v1/tenants/a/services"), Vec::<String>::new());
    let json = |body: &str| {
        let request = admin.request("PUT", "/v1/tenants/b").body(body);
        request.header("content-type", "application/json")
    };
    assert_refused(json("{"), 400, "malformed_json");
    assert_refused(json(""), 400, "malformed_json");
    assert_refused(json(&" ".repeat(2 << 20)), 413, "too_large");
    let form = admin
        .request("PUT", "/v1/tenants/b")
        .body("{}")
        .header("content-type", "text/plain");
    assert_refused(form, 415, "unsupported_media_type");
    let untyped = admin.request("PUT", "/v1/tenants/b").body("{}");
    assert_refused(untyped, 415, "unsupported_media_type");
    let upload = admin
        .request("POST", "/v1/tenants/a/services/s/versions")
        .body("x");
    let upload = upload.header("content-type", "application/octet-stream");
    assert_refused(upload, 415, "unsupported_media_type");
}

#[test]
fn names_are_names() {
    let host = TestHost::start();
    let admin = host.admin();
    let long = "a".repeat(63);
    for good in ["a", "0", "a-b", "a--b", "x1", &long] {
        admin.put(&format!("/v1/tenants/{good}"), &json!({}));
        admin.put(&format!("/v1/tenants/{good}/services/{good}"), &json!({}));
    }
    let too_long = "a".repeat(64);
    let bad = [
        "A", "-a", "a-", "a_b", "a.b", "a%2fb", "%2e%2e", "..", "a%00", "%c3%a4", &too_long, "a+b",
    ];
    for bad in bad {
        for path in [
            format!("/v1/tenants/{bad}"),
            format!("/v1/tenants/a/services/{bad}"),
        ] {
            let answer = admin.json("PUT", &path, &json!({})).send();
            let (status, code) = refusal(&answer);
            assert!([404, 422].contains(&status), "{path}: {status} {code}");
            let read = admin.request("GET", &path).send();
            assert_eq!(read.status, 404, "{path}");
        }
    }
    let mut names = admin.names("/v1/tenants");
    names.sort();
    assert_eq!(names, ["0", "a", "a--b", "a-b", &long, "x1"]);
}

#[test]
fn what_is_not_there_or_not_meant_so_is_said_so() {
    let host = TestHost::start();
    let admin = host.admin();
    let _ = host.tenant("a").create().service("s").create();
    for path in [
        "/",
        "/v1",
        "/v1/",
        "/v2/tenants",
        "/v1/tenants/",
        "/v1/tenants/b",
        "/v1/tenants/b/services",
        "/v1/tenants/b/usage",
        "/v1/tenants/a/services/x",
        "/v1/tenants/a/services/x/versions",
        "/v1/tenants/a/services/x/logs",
        "/v1/tenants/a/services/../s",
        "/v1/tenants//services",
    ] {
        assert_refused(admin.request("GET", path), 404, "not_found");
    }
    for (method, path) in [
        ("POST", "/v1/tenants"),
        ("DELETE", "/v1/tenants"),
        ("PATCH", "/v1/tenants/a"),
        ("POST", "/v1/host"),
        ("GET", "/v1/tenants/a/services/s/rollback"),
        ("PUT", "/metrics"),
    ] {
        let answer = assert_refused(admin.request(method, path), 405, "method_not_allowed");
        assert!(
            answer
                .header("allow")
                .is_some_and(|allow| !allow.is_empty()),
            "{method} {path}"
        );
    }
    assert_refused(
        admin.request("GET", "/v1/tenants?limit=x"),
        400,
        "bad_request",
    );
    assert_refused(
        admin.request("GET", "/v1/tenants?what=x"),
        400,
        "bad_request",
    );
    let rollback = admin.json("POST", "/v1/tenants/a/services/s/rollback", &json!({}));
    assert_refused(rollback, 409, "no_previous_version");
    let traffic = |shares: &Value| admin.json("PUT", "/v1/tenants/a/services/s/traffic", shares);
    assert_refused(traffic(&json!({"7": 100})), 422, "unknown_version");
    assert_refused(traffic(&json!({"1": 50})), 422, "invalid_spec");
    let missing = admin.json("PUT", "/v1/tenants/b/services/s", &json!({}));
    assert_refused(missing, 404, "not_found");
    let upload = admin.upload("/v1/tenants/a/services/x/versions", guests::bytes("hello"));
    assert_refused(upload, 404, "not_found");
    // A head that is too large, and one that is none.
    let large = admin
        .request("GET", "/v1/host")
        .header("x", "y".repeat(64 << 10))
        .send();
    assert!([400, 431].contains(&large.status), "{}", large.status);
    let mut noise = Connection::open(host.admin_address()).expect("a connection");
    noise.raw(b"\x16\x03\x01\x02\x00\r\n\r\n").expect("sent");
    let _ = noise.rest();
    assert_eq!(admin.request("GET", "/healthz").send().status, 200);
}

#[test]
fn lists_come_in_parts() {
    let host = TestHost::start();
    let admin = host.admin();
    let names: Vec<String> = (0..25).map(|n| format!("t{n:02}")).collect();
    for name in &names {
        admin.put(&format!("/v1/tenants/{name}"), &json!({}));
    }
    assert_eq!(admin.names("/v1/tenants"), names);
    let mut seen = Vec::new();
    let mut path = "/v1/tenants?limit=10".to_owned();
    let mut parts = 0;
    loop {
        let part = admin.get(&path);
        let items = part["items"].as_array().expect("a list");
        assert!(items.len() <= 10);
        seen.extend(
            items
                .iter()
                .filter_map(|item| item["name"].as_str().map(str::to_owned)),
        );
        parts += 1;
        // A tenant that comes or goes meanwhile moves nobody.
        admin.put("/v1/tenants/a-first", &json!({}));
        match part["next"].as_str() {
            Some(next) => path = format!("/v1/tenants?limit=10&continue={next}"),
            None => break,
        }
    }
    assert_eq!((seen, parts), (names, 3));
}

#[test]
fn what_was_read_can_be_written_back() {
    let host = TestHost::start();
    let admin = host.admin();
    let envelope = json!({
        "cpu": {"shares": "high", "reservation": "250m", "limit": "1.5"},
        "memory": {"limit": "512MiB"}, "storage": {"limit": "1GB"},
        "requests": {"in_flight": 7, "queued": 8, "per_second": 9},
    });
    let tenant = admin.put("/v1/tenants/a", &envelope);
    assert_eq!(
        tenant["cpu"],
        json!({"shares": 2000, "reservation_millicores": 250, "limit_millicores": 1500})
    );
    assert_eq!(tenant["memory"]["limit_bytes"], 512 << 20);
    assert_eq!(tenant["storage"]["limit_bytes"], 1_000_000_000);
    let spec = json!({
        "limits": {"memory": "16MiB", "fuel": "5M", "timeout": "1.5s", "request_body": 1000},
        "env": {"K": "V"}, "routes": ["api.example.com/v2/*"], "usage_header": true,
        "volumes": [], "outbound": [],
    });
    let service = admin.put("/v1/tenants/a/services/s", &spec);
    assert_eq!(
        service["limits"],
        json!({"memory_bytes": 16 << 20, "fuel": 5_000_000, "timeout_ms": 1500, "request_body_bytes": 1000})
    );
    for path in ["/v1/tenants/a", "/v1/tenants/a/services/s"] {
        let read = admin.get(path);
        let etag = admin
            .request("GET", path)
            .send()
            .header("etag")
            .map(str::to_owned);
        let written = admin.put(path, &read);
        assert_eq!(written, read, "{path}");
        let after = admin
            .request("GET", path)
            .send()
            .header("etag")
            .map(str::to_owned);
        assert_eq!(etag, after, "nothing changed");
    }
}

#[test]
fn reservations_that_the_host_cannot_honour_are_refused() {
    let host = TestHost::start();
    let admin = host.admin();
    let capacity = admin.get("/v1/host")["capacity"]["cpu_millicores"].as_u64();
    assert_eq!(capacity, Some(2000), "two workers");
    let reserve = |name: &str, millicores: u64| {
        let document = json!({"cpu": {"reservation_millicores": millicores}});
        admin.json("PUT", &format!("/v1/tenants/{name}"), &document)
    };
    assert_eq!(reserve("a", 1500).send().status, 201);
    let answer = assert_refused(reserve("b", 600), 409, "reservation_exceeds_host");
    assert!(
        answer.text().contains("500m"),
        "says what is left: {}",
        answer.text()
    );
    assert_eq!(
        admin.request("GET", "/v1/tenants/b").send().status,
        404,
        "nothing was made"
    );
    assert_eq!(reserve("b", 500).send().status, 201);
    assert_refused(reserve("a", 1501), 409, "reservation_exceeds_host");
    assert_eq!(
        reserve("a", 100).send().status,
        200,
        "its own is not counted twice"
    );
    let committed = admin.get("/v1/host")["committed"]["cpu_reservation_millicores"].clone();
    assert_eq!(committed, 600);
    host.restart();
    assert_eq!(host.admin().names("/v1/tenants"), ["a", "b"]);
}

#[test]
fn events_tell_what_changes() {
    let host = TestHost::start();
    let mut events = host.admin().request("GET", "/v1/events").open();
    assert_eq!(
        events.head.headers.get("content-type"),
        Some("text/event-stream")
    );
    let mut text = String::new();
    let mut next = |word: &str| {
        while !text.contains(word) {
            let piece = events.piece().expect("a piece").expect("events go on");
            text.push_str(&String::from_utf8_lossy(&piece));
        }
    };
    let tenant = host.tenant("a").create();
    next("tenant.created");
    let _ = tenant.deploy("hello");
    next("service.created");
    next("version.activated");
    tenant.delete();
    next("tenant.deleted");
}

#[test]
fn two_hosts_never_share_a_data_directory() {
    let host = TestHost::start();
    // As if it did not hand over: it holds the lock, and cannot be asked.
    std::fs::remove_file(host.data().join("handover")).expect("its socket");
    let output = insula_tests::tools::run(
        std::process::Command::new(guests::insula())
            .args([
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--admin",
                "127.0.0.1:0",
                "--data",
            ])
            .arg(host.data()),
    );
    assert_eq!(
        output.status.code(),
        Some(1),
        "{}",
        insula_tests::tools::said(&output)
    );
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(words.contains("in use"), "{words}");
    assert_eq!(host.admin().request("GET", "/readyz").send().status, 200);
}
