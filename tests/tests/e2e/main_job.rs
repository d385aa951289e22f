//! The main job: deployed over HTTP, answers, is metered, survives.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use insula_tests::wait::holds;
use insula_tests::{TestHost, guests, load};
use serde_json::{Value, json};

const HELLO: &str = "Hello from Insula\n";

#[test]
fn a_deployed_component_answers_and_is_metered() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let service = tenant.service("hello").create();
    let component = guests::bytes("hello");
    let size = component.len();
    let upload = service.upload(component);
    assert_eq!(upload.status, 201, "{}", upload.text());
    let upload = upload.json();
    assert_eq!(
        (&upload["version"], &upload["active"]),
        (&json!(1), &json!(true))
    );
    assert_eq!(upload["size_bytes"], json!(size));
    assert!(upload["compile_ms"].is_u64(), "{upload}");
    assert!(
        upload["digest"]
            .as_str()
            .is_some_and(|digest| digest.len() >= 64),
        "{upload}"
    );

    let sent = 25;
    for _ in 0..sent {
        let answer = service.get("/").send();
        assert_eq!((answer.status, answer.text()), (200, HELLO.to_owned()));
    }
    let metrics = host.when_ended("a", sent);
    assert_eq!(metrics.requests("a", "ok"), sent);
    assert!(metrics.fuel("a") > 0);
    assert!(metrics.cpu_seconds("a") > 0.0);
    let labels = [("tenant", "a"), ("service", "hello")];
    for histogram in [
        "insula_request_duration_seconds",
        "insula_instance_start_seconds",
    ] {
        assert_eq!(metrics.count(&format!("{histogram}_count"), &labels), sent);
        assert!(metrics.sum(&format!("{histogram}_sum"), &labels) > 0.0);
    }
    assert!(metrics.sum("insula_ingress_bytes_total", &[("tenant", "a")]) > 0.0);
    assert!(metrics.sum("insula_memory_byte_seconds_total", &[("tenant", "a")]) >= 0.0);

    let usage = host.usage("a");
    assert_eq!(usage["requests"]["ok"], json!(sent), "{usage}");
    assert_eq!(usage["requests"]["total"], json!(sent), "{usage}");
    assert_eq!(usage["fuel"], json!(metrics.fuel("a")), "{usage}");
    assert!(
        usage["cpu_seconds"]
            .as_f64()
            .is_some_and(|seconds| seconds > 0.0),
        "{usage}"
    );
    let seconds = usage["memory_byte_seconds"].as_f64();
    assert!(seconds.is_some_and(|seconds| seconds > 0.0), "{usage}");
    assert_eq!(usage["services"][0]["name"], "hello", "{usage}");
    assert_eq!(usage["services"][0]["fuel"], usage["fuel"], "{usage}");
}

/// Path, inode and time of change of every compiled artefact.
fn artefacts(host: &TestHost) -> Vec<(String, u64, i64)> {
    let files = host.files("artefacts").into_iter();
    let found: Vec<_> = files
        .map(|path| {
            let metadata = fs::metadata(&path).expect("an artefact");
            (
                path.display().to_string(),
                metadata.ino(),
                metadata.mtime_nsec(),
            )
        })
        .collect();
    assert!(
        !found.is_empty(),
        "no artefact in {}",
        host.data().display()
    );
    found
}

#[test]
fn a_restart_serves_again_without_compiling_and_forgets_no_usage() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let hello = tenant.deploy("hello");
    let echo = tenant
        .service("echo")
        .limits(json!({"memory": "32MiB"}))
        .deploy("echo");
    for _ in 0..10 {
        assert_eq!(hello.get("/").send().status, 200);
    }
    assert_eq!(echo.get("/burn?n=100000").send().status, 200);
    host.when_ended("a", 11);
    let (before, usage) = (artefacts(&host), host.usage("a"));
    let spec = host.admin().get(&echo.path());

    host.restart();
    // The first request after `ready`: nothing is compiled or loaded late.
    assert_eq!(hello.get("/").send().text(), HELLO);
    assert_eq!(echo.get("/").send().status, 200);
    assert_eq!(artefacts(&host), before, "artefacts are used as they are");
    assert_eq!(
        host.admin().get(&echo.path()),
        Value::clone(&with_url(&host, spec))
    );
    host.when_ended("a", 2);
    let after = host.usage("a");
    assert_eq!(
        after["requests"]["total"],
        json!(13),
        "{usage} then {after}"
    );
    let fuel = |usage: &Value| usage["fuel"].as_u64().unwrap_or(0);
    let cpu = |usage: &Value| usage["cpu_seconds"].as_f64().unwrap_or(0.0);
    assert!(fuel(&after) > fuel(&usage), "{usage} then {after}");
    assert!(cpu(&after) > cpu(&usage), "{usage} then {after}");
}

