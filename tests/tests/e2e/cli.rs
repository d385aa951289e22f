//! The program as somebody types it.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use insula_tests::http::Request;
use insula_tests::wait::holds;
use insula_tests::{Connection, TestHost, alone, guests, tools, until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// `insula`, in no environment but the ordinary.
fn insula() -> Command {
    let mut command = Command::new(guests::insula());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("INSULA_") {
            command.env_remove(name);
        }
    }
    // Guests are built where the samples are: what the toolchain makes for all of them is there.
    command.env(
        "CARGO_TARGET_DIR",
        guests::repository().join("samples/target"),
    );
    command
}

/// `insula` with words, for the host of a test.
fn typed(host: &TestHost, words: &[&str]) -> Output {
    let mut command = insula();
    command.env("INSULA_ADMIN", host.admin_address().to_string());
    command.env("INSULA_DATA", host.data());
    tools::run(command.args(words))
}

fn done(host: &TestHost, words: &[&str]) -> String {
    let output = typed(host, words);
    assert!(
        output.status.success(),
        "{words:?}: {}",
        tools::said(&output)
    );
    String::from_utf8(output.stdout).expect("text")
}

fn json_of(host: &TestHost, words: &[&str]) -> Value {
    let text = done(host, &[words, &["-o", "json"]].concat());
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{words:?}: {error}: {text}"))
}

/// The exit code and what was said on stderr.
fn failed(host: &TestHost, words: &[&str]) -> (Option<i32>, String) {
    let output = typed(host, words);
    assert!(
        !output.status.success(),
        "{words:?}: {}",
        tools::said(&output)
    );
    assert!(
        output.stdout.is_empty(),
        "{words:?}: {}",
        tools::said(&output)
    );
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!words.contains("panicked"), "{words}");
    (output.status.code(), words)
}

