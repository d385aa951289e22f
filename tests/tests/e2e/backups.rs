//! Backups hold what volumes hold.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use insula_tests::http::Request;
use insula_tests::wait::{holds, until};
use insula_tests::{Service, TestHost, guests};
use serde_json::json;
use tempfile::TempDir;

fn insula(args: &[&str]) -> String {
    let mut command = Command::new(guests::insula());
    command.args(args).stdin(Stdio::null());
    let output = command.output().expect("the program");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{args:?}: {said}");
    said
}

fn back_up(host: &TestHost, folder: &Path) -> PathBuf {
    let (admin, token) = (host.admin_address().to_string(), host.token());
    let file = folder.join("backup.tar");
    let path = file.display().to_string();
    insula(&["backup", &path, "--admin", &admin, "--token", &token]);
    file
}

fn text_of(request: Request) -> String {
    let answer = request.send();
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.text()
}

/// Waits until a service of a host that begins is there.
fn served(host: &TestHost, service: &str, target: &str) {
    let name = format!("{service}.a.localhost");
    until(Duration::from_secs(60), "it is compiled and served", || {
        let answer = host.request(&name, "POST", target).send();
        holds(answer.status == 200, answer.status.to_string())
    });
}

/// A tenant with a volume of files and one of keys and values, and a service for each.
fn keepers(host: &TestHost) -> (Service, Service) {
    let tenant = host.tenant("a").create();
    let path = |name: &str| format!("/v1/tenants/a/volumes/{name}");
    host.admin().put(&path("data"), &json!({"size": "8MiB"}));
    host.admin().put(&path("empty"), &json!({}));
    let store = json!({"size": "8MiB", "kind": "store"});
    host.admin().put(&path("counters"), &store);
    let limits = json!({"fuel": "100G", "timeout": "60s"});
    let mounts = json!([{"name": "data", "path": "/data"}]);
    let files = tenant.service("files");
    let files = files.spec(json!({"volumes": mounts, "limits": limits}));
    let stores = json!([{"name": "counters"}]);
    let counter = tenant.service("counter");
    let counter = counter.spec(json!({"stores": stores, "limits": limits}));
    (files.deploy("files"), counter.deploy("counter"))
}

#[test]
fn what_volumes_hold_comes_back_as_of_one_moment() {
    let host = TestHost::start();
    let (files, counter) = keepers(&host);
    let large = "x".repeat(600_000);
    for (target, body) in [("/data/a.txt", "hello"), ("/data/large", &large)] {
        text_of(files.request("PUT", target).body(body));
    }
    text_of(files.post("/data/dir?do=mkdir", ""));
    text_of(files.post("/data/dir/link?do=symlink&to=../a.txt", ""));
    text_of(counter.request("PUT", "/k").body("before"));
    let place = TempDir::with_prefix("insula-test-").expect("a directory");
    // Guests write all the while: two numbers, always the one first that is not larger afterwards.
    let stop = AtomicBool::new(false);
    let file = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                text_of(counter.post("/first?do=increment", ""));
                text_of(counter.post("/second?do=increment", ""));
            }
        });
        let file = back_up(&host, place.path());
        stop.store(true, Ordering::Relaxed);
        file
    });
    text_of(counter.request("PUT", "/k").body("after"));
    let volumes = std::fs::read_dir(host.data().join("volumes"));
    assert_eq!(volumes.expect("a directory").count(), 3, "no copy is left");

    let data = place.path().join("restored").display().to_string();
    let said = insula(&["restore", &file.display().to_string(), "--data", &data]);
    assert!(said.contains("3 volumes"), "{said}");
    let other = TestHost::plan().data(&data).start();
    served(&other, "files", "/data?do=list");
    served(&other, "counter", "/?do=list");
    let get = |service: &str, target: &str| {
        text_of(other.request(&format!("{service}.a.localhost"), "GET", target))
    };
    assert_eq!(get("files", "/data/a.txt"), "hello");
    assert_eq!(get("files", "/data/large"), large);
    assert_eq!(get("files", "/data/dir/link"), "hello");
    assert_eq!(get("counter", "/k"), "before");
    let number = |key: &str| -> u64 {
        let answer = other.request("counter.a.localhost", "GET", key).send();
        if answer.status == 404 {
            return 0;
        }
        answer.text().parse().expect("a number")
    };
    let (first, second) = (number("/first"), number("/second"));
    let possible = [first, first.saturating_sub(1)];
    assert!(possible.contains(&second), "{second} of {first}");
    let known = other.admin_as(Some(&host.token()));
    let used = &known.get("/v1/tenants/a/volumes/data")["used_bytes"];
    let before = &host.admin().get("/v1/tenants/a/volumes/data")["used_bytes"];
    assert_eq!(used, before);
}