/// A service's document with the port that the host has now.
fn with_url(host: &TestHost, mut document: Value) -> Value {
    let (tenant, name) = (&document["tenant"], &document["name"]);
    let (tenant, name) = (tenant.as_str().unwrap_or(""), name.as_str().unwrap_or(""));
    let url = format!(
        "http://{name}.{tenant}.localhost:{}/",
        host.ingress().port()
    );
    document["url"] = json!(url);
    document
}

#[test]
fn what_was_answered_survives_a_crash() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let hello = tenant.deploy("hello");
    host.crash_and_restart();
    assert_eq!(hello.get("/").send().text(), HELLO);
    // And a crash at any moment of a deployment leaves a host that starts and serves.
    for wait in [0, 10, 50, 200, 500, 1_000] {
        let path = format!("{}/versions", hello.path());
        let upload = host.admin().upload(&path, guests::bytes("markdown"));
        let upload = std::thread::spawn(move || upload.try_send().is_ok());
        std::thread::sleep(Duration::from_millis(wait));
        host.crash_and_restart();
        let _ = upload.join();
        let status = hello.get("/").send().status;
        assert!(
            [200, 405].contains(&status),
            "the old version or the new one, not {status}"
        );
    }
}

#[test]
fn what_is_not_there_is_a_problem_and_nobody_elses_business() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let empty = tenant.service("empty").create();
    let unknown = [
        "nowhere.example.com",
        "a.localhost",
        "localhost",
        "empty.b.localhost",
        "other.a.localhost",
        "empty.a.localhost.example.com",
    ];
    for name in unknown {
        let answer = host.request(name, "GET", "/").send();
        assert_eq!(
            (answer.status, answer.problem().as_str()),
            (404, "not_found"),
            "{name}"
        );
        assert!(answer.header("x-request-id").is_some());
        assert!(!answer.text().contains("empty"), "{}", answer.text());
    }
    let answer = empty.get("/").send();
    assert_eq!(
        (answer.status, answer.problem().as_str()),
        (404, "not_found")
    );
    let nobody = [("tenant", ""), ("outcome", "not_found")];
    host.metrics_when("each is counted where it belongs", |metrics| {
        let counted = (
            metrics.count("insula_requests_total", &nobody),
            metrics.requests("a", "not_found"),
        );
        holds(
            counted == (unknown.len() as u64, 1),
            format!("nobody's and the tenant's: {counted:?}"),
        )
    });
}

#[test]
fn names_are_found_in_any_spelling_and_by_routes() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let echo = tenant.deploy("echo");
    let routed = json!({"routes": ["api.example.com/v2/*", "www.example.com"]});
    let _hello = tenant.service("hello").spec(routed).deploy("hello");
    let port = host.ingress().port();
    for name in [
        "echo.a.localhost".to_owned(),
        format!("echo.a.localhost:{port}"),
        "Echo.A.LOCALHOST".to_owned(),
        "echo.a.localhost.".to_owned(),
        "echo.a.localhost:80".to_owned(),
    ] {
        let answer = host.request(&name, "GET", "/info").send();
        assert_eq!(answer.status, 200, "{name}");
        assert_eq!(
            answer.json()["headers"]["x-forwarded-host"],
            json!(["echo.a.localhost"])
        );
    }
    for (name, path, status) in [
        ("api.example.com", "/v2/x", 200),
        ("api.example.com", "/v2", 200),
        ("api.example.com", "/v20", 404),
        ("api.example.com", "/", 404),
        ("www.example.com", "/anything", 200),
    ] {
        assert_eq!(
            host.request(name, "GET", path).send().status,
            status,
            "{name}{path}"
        );
    }
    let other = host.tenant("b").create();
    let claim = other.service("thief").create();
    for route in ["api.example.com/v3/*", "echo.a.localhost/*"] {
        let claimed = host
            .admin()
            .json("PUT", &claim.path(), &json!({"routes": [route]}))
            .send();
        assert!(
            [409, 422].contains(&claimed.status),
            "{route}: {}",
            claimed.text()
        );
        claimed.problem();
    }
    assert_eq!(echo.get("/").send().status, 200);
}