#[test]
fn the_verbs_do_what_the_api_does() {
    let host = TestHost::start();
    let component = guests::path("hello").display().to_string();
    let deploy = [
        "deploy",
        &component,
        "--tenant",
        "demo",
        "--service",
        "hello",
    ];
    let (code, words) = failed(&host, &deploy);
    assert_eq!(code, Some(1));
    assert!(
        words.contains("demo") && words.contains("--create"),
        "{words}"
    );

    done(
        &host,
        &[
            "tenants",
            "set",
            "demo",
            "--memory",
            "256MiB",
            "--cpu-shares",
            "high",
        ],
    );
    let tenant = json_of(&host, &["tenants", "show", "demo"]);
    assert_eq!(
        (&tenant["memory"]["limit_bytes"], &tenant["cpu"]["shares"]),
        (&json!(256 << 20), &json!(2000))
    );
    let deployed = json_of(&host, &deploy);
    assert_eq!(
        (&deployed["version"], &deployed["active"]),
        (&json!(1), &json!(true))
    );
    let url = deployed["url"].as_str().expect("a URL");
    assert_eq!(
        url,
        format!("http://hello.demo.localhost:{}/", host.ingress().port())
    );
    let text = done(&host, &deploy);
    assert!(text.contains("version 2") && text.contains(url), "{text}");
    let ask = || host.request("hello.demo.localhost", "GET", "/").send();
    for _ in 0..3 {
        assert_eq!(ask().status, 200);
    }
    host.when_ended("demo", 3);

    let usage = json_of(&host, &["usage", "demo"]);
    assert_eq!(usage["requests"]["total"], 3, "{usage}");
    assert!(usage["fuel"].as_u64() > Some(0), "{usage}");
    let usage = done(&host, &["usage", "demo"]);
    for word in ["requests", "fuel", "cpu", "hello"] {
        assert!(usage.contains(word), "{word} is not in {usage}");
    }
    let names = |list: &Value| -> Vec<String> {
        let items = list["items"].as_array().expect("a list").iter();
        items
            .filter_map(|item| item["name"].as_str().map(str::to_owned))
            .collect()
    };
    assert_eq!(names(&json_of(&host, &["tenants", "list"])), ["demo"]);
    assert_eq!(
        names(&json_of(&host, &["services", "list", "demo"])),
        ["hello"]
    );
    assert_eq!(
        names(&json_of(&host, &["versions", "list", "demo/hello"])),
        ["2", "1"]
    );
    let table = done(&host, &["services", "list", "demo"]);
    assert!(
        table.starts_with("NAME") && table.contains("hello") && table.contains(url),
        "{table}"
    );
    assert!(
        !table.contains('\u{1b}'),
        "colour without a terminal: {table:?}"
    );

    done(
        &host,
        &[
            "services",
            "set",
            "demo/hello",
            "--memory",
            "16MiB",
            "--env",
            "A=b",
        ],
    );
    done(&host, &["services", "set", "demo/hello", "--fuel", "2G"]);
    let service = json_of(&host, &["services", "show", "demo/hello"]);
    assert_eq!(service["limits"]["memory_bytes"], 16 << 20);
    assert_eq!(service["limits"]["fuel"], 2_000_000_000);
    assert_eq!(
        service["env"]["A"], "b",
        "what was not named stays: {service}"
    );
    let active = |list: &Value| {
        let items = list["items"].as_array().expect("a list").iter();
        items
            .filter(|item| item["active"] == true)
            .map(|item| item["version"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        active(&json_of(&host, &["rollback", "demo/hello"])),
        [json!(1)]
    );
    assert_eq!(
        active(&json_of(&host, &["traffic", "demo/hello", "2=100"])),
        [json!(2)]
    );
    let split = json_of(&host, &["traffic", "demo/hello", "1=90", "2=10"]);
    assert_eq!(active(&split), [json!(2), json!(1)]);
    let service = json_of(&host, &["services", "show", "demo/hello"]);
    assert_eq!(service["traffic"], json!({"1": 90, "2": 10}));
    done(&host, &["traffic", "demo/hello", "2=100"]);

    let echo = guests::path("echo").display().to_string();
    done(
        &host,
        &[
            "deploy",
            &echo,
            "--tenant",
            "other",
            "--service",
            "echo",
            "--create",
        ],
    );
    let said = host
        .request("echo.other.localhost", "GET", "/log?message=typed")
        .send();
    assert_eq!(said.status, 200);
    until(Duration::from_secs(10), "the log has it", || {
        let log = done(&host, &["logs", "other/echo"]);
        holds(log.contains("typed") && log.contains("info"), log)
    });
    let lines = done(&host, &["logs", "other/echo", "-o", "json"]);
    for line in lines.lines() {
        let line: Value = serde_json::from_str(line).expect("a JSON document per line");
        assert!(line["time"].is_string(), "{line}");
    }
    let made = json_of(
        &host,
        &[
            "tokens", "create", "ci", "--tenant", "demo", "--access", "write",
        ],
    );
    let secret = made["secret"].as_str().expect("a secret");
    let owner = host.admin_as(Some(secret));
    assert_eq!(owner.names("/v1/tenants"), ["demo"]);
    done(&host, &["tokens", "delete", &made["id"].to_string()]);
    assert_eq!(owner.request("GET", "/v1/tenants").send().status, 401);
    let top = done(&host, &["top", "--once", "--interval", "100ms"]);
    assert!(top.contains("demo") && top.contains("other"), "{top}");

    done(&host, &["services", "delete", "demo/hello"]);
    assert_eq!(ask().status, 404);
    done(&host, &["tenants", "delete", "other"]);
    assert_eq!(names(&json_of(&host, &["tenants", "list"])), ["demo"]);
}

#[test]
fn recompile_waits_until_everything_is_compiled() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let hello = tenant.deploy("hello");
    let dark = format!("{}/versions?activate=false", hello.path());
    let upload = host.admin().upload(&dark, guests::bytes("echo")).send();
    assert_eq!(upload.status, 201, "{}", upload.text());
    let markdown = tenant.deploy("markdown");
    let told = |words: &str| assert_eq!(done(&host, &["recompile"]).trim(), words);
    let engine = host.admin().get("/v1/host")["wasmtime"].clone();
    let engine = engine.as_str().expect("a version");
    told(&format!("everything is compiled for wasmtime {engine}"));
    // As after an upgrade to another engine: what was compiled is of no use any more.
    host.kill();
    let compiled = host.files("artefacts");
    assert_eq!(compiled.len(), 3);
    for artefact in &compiled {
        fs::remove_file(artefact).expect("an artefact");
    }
    host.start_again();
    told(&format!("everything is compiled for wasmtime {engine}"));
    assert_eq!(
        host.files("artefacts"),
        compiled,
        "those that serve, and the dark one"
    );
    assert_eq!(hello.get("/").send().status, 200);
    assert_eq!(markdown.post("/", "# a").send().status, 200);
    assert_eq!(host.admin().get("/v1/recompilation")["failed"], 0);
    // A component that cannot be compiled any more is not passed over.
    host.kill();
    for artefact in &compiled {
        fs::remove_file(artefact).expect("an artefact");
    }
    for blob in host.files("blobs") {
        fs::write(blob, "no component").expect("a file");
    }
    host.start_again();
    let (code, words) = failed(&host, &["recompile"]);
    assert_eq!(code, Some(1));
    assert!(
        words.contains("of 2 services could not be compiled"),
        "{words}"
    );
}

#[test]
fn exit_codes_tell_bad_usage_from_a_refusal() {
    let host = TestHost::start();
    for usage in [
        &["nonsense"][..],
        &["usage"],
        &["usage", "Not_A_Name"],
        &["services", "show", "no-slash"],
        &["tenants", "set", "a", "--memory", "much"],
        &["deploy", "x.wasm", "--tenant", "a"],
        &["--what"],
        &["usage", "a", "-o", "xml"],
        &["usage", "a", "--admin", "nowhere"],
    ] {
        let (code, words) = failed(&host, usage);
        assert_eq!(code, Some(2), "{usage:?}: {words}");
        assert!(!words.trim().is_empty(), "{usage:?} says nothing");
    }
    for refused in [
        &["usage", "nobody"][..],
        &["services", "list", "nobody"],
        &["services", "delete", "nobody/nothing"],
        &["tenants", "set", "a", "--cpu-reservation", "900"],
        &["logs", "nobody/nothing"],
        &[
            "deploy",
            "/nonexistent.wasm",
            "--tenant",
            "a",
            "--service",
            "b",
            "--create",
        ],
    ] {
        let (code, words) = failed(&host, refused);
        assert_eq!(code, Some(1), "{refused:?}: {words}");
    }
    // The problem's title and detail.
    let (_, words) = failed(&host, &["usage", "nobody"]);
    assert!(
        words.contains("no such thing") && words.contains("tenant"),
        "{words}"
    );
    let text = guests::repository().join("README.md").display().to_string();
    let (code, words) = failed(
        &host,
        &[
            "deploy",
            &text,
            "--tenant",
            "a",
            "--service",
            "b",
            "--create",
        ],
    );
    assert_eq!(code, Some(1), "{words}");
    assert!(words.contains("not a WebAssembly"), "{words}");
    let (code, words) = failed(&host, &["usage", "a", "--token", "insula_wrong"]);
    assert_eq!(code, Some(1), "{words}");
    assert!(words.contains("token"), "{words}");
    let (code, words) = failed(&host, &["usage", "a", "--admin", "127.0.0.1:1"]);
    assert_eq!(code, Some(1), "{words}");
    assert!(words.contains("127.0.0.1:1"), "{words}");
    for help in [&["--help"][..], &["serve", "--help"], &["--version"]] {
        assert_eq!(typed(&host, help).status.code(), Some(0), "{help:?}");
    }
}

#[test]
fn a_configuration_is_refused_with_all_its_mistakes() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("insula.toml");
    fs::write(&file, "listn = \"x\"\nworkers = 0\nmax_memory = \"much\"\n").expect("a file");
    let mut command = insula();
    command
        .arg("serve")
        .arg("--config")
        .arg(&file)
        .args(["--drain", "soon"]);
    let output = tools::run(command.arg("--data").arg(dir.path().join("data")));
    assert_eq!(output.status.code(), Some(2), "{}", tools::said(&output));
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    for mistake in ["listn", "workers", "max_memory", "--drain"] {
        assert!(words.contains(mistake), "{mistake} is not in {words}");
    }
    assert!(!dir.path().join("data").exists(), "nothing was begun");
}

