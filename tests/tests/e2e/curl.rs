//! The whole life of a service by `curl` alone, as somebody would type it.

use std::fs;
use std::process::Command;

use insula_tests::{TestHost, guests, tools};
use serde_json::{Value, json};

/// Where the host is, for commands.
struct Shell {
    api: String,
    token: String,
}

/// What curl printed, and the status.
struct Reply {
    status: String,
    text: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("no JSON: {}", self.text))
    }
}

fn curl(args: &[&str]) -> Reply {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--max-time", "60"]);
    let output = tools::run(command.args(["--write-out", "\n%{http_code}"]).args(args));
    assert!(
        output.status.success(),
        "curl {args:?}: {}",
        tools::said(&output)
    );
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (text, status) = text.rsplit_once('\n').unwrap_or_default();
    Reply {
        status: status.to_owned(),
        text: text.to_owned(),
    }
}

impl Shell {
    fn new(host: &TestHost) -> Self {
        Self {
            api: format!("http://{}", host.admin_address()),
            token: format!("Authorization: Bearer {}", host.token()),
        }
    }

    fn api(&self, method: &str, path: &str, more: &[&str]) -> Reply {
        let url = format!("{}{path}", self.api);
        let common = ["-X", method, "-H", &self.token, &url];
        curl(&[&common[..], more].concat())
    }
}

fn curl_is_missing() -> bool {
    let missing = Command::new("curl").arg("--version").output().is_err();
    if missing {
        tools::skipped("curl is not installed");
    }
    missing
}

#[test]
fn a_services_whole_life() {
    if curl_is_missing() {
        return;
    }
    let host = TestHost::start();
    let shell = Shell::new(&host);
    let json_type = ["-H", "Content-Type: application/json", "-d"];

    let made = shell.api(
        "PUT",
        "/v1/tenants/acme",
        &[&json_type[..], &["{}"]].concat(),
    );
    assert_eq!(made.status, "201", "{}", made.text);
    let limits = r#"{"limits":{"memory":"16MiB","fuel":50000000}}"#;
    let service = "/v1/tenants/acme/services/echo";
    let made = shell.api("PUT", service, &[&json_type[..], &[limits]].concat());
    assert_eq!(made.status, "201", "{}", made.text);
    let file = format!("@{}", guests::path("echo").display());
    let upload = [
        "-H",
        "Content-Type: application/wasm",
        "--data-binary",
        &file,
    ];
    let versions = format!("{service}/versions");
    let uploaded = shell.api("POST", &versions, &upload);
    assert_eq!(uploaded.status, "201", "{}", uploaded.text);
    assert_eq!(uploaded.json()["version"], 1);

    let url = uploaded.json()["url"].as_str().expect("a URL").to_owned();
    assert_eq!(
        url,
        format!("http://echo.acme.localhost:{}/", host.ingress().port())
    );
    let called = curl(&["--data", "hello", &url]);
    assert_eq!(
        (called.status.as_str(), called.text.as_str()),
        ("200", "hello")
    );
    let burned = curl(&[&format!("{url}burn?n=1000")]);
    assert_eq!(burned.status, "200");
    let within = curl(&[&format!("{url}alloc?mib=8")]);
    assert_eq!(
        (within.status.as_str(), within.text.as_str()),
        ("200", "128 pages\n")
    );
    let memory = curl(&[&format!("{url}alloc?mib=24")]);
    assert_eq!(
        (memory.status.as_str(), &memory.json()["code"]),
        ("502", &json!("out_of_memory"))
    );
    let fuel = curl(&[&format!("{url}burn?n=1000000000")]);
    assert_eq!(
        (fuel.status.as_str(), &fuel.json()["code"]),
        ("504", &json!("out_of_fuel"))
    );
    let plain = curl(&["--http2-prior-knowledge", &url]);
    assert_eq!(plain.status, "200");

    host.when_ended("acme", 6);
    let usage = shell.api("GET", "/v1/tenants/acme/usage", &[]).json();
    assert_eq!(usage["requests"]["total"], 6, "{usage}");
    for (outcome, count) in [("ok", 4), ("out_of_memory", 1), ("out_of_fuel", 1)] {
        assert_eq!(usage["requests"][outcome], count, "{usage}");
    }
    assert!(usage["fuel"].as_u64() > Some(50_000_000), "{usage}");
    assert!(usage["cpu_seconds"].as_f64() > Some(0.0), "{usage}");
    let page = curl(&[&format!("{}/metrics", shell.api)]);
    assert!(
        page.text
            .contains("insula_fuel_consumed_total{tenant=\"acme\",service=\"echo\"}")
    );

    assert_eq!(shell.api("DELETE", service, &[]).status, "204");
    assert_eq!(curl(&[&url]).status, "404");
    assert_eq!(shell.api("DELETE", "/v1/tenants/acme", &[]).status, "204");
    assert_eq!(shell.api("GET", "/v1/tenants/acme", &[]).status, "404");
}

#[test]
fn the_openapi_document_validates() {
    let Some(venv) = tools::tool("VENV") else {
        return;
    };
    if curl_is_missing() {
        return;
    }
    let host = TestHost::start();
    let document = Shell::new(&host).api("GET", "/v1/openapi.json", &[]);
    assert_eq!(document.status, "200");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("openapi.json");
    fs::write(&file, &document.text).expect("a file");
    let mut command = Command::new(venv.join("bin/python"));
    let output = tools::run(command.args(["-m", "openapi_spec_validator"]).arg(&file));
    assert!(output.status.success(), "{}", tools::said(&output));
    // It describes what there is: every path of it is known to the host.
    let paths = document.json()["paths"].as_object().expect("paths").clone();
    assert!(
        paths.contains_key("/v1/tenants/{tenant}/services/{service}/versions"),
        "{paths:?}"
    );
    for (path, operations) in paths {
        let concrete = path
            .replace("{tenant}", "a")
            .replace("{service}", "b")
            .replace("{id}", "1");
        let methods = ["get", "put", "post", "delete"];
        for method in methods
            .iter()
            .filter(|method| operations.get(**method).is_some())
        {
            if path.ends_with("events") {
                continue;
            }
            let reply = Shell::new(&host).api(&method.to_uppercase(), &concrete, &[]);
            assert_ne!(reply.status, "405", "{method} {path}");
        }
    }
}