#[test]
fn the_guest_sees_what_the_host_says_of_the_client() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let echo = tenant
        .service("echo")
        .env("GREETING", "hi \"there\"")
        .deploy("echo");
    let plain = echo.get("/info?x=1").header("accept", "text/plain").send();
    let seen = plain.json();
    assert_eq!(
        (&seen["method"], &seen["path"]),
        (&json!("GET"), &json!("/info"))
    );
    assert_eq!(seen["query"], json!({"x": "1"}));
    assert_eq!(seen["env"]["GREETING"], "hi \"there\"");
    let headers = &seen["headers"];
    assert_eq!(headers["accept"], json!(["text/plain"]));
    assert_eq!(headers["x-forwarded-for"], json!(["127.0.0.1"]));
    assert_eq!(headers["x-forwarded-proto"], json!(["http"]));
    assert_eq!(headers["x-forwarded-host"], json!(["echo.a.localhost"]));
    let id = plain.header("x-request-id").expect("x-request-id");
    assert_eq!(headers["x-request-id"], json!([id]));
    let made = headers["traceparent"][0].as_str().unwrap_or_default();
    assert_eq!(
        made.split('-').map(str::len).collect::<Vec<_>>(),
        [2, 32, 16, 2],
        "{made}"
    );

    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let forged = echo
        .get("/info")
        .header("x-forwarded-for", "6.6.6.6")
        .header("x-forwarded-host", "evil.example")
        .header("x-forwarded-proto", "https")
        .header("forwarded", "for=6.6.6.6")
        .header("x-request-id", "mine")
        .header("traceparent", parent)
        .header("connection", "keep-alive, x-hop")
        .header("x-hop", "1")
        .header("te", "trailers")
        .send();
    let headers = &forged.json()["headers"];
    assert_eq!(headers["x-forwarded-for"], json!(["127.0.0.1"]));
    assert_eq!(headers["x-forwarded-host"], json!(["echo.a.localhost"]));
    assert_eq!(headers["x-forwarded-proto"], json!(["http"]));
    assert_eq!(headers["traceparent"], json!([parent]));
    assert_ne!(headers["x-request-id"], json!(["mine"]));
    for gone in ["forwarded", "connection", "x-hop", "te"] {
        assert!(
            headers[gone].is_null(),
            "{gone} reached the guest: {headers}"
        );
    }
    let nonsense = echo.get("/info").header("traceparent", "00-0-0-00").send();
    assert_ne!(
        nonsense.json()["headers"]["traceparent"],
        json!(["00-0-0-00"])
    );
    let again = echo.get("/").send();
    assert_ne!(again.header("x-request-id"), plain.header("x-request-id"));
}

#[test]
fn usage_comes_in_the_head_of_a_whole_answer_and_in_the_trailers_of_a_streamed_one() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let echo = tenant.service("echo").usage_header().deploy("echo");
    let answer = echo.get("/burn?n=1000000").send();
    assert!(answer.header("insula-usage").is_some(), "{answer:?}");
    let usage = answer.usage();
    assert!(usage.fuel > 1_000_000, "{usage:?}");
    assert!(usage.cpu_us > 0 && usage.memory_peak > 0, "{usage:?}");
    assert_eq!(usage.version, 1);

    let sse = tenant.service("sse").usage_header().deploy("sse");
    let streamed = sse.get("/?count=3&interval_ms=100");
    let answer = streamed.clone().header("te", "trailers").send();
    assert!(answer.header("insula-usage").is_none(), "{answer:?}");
    assert!(answer.trailers.get("insula-usage").is_some(), "{answer:?}");
    assert!(answer.usage().fuel > 0);
    let metrics = host.when_ended("a", 2);
    let charged = metrics.fuel("a");
    assert_eq!(
        charged,
        usage.fuel + answer.usage().fuel,
        "what is shown is what is charged"
    );

    // Who did not say that it understands trailers gets none (RFC 9110, 6.5.1).
    let answer = streamed.send();
    assert_eq!(answer.trailers.get("insula-usage"), None, "{answer:?}");

    let silent = tenant.service("silent").deploy("echo");
    let answer = silent.get("/").send();
    assert!(answer.header("insula-usage").is_none());
    assert!(answer.trailers.get("insula-usage").is_none());
}

#[test]
fn http_2_without_tls_is_spoken_too() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let _echo = tenant.deploy("echo");
    let address = host.ingress();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let bodies: Vec<String> = runtime.expect("a runtime").block_on(async {
        let stream = tokio::net::TcpStream::connect(address)
            .await
            .expect("a connection");
        let io = hyper_util::rt::TokioIo::new(stream);
        let executor = hyper_util::rt::TokioExecutor::new();
        let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, io)
            .await
            .expect("HTTP/2");
        let connection = tokio::spawn(connection);
        // Several streams at once on one connection, each with a body.
        let mut answers = Vec::new();
        for number in 0..20 {
            let request = hyper::Request::post("http://echo.a.localhost/")
                .body(http_body_util::Full::new(bytes::Bytes::from(format!(
                    "body {number}"
                ))))
                .expect("a request");
            sender.ready().await.expect("HTTP/2");
            answers.push(sender.send_request(request));
        }
        let mut bodies = Vec::new();
        for answer in answers {
            let answer = answer.await.expect("an answer");
            assert_eq!(answer.status(), 200);
            assert!(answer.headers().contains_key("x-request-id"));
            let body = answer
                .into_body()
                .collect()
                .await
                .expect("a body")
                .to_bytes();
            bodies.push(String::from_utf8_lossy(&body).into_owned());
        }
        connection.abort();
        bodies
    });
    let expected: Vec<_> = (0..20).map(|number| format!("body {number}")).collect();
    assert_eq!(bodies, expected);
    host.when_ended("a", 20);
}