#[test]
fn the_doctor_looks_at_this_machine() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut command = insula();
    let output = tools::run(
        command
            .args(["doctor", "-o", "json", "--data"])
            .arg(dir.path()),
    );
    assert!(
        [Some(0), Some(1)].contains(&output.status.code()),
        "{}",
        tools::said(&output)
    );
    let checks: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let checks = checks["items"].as_array().expect("a list").clone();
    for name in ["kernel", "cgroup", "kvm", "toolchain"] {
        let found = checks.iter().find(|check| {
            check["name"]
                .as_str()
                .is_some_and(|is| is.to_lowercase().contains(name))
        });
        let check = found.unwrap_or_else(|| panic!("no check of {name}: {checks:?}"));
        let good = check["state"] == "ok";
        assert!(
            good || check["mend"].is_string(),
            "says how to mend it: {check}"
        );
    }
    let worst = checks.iter().any(|check| check["state"] == "missing");
    assert_eq!(output.status.success(), !worst);
    let mut command = insula();
    let table = tools::run(command.args(["doctor", "--data"]).arg(dir.path()));
    assert_eq!(table.status.code(), output.status.code());
    assert!(
        String::from_utf8_lossy(&table.stdout)
            .to_lowercase()
            .contains("kvm")
    );
}

#[test]
fn sigterm_lets_running_requests_finish() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let echo = tenant.deploy("echo");
    let ingress = host.ingress();
    let mut idle = echo.connect();
    assert_eq!(
        idle.exchange(&echo.get("/")).expect("an answer").status,
        200
    );
    let request = echo.get("/sleep?ms=1500");
    let slow = std::thread::spawn(move || request.send());
    let running = [("tenant", "a"), ("state", "running")];
    host.metrics_when("it runs", |metrics| {
        holds(metrics.sum("insula_instances", &running) > 0.0, "not yet")
    });
    let asked = Instant::now();
    host.terminate();
    until(Duration::from_secs(1), "nobody new is let in", || {
        match Connection::open(ingress) {
            Err(_) => Ok(()),
            // What the kernel had accepted before is closed.
            Ok(mut connection) => holds(connection.is_closed(), "it is still open"),
        }
    });
    let answer = slow.join().expect("a client");
    assert_eq!((answer.status, answer.text().as_str()), (200, "slept\n"));
    let status = host.ended();
    assert_eq!(status.code(), Some(0), "{}", host.said());
    let took = asked.elapsed();
    assert!(
        took >= Duration::from_millis(1_000),
        "{took:?}: it waited for the request"
    );
    assert!(
        took < Duration::from_secs(5),
        "{took:?}: it waited for nothing else"
    );
    assert!(idle.is_closed());
}

