//! A program with another engine, which can use nothing of what is compiled.
//!
//! Another engine is made of this one: a copy of the program in which the engine's version is another.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use insula_tests::wait::{holds, until};
use insula_tests::{Service, Tenant, TestHost, guests, load};
use serde_json::json;
use tempfile::TempDir;

use crate::kills::writer::Ending;
use crate::upgrades::saying;

/// Another program, and the version of its engine.
struct Another {
    directory: TempDir,
    engine: String,
}

impl Another {
    fn than(host: &TestHost) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let engine = guests::another_engine(&engine(host), &directory.path().join("insula"));
        Self { directory, engine }
    }

    fn program(&self) -> PathBuf {
        self.directory.path().join("insula")
    }
}

fn engine(host: &TestHost) -> String {
    let document = host.admin().get("/v1/host");
    document["wasmtime"].as_str().expect("a version").to_owned()
}

/// How many artefacts there are for each engine.
fn artefacts(host: &TestHost) -> BTreeMap<String, usize> {
    let mut counted = BTreeMap::new();
    for path in host.files("artefacts") {
        let name = path.file_name().expect("a name").to_string_lossy();
        let (_, engine) = name.split_once('-').expect("a digest and an engine");
        *counted.entry(engine.to_owned()).or_default() += 1;
    }
    counted
}

/// A version that does not serve; its preview's host name.
fn dark(service: &Service, host: &TestHost) -> String {
    let path = format!("{}/versions?activate=false", service.path());
    let upload = host.admin().upload(&path, guests::bytes("echo")).send();
    assert_eq!(upload.status, 201, "{}", upload.text());
    format!("v{}.{}", upload.json()["version"], service.host_name())
}

/// What is stored of a service's component is none any more.
fn spoil(host: &TestHost, service: &Service) {
    let versions = host.admin().get(&format!("{}/versions", service.path()));
    let digest = versions["items"][0]["digest"].as_str().expect("a digest");
    let digest = digest.strip_prefix("sha256:").expect("a digest");
    let mut blobs = host.files("blobs").into_iter();
    let blob = blobs.find(|path| path.ends_with(digest)).expect("a blob");
    fs::write(blob, "no component").expect("a file");
}

/// The host's stderr is read a little later than it is written.
fn says(host: &TestHost, words: &str) {
    until(Duration::from_secs(10), "the host says so", || {
        let said = host.said();
        holds(said.contains(words), said)
    });
}

/// Asked for what is not compiled, the host says that one should come again.
fn comes_again(host: &TestHost, name: &str) -> bool {
    let answer = host.request(name, "GET", "/").send();
    // By the guest itself: not every sample takes a GET.
    if [200, 405].contains(&answer.status) {
        return false;
    }
    assert_eq!(answer.status, 503, "{}", answer.text());
    assert_eq!(answer.json()["code"], "host_overloaded");
    let seconds = answer.header("retry-after").expect("when to come again");
    assert!(seconds.parse::<u32>().is_ok_and(|s| s > 0), "{seconds}");
    true
}

/// Services that answer at once, and one whose answers take a while.
fn some_services(tenant: &Tenant) -> (Vec<Service>, Service) {
    let quick = ["hello", "echo", "markdown"].map(|sample| tenant.deploy(sample));
    let slow = tenant.service("slow").limits(json!({"timeout": "60s"}));
    (quick.into(), slow.deploy("sse"))
}

/// Uploads versions of a service until it is time to end; how many were taken.
fn keep_deploying(host: &TestHost, service: &Service, ended: &AtomicBool) -> u64 {
    let mut taken = 0;
    for n in 1.. {
        if ended.load(Ordering::Relaxed) {
            break;
        }
        let path = format!("{}/versions", service.path());
        let version = saying(&format!("v{:03}", n % 1_000));
        let upload = host.admin().upload(&path, version);
        // The host that goes away may break it off.
        if upload.try_send().is_ok_and(|answer| answer.status == 201) {
            taken += 1;
        }
    }
    taken
}