#[test]
fn versions_switch_back_and_forth_under_load_without_one_failure() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let service = tenant.service("web").deploy("hello");
    let admin = host.admin();
    let path = service.path();
    let request = service.get("/");
    let load = std::thread::spawn(move || load::during(Duration::from_secs(4), 2, &request));

    assert_eq!(service.upload(guests::bytes("echo")).json()["version"], 2);
    let dark = admin.upload(
        &format!("{path}/versions?activate=false"),
        guests::bytes("sse"),
    );
    let dark = dark.send().json();
    assert_eq!(
        (&dark["version"], &dark["active"]),
        (&json!(3), &json!(false))
    );
    assert_eq!(
        service.get("/info").send().json()["path"],
        "/info",
        "version 2 serves"
    );
    let versions = admin.get(&format!("{path}/versions"));
    let active = |list: &Value| {
        let items = list["items"].as_array().expect("a list").iter();
        let active = items.filter(|item| item["active"] == true);
        active
            .map(|item| item["version"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(active(&versions), [json!(2)], "{versions}");

    admin.post(&format!("{path}/rollback"), &json!({}));
    assert_eq!(
        service.get("/").send().text(),
        HELLO,
        "version 1 serves again"
    );
    admin.put(&format!("{path}/traffic"), &json!({"2": 100}));
    assert_eq!(service.get("/info").send().json()["path"], "/info");
    for number in [1, 2, 1, 2, 1] {
        admin.put(
            &format!("{path}/traffic"),
            &json!({number.to_string(): 100}),
        );
    }
    let load = load.join().expect("the load");
    assert_eq!(
        load.status(200),
        load.total(),
        "{:?} {:?}",
        load.statuses,
        load.problems
    );
    assert!(load.total() > 100, "{load:?}");
}

#[test]
fn what_is_deleted_is_gone_with_its_series_and_files() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let hello = tenant.deploy("hello");
    let other = tenant.service("other").deploy("hello");
    assert_eq!(hello.get("/").send().status, 200);
    assert_eq!(other.get("/").send().status, 200);
    let charged = host.when_ended("a", 2).fuel("a");
    hello.delete();
    assert_eq!(hello.get("/").send().status, 404);
    assert_eq!(
        other.get("/").send().status,
        200,
        "the component is still another service's"
    );
    // Both of the other service's, which alone has series now.
    let metrics = host.when_ended("a", 2);
    assert_eq!(
        metrics
            .of("insula_requests_total", &[("service", "hello")])
            .count(),
        0
    );
    let usage = host.usage("a");
    assert!(
        usage["fuel"].as_u64() > Some(charged),
        "the tenant still has used it: {usage}"
    );

    tenant.delete();
    let answer = other.get("/").send();
    assert_eq!(
        (answer.status, answer.problem().as_str()),
        (404, "not_found")
    );
    let metrics = host.metrics();
    let left: Vec<_> = metrics
        .samples
        .iter()
        .filter(|sample| sample.labels.get("tenant").is_some_and(|name| name == "a"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(host.files("blobs").is_empty(), "{:?}", host.files("."));
    assert!(host.files("artefacts").is_empty(), "{:?}", host.files("."));

    // The name is free again, and starts from nothing.
    let again = host.tenant("a").create();
    let hello = again.deploy("hello");
    assert_eq!(hello.get("/").send().status, 200);
    assert_eq!(host.when_ended("a", 1).requests("a", "ok"), 1);
    assert_eq!(host.usage("a")["requests"]["total"], 1);
}

#[test]
fn a_running_request_of_a_deleted_tenant_is_cancelled() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let spin = tenant
        .service("spin")
        .limits(json!({"fuel": "1T", "timeout": "60s"}))
        .deploy("spin");
    let request = spin.get("/").patience(Duration::from_secs(30));
    let running = std::thread::spawn(move || request.try_send());
    host.metrics_when("the guest runs", |metrics| {
        let running = [("tenant", "a"), ("state", "running")];
        holds(metrics.sum("insula_instances", &running) > 0.0, "not yet")
    });
    let began = Instant::now();
    tenant.delete();
    let ended = running.join().expect("a client");
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    if let Ok(answer) = ended {
        assert_ne!(answer.status, 200);
    }
    assert!(host.runs());
}