#[test]
fn sigterm_waits_no_longer_than_it_was_told() {
    let host = TestHost::plan().arg("--drain", "500ms").start();
    let tenant = host.tenant("a").create();
    let limits = json!({"timeout": "5m", "fuel": "1T"});
    let echo = tenant.service("echo").limits(limits.clone()).deploy("echo");
    let spin = tenant.service("spin").limits(limits).deploy("spin");
    let mut connections = [echo.connect(), spin.connect(), echo.connect()];
    connections[0]
        .write(&echo.get("/sleep?ms=60000"))
        .expect("sent");
    connections[1].write(&spin.get("/")).expect("sent");
    // Half a head, and then nothing.
    connections[2]
        .raw(b"GET / HTTP/1.1\r\nhost: ")
        .expect("sent");
    let running = [("tenant", "a"), ("state", "running")];
    host.metrics_when("both run", |metrics| {
        let now = metrics.sum("insula_instances", &running);
        holds(now == 2.0, format!("{now}"))
    });
    let asked = Instant::now();
    host.terminate();
    let status = host.ended();
    assert_eq!(status.code(), Some(0), "{}", host.said());
    assert!(
        asked.elapsed() < Duration::from_secs(4),
        "{:?}",
        asked.elapsed()
    );
    assert!(
        asked.elapsed() >= Duration::from_millis(400),
        "{:?}",
        asked.elapsed()
    );
}

/// A program that goes on, whose lines are read as they come.
struct Running {
    child: Child,
    lines: mpsc::Receiver<String>,
    seen: String,
}

impl Running {
    fn start(command: &mut Command) -> Self {
        let spawned = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = spawned.spawn().expect("a child");
        let (sender, lines) = mpsc::channel();
        let outputs: [Box<dyn Read + Send>; 2] = [
            Box::new(child.stdout.take().expect("a pipe")),
            Box::new(child.stderr.take().expect("a pipe")),
        ];
        for output in outputs {
            let sender = sender.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        return;
                    }
                }
            });
        }
        Self {
            child,
            lines,
            seen: String::new(),
        }
    }

    /// The next line that has this in it.
    fn line(&mut self, word: &str, within: Duration) -> String {
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else {
                panic!("no line with {word:?} within {within:?} in\n{}", self.seen);
            };
            self.seen.push_str(&line);
            self.seen.push('\n');
            if line.contains(word) {
                return line;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let _ = kill_process(pid.expect("a process id"), signal);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Copies a folder without what was built in it.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name");
        if name == "target" {
            continue;
        }
        if path.is_dir() {
            copy(&path, &to.join(name));
        } else {
            fs::copy(&path, to.join(name)).expect("a copy");
        }
    }
}

/// A guest is built, from nothing where the machine has no toolchain for it.
const BUILD_WITHIN: Duration = Duration::from_secs(400);

