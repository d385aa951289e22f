//! A component that none of us wrote the toolchain of.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use insula_tests::{TestHost, guests, tools};
use serde_json::{Value, json};

const HANDLER: &str = r#"
from wit_world import exports
from wit_world.imports.types import Fields, OutgoingBody, OutgoingResponse, ResponseOutparam
from componentize_py_types import Ok

class IncomingHandler(exports.IncomingHandler):
    def handle(self, request, response_out):
        response = OutgoingResponse(Fields.from_list([("content-type", b"text/plain")]))
        body = response.body()
        ResponseOutparam.set(response_out, Ok(response))
        with body.write() as stream:
            stream.blocking_write_and_flush(f"Python saw {request.path_with_query()}\n".encode())
        OutgoingBody.finish(body, None)
"#;

/// The WIT of `wasi:http`, as the engine's own crate has it.
fn wit() -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["metadata", "--format-version=1", "--offline", "--locked"]);
    let output = tools::run(command.current_dir(guests::repository()));
    assert!(output.status.success(), "{}", tools::said(&output));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata");
    let mut packages = metadata["packages"].as_array().expect("packages").iter();
    let engine = packages.find(|package| package["name"] == "wasmtime-wasi-http");
    let manifest = engine.expect("the engine's package")["manifest_path"].as_str();
    let wit = PathBuf::from(manifest.expect("a path")).with_file_name("wit");
    assert!(wit.join("deps/http.wit").is_file(), "{}", wit.display());
    wit
}

#[test]
fn a_python_handler_deploys_and_answers() {
    let Some(venv) = tools::tool("VENV") else {
        return;
    };
    let dir = tempfile::tempdir().expect("a temporary directory");
    fs::write(dir.path().join("app.py"), HANDLER.trim_start()).expect("a handler");
    let wit = wit();
    let http = fs::read_to_string(wit.join("deps/http.wit")).expect("the WIT of wasi:http");
    let version = http
        .lines()
        .find_map(|line| line.strip_prefix("package wasi:http@"));
    let version = version.expect("a version").trim_end_matches(';');
    let mut command = Command::new(venv.join("bin/componentize-py"));
    command
        .arg("-d")
        .arg(&wit)
        .args(["-w", &format!("wasi:http/proxy@{version}")]);
    command
        .args(["componentize", "app", "-o", "app.wasm"])
        .current_dir(dir.path());
    let output = tools::run(&mut command);
    assert!(output.status.success(), "{}", tools::said(&output));

    let host = TestHost::start();
    let tenant = host.tenant("snakes").create();
    let limits = json!({"memory": "128MiB", "fuel": "10G"});
    let component = fs::read(dir.path().join("app.wasm")).expect("a component");
    let python = tenant
        .service("python")
        .limits(limits)
        .deploy_bytes(component);
    for n in 0..10 {
        let answer = python.get(&format!("/path?n={n}")).send();
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.text(), format!("Python saw /path?n={n}\n"));
        assert_eq!(answer.header("content-type"), Some("text/plain"));
    }
    let metrics = host.when_ended("snakes", 10);
    assert_eq!(metrics.requests("snakes", "ok"), 10);
    assert!(metrics.fuel("snakes") > 0);
    host.restart();
    assert_eq!(python.get("/again").send().text(), "Python saw /again\n");
}