#[test]
fn an_upgrade_to_another_engine_fails_no_request() {
    let host = TestHost::plan().arg("--drain", "30s").start();
    let tenant = host.tenant("a").create();
    let (quick, slow) = some_services(&tenant);
    let preview = dark(&quick[0], &host);
    let web = tenant.service("web").deploy_bytes(saying("v000"));
    let before = artefacts(&host);
    // The dark version has the component of `echo`.
    assert_eq!(before.values().sum::<usize>(), 5, "{before:?}");
    let (first, another) = (engine(&host), Another::than(&host));
    let ended = AtomicBool::new(false);
    let more = || !ended.load(Ordering::Relaxed);
    let paced = || {
        std::thread::sleep(Duration::from_millis(10));
        more()
    };
    let (loads, deployed) = std::thread::scope(|scope| {
        let ending = Ending(&ended);
        let mut clients = Vec::new();
        for service in quick.iter().chain([&web]) {
            let request = match service.name() {
                "markdown" => service.post("/", "# a"),
                "web" => service.get("/?count=1"),
                _ => service.get("/"),
            };
            clients.push(scope.spawn(move || load::as_long_as(paced, 2, &request)));
        }
        let request = slow.get("/");
        clients.push(scope.spawn(move || load::as_long_as(more, 2, &request)));
        let request = host.request(&preview, "GET", "/");
        clients.push(scope.spawn(move || load::as_long_as(paced, 1, &request)));

        host.install(another.program());
        host.upgrade();
        assert_eq!(engine(&host), another.engine);
        let after = artefacts(&host);
        assert_eq!(after.values().sum::<usize>(), 5, "{after:?}");
        assert!(after.keys().all(|engine| !before.contains_key(engine)));
        let shown = host.admin().get("/v1/recompilation");
        assert_eq!(
            shown["services"], 0,
            "nothing was left to the new host: {shown}"
        );
        says(&host, "5 of 5 services compiled");

        // Back, while versions come in that the host which goes away has compiled for itself.
        let deploying = scope.spawn(|| keep_deploying(&host, &web, &ended));
        host.install(guests::insula());
        host.upgrade();
        assert_eq!(engine(&host), first);
        drop(ending);
        let loads = clients
            .into_iter()
            .map(|client| client.join().expect("a client"));
        (
            loads.collect::<Vec<_>>(),
            deploying.join().expect("a client"),
        )
    });
    let all: u64 = loads.iter().map(load::Load::total).sum();
    eprintln!(
        "2 upgrades to another engine: {all} requests, {deployed} versions deployed meanwhile"
    );
    for load in loads {
        let (good, all) = (load.status(200), load.total());
        assert_eq!(good, all, "{:?} {:?}", load.statuses, load.problems);
        assert!(all > 0);
    }
}

#[test]
fn what_does_not_compile_again_holds_no_upgrade_up() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let (hello, markdown) = (tenant.deploy("hello"), tenant.deploy("markdown"));
    let preview = dark(&markdown, &host);
    spoil(&host, &hello);
    assert_eq!(hello.get("/").send().status, 200, "its code is there");
    let another = Another::than(&host);
    host.install(another.program());
    host.upgrade();
    assert_eq!(engine(&host), another.engine);
    assert_eq!(markdown.post("/", "# a").send().status, 200);
    assert!(!comes_again(&host, &preview), "compiled ahead");
    assert!(comes_again(&host, &hello.host_name()));
    assert_eq!(hello.upload(guests::bytes("hello")).status, 201);
    assert_eq!(hello.get("/").send().status, 200);
    says(&host, "1 could not be");
}

#[test]
fn a_start_with_another_engine_serves_each_service_when_it_is_compiled() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let (hello, markdown) = (tenant.deploy("hello"), tenant.deploy("markdown"));
    let preview = dark(&markdown, &host);
    spoil(&host, &hello);
    let another = Another::than(&host);
    host.install(another.program());
    host.restart();
    assert_eq!(engine(&host), another.engine);
    let patience = Duration::from_secs(60);
    for name in [markdown.host_name(), preview] {
        until(patience, "it is compiled", || {
            holds(!comes_again(&host, &name), name.clone())
        });
    }
    // The first of them, which cannot be compiled, has held up none.
    assert!(comes_again(&host, &hello.host_name()));
    let unknown = format!("v9.{}", hello.host_name());
    assert_eq!(host.request(&unknown, "GET", "/").send().status, 404);
    let shown = host.admin().get("/v1/recompilation");
    assert_eq!(shown["failed"], 1, "{shown}");
}