#[test]
fn up_builds_a_project_and_prints_where_it_answers() {
    let _place = alone::shared();
    let dir = tempfile::tempdir().expect("a temporary directory");
    for folder in ["samples", "guest-sdk"] {
        copy(&guests::repository().join(folder), &dir.path().join(folder));
    }
    // The SDK is a member of the repository's workspace.
    fs::copy(
        guests::repository().join("Cargo.toml"),
        dir.path().join("Cargo.toml"),
    )
    .expect("a copy");
    let project = dir.path().join("samples/hello");
    let mut command = insula();
    command.arg("up").arg(&project).args([
        "--watch",
        "--listen",
        "127.0.0.1:0",
        "--admin",
        "127.0.0.1:0",
    ]);
    let run_files = dir.path().join("run");
    fs::create_dir(&run_files).expect("a folder");
    command.env("XDG_RUNTIME_DIR", &run_files);
    let mut up = Running::start(&mut command);
    let line = up.line("curl http://", BUILD_WITHIN);
    let url = line
        .split_whitespace()
        .find(|word| word.starts_with("http://"))
        .expect("a URL");
    let name = url
        .strip_prefix("http://")
        .and_then(|rest| rest.strip_suffix('/'))
        .expect("a URL");
    let (host_name, port) = name.rsplit_once(':').expect("a port");
    assert_eq!(host_name, "hello.demo.localhost");
    let address = SocketAddr::from(([127, 0, 0, 1], port.parse().expect("a port")));
    let ask = || Request::new(address, name, "GET", "/").send();
    assert_eq!(ask().text(), "Hello from Insula\n");

    // What it says to type works as it stands, from another terminal.
    // However the program under test is called.
    let line = up.line(" usage demo", Duration::from_secs(10));
    let words = line
        .strip_prefix("and")
        .expect("a command")
        .trim()
        .to_owned();
    until(Duration::from_secs(10), "usage is counted", || {
        let mut shell = Command::new("sh");
        shell.env("XDG_RUNTIME_DIR", &run_files);
        let output = tools::run(shell.arg("-c").arg(format!("{words} -o json")));
        assert!(
            output.status.success(),
            "{words:?}: {}",
            tools::said(&output)
        );
        let usage: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let counted = usage["requests"]["total"] == 1 && usage["fuel"].as_u64() > Some(0);
        holds(counted, usage.to_string())
    });

    // A change of the source is the next answer.
    let source = project.join("src/lib.rs");
    let text = fs::read_to_string(&source).expect("the source");
    fs::write(&source, text.replace("Hello from Insula", "Hello again")).expect("a change");
    up.line("version 2", BUILD_WITHIN);
    assert_eq!(ask().text(), "Hello again\n");
    // One that does not compile leaves the one before.
    fs::write(&source, "nonsense").expect("a change");
    up.line("error", BUILD_WITHIN);
    assert_eq!(ask().text(), "Hello again\n");

    up.signal(Signal::INT);
    let status = until(Duration::from_secs(20), "it has ended", || {
        up.child
            .try_wait()
            .expect("a child")
            .ok_or_else(|| "it runs".to_owned())
    });
    assert_eq!(status.code(), Some(0));
    assert!(
        Connection::open(address).is_err(),
        "the host is gone with it"
    );
}

#[test]
fn a_new_project_builds_and_answers_on_the_first_try() {
    let host = TestHost::start();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let typed = |folder: &Path, words: &[&str]| -> String {
        let mut command = insula();
        command.env("INSULA_ADMIN", host.admin_address().to_string());
        command.env("INSULA_DATA", host.data());
        let output = tools::run(command.args(words).current_dir(folder));
        assert!(
            output.status.success(),
            "{words:?}: {}",
            tools::said(&output)
        );
        String::from_utf8(output.stdout).expect("text")
    };
    typed(dir.path(), &["new", "shop"]);
    let again = tools::run(insula().args(["new", "shop"]).current_dir(dir.path()));
    assert_eq!(again.status.code(), Some(1), "{}", tools::said(&again));
    let project = dir.path().join("shop");
    let built = typed(&project, &["build"]);
    let component = fs::read(built.trim()).expect("the component that was named");
    assert!(component.starts_with(b"\0asm"), "{built}");
    let deployed = typed(
        &project,
        &[
            "deploy",
            "--tenant",
            "demo",
            "--service",
            "shop",
            "--create",
        ],
    );
    assert!(
        deployed.contains("http://shop.demo.localhost"),
        "{deployed}"
    );
    let answer = host
        .request("shop.demo.localhost", "GET", "/?name=you")
        .send();
    assert_eq!(
        (answer.status, answer.text().as_str()),
        (200, "Hello, you!\n")
    );
    let usage = until(Duration::from_secs(10), "usage is counted", || {
        let usage: Value =
            serde_json::from_str(&typed(&project, &["usage", "demo", "-o", "json"])).expect("JSON");
        holds(usage["requests"]["ok"] == 1, usage.to_string()).map(|()| usage)
    });
    assert!(usage["fuel"].as_u64() > Some(0), "{usage}");
}
